"""A refused command leaves a run as it was, and a result is read with the settings that it was made with."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from rich.console import Console

import crossdiff
from conftest import forget_digests
from crossdiff.cli import run_command
from crossdiff.compare.null import compare
from crossdiff.config import CrosscoderConfig, RunConfig, default_crosscoder, validate
from crossdiff.crosscoder.checkpoint import harvest_of, load, origin_of, save
from crossdiff.crosscoder.cost import check_memory
from crossdiff.diff import Diff
from crossdiff.errors import UserError
from crossdiff.interp.explanation_table import SCHEMA
from crossdiff.latents.settings import verdict_settings
from crossdiff.published.hub import load as load_published
from crossdiff.published.hub import push
from crossdiff.report.overview import caveats
from crossdiff.report.reading import read_run
from crossdiff.run import Run, Stage
from crossdiff.stages.definitions import differences
from crossdiff.stages.session import Session
from opened import write_run


def state(folder: Path) -> dict[Path, bytes | None]:
    """Every file with its content and every folder, but for the lock."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if path.name != ".lock"}


@pytest.fixture
def run(analysed_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(analysed_run, tmp_path / "copy" / "run")


def change(run: Path, section: str, **values: Any) -> None:
    """Change settings in the run's config.yaml, as another command or a hand may do."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run --layer 99", r"layer 1\):\n  layer: 1 -> 99\nHarvesting again takes"),
        ("harvest --layer 99 --force", "layer 99 does not exist"),
        ("causal --layer 0", r"\n  layer: 1 -> 0\n"),
        ("run --base ./nothere", r"\n  base: /.*/base -> ./nothere\n"),
        ("run --base ./nothere --force", "cannot load './nothere'"),
        ("train --dataset nothere.jsonl", r"\n  dataset.0.path: .*plain.jsonl -> nothere.jsonl\n"),
        ("train --dataset nothere.jsonl --force", "there is no file nothere.jsonl"),
        ("analyze --harvest.dtype int8", r"\n  harvest.dtype: float32 -> int8\n"),
        ("train --crosscoders.batchtopk.batch_size 5000000", r"crosscoders.batchtopk: batch_size 5000000 is larger than the"),
        ("train --crosscoders.batchtopk.n_latents 100000000000", r"100,000,000,000 latents of batchtopk.* need .* GB"),
        ("train --crosscoders.batchtopk.sparsity.k 65", "k 65 is larger than the number of latents 64"),
        ("harvest --crosscoders.batchtopk.batch_size 5000000", "batch_size 5000000 is larger than the"),
        ("analyze --analyze.blocks 4000", "150 documents cannot make 4000 blocks"),
        ("harvest --analyze.blocks 4000", "150 documents cannot make 4000 blocks"),
        ("causal --causal.interventions nofile.yaml", "cannot read the config file nofile.yaml"),
        ("report --causal.interventions nofile.yaml", "cannot read the config file nofile.yaml"),
        ("train --crosscoders.batchtopk.seed -1", r"crosscoders.batchtopk.seed: .*greater than or equal to 0 \(found -1\)"),
        ("train --crosscoders.batchtopk.lr .inf", r"crosscoders.batchtopk.lr: .*finite number \(found inf\)"),
        ("steer --latent 3 --prompt hi --seed -1", r"seed: .*greater than or equal to 0 \(found -1\)"),
        ("steer --latent 3 --prompt hi --temperature .inf", r"temperature: .*finite number \(found inf\)"),
        ("steer --latent 64", "there is no latent 64: batchtopk has 64, from 0 to 63"),
        ("steer --latent 3 --controls 1000 --labels greeting", "shared latents for 1000 controls; lower --controls"),
        ("interpret --latents 64 --embedding none", "there is no latent 64"),
        ("interpret --concepts 0 3", "has no concepts; run `crossdiff concepts"),
        ("seeds batchtopk ../run/batchtopk", "has no latents.parquet"),
        ("seeds batchtopk other --cosine nan", "--cosine is nan; expected a number from -1 to 1"),
        ("export --latents 1 -o latents.parquet", "the page latents.parquet has no name that ends in .html"),
        ("report --device cuda:7", "device 'cuda:7' cannot be used"),
        ("report --harvest.store foo://bucket/x", "cannot use foo://bucket/x"),
        ("train --only nothere", "there is no crosscoder 'nothere' in this run; there are batchtopk"),
    ],
)
def test_a_refused_command_leaves_everything_as_it_was(run: Path, command: str, message: str) -> None:
    before, (name, *options) = state(run), command.split()
    with pytest.raises(UserError, match=message):
        run_command([name, str(run), *options])
    assert state(run) == before


def test_a_tracker_that_is_not_installed_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdiff.stages.checks.find_spec", lambda name: None)
    before = state(run)
    with pytest.raises(UserError, match="trackers: wandb is not installed"):
        run_command(["train", str(run), "--trackers", "wandb"])
    assert state(run) == before


def test_settings_of_another_machine_are_checked_only_where_they_are_needed(run: Path) -> None:
    """A run that was made with a GPU is shown on a laptop, and a setting that was accepted is not refused later."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"device": "cuda:7"}, sort_keys=False))
    run_command(["train", str(run)])
    with pytest.raises(UserError, match="device 'cuda:7' cannot be used"):
        run_command(["train", str(run), "--crosscoders.batchtopk.lr", "0.002"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run new --layer 99", "layer 99 does not exist"),
        ("harvest new/sweep --layers 1 99", "layer 99 does not exist"),
        ("run new --only nothere", "there is no crosscoder 'nothere'"),
        ("run new --harvest.store foo://bucket/x", "cannot use foo://bucket/x"),
        ("run new --crosscoders.batchtopk.sparsity.k 65", "k 65 is larger than the number of latents 64"),
        ("report rnus/demo", "there is no run at rnus/demo: .*; check the path, or make a run with `crossdiff run` or"),
        ("train new", "there is no run at new"),
        ("steer new --latent 3", "there is no run at new"),
        ("interpret new", "there is no run at new"),
        ("clean new", "there is no run at new"),
    ],
)
def test_a_refused_command_leaves_no_new_run(
    tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tiny_settings))
    name, *options = command.split()
    given = ["--config", "settings.yaml"] if name in ("run", "harvest", "train") else []
    with pytest.raises(UserError, match=message):
        run_command([name, *options, *given])
    assert {path.name for path in tmp_path.iterdir()} == {"settings.yaml"}


