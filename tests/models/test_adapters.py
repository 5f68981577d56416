"""Adapters: merged into their model exactly, part of the pair's identity, and refused where that is impossible."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import crossdiff.models.adapters as module
from conftest import make_model, make_tokenizer, save_pair
from crossdiff.errors import UserError
from crossdiff.models.loading import load_model, load_tokenizer
from crossdiff.models.names import find_adapter, identify
from crossdiff.models.pair import load_pair
from hub_server import HubServer

CPU = torch.device("cpu")
RANK, ALPHA = 2, 6


def write_adapter(folder: Path, base: str | None, tokenizer: bool = True) -> dict[str, torch.Tensor]:
    """A LoRA on the query and value matrices of the tests' Llama, in the layout that a trainer writes. Returns its tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(3):
        for name, width in (("q_proj", 16), ("v_proj", 8)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, 16, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, RANK, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": base, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return tensors


def change_settings(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_pair(tmp_path)[0]


@pytest.mark.parametrize("beside", ["nothing", "config", "the model itself"])
def test_an_adapter_is_merged_into_the_model_that_it_names(tmp_path: Path, base: Path, beside: str) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    tensors = write_adapter(folder, str(base))
    if beside != "nothing":
        shutil.copy(base / "config.json", folder)
    if beside == "the model itself":
        shutil.copy(base / "model.safetensors", folder)
    pair = load_pair(str(base), str(folder), CPU)
    before, after = pair.base.state_dict(), pair.chat.state_dict()
    assert before.keys() == after.keys(), "an ordinary model, without the adapter's modules"
    for name, weight in before.items():
        expected = weight
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in tensors:  # W + alpha / r * B A
            expected = weight + ALPHA / RANK * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-5)
    assert pair.remarks == () and pair.identity["chat"]["adapter_of"] == str(base)


def test_an_adapter_can_be_the_base_model_too(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("peft")
    write_adapter(tmp_path / "adapter", str(base))
    pair = load_pair(str(tmp_path / "adapter"), str(base), CPU)
    assert not torch.equal(pair.base.model.layers[0].self_attn.q_proj.weight, pair.chat.model.layers[0].self_attn.q_proj.weight)


def test_an_adapter_without_a_tokenizer_has_that_of_its_model(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("peft")
    write_adapter(tmp_path / "adapter", str(base), tokenizer=False)
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == make_tokenizer().get_vocab()


def test_its_identity_follows_the_adapter_and_the_model(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "adapter"
    tensors = write_adapter(folder, str(base))
    found = [identify(str(folder))["digest"]]
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    found.append(identify(str(folder))["digest"])
    make_model(seed=9).save_pretrained(base)
    found.append(identify(str(folder))["digest"])
    assert len(set(found)) == 3
    change_settings(folder, base_model_name_or_path="org/on-the-hub")
    assert identify(str(folder))["adapter_of"] == "org/on-the-hub"


def test_which_model_an_adapter_belongs_to(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "adapter"
    write_adapter(folder, "/nowhere/llama")
    with pytest.raises(UserError, match=r"adapter is an adapter for '/nowhere/llama', which does not exist here; set base_mo"):
        find_adapter(str(folder))
    found = find_adapter(str(folder), str(base))
    assert found is not None and found.model == str(base)
    assert found.remark == f"{folder} is an adapter for '/nowhere/llama', which does not exist here; it is merged into {base}"
    change_settings(folder, base_model_name_or_path=str(base))
    make_model(seed=5).save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"holds an adapter .* and the weights of a whole model, which are not those of '.*base'"
    ):
        find_adapter(str(folder), str(base))
    assert find_adapter(str(base)) is None


def test_a_diff_of_an_adapter_with_another_base_is_remarked(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("peft")
    write_adapter(tmp_path / "adapter", str(base))
    other = str(tmp_path / "chat")
    (remark,) = load_pair(other, str(tmp_path / "adapter"), CPU).remarks
    assert remark.endswith(f"is an adapter for {base}, not for {other}; the diff also shows how those two differ")


def test_peft_is_named_where_it_is_missing(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path / "adapter", str(base))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for load in (load_tokenizer, lambda name: load_model(name, CPU)):
        with pytest.raises(
            UserError, match=r"is an adapter for .*base, and reading it needs peft: pip install 'crossdiff\[peft\]'"
        ):
            load(str(tmp_path / "adapter"))


def drop(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def test_an_adapter_that_does_not_fit_exactly_is_refused(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    tensors = write_adapter(folder, str(base))
    save_file(drop(tensors, "layers.1.self_attn.v_proj"), folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"does not fit .*: it lacks 2 tensors, such as .*layers\.1\.self_attn\.v_proj\.lora_A"):
        load_model(str(folder), CPU)
    more = {name.replace("layers.2", "layers.7"): tensor.clone() for name, tensor in tensors.items() if "layers.2" in name}
    save_file(tensors | more, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"it holds, and the model has no place for, 4 tensors, such as .*layers\.7\."):
        load_model(str(folder), CPU)
    save_file({name: tensor[:, :1].contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"cannot merge the adapter .*: .*size mismatch.*; check that it was trained on this model"
    ):
        load_model(str(folder), CPU)
    save_file(tensors, folder / "adapter_model.safetensors")
    change_settings(folder, a_setting_of_the_future=3)
    with pytest.raises(UserError, match=r"cannot merge the adapter .*a_setting_of_the_future"):
        load_model(str(folder), CPU)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [*range(272, 280)]}},
    ],
)
def test_an_adapter_with_tokens_of_its_own_resizes_its_model(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    """Written by peft itself, after the model got 8 embeddings more than the 272 that it has."""
    peft = pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    model = load_model(str(base), CPU)
    model.resize_token_embeddings(280)
    trained = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    trained.save_pretrained(folder)
    ids = torch.tensor([[5, 279, 7, 272]])
    loaded = load_model(str(folder), CPU, base=str(base))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(drop(tensors, "lm_head"), folder / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"resizes the embeddings of .*, but does not hold all of them, so the new rows would be"
    ):
        load_model(str(folder), CPU, base=str(base))


def test_a_kind_that_changes_no_weights_is_refused(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("peft")
    write_adapter(tmp_path / "adapter", str(base))
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "PROMPT_TUNING",
                "task_type": "CAUSAL_LM",
                "num_virtual_tokens": 4,
                "base_model_name_or_path": str(base),
            }
        )
    )
    with pytest.raises(UserError, match=r"of the kind PROMPT_TUNING, which adds vectors to the prompt; only kinds that change"):
        load_model(str(tmp_path / "adapter"), CPU)


def test_an_adapter_on_the_hub(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    write_adapter(tmp_path / "adapter", str(base))
    with HubServer(monkeypatch, tmp_path / "cache") as hub:
        hub.create("me/lora")
        hub.add_folder("me/lora", tmp_path / "adapter")
        pair = load_pair(str(base), "me/lora", CPU)
        assert pair.identity["chat"] == identify("me/lora") and "digest" in pair.identity["chat"]
    want = load_model(str(tmp_path / "adapter"), CPU).state_dict()
    assert all(torch.equal(weight, want[name]) for name, weight in pair.chat.state_dict().items())
