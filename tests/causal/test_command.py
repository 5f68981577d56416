"""`crossdiff causal` and `crossdiff steer` on a tiny run: files, resuming, and bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from conftest import tiny_config
from crossdiff.causal.patching import Patcher
from crossdiff.cli import run_command
from crossdiff.errors import UserError

LATENTS = {"kind": "latents", "latents": {"kind": "ranked", "ranking": "delta_norm"}}
EXPERIMENT: dict[str, Any] = {
    "interventions": [
        {"name": "none"},
        {"name": "full_swap", "add": [{"kind": "activation"}]},
        {"name": "best", "add": [LATENTS]},
        {"name": "mean", "add": [{"kind": "mean_difference"}]},
        {
            "name": "single",
            "add": [{"kind": "latents", "latents": {"kind": "each", "of": {"kind": "list", "latents": [3, 5]}}}],
        },
    ],
    "comparisons": [{"name": "c", "better": "best", "worse": "none"}],
}
CAUSAL = ("--causal.batch_tokens", "400", "--causal.pool", "8")


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Path:
    """A run with one analysed crosscoder. The tests work on copies."""
    folder = tmp_path_factory.mktemp("causal")
    settings = tiny_config(tiny_pair, tiny_texts)
    settings["crosscoders"] = {"l1": settings["crosscoders"]["l1"]}
    settings["base"], settings["chat"] = str(folder / "base"), str(folder / "chat")
    shutil.copytree(tiny_pair[0], folder / "base")
    shutil.copytree(tiny_pair[1], folder / "chat")
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    for stage in ("harvest", "analyze"):
        run_command([stage, str(folder / "run"), "--config", str(folder / "settings.yaml")])
    return folder


@pytest.fixture
def run(analysed: Path, tmp_path: Path) -> Path:
    shutil.copytree(analysed / "run", tmp_path / "run")
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    return tmp_path / "run"


def causal(run: Path, *options: str) -> None:
    run_command(["causal", str(run), "--causal.interventions", str(run.parent / "list.yaml"), *CAUSAL, *options])


def test_the_causal_test_writes_its_tables_and_runs_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "l1" / "latents.parquet").read_bytes()
    causal(run)
    assert "KL to the chat model in nats" in capsys.readouterr().out
    report = json.loads((run / "l1" / "causal.json").read_text())
    kl = {(entry["intervention"], entry["span"]): entry["kl"]["value"] for entry in report["results"]}
    assert kl["full_swap", "response"] < 1e-5
    assert kl["none", "response"] > 1e-4
    assert {entry["comparison"] for entry in report["comparisons"]} == {"c"}
    table = pl.read_parquet(run / "l1" / "causal_conversations.parquet")
    none = table.filter((pl.col("arm") == "none") & (pl.col("span") == "response"))
    assert none.height == report["n_conversations"]
    assert none["kl"].mean() == pytest.approx(kl["none", "response"])
    joined = pl.read_parquet(run / "l1" / "latents.parquet").join(
        pl.read_parquet(run / "l1" / "causal_latents.parquet"), on="latent", how="inner"
    )
    assert joined["latent"].to_list() == [3, 5]
    assert (run / "l1" / "latents.parquet").read_bytes() == before
    causal(run)
    assert "causal/l1: already done" in capsys.readouterr().out


def test_the_published_list_by_its_name_with_every_measure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["causal", str(run), "--causal.interventions", "published", *CAUSAL])
    assert "other measures" in capsys.readouterr().out
    report = json.loads((run / "l1" / "causal.json").read_text())
    assert report["measures"] == ["nll", "kl_base", "cross_entropy"]
    found = {entry["intervention"]: entry for entry in report["results"] if entry["span"] == "response"}
    assert found["chat_model"]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert found["base_model"]["measures"]["kl_base"]["value"] == pytest.approx(0, abs=1e-5)
    assert found["base_model"]["kl"]["value"] > 1e-4 and found["chat_model"]["measures"]["kl_base"]["value"] > 1e-4
    assert all(entry["measures"]["nll"]["value"] > 0 for entry in found.values())
    table = pl.read_parquet(run / "l1" / "causal_conversations.parquet")
    none = table.filter((pl.col("arm") == "none") & (pl.col("span") == "response"))
    assert none["nll"].mean() == pytest.approx(found["none"]["measures"]["nll"]["value"])
    assert {row["n_outside"] for row in found.values() if row["intervention"].startswith("best_half")} != {None}


def test_a_principal_direction_that_does_not_exist_is_named(run: Path) -> None:
    wrong = {"name": "x", "add": [{"kind": "principal", "components": [999]}]}
    (run.parent / "list.yaml").write_text(yaml.safe_dump({"interventions": [{"name": "none"}, wrong]}))
    with pytest.raises(UserError, match=r"there is no principal direction 999: the activations have \d+ dimensions"):
        causal(run)


def test_a_killed_test_resumes_after_the_last_batch(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure, calls = Patcher.measure, []

    def counted(self: Patcher, batch: Any) -> Any:
        calls.append(len(batch))
        return measure(self, batch)

    def killed(self: Patcher, batch: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        return counted(self, batch)

    undisturbed = shutil.copytree(run, tmp_path / "undisturbed")
    monkeypatch.setattr(Patcher, "measure", counted)
    causal(undisturbed)
    n_batches = len(calls)
    assert n_batches > 3
    calls.clear()
    monkeypatch.setattr(Patcher, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        causal(run)
    assert not (run / "l1" / "causal.json").exists()
    calls.clear()
    monkeypatch.setattr(Patcher, "measure", counted)
    causal(run)
    assert len(calls) == n_batches - 2
    left, right = (pl.read_parquet(path / "l1" / "causal_conversations.parquet") for path in (run, undisturbed))
    assert left.equals(right)
    assert not (run / "work").exists()


def test_a_coder_of_the_difference_is_patched_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for name, inputs in (("diff_sae", {"kind": "difference"}), ("base_sae", {"kind": "single", "source": "base"})):
        settings["crosscoders"] = {name: {**settings["crosscoders"]["l1"], "inputs": inputs}, **settings["crosscoders"]}
    (run.parent / "settings.yaml").write_text(yaml.safe_dump(settings))
    largest = {"kind": "latents", "latents": {"kind": "ranked", "ranking": "contribution", "among": "all", "size": 5}}
    added = [{"name": "largest", "add": [largest]}, {"name": "all", "add": [{"kind": "latents", "latents": {"kind": "all"}}]}]
    experiment = {**EXPERIMENT, "interventions": EXPERIMENT["interventions"] + added}
    (run.parent / "list.yaml").write_text(yaml.safe_dump(experiment))
    causal(run, "--config", str(run.parent / "settings.yaml"))
    shown = capsys.readouterr().out
    assert "base_sae: skipped, since it reads only one model" in shown
    report = json.loads((run / "diff_sae" / "causal.json").read_text())
    kl = {(entry["intervention"], entry["span"]): entry["kl"]["value"] for entry in report["results"]}
    assert kl["full_swap", "response"] < 1e-5
    assert kl["all", "response"] != kl["largest", "response"] != kl["none", "response"]
    assert report["left_out"] == {"best": "the latents of this coder have no rank_sum"}
    assert not (run / "base_sae" / "causal.json").exists()
    run_command(["steer", str(run), "--latent", "3", "--prompt", "hi", "--max_new_tokens", "2"])  # the first with two decoders
    assert "latent 3, chat model" in capsys.readouterr().out
    with pytest.raises(UserError, match="no crosscoder 'diff_sae' that reads both models; it has l1"):
        run_command(["steer", str(run), "--crosscoder", "diff_sae", "--latent", "3", "--prompt", "hi"])


def test_the_report_shows_what_a_latent_does_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["report", str(run)])
    before = (run / "report.html").read_text()
    assert "<dt>KL closed alone</dt>" not in before
    shown = [int(latent) for latent in re.findall(r'id="l1-(\d+)"', before)]
    each = {"kind": "latents", "latents": {"kind": "each", "of": {"kind": "list", "latents": shown[:1]}}}
    (run.parent / "list.yaml").write_text(
        yaml.safe_dump({"interventions": [{"name": "none"}, {"name": "single", "add": [each]}]})
    )
    causal(run)
    run_command(["report", str(run)])
    found = re.findall(r"<dt>KL closed alone</dt><dd>([^<]*)</dd>", (run / "report.html").read_text())
    table = pl.read_parquet(run / "l1" / "causal_latents.parquet")
    assert len(found) == 1
    assert float(found[0].split()[0].replace("\u2212", "-")) == pytest.approx(
        table["kl_reduction_response"][0], rel=0.1, abs=6e-3
    )


def test_a_changed_list_is_measured_again_and_a_wrong_latent_named(run: Path) -> None:
    causal(run)
    before = json.loads((run / "manifest.json").read_text())["stages"]
    changed = {**EXPERIMENT, "interventions": EXPERIMENT["interventions"][:3]}
    (run.parent / "list.yaml").write_text(yaml.safe_dump(changed))
    causal(run)
    after = json.loads((run / "manifest.json").read_text())["stages"]
    assert {name for name in before if before[name]["fingerprint"] != after[name]["fingerprint"]} == {"causal/l1"}
    wrong = {"name": "x", "add": [{"kind": "latents", "latents": {"kind": "list", "latents": [64]}}]}
    (run.parent / "list.yaml").write_text(yaml.safe_dump({"interventions": [{"name": "none"}, wrong]}))
    with pytest.raises(UserError, match="intervention 'x': there is no latent 64: the crosscoder has 64, from 0 to 63"):
        causal(run)
    (run.parent / "list.yaml").write_text(yaml.safe_dump({"interventions": [{"name": "all"}]}))
    with pytest.raises(UserError, match="has no intervention 'none', from which the gap is measured"):
        causal(run)


def test_a_run_whose_models_are_gone(run: Path, analysed: Path) -> None:
    (analysed / "chat").rename(analysed / "elsewhere")
    try:
        for command in (["causal", str(run)], ["steer", str(run), "--latent", "3", "--prompt", "hi"]):
            with pytest.raises(UserError, match=r"the chat model of this run is gone: '.*/chat' was a folder"):
                run_command(command)
    finally:
        (analysed / "elsewhere").rename(analysed / "chat")


def test_steering_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(
        ["steer", str(run), "--latent", "3", "--strength", "2", "9", "--prompt", "hi: sea", "7", "--max_new_tokens", "4"]
    )
    shown = capsys.readouterr().out
    for words in ("hi: sea", "unsteered", "add 2", "add 9", "latent 3, chat model"):
        assert words in shown


def test_steering_over_labelled_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = run.parent / "rules.yaml"
    rules.write_text("behaviours: {any: {pattern: '.'}}")
    options = ["--latent", "3", "--mode", "ablate", "--prompts_per_label", "2", "--max_new_tokens", "3", "--controls", "0"]
    run_command(["steer", str(run), *options, "--rules", str(rules)])
    table = pl.read_parquet(run / "steering" / "l1-3-ablate-chat.parquet")
    assert table.group_by("role").len().sort("role").rows() == [("latent", 6), ("unsteered", 6)]
    assert set(table["label"]) == {"greeting", "question", "order"}
    found = pl.read_parquet(run / "steering" / "l1-3-ablate-chat-rates.parquet")
    assert set(found.columns) >= {"rate", "rate_low", "rate_high", "change", "change_low", "change_high", "degenerate"}
    capsys.readouterr()
    run_command(["steer", str(run), *options, "--rules", str(rules)])
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "hi"], "no latent given"),
        (["--latent", "64", "--prompt", "hi"], "there is no latent 64: l1 has 64, from 0 to 63"),
        (["--latent", "3", "--crosscoder", "l2"], "this run has no crosscoder 'l2' that reads both models; it has l1"),
        (["--latent", "3", "--prompt", "hi", "--strength", "nan"], r"strength.0: .*finite.*nan"),
        (["--latent", "3", "--prompt", "sea " * 3000], r"a prompt of \d+ tokens and 60 new ones are more than the \d+ that"),
        (["--latent", "three"], r"latent: .* \(found 'three'\)"),
        (["--latent", "3", "--tokens", "verbs"], "tokens: .*'all', 'prompt', 'template' or 'generated'"),
    ],
)
def test_wrong_steering(run: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_command(["steer", str(run), *options])


def test_steering_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run at .*: it has no manifest\.json"):
        run_command(["steer", str(tmp_path), "--latent", "3", "--prompt", "hi"])


def test_a_repetition_with_another_seed_is_tested_too(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["crosscoders"]["l1"]["seeds"] = 2
    (run.parent / "settings.yaml").write_text(yaml.safe_dump(settings))
    causal(run, "--config", str(run.parent / "settings.yaml"), "--only", "l1-seed1")
    assert json.loads((run / "l1-seed1" / "causal.json").read_text())["n_conversations"] > 0
    assert not (run / "l1" / "causal.json").exists()
