"""The stored tokens of the logit lens are those that the lens reads one direction at a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from conftest import forget_digests, make_model
from crossdiff.cli import run_command
from crossdiff.models import promoted_tokens
from crossdiff.models.lens import lenses
from crossdiff.models.pair import Pair
from crossdiff.models.promoted_tokens import PROMOTED, promoted_table


@pytest.fixture
def pair() -> Pair:
    tokenizer = SimpleNamespace(decode=lambda ids: f"token {ids[0]}")
    return Pair(make_model(seed=0), make_model(seed=1), tokenizer, {})


@pytest.mark.parametrize("at_once", [1, 2**25])
def test_each_row_is_what_the_lens_reads_from_one_direction(pair: Pair, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(promoted_tokens, "LOGITS", at_once)  # one latent at a time, or all
    directions = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    table = promoted_table(pair, *directions, torch.tensor([3, 4, 7, 8, 9]), "latent", seen.append)
    assert sum(seen) == 5 and table.height == 5 * 3 * 2 * PROMOTED
    for at, latent in enumerate((3, 4, 7, 8, 9)):
        for lens in lenses(pair, directions[0, at], directions[1, at], PROMOTED):
            for side, expected in (("up", lens.up), ("down", lens.down)):
                rows = table.filter(latent=latent, direction=lens.name, side=side)
                assert rows["rank"].to_list() == list(range(PROMOTED))
                assert rows["token"].to_list() == [token for token, _ in expected]
                torch.testing.assert_close(rows["logit"].to_torch(), torch.tensor([logit for _, logit in expected]))


def test_models_without_a_lens_leave_a_warning_and_an_empty_table(pair: Pair) -> None:
    pair = replace(pair, base=make_model("opt", word_embed_proj_dim=8))
    with pytest.warns(UserWarning, match="the latents have no promoted tokens"):
        table = promoted_table(pair, *torch.ones(2, 3, 16), torch.arange(3), "latent")
    assert table.height == 0 and table.columns == ["latent", "direction", "side", "rank", "token", "logit"]


def test_a_run_that_was_analysed_before_gets_them_without_another_analysis(
    analysed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(analysed_run, tmp_path / "run")
    written = pl.read_parquet(run / "batchtopk" / "promoted.parquet")
    (run / "batchtopk" / "promoted.parquet").unlink()
    run_command(["analyze", str(run)])
    assert "analyze/batchtopk: already done" in capsys.readouterr().out
    assert pl.read_parquet(run / "batchtopk" / "promoted.parquet").equals(written)
    assert written["latent"].n_unique() == pl.read_parquet(run / "batchtopk" / "latents.parquet").height


def test_a_slow_cpu_reads_only_the_latents_that_differ(
    analysed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossdiff.stages import promoted as stage

    run = shutil.copytree(analysed_run, tmp_path / "run")
    forget_digests(run)
    table = pl.read_parquet(run / "batchtopk" / "latents.parquet")
    verdict = pl.when(pl.col("latent").is_in([5, 9])).then(pl.lit("chat_specific")).otherwise(pl.lit("shared"))
    table.with_columns(verdict=verdict).write_parquet(run / "batchtopk" / "latents.parquet")
    (run / "batchtopk" / "promoted.parquet").unlink()
    monkeypatch.setattr(stage, "MOST_ON_CPU", 1.0)
    run_command(["analyze", str(run)])
    assert pl.read_parquet(run / "batchtopk" / "promoted.parquet")["latent"].unique().to_list() == [5, 9]
