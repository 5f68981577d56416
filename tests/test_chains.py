"""A chain of four models from end to end. The last is a copy of the one before, and nothing may appear there."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import crossdiff
from conftest import tiny_config
from crossdiff.activations.counted import Counted
from crossdiff.activations.store import Store
from crossdiff.causal.conversations import read_conversations
from crossdiff.causal.interventions import Arm, DifferencePart
from crossdiff.causal.patching import Patcher
from crossdiff.cli import run_command
from crossdiff.config import RunConfig, validate
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.latents.groups import GROUPS
from crossdiff.models.access import residuals_after
from crossdiff.models.pair import load_pair

MODELS = ("base", "sft", "dpo", "chat")
ACTIVATION = DifferencePart(kind="activation")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path]) -> dict[str, str]:
    """The tiny pair, a further step away from it, and a copy of that whose config has another digest."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_pair[1], folder / "dpo")
    model = AutoModelForCausalLM.from_pretrained(tiny_pair[1])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder / "dpo")
    shutil.copytree(folder / "dpo", folder / "copy")
    config = folder / "copy" / "config.json"
    config.write_text(config.read_text() + "\n")
    paths = (tiny_pair[0], tiny_pair[1], folder / "dpo", folder / "copy")
    return {name: str(path) for name, path in zip((*MODELS[:3], "final"), paths, strict=True)}


