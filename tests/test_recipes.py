"""The recipes of the paper's models run from end to end; only models, data and sizes are other ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conftest import make_model, make_tokenizer, write_texts
from crossdiff.activations.store import Store
from crossdiff.config import RunConfig, validate
from crossdiff.crosscoder.checkpoint import load
from crossdiff.files import read_json
from crossdiff.run import Run
from crossdiff.stages.pipeline import run_until
from crossdiff.stages.session import Session
from crossdiff.yaml_files import read_yaml

RECIPES = Path(__file__).parents[1] / "recipes"
LLAMA_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
SIZES = {"batch_size": 64, "warmup_steps": 5, "expansion": 3}


def save_models(folder: Path, kind: str, n_layers: int) -> tuple[Path, Path]:
    tokenizer, model = make_tokenizer(), make_model(kind, n_layers=n_layers)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", *LLAMA_TOKENS]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|eot_id|>")
    for name in ("base", "chat"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    return folder / "base", folder / "chat"


def as_lmsys(source: Path, target: Path) -> Path:
    """The conversations with the columns of LMSYS-Chat-1M."""
    records = [json.loads(line) for line in source.read_text().splitlines()]
    lines = [json.dumps({"conversation_id": str(i), "conversation": r["messages"]}) for i, r in enumerate(records)]
    target.write_text("\n".join(lines) + "\n")
    return target


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "kind", "n_layers"), [("gemma-2-2b", "gemma2", 14), ("llama-3.2-1b", "llama", 9)])
def test_a_recipe_of_the_paper_runs_from_end_to_end(tmp_path: Path, recipe: str, kind: str, n_layers: int) -> None:
    base, chat = save_models(tmp_path, kind, n_layers)
    plain, conversations = write_texts(tmp_path)
    paths = plain, as_lmsys(conversations, tmp_path / "lmsys.jsonl")
    settings: dict[str, Any] = read_yaml(RECIPES / f"{recipe}.yaml")
    validate(RunConfig, settings, recipe)
    settings |= {"base": str(base), "chat": str(chat), "device": "cpu"}
    sizes = {"max_tokens": None, "heldout_share": 0.3}
    settings["dataset"] = [text | {"path": str(path)} | sizes for text, path in zip(settings["dataset"], paths, strict=True)]
    settings["crosscoders"] = {name: coder | SIZES for name, coder in settings["crosscoders"].items()}
    settings["crosscoders"]["batchtopk"]["sparsity"]["k"] = 4
    run = Run.open(tmp_path / "run", create=True)
    try:
        run_until(Session(run, validate(RunConfig, settings, recipe), Console(quiet=True)))
    finally:
        run.close()
    store = Store(run.path / "activations")
    assert (store.layer, store.manifest["dtype"]) == (n_layers - 1, "int8")
    assert store.leave_out == {"gemma2": 1, "llama": 25}[kind]
    assert store.manifest["base_tokens"] == settings["harvest"].get("base_tokens", {})
    assert {dataset.removesuffix(".jsonl") for dataset in store.datasets} == {"plain", "lmsys"}
    for name, rule in (("l1", "l1"), ("batchtopk", "batchtopk")):
        crosscoder = load(run.path / name)
        assert crosscoder.n_latents == 3 * 16
        assert crosscoder.origin["settings"]["sparsity"]["kind"] == rule
        assert read_json(run.path / name / "health.json")
    assert (run.path / "report.html").stat().st_size > 10_000
