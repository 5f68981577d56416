"""Every stage on an accelerator, pretend or real, gives what it gives on the CPU, and never mixes tensors of the two."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from polars.testing import assert_frame_equal
from rich.console import Console
from safetensors.torch import load_file

import crossdiff.diff
from causal.setting import LAYER, make_crosscoder, make_difference_coder, make_pair, make_table
from conftest import tiny_config
from crossdiff.activations.counted import Counted
from crossdiff.causal.generation import Prompt, Sampling
from crossdiff.causal.steering import Steerer, Steering
from crossdiff.cli import run_command
from crossdiff.compare.seeds import compare_seeds, read_seeds
from crossdiff.concepts.candidates import read_training
from crossdiff.concepts.coder import ConceptCoder
from crossdiff.config import (
    AnalyzeConfig,
    BatchTopKConfig,
    CrosscoderConfig,
    JumpReLUConfig,
    Kind,
    L1Config,
    RunConfig,
    TopKConfig,
    validate,
)
from crossdiff.crosscoder.crosscoder import Crosscoder, Part, new_crosscoder
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.crosscoder.train import train
from crossdiff.dashboard.catalogue import Catalogue
from crossdiff.dashboard.live import Live, Wanted
from crossdiff.latents.behaviours import live_latents
from crossdiff.latents.stream import encode
from crossdiff.published.coder import PublishedCoder, UnsetThreshold, no_normalisation
from crossdiff.published.threshold import estimate_threshold
from crossdiff.run import Run
from crossdiff.stages.session import Session
from crossdiff.truth.benchmark import benchmark
from crossdiff.truth.truth_config import PlantedConfig, TruthConfig
from crossdiff.yaml_files import read_yaml
from planted import planted_activations
from pretend import accelerator
from stores import make_store

ARMS = """
measures: [nll, kl_base, cross_entropy]
interventions:
  - {name: none}
  - {name: base_model, continues: base}
  - {name: all_latents, add: [{kind: latents, latents: {kind: all}}, {kind: bias}]}
  - {name: error, add: [{kind: error}], tokens: content}
  - {name: by_group, add: [{kind: mean_difference, over: token_group}], tokens: {kind: first, k: 2}}
  - {name: span, add: [{kind: latents, latents: {kind: list, latents: [1, 2, 3]}, use: projection}]}
  - {name: few, add: [{kind: latents, latents: {kind: ranked, ranking: contribution, among: all, size: 5}}]}
  - {name: reconstruction, start: chat_reconstruction}
  - {name: principal, add: [{kind: principal, components: [0, 1]}]}
"""
CODERS = ("batchtopk", "batchtopk-seed1", "diff")
FILES = {
    "analyze": [f"{name}/{file}" for name in CODERS for file in (
        "latents.parquet", "twins.parquet", "neighbours.parquet", "activity.parquet", "behaviours.parquet", "health.json",
        "examples.sqlite", "scaling.safetensors",
    )],
    "concepts": [f"concepts/{file}" for file in (
        "concepts.parquet", "members.parquet", "trainings.parquet", "activity.parquet", "behaviours.parquet", "concepts.json",
        "examples.sqlite", "promoted.parquet", "neighbours.parquet", "directions.safetensors",
    )],
    "causal": [f"{name}/{file}" for name in ("batchtopk", "diff") for file in (
        "causal.json", "causal_conversations.parquet", "causal_latents.parquet",
    )] + ["concepts/causal.parquet"],
    "compare": ["comparison.json"],
    "interpret": ["batchtopk/interpretation.parquet", "batchtopk/interpretation_contexts.parquet"],
}  # fmt: skip
"""The files of each stage that are compared."""


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]
) -> tuple[Path, Path]:
    """One training, and everything that follows from it: on the CPU, and on the accelerator."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "arms.yaml").write_text(ARMS)
    causal = {"interventions": str(folder / "arms.yaml"), "max_conversations": 6}
    settings = tiny_config(tiny_pair, tiny_texts, causal=causal)
    coders = settings["crosscoders"]
    short = {"epochs": 1, "batch_size": 64, "expansion": 4, "warmup_steps": 5}
    settings["crosscoders"] = {
        "batchtopk": coders["batchtopk"] | short | {"seeds": 2},
        "diff": coders["l1"] | short | {"inputs": {"kind": "difference"}},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    host, device = folder / "host", folder / "device"
    run_command(["harvest", str(host), "--config", str(folder / "settings.yaml")])
    run_command(["train", str(host)])
    shutil.copytree(host, device)
    for run, place in ((host, nullcontext("cpu")), (device, accelerator())):
        with place as name:
            for stage in ("analyze", "concepts", "causal", "compare"):
                run_command([stage, str(run), "--device", str(name)])
            run_command(["interpret", str(run), "--embedding", "none", "--latents", "3"])
    return host, device


def read(path: Path) -> Any:
    """The numbers of a file, as nested dicts and lists or as a table."""
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    if path.suffix == ".safetensors":
        return {name: tensor.tolist() for name, tensor in load_file(path).items()}
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT latent, kind, sequence, position, positions, activations FROM examples").fetchall()
    return [(*row[:5], np.frombuffer(row[5], "<f4").tolist()) for row in rows]


def assert_close(found: Any, expected: Any, where: str) -> None:
    """The same, but for the rounding of sums in another order."""
    if isinstance(expected, pl.DataFrame):
        assert_frame_equal(found, expected, rel_tol=1e-3, abs_tol=2e-4)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}: {key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, where)
    elif isinstance(expected, float):
        same = math.isclose(found, expected, rel_tol=1e-3, abs_tol=2e-4) or (math.isnan(found) and math.isnan(expected))
        assert same, f"{where}: {found} instead of {expected}"
    else:
        assert found == expected, where


