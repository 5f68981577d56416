"""The GPU's kernels against float64: under Triton's interpreter, and compiled where there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdiff.config import BatchTopKConfig, CrosscoderConfig, FreeConfig, JumpReLUConfig, L1Config, Sparsity, TopKConfig
from crossdiff.crosscoder import gpu, kernels
from crossdiff.crosscoder.adam import Adam, rounded_at_random
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.kernels import Encoded, SparseCode
from crossdiff.crosscoder.losses import Loss, StepResult, TokensSinceFired
from crossdiff.crosscoder.structure import constraint_of

triton_kernels = pytest.importorskip("crossdiff.crosscoder.triton_kernels")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Tiles that the small inputs here do not fit evenly, and kernels on whatever device there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "has_kernels", lambda tensor: True)
        if DEVICE.type == "cpu":
            for name, size in (("PART", 16), ("COLUMNS", 8), ("ROWS", 2), ("UPDATED", 64)):
                patch.setattr(triton_kernels, name, size)
        yield


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 70), st.floats(-3, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_positions_above_a_limit(n_rows: int, n_columns: int, level: float, dtype: torch.dtype) -> None:
    raw = random(n_rows, n_columns, dtype=dtype)
    limit = level + random(n_columns, seed=1)
    found = triton_kernels.Above(raw, limit)
    expected = (raw.double() > limit.double()).flatten().nonzero().squeeze(1)
    assert found.number == len(expected)
    assert torch.equal(found.positions(), expected)


def test_values_equal_to_the_limit_are_not_above_it() -> None:
    raw = torch.ones(3, 20, device=DEVICE)
    assert triton_kernels.Above(raw, torch.ones(20, device=DEVICE)).number == 0
    assert triton_kernels.Above(raw, torch.zeros(20, device=DEVICE)).positions().tolist() == list(range(60))
    assert triton_kernels.Above(raw[:0], torch.zeros(20, device=DEVICE)).positions().tolist() == []


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(1, 20), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_products_of_a_sparse_code(n_tokens: int, n_latents: int, n_columns: int, share: float, dtype: torch.dtype) -> None:
    f = random(n_tokens, n_latents).abs() * (random(n_tokens, n_latents, seed=1) > 2 - 4 * share)  # from no pairs to nearly all
    token, latent = f.nonzero(as_tuple=True)
    code = SparseCode(token, latent, f[token, latent], n_tokens, n_latents)
    weights, table = random(n_latents, n_columns, seed=2, dtype=dtype), random(n_tokens, n_columns, seed=3, dtype=dtype)
    exact, wide, wide_table = f.double(), weights.double(), table.double()
    dots = (wide_table @ wide.T)[token, latent]
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(code.decode(weights).double(), exact @ wide, **near)
    torch.testing.assert_close(code.accumulate(code.values, table).double(), exact.T @ wide_table, **near)
    torch.testing.assert_close(code.dot(table, weights).double(), dots, **near)
    both = code.dot_and_accumulate(table, weights)
    torch.testing.assert_close(both[0].double(), dots, **near)
    torch.testing.assert_close(both[1].double(), exact.T @ wide_table, **near)
    two_models, directions = random(n_tokens, 2 * n_columns, seed=4), random(n_latents, 3, n_columns, seed=5)
    along = torch.einsum("ij,isd,jtd->tsj", exact, two_models.view(n_tokens, 2, n_columns).double(), directions.double())
    torch.testing.assert_close(code.accumulate_along(two_models, directions).double(), along, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(code.sum_tokens(code.values.double()), exact.sum(0))
    values = code.values.clone().requires_grad_()
    (code.sum_tokens(values) * weights[:, 0].float()).sum().backward()
    torch.testing.assert_close(values.grad, weights[latent, 0].float())


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 12), st.integers(1, 30), st.floats(0, 3), st.booleans())
def test_the_largest_of_a_batch(k: int, n_latents: int, guess: float, tied: bool) -> None:
    raw = random(7, n_latents)
    raw = raw.round() if tied else raw
    norms, bias = 1 + random(n_latents, seed=1).abs(), torch.zeros(n_latents, device=DEVICE)
    n_keep = 7 * min(k, n_latents)
    code, smallest = Encoded(raw, bias, norms, guess=guess).largest(n_keep)
    v = (raw.double() * norms.double()).clamp(min=0).flatten().sort(descending=True).values[:n_keep]
    v = v[v > 0]
    kept = (code.values.double() * norms.double()[code.latent]).sort(descending=True).values
    torch.testing.assert_close(kept, v)
    assert smallest == pytest.approx(float(v[-1]) if len(v) else 0.0)
    assert bool(((code.token * n_latents + code.latent).diff() > 0).all())


def reference(parameter: torch.Tensor, gradients: list[torch.Tensor], scale: float, rate: float) -> torch.Tensor:
    """Adam as in the paper, in float64."""
    p, m, v = parameter.double(), torch.zeros(1).to(parameter).double(), torch.zeros(1).to(parameter).double()
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double() / scale
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return p


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adam(moments: torch.dtype, with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes, one of a single parameter; the encoder has a copy in bfloat16."""
    monkeypatch.setattr(gpu, "has_kernels", lambda tensor: with_kernels)
    parameters = {"encoder": random(13, 21), "decoder": random(13, 21, seed=1), "bias": random(1, seed=2)}
    start = {name: p.clone() for name, p in parameters.items()}
    adam = Adam.of(parameters, moments, torch.bfloat16, seed=0)
    gradients = [{name: random(*p.shape, seed=10 * step + i) for i, (name, p) in enumerate(start.items())} for step in range(5)]
    for step, gradient in enumerate(gradients, 1):
        adam.update(gradient, torch.tensor(2.5, device=DEVICE), 0.01, step)
    for name, p in parameters.items():
        expected = reference(start[name], [g[name] for g in gradients], 2.5, 0.01)
        near = 1e-6 if moments == torch.float32 else 0.01 * 0.2  # moments of 8 bits move a step of the rate by percents
        assert float((p.double() - expected).abs().max()) < near
    unit = 2.0**-7 if DEVICE.type == "cpu" else 0.0  # the interpreter cuts digits off where a GPU rounds
    torch.testing.assert_close(adam.copies["encoder"], parameters["encoder"].bfloat16(), rtol=unit, atol=0.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
@pytest.mark.parametrize("with_kernels", [True, False])
def test_adam_updates_nothing_by_a_gradient_that_is_not_finite(
    scale: float, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "has_kernels", lambda tensor: with_kernels)
    parameters = {"encoder": random(5, 3), "decoder": random(5, 3, seed=1)}
    adam = Adam.of(parameters, torch.float32, torch.bfloat16, seed=0)
    before = [tensor.clone() for group in (adam.parameters, adam.first, adam.second, adam.copies) for tensor in group.values()]
    adam.update({name: random(5, 3, seed=3) * scale for name in parameters}, torch.tensor(scale, device=DEVICE), 0.01, 1)
    after = [tensor for group in (adam.parameters, adam.first, adam.second, adam.copies) for tensor in group.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("value", [1.001, -1.001, 1e-3])
def test_rounding_at_random_keeps_the_mean(value: float) -> None:
    """Neighbours of 1.001 in bfloat16 are 1 and 1.0078125, so about 13% of the numbers must be rounded up."""
    x = torch.full((20_000,), value, device=DEVICE)
    rounded = rounded_at_random(x, seed=3).double()
    assert len(rounded.unique()) <= 2
    assert float(rounded.mean()) == pytest.approx(value, abs=4 * abs(value) * 2**-8 / 2 / math.sqrt(len(x)))
    second = torch.zeros_like(x, dtype=torch.bfloat16)
    zero, scale = torch.zeros_like(x), torch.ones((), device=DEVICE)
    triton_kernels.adam(zero.clone(), x.abs(), torch.zeros_like(second), second, None, scale, 0.1, 1, 5)
    assert float(second.double().mean()) == pytest.approx(0.001 * value**2, rel=4 * 2**-8 / 2 / math.sqrt(len(x)))


def step_of(sparsity: Sparsity, copies: torch.dtype) -> tuple[StepResult, dict[str, torch.Tensor]]:
    coder = new_crosscoder(30, torch.zeros(2, 8), 1.0, sparsity, 1.0, seed=0).to(DEVICE)
    coder.encoder_bias += 0.1
    x = random(12, 2, 8)
    tokens = torch.zeros(30, dtype=torch.int64, device=DEVICE)
    tokens[:4] = 10**9
    coder.encoder_bias[:4] = -100.0  # dead
    loss = Loss(coder, "squared", constraint_of(FreeConfig(), 30, 2).to(DEVICE))
    tables = {name: tensor.to(copies) for name, tensor in coder.parameters().items()}
    return loss.gradients(x, TokensSinceFired(tokens, 10**8), weight=0.1, copies=tables), coder.parameters()


@pytest.mark.parametrize("copies", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sparsity", [BatchTopKConfig(k=3), TopKConfig(k=3), L1Config(), JumpReLUConfig(bandwidth=0.5)], ids=lambda s: s.kind
)
def test_a_step_with_the_kernels_is_one_without(
    sparsity: Sparsity, copies: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses' own tests compare the step without kernels with float64; in bfloat16, inputs differ by 2^-9."""
    mine, _ = step_of(sparsity, copies)
    monkeypatch.setattr(gpu, "has_kernels", lambda tensor: False)
    theirs, _ = step_of(sparsity, torch.float32)
    near = 1e-5 if copies == torch.float32 else 0.02
    for name in ("loss", "reconstruction", "sparsity", "aux"):
        assert float(getattr(mine, name)) == pytest.approx(float(getattr(theirs, name)), rel=near, abs=1e-9)
    for name, gradient in mine.gradients.items():
        error = (gradient - theirs.gradients[name]).norm() / theirs.gradients[name].norm().clamp(min=1e-6)
        assert float(error) < (near if copies == torch.float32 else 0.1), name


def test_torch_is_used_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has_kernels", lambda tensor: False)
    assert isinstance(kernels.above(torch.ones(2, 2), torch.zeros(2)), kernels._Above)


def test_settings_of_precision_are_recorded_where_they_are_not_the_default() -> None:
    plain = CrosscoderConfig(sparsity=BatchTopKConfig())
    assert not {"matmul", "optimizer_state"} & set(plain.model_dump(mode="json"))
    assert CrosscoderConfig(sparsity=BatchTopKConfig(), matmul="float32").model_dump(mode="json")["matmul"] == "float32"
