"""Published coders against what their own formats say they compute, in float64 from the tensors of the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossdiff.config import BatchTopKConfig, JumpReLUConfig, L1Config, TopKConfig
from crossdiff.crosscoder.checkpoint import load, save
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.errors import UserError
from crossdiff.published.coder import TensorFile
from crossdiff.published.formats import read_coder, read_published

N, D, F = 64, 6, 10
NORMALISATION = ("target_rms", "activation_mean", "activation_std", "activation_global_scale")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(n_sources: int) -> Tensor:
    return random(N, n_sources, D, seed=7).double() * 2 + 0.5


def dense(crosscoder: Crosscoder, h: Tensor) -> tuple[Tensor, Tensor]:
    """Latent activations and the reconstruction in the models' space."""
    x = crosscoder.normalise(h)
    code = crosscoder.sparse_code(x)
    f = torch.zeros(len(h), crosscoder.n_latents, dtype=h.dtype)
    f[code.token, code.latent] = code.values
    torch.testing.assert_close(crosscoder.reconstruct(h), crosscoder.decode(code) / crosscoder.scale + crosscoder.mean.to(h))
    return f, crosscoder.reconstruct(h)


def check(
    path: Path, h: Tensor, f: Tensor, reconstruction: Tensor, kind: str, scales: tuple[float, ...] | None = None
) -> Crosscoder:
    """The coder of the file has these activations and this reconstruction, exactly and as it is read (float32)."""
    assert 0.02 < float((f > 0).double().mean()) < 0.98  # or nothing would be tested
    coder = read_coder(TensorFile(path))
    coder = coder if scales is None else coder.with_input_scales(scales)
    names = tuple("abc"[: h.shape[1]])
    exact = coder.crosscoder(names, torch.float64)
    found_f, found = dense(exact, h)
    torch.testing.assert_close(found_f, f, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found, reconstruction, rtol=1e-11, atol=1e-11)
    read = read_published(path, names, scales)
    assert (read.sparsity.kind, read.sources, read.encoder.dtype) == (kind, names, torch.float32)
    found_f, found = dense(read, h.float())
    torch.testing.assert_close(found_f.double(), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.double(), reconstruction, rtol=1e-4, atol=1e-4)
    return read


# --- the fork ---------------------------------------------------------------------------------------------------------


def fork_tensors(n_sources: int = 2) -> dict[str, Tensor]:
    decoder = random(n_sources, F, D) * torch.linspace(0.3, 2.0, F)[:, None]
    decoder[:, 3] = 0  # a latent that writes nothing
    decoder[0, 4] = 0
    return {
        "encoder.weight": random(n_sources, D, F) * 0.4,
        "encoder.bias": random(F) * 0.3,
        "decoder.weight": decoder,
        "decoder.bias": random(n_sources, D),
    }


def fork_normalisation(scales: tuple[float, ...]) -> dict[str, Tensor]:
    return {
        "target_rms": torch.tensor(1.0),
        "activation_mean": random(len(scales), D, seed=3),
        "activation_std": random(len(scales), D, seed=4).abs(),
        "activation_global_scale": torch.tensor(scales),
    }


def unset_normalisation(n_sources: int) -> dict[str, Tensor]:
    nan = torch.full((n_sources, D), torch.nan)
    ones = torch.ones(n_sources)
    return dict(zip(NORMALISATION, (torch.tensor(1.0), nan, nan.clone(), ones), strict=True))


def batch_topk(k: int, threshold: float) -> dict[str, Tensor]:
    return {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(threshold)}


def fork_measure(tensors: dict[str, Tensor], number: int, alphas: tuple[float, float] = (1.0, 0.1)) -> Tensor:
    """What f is multiplied by: entry by entry, from the enumeration's meaning."""
    squares = tensors["decoder.weight"].double().pow(2)
    each, together = squares.sum(2).sqrt().sum(0), squares.sum((0, 2)).sqrt()
    return [each, together, alphas[0] * together + alphas[1] * each, torch.ones(F, dtype=torch.float64)][number - 1]


