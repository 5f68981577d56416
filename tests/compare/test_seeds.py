"""Seeds: the spread of the counts and the latents that are found again, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from crossdiff.cli import run_command
from crossdiff.compare.seeds import Seed, compare_seeds, largest_cosines, read_seeds
from crossdiff.config import L1Config
from crossdiff.crosscoder.checkpoint import save
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.latents import decoder


def seed(name: str, chat: list[list[float]], verdicts: list[str]) -> Seed:
    """A crosscoder with the given chat directions in two dimensions."""
    decoder = torch.cat([torch.zeros(len(chat), 2), torch.tensor(chat)], dim=1)
    coder = Crosscoder(
        encoder=decoder.clone(), encoder_bias=torch.zeros(len(chat)), decoder=decoder, decoder_bias=torch.zeros(4),
        mean=torch.zeros(2, 2), scale=1.0, sparsity=L1Config(),
    )  # fmt: skip
    specific = [verdict == "chat_specific" for verdict in verdicts]
    table = pl.DataFrame({
        "latent": range(len(chat)), "verdict": verdicts, "delta_norm_class": ["chat_only"] * len(chat),
        "chat_specific": specific, "chat_specific_paper": specific, "template_only": [False] * len(chat),
    })  # fmt: skip
    return Seed(name, table, coder)


def three() -> list[Seed]:
    return [
        seed("a", [[1, 0], [0, 1], [-1, 0]], ["chat_specific", "chat_specific", "shared"]),
        # a's first latent is here as a specific one, its second as a shared one.
        seed("b", [[2, 0.1], [0.1, 3], [0, -1]], ["chat_specific", "shared", "dead"]),
        seed("c", [[-1, 0], [1, 0], [1, 1]], ["shared", "dead", "shared"]),
    ]


def test_counts_and_their_spread() -> None:
    counts = compare_seeds(three()).counts
    row = counts.row(by_predicate=pl.col("count") == "chat_specific", named=True)
    assert (row["a"], row["b"], row["c"], row["mean"]) == (2, 1, 0, 1.0)
    assert row["sd"] == pytest.approx(1.0)  # of 2, 1, 0 with n - 1


def test_latents_found_again() -> None:
    matches = {(r["seed"], r["other"]): r for r in compare_seeds(three()).matches.iter_rows(named=True)}
    assert (matches["a", "b"]["matched"], matches["a", "b"]["matched_specific"]) == (1.0, 0.5)
    # The dead latent along [1, 0] does not count, and [1, 1] has a cosine of 0.71.
    assert (matches["a", "c"]["n_specific"], matches["a", "c"]["matched"]) == (2, 0.0)
    assert (matches["b", "a"]["matched"], matches["b", "a"]["matched_specific"]) == (1.0, 1.0)
    assert math.isnan(matches["c", "a"]["matched"])
    # Of a's latents the best cosines with those of c are 0.71, 0.71 and, of the shared one, 1.
    assert matches["a", "c"]["median_cosine"] == pytest.approx(0.5**0.5)
    assert matches["a", "c"]["median_cosine_live"] == pytest.approx(0.5**0.5)
    assert matches["b", "c"]["median_cosine_live"] == pytest.approx((0.71 + 0.73) / 2, abs=0.05)
    assert math.isnan(matches["c", "a"]["median_cosine"])


def test_largest_cosines_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    rows, others = torch.randn(10, 4, generator=generator), torch.randn(7, 4, generator=generator)
    a, b = rows.double().numpy(), others.double().numpy()
    expected = (a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)).max(1)
    np.testing.assert_allclose(largest_cosines(rows, others).numpy(), expected, atol=1e-6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at, each in enumerate(three()):
        (tmp_path / each.name).mkdir()
        rows = {
            "behaviour": ["refusal"] * 4, "question": ["before_answer"] * 3 + ["whole_conversation"],
            "pool": ["chat_specific", "shared", "bag_of_words", "shared"], "auroc": [0.5 + at / 4, 0.55, 0.99, 0.42],
        }  # fmt: skip
        pl.DataFrame(rows).write_parquet(tmp_path / each.name / "behaviours.parquet")
        save(each.crosscoder, tmp_path / each.name)
        each.table.write_parquet(tmp_path / each.name / "latents.parquet")
    (tmp_path / "manifest.json").write_text("{}")
    run_command(["seeds", str(tmp_path), "a", "b", "c"])
    shown = capsys.readouterr().out
    assert "Chat-specific latents found again" in shown and "0.99" not in shown and "0.42" not in shown
    behaviours = compare_seeds(read_seeds(tmp_path, ["a", "b", "c"])).behaviours
    assert behaviours.rows() == [("refusal", "chat_specific", 0.5, 0.75, 1.0), ("refusal", "shared", 0.55, 0.55, 0.55)]
    assert all(score in shown for score in ("0.50", "0.75", "1.00", "0.55"))
    (tmp_path / "b" / "behaviours.parquet").unlink()
    assert compare_seeds(read_seeds(tmp_path, ["a", "b"])).behaviours.height == 0
    with pytest.raises(UserError, match="name at least two crosscoders"):
        read_seeds(tmp_path, ["a"])
    with pytest.raises(UserError, match=r"has no latents\.parquet; run `crossdiff analyze .* --only d`"):
        read_seeds(tmp_path, ["a", "d"])
