"""The whole pipeline on a tiny random pair."""

from __future__ import annotations

import json
import sqlite3
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

import crossdiff.stages.harvest as module
from conftest import make_tokenizer, save_pair, tiny_config
from crossdiff.activations.store import Store
from crossdiff.cli import run_command
from crossdiff.config import RunConfig, validate
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.train import train
from crossdiff.errors import UserError
from crossdiff.latents.settings import verdict_settings
from crossdiff.run import Run


def write_yaml(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_makes_everything_and_a_second_one_makes_nothing(
    tmp_path: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = write_yaml(tmp_path, tiny_settings), tmp_path / "run"
    run_command(["run", str(run), "--config", str(config)])
    names = ["config.json", "model.safetensors", "latents.parquet", "examples.sqlite", "health.json", "train.jsonl"]
    names += ["twins.parquet", "neighbours.parquet", "activity.parquet"]
    for coder in ("l1", "batchtopk"):
        for name in names:
            assert (run / coder / name).exists(), f"{coder}/{name}"
        table = pl.read_parquet(run / coder / "latents.parquet")
        assert table.height == 64  # 4 latents a dimension, 16 dimensions
        activity = pl.read_parquet(run / coder / "activity.parquet")
        # Every active token lies in one cell, and the tiny template has a token that opens the user's turn.
        assert (
            activity.group_by("latent")
            .agg(pl.col("n_active").sum())
            .join(table, on="latent")
            .filter(pl.col("n_active") != pl.col("n_active_right"))
            .is_empty()
        )
        assert "<|user|>" in activity.filter(role="user", template_index=0)["token"].to_list()
        controls = json.loads((run / coder / "health.json").read_text())["controls"]
        assert {"shared_latents", "split_halves"} < set(controls)
        with sqlite3.connect(run / coder / "examples.sqlite") as database:
            assert database.execute("SELECT count(*) FROM examples").fetchone()[0] > 0
    assert "<html" in (run / "report.html").read_text()
    assert not (run / "work").exists()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}
    capsys.readouterr()
    run_command(["run", str(run)])
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}
    assert before == after
    assert "already done" in capsys.readouterr().out