def test_a_new_run_is_announced_once(tmp_path: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tiny_settings))
    for expected in (1, 0):
        run_command(["harvest", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")])
        assert capsys.readouterr().out.count(f"new run: {tmp_path / 'run'}") == expected
    with pytest.raises(UserError, match="holds a diff, not a benchmark"):
        run_command(["truth", str(tmp_path / "run")])


def test_a_benchmark_is_not_a_diff(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    run = Run.open(tmp_path / "truth", create=True)
    with run.working(Stage("truth", "1", ("truth.json",))) as folder:
        (folder / "truth.json").write_text("{}")
    run.close()
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tiny_settings))
    with pytest.raises(UserError, match="holds a benchmark of `crossdiff truth`, not a diff"):
        run_command(["run", str(tmp_path / "truth"), "--config", str(tmp_path / "settings.yaml")])


def test_differences_by_hand() -> None:
    old = {"layer": 5, "dataset": [{"path": "a"}], "harvest": {"dtype": "int8", "max_length": 256}, "same": [1]}
    new = {
        "layer": None,
        "dataset": [{"path": "b"}, {"path": "c"}],
        "harvest": {"dtype": "float16", "max_length": 256},
        "same": [1],
    }
    assert differences(old, new) == [
        "layer: 5 -> unset",
        "dataset.0.path: a -> b",
        "dataset.1: unset -> {'path': 'c'}",
        "harvest.dtype: int8 -> float16",
    ]


def test_a_run_that_an_earlier_version_left_with_other_settings_says_so(run: Path) -> None:
    """Earlier versions kept no settings in the manifest, and overwrote config.yaml although they refused the command."""
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["harvest"]["settings"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"layer": 99}, sort_keys=False))
    with pytest.raises(UserError, match=r"\n  layer: 1 -> 99\n"):
        run_command(["train", str(run)])
    run_command(["train", str(run), "--layer", "1"])
    assert yaml.safe_load((run / "config.yaml").read_text())["layer"] == 1


