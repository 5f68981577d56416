"""The null diff: how often a run calls latents chat-specific where nothing was taught (METHOD: ground truth, a null).

The null run compares the same base model with one that was trained further on plain text alone, as long and at the same rate as
the chat tuning. What it calls chat-specific is what any training does to a model, or noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from crossdiff.config import AnalyzeConfig, read_yaml, validate
from crossdiff.errors import UserError
from crossdiff.files import read_json, write_json
from crossdiff.latents.verdict import SETS, VERDICTS

FILE = "null.json"
"""In the run directory: the null run's rates, which the report puts beside the run's own."""
RATES = (*SETS, *(name for name in VERDICTS if name not in SETS and name != "dead"))


def analysed_names(run: Path) -> list[str]:
    """The crosscoders of a run directory that have a latent table with verdicts; coders with one decoder have none.

    Raises:
        UserError: there is none.
    """
    tables = {path.parent.name: pl.scan_parquet(path) for path in sorted(run.glob("*/latents.parquet"))}
    names = [name for name, table in tables.items() if _compares(table)]
    if not names:
        raise UserError(f"{run} has no crosscoder with a latents.parquet; run `crossdiff analyze {run}` first")
    return names


def _compares(table: pl.LazyFrame) -> bool:
    """Whether any latent has a delta_norm."""
    if "delta_norm" not in table.collect_schema():
        return True  # another version's, of which `rates` says so
    return bool(table.select(pl.col("delta_norm").is_not_nan().any()).collect().item())


def rates(path: Path) -> tuple[int, dict[str, float]]:
    """The number of live latents of a latent table, and their share in each set and verdict.

    Raises:
        UserError: the table is of another version.
    """
    table = pl.read_parquet(path)
    missing = [name for name in ("verdict", *SETS) if name not in table.columns]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; run `crossdiff analyze` again with this version")
    live = table.filter(pl.col("verdict") != "dead")
    found = {name: live[name] if name in SETS else live["verdict"] == name for name in RATES}
    return live.height, {name: float(flags.sum()) / max(1, live.height) for name, flags in found.items()}


def _side(run: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = read_json(run / "activations" / "manifest.json")
    settings = read_yaml(run / "config.yaml").get("analyze") if (run / "config.yaml").is_file() else None
    limits = validate(AnalyzeConfig, settings or {}, f"{run / 'config.yaml'}")
    return {
        "base model": manifest["pair"]["base"],
        "layer": manifest["layer"],
        "analysis": limits.model_dump(exclude={"batch_tokens", "examples", "examples_per_quantile", "pool_size", "seed"}),
    }


def compare(run: Path, null: Path) -> pl.DataFrame:
    """Rates of a run beside those of a null run, a row per crosscoder that both have and set or verdict.

    Columns: crosscoder, rate (key of `SETS` or `VERDICTS`), real, null (shares of the live latents), n_real, n_null (their
    numbers).

    Raises:
        UserError: the runs have different base models, layers or limits of the verdicts, or no crosscoder of one name.
    """
    names = [name for name in analysed_names(run) if name in analysed_names(null)]
    if not names:
        sides = f"{', '.join(analysed_names(run))} in {run} and {', '.join(analysed_names(null))} in {null}"
        raise UserError(f"the two runs have no analysed crosscoder of the same name: {sides}")
    real_side, null_side = _side(run), _side(null)
    for key in real_side:
        if real_side[key] != null_side[key]:
            raise UserError(
                f"a null diff has the same {key}, but {run} has {real_side[key]} and {null} has {null_side[key]}; "
                "make the null run with the base model, layer and analysis settings of the other"
            )
    rows = []
    for name in names:
        (n_real, real), (n_null, other) = (rates(folder / name / "latents.parquet") for folder in (run, null))
        sizes = {"n_real": n_real, "n_null": n_null}
        rows += [{"crosscoder": name, "rate": key, "real": real[key], "null": other[key]} | sizes for key in RATES]
    return pl.DataFrame(rows)


def keep(run: Path, null: Path, compared: pl.DataFrame) -> None:
    """Store the null run's rates with the run."""
    crosscoders = {
        str(name[0]): {"n_live": part["n_null"][0], "rates": dict(part.select("rate", "null").iter_rows())}
        for name, part in compared.group_by("crosscoder", maintain_order=True)
    }
    write_json(run / FILE, {"null_run": str(null), "crosscoders": crosscoders})
