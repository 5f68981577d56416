"""The whole look at a tiny pair, and what it says about one model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import make_model, tiny_config
from crossdiff.causal.generation import ask, end_tokens
from crossdiff.cli import run_command
from crossdiff.config import HarvestConfig, LookConfig
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.look.look import FILES, Look, sampled
from crossdiff.look.part import merge
from crossdiff.look.steered import BEGINNING_TOKENS, N_TOKENS, STEERED, STRENGTHS
from crossdiff.models.access import UpperHalf, residuals_and_logits
from crossdiff.models.pair import Pair
from crossdiff.ranks import Ranks

SETTINGS = LookConfig(max_tokens=2000, depth_tokens=500, batch_tokens=256, phrases=5, positions=4, components=2, blocks=4)
HARVEST = HarvestConfig(max_length=48)


def looked(pair: Pair, datasets: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    """The summary of a look whose tables are in `folder` and its parts in `folder/parts`."""
    look = Look(pair, 1, datasets, SETTINGS.model_copy(update=changes), HARVEST)
    parts = folder / "parts"
    parts.mkdir()
    return look.write(look.read(parts), folder)


def test_predictions_are_those_of_each_sequence_alone(pair: Pair, datasets: Any, tmp_path: Path) -> None:
    """Batches are padded; one sequence at a time, in float64, is not."""
    summary = looked(pair, datasets, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "parts"}
    tokens = pl.read_parquet(tmp_path / "tokens.parquet")
    assert summary["n_tokens"] == tokens.height > 500
    for number in (0, 7, int(tokens["sequence"].max())):  # type: ignore[arg-type]
        rows = tokens.filter(sequence=number)
        ids = torch.tensor(rows["token_id"].to_list()).unsqueeze(0)
        base, chat = (residuals_and_logits(model, ids)[1][0].double().log_softmax(1) for model in pair.models)
        expected = (chat.exp() * (chat - base)).sum(1)
        np.testing.assert_allclose(rows["kl"].to_numpy(), expected, rtol=1e-3, atol=1e-5)
        assert rows["next_id"].to_list() == [*ids[0, 1:].tolist(), -1]
        assert rows["position"].to_list() == list(range(rows.height))
    depth = pl.read_parquet(tmp_path / "depth.parquet")
    assert depth.height == pair.n_layers and (depth["kl"] > 0).all()


def test_the_batches_change_nothing(pair: Pair, datasets: Any, tmp_path: Path) -> None:
    for name, size in (("small", 64), ("large", 1024)):
        (tmp_path / name).mkdir()
        looked(pair, datasets, tmp_path / name, batch_tokens=size)
    small, large = (pl.read_parquet(tmp_path / name / "words.parquet") for name in ("small", "large"))
    assert small["token_id"].to_list() == large["token_id"].to_list()
    np.testing.assert_allclose(small["rise"], large["rise"], rtol=1e-3, atol=1e-4)


def test_the_full_swap_leaves_no_kl(pair: Pair, datasets: Any, tmp_path: Path) -> None:
    """With the chat model's own residual stream in the place of the base model's, every layer continues to its own logits."""
    looked(replace(pair, base=pair.chat), datasets, tmp_path)
    assert float(merge(sorted((tmp_path / "parts").iterdir()))["sample_kl"].max()) < 1e-6


def test_one_model_beside_itself_has_no_difference(pair: Pair, datasets: Any, tmp_path: Path) -> None:
    summary = looked(replace(pair, base=pair.chat), datasets, tmp_path)
    assert summary["identical"] and summary["kl"] == 0.0 and summary["recommended_layer"] is None
    assert not pl.read_parquet(tmp_path / "words.parquet").height
    assert not pl.read_parquet(tmp_path / "directions.parquet").height
    assert "NaN" not in (tmp_path / "look.json").read_text()


def test_a_chat_model_with_more_tokens(pair: Pair, datasets: Any, tmp_path: Path) -> None:
    wider = replace(pair, chat=make_model(seed=3, vocabulary=280))
    summary = looked(wider, datasets, tmp_path)
    assert 0.01 < summary["outside"] < 0.2  # 8 of 280 ids, with random weights
    assert np.isfinite(pl.read_parquet(tmp_path / "tokens.parquet")["kl"].to_numpy()).all()


class Killed(Exception):
    """Raised where a process would have been killed."""


def test_a_look_that_is_killed_resumes(pair: Pair, datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the same tables, and reads the finished parts not again. A part of other batches is."""
    monkeypatch.setattr("crossdiff.look.look.PART_TOKENS", 300)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed / "parts"):
        folder.mkdir(parents=True)
    expected = looked(pair, datasets, whole)
    n_parts = len(list((whole / "parts").iterdir()))
    assert n_parts >= 4

    def stop(at: int, **changes: Any) -> Look:
        """A look that is killed after `at` tokens."""
        read = 0

        def advance(n_tokens: int) -> None:
            nonlocal read
            read += n_tokens
            if read > at:
                raise Killed

        return Look(pair, 1, datasets, SETTINGS.model_copy(update=changes), HARVEST, advance)

    with pytest.raises(Killed):
        stop(900).read(killed / "parts")
    kept = {path.name: path.stat().st_mtime_ns for path in (killed / "parts").iterdir()}
    assert 1 <= len(kept) < n_parts
    look = stop(10**9)
    parts = look.read(killed / "parts")
    assert {path.name: path.stat().st_mtime_ns for path in parts if path.name in kept} == kept
    assert look.write(parts, killed) == expected
    for name in ("tokens", "words", "depth", "directions", "probes"):
        found, wanted = (pl.read_parquet(folder / f"{name}.parquet") for folder in (killed, whole))
        assert found.equals(wanted, null_equal=True)
    again = stop(10**9, batch_tokens=128).read(killed / "parts")
    changed = [path.name for path in again if path.name in kept and path.stat().st_mtime_ns != kept[path.name]]
    assert set(changed) == set(kept)


