"""Figures that the report has not: every latent as a point that can be brushed, crosscoders laid over one another, KL bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from crossdiff.dashboard.catalogue import Coder
from crossdiff.report.figures import NU_RANGE, VERDICT_MARKS, Figure, figure_json, scaling_layout
from crossdiff.report.wording import VERDICTS, words

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "x")
_BINS = 40
_NUS = ("nu_error", "nu_reconstruction")


def points(coder: Coder, colour: str) -> str:
    """The figure's JSON: nu_error against nu_reconstruction of every latent that has both, by `verdict` or `template` share."""
    table = coder.table.filter(*(pl.col(nu).is_finite() for nu in _NUS))
    if colour == "template":
        traces = [_trace(table, "latents", {"color": table["share_template"].round(3).to_list(), "size": 6, **_SCALE})]
    else:
        traces = []
        for verdict, mark in VERDICT_MARKS.items():
            rows = table.filter(pl.col("verdict") == verdict)
            if rows.height:
                marker = {"color": mark.colour, "symbol": mark.symbol, "opacity": mark.opacity, "size": mark.size}
                traces.append(_trace(rows, f"{VERDICTS[verdict]} ({rows.height:,})", marker))
    return figure_json(traces, scaling_layout(coder.report.limits), 460)


_SCALE = {
    "colorscale": "Cividis", "cmin": 0, "cmax": 1, "opacity": 0.8,
    "colorbar": {"title": {"text": "share of active tokens<br>on template tokens", "side": "right"}, "thickness": 12},
}  # fmt: skip


def _trace(rows: pl.DataFrame, name: str, marker: dict[str, Any]) -> dict[str, Any]:
    x, y = (rows[nu].clip(*NU_RANGE).round(4).to_list() for nu in _NUS)
    hover = "latent %{customdata}<br>nu_error %{x}<br>nu_reconstruction %{y}"
    return {
        "type": "scattergl", "mode": "markers", "name": name, "showlegend": "colorbar" not in marker, "x": x, "y": y,
        "customdata": rows["latent"].to_list(), "hovertemplate": f"{hover}<extra>{name}</extra>", "marker": marker,
    }  # fmt: skip


def points_note(coder: Coder) -> str:
    """What the points leave out or move."""
    defined = coder.table.filter(*(pl.col(nu).is_finite() for nu in _NUS))
    outside = defined.filter(pl.any_horizontal(~pl.col(nu).is_between(*NU_RANGE) for nu in _NUS)).height
    low, high = NU_RANGE
    return (
        f"{defined.height:,} latents. Not drawn, with an undefined nu: {coder.table.height - defined.height:,}. "
        f"Moved to the edge at {low:g} or {high:g}: {outside:,}."
    )


def norm_overlay(coders: Sequence[Coder]) -> Figure:
    """delta_norm of several crosscoders as a share of each one's live latents."""
    edges = np.linspace(0, 1, _BINS + 1)
    traces = []
    for at, coder in enumerate(coders):
        values = coder.table.filter(pl.col("verdict") != "dead")["delta_norm"].drop_nans().drop_nulls().to_numpy()
        share = np.histogram(values, edges)[0] / max(1, len(values))
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": label(coder), "showlegend": True,
            "x": ((edges[:-1] + edges[1:]) / 2).round(4).tolist(), "y": [value or None for value in share.tolist()],
            "line": {"color": COLOURS[at % 6], "dash": DASHES[at % 6], "shape": "hvh"},
            "marker": {"symbol": SYMBOLS[at % 6], "size": 6}, "connectgaps": False,
            "hovertemplate": "delta_norm %{x}<br>%{y:.2%} of live latents<extra>%{fullData.name}</extra>",
        })  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "delta_norm (0 base-only, 1 chat-only)"}, "range": [0, 1]},
        "yaxis": {"title": {"text": "share of live latents (log scale)"}, "type": "log", "tickformat": ".2~%"},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
    }
    names = ", ".join(label(coder) for coder in coders)
    return Figure(figure_json(traces, layout, 340), f"delta_norm of the latents of {names}, laid over one another.")


def kl_bars(coders: Sequence[Coder], span: str = "response") -> Figure | None:
    """KL to the chat model of every intervention with its interval; None where no crosscoder has a causal test."""
    tested = [coder for coder in coders if coder.causal]
    traces: list[dict[str, Any]] = []
    for at, coder in enumerate(tested):
        rows = [row for row in coder.causal if row["span"] == span]
        traces.append({
            "type": "bar", "name": label(coder), "showlegend": True, "y": [words(row["intervention"]) for row in rows],
            "x": [row["kl"]["value"] for row in rows], "orientation": "h", "marker": {"color": COLOURS[at % 6]},
            "error_x": {
                "type": "data", "symmetric": False,
                "array": [row["kl"]["high"] - row["kl"]["value"] for row in rows],
                "arrayminus": [row["kl"]["value"] - row["kl"]["low"] for row in rows],
            },
            "hovertemplate": "%{y}<br>KL %{x:.3f} nats<extra>%{fullData.name}</extra>",
        })  # fmt: skip
    if not any(trace["x"] for trace in traces):
        return None
    count = len({name for trace in traces for name in trace["y"]})
    layout = {
        "barmode": "group",
        "xaxis": {"title": {"text": "KL to the chat model, nats per token (lower is nearer)"}, "rangemode": "tozero"},
        "yaxis": {"automargin": True, "autorange": "reversed"},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
    }
    description = f"KL to the chat model of {count} interventions, with 95% intervals."
    return Figure(figure_json(traces, layout, 140 + 26 * count * len(tested)), description)


def label(coder: Coder) -> str:
    """A crosscoder among those of all runs; plotly reads tags in labels, and a run's name has none."""
    text = f"{coder.run} {coder.name}"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