def fork_output(tensors: dict[str, Tensor], h: Tensor, alphas: tuple[float, float] = (1.0, 0.1)) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction as the fork computes them at inference, where a missing threshold is -1."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    normalised = "activation_mean" in t and not bool(t["activation_mean"].isnan().any())
    x = h
    if normalised:
        x = (h - t["activation_mean"]) * t["activation_global_scale"][:, None]
    f = (torch.einsum("bsd,sdf->bf", x, t["encoder.weight"]) + t["encoder.bias"]).relu()
    if "k" in t:
        v = f * fork_measure(tensors, int(t.get("code_normalization_id", torch.tensor(1))), alphas)
        f = f * (v > t.get("threshold", torch.tensor(-1.0)))
    out = torch.einsum("bf,sfd->bsd", f, t["decoder.weight"]) + t["decoder.bias"]
    if normalised:
        out = out / (t["activation_global_scale"][:, None] + 1e-8) + t["activation_mean"]
    return f, out


IDENTIFIER = {"code_normalization_id": torch.tensor(1)}
FORK_CASES: dict[str, tuple[dict[str, Tensor], str]] = {
    "relu, the four old keys": ({}, "l1"),
    "relu, newer keys, nothing set": (IDENTIFIER | unset_normalisation(2), "l1"),
    "relu, another code normalisation": ({"code_normalization_id": torch.tensor(5)}, "l1"),
    "relu, one scale": (fork_normalisation((0.3, 0.3)), "l1"),
    "relu, a scale per source": (fork_normalisation((0.3, 0.0004)), "l1"),
    "batchtopk, old keys": (batch_topk(3, 1.5), "batchtopk"),
    "batchtopk, threshold 0": (IDENTIFIER | batch_topk(3, 0.0) | {"decoder.weight": random(2, F, D)}, "batchtopk"),
    "batchtopk, one scale": (IDENTIFIER | batch_topk(3, 1.1) | fork_normalisation((0.3, 0.3)), "batchtopk"),
    "batchtopk, one small scale": (IDENTIFIER | batch_topk(3, 1.1) | fork_normalisation((1e-4, 1e-4)), "batchtopk"),
    "batchtopk, a scale per source": (IDENTIFIER | batch_topk(3, 1.1) | fork_normalisation((0.3, 0.4)), "jumprelu"),
    "batchtopk, SAE": ({"code_normalization_id": torch.tensor(2)} | batch_topk(3, 1.1), "jumprelu"),
    "batchtopk, MIXED": ({"code_normalization_id": torch.tensor(3)} | batch_topk(3, 1.1), "jumprelu"),
    "batchtopk, NONE": ({"code_normalization_id": torch.tensor(4)} | batch_topk(3, 0.7), "jumprelu"),
    "threshold not set yet": (IDENTIFIER | batch_topk(3, -1.0), "l1"),
    "no threshold": ({"k": torch.tensor(2)}, "l1"),
}


@pytest.mark.parametrize("case", FORK_CASES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_forks_crosscoders(tmp_path: Path, case: str, suffix: str) -> None:
    more, kind = FORK_CASES[case]
    tensors = fork_tensors() | more
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, path)
    else:
        save_file(tensors, path)
    read = check(path, inputs(2), *fork_output(tensors, inputs(2)), kind)
    if kind == "batchtopk":
        assert read.sparsity.k == int(tensors["k"])
    unset = "k" in tensors and float(tensors.get("threshold", torch.tensor(-1.0))) < 0
    assert read.origin["published"].get("threshold") == ("never set" if unset else None)


def test_one_and_three_sources(tmp_path: Path) -> None:
    for n_sources in (1, 3):
        tensors = fork_tensors(n_sources) | batch_topk(4, 0.9)
        path = tmp_path / f"{n_sources}.safetensors"
        save_file(tensors, path)
        check(path, inputs(n_sources), *fork_output(tensors, inputs(n_sources)), "batchtopk")
        assert read_published(path).sources == {1: ("base",), 3: ("source0", "source1", "source2")}[n_sources]