@pytest.mark.slow
@pytest.mark.parametrize("stage", FILES)
def test_a_stage_gives_on_the_device_what_it_gives_on_the_cpu(runs: tuple[Path, Path], stage: str) -> None:
    host, device = runs
    for name in FILES[stage]:
        assert_close(read(device / name), read(host / name), name)


@pytest.mark.slow
def test_what_a_stage_loads_is_on_the_device_of_the_run(runs: tuple[Path, Path]) -> None:
    with accelerator() as device:
        session = Session(Run.open(runs[1]), validate(RunConfig, read_yaml(runs[1] / "config.yaml"), ""), Console(quiet=True))
        assert session.device == session.crosscoder("diff").encoder.device == session.load_pair().device == device
        assert read_training(runs[1], "batchtopk", session.device).crosscoder.mean.device == device
        assert all(coder.decoder.device == device for coder in ConceptCoder.load(runs[1], session.device).crosscoders)


@pytest.mark.slow
def test_live_prompts_run_on_the_device(runs: tuple[Path, Path]) -> None:
    text = [{"role": "user", "content": "hi the sea is cold"}]

    def asked(run: Path) -> list[Any]:
        opened = crossdiff.diff.open(run, "batchtopk")
        (coder,) = (coder for coder in Catalogue([run]) if coder.name == "batchtopk")
        live = Live()
        reading, sides = live.read(coder, text), live.sides(coder, 3, np.array([1, 3, 70, 71, 72], np.int32))
        wanted = [Wanted("", "chat", Steering(int(reading.latent[0]), "add", 3.0)), Wanted("", "base")]
        answers = [part.answer for part in live.answer(coder, text, wanted, 3)]
        lenses = [lens.up for lens in live.lens(coder, 3)]
        own = opened.activations("the sea").values
        parts = (own, reading.v, *sides.parts.values())
        return [str(opened.pair.device), answers, reading.latent.tolist(), lenses, sides.bias, *(p.tolist() for p in parts)]

    expected = asked(runs[0])
    with accelerator() as device:
        found = asked(runs[1])
    assert found[0] == str(device)
    assert_close(found[1:], expected[1:], "live prompts")


@pytest.mark.slow
def test_seeds_are_compared_on_the_device(runs: tuple[Path, Path]) -> None:
    names = ["batchtopk", "batchtopk-seed1"]
    expected = compare_seeds(read_seeds(runs[0], names))
    with accelerator() as device:
        found = compare_seeds(read_seeds(runs[0], names, device))
    assert found.matches["median_cosine_live"].is_not_nan().all()
    assert_frame_equal(found.matches, expected.matches)


def coder_of(sparsity: Kind, store: Any) -> Crosscoder:
    coder = new_crosscoder(24, store.normalisation.mean, store.normalisation.scale, sparsity, 0.7, seed=3)
    coder.encoder_bias -= 0.3
    coder.threshold = 1.0
    coder.origin = {"pair": store.pair, "layer": store.layer, "sources": ["base", "chat"]}
    return coder


