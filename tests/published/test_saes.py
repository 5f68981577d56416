"""SAEs of Gemma Scope, sparsify and dictionary_learning against their own forward passes, and where an SAE reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_formats import D, F, check, inputs, largest, random, write_saelens
from torch import Tensor

from crossdiff.cli import run_command
from crossdiff.errors import UserError
from crossdiff.published.formats import read_published
from crossdiff.published.hookpoints import hookpoint_of_scope, layer_after

K = 3


def weights(unit_norm: bool) -> dict[str, Tensor]:
    """Encoder `[d_model, latent]`, decoder `[latent, d_model]` and both biases, random."""
    decoder = random(F, D)
    return {
        "encoder": random(D, F) * 0.5, "encoder_bias": random(F) * 0.3, "decoder_bias": random(D),
        "decoder": decoder / decoder.norm(dim=1, keepdim=True) if unit_norm else decoder,
    }  # fmt: skip


def forward(w: dict[str, Tensor], x: Tensor, subtract: bool = True) -> tuple[Tensor, Tensor]:
    """Pre-activations, and the decoder with its bias as a matrix that takes [f, 1]."""
    w = {name: tensor.double() for name, tensor in w.items()}
    pre = (x - w["decoder_bias"] if subtract else x) @ w["encoder"] + w["encoder_bias"]
    return pre, torch.cat([w["decoder"], w["decoder_bias"][None]])


def decoded(f: Tensor, decoder: Tensor) -> Tensor:
    return (torch.cat([f, torch.ones(len(f), 1).double()], dim=1) @ decoder)[:, None]


def test_gemma_scope(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    w, h = weights(unit_norm=False), inputs(1)
    threshold = torch.linspace(0, 1.5, F)
    arrays = {"W_enc": w["encoder"], "W_dec": w["decoder"], "b_enc": w["encoder_bias"], "b_dec": w["decoder_bias"]}
    np.savez(folder / "params.npz", threshold=threshold.numpy(), **{name: tensor.numpy() for name, tensor in arrays.items()})
    pre, decoder = forward(w, h[:, 0], subtract=False)
    f = pre.relu() * (pre > threshold.double())
    read = check(folder / "params.npz", h, f, decoded(f, decoder), "jumprelu")
    assert read.origin["layer"] == 20 and read_published(folder).origin["published"]["format"] == "Gemma Scope"


def write_sparsify(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    folder.mkdir()
    w = weights(unit_norm=True)
    tensors = {
        "encoder.weight": w["encoder"].T.contiguous(), "encoder.bias": w["encoder_bias"],
        "W_dec": w["decoder"], "b_dec": w["decoder_bias"],
    }  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": K, "d_in": D, "num_latents": F, "signed": False} | config))
    return w


def test_sparsify(tmp_path: Path) -> None:
    w, h = write_sparsify(tmp_path / "layers.7", {}), inputs(1)
    pre, decoder = forward(w, h[:, 0])
    f = pre.relu() * largest(pre.relu(), K)
    read = check(tmp_path / "layers.7" / "sae.safetensors", h, f, decoded(f, decoder), "topk")
    assert read.origin["layer"] == 7 and read_published(tmp_path / "layers.7").origin["published"]["format"] == "sparsify"
    for name, config, message in (
        ("layers.7.mlp", {}, r"reads layers\.7\.mlp, which is not the residual stream after a decoder layer"),
        ("signed", {"signed": True}, "signed is True in its cfg.json; only False can be read"),
        ("transcoder", {"transcode": True}, "transcode is True in its cfg.json"),
    ):
        write_sparsify(tmp_path / name, config)
        with pytest.raises(UserError, match=message):
            read_published(tmp_path / name)


def write_dictionary(folder: Path, kind: str, more: dict[str, Tensor], **trainer: Any) -> dict[str, Tensor]:
    folder.mkdir()
    w = weights(unit_norm=True)
    tensors = {
        "encoder.weight": w["encoder"].T, "encoder.bias": w["encoder_bias"], "decoder.weight": w["decoder"].T,
        "bias" if kind == "AutoEncoder" else "b_dec": w["decoder_bias"],
    }  # fmt: skip
    torch.save(tensors | more, folder / "ae.pt")
    settings = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3, **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": settings}))
    return w


@pytest.mark.parametrize(
    ("kind", "threshold", "expected"),
    [
        ("AutoEncoder", None, "l1"),
        ("AutoEncoderTopK", 0.4, "topk"),
        ("BatchTopKSAE", 0.4, "batchtopk"),
        ("BatchTopKSAE", -1.0, "l1"),
    ],
)
def test_dictionary_learning(tmp_path: Path, kind: str, threshold: float | None, expected: str) -> None:
    more = {} if threshold is None else {"k": torch.tensor(K), "threshold": torch.tensor(threshold)}
    w, h = write_dictionary(tmp_path / "sae", kind, more, submodule_name="resid_post_layer_3"), inputs(1)
    pre, decoder = forward(w, h[:, 0])
    f = pre.relu()
    if expected == "topk":
        f = f * largest(f, K)
    if expected == "batchtopk":
        f = f * (f > torch.tensor(threshold).double())
    read = check(tmp_path / "sae" / "ae.pt", h, f, decoded(f, decoder), expected)
    assert read.origin["layer"] == 3 and read.origin["published"]["architecture"] == kind


def test_what_dictionary_learning_has_that_cannot_be_read(tmp_path: Path) -> None:
    write_dictionary(tmp_path / "gated", "GatedAutoEncoder", {})
    with pytest.raises(
        UserError, match=r"has the dict_class GatedAutoEncoder in its config\.json; only AutoEncoder, AutoEncoderTopK"
    ):
        read_published(tmp_path / "gated")
    write_dictionary(tmp_path / "mlp", "AutoEncoder", {}, submodule_name="mlp_out_layer_3")
    with pytest.raises(UserError, match="reads mlp_out_layer_3, which is not the residual stream"):
        read_published(tmp_path / "mlp")
    write_dictionary(tmp_path / "alone", "AutoEncoder", {})
    (tmp_path / "alone" / "config.json").unlink()
    with pytest.raises(UserError, match=r"looks like an SAE of dictionary_learning, which needs config\.json beside it"):
        read_published(tmp_path / "alone")


@pytest.mark.parametrize(
    ("hookpoint", "layer"),
    [
        (None, None), ("blocks.5.hook_resid_post", 5), ("blocks.5.hook_resid_pre", 4), ("model.layers.5", 5), ("layers.5", 5),
        ("transformer.h.11", 11), ("gpt_neox.layers.3", 3), ("model.language_model.layers.2", 2), ("resid_post_layer_9", 9),
    ],
)  # fmt: skip
def test_the_layer_of_a_hookpoint(hookpoint: str | None, layer: int | None) -> None:
    assert layer_after(Path("x"), hookpoint) == layer


@pytest.mark.parametrize(
    "hookpoint",
    [
        "blocks.5.hook_mlp_out", "blocks.5.hook_attn_out", "blocks.5.hook_resid_mid", "blocks.5.attn.hook_z",
        "blocks.0.hook_resid_pre", "hook_embed", "model.layers.5.mlp", "layers.5.self_attn", "attn_out_layer_3",
    ],
)  # fmt: skip
def test_another_place_is_refused(tmp_path: Path, hookpoint: str) -> None:
    with pytest.raises(UserError, match=f"reads {hookpoint}, which is not the residual stream after a decoder layer; expected"):
        layer_after(Path("x"), hookpoint)
    write_saelens(tmp_path, {"architecture": "standard", "hook_name": hookpoint}, {})
    with pytest.raises(UserError, match="is not the residual stream after a decoder layer"):
        read_published(tmp_path)


def test_the_site_of_gemma_scope() -> None:
    assert (
        hookpoint_of_scope(Path("models--google--gemma-scope-9b-it-res/snapshots/1/layer_9/params.npz"))
        == "blocks.9.hook_resid_post"
    )
    assert hookpoint_of_scope(Path("somewhere/params.npz")) is None
    for site in ("mlp", "att", "transcoders"):
        with pytest.raises(UserError, match=f"reads Gemma Scope's {site}, which is not the residual stream"):
            layer_after(Path("x"), hookpoint_of_scope(Path(f"gemma-scope-2b-pt-{site}/layer_9/params.npz")))


def test_an_import_without_a_layer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_saelens(tmp_path / "sae", {"architecture": "standard"}, {})
    run_command(["import", str(tmp_path / "sae"), str(tmp_path / "out")])
    assert "note: its files do not name the layer; make sure that it reads the residual stream" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ([1], r"have trainer \[1\], expected settings by name"),
        ({"dict_class": "BatchTopKSAE", "k": float("nan")}, "k is nan, expected a whole number"),
        ({"dict_class": "BatchTopKSAE", "k": [3]}, r"k is \[3\], expected a whole number"),
        ({"dict_class": ["AutoEncoder"]}, r"has the dict_class \['AutoEncoder'\]"),
        ({"dict_class": "AutoEncoder", "submodule_name": "resid_post_layer_" + "9" * 5000}, "which is not the residual stream"),
    ],
)
def test_settings_of_another_shape_in_the_trainer_are_refused(tmp_path: Path, trainer: Any, message: str) -> None:
    kind = "AutoEncoder" if isinstance(trainer, dict) and trainer["dict_class"] == "AutoEncoder" else "BatchTopKSAE"
    write_dictionary(tmp_path / "sae", kind, {})
    (tmp_path / "sae" / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(UserError, match=message):
        read_published(tmp_path / "sae")


@pytest.mark.parametrize("content", ["[]", '"cfg"', "3", "{"])
def test_a_settings_file_that_is_not_an_object_is_refused(tmp_path: Path, content: str) -> None:
    write_sparsify(tmp_path / "layers.7", {})
    (tmp_path / "layers.7" / "cfg.json").write_text(content)
    with pytest.raises(UserError, match=r"cfg\.json (must hold settings by name|is damaged)"):
        read_published(tmp_path / "layers.7")


@pytest.mark.parametrize(("number", "message"), [(float("nan"), "W_dec holds numbers that are not finite"), (1e39, None)])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, number: float, message: str | None) -> None:
    """1e39 is finite in float64 and infinite in float32."""
    w = write_sparsify(tmp_path / "layers.7", {})
    decoder = w["decoder"].double()
    decoder[1] = number
    bias = w["decoder_bias"].double() * (1 if message else number)
    tensors = {"encoder.weight": w["encoder"].T.contiguous(), "encoder.bias": w["encoder_bias"], "b_dec": bias}
    save_file({**tensors, "W_dec": decoder if message else w["decoder"]}, tmp_path / "layers.7" / "sae.safetensors")
    with pytest.raises(UserError, match=message or r"its (encoder_bias|decoder_bias) does not fit into torch\.float32"):
        read_published(tmp_path / "layers.7")