def test_settings_beside_the_weights_count(tmp_path: Path) -> None:
    tensors = fork_tensors() | batch_topk(3, 1.1)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "activation_dim": D, "dict_size": F, "num_layers": 2, "encoder_layers": None, "code_normalization": "MIXED",
        "code_normalization_alpha_sae": 0.5, "code_normalization_alpha_cc": 2.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "trainer_config.json").write_text(json.dumps({"trainer": {"layer": 13, "dict_class": "BatchTopKCrossCoder"}}))
    mixed = tensors | {"code_normalization_id": torch.tensor(3)}
    read = check(tmp_path / "model.safetensors", inputs(2), *fork_output(mixed, inputs(2), (0.5, 2.0)), "jumprelu")
    assert read.origin["published"]["architecture"] == "BatchTopKCrossCoder, code normalisation MIXED"
    assert (read.origin["layer"], read.origin["pair"]) == (13, None)
    assert read_published(tmp_path).sources == ("base", "chat")


def test_a_topk_that_lost_its_k_is_refused(tmp_path: Path) -> None:
    save_file(fork_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"k": 4}))
    assert read_published(tmp_path).origin["published"]["k"] == 4
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKCrossCoder"}}))
    with pytest.raises(UserError, match="BatchTopK crosscoder and has no k"):
        read_published(tmp_path)


# --- what crossdiff writes --------------------------------------------------------------------------------------------


def own_crosscoder(sparsity: Any, n_sources: int = 2) -> Crosscoder:
    coder = new_crosscoder(F, random(n_sources, D), 0.37, sparsity, 1.0, seed=2)
    coder.decoder += random(F, n_sources * D) * 0.4
    coder.encoder_bias += 0.2
    coder.decoder_bias += random(n_sources * D)
    coder.threshold = 1.7 if isinstance(sparsity, BatchTopKConfig) else 0.0
    coder.origin = {"pair": {"base": "x"}, "layer": 3, "settings": {"decoder_norm": 1.0}, "training_tokens": 5}
    return coder


