"""The null diff: how often a run calls latents chat-specific when nothing was taught (docs/method.md#null).

The null run compares the same base model with one that was trained further on plain text alone, for the same time and at the
same rate as the chat tuning. Whatever it calls chat-specific is an effect of any training, or noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from crossdiff.errors import UserError
from crossdiff.files import read_json, write_json
from crossdiff.integrity import intact, read_parquet
from crossdiff.latents.settings import verdict_settings
from crossdiff.latents.verdict import SETS, VERDICTS

FILE = "null.json"
"""In the run directory: the null run's rates, which the report shows next to the run's own."""
RATES = (*SETS, *(name for name in VERDICTS if name not in SETS and name != "dead"))


def analysed_names(run: Path) -> list[str]:
    """The crosscoders of a run directory that have a latent table with verdicts, which coders with one decoder lack."""
    tables = {path.parent.name: read_parquet(path) for path in sorted(run.glob("*/latents.parquet"))}
    names = [name for name, table in tables.items() if _compares(table)]
    if not names:
        raise UserError(f"{run} has no crosscoder with a latents.parquet; run `crossdiff analyze {run}` first")
    return names


def _compares(table: pl.DataFrame) -> bool:
    """Whether any latent has a delta_norm."""
    if "delta_norm" not in table.columns:
        return True  # a table of another version, which `rates` refuses with a message
    return bool(table["delta_norm"].is_not_nan().any())


def rates(path: Path) -> tuple[int, dict[str, float]]:
    """The number of live latents in a latent table, and their share in each set and verdict."""
    table = read_parquet(path)
    missing = [name for name in ("verdict", *SETS) if name not in table.columns]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; run `crossdiff analyze` again with this version")
    live = table.filter(pl.col("verdict") != "dead")
    found = {name: live[name] if name in SETS else live["verdict"] == name for name in RATES}
    return live.height, {name: float(flags.sum()) / max(1, live.height) for name, flags in found.items()}


def _facts(run: Path, names: Sequence[str]) -> dict[str, Any]:
    """What a run and its null run must have in common, for the crosscoders of these names."""
    manifest: dict[str, Any] = read_json(intact(run / "activations" / "manifest.json"))
    analyses = {f"analysis of {name}": verdict_settings(run / name) for name in names}
    return {"base model": manifest["pair"]["base"], "layer": manifest["layer"], **analyses}


def compare(run: Path, null: Path) -> pl.DataFrame:
    """Rates of a run next to those of a null run: one row per set or verdict of each crosscoder that both runs have.

    Columns: crosscoder, rate (key of `SETS` or `VERDICTS`), real, null (shares of the live latents), n_real, n_null (numbers of
    live latents).
    """
    ours, theirs = analysed_names(run), analysed_names(null)
    chat, other = (read_json(intact(folder / "activations" / "manifest.json"))["pair"]["chat"] for folder in (run, null))
    if chat == other:
        raise UserError(
            f"{null} compares the same two models as {run}, so it is not a null diff of it; give the run of the base model and "
            "one that was trained further without the behaviour"
        )
    names = [name for name in ours if name in theirs]
    if not names:
        raise UserError(
            f"the two runs have no analysed crosscoder of the same name: {', '.join(ours)} in {run} and {', '.join(theirs)} in "
            f"{null}; train one of the same name in both"
        )
    real_facts, null_facts = _facts(run, names), _facts(null, names)
    for key in real_facts:
        if real_facts[key] != null_facts[key]:
            raise UserError(
                f"a null diff must have the same {key}, but {run} has {real_facts[key]} and {null} has {null_facts[key]}; "
                "make the null run with the base model, layer and analysis settings of the other run"
            )
    rows = []
    for name in names:
        n_real, real = rates(run / name / "latents.parquet")
        n_null, other = rates(null / name / "latents.parquet")
        sizes = {"n_real": n_real, "n_null": n_null}
        rows += [{"crosscoder": name, "rate": key, "real": real[key], "null": other[key]} | sizes for key in RATES]
    return pl.DataFrame(rows)


def concept_counts(run: Path) -> dict[str, int] | None:
    """How many concepts of a run replicate, and how many of those are specific to the second model; None without any table."""
    path = run / "concepts" / "concepts.parquet"
    if not path.is_file():
        return None
    found = read_parquet(path).filter("replicated")
    return {"n_replicated": found.height, "n_chat_specific": found.filter(pl.col("verdict") == "chat_specific").height}


def keep(run: Path, null: Path, compared: pl.DataFrame) -> None:
    """Store the null run's rates and the number of its concepts in the run directory."""
    crosscoders = {
        str(name): {
            "n_live": part["n_null"][0],
            "rates": dict(part.select("rate", "null").iter_rows()),
            "analysis": verdict_settings(run / str(name)),
        }
        for (name,), part in compared.group_by("crosscoder", maintain_order=True)
    }
    write_json(run / FILE, {"null_run": str(null), "crosscoders": crosscoders, "concepts": concept_counts(null)})
