"""Sparse products and the selections against dense ones."""

from __future__ import annotations

import pytest
import torch

import oracles
from crossdiff.crosscoder import kernels
from crossdiff.crosscoder.kernels import DenseCode, Encoded, SparseCode


def encoded(pre: torch.Tensor, norms: torch.Tensor, guess: float = 0.0) -> Encoded:
    """The pre-activations split into a product and a bias, exactly."""
    bias = torch.round(torch.randn(pre.shape[1], generator=torch.Generator().manual_seed(8)))
    return Encoded(pre - bias, bias, norms, guess=guess)


def random_code(seed: int = 0) -> tuple[torch.Tensor, SparseCode]:
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(9, 7, generator=generator, dtype=torch.float64).clamp(min=0)
    f[:, 2] = 0  # a latent without an active token
    f[4] = 0  # a token without an active latent
    token, latent = f.nonzero(as_tuple=True)
    return f, SparseCode(token, latent, f[token, latent], 9, 7)


def test_products() -> None:
    f, code = random_code()
    weights, table, full = (torch.randn(n, m, dtype=torch.float64) for n, m in ((7, 4), (9, 4), (9, 7)))
    dense = DenseCode(f, f > 0)
    expected = (table @ weights.T)[f > 0]
    for each in (dense, code):
        torch.testing.assert_close(each.decode(weights), f @ weights)
        torch.testing.assert_close(each.accumulate(each.values, table), f.T @ table)
        torch.testing.assert_close(each.sum_tokens(each.values), f.sum(0))
        assert torch.equal(each.counts(), (f > 0).sum(0))
    torch.testing.assert_close(code.dot(table, weights), expected)
    torch.testing.assert_close(dense.dot(table, weights), (table @ weights.T) * (f > 0))
    assert torch.equal(code.of_raw(full), full[f > 0])
    assert torch.equal(dense.of_raw(full), full * (f > 0))
    assert torch.equal(code.of_latents(weights[:, 0]), weights[:, 0].expand(9, 7)[f > 0])


@pytest.mark.parametrize("n_columns", [64, 65, 150])
def test_products_in_slices(n_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CACHED", 0)  # slices of the least width, 64 columns
    f, code = random_code()
    weights, table = (torch.randn(n, n_columns, dtype=torch.float64) for n in (7, 9))
    torch.testing.assert_close(code.decode(weights), f @ weights)
    torch.testing.assert_close(code.accumulate(code.values, table), f.T @ table)


def test_pairs_of_value_zero_are_in_the_products_but_not_active() -> None:
    code = SparseCode(torch.tensor([0, 1]), torch.tensor([2, 2]), torch.tensor([0.0, 3.0]), 2, 4)
    assert code.counts().tolist() == [0, 0, 1, 0]
    table = torch.tensor([[1.0], [10.0]])
    assert code.accumulate(torch.ones(2), table)[2].item() == 11


@pytest.mark.parametrize("guess", [0.0, 0.5, 1.0, 5.0, 1e6])
@pytest.mark.parametrize("n_keep", [1, 20, 500])
def test_selection_is_exact_whatever_the_guess(guess: float, n_keep: int) -> None:
    generator = torch.Generator().manual_seed(3)
    pre, norms = torch.randn(16, 20, generator=generator), torch.rand(20, generator=generator) + 0.1
    e = encoded(pre, norms, guess)
    mask = oracles.batch_topk(e.pre(), norms, n_keep)
    code, smallest = e.largest(n_keep)
    found = torch.zeros(16, 20, dtype=torch.bool)
    found[code.token, code.latent] = True
    assert torch.equal(found, mask)
    assert torch.equal(code.values, e.pre()[mask])
    assert smallest == pytest.approx(float((e.pre() * norms)[mask].min()))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_largest_of_each_token(k: int) -> None:
    generator = torch.Generator().manual_seed(4)
    pre, norms = torch.randn(16, 20, generator=generator), torch.rand(20, generator=generator) + 0.1
    e = encoded(pre, norms)
    mask = oracles.topk(e.pre(), norms, k)
    code = e.largest_of_each_token(k)
    found = torch.zeros(16, 20, dtype=torch.bool)
    found[code.token, code.latent] = True
    assert torch.equal(found, mask)
    assert torch.equal(code.values, e.pre()[mask])


def test_ties_keep_the_wanted_number() -> None:
    code, smallest = encoded(torch.ones(4, 5), torch.ones(5)).largest(7)
    assert len(code.values) == 7
    assert smallest == 1.0


def test_nothing_positive() -> None:
    code, smallest = encoded(-torch.ones(4, 5), torch.ones(5), 0.3).largest(7)
    assert len(code.values) == 0
    assert smallest == 0.0
    assert torch.equal(code.decode(torch.ones(5, 2)), torch.zeros(4, 2))


def test_dense_or_sparse_by_share() -> None:
    e = encoded(torch.tensor([[1.0, -1.0, -1.0, -1.0]]), torch.ones(4))
    assert isinstance(e.above(0.0, 0.5), SparseCode)
    dense = e.above(0.0, 0.1)
    assert isinstance(dense, DenseCode)
    assert dense.f.tolist() == [[1.0, 0.0, 0.0, 0.0]]
