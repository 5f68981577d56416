"""Hand-written gradients against dense autograd in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from crossdiff.config import (
    AuxConfig,
    BatchTopKConfig,
    DesignatedConfig,
    FreeConfig,
    JumpReLUConfig,
    L1Config,
    PartitionedConfig,
    TopKConfig,
)
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import DenseCode, SparseCode
from crossdiff.crosscoder.losses import Loss, StepResult, TokensSinceFired
from crossdiff.crosscoder.mesh import Mesh
from crossdiff.crosscoder.structure import Constraint, constraint_of
from crossdiff.crosscoder.view import identity

N_LATENTS, D = 12, 5
FREE = FreeConfig()


def make(n_sources: int, sparsity: Any, seed: int = 0, structure: Any = FREE) -> Crosscoder:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    own = {"log_threshold": random(N_LATENTS) * 0.3} if isinstance(sparsity, JumpReLUConfig) else {}
    crosscoder = Crosscoder(
        encoder=random(N_LATENTS, n_sources * D), encoder_bias=random(N_LATENTS) - 0.5,
        decoder=random(N_LATENTS, n_sources * D), decoder_bias=random(n_sources * D),
        mean=torch.zeros(n_sources, D), scale=1.0, sparsity=sparsity, view=identity(tuple("abc"[:n_sources])), own=own,
    )  # fmt: skip
    constraint_of(structure, N_LATENTS, n_sources).settle(crosscoder.parameters())
    return crosscoder


def inputs(n_tokens: int, n_sources: int, seed: int = 1) -> Tensor:
    return torch.randn(n_tokens, n_sources, D, generator=torch.Generator().manual_seed(seed))


def step(crosscoder: Crosscoder, x: Tensor, kind: Any = "squared", dead: tuple[int, ...] = (), **changes: Any) -> StepResult:
    """A step in which the latents `dead` count as dead unless they fire in this batch."""
    tokens = torch.zeros(N_LATENTS, dtype=torch.int64)
    tokens[list(dead)] = 10**9
    constraint = changes.pop("constraint", constraint_of(FREE, N_LATENTS, crosscoder.n_sources))
    difference = changes.pop("difference", 0.0)
    loss = Loss(crosscoder, kind, constraint, difference_weight=difference)
    return loss.gradients(x, TokensSinceFired(tokens, 10**8), **changes)


def check(
    crosscoder: Crosscoder,
    x: Tensor,
    mask: Tensor,
    kind: str,
    terms: oracles.Terms,
    dead: tuple[int, ...] = (),
    constraint: Constraint | None = None,
) -> StepResult:
    constraint = constraint or constraint_of(FREE, N_LATENTS, crosscoder.n_sources)
    result = step(crosscoder, x, kind, dead, weight=terms.mu, constraint=constraint, difference=terms.difference)
    still = [j for j in dead if not bool(mask[:, j].any())]
    parameters = {name: p.double().requires_grad_() for name, p in crosscoder.parameters().items()}
    expected = oracles.loss(parameters, x.double(), mask.double(), kind, replace(terms, dead=still))
    expected["loss"].backward()
    for part in ("loss", "reconstruction", "sparsity", "aux"):
        assert getattr(result, part) == pytest.approx(expected[part].item(), rel=1e-5, abs=1e-9), part
    gradients = {name: p.grad for name, p in parameters.items()}
    for name, gradient in gradients.items():
        assert gradient is not None
        if name in ("encoder", "decoder"):
            split = gradient.view(N_LATENTS, crosscoder.n_sources, D)
            if name == "decoder":
                split[constraint.tied] = split[constraint.tied].sum(1, keepdim=True).expand(-1, crosscoder.n_sources, -1)
            split *= constraint.present.unsqueeze(2)
        error = (result.gradients[name].double() - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{name}: {error}"
    return result


@pytest.mark.parametrize("n_sources", [1, 2, 3])
@pytest.mark.parametrize("kind", ["squared", "norm"])
@pytest.mark.parametrize("shift", [0.0, -7.0])  # dense codes, and codes sparse enough for the sparse path
def test_l1(n_sources: int, kind: str, shift: float) -> None:
    crosscoder = make(n_sources, L1Config())
    crosscoder.encoder_bias += shift
    x = inputs(400, n_sources)
    share = float((crosscoder.pre_activations(x) > 0).double().mean())
    assert (share < 0.05) == (shift < 0), share
    check(crosscoder, x, torch.ones(400, N_LATENTS), kind, oracles.Terms(mu=0.3))


@pytest.mark.parametrize("n_sources", [2, 3])
@pytest.mark.parametrize("kind", ["squared", "norm"])
def test_error_in_the_difference(n_sources: int, kind: str) -> None:
    crosscoder = make(n_sources, L1Config())
    check(crosscoder, inputs(400, n_sources), torch.ones(400, N_LATENTS), kind, oracles.Terms(mu=0.3, difference=0.7))


def test_equal_sources_have_no_error_in_the_difference() -> None:
    crosscoder, x = make(2, L1Config()), inputs(40, 2)
    x[:, 1] = x[:, 0]
    with_weight, without = (step(crosscoder, x, difference=weight) for weight in (1.0, 0.0))
    assert with_weight.loss == without.loss
    assert all(torch.equal(with_weight.gradients[name], gradient) for name, gradient in without.gradients.items())


@pytest.mark.parametrize("n_sources", [1, 2, 3])
@pytest.mark.parametrize("kind", ["squared", "norm"])
@pytest.mark.parametrize("dead", [(), (2,), (0, 3, 7, 9, 11)])
@pytest.mark.parametrize("sparsity", [BatchTopKConfig, TopKConfig])
def test_selections_with_and_without_aux(n_sources: int, kind: str, dead: tuple[int, ...], sparsity: Any) -> None:
    crosscoder = make(n_sources, sparsity(k=2, aux=AuxConfig(k=3, weight=0.5)))
    crosscoder.encoder_bias[[0, 3, 7, 11]] -= 9.0  # dead ones are silent in the batch, but for 2 and 9
    crosscoder.encoder_bias[9] -= 2.0
    x = inputs(16, n_sources)
    pre, norms = crosscoder.pre_activations(x), crosscoder.norms().sum(1)
    mask = oracles.batch_topk(pre, norms, 32) if sparsity is BatchTopKConfig else oracles.topk(pre, norms, 2)
    assert int(mask.sum()) > 16
    check(crosscoder, x, mask, kind, oracles.Terms(aux_k=3, aux_weight=0.5), dead)


def test_a_latent_that_fires_in_this_batch_is_not_dead() -> None:
    crosscoder = make(2, BatchTopKConfig(k=6))
    result = step(crosscoder, inputs(16, 2), dead=tuple(range(N_LATENTS)))
    pre = crosscoder.pre_activations(inputs(16, 2))
    fired = oracles.batch_topk(pre, crosscoder.norms().sum(1), 96).any(0)
    assert fired.sum() > 6
    assert torch.equal(result.since_fired.tokens == 0, fired)
    assert result.since_fired.dead().tolist() == (~fired).nonzero().squeeze(1).tolist()


def test_fewer_positive_than_k_and_latents_that_never_fire() -> None:
    crosscoder = make(2, BatchTopKConfig(k=12))
    crosscoder.encoder_bias[:6] = -100.0
    x = inputs(8, 2)
    mask = crosscoder.pre_activations(x) > 0
    assert int(mask.sum()) < 12 * 8
    check(crosscoder, x, mask, "squared", oracles.Terms())


@pytest.mark.parametrize("n_sources", [1, 2, 3])
@pytest.mark.parametrize("trouble", ["ties", "nothing positive", "a decoder direction of 0"])
def test_the_gradients_are_those_of_the_selection_that_was_made(n_sources: int, trouble: str) -> None:
    crosscoder, x, dead = make(n_sources, BatchTopKConfig(k=2, aux=AuxConfig(k=3, weight=0.5))), inputs(16, n_sources), (3,)
    if trouble == "ties":  # each token four times, latent 1 equal to latent 0
        x = x[:4].repeat(4, 1, 1)
        for parameter in (crosscoder.encoder, crosscoder.encoder_bias, crosscoder.decoder):
            parameter[1] = parameter[0]
    elif trouble == "nothing positive":
        crosscoder.encoder_bias -= 100
    else:
        crosscoder.decoder[3] = 0
    code, _ = crosscoder.rule.select(crosscoder.encode(x, crosscoder.norms().sum(1)), Mesh())
    assert isinstance(code, SparseCode)
    mask = torch.zeros(16, N_LATENTS)
    mask[code.token, code.latent] = 1
    assert int(mask.sum()) == (0 if trouble == "nothing positive" else 32)
    check(crosscoder, x, mask, "squared", oracles.Terms(aux_k=3, aux_weight=0.5), dead)


@pytest.mark.parametrize("n_sources", [1, 2, 3])
@pytest.mark.parametrize(("bandwidth", "shift"), [(2.0, 0.0), (1.0, -5.0)])  # dense, and sparse with a window
def test_jumprelu(n_sources: int, bandwidth: float, shift: float) -> None:
    settings = JumpReLUConfig(bandwidth=bandwidth, tanh_scale=0.7, pre_activation_weight=0.02)
    crosscoder = make(n_sources, settings)
    crosscoder.encoder_bias += shift * n_sources**0.5
    x = inputs(400, n_sources)
    theta = crosscoder.own["log_threshold"].exp()
    code, _ = crosscoder.rule.select(crosscoder.encode(x, crosscoder.norms().sum(1)), Mesh())
    assert isinstance(code, DenseCode) == (shift == 0.0)
    pre = crosscoder.pre_activations(x)
    assert bool(((pre < theta) & (pre > theta - bandwidth / 2)).any()), "the window holds silent pairs"
    terms = oracles.Terms(mu=0.4, tanh_scale=0.7, pull=0.02, bandwidth=bandwidth)
    result = check(crosscoder, x, pre > theta, "squared", terms)
    assert float(result.gradients["log_threshold"].abs().max()) > 0
    assert torch.equal(crosscoder.sparse_code(x).counts(), (pre > theta).sum(0))


@pytest.mark.parametrize("structure", [DesignatedConfig(shared_share=0.4), PartitionedConfig(exclusive_share=0.25)])
@pytest.mark.parametrize(
    "sparsity", [L1Config(), BatchTopKConfig(k=2), JumpReLUConfig(bandwidth=1.0, pre_activation_weight=0.1)]
)
def test_structures(structure: Any, sparsity: Any) -> None:
    crosscoder = make(2, sparsity, structure=structure)
    constraint = constraint_of(structure, N_LATENTS, 2)
    x = inputs(64, 2)
    pre = crosscoder.pre_activations(x)
    mask = torch.ones(64, N_LATENTS)
    if isinstance(sparsity, BatchTopKConfig):
        mask = oracles.batch_topk(pre, crosscoder.norms().sum(1), 128)
    shares = torch.ones(N_LATENTS)
    if isinstance(structure, DesignatedConfig):
        shares[:5] = structure.penalty_factor  # 0.4 of 12
    mu = 0.0 if isinstance(sparsity, BatchTopKConfig) else 0.3
    terms = oracles.Terms(mu=mu, shares=shares, tanh_scale=4.0, pull=0.1, bandwidth=1.0)
    gradients = check(crosscoder, x, mask, "squared", terms, constraint=constraint).gradients["decoder"].view(N_LATENTS, 2, D)
    if isinstance(structure, DesignatedConfig):
        assert torch.equal(gradients[:5, 0], gradients[:5, 1])
        assert not torch.equal(gradients[5:, 0], gradients[5:, 1])
    else:  # three latents each
        assert not gradients[:3, 1].any() and not gradients[3:6, 0].any() and gradients[6:].any()


def test_the_aux_term_is_back_propagated() -> None:
    crosscoder = make(2, BatchTopKConfig(k=1, aux=AuxConfig(weight=1.0)))
    crosscoder.encoder[3], crosscoder.encoder_bias[3] = 1e-3 * crosscoder.encoder[3], 1e-3  # positive, never selected
    without, with_aux = step(crosscoder, inputs(16, 2)), step(crosscoder, inputs(16, 2), dead=(3,))
    assert with_aux.aux > 0
    assert float(with_aux.loss) == pytest.approx(float(without.loss + with_aux.aux))
    assert not torch.equal(with_aux.gradients["decoder"][3], without.gradients["decoder"][3])
    assert torch.equal(with_aux.gradients["decoder"][4], without.gradients["decoder"][4])


def test_rescaling_a_latent_changes_f_but_not_v_and_not_the_loss() -> None:
    # encoder and bias times 2, decoder over 2: f doubles, f * d stays, v = f * norm stays.
    plain, scaled = make(2, BatchTopKConfig(k=2)), make(2, BatchTopKConfig(k=2))
    scaled.encoder[4] *= 2
    scaled.encoder_bias[4] *= 2
    scaled.decoder[4] /= 2
    assert float(step(plain, inputs(16, 2)).loss) == pytest.approx(float(step(scaled, inputs(16, 2)).loss), rel=1e-5)


def test_inference_threshold_is_on_v_not_on_f() -> None:
    # v = [1*3, 2*1] = [3, 2]: only the first is above 2.5, though its f is smaller.
    crosscoder = make(1, BatchTopKConfig(k=1))
    crosscoder.encoder, crosscoder.encoder_bias = torch.zeros(2, D), torch.tensor([1.0, 2.0])
    crosscoder.decoder = torch.zeros(2, D)
    crosscoder.decoder[0, 0], crosscoder.decoder[1, 1] = 3.0, 1.0
    crosscoder.threshold = 2.5
    assert crosscoder.sparse_code(torch.zeros(1, 1, D)).latent.tolist() == [0]
