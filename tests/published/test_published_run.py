"""A published crosscoder and a pair of models become a run that trains nothing, with the results of the run it came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from polars.testing import assert_frame_equal
from safetensors.torch import save_file

import crossdiff
from crossdiff.activations.store import Store
from crossdiff.cli import run_command
from crossdiff.config import CrosscoderConfig, RunConfig, validate
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.train import train
from crossdiff.errors import UserError
from hub_server import HubServer

N_LATENTS, D = 64, 16
SMALL = "--harvest.max_length 48 --harvest.batch_tokens 512 --harvest.shard_tokens 2000 --harvest.dtype float32 --device cpu "
SMALL += "--analyze.blocks 5 --analyze.batch_tokens 512 --analyze.min_active 20 --analyze.examples 3 "
SMALL += "--analyze.examples_per_quantile 1 --analyze.pool_size 5"
FILES = ("config.json", "model.safetensors", "latents.parquet", "examples.sqlite", "health.json", "twins.parquet")


def write_fork(folder: Path, coder: Crosscoder, swapped: bool = False, layer: int | None = 1) -> Path:
    """A BatchTopK crosscoder in the layout of the paper's `dictionary_learning`, entry by entry.

    swapped: the chat model first.
    """
    order = [1, 0] if swapped else [0, 1]
    encoder, decoder = (weights.numpy().reshape(N_LATENTS, 2, D) for weights in (coder.encoder, coder.decoder))
    shapes = {"encoder.weight": (2, D, N_LATENTS), "decoder.weight": (2, N_LATENTS, D)}
    tensors = {name: np.empty(shape, dtype=np.float32) for name, shape in shapes.items()}
    for place, source in enumerate(order):
        for latent in range(N_LATENTS):
            tensors["encoder.weight"][place, :, latent] = encoder[latent, source]
            tensors["decoder.weight"][place, latent, :] = decoder[latent, source]
    tensors["encoder.bias"] = coder.encoder_bias.numpy()
    tensors["decoder.bias"] = coder.decoder_bias.numpy().reshape(2, D)[order].copy()
    tensors["activation_mean"] = coder.mean.numpy()[order].copy()
    tensors["activation_std"] = np.full((2, D), 1 / coder.scale, dtype=np.float32)
    tensors["activation_global_scale"] = np.full(2, coder.scale, dtype=np.float32)
    tensors["target_rms"] = np.array(D**0.5, dtype=np.float32)
    tensors["k"] = np.array(coder.sparsity.k, dtype=np.int32)  # type: ignore[attr-defined]
    tensors["threshold"] = np.array(coder.threshold, dtype=np.float32)
    tensors["code_normalization_id"] = np.array(1)
    folder.mkdir(parents=True)
    save_file({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / "model.safetensors")
    trainer = {"activation_dim": D, "dict_size": N_LATENTS, "dict_class": "BatchTopKCrossCoder"} | (
        {} if layer is None else {"layer": layer}
    )
    (folder / "trainer_config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


def texts(run: Path) -> list[str]:
    """The datasets of a run as words of a command line, with the same documents held out."""
    found = yaml.safe_load((run / "config.yaml").read_text())["dataset"]
    kept = ("path", "heldout_share", "label_column")
    return [json.dumps({key: each[key] for key in kept} | {"max_tokens": None}) for each in found]


def import_command(source: Path | str, run: Path, pair: tuple[Path, Path], datasets: list[str], *more: str) -> list[str]:
    models = ["--base", str(pair[0]), "--chat", str(pair[1])]
    return ["import", str(source), str(run), *models, "--dataset", *datasets, *more]


@pytest.fixture(scope="module")
def published(analysed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fork(tmp_path_factory.mktemp("hub") / "published", crossdiff.open(analysed_run).crosscoder)


def measures(path: Path) -> dict[str, Any]:
    """What health.json says about the crosscoder, without how it was trained."""
    found: dict[str, Any] = json.loads(path.read_text())
    found["decoder_norm_movement"].pop("at_start", None)
    found.pop("training_tokens")
    return found


@pytest.mark.parametrize("swapped", [False, True])
def test_a_published_crosscoder_gives_the_results_of_the_run_it_came_from(
    swapped: bool, analysed_run: Path, tiny_pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to what the layout cannot carry: scale and threshold are float32 there, with an epsilon of 1e-8 on the way out. How
    the crosscoder was trained (its tokens, its seed and the decoder norm at the start) is not known."""
    source, run = write_fork(tmp_path / "hub" / "coder", crossdiff.open(analysed_run).crosscoder, swapped), tmp_path / "run"
    order = ["--sources", "chat", "base"] if swapped else []
    run_command(import_command(source, run, tiny_pair, texts(analysed_run), *order))
    said = " ".join(capsys.readouterr().out.split())
    assert "dictionary_learning: BatchTopKCrossCoder, code normalisation CROSSCODER, read as batchtopk" in said
    assert "64 latents, width 16, after layer 1 of" in said  # the layer is that of the file
    run_command(["harvest", str(run), *SMALL.split()])
    run_command(["analyze", str(run)])
    for name in FILES:
        assert (run / "published" / name).exists(), name
    assert not (run / "published" / "train.jsonl").exists()
    ours, theirs = (pl.read_parquet(folder / "latents.parquet") for folder in (run / "published", analysed_run / "batchtopk"))
    assert ours["n_active"].sum() > 0
    assert_frame_equal(ours, theirs, rel_tol=1e-3, abs_tol=1e-4)
    ours, theirs = (measures(folder / "health.json") for folder in (run / "published", analysed_run / "batchtopk"))
    assert ours["heldout"]["n_tokens"] == theirs["heldout"]["n_tokens"]
    assert ours["heldout"]["fve"] == pytest.approx(theirs["heldout"]["fve"], rel=1e-4)
    assert (ours["counts"], ours["analysed_tokens"], set(ours)) == (theirs["counts"], theirs["analysed_tokens"], set(theirs))
    if swapped:
        return
    run_command(["run", str(run)])
    assert "not known" in (run / "report.html").read_text()  # the number of tokens that it was trained on
    diff = crossdiff.open(run)
    assert diff.names == ("published",) and diff.crosscoder.sources == ("base", "chat") and diff.rule.leave_out == 1
    assert len(diff.activations("the cold sea").latents) > 0
    capsys.readouterr()
    run_command(["run", str(run)])
    assert capsys.readouterr().out.count("already done") == 9  # overlap counts twice