def test_a_changed_setting_runs_what_depends_on_it_and_keeps_the_old(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config, run = write_yaml(tmp_path, tiny_settings), tmp_path / "run"
    run_command(["run", str(run), "--config", str(config)])
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    run_command(["run", str(run), "--crosscoders.l1.sparsity.mu", "1.5"])
    again = json.loads((run / "manifest.json").read_text())["stages"]
    changed = {name for name in stages if stages[name]["fingerprint"] != again[name]["fingerprint"]}
    assert changed == {"train/l1", "analyze/l1", "promoted/l1", "concepts", "report"}
    kept = {path.name for path in (run / "old").rglob("*") if path.is_file()}
    assert {"model.safetensors", "latents.parquet", "report.html"} <= kept
    run_command(["clean", str(run), "--yes"])
    assert not (run / "old").exists()
    assert (run / "l1" / "model.safetensors").exists()


def test_harvesting_again_needs_force_and_says_what_it_costs(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config, run = write_yaml(tmp_path, tiny_settings), tmp_path / "run"
    run_command(["harvest", str(run), "--config", str(config)])
    with pytest.raises(UserError, match=r"takes about \d+ s and another \d+ MB .*--force"):
        run_command(["harvest", str(run), "--layer", "0"])
    assert json.loads((run / "activations" / "manifest.json").read_text())["layer"] == 1
    run_command(["harvest", str(run), "--layer", "0", "--force"])
    assert json.loads((run / "activations" / "manifest.json").read_text())["layer"] == 0


def test_layers_harvested_in_one_pass_are_runs_of_their_own(
    tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import crossdiff.activations.harvest as module

    original, passes = module.harvest, []

    def counted(folders: dict[int, Path], *arguments: Any) -> list[str]:
        passes.append(sorted(folders))
        return original(folders, *arguments)

    monkeypatch.setattr(module, "harvest", counted)
    config, folder = str(write_yaml(tmp_path, tiny_settings)), tmp_path / "sweep"
    run_command(["harvest", str(folder), "--config", config, "--layers", "0", "2"])
    run_command(["harvest", str(folder), "--config", config, "--layers", "2", "1", "0"])
    assert passes == [[0, 2], [1]]
    for layer in (0, 1, 2):
        manifest = json.loads((folder / f"layer-{layer}" / "activations" / "manifest.json").read_text())
        assert manifest["layer"] == layer
    run_command(["train", str(folder / "layer-2"), "--only", "l1"])
    assert load(folder / "layer-2" / "l1").origin["layer"] == 2
    with pytest.raises(UserError, match="layer 7 does not exist"):
        run_command(["harvest", str(folder), "--config", config, "--layers", "7"])


def test_a_plan_is_printed_and_nothing_is_made(
    tmp_path: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(["plan", str(tmp_path / "run"), "--config", str(write_yaml(tmp_path, tiny_settings))])
    printed = capsys.readouterr().out
    for words in ("harvest of layer 1: about", "GB as float32", "tokens/s on cpu", "There is room"):
        assert words in printed
    assert not (tmp_path / "run").exists()


class Day(date):
    """A calendar that stands still."""

    now = date(2027, 1, 5)

    @classmethod
    def today(cls) -> date:
        return cls.now


def test_a_run_keeps_the_date_of_its_first_harvest(
    tmp_path: Path, tiny_texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template asks for today's date, and the run is started on one day and finished on another."""
    monkeypatch.setattr(module, "date", Day)
    tokenizer, pair = make_tokenizer(), save_pair(tmp_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d') }};")
    tokenizer.save_pretrained(pair[1])
    config = write_yaml(tmp_path, tiny_config(pair, tiny_texts))

    def days(run: str) -> tuple[set[str], str]:
        """What the conversations of a store begin with, and the date in its manifest."""
        store = Store(tmp_path / run / "activations")
        first = (store.column("dataset") == 1) & (store.column("position") < 4)
        text = tokenizer.decode(store.column("token_id")[first].tolist())
        return set(text.replace("<|bos|>", "").split(";")[:-1]), store.manifest["template_date"]

    with monkeypatch.context() as patch:  # stopped before the first shard
        patch.setattr("crossdiff.activations.harvest.harvest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_command(["harvest", str(tmp_path / "run"), "--config", str(config)])
    Day.now = date(2027, 1, 6)
    run_command(["harvest", str(tmp_path / "run"), "--config", str(config)])
    assert "the chat template writes the date 2027-01-05 (harvest.template_date)" in " ".join(capsys.readouterr().out.split())
    assert days("run") == ({"05"}, "2027-01-05")
    run_command(["harvest", str(tmp_path / "other"), "--config", str(config)])
    assert days("other") == ({"06"}, "2027-01-06")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("run", "other")]
    assert len({manifest["stages"]["harvest"]["fingerprint"] for manifest in manifests}) == 2
    for arguments in (["--config", str(config)], []):
        run_command(["harvest", str(tmp_path / "run"), *arguments])
        assert "already done" in capsys.readouterr().out
    run_command(["harvest", str(tmp_path / "set"), "--config", str(config), "--harvest.template_date", "2020-02-29"])
    assert days("set") == ({"29"}, "2020-02-29")


def interrupted(*arguments: object) -> list[str]:
    raise KeyboardInterrupt


def test_a_template_without_the_clock_has_no_date(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    run_command(["harvest", str(tmp_path / "run"), "--config", str(write_yaml(tmp_path, tiny_settings))])
    assert Store(tmp_path / "run" / "activations").manifest["template_date"] is None
    assert "template_date" not in (tmp_path / "run" / "config.yaml").read_text()


def test_prompts_without_answers_are_refused_before_anything_is_computed(
    tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path := tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' * 40)
    settings = {**tiny_settings, "dataset": [{"path": str(path), "heldout_share": 0.2}]}
    command = ["harvest", str(tmp_path / "run"), "--config", str(write_yaml(tmp_path, settings))]
    with monkeypatch.context() as patch:
        patch.setattr("crossdiff.activations.harvest.harvest", interrupted)
        with pytest.raises(UserError, match="40 conversations were read, and none of their tokens is the assistant's"):
            run_command(command)
    run_command([*command, "--force"])
    assert Store(tmp_path / "run" / "activations").n_tokens == 40 * 5  # BOS, header, 2 letters, end


@pytest.mark.parametrize("name", ["a #b.jsonl", "x: y.jsonl", "[1] chat.jsonl", "null.jsonl", "{1} a.jsonl"])
def test_names_of_datasets_are_taken_as_they_are(tmp_path: Path, tiny_pair: tuple[Path, Path], name: str) -> None:
    (path := tmp_path / name).write_text('{"text": "the sea is cold"}\n' * 8)
    command = ["harvest", str(tmp_path / "run"), "--base", str(tiny_pair[0]), "--chat", str(tiny_pair[1]), "--device", "cpu"]
    described = f"{{path: '{tmp_path / 'b.jsonl'}', name: other, heldout_share: 0}}"
    (tmp_path / "b.jsonl").write_text('{"text": "the boat is old"}\n' * 8)
    run_command([*command, "--dataset", str(path), described])
    store = Store(tmp_path / "run" / "activations")
    assert (store.n_tokens, store.datasets[1]) == (2 * 8 * 16, "other")


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    held = Run.open(tmp_path / "run", create=True)
    with pytest.raises(UserError, match="another process is working on"):
        Run.open(tmp_path / "run", create=True)
    held.close()
    Run.open(tmp_path / "run", create=True).close()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen2", "gemma2"])
def test_local_folders_of_other_architectures(tmp_path: Path, kind: str, tiny_texts: tuple[Path, Path]) -> None:
    settings = tiny_config(save_pair(tmp_path, kind), tiny_texts)
    run = tmp_path / "run"
    run_command(["run", str(run), "--config", str(write_yaml(tmp_path, settings))])
    assert (run / "report.html").exists()


def test_own_models_on_the_command_line(tmp_path: Path, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> None:
    base, chat = tiny_pair
    run_command(
        ["harvest", str(tmp_path / "run"), "--base", str(base), "--chat", str(chat), "--layer", "2",
         "--dataset", str(tiny_texts[0]), str(tiny_texts[1]), "--device", "cpu"]
    )  # fmt: skip
    manifest = json.loads((tmp_path / "run" / "activations" / "manifest.json").read_text())
    assert manifest["layer"] == 2
    assert manifest["datasets"] == ["plain", "chat"]


def test_only_some_crosscoders_and_options_before_the_directory(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config, run = write_yaml(tmp_path, tiny_settings), tmp_path / "run"
    run_command(["harvest", str(run), "--config", str(config)])
    with pytest.raises(UserError, match="there is no crosscoder 'l2' in this run; there are batchtopk, l1"):
        run_command(["train", str(run), "--config", str(config), "--only", "l2"])
    run_command(["train", str(run), "--config", str(config), "--only", "l1"])
    # The value of the option is not taken for the directory: the settings of the run are the start.
    run_command(["train", "--harvest.max_length", "48", str(run), "--only", "l1"])
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert set(stages) == {"harvest", "train/l1"}


def test_seeds_are_trained_and_analysed_together_and_make_concepts(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    tiny_settings["crosscoders"]["batchtopk"]["seeds"] = 3
    config, run = write_yaml(tmp_path, tiny_settings), tmp_path / "run"
    run_command(["harvest", str(run), "--config", str(config)])
    run_command(["concepts", str(run), "--only", "batchtopk"])
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    names = {"batchtopk", "batchtopk-seed1", "batchtopk-seed2"}
    made = {f"{stage}/{name}" for stage in ("train", "analyze") for name in names}
    assert set(stages) == {"harvest", "concepts", "promoted/batchtopk"} | made
    coders = {name: load(run / name) for name in names}
    origins = {name: coder.origin["settings"] for name, coder in coders.items()}
    assert {name: (own["seed"], own.get("batch_seed")) for name, own in origins.items()} == {
        "batchtopk": (0, None), "batchtopk-seed1": (1, 0), "batchtopk-seed2": (2, 0),
    }  # fmt: skip
    assert not torch.allclose(coders["batchtopk"].decoder, coders["batchtopk-seed1"].decoder)
    # A repetition is the training that its seeds give alone.
    repeated = RunConfig.model_validate(tiny_settings).trainings["batchtopk-seed1"]
    alone = train(tmp_path / "alone", Store(run / "activations"), repeated)
    assert torch.equal(alone.decoder, coders["batchtopk-seed1"].decoder)
    members = pl.read_parquet(run / "concepts" / "members.parquet")
    concepts = pl.read_parquet(run / "concepts" / "concepts.parquet")
    assert concepts["concept"].to_list() == list(range(concepts.height)) and set(members["training"]) <= names
    assert members.height == concepts["n_members"].sum()
    # The settings keep the crosscoder that was asked for, and everything is found again.
    assert list(yaml.safe_load((run / "config.yaml").read_text())["crosscoders"]) == ["batchtopk", "l1"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    run_command(["concepts", str(run), "--only", "batchtopk"])
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}


def test_seeds_have_names_of_their_own(tiny_settings: dict[str, Any]) -> None:
    coders = tiny_settings["crosscoders"]
    assert list(RunConfig(dataset=("a.txt",)).trainings) == ["l1", "batchtopk", "batchtopk-seed1", "batchtopk-seed2"]
    assert list(RunConfig.model_validate(tiny_settings).trainings) == ["l1", "batchtopk"]
    coders["l1"]["seeds"] = 2
    assert list(RunConfig.model_validate(tiny_settings).trainings) == ["l1", "l1-seed1", "batchtopk"]
    coders["l1-seed1"] = coders["l1"] | {"seeds": 1}
    with pytest.raises(UserError, match="seeds makes a training called 'l1-seed1', which is also the name of a crosscoder"):
        validate(RunConfig, tiny_settings, "the test")
    # By default there is one training where a crosscoder of an earlier version has the name of its repetition.
    older = {"batchtopk": coders["batchtopk"], "batchtopk-seed1": coders["batchtopk"] | {"seed": 1}}
    del older["batchtopk"]["seeds"]
    assert list(validate(RunConfig, tiny_settings | {"crosscoders": older}, "the test").trainings) == list(older)


def test_an_sae_on_the_base_model_stands_beside_the_crosscoder(
    tmp_path: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    training = tiny_settings["crosscoders"]["batchtopk"]
    saes = {name: training | {"inputs": {"kind": "single", "source": name.split("_")[0]}} for name in ("chat_sae", "base_sae")}
    tiny_settings["crosscoders"] = saes | {"batchtopk": training}
    config, run = write_yaml(tmp_path, tiny_settings), tmp_path / "run"
    # It is trained with the crosscoder that is asked for, and has a table when it is asked for itself.
    run_command(["harvest", str(run), "--config", str(config)])
    run_command(["analyze", str(run), "--only", "batchtopk"])
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert set(stages) == {"harvest", "train/base_sae", "train/batchtopk", "analyze/batchtopk", "promoted/batchtopk"}
    rates = {"n_live": 7, "rates": {"chat_specific": 0.25}, "analysis": verdict_settings(run / "batchtopk")}
    (run / "null.json").write_text(json.dumps({"null_run": "null", "crosscoders": {"batchtopk": rates}}))
    capsys.readouterr()
    run_command(["report", str(run)])
    table = pl.read_parquet(run / "base_sae" / "latents.parquet")
    assert table["delta_norm"].is_nan().all() and set(table["verdict"]) <= {"undecided", "dead"}
    shown, page = capsys.readouterr().out, (run / "report.html").read_text()
    assert "needs two decoders" in shown and "needs two decoders" in page
    assert "null 25%" in shown and "null 25%" in page
    drawn = {path.stem for path in (run / "figures").glob("*.svg")}
    assert "batchtopk-delta-norm" in drawn and "base_sae-frequency" in drawn
    assert not drawn & {"base_sae-delta-norm", "base_sae-latent-scaling"}


def test_nothing_held_out_is_said_before_the_harvest(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    for dataset in tiny_settings["dataset"]:
        dataset["heldout_share"] = 0.0
    with pytest.raises(UserError, match="every dataset has a heldout_share of 0"):
        run_command(["run", str(tmp_path / "run"), "--config", str(write_yaml(tmp_path, tiny_settings))])
    assert not (tmp_path / "run" / "activations").exists()


def test_too_few_documents_for_the_blocks_are_found_before_the_training(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    tiny_settings["analyze"] = tiny_settings.get("analyze", {}) | {"blocks": 1000}
    with pytest.raises(UserError, match="documents cannot make 1000 blocks"):
        run_command(["run", str(tmp_path / "run"), "--config", str(write_yaml(tmp_path, tiny_settings))])
    assert set(json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]) == {"harvest"}


def test_compare_trains_every_kind_and_keeps_its_table(
    tmp_path: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    training = tiny_settings["crosscoders"]["batchtopk"]
    tiny_settings["crosscoders"] |= {
        "dfc": training | {"structure": {"kind": "partitioned"}},
        "diff": training | {"inputs": {"kind": "difference"}},
    }
    tiny_settings["compare"] = {"max_tokens": 1000}
    config, run = write_yaml(tmp_path, tiny_settings), tmp_path / "run"
    run_command(["harvest", str(run), "--config", str(config)])
    run_command(["compare", str(run)])
    result = json.loads((run / "comparison.json").read_text())
    assert set(result["crosscoders"]) == {"l1", "batchtopk", "dfc", "diff"}
    assert not (run / "l1" / "latents.parquet").exists()
    capsys.readouterr()
    run_command(["compare", str(run)])
    assert "compare: already done" in capsys.readouterr().out
