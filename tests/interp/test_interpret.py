"""`crossdiff interpret` on a tiny run: tables, resuming, failures and cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from oracle import answer_by_pattern, task_of
from scripted import Reply, scripted

from crossdiff.cli import run_command
from crossdiff.errors import UserError
from crossdiff.interp.explanation_table import CONTEXT_SCHEMA, SCHEMA, SCORES, read_latent_table
from crossdiff.interp.prompts import EXPLAIN, FUZZ
from crossdiff.report.reading import read_latent, read_latents

KEY = "sk-very-secret-4711"
FEW = ("--tokens", "2000", "--before", "5", "--after", "2", "--contexts", "6", "--embedding", "none")
ORACLE = answer_by_pattern(lambda user: "sea")


@pytest.fixture
def run(analysed_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(analysed_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def latents(analysed_run: Path) -> list[str]:
    """Two latents with many contexts, and others without activation."""
    table = pl.read_parquet(analysed_run / "batchtopk" / "latents.parquet").filter(pl.col("frequency").is_between(0.01, 0.06))
    return [str(latent) for latent in table.sort("frequency", descending=True)["latent"].head(2)]


def interpret(run: Path, url: str | None, latents: list[str], *options: str) -> None:
    server = [] if url is None else ["--server", url, "--model", "oracle"]
    run_command(["interpret", str(run), "--latents", *latents, *FEW, *server, *options])


def row_of(run: Path, latent: str) -> dict[str, Any]:
    table = pl.read_parquet(run / "batchtopk" / "interpretation.parquet")
    assert table.schema == SCHEMA
    return table.row(by_predicate=pl.col("latent") == int(latent), named=True)


def test_explanations_and_scores_are_written_and_cost_once(
    run: Path, latents: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    before = (run / "batchtopk" / "latents.parquet").read_bytes()
    with scripted(ORACLE) as server:
        interpret(run, server.url, latents)
        n_calls = len(server.calls)
        # Two latents of one explanation, 18 excerpts detected and 18 fuzzed in batches of ten.
        assert n_calls == 2 * (1 + 2 + 2)
        row = row_of(run, latents[0])
        assert row["explanation"] == "sea" and row["explainer"] == "oracle" and row["interpretation_reason"] is None
        assert (row["contexts_active"], row["contexts_random"], row["contexts_similar"]) == (6, 6, 6)
        contexts = pl.read_parquet(run / "batchtopk" / "interpretation_contexts.parquet").filter(
            pl.col("latent") == int(latents[0])
        )
        assert contexts.schema == CONTEXT_SCHEMA and contexts.height == 18
        found = contexts["text"].str.contains("sea")
        assert (contexts["detection"] == found).all()
        active = contexts["kind"] == "active"
        assert row["detection"] == pytest.approx((found.filter(active).mean() + (~found).filter(~active).mean()) / 2)
        assert row["detection_low"] < row["detection"] < row["detection_high"]
        assert 0 <= row["bag_of_words"] <= 1 and row["embedding_examples"] != row["embedding_examples"]
        assert "10 calls made" in capsys.readouterr().out
        interpret(run, server.url, latents)
        assert "already done" in capsys.readouterr().out
        interpret(run, server.url, latents[:1])
        assert len(server.calls) == n_calls
    summary = json.loads((run / "batchtopk" / "interpretation.json").read_text())
    assert summary["n_latents"] == 2 and {entry["score"] for entry in summary["scores"]} == {
        "detection",
        "fuzzing",
        "bag_of_words",
    }
    assert (run / "batchtopk" / "latents.parquet").read_bytes() == before
    joined = read_latent_table(run / "batchtopk")
    assert joined.height == pl.read_parquet(run / "batchtopk" / "latents.parquet").height
    assert joined.filter(pl.col("explanation").is_not_null())["latent"].to_list() == sorted(map(int, latents))
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


@pytest.mark.slow
def test_the_report_shows_what_was_found(run: Path, latents: list[str]) -> None:
    run_command(["report", str(run)])
    assert 'id="interpretation"' not in (run / "report.html").read_text()
    with scripted(ORACLE) as server:
        interpret(run, server.url, latents)
    run_command(["report", str(run)])
    page = (run / "report.html").read_text()
    score = json.loads((run / "batchtopk" / "interpretation.json").read_text())["scores"][0]
    assert 'id="interpretation"' in page and f"{score['mean']:.2f}" in page
    assert "2 latents, explained and judged by oracle." in page
    shown = read_latent(run / "batchtopk", read_latents(run / "batchtopk"), int(latents[0]))
    assert shown.explanation == f"oracle says: sea (detection {row_of(run, latents[0])['detection']:.2f})"


def test_later_latents_join_earlier_ones(run: Path, latents: list[str]) -> None:
    interpret(run, None, latents[:1])
    first = row_of(run, latents[0])
    interpret(run, None, latents[1:])
    assert pl.read_parquet(run / "batchtopk" / "interpretation.parquet")["latent"].to_list() == sorted(map(int, latents))
    assert str(row_of(run, latents[0])) == str(first)
    contexts = pl.read_parquet(run / "batchtopk" / "interpretation_contexts.parquet")
    assert contexts.group_by("latent").len()["len"].to_list() == [18, 18]


def test_without_a_server_the_scores_are_offline_ones(run: Path, latents: list[str]) -> None:
    interpret(run, None, latents)
    row = row_of(run, latents[0])
    assert row["explanation"] is None and row["explainer"] is None and row["interpretation_reason"] is None
    scored = {score for score in SCORES if row[score] == row[score]}
    assert scored == {"bag_of_words"}
    assert row["bag_of_words_low"] <= row["bag_of_words"] <= row["bag_of_words_high"]


@pytest.mark.parametrize(
    ("broken", "reason", "lost"),
    [
        (EXPLAIN, "explanation: the model refuses: no", ("detection", "fuzzing")),
        (FUZZ, "fuzzing: 18 of 18 unanswered, the model refuses: no", ("fuzzing",)),
    ],
)
def test_a_latent_that_fails_is_marked_and_the_run_continues(
    broken: str, reason: str, lost: tuple[str, ...], run: Path, latents: list[str]
) -> None:
    healthy = True
    failing: set[str] = set()

    def answer(body: dict[str, Any], number: int) -> Reply:
        task, user = task_of(body)
        if task == EXPLAIN and not failing:
            failing.add(user)
        first = user in failing or user.startswith("Explanation: first")
        if task == broken and first and not healthy:
            return Reply(None, refusal="no")
        return answer_by_pattern(lambda text: "first|sea" if text in failing else "sea")(body, number)

    with scripted(answer) as server:
        healthy = False
        interpret(run, server.url, latents, "--concurrency", "1")
        rows = [row_of(run, latent) for latent in latents]
        bad, good = sorted(rows, key=lambda row: row["interpretation_reason"] is None)
        assert bad["interpretation_reason"] == reason
        assert good["interpretation_reason"] is None and good["detection"] == good["detection"]
        for score in ("detection", "fuzzing", "bag_of_words"):
            assert (bad[score] != bad[score]) == (score in lost)
        healthy, n_calls = True, len(server.calls)
        interpret(run, server.url, latents)
        assert row_of(run, str(bad["latent"]))["interpretation_reason"] is None
        # Only what failed is asked again (without an explanation, the judging was never asked).
        assert len(server.calls) - n_calls == {EXPLAIN: 5, FUZZ: 2}[broken]


def test_a_run_that_ends_early_resumes(run: Path, latents: list[str]) -> None:
    with scripted(ORACLE) as undisturbed:
        interpret(run, undisturbed.url, latents)
    shutil.rmtree(run / "interpretation")
    (run / "batchtopk" / "interpretation.parquet").unlink()
    up = False

    def answer(body: dict[str, Any], number: int) -> Reply:
        return ORACLE(body, number) if up or number < 4 else Reply(status=401)

    with scripted(answer) as server:
        with pytest.raises(UserError, match="refuses calls without a key"):
            interpret(run, server.url, latents, "--concurrency", "1", "--key_variable", "NO_SUCH_KEY")
        assert not (run / "batchtopk" / "interpretation.parquet").exists()
        up = True
        interpret(run, server.url, latents)
        assert len(server.calls) == len(undisturbed.calls) + 1  # the refused one


def test_a_dry_run_prints_the_cost_and_writes_nothing(
    run: Path, latents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(ORACLE) as server:
        interpret(run, server.url, latents, "--dry-run", "--input_price", "1000", "--output_price", "1000")
        out = capsys.readouterr().out
        assert "10 calls to make, about" in out and ", cost " in out and "unknown" not in out
        assert not server.calls and not (run / "batchtopk" / "interpretation.parquet").exists()
        interpret(run, server.url, latents)
        capsys.readouterr()
        interpret(run, server.url, latents, "--dry-run")
        out = capsys.readouterr().out
        assert "0 calls to make" in out and "10 answers from the cache" in out and "cost unknown" in out


def test_another_training_in_its_place_has_no_interpretation(run: Path, latents: list[str]) -> None:
    interpret(run, None, latents)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["train/batchtopk"]["fingerprint"] = "another"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert read_latent_table(run / "batchtopk")["n_shown"].null_count() == read_latent_table(run / "batchtopk").height
    (run / "manifest.json").unlink()  # as the run is pulled from the Hub, where all of it was published together
    assert read_latent_table(run / "batchtopk")["n_shown"].null_count() < read_latent_table(run / "batchtopk").height


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--latents", "9999"), "there is no latent 9999"),
        (("--latents", "many"), "'many' is neither a number nor COLUMN=VALUE"),
        (("--latents", "mood=good"), "cannot choose by 'mood'; choose by one of delta_norm_class"),
        (("--latents", "verdict=odd"), "verdict is never 'odd'; its values are chat_specific"),
        (("--model", "m"), "both --server URL and --model NAME"),
        (("--dry-run",), "both --server URL and --model NAME"),
        (("--latents", "0", "--embedding", "no/such/folder"), "'no/such/folder' is not a folder with a model"),
        ((), "has no concepts; run `crossdiff concepts .*` first, or choose latents with --latents"),
        (("--crosscoders", "l2"), "there is no crosscoder 'l2'"),
        (("--contexts", "1"), "contexts: Input should be greater than or equal to 5"),
    ],
)
def test_bad_input_is_named(options: tuple[str, ...], message: str, analysed_run: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_command(["interpret", str(analysed_run), *options])


def test_a_verdict_that_no_latent_has_is_no_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["interpret", str(run), *FEW, "--latents", "verdict=base_specific"])
    out = capsys.readouterr().out
    assert "no active latent has verdict=base_specific" in out


def test_missing_files_are_named(run: Path, latents: list[str]) -> None:
    (run / "batchtopk" / "neighbours.parquet").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"neighbours.parquet is damaged"):
        interpret(run, None, latents)
