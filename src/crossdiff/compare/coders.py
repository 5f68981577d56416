"""Crosscoders side by side: how much they explain, how sparsely, and whether the models still work on what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from crossdiff.activations.store import Store
from crossdiff.compare.recovered import AS_IT_IS, MEAN, run_on_reconstructions
from crossdiff.config import CompareConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.models.pair import Pair


def compare(
    crosscoders: Mapping[str, Crosscoder],
    store: Store,
    pair: Pair,
    config: CompareConfig,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> dict[str, Any]:
    """Held-out metrics of each crosscoder, and of each model on its reconstruction; every value with its interval.

    Returns:
        `crosscoders`: name -> architecture, health on held-out tokens, and by source the cross-entropy recovered and the KL
        on answers; `models`: source -> cross-entropy as it is and on its mean.
    """
    runs = run_on_reconstructions(crosscoders, store, pair, config.max_tokens, config.batch_tokens, advance)
    rows: dict[str, Any] = {}
    for name, coder in crosscoders.items():
        settings = coder.origin["settings"]
        rows[name] = {
            "architecture": [settings[part]["kind"] for part in ("inputs", "structure", "sparsity")],
            "n_latents": coder.n_latents,
            "heldout": health(coder, heldout_sums(coder, store, "heldout", config.batch_tokens)),
            "recovered": {s: asdict(sums.recovered(name)) for s, sums in runs.items() if name in sums.arms},
            "answer_kl": {s: asdict(sums.mean_answer_kl(name)) for s, sums in runs.items() if name in sums.arms},
        }
    models = {
        source: {arm: asdict(sums.mean_cross_entropy(arm)) for arm in (AS_IT_IS, MEAN)}
        | {"mean_answer_kl": asdict(sums.mean_answer_kl(MEAN)), "n_tokens": int(sums.n.sum())}
        for source, sums in runs.items()
    }
    return {"crosscoders": rows, "models": models}


def comparison_table(comparison: dict[str, Any]) -> Table:
    """The comparison for the terminal: a column a crosscoder, intervals under their values."""
    rows, sources = comparison["crosscoders"], list(comparison["models"])
    table = Table(title="held-out tokens, 95% intervals", show_lines=True)
    for column in ("", *rows):
        table.add_column(column)

    def add(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(title, *(cell(row) for row in rows.values()))

    for index, title in enumerate(("reads", "latents tied", "sparsity")):
        add(title, lambda row, index=index: row["architecture"][index])  # type: ignore[misc]
    add("latents", lambda row: f"{row['n_latents']:,}")
    add("FVE", lambda row: "\n".join(f"{s} {value:.3f}" for s, value in row["heldout"]["fve"].items() if s != "total"))
    add("L0", lambda row: f"{row['heldout']['l0']:.1f}")
    add("dead", lambda row: f"{row['heldout']['dead_share']:.1%}")
    for measure, title in (("recovered", "CE recovered"), ("answer_kl", "answer KL")):
        for source in sources:
            add(f"{title},\n{source}", lambda row, key=(measure, source): _cell(row[key[0]].get(key[1])))  # type: ignore[misc]
    return table


def _cell(quantity: dict[str, float] | None) -> str:
    if quantity is None:
        return "-"
    return f"{quantity['value']:.3f}\n{quantity['low']:.3f} to {quantity['high']:.3f}"