KINDS = [L1Config(), BatchTopKConfig(k=4), TopKConfig(k=4), JumpReLUConfig(threshold=0.2)]


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda sparsity: sparsity.kind)
def test_a_crosscoder_of_every_kind_computes_on_the_device(tmp_path: Path, sparsity: Kind) -> None:
    store = make_store(tmp_path, planted_activations(600)[0])
    coder, latents = coder_of(sparsity, store), torch.tensor([7, 2, 11])
    x = coder.inputs(store, store.rows()[:50])
    config = AnalyzeConfig(blocks=5, batch_tokens=100, min_active=5)
    part = encode(Part(coder, latents), x)
    quality, live = health(coder, heldout_sums(coder, store, "heldout", 100)), live_latents(coder, store, 5, config)
    with accelerator() as device:
        moved = coder.to(device)
        on_device = moved.inputs(store, store.rows()[:50])
        assert on_device.device == device
        for of in (Crosscoder.code, Crosscoder.sparse_code):
            torch.testing.assert_close(moved.v(of(moved, on_device)).cpu(), coder.v(of(coder, x)))
        found = encode(Part(moved, latents), on_device)
        assert found.latent.tolist() == part.latent.tolist() and found.token.tolist() == part.token.tolist()
        torch.testing.assert_close(moved.reconstruct(on_device).cpu(), coder.reconstruct(x))
        assert_close(health(moved, heldout_sums(moved, store, "heldout", 100)), quality, "health")
        assert live_latents(moved, store, 5, config) == live != []


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda sparsity: sparsity.kind)
def test_a_training_on_the_device_is_that_of_the_cpu(tmp_path: Path, sparsity: Kind) -> None:
    store = make_store(tmp_path / "store", planted_activations(400)[0])
    config = CrosscoderConfig(sparsity=sparsity, n_latents=24, batch_size=64, epochs=2, warmup_steps=2)
    expected = train(tmp_path / "host", store, config)
    with accelerator() as device:
        found = train(tmp_path / "device", store, config, device)
    for name, tensor in expected.parameters().items():
        torch.testing.assert_close(found.parameters()[name].cpu(), tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("steering", [Steering(3, "add", 2.0), Steering(3, "ablate", 3.0), Steering(5, "ablate", 3.0, "base")])
def test_an_answer_is_steered_on_the_device(steering: Steering) -> None:
    prompts = [Prompt((1, 3, 70, 71, 72, 2, 4), (True,) * 7), Prompt((1, 3, 90, 91, 92, 2, 4), (True,) * 7)]

    def answers(place: Callable[[Any], Any]) -> list[str]:
        pair = make_pair(change=0.3)
        place(pair.base), place(pair.chat)
        steerer = Steerer(pair, place(make_crosscoder()), LAYER, make_table(), Counted(1))
        return [
            answer.text for answer in steerer.answer_prompts(prompts, steering, Sampling(max_new_tokens=3, temperature=1.0))
        ]

    expected = answers(lambda moved: moved)
    with accelerator() as device:
        assert answers(lambda moved: moved.to(device)) == expected


def test_a_coder_of_the_difference_writes_the_chat_side_on_the_device() -> None:
    coder, h = make_difference_coder(), torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(3))
    expected = coder.view.written(h, coder.reconstruct(h))
    with accelerator() as device:
        moved, on_device = coder.to(device), h.to(device)
        found = moved.view.written(on_device, moved.reconstruct(on_device))
        assert_close(
            {name: part.tolist() for name, part in found.items()}, {n: p.tolist() for n, p in expected.items()}, "written"
        )


def test_a_threshold_is_estimated_on_the_device(tmp_path: Path) -> None:
    store = make_store(tmp_path, planted_activations(600)[0])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = torch.rand(10, generator=generator, dtype=torch.float64) + 0.5
    origin = {"published": {}, "pair": None, "layer": None, "settings": None, "training_tokens": None}
    coder = PublishedCoder(
        tmp_path, random(2, 16, 10), random(10), random(2, 10, 16), random(2, 16), no_normalisation(2, 16),
        UnsetThreshold(3, weight), origin,
    )  # fmt: skip
    expected = estimate_threshold(coder, ("base", "chat"), store)
    with accelerator() as device:
        assert estimate_threshold(coder, ("base", "chat"), store, device) == pytest.approx(expected, rel=1e-5)
    assert expected > 0


@pytest.mark.slow
def test_planted_concepts_are_found_on_the_device(tmp_path: Path) -> None:
    sizes = {"d_model": 12, "documents": 40, "document_tokens": 20, "topics": 4}
    planted = PlantedConfig(shared=6, chat_only=3, base_only=2, weaker=1, rotated=1, decoupled=1, **sizes)
    training = {"n_latents": 32, "epochs": 2, "batch_size": 64, "warmup_steps": 5, "seeds": 2}
    coders = {"batchtopk": CrosscoderConfig(sparsity=BatchTopKConfig(k=3), **training)}
    analyze = AnalyzeConfig(blocks=5, batch_tokens=200, min_active=10)
    config = TruthConfig(planted=planted, crosscoders=coders, analyze=analyze)
    (tmp_path / "host").mkdir(), (tmp_path / "device").mkdir()
    expected = asdict(benchmark(tmp_path / "host", config)["batchtopk"])
    with accelerator() as device:
        found = asdict(benchmark(tmp_path / "device", config, device=device)["batchtopk"])
    assert_close(found, expected, "truth")
