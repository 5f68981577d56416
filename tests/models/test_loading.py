"""Every weight of a model comes from its files, or the model is refused by name; both models run in one dtype."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model, make_tokenizer, save_pair
from crossdiff.errors import UserError
from crossdiff.models.access import residuals_after
from crossdiff.models.loading import choose_dtype, load_model
from crossdiff.models.pair import load_pair

CPU, META = torch.device("cpu"), torch.device("meta")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a saved model."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("_orig_mod.", r"the names contain '_orig_mod\.', from a compiled model: save the model again with model\._orig_mod"),
        ("base_model.model.", r"from a model that peft wraps: save the model again with model\.merge_and_unload\(\)"),
        ("module.", r"from data-parallel training: save the model again with model\.module"),
    ],
)
def test_names_that_a_training_tool_has_prefixed(tmp_path: Path, prefix: str, remedy: str) -> None:
    _, chat = save_pair(tmp_path)
    n = len(load_file(chat / "model.safetensors"))
    rewrite(chat, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    expected = rf"cannot load '.*chat': {n} tensors of the model are not in its files, such as lm_head\.weight; {n} tensors in "
    with pytest.raises(UserError, match=expected + r"its files are not part of the model, such as .*" + remedy):
        load_model(str(chat), CPU)


def test_a_missing_a_left_over_and_a_misshapen_tensor_are_named(tmp_path: Path) -> None:
    base, chat = save_pair(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(base, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UserError, match=rf"1 tensors of the model are not in its files, such as {name}; check that config"):
        load_model(str(base), CPU)
    rewrite(chat, lambda tensors: tensors | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(16)})
    with pytest.raises(
        UserError, match=r"1 tensors in its files are not part of the model, such as model\.layers\.1\.self_attn\.q"
    ):
        load_model(str(chat), CPU)
    base, _ = save_pair(tmp_path / "again")
    rewrite(base, lambda tensors: tensors | {name: torch.zeros(8, 16)})
    with pytest.raises(UserError, match=rf"1 tensors have another shape, such as {name} \(\[8, 16\] in the files, \[32, 16\]"):
        load_model(str(base), CPU)


def test_fewer_layers_in_the_config_than_in_the_files(tmp_path: Path) -> None:
    _, chat = save_pair(tmp_path)
    set_config(chat, num_hidden_layers=2)
    with pytest.raises(UserError, match=r"9 tensors in its files are not part of the model, such as model\.layers\.2\."):
        load_model(str(chat), CPU)


def test_tied_and_unused_heads_are_fine(tmp_path: Path) -> None:
    base, chat = save_pair(tmp_path)
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(base)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    tied = load_model(str(base), CPU)
    assert torch.equal(tied.get_output_embeddings().weight, model.model.embed_tokens.weight)
    rewrite(chat, lambda tensors: tensors | {"v_head.summary.weight": torch.zeros(1, 16), "score.weight": torch.zeros(2, 16)})
    ids = torch.arange(5, 12).unsqueeze(0)
    want = load_file(chat / "model.safetensors")["model.norm.weight"]
    loaded = load_model(str(chat), CPU)
    assert torch.equal(loaded.model.norm.weight, want) and bool(loaded(input_ids=ids).logits.isfinite().all())


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors"])
def test_a_quantised_model_says_what_to_install(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, chat = save_pair(tmp_path)
    more = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4, "group_size": 128, "config_groups": {}}
    set_config(chat, quantization_config={"quant_method": method, **more})

    def missing(*args: object, **kwargs: object) -> None:
        raise ImportError("loading it needs some-package: `pip install some-package`.\nMore.")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", missing)
    expected = (
        rf"cannot load '.*chat', whose weights are quantised \({method}\): loading it needs some-package: .*; install what"
    )
    with pytest.raises(UserError, match=expected + r" is missing, or give a copy of the model in full precision"):
        load_model(str(chat), CPU)


def save_in(folder: Path, dtype: torch.dtype) -> str:
    make_model().to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_both_models_run_in_one_dtype(tmp_path: Path) -> None:
    # `meta` stands for an accelerator, which all devices but the CPU are alike.
    wide, narrow, half = (
        save_in(tmp_path / name, dtype)
        for name, dtype in (("wide", torch.float32), ("narrow", torch.bfloat16), ("half", torch.float16))
    )
    assert choose_dtype("auto", CPU, wide, narrow) == torch.float32
    assert choose_dtype("auto", META, wide, narrow) == choose_dtype("auto", META, half, narrow) == torch.bfloat16
    assert choose_dtype("auto", META, wide, wide) == torch.float32
    assert choose_dtype("auto", META, half, half) == torch.float16
    assert choose_dtype("float32", META, narrow, narrow) == torch.float32
    pair = load_pair(wide, narrow, CPU, dtype="bfloat16")
    assert {parameter.dtype for model in pair.models for parameter in model.parameters()} == {torch.bfloat16}
    assert pair.dtype == "bfloat16" and load_pair(wide, narrow, CPU).dtype == "float32"


def test_the_same_model_twice_is_remarked(tmp_path: Path) -> None:
    base, chat = save_pair(tmp_path)
    assert load_pair(str(base), str(chat), CPU).remarks == ()
    shutil.copytree(base, tmp_path / "copy")
    (remark,) = load_pair(str(base), str(tmp_path / "copy"), CPU).remarks
    assert remark.endswith("are the same model: their files are equal, so there is nothing to compare")


def test_gemma_2_caps_its_attention_scores(tmp_path: Path) -> None:
    """sdpa leaves the cap out, so the model must not be loaded with it."""
    ids = torch.arange(5, 25).unsqueeze(0)
    model = make_model("gemma2", query_pre_attn_scalar=8, attn_logit_softcapping=1e-3, initializer_range=0.5)
    model.set_attn_implementation("eager")
    (expected,) = residuals_after(model, ids, [1])
    model.save_pretrained(tmp_path)
    (found,) = residuals_after(load_model(str(tmp_path), CPU), ids, [1])
    torch.testing.assert_close(found, expected)
    set_config(tmp_path, attn_logit_softcapping=None)
    (uncapped,) = residuals_after(load_model(str(tmp_path), CPU), ids, [1])
    assert float((uncapped - expected).abs().max()) > 0.1, "the cap matters here"
