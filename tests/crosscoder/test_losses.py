"""Hand-written gradients against dense autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from crossdiff.config import BatchTopKConfig, L1Config
from crossdiff.crosscoder.losses import step_gradients
from crossdiff.crosscoder.model import Crosscoder

N_LATENTS, D = 12, 5


def make(n_sources: int, sparsity: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Crosscoder:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Crosscoder(
        encoder=random(N_LATENTS, n_sources * D), encoder_bias=random(N_LATENTS) - 0.5,
        decoder=random(N_LATENTS, n_sources * D), decoder_bias=random(n_sources * D),
        mean=torch.zeros(n_sources, D, dtype=dtype), scale=1.0, sparsity=sparsity,
    )  # fmt: skip


def check(crosscoder: Crosscoder, x: Tensor, mask: Tensor, kind: str, mu: float, dead: list[int], aux_k: int) -> None:
    dead_mask = torch.zeros(N_LATENTS, dtype=torch.bool)
    dead_mask[dead] = True
    weight = getattr(crosscoder.sparsity, "aux_weight", 0.0)
    result = step_gradients(crosscoder, x, kind, mu, dead_mask)  # type: ignore[arg-type]
    parameters = {name: p.double().requires_grad_() for name, p in crosscoder.parameters().items()}
    expected = oracles.loss(parameters, x.double(), mask.double(), kind, mu, dead, aux_k, weight)
    expected["loss"].backward()
    for part in ("loss", "reconstruction", "sparsity", "aux"):
        assert getattr(result, part) == pytest.approx(expected[part].item(), rel=1e-5, abs=1e-9), part
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        got = getattr(result.gradients, name).double()
        error = (got - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("n_sources", [1, 2, 3])
@pytest.mark.parametrize("kind", ["squared", "norm"])
@pytest.mark.parametrize("shift", [0.0, -7.0])  # dense codes, and codes sparse enough for the sparse path
def test_l1(n_sources: int, kind: str, shift: float) -> None:
    crosscoder = make(n_sources, L1Config())
    crosscoder.encoder_bias += shift
    x = torch.randn(400, n_sources, D, generator=torch.Generator().manual_seed(1))
    share = float((crosscoder.pre_activations(x) > 0).double().mean())
    assert (share < 0.05) == (shift < 0), share
    check(crosscoder, x, torch.ones(400, N_LATENTS), kind, 0.3, [], 1)


@pytest.mark.parametrize("n_sources", [1, 2, 3])
@pytest.mark.parametrize("kind", ["squared", "norm"])
@pytest.mark.parametrize("dead", [[], [2], [0, 3, 7, 9, 11]])
def test_batchtopk_with_and_without_aux(n_sources: int, kind: str, dead: list[int]) -> None:
    crosscoder = make(n_sources, BatchTopKConfig(k=2, aux_k=3, aux_weight=0.5))
    x = torch.randn(16, n_sources, D, generator=torch.Generator().manual_seed(1))
    pre, norms = crosscoder.pre_activations(x), crosscoder.norms().sum(1)
    mask = oracles.batch_topk(pre, norms, 32)
    assert int(mask.sum()) == 32
    check(crosscoder, x, mask, kind, 0.0, dead, 3)


def test_fewer_positive_than_k_and_latents_that_never_fire() -> None:
    crosscoder = make(2, BatchTopKConfig(k=12))
    crosscoder.encoder_bias[:6] = -100.0
    x = torch.randn(8, 2, D, generator=torch.Generator().manual_seed(1))
    mask = crosscoder.pre_activations(x) > 0
    assert int(mask.sum()) < 12 * 8
    check(crosscoder, x, mask, "squared", 0.0, [], 1)


def test_the_aux_term_is_back_propagated() -> None:
    crosscoder = make(2, BatchTopKConfig(k=1, aux_weight=1.0))
    crosscoder.encoder_bias[3] = 0.1
    x = torch.randn(16, 2, D, generator=torch.Generator().manual_seed(1))
    dead = torch.zeros(N_LATENTS, dtype=torch.bool)
    without = step_gradients(crosscoder, x, "squared", dead=dead)
    dead[3] = True
    with_aux = step_gradients(crosscoder, x, "squared", dead=dead)
    assert with_aux.aux > 0
    assert with_aux.loss == pytest.approx(without.loss + with_aux.aux)
    assert not torch.equal(with_aux.gradients.decoder[3], without.gradients.decoder[3])
    assert torch.equal(with_aux.gradients.decoder[4], without.gradients.decoder[4])


def test_rescaling_a_latent_changes_f_but_not_v_and_not_the_loss() -> None:
    # encoder and bias times 2, decoder over 2: f doubles, f * d stays, v = f * norm stays.
    plain, scaled = make(2, BatchTopKConfig(k=2)), make(2, BatchTopKConfig(k=2))
    scaled.encoder[4] *= 2
    scaled.encoder_bias[4] *= 2
    scaled.decoder[4] /= 2
    x = torch.randn(16, 2, D, generator=torch.Generator().manual_seed(1))
    assert step_gradients(plain, x, "squared").loss == pytest.approx(step_gradients(scaled, x, "squared").loss, rel=1e-5)