@pytest.fixture(scope="module")
def settings(models: dict[str, str], tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> dict[str, Any]:
    found = tiny_config(tiny_pair, tiny_texts, causal={"max_conversations": 6, "resamples": 100}, models=models)
    coder = found["crosscoders"]["batchtopk"] | {"seeds": 2}
    sae = coder | {"seeds": 1, "inputs": {"kind": "difference", "of": ["sft", "dpo"]}}
    del found["base"], found["chat"]
    return found | {"crosscoders": {"batchtopk": coder, "step": sae}, "look": {"depth_tokens": 500}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    run_command(["run", str(folder / "run"), "--config", str(folder / "settings.yaml")])
    run_command(["causal", str(folder / "run"), "--causal.between", "sft", "dpo"])
    return folder / "run"


def test_the_store_has_all_models_and_each_is_its_own(run: Path, models: dict[str, str]) -> None:
    store = Store(run / "activations")
    assert store.sources == MODELS
    steps = {name: models[name] for name in ("sft", "dpo")}
    pair = load_pair(models["base"], models["final"], torch.device("cpu"), steps=steps)
    assert pair.sources == MODELS
    rows = np.arange(*store.sequences()[:2])
    ids = torch.from_numpy(store.column("token_id")[rows].astype(np.int64)).unsqueeze(0)
    h = store.gather(rows)
    for number, source in enumerate(MODELS):
        expected = residuals_after(pair.model(source), ids, [store.layer])[0][0]
        torch.testing.assert_close(h[:, number], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(h[:, 2], h[:, 3]) and not torch.equal(h[:, 0], h[:, 1])


def test_nothing_appears_between_two_copies(run: Path) -> None:
    for folder, unit in ((run / "batchtopk", "latent"), (run / "concepts", "concept")):
        table = pl.read_parquet(folder / "chain.parquet")
        assert set(table.select("before", "after").unique().iter_rows()) == {
            ("base", "sft"), ("sft", "dpo"), ("dpo", "chat"), ("base", "chat"),
        }  # fmt: skip
        last = table.filter(before="dpo", after="chat")
        assert last.height == table[unit].n_unique()
        assert not set(last["change"]) & {"appears", "vanishes", "turns"}
        assert "chat" not in pl.read_parquet(folder / f"{unit}s.parquet")["emerges_at"].to_list()


def test_the_latent_table_compares_the_ends(run: Path) -> None:
    coder = crossdiff.load(run, "batchtopk")
    assert coder.sources == MODELS
    table = pl.read_parquet(run / "batchtopk" / "latents.parquet")
    norms = coder.norms().double().numpy()
    np.testing.assert_allclose(table["norm_base"], norms[:, 0])
    np.testing.assert_allclose(table["norm_chat"], norms[:, 3])
    chain = pl.read_parquet(run / "batchtopk" / "chain.parquet")
    for number, (before, after) in enumerate(pairwise(MODELS)):
        step = chain.filter(before=before, after=after)
        np.testing.assert_allclose(step["norm_before"], norms[:, number])
        np.testing.assert_allclose(step["norm_after"], norms[:, number + 1])
    ends = chain.filter(before="base", after="chat")
    assert ends["delta_norm"].equals(table["delta_norm"])
    health = read_json(run / "batchtopk" / "health.json")
    assert set(MODELS) <= set(health["heldout"]["fve"])


def test_a_difference_is_that_of_the_named_models(run: Path) -> None:
    coder = crossdiff.load(run, "step")
    assert coder.view.reads == ("sft", "dpo") and coder.sources == ("dpo-sft",)


def test_patching_between_two_models_of_the_chain(run: Path, models: dict[str, str]) -> None:
    found = read_json(run / "batchtopk" / "causal.json")
    full = next(each for each in found["results"] if each["intervention"] == "full_swap" and each["span"] == "response")
    assert full["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert read_json(run / "concepts" / "causal.json")["results"]
    # Without latents, what is measured does not depend on the rest of the chain.
    store = Store(run / "activations")
    steps = {name: models[name] for name in ("sft", "dpo")}
    chain = load_pair(models["base"], models["final"], torch.device("cpu"), steps=steps)
    two = load_pair(models["sft"], models["dpo"], torch.device("cpu"))
    arms = tuple(Arm(name, name, (), None, parts, "all", "chat") for name, parts in (("none", ()), ("full", (ACTIVATION,))))
    means, coder = torch.zeros(len(GROUPS) + 1, store.d_model), crossdiff.load(run, "batchtopk")
    plain = new_crosscoder(8, torch.zeros(2, store.d_model), 1.0, coder.sparsity, 1.0, seed=0)
    batch = list(read_conversations(store, "heldout", 4, 0)[0])
    of_chain = Patcher(chain, coder, store.layer, arms, means, Counted(1), between=("sft", "dpo")).measure(batch)
    of_two = Patcher(two, plain, store.layer, arms, means, Counted(1)).measure(batch)
    torch.testing.assert_close(of_chain.total, of_two.total, rtol=1e-4, atol=1e-5)
    assert float(of_two.total[0, 0].sum()) > 0.01


def test_the_report_shows_the_steps(run: Path) -> None:
    page = (run / "report.html").read_text()
    section = page[page.index('id="chain"') :]
    assert "base → sft → dpo → final" in re.sub(r"\s+", " ", section)
    assert "First in sft" in section and "First in final: 0 concepts" in section


def test_a_model_that_is_gone_is_named_and_the_store_stays(run: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(settings["models"]["dpo"], tmp_path / "dpo")
    changed = settings | {"models": settings["models"] | {"dpo": str(tmp_path / "dpo")}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    before = (tmp_path / "run" / "activations" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="differ from those of the store"):
        run_command(["harvest", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")])
    assert (tmp_path / "run" / "activations" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"base": "a"}}, "models has 1, base; a chain has two to 8"),
        ({"models": {f"m{i}": "a" for i in range(9)}}, "models has 9"),
        ({"models": {"base": "a", "chat": "b", "rl": "c"}}, "none between them can have that name"),
        ({"models": {"base": "a", "s/ft": "b", "rl": "c"}}, "use letters, digits"),
        ({"models": {"base": "a", "rl": "c"}, "base": "other"}, "base is 'other', but models has 'a' there"),
        ({"models": {"base": "a", "rl": 3}}, "mapping of names to models"),
        ({"models": ["a", "b"]}, "mapping of names to models"),
    ],
)
def test_wrong_chains_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(RunConfig, changes, "the test")


def test_two_models_by_name_are_a_pair() -> None:
    config = RunConfig(models={"before": "a", "after": "b"})
    assert (config.base, config.chat, config.steps, config.sources) == ("a", "b", {}, ("base", "chat"))
    assert config.titles == {"base": "before", "chat": "after"}
    assert "models" not in RunConfig(base="a", chat="b").model_dump()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["base=a", "base=b"], "'base' is given twice"), (["base"], "not of the form NAME=VALUE"), (["=a", "b=c"], "NAME=VALUE")],
)
def test_wrong_words_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_command(["harvest", str(tmp_path / "run"), "--models", *words])
    assert not (tmp_path / "run").exists()