def test_ranks_share_a_look(pair: Pair, datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one after the other, write the parts that one process writes."""
    monkeypatch.setattr("crossdiff.look.look.PART_TOKENS", 300)
    expected = looked(pair, datasets, tmp_path)
    (tmp_path / "shared").mkdir()
    for rank in (1, 0):
        found = Look(pair, 1, datasets, SETTINGS, HARVEST)
        parts = found.read(tmp_path / "shared", Ranks(rank, 2))
        assert len(list((tmp_path / "shared").iterdir())) == (len(parts) if rank == 0 else len(parts) // 2)
    assert found.write(parts, tmp_path) == expected


def test_both_models_write_with_the_mean_difference(pair: Pair, datasets: Any, tmp_path: Path) -> None:
    """Against a loop that adds the vector in float64 arithmetic of its own."""
    looked(pair, datasets, tmp_path)
    table = pl.read_parquet(tmp_path / "steered.parquet")
    assert table["prompt"].n_unique() == SETTINGS.prompts
    assert set(table["strength"]) == {0.0, *STRENGTHS} and set(table["direction"].drop_nulls()) == set(STEERED)
    directions = pl.read_parquet(tmp_path / "directions.parquet")
    row = directions["direction"].to_list().index(STEERED[1])
    vector = load_file(tmp_path / "directions.safetensors")["directions"][row]
    for text in table["prompt"].unique().to_list():
        prompt = ask(pair.tokenizer, text)
        chosen = table.filter(pl.col("direction").eq_missing(STEERED[1]), model="base", strength=2.0, prompt=text)
        ids = list(prompt.token_ids)
        for _ in range(N_TOKENS):
            hidden = residuals_and_logits(pair.base, torch.tensor([ids]))[0][1].clone()
            hidden[0, HARVEST.leave_out :] += 2 * vector
            upper = UpperHalf(pair.base, 1)
            mask = torch.ones(1, len(ids), dtype=torch.int64)
            token = int(upper.logits(hidden, torch.tensor([ids]), mask, mask.bool())[-1].argmax())
            if token in end_tokens(pair.chat, pair.tokenizer):
                break
            ids.append(token)
        written = pair.tokenizer.decode(ids[len(prompt.token_ids) :], skip_special_tokens=True).strip()
        assert chosen["text"].to_list() == [written]


def test_without_questions_the_beginnings_of_texts_are_continued(pair: Pair, datasets: Any, tmp_path: Path) -> None:
    looked(pair, datasets[:1], tmp_path)
    table, tokens = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("steered", "tokens"))
    first = tokens.filter(pl.col("position") < BEGINNING_TOKENS, document=0).unique("position", keep="first").sort("position")
    assert table["prompt"][0] == pair.tokenizer.decode(first["token_id"].to_list(), skip_special_tokens=True)


def test_every_dataset_has_its_part(datasets: Any) -> None:
    assert [dataset.max_tokens for dataset in sampled(datasets, 1000)] == [500, 500]


def test_the_command(tiny_pair: Any, tiny_texts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_config(tiny_pair, tiny_texts, look=SETTINGS.model_dump())
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = ["look", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")]
    run_command(command)
    said = capsys.readouterr().out
    assert "the mean KL(chat || base)" in said and "after each layer" in said
    before = read_json(tmp_path / "run" / "look" / "look.json")
    run_command(["look", str(tmp_path / "run")])
    again = capsys.readouterr().out
    assert "look: already done" in again and "the mean KL(chat || base)" in again
    assert read_json(tmp_path / "run" / "look" / "look.json") == before
    run_command(["look", str(tmp_path / "run"), "--look.max_tokens", "1500"])
    assert read_json(tmp_path / "run" / "look" / "look.json")["n_tokens"] < before["n_tokens"]


def test_a_run_begins_with_a_look(tiny_pair: Any, tiny_texts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the harvest, in the report, and beside each latent; a second run makes nothing again."""
    run = tmp_path / "run"
    settings = tiny_config(tiny_pair, tiny_texts, look=SETTINGS.model_dump())
    settings["crosscoders"] = {"l1": settings["crosscoders"]["l1"]}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    run_command(["run", str(run), "--config", str(tmp_path / "settings.yaml")])
    said = capsys.readouterr().out
    assert said.index("look done") < said.index("harvest done") and "the mean KL(chat || base)" in said
    assert "after each layer" not in said  # the tables are left to `crossdiff look`
    assert 'id="look"' in (run / "report.html").read_text() and (run / "figures" / "first-look-depth.svg").is_file()
    assert (run / "l1" / "overlap.parquet").is_file()
    assert "<h1>First look: " in (run / "look" / "look.html").read_text()
    run_command(["run", str(run)])
    said = capsys.readouterr().out
    assert "look: already done" in said and "done in" not in said


def test_a_look_of_no_tokens_is_refused_before_anything_is_made(tiny_pair: Any, tiny_texts: Any, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tiny_config(tiny_pair, tiny_texts, look={"max_tokens": 0})))
    with pytest.raises(UserError, match=r"look.max_tokens is 0, which leaves the look out of `crossdiff run`"):
        run_command(["look", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")])
    assert not (tmp_path / "run").exists()


def test_one_model_is_said_to_be_one(
    tiny_pair: Any, tiny_texts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_config((tiny_pair[0], tiny_pair[0]), tiny_texts, look=SETTINGS.model_dump())
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    run_command(["look", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")])
    assert "No difference: on" in capsys.readouterr().out


def test_a_refused_look_makes_no_run(tiny_pair: Any, tiny_texts: Any, tmp_path: Path) -> None:
    settings = tiny_config(tiny_pair, tiny_texts, layer=9, look=SETTINGS.model_dump())
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="layer 9 does not exist"):
        run_command(["look", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")])
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_logits_that_are_not_finite_are_refused(pair: Pair, datasets: Any, tmp_path: Path) -> None:
    broken = make_model(seed=5)
    broken.get_output_embeddings().weight.data[7] = torch.nan
    with pytest.raises(UserError, match=r"the base model .* gives NaN or infinite logits: set model_dtype to float32"):
        looked(replace(pair, base=broken), datasets, tmp_path)