class Weights(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


class ForkCrossCoder(nn.Module, PyTorchModelHubMixin):
    """What the fork's class asks of the files: its constructor's arguments and its state dict."""

    def __init__(self, activation_dim: int, dict_size: int, num_layers: int, code_normalization: str = "CROSSCODER") -> None:
        super().__init__()
        d, f, s = activation_dim, dict_size, num_layers
        self.encoder, self.decoder = (
            Weights(torch.zeros(s, d, f), torch.zeros(f)),
            Weights(torch.zeros(s, f, d), torch.zeros(s, d)),
        )
        self.register_buffer("code_normalization_id", torch.tensor(["CROSSCODER", "SAE"].index(code_normalization) + 1))
        for name, buffer in unset_normalisation(s).items():
            self.register_buffer(name, buffer)


class ForkBatchTopKCrossCoder(ForkCrossCoder):
    def __init__(self, activation_dim: int, dict_size: int, num_layers: int, k: int = 100, **more: Any) -> None:
        super().__init__(activation_dim, dict_size, num_layers, **more)
        self.register_buffer("k", torch.tensor(k, dtype=torch.int32))
        self.register_buffer("threshold", torch.tensor(-1.0))


@pytest.mark.parametrize("sparsity", [L1Config(), BatchTopKConfig(k=4)], ids=lambda sparsity: sparsity.kind)
def test_the_fork_reads_what_is_saved(tmp_path: Path, sparsity: Any) -> None:
    coder = own_crosscoder(sparsity)
    save(coder, tmp_path)
    kind = ForkBatchTopKCrossCoder if isinstance(sparsity, BatchTopKConfig) else ForkCrossCoder
    fork = kind.from_pretrained(str(tmp_path), strict=True)
    state = fork.state_dict()
    f, reconstruction = dense(coder, inputs(2).float())
    fork_f, fork_reconstruction = fork_output(state, inputs(2))
    assert 0.02 < float((f > 0).double().mean()) < 0.98
    torch.testing.assert_close(f.double(), fork_f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reconstruction.double(), fork_reconstruction, rtol=1e-4, atol=1e-4)
    # the fork's scale is target_rms / ||std||, which is ours
    torch.testing.assert_close(state["target_rms"] / state["activation_std"].norm(dim=1), state["activation_global_scale"])
    assert torch.equal(state["activation_global_scale"], torch.full((2,), 0.37))


@pytest.mark.parametrize("sparsity", [TopKConfig(k=4), JumpReLUConfig()], ids=lambda sparsity: sparsity.kind)
def test_the_fork_refuses_what_it_would_take_for_relu(tmp_path: Path, sparsity: Any) -> None:
    save(own_crosscoder(sparsity), tmp_path)
    for kind in (ForkCrossCoder, ForkBatchTopKCrossCoder):
        with pytest.raises(TypeError, match="missing 3 required"):
            kind.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("sparsity", [L1Config(), BatchTopKConfig(k=4), TopKConfig(k=4), JumpReLUConfig(threshold=0.4)])
def test_round_trip_of_our_own(tmp_path: Path, sparsity: Any) -> None:
    coder = own_crosscoder(sparsity)
    save(coder, tmp_path)
    for again in (load(tmp_path), read_published(tmp_path), read_published(tmp_path / "model.safetensors")):
        for name, parameter in coder.parameters().items():
            assert torch.equal(parameter, again.parameters()[name]), name
        assert torch.equal(again.mean, coder.mean)
        assert (again.scale, again.threshold, again.sparsity) == (coder.scale, coder.threshold, coder.sparsity)
        assert (again.origin, again.sources) == (coder.origin, coder.sources)
    with pytest.raises(UserError, match="omit the options"):
        read_published(tmp_path, sources=("a", "b"))


@pytest.mark.parametrize("sparsity", [L1Config(), BatchTopKConfig(k=4)], ids=lambda sparsity: sparsity.kind)
def test_our_own_read_as_the_forks(tmp_path: Path, sparsity: Any) -> None:
    coder = own_crosscoder(sparsity)
    save(coder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")  # without our metadata
    again = read_published(tmp_path)
    assert (again.sparsity.kind, again.scale) == (sparsity.kind, pytest.approx(coder.scale))
    for expected, found in zip(dense(coder, inputs(2).float()), dense(again, inputs(2).float()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_damaged_or_published_crosscoder_is_not_loaded_as_our_own(tmp_path: Path) -> None:
    save_file(fork_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors has format None, this version reads 3"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path)


# --- Kissane's --------------------------------------------------------------------------------------------------------


def kissane_tensors() -> dict[str, Tensor]:
    fork = fork_tensors()
    return {
        "W_enc": fork["encoder.weight"],
        "W_dec": fork["decoder.weight"].transpose(0, 1).contiguous(),
        "b_enc": fork["encoder.bias"],
        "b_dec": fork["decoder.bias"],
    }


@pytest.mark.parametrize("scales", [None, (0.5, 0.5), (0.2758961493232058, 0.24422852496546169)])
@pytest.mark.parametrize("more", [{}, batch_topk(3, 1.1)], ids=["relu", "batchtopk"])
def test_kissanes_crosscoders(tmp_path: Path, scales: tuple[float, float] | None, more: dict[str, Tensor]) -> None:
    tensors, h = kissane_tensors(), inputs(2)
    torch.save(tensors | more, tmp_path / "cc_weights.pt")
    (tmp_path / "cfg.json").write_text(json.dumps({"hook_point": "blocks.14.hook_resid_pre", "dict_size": F}))
    t, factor = {name: tensor.double() for name, tensor in tensors.items()}, torch.tensor(scales or (1.0, 1.0)).double()
    factor = torch.tensor(scales or (1.0, 1.0), dtype=torch.float64)[:, None]
    f = (torch.einsum("bsd,sdf->bf", h * factor, t["W_enc"]) + t["b_enc"]).relu()
    if more:
        f = f * (f * t["W_dec"].norm(dim=2).sum(1) > float(more["threshold"]))
    out = (torch.einsum("bf,fsd->bsd", f, t["W_dec"]) + t["b_dec"]) / factor
    kind = "l1" if not more else "jumprelu" if scales and scales[0] != scales[1] else "batchtopk"
    read = check(tmp_path / "cc_weights.pt", h, f, out, kind, scales)
    assert read.origin["layer"] == 13
    assert read.origin["published"].get("input_scales") == (list(scales) if scales else None)
    assert read_published(tmp_path).origin["published"]["format"] == "Kissane"


# --- SAELens ----------------------------------------------------------------------------------------------------------


def write_saelens(folder: Path, config: dict[str, Any], more: dict[str, Tensor], unit_norm: bool = False) -> dict[str, Tensor]:
    decoder = fork_tensors(1)["decoder.weight"][0]
    decoder[3:5] = 0.5
    tensors = {
        "W_enc": random(D, F) * 0.5,
        "W_dec": decoder / decoder.norm(dim=1, keepdim=True) if unit_norm else decoder,
        "b_enc": random(F) * 0.3,
        "b_dec": random(D),
        **more,
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, "dtype": "float32", **config}))
    return {name: tensor.double() for name, tensor in tensors.items()}


def largest(v: Tensor, k: int) -> Tensor:
    return v >= v.sort(dim=1, descending=True).values[:, k - 1 : k]


NEW = {"metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.5.hook_resid_post"}, "normalize_activations": "none"}
SAELENS_CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor], bool, str]] = {
    "standard": (NEW | {"architecture": "standard", "apply_b_dec_to_input": True}, {}, False, "l1"),
    "b_dec not applied": (NEW | {"architecture": "standard", "apply_b_dec_to_input": False}, {}, False, "l1"),
    "old, no architecture": ({"activation_fn_str": "relu", "hook_name": "blocks.5.hook_resid_post"}, {}, False, "l1"),
    "fine-tuned factors": (
        {"finetuning_scaling_factor": True, "hook_name": "blocks.5.hook_resid_post"},
        {"scaling_factor": torch.linspace(0.5, 2, F)}, False, "l1",
    ),
    "factors of one": (
        {"finetuning_scaling_factor": False, "hook_name": "blocks.5.hook_resid_post"},
        {"scaling_factor": torch.ones(F)}, False, "l1",
    ),
    "jumprelu": (NEW | {"architecture": "jumprelu"}, {"threshold": torch.linspace(-0.5, 2, F)}, False, "jumprelu"),
    "jumprelu, logarithm": (NEW | {"architecture": "jumprelu"}, {"log_threshold": torch.linspace(-3, 0, F)}, False, "jumprelu"),
    "topk": (NEW | {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": False}, {}, True, "topk"),
    "topk, rescaled": (NEW | {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}, {}, False, "topk"),
    "old topk": (
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "hook_point": "blocks.6.hook_resid_pre"},
        {}, True, "topk",
    ),
    "batchtopk": (
        NEW | {"architecture": "batchtopk", "k": 3.0, "rescale_acts_by_decoder_norm": True},
        {"topk_threshold": torch.tensor(1.2, dtype=torch.float64)}, False, "batchtopk",
    ),
    "batchtopk, not rescaled": (
        NEW | {"architecture": "batchtopk", "k": 3.5, "rescale_acts_by_decoder_norm": False},
        {"topk_threshold": torch.tensor(0.8, dtype=torch.float64)}, False, "jumprelu",
    ),
    "scaled inputs": (NEW | {"architecture": "standard", "normalize_activations": "expected_average_only_in"}, {}, False, "l1"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAELENS_CASES)
def test_saelens(tmp_path: Path, case: str) -> None:
    config, more, unit_norm, kind = SAELENS_CASES[case]
    t, h = write_saelens(tmp_path, config, more, unit_norm), inputs(1)
    scales = (0.7,) if config.get("normalize_activations") == "expected_average_only_in" else None
    scale = scales[0] if scales else 1.0
    x = h[:, 0] * scale
    pre = (x - t["b_dec"] if config.get("apply_b_dec_to_input", True) else x) @ t["W_enc"] + t["b_enc"]
    weight = t["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(F).double()
    f = pre.relu()
    if "threshold" in t:
        f = f * (pre > t["threshold"].relu())
    if "log_threshold" in t:
        f = f * (pre > t["log_threshold"].exp())
    if kind == "topk":
        f = f * largest(f * weight, 3)
    if "topk_threshold" in t:
        f = f * (f * weight > t["topk_threshold"])
    out = ((f * t.get("scaling_factor", torch.ones(F).double())) @ t["W_dec"] + t["b_dec"]) / scale
    read = check(tmp_path / "sae_weights.safetensors", h, f, out[:, None], kind, scales)
    assert read.origin["layer"] == 5
    assert read_published(tmp_path, input_scales=scales).origin["published"]["format"] == "SAELens"


def test_the_training_architecture_is_reported(tmp_path: Path) -> None:
    config = NEW | {"architecture": "jumprelu"}
    config["metadata"] = NEW["metadata"] | {"training_architecture": "batchtopk"}
    write_saelens(tmp_path, config, {"threshold": torch.ones(F)})
    assert read_published(tmp_path).origin["published"]["architecture"] == "jumprelu, trained as batchtopk"


# --- what cannot be read ----------------------------------------------------------------------------------------------


def changed(tensors: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    """`tensors` with some put in ("__" stands for "."), and those that are None left out."""
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


NAN = torch.full((2, D), torch.nan)
FORK_ERRORS: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "missing": (changed(fork_tensors(), encoder__bias=None), {}, r"has no encoder\.bias; expected it with the axes \[latent\]"),
    "shape": (
        changed(fork_tensors(), decoder__weight=torch.zeros(2, F, D + 1)), {},
        r"decoder\.weight has the shape \(2, 10, 7\), expected \[source=2 latent=10 d_model=6\]",
    ),
    "axes": (changed(fork_tensors(), encoder__weight=torch.zeros(F, D)), {}, "only AutoEncoder, AutoEncoderTopK"),
    "unknown": (changed(fork_tensors(), r_mag=torch.zeros(F)), {}, "unknown keys: r_mag"),
    "not finite": (changed(fork_tensors(), encoder__bias=torch.full((F,), torch.inf)), {}, r"encoder\.bias holds numbers that"),
    "decoupled": (
        fork_tensors() | {"code_normalization_id": torch.tensor(5), "k": torch.tensor(3), "threshold": torch.ones(2)}, {},
        "DECOUPLED",
    ),
    "no such normalisation": (fork_tensors() | {"code_normalization_id": torch.tensor(9)}, {}, "is 9, expected 1 to 5"),
    "two normalisations": (
        fork_tensors() | IDENTIFIER, {"code_normalization": "NONE"},
        "has the code normalisation CROSSCODER, but the settings beside it have NONE",
    ),
    "unknown normalisation": (
        fork_tensors(), {"code_normalization": "ODD"}, "have code_normalization ODD, expected one of CROSSCODER",
    ),
    "threshold without k": (fork_tensors() | {"threshold": torch.tensor(1.0)}, {}, "has no k"),
    "k too large": (fork_tensors() | batch_topk(11, 1.0), {}, "k is 11, more than its 10 latents"),
    "k not whole": (fork_tensors(), {"k": 2.5}, r"k is 2\.5, expected a whole number"),
    "half a normalisation": (fork_tensors() | {"activation_mean": NAN}, {}, "has activation_mean alone, which does not"),
    "a deviation without a mean": (fork_tensors() | {"activation_std": NAN}, {}, "has activation_std alone, which does not"),
    "a target alone": (fork_tensors() | {"target_rms": torch.tensor(1.0)}, {}, "has target_rms alone, which does not"),
    "a scale per neuron": (
        fork_tensors() | unset_normalisation(2) | {"activation_global_scale": torch.ones(2, D)}, {},
        r"activation_global_scale has the shape \(2, 6\), expected \[\]",
    ),
    "a negative scale": (fork_tensors() | {"activation_global_scale": torch.tensor(-1.0)}, {}, "scale of -1"),
    "partly NaN": (
        fork_tensors() | fork_normalisation((0.3, 0.3)) | {"activation_mean": torch.cat([NAN[:1], torch.zeros(1, D)])}, {},
        "must be NaN throughout or finite",
    ),
    "other sizes": (fork_tensors(), {"dict_size": 99}, "have dict_size 99, expected 10"),
    "other sources": (fork_tensors(), {"encoder_layers": [1, 0]}, r"have encoder_layers \[1, 0\], expected \[0, 1\]"),
    "no format": ({"weight": torch.zeros(2)}, {}, r"not in a known format: expected encoder\.weight or W_enc, found weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORK_ERRORS)
def test_what_the_fork_did_not_write_is_named(tmp_path: Path, case: str) -> None:
    tensors, config, message = FORK_ERRORS[case]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        read_published(tmp_path)
    assert str(tmp_path) in str(error.value)


SAELENS_ERRORS: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "gated": ({"architecture": "gated"}, {}, "architecture gated; only standard, jumprelu, topk and batchtopk can be read"),
    "other function": ({"activation_fn_str": "tanh-relu"}, {}, "architecture tanh-relu"),
    "layer norm": ({"normalize_activations": "layer_norm"}, {}, "normalize_activations is 'layer_norm'"),
    "unknown scale": ({"normalize_activations": "expected_average_only_in"}, {}, r"give it as input_scales, sqrt\(6\)"),
    "heads": ({"hook_name": "blocks.5.attn.hook_z"}, {}, "which is not the residual stream after a decoder layer"),
    "size": ({"d_in": 7}, {}, "has d_model 6, but its cfg.json has d_in 7"),
    "no threshold": ({"architecture": "jumprelu"}, {}, "has no threshold"),
    "no k": ({"architecture": "topk"}, {}, "k is None, expected a whole number"),
    "another measure": ({"architecture": "topk", "k": 3}, {}, "is a TopK coder .* can be read"),
    "threshold of a ReLU": ({"architecture": "standard"}, {"threshold": torch.ones(F)}, "unknown keys: threshold"),
    "factors": ({}, {"scaling_factor": torch.full((F,), 2.0)}, "does not have finetuning_scaling_factor"),
}


@pytest.mark.parametrize("case", SAELENS_ERRORS)
def test_saes_that_have_no_form_here_are_refused(tmp_path: Path, case: str) -> None:
    config, more, message = SAELENS_ERRORS[case]
    write_saelens(tmp_path, config, more)
    with pytest.raises(UserError, match=message):
        read_published(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give the folder"):
        read_published(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"expected one of model\.safetensors, .*, found notes\.txt"):
        read_published(tmp_path)
    for name, content in (("a.safetensors", b"\0" * 40), ("b.pt", b"PK\3\4 cut"), ("c.pt", b""), ("d.pt", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read .*{name}: "):
            read_published(tmp_path / name)
    torch.save({"code": Path("x"), "W_enc": torch.zeros(2)}, tmp_path / "e.pt")
    with pytest.raises(UserError, match=r"e\.pt: it is damaged or holds more than tensors, which is unsafe"):
        read_published(tmp_path / "e.pt")
    torch.save([1, 2], tmp_path / "f.pt")
    with pytest.raises(UserError, match="does not hold named tensors"):
        read_published(tmp_path / "f.pt")


def test_sources_and_input_scales_are_checked(tmp_path: Path) -> None:
    torch.save(kissane_tensors(), tmp_path / "cc_weights.pt")
    for scales in ((1.0,), (1.0, 0.0), (1.0, math.nan)):
        with pytest.raises(UserError, match="must be 2 positive numbers"):
            read_published(tmp_path, input_scales=scales)
    for sources in (("a",), ("a", "a")):
        with pytest.raises(UserError, match="give 2 different names"):
            read_published(tmp_path, sources=sources)
    save_file(fork_tensors() | fork_normalisation((0.3, 0.3)), tmp_path / "n.safetensors")
    with pytest.raises(UserError, match="holds its own normalisation"):
        read_published(tmp_path / "n.safetensors", input_scales=(1.0, 1.0))
