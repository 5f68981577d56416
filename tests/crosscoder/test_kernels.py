"""Sparse products and BatchTopK selection against dense ones."""

from __future__ import annotations

import pytest
import torch

import oracles
from crossdiff.crosscoder.kernels import DenseCode, SparseCode, above_code, largest_code, positive_code


def random_code(seed: int = 0) -> tuple[torch.Tensor, SparseCode]:
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(9, 7, generator=generator, dtype=torch.float64).clamp(min=0)
    f[:, 2] = 0  # a latent without an active token
    f[4] = 0  # a token without an active latent
    flat = f.flatten().nonzero().squeeze(1)
    return f, SparseCode.at(flat, f.flatten()[flat], 9, 7)


def test_products() -> None:
    f, code = random_code()
    weights, table = torch.randn(7, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    dense = DenseCode(f)
    torch.testing.assert_close(code.decode(weights), f @ weights)
    torch.testing.assert_close(dense.decode(weights), f @ weights)
    expected = (table @ weights.T)[f > 0]
    torch.testing.assert_close(code.dot(table, weights), expected)
    torch.testing.assert_close(dense.dot(table, weights)[f > 0], expected)
    torch.testing.assert_close(code.accumulate(code.values, table), f.T @ table)
    torch.testing.assert_close(dense.accumulate(f, table), f.T @ table)
    torch.testing.assert_close(code.sum_tokens(code.values), f.sum(0))
    assert torch.equal(code.counts(), (f > 0).sum(0))


@pytest.mark.parametrize("guess", [0.0, 0.5, 1.0, 5.0, 1e6])
@pytest.mark.parametrize("n_keep", [1, 20, 500])
def test_selection_is_exact_whatever_the_guess(guess: float, n_keep: int) -> None:
    generator = torch.Generator().manual_seed(3)
    pre, norms = torch.randn(16, 20, generator=generator), torch.rand(20, generator=generator) + 0.1
    mask = oracles.batch_topk(pre, norms, n_keep)
    code, smallest = largest_code(pre, norms, n_keep, guess)
    found = torch.zeros(16, 20, dtype=torch.bool)
    found[code.token, code.latent] = True
    assert torch.equal(found, mask)
    assert torch.equal(code.values, pre[mask])
    v = (pre * norms)[mask]
    assert smallest == pytest.approx(float(v.min()))


def test_ties_keep_the_wanted_number() -> None:
    code, smallest = largest_code(torch.ones(4, 5), torch.ones(5), 7, 0.0)
    assert len(code.values) == 7
    assert smallest == 1.0


def test_nothing_positive() -> None:
    code, smallest = largest_code(-torch.ones(4, 5), torch.ones(5), 7, 0.3)
    assert len(code.values) == 0
    assert smallest == 0.0
    assert torch.equal(code.decode(torch.ones(5, 2)), torch.zeros(4, 2))


def test_threshold_is_on_v_not_on_f() -> None:
    # v = [1*3, 2*1] = [3, 2]: only the first is above 2.5, though its f is smaller.
    code = above_code(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 1.0]), 2.5)
    assert code.latent.tolist() == [0]


def test_dense_or_sparse_by_share() -> None:
    pre = torch.tensor([[1.0, -1.0, -1.0, -1.0]])
    assert isinstance(positive_code(pre, 0.5), SparseCode)
    assert isinstance(positive_code(pre, 0.1), DenseCode)