def test_verdicts_are_shown_with_the_limits_that_they_were_made_with(run: Path, tmp_path: Path) -> None:
    run_command(["train", str(run), "--analyze.nu_error", "0.9"])  # nothing to train, and the analysis is not repeated
    assert yaml.safe_load((run / "config.yaml").read_text())["analyze"]["nu_error"] == 0.9
    assert read_run(run).crosscoders[0].limits.nu_error == 0.2
    card = push(run, "me/my-diff", dry_run=True).card
    assert "nu_error: 0.9" not in card and "min_active: 20" in card
    other = shutil.copytree(run, tmp_path / "other")
    forget_digests(other)
    with pytest.raises(UserError, match=r"other compares the same two models as .*run, so it is not a null diff of it"):
        compare(run, other)
    manifest = json.loads((other / "activations" / "manifest.json").read_text())
    manifest["pair"]["chat"] = {"name": "another"}
    (other / "activations" / "manifest.json").write_text(json.dumps(manifest))
    assert compare(run, other).height
    health = json.loads((other / "batchtopk" / "health.json").read_text())
    health["settings"]["nu_error"] = 0.3
    (other / "batchtopk" / "health.json").write_text(json.dumps(health))
    with pytest.raises(UserError, match=r"same analysis of batchtopk, but .*'nu_error': 0.2.* has .*'nu_error': 0.3"):
        compare(run, other)
    del health["settings"]  # as an earlier version wrote it
    (other / "batchtopk" / "health.json").write_text(json.dumps(health))
    assert read_run(other).crosscoders[0].limits.nu_error == 0.9


def test_a_null_diff_is_shown_with_verdicts_of_the_same_limits_only(run: Path) -> None:
    forget_digests(run)
    rates = {"n_live": 5, "rates": {"chat_specific": 0.2}, "analysis": verdict_settings(run / "batchtopk")}
    (run / "null.json").write_text(json.dumps({"crosscoders": {"batchtopk": rates}}))
    assert list(read_run(run).null) == ["batchtopk"]
    health = json.loads((run / "batchtopk" / "health.json").read_text())
    health["settings"]["nu_error"] = 0.3
    (run / "batchtopk" / "health.json").write_text(json.dumps(health))
    report = read_run(run)
    assert not report.null and report.null_outdated == ("batchtopk",)
    said = "batchtopk was analysed with other limits or by other nus since its null diff, which is left out"
    assert said in " ".join(caveats(report))


def test_a_null_diff_of_other_nus_is_not_shown(run: Path) -> None:
    """Earlier versions judged by nu_reconstruction with bias and left no record of it."""
    forget_digests(run)
    now = verdict_settings(run / "batchtopk")
    assert now["nus"] == ["nu_error", "nu_reconstruction_nobias"]
    rates = {"n_live": 5, "rates": {"chat_specific": 0.2}}
    for record, is_shown in (
        ({"analysis": now}, True),
        ({"analysis": now | {"nus": ["nu_error", "nu_reconstruction"]}}, False),
        ({"analysis": {key: value for key, value in now.items() if key != "nus"}}, False),
        ({}, False),
    ):
        (run / "null.json").write_text(json.dumps({"crosscoders": {"batchtopk": rates | record}}))
        assert list(read_run(run).null) == ["batchtopk"] * is_shown
    health = json.loads((run / "batchtopk" / "health.json").read_text())
    del health["nus"]
    (run / "batchtopk" / "health.json").write_text(json.dumps(health))
    assert verdict_settings(run / "batchtopk")["nus"] == ["nu_error", "nu_reconstruction"]


