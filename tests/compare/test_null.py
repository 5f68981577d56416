"""The null diff: rates side by side, and runs that do not belong together."""

from __future__ import annotations

import io
import json
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from crossdiff.cli import run_command
from crossdiff.compare.null import compare
from crossdiff.compare.terminal import print_null
from crossdiff.errors import UserError


def write_run(folder: Path, verdicts: list[str], base: str = "a", layer: int = 3, name: str = "l1") -> Path:
    (folder / name).mkdir(parents=True)
    (folder / "activations").mkdir()
    specific = [verdict == "chat_specific" for verdict in verdicts]
    table = {
        "verdict": verdicts,
        "chat_specific": specific,
        "chat_specific_paper": specific,
        "template_only": [False] * len(verdicts),
    }
    pl.DataFrame(table).write_parquet(folder / name / "latents.parquet")
    manifest = {"pair": {"base": {"name": base}, "chat": {"name": folder.name}}, "layer": layer}
    (folder / "activations" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.json").write_text("{}")
    return folder


def test_rates_are_shares_of_the_live_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", ["chat_specific"] * 2 + ["shared"] * 6 + ["dead"] * 2)
    null = write_run(tmp_path / "null", ["chat_specific"] + ["shared"] * 3 + ["complete_shrinkage"])
    rates = compare(run, null)
    row = rates.row(by_predicate=pl.col("rate") == "chat_specific", named=True)
    assert (row["real"], row["null"], row["n_real"], row["n_null"]) == (0.25, 0.2, 8, 5)
    assert rates.row(by_predicate=pl.col("rate") == "complete_shrinkage", named=True)["null"] == 0.2
    console = Console(file=io.StringIO(), width=120)
    print_null(rates, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "chat specific" in text and "25.00%" in text and "20.00%" in text and "0.80" in text
    run_command(["null", str(run), "--null", str(null)])
    assert "8 live latents, and of 5 in the null diff" in capsys.readouterr().out
    kept = json.loads((run / "null.json").read_text())["crosscoders"]["l1"]
    assert kept["n_live"] == 5 and kept["rates"]["chat_specific"] == 0.2 and kept["rates"]["shared"] == 0.6


def test_coders_with_one_decoder_are_left_out(tmp_path: Path) -> None:
    run, null = (write_run(tmp_path / name, ["shared"] * 4) for name in ("run", "null"))
    for folder in (run, null):
        (folder / "sae").mkdir()
        table = pl.read_parquet(folder / "l1" / "latents.parquet").with_columns(delta_norm=pl.lit(float("nan")))
        table.write_parquet(folder / "sae" / "latents.parquet")
    assert set(compare(run, null)["crosscoder"]) == {"l1"}


def test_runs_that_do_not_belong_together(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["shared"])
    with pytest.raises(UserError, match=r"the same base model, but .*'a'.* has .*'b'"):
        compare(run, write_run(tmp_path / "b", ["shared"], base="b"))
    with pytest.raises(UserError, match=r"same layer, but .* has 3 and .* has 4"):
        compare(run, write_run(tmp_path / "c", ["shared"], layer=4))
    loose = write_run(tmp_path / "e", ["shared"])
    (loose / "config.yaml").write_text("analyze: {nu_error: 0.4}")
    with pytest.raises(UserError, match=r"same analysis of l1, but .*'nu_error': 0.2.* has .*'nu_error': 0.4"):
        compare(run, loose)
    with pytest.raises(UserError, match=r"no analysed crosscoder of the same name: l1 in .* and topk in"):
        compare(run, write_run(tmp_path / "d", ["shared"], name="topk"))
    with pytest.raises(UserError, match="is not a run directory"):
        run_command(["null", str(run), "--null", str(tmp_path / "nowhere")])
