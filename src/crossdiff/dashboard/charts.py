"""Figures that only the dashboard has: every latent as a point that can be brushed, delta_norm of several crosscoders in one
figure, and bars of KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from crossdiff.dashboard.catalogue import Coder
from crossdiff.latents.ranking import title
from crossdiff.report.figures import DELTA_NORM_EDGES, DELTA_NORM_TITLE, NU_RANGE, NUS, scaling_plot, with_both_nus
from crossdiff.report.marks import BLUE, GREEN, ORANGE, PURPLE, SKY, VERDICT_MARKS, VERMILLION
from crossdiff.report.plotly_figures import LEGEND, PageFigure, error_lengths, figure_json, layout_of, plain
from crossdiff.report.wording import VERDICTS, words

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "x")
_SCALE = {
    "colorscale": "Cividis", "cmin": 0, "cmax": 1, "opacity": 0.8,
    "colorbar": {"title": {"text": "share of active tokens<br>on template tokens", "side": "right"}, "thickness": 12},
}  # fmt: skip


def points(coder: Coder, colour: str) -> str:
    """JSON of the two ranked nus of every latent with both, coloured by `verdict` or `template` share."""
    table = with_both_nus(coder.table)
    if colour == "template":
        traces = [_trace(table, "latents", {"color": table["share_template"].round(3).to_list(), "size": 6, **_SCALE})]
    else:
        traces = []
        for verdict, mark in VERDICT_MARKS.items():
            rows = table.filter(pl.col("verdict") == verdict)
            if rows.height:
                marker = {"color": mark.colour, "symbol": mark.symbol, "opacity": mark.opacity, "size": mark.size}
                traces.append(_trace(rows, f"{VERDICTS[verdict]} ({rows.height:,})", marker))
    return figure_json(traces, layout_of(scaling_plot(coder.coder.limits)), 460)


def _trace(rows: pl.DataFrame, name: str, marker: dict[str, Any]) -> dict[str, Any]:
    x, y = (rows[nu].clip(*NU_RANGE).round(4).to_list() for nu in NUS)
    hover = f"latent %{{customdata}}<br>{title(NUS[0])} %{{x}}<br>{title(NUS[1])} %{{y}}"
    return {
        "type": "scattergl", "mode": "markers", "name": name, "showlegend": "colorbar" not in marker, "x": x, "y": y,
        "customdata": rows["latent"].to_list(), "hovertemplate": f"{hover}<extra>{name}</extra>", "marker": marker,
    }  # fmt: skip


def norm_overlay(coders: Sequence[Coder]) -> PageFigure:
    """delta_norm of several crosscoders, each as a share of its live latents."""
    edges = DELTA_NORM_EDGES
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
        "xaxis": {"title": {"text": DELTA_NORM_TITLE}, "range": [0, 1]},
        "yaxis": {"title": {"text": "share of live latents (log scale)"}, "type": "log", "tickformat": ".2~%"},
        "legend": LEGEND,
    }
    names = ", ".join(label(coder) for coder in coders)
    return PageFigure(figure_json(traces, layout, 340), f"delta_norm of the latents of {names}, in one figure.")


def kl_bars(coders: Sequence[Coder], span: str = "response") -> PageFigure | None:
    """KL to the chat model of every intervention with its interval; None if no crosscoder has a causal test."""
    tested = [coder for coder in coders if coder.causal]
    traces: list[dict[str, Any]] = []
    for at, coder in enumerate(tested):
        rows = [row for row in coder.causal if row["span"] == span]
        value, low, high = ([row["kl"][end] for row in rows] for end in ("value", "low", "high"))
        traces.append({
            "type": "bar", "name": label(coder), "showlegend": True, "y": [words(row["intervention"]) for row in rows],
            "x": value, "orientation": "h", "marker": {"color": COLOURS[at % 6]},
            "error_x": {
                "type": "data", "symmetric": False, "array": error_lengths(value, high),
                "arrayminus": error_lengths(low, value),
            },
            "hovertemplate": "%{y}<br>KL %{x:.3f} nats<extra>%{fullData.name}</extra>",
        })  # fmt: skip
    if not any(trace["x"] for trace in traces):
        return None
    count = len({name for trace in traces for name in trace["y"]})
    layout = {
        "barmode": "group",
        "xaxis": {"title": {"text": "KL to the chat model, nats per token (lower is closer)"}, "rangemode": "tozero"},
        "yaxis": {"automargin": True, "autorange": "reversed"},
        "legend": LEGEND,
    }
    description = f"KL to the chat model of {count} interventions, with 95% intervals."
    return PageFigure(figure_json(traces, layout, 140 + 26 * count * len(tested)), description)


def label(coder: Coder) -> str:
    """A crosscoder's name among those of all runs."""
    return plain(f"{coder.run} {coder.name}")