def test_what_follows_the_analysis_works_and_a_changed_file_is_read_again(
    published: Path, analysed_run: Path, tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    source, run = tmp_path / "coder.safetensors", tmp_path / "run"
    source.write_bytes((published / "model.safetensors").read_bytes())
    run_command(import_command(source, run, tiny_pair, texts(analysed_run), "--layer", "1", "--name", "paper"))
    run_command(["causal", str(run), *SMALL.split(), "--causal.resamples", "100"])
    assert (run / "paper" / "causal.json").exists()
    upload = crossdiff.push(run, "me/paper", dry_run=True)
    assert {"paper/model.safetensors", "paper/latents.parquet", "config.yaml"} <= set(upload.sizes)
    assert "tokens trained on | not known" in upload.card
    run_command(["steer", str(run), "--latent", "0", "--prompt", "why", "--max_new_tokens", "2"])
    before = (run / "paper" / "model.safetensors").read_bytes()
    coder = crossdiff.open(analysed_run).crosscoder
    other = write_fork(tmp_path / "other", Crosscoder(**(vars(coder) | {"threshold": coder.threshold * 2})))
    source.write_bytes((other / "model.safetensors").read_bytes())
    run_command(["train", str(run)])
    assert (run / "paper" / "model.safetensors").read_bytes() != before
    source.unlink()
    with pytest.raises(UserError, match=r"published crosscoder .*coder.safetensors of this run is gone; put it back"):
        run_command(["analyze", str(run)])


def test_trained_and_published_crosscoders_share_a_run(
    published: Path, tiny_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = {"published": str(published), "sparsity": {"kind": "batchtopk", "k": 4}, "n_latents": 64}
    trained = tiny_settings["crosscoders"]["batchtopk"] | {"seeds": None}
    settings, run = tiny_settings | {"crosscoders": {"paper": paper, "own": trained}}, tmp_path / "run"
    assert list(validate(RunConfig, settings, "").trainings) == ["paper", "own", "own-seed1", "own-seed2"]
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump(settings | {"crosscoders": {"paper": paper, "own": trained | {"seeds": 1}}})
    )
    run_command(["plan", str(run), "--config", str(tmp_path / "settings.yaml")])
    said = " ".join(capsys.readouterr().out.split())
    assert "analysis of paper, which is published and not trained: uses all" in said and "training of own" in said
    assert "a verdict needs 20 on which the latent is active" in said and "active on 1 in 16, needs 320; these" in said
    assert not run.exists()
    for command in ("harvest", "concepts"):
        run_command([command, str(run), "--config", str(tmp_path / "settings.yaml")])
    assert {path.parent.name for path in run.glob("*/latents.parquet")} == {"paper", "own"}
    trainings = {
        each["name"]: each["seed"] for each in json.loads((run / "concepts" / "concepts.json").read_text())["trainings"]
    }
    assert trainings == {"paper": None, "own": 0}
    with pytest.raises(UserError, match=r"and paper is published: it cannot be trained again. Name the others with --only"):
        run_command(["compare", str(run)])
    with pytest.raises(UserError, match="a published crosscoder cannot be trained again: remove seeds"):
        run_command(["run", str(run), "--crosscoders.paper.seeds", "3"])


def test_a_run_needs_no_training_text(published: Path, tiny_pair: tuple[Path, Path], tiny_texts: Any, tmp_path: Path) -> None:
    """All documents held out: the statistics of the store are over all tokens, and the analysis uses them."""
    datasets, run = [json.dumps({"path": str(path), "heldout_share": 1}) for path in tiny_texts], tmp_path / "run"
    run_command(import_command(published, run, tiny_pair, datasets))
    run_command(["analyze", str(run), *SMALL.split()])
    store = Store(run / "activations")
    assert store.documents["split"].unique().to_list() == ["heldout"]
    h = store.gather(store.rows())
    torch.testing.assert_close(store.normalisation.mean.float(), h.mean(0), rtol=1e-4, atol=1e-5)
    assert store.manifest["n_statistics_tokens"] == len(h)
    found = json.loads((run / "published" / "health.json").read_text())
    assert found["heldout"]["n_tokens"] == found["analysed_tokens"] == len(h)
    with pytest.raises(UserError, match="heldout_share of 1, so nothing would be left to train batchtopk"):
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["crosscoders"] = {"batchtopk": {"sparsity": {"kind": "batchtopk"}, "seeds": 1}}
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
        run_command(["run", str(tmp_path / "other"), "--config", str(tmp_path / "settings.yaml")])
    assert not (tmp_path / "other").exists()


def test_texts_without_settings_are_half_held_out_and_limited(
    published: Path, tiny_pair: tuple[Path, Path], tiny_texts: Any, tmp_path: Path
) -> None:
    run_command(import_command(published, tmp_path / "run", tiny_pair, [str(path) for path in tiny_texts]))
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [(each["heldout_share"], each["max_tokens"]) for each in found["dataset"]] == [(0.5, 2_000_000)] * 2
    assert found["crosscoders"]["published"] == {
        "sparsity": {"kind": "batchtopk", "k": 4, "aux": {"weight": 1 / 32, "k": None}, "threshold_beta": 0.999,
                     "threshold_start_share": 0.2},
        "structure": {"kind": "free"}, "inputs": {"kind": "paired"}, "expansion": 8, "n_latents": 64,
        "published": str(published),
    }  # fmt: skip


def test_a_name_on_the_hub_is_pinned_to_its_commit(
    published: Path, analysed_run: Path, tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer(monkeypatch, tmp_path / "cache") as server:
        server.create("org/coder")
        server.add_folder("org/coder", published)
        run = tmp_path / "run"
        run_command(import_command("org/coder", run, tiny_pair, texts(analysed_run)))
        named = yaml.safe_load((run / "config.yaml").read_text())["crosscoders"]["published"]["published"]
        assert named.startswith("org/coder@") and len(named) > len("org/coder@")
        run_command(["train", str(run), *SMALL.split()])
    # What is done needs the Hub no more.
    run_command(["analyze", str(run)])
    assert crossdiff.open(run).crosscoder.n_latents == 64


REFUSED = {
    "width": r"has width 16, but the models have width 32; give the models",
    "layer": r"reads layer 1, but the run's layer is 2; set layer to 1",
    "no layer": r"do not name the layer that it reads: give it with --layer",
    "far layer": r"layer 7 does not exist: .* has 3 layers, 0 to 2",
    "sources": r"reads 2 sources, old, new; a run has base and chat. Give a crosscoder of both",
    "one model": r"a run needs both models of the pair: give --base and --chat",
    "no texts": r"no texts: name at least one --dataset",
    "pickle": r"cannot read .*: it is damaged or holds more than tensors, which is unsafe to read",
    "nothing": r"no-such does not exist; give the folder of a published coder",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    what: str, published: Path, analysed_run: Path, tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    coder = crossdiff.open(analysed_run).crosscoder
    source: Path | str = published
    pair, datasets, run = tiny_pair, texts(analysed_run), tmp_path / "run"
    if what == "width":
        pair = tmp_path / "base", tmp_path / "chat"
        for folder in pair:  # the config alone tells the width
            shutil.copytree(tiny_pair[0], folder)
            model = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(model | {"hidden_size": 32}))
    elif what in ("no layer", "far layer"):
        source = write_fork(tmp_path / "coder", coder, layer=None)
    elif what == "pickle":
        source = tmp_path / "ae.pt"
        torch.save({"encoder.weight": Path}, source)
    elif what == "nothing":
        source = "/no-such"
    more = {"layer": ["--layer", "2"], "far layer": ["--layer", "7"], "sources": ["--sources", "old", "new"]}.get(what, [])
    command = import_command(source, run, pair, datasets, *more)
    if what == "one model":
        command = ["import", str(source), str(run), "--base", str(pair[0])]
    elif what == "no texts":
        command = ["import", str(source), str(run), "--base", str(pair[0]), "--chat", str(pair[1])]
    with pytest.raises(UserError, match=REFUSED[what]):
        run_command(command)
    assert not run.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_latents": 32}, "has n_latents 64, but the settings say 32; set n_latents to 64"),
        ({"sparsity": {"kind": "l1"}}, r"has sparsity \{'kind': 'batchtopk', 'k': 4\}, but the settings say \{'kind': 'l1'\}"),
        ({"inputs": {"kind": "single", "source": "base"}}, r"has inputs \{'kind': 'paired'\}, but the settings say"),
        ({"sources": ["base"]}, "reads 2 sources, but the names are"),
        ({"lr": 0.1}, "cannot be trained again: remove lr"),
        ({"published": None, "sources": ["base", "chat"]}, "sources and input_scales describe a published crosscoder"),
    ],
)
def test_settings_that_the_file_contradicts_are_refused_before_the_harvest(
    changes: dict[str, Any], message: str, published: Path, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    paper = {"published": str(published), "sparsity": {"kind": "batchtopk", "k": 4}, "n_latents": 64} | changes
    path, run = tmp_path / "settings.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(tiny_settings | {"crosscoders": {"paper": paper}}))
    with pytest.raises(UserError, match=message):
        run_command(["run", str(run), "--config", str(path)])
    assert not run.exists()


def test_several_layers_are_refused(published: Path, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    paper = {"published": str(published), "sparsity": {"kind": "batchtopk", "k": 4}, "n_latents": 64}
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(tiny_settings | {"crosscoders": {"paper": paper}}))
    with pytest.raises(
        UserError, match="paper: a published crosscoder reads one layer, so it cannot be in the runs of several"
    ):
        run_command(["harvest", str(tmp_path / "run"), "--config", str(path), "--layers", "0", "1"])


def test_a_training_in_python_is_refused(published: Path, analysed_run: Path, tmp_path: Path) -> None:
    config = CrosscoderConfig(sparsity={"kind": "batchtopk", "k": 4}, n_latents=64, published=str(published))
    with pytest.raises(UserError, match=r"paper is a published crosscoder .*, which cannot be trained again"):
        train(tmp_path / "paper", Store(analysed_run / "activations"), config)