def test_scores_are_summarised_by_the_present_verdicts(run: Path) -> None:
    """Two latents are interpreted; the summary was written when both had a verdict that they no longer have."""
    folder = run / "batchtopk"
    shared = pl.read_parquet(folder / "latents.parquet").filter(verdict="shared")["latent"][:2].to_list()
    trained = json.loads((run / "manifest.json").read_text())["stages"]["train/batchtopk"]["fingerprint"]
    rows = [{"latent": latent, "detection": 0.75, "crosscoder": trained} for latent in shared]
    pl.DataFrame(rows, schema=SCHEMA).write_parquet(folder / "interpretation.parquet")
    score = {"score": "detection", "verdict": "rotated", "n": 2, "mean": 0.75, "quartiles": [0.75] * 5}
    summary = {"n_latents": 2, "n_incomplete": 0, "models": [], "scores": [score], "differences": []}
    for nu_error, expected in ((0.2, "rotated"), (0.3, "shared")):  # the limit of the run is 0.2
        analysis = verdict_settings(folder) | {"nu_error": nu_error}
        (folder / "interpretation.json").write_text(json.dumps(summary | {"seed": 0, "analysis": analysis}))
        found = read_run(run).crosscoders[0].interpretation
        assert found is not None and [(entry.verdict, entry.n, entry.mean) for entry in found.scores] == [(expected, 2, 0.75)]


def test_a_text_is_read_with_the_harvest_that_was_trained_on(run: Path) -> None:
    change(run, "harvest", leave_out=7, max_length=9)
    opened = crossdiff.open(run)
    assert (opened.harvest.leave_out, opened.harvest.max_length) == (1, 48)
    # "the sea is cold" has 16 tokens with the BOS, which max_length 9 would refuse, and leave_out 7 would leave 9 of them.
    found = opened.activations("the sea is cold", latents=range(64))
    assert len(found.tokens) == 16 and (found.values[1:7] > 0).any()
    forget_digests(run)
    # A crosscoder of an earlier version has no record, but its store has one.
    coder = load(run / "batchtopk")
    del coder.origin["harvest"]
    save(coder, run / "batchtopk")
    assert (harvest_of(run / "batchtopk").leave_out, harvest_of(run / "batchtopk").max_length) == (1, 48)
    shutil.rmtree(run / "activations")  # as it is pulled from the Hub
    assert harvest_of(run / "batchtopk").leave_out == 7


def test_the_models_are_those_that_the_crosscoder_was_trained_on(run: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    base, chat = settings["base"], settings["chat"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"base": chat}))
    assert crossdiff.open(run).pair.identity["base"]["name"] == base
    forget_digests(run)
    # Where their folder is gone, the settings may name another place, if the files are the same.
    coder = load(run / "batchtopk")
    coder.origin["pair"]["base"]["name"] = str(tmp_path / "gone")
    save(coder, run / "batchtopk")
    with pytest.raises(UserError, match="is not the base model that the crosscoder was trained on"):
        crossdiff.open(run).pair  # noqa: B018
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert crossdiff.open(run).pair.identity["base"]["name"] == base


def test_the_default_crosscoder_is_the_first_batchtopk_one_that_reads_both_models() -> None:
    l1, batchtopk, topk = ("l1", "paired"), ("batchtopk", "paired"), ("topk", "paired")
    assert default_crosscoder({"a": l1, "b": ("batchtopk", "single"), "d": batchtopk, "c": batchtopk}) == "d"
    assert default_crosscoder({"a": ("batchtopk", "difference"), "b": topk, "c": l1}) == "b"
    assert default_crosscoder({"a": ("l1", "single"), "b": ("topk", "difference")}) == "a"


def test_the_default_is_the_same_everywhere(
    tmp_path: Path, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]
) -> None:
    """The names sort otherwise than the settings, and one is called batchtopk without being the first of its kind."""
    run = write_run(tmp_path / "run", tiny_pair, tiny_texts)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    coders = settings["crosscoders"]
    settings["crosscoders"] = {"l1": coders["l1"], "wide": coders["batchtopk"], "batchtopk": coders["batchtopk"]}
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    shutil.copytree(run / "batchtopk", run / "wide")
    health = json.loads((run / "batchtopk" / "health.json").read_text())
    (run / "wide" / "health.json").write_text(json.dumps(health | {"n_latents": 61}))  # tells them apart
    coder = load(run / "wide")
    coder.origin["training_tokens"] = 61
    save(coder, run / "wide")
    session = Session(Run.open(run), validate(RunConfig, settings, "here"), Console())
    assert session.default_name == "wide" == crossdiff.open(run).name == read_run(run).primary.name
    assert load_published(run).origin["training_tokens"] == 61
    session.run_directory.close()
    # What a crosscoder is, it says itself: the settings may have changed without a training.
    change(run, "crosscoders", l1=coders["batchtopk"])
    assert origin_of(run / "l1")["settings"]["sparsity"]["kind"] == "l1" and crossdiff.open(run).name == "wide"


def test_clean_lists_what_it_deletes_and_spares_unfinished_harvests(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("old/1-train-l1-7/l1/a", 3_000_000), ("work/train-l1-ab/b", 500_000), ("work/harvest-cd/c", 2_000_000)):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_bytes(bytes(size))
    before = state(run)
    with pytest.raises(UserError, match="nothing was deleted, since there is no terminal to ask on; pass --yes"):
        run_command(["clean", str(run)])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"3.0 MB {run / 'old/1-train-l1-7'} (replaced result)" in shown
    assert f"0.5 MB {run / 'work/train-l1-ab'} (unfinished work)" in shown
    assert f"2.0 MB {run / 'work/harvest-cd'} (unfinished harvest; kept: `crossdiff harvest` resumes it" in shown
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    run_command(["clean", str(run)])
    assert asked == ["Delete 2 of these, 3.5 MB? [y/N] "] and "nothing was deleted" in capsys.readouterr().out
    assert state(run) == before
    run_command(["clean", str(run), "--yes"])
    assert "3.5 MB freed" in capsys.readouterr().out and not (run / "old").exists()
    assert [path.name for path in (run / "work").iterdir()] == ["harvest-cd"]
    run_command(["clean", str(run), "--yes"])
    assert f"nothing to delete in {run}" in capsys.readouterr().out and (run / "work" / "harvest-cd").exists()
    run_command(["clean", str(run), "--yes", "--unfinished-harvests"])
    assert not (run / "work").exists() and (run / "activations" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        (Diff.latent, "x", "'x' is not the number of a latent; expected a whole number from 0 to 63, the latents of batchtopk"),
        (Diff.latent, 3.5, "3.5 is not the number of a latent"),
        (Diff.latent, True, "True is not the number of a latent"),
        (Diff.latent, 64, "there is no latent 64: batchtopk has 64, from 0 to 63"),
        (Diff.examples, "x", "'x' is not the number of a latent"),
        (Diff.activations, 3, "3 is not a text; expected a string, or a list of messages with role and content"),
        (Diff.activations, b"sea", "b'sea' is not a text"),
        (Diff.activations, ["sea"], "message 0 must be a mapping with role and content"),
    ],
)
def test_what_is_not_a_latent_or_a_text_is_refused(analysed_run: Path, method: Any, argument: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect.unwrap(method)(crossdiff.open(analysed_run), argument)  # without the checks of types that only tests make


@pytest.mark.parametrize(("latents", "message"), [(["x"], "'x' is not the number"), (5, "expected a list of latents, found 5")])
def test_what_is_not_a_list_of_latents_is_refused(analysed_run: Path, latents: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect.unwrap(Diff.activations)(crossdiff.open(analysed_run), "sea", latents)


def test_weights_beyond_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 latents of 2 sources of 16 dimensions: 2 * 1,000 * 32 parameters of 16 bytes are 1.024 MB; an SAE has half."""
    monkeypatch.setattr("crossdiff.crosscoder.cost._total_memory", lambda device: 1_536_000)
    own = validate(CrosscoderConfig, {"sparsity": {"kind": "l1"}, "n_latents": 1000}, "here")
    sae = validate(CrosscoderConfig, {"sparsity": {"kind": "l1"}, "n_latents": 1000, "inputs": {"kind": "single"}}, "here")
    cpu = torch.device("cpu")
    check_memory({"a": own, "sae": sae}, 16, cpu)
    check_memory({"a": own, "b": own}, 16, cpu, latent_ranks=2)
    with pytest.raises(UserError, match=r"moments of a, b need .*the 1,000 latents of a need .*with --only"):
        check_memory({"a": own, "b": own}, 16, cpu)
