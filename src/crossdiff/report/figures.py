"""Plotly figures of one crosscoder, as JSON for the page.

Colours of text, grid and rules are left to the page's style sheet, which knows light from dark; only marks are coloured
here, with the palette of Okabe and Ito (2008), and every group has a shape of its own as well.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.io
import polars as pl
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from crossdiff.report.records import CrosscoderReport, Estimate, Limits
from crossdiff.report.wording import POOLS, VERDICTS, fixed, interval, latents, number, share, words

NU_RANGE = (-0.2, 1.5)
CLASS_BORDERS = (0.1, 0.4, 0.6, 0.9)
MAX_POINTS = 4000
"""Points of one verdict drawn at most, so that the page stays light; the rest is thinned out evenly."""

_BINS = 50
_EDGES = np.linspace(0, 1, _BINS + 1)
_LEGEND = {"orientation": "h", "yanchor": "bottom", "x": 0, "xanchor": "left"}
_RULE = "#8a8a8a"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


@dataclass(frozen=True, slots=True)
class Mark:
    """How a group is drawn: colour and marker shape."""

    colour: str
    symbol: str
    opacity: float = 0.9
    size: int = 8


VERDICT_MARKS = {
    "shared": Mark("#0072b2", "circle", 0.45, 5),
    "undecided": Mark("#8c8c8c", "circle-open", 0.6, 6),
    "base_specific": Mark("#009e73", "square"),
    "rotated": Mark("#cc79a7", "triangle-up"),
    "complete_shrinkage": Mark("#e69f00", "star"),
    "latent_decoupling": Mark("#56b4e9", "x"),
    "chat_specific": Mark("#d55e00", "diamond", 0.95, 9),
}
POOL_MARKS = {
    "chat_specific": Mark("#d55e00", "diamond", 1.0, 10),
    "shared": Mark("#0072b2", "circle", 1.0, 9),
    "base_sae": Mark("#009e73", "square", 1.0, 9),
    "bag_of_words": Mark("#8c8c8c", "x", 1.0, 8),
}
_OTHER_POOLS = (
    Mark("#cc79a7", "triangle-up", 1.0, 9),
    Mark("#e69f00", "star", 1.0, 9),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure's JSON (data and layout), what it shows in words, what it leaves out, and whether to offer zooming."""

    json: str
    description: str
    note: str = ""
    zooms: bool = False


def plotly_script() -> str:
    """The text of plotly.min.js, from the installed package."""
    return str(get_plotlyjs())


def pool_mark(pool: str, pools: Sequence[str]) -> Mark:
    """The mark of a pool; pools without one of their own take the next free one."""
    if pool in POOL_MARKS:
        return POOL_MARKS[pool]
    others = [name for name in pools if name not in POOL_MARKS]
    return _OTHER_POOLS[others.index(pool) % len(_OTHER_POOLS)]


def delta_norm_histogram(coder: CrosscoderReport, highest: int) -> Figure:
    """Latents by delta_norm on a logarithmic count axis up to `highest`, with the borders of its classes."""
    traces = []
    for name, dead in (("active", False), ("dead", True)):
        counts = _delta_norm_counts(coder, dead)
        if counts.sum() or not dead:
            outline = {"color": "#d55e00", "width": 1} if dead else {"width": 0}
            traces.append({
                "type": "bar", "name": name, "x": (_EDGES[:-1] + _EDGES[1:]) / 2, "y": counts, "width": 1 / _BINS,
                "customdata": [f"{low:.2f} to {high:.2f}" for low, high in pairwise(_EDGES)],
                "hovertemplate": f"%{{customdata}}<br>{name}: %{{y}}<extra></extra>",
                "marker": {"color": "rgba(0,0,0,0)" if dead else "#0072b2", "line": outline},
            })  # fmt: skip
    centres = {0.05: "base-only", 0.25: "other", 0.5: "shared", 0.75: "other", 0.95: "chat-only"}
    label = {"y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False, "font": {"size": 11}}
    layout = {
        "barmode": "overlay",
        "shapes": [_rule("x", border, "dot") for border in CLASS_BORDERS],
        "annotations": [{"x": x, "text": text, **label} for x, text in centres.items()],
        "legend": {**_LEGEND, "y": 1.1},
        "xaxis": {
            "title": {"text": "delta_norm (0 base-only, 1 chat-only)"}, "range": [0, 1],
            "tickvals": [0, *CLASS_BORDERS, 1],
        },
        "yaxis": {
            "title": {"text": "latents (log scale)"}, "type": "log", "dtick": 1,
            "range": [math.log10(0.6), math.log10(max(highest, 10) * 1.5)],
        },
    }  # fmt: skip
    classes = ", ".join(f"{coder.count(key)} {words(key)}" for key in ("base_only", "shared", "chat_only", "other"))
    description = f"Histogram of delta_norm of {coder.title}: {classes}."
    return Figure(figure_json(traces, layout, 300), description)


def highest_bar(coders: Sequence[CrosscoderReport]) -> int:
    """The largest count of any bar of the delta_norm histograms, so that they can share an axis."""
    return max(int(_delta_norm_counts(coder, dead).max()) for coder in coders for dead in (False, True))


def _delta_norm_counts(coder: CrosscoderReport, dead: bool) -> NDArray[np.intp]:
    is_dead = pl.col("verdict") == "dead"
    values = coder.latents.filter(is_dead if dead else ~is_dead)["delta_norm"].drop_nans().drop_nulls()
    return np.histogram(values.to_numpy(), bins=_EDGES)[0]


def scaling_scatter(coder: CrosscoderReport, limits: Limits) -> Figure:
    """nu_error against nu_reconstruction, a point per latent with both defined, with the two limits drawn."""
    nus = ("nu_error", "nu_reconstruction")
    defined = coder.latents.filter(*(pl.col(nu).is_not_null() & pl.col(nu).is_not_nan() for nu in nus))
    low, high = NU_RANGE
    traces, thinned = [], []
    for verdict, mark in VERDICT_MARKS.items():
        rows = defined.filter(pl.col("verdict") == verdict)
        if rows.height > MAX_POINTS:
            thinned.append(f"{MAX_POINTS:,} of {rows.height:,} {VERDICTS[verdict]} latents")
            rows = rows[np.linspace(0, rows.height - 1, MAX_POINTS).astype(int)]
        if rows.height:
            traces.append(_points(rows, verdict, mark))
    layout = scaling_layout(limits)
    outside = defined.filter(pl.any_horizontal(~pl.col(nu).is_between(low, high) for nu in nus)).height
    absent = coder.latents.height - defined.height
    notes = [f"Values are clipped to {fixed(low, 1)} to {fixed(high, 1)}, which moves {latents(outside)}."]
    if absent:
        notes.append(f"Not drawn: {latents(absent)} with an undefined nu, the dead ones among them.")
    if thinned:
        notes.append(f"Drawn: {' and '.join(thinned)}, evenly thinned.")
    description = f"Scatter of nu_error against nu_reconstruction of {defined.height} latents of {coder.title}."
    return Figure(figure_json(traces, layout, 440), description, " ".join(notes), zooms=True)


def scaling_layout(limits: Limits) -> dict[str, Any]:
    """Axes of nu_error against nu_reconstruction, with the two limits drawn."""
    low, high = NU_RANGE
    corner = {
        "type": "rect", "x0": low, "x1": limits.nu_error, "y0": low, "y1": limits.nu_reconstruction, "layer": "below",
        "fillcolor": "#d55e00", "opacity": 0.08, "line": {"width": 0},
    }  # fmt: skip
    axis = {"range": [low - 0.05, high + 0.05], "tickvals": [low, 0, 0.5, 1, high], "zeroline": False}
    limit = {"showarrow": False, "font": {"size": 11}}
    return {
        "annotations": [
            {"x": limits.nu_error, "y": high, "text": f"{limits.nu_error:g}", "xanchor": "left", **limit},
            {
                "x": high,
                "y": limits.nu_reconstruction,
                "text": f"{limits.nu_reconstruction:g}",
                "yanchor": "top",
                **limit,
            },
        ],
        "shapes": [corner, _rule("x", limits.nu_error, "dash"), _rule("y", limits.nu_reconstruction, "dash")],
        "xaxis": {**axis, "title": {"text": "nu_error"}},
        "yaxis": {**axis, "title": {"text": "nu_reconstruction"}},
        "legend": {**_LEGEND, "y": 1.01},
    }


def _points(rows: pl.DataFrame, verdict: str, mark: Mark) -> dict[str, Any]:
    hover = [
        f"latent {row['latent']}, {VERDICTS[verdict]}<br>delta_norm {number(row['delta_norm'])}"
        f"<br>nu_error {_estimate(row, 'nu_error')}<br>nu_reconstruction {_estimate(row, 'nu_reconstruction')}"
        f"<br>active on {share(row['frequency'])} of tokens"
        for row in rows.iter_rows(named=True)
    ]
    return {
        "type": "scatter", "mode": "markers", "name": f"{VERDICTS[verdict]} ({rows.height:,})", "showlegend": True,
        "x": rows["nu_error"].clip(*NU_RANGE).round(4).to_list(),
        "y": rows["nu_reconstruction"].clip(*NU_RANGE).round(4).to_list(),
        "text": hover, "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": mark.colour, "symbol": mark.symbol, "opacity": mark.opacity, "size": mark.size},
    }  # fmt: skip


def _estimate(row: Mapping[str, Any], nu: str) -> str:
    value, low, high = (row[f"{nu}{end}"] for end in ("", "_low", "_high"))
    return interval(Estimate(*(math.nan if number is None else number for number in (value, low, high))))


def behaviour_figure(coder: CrosscoderReport, question: str) -> Figure:
    """Held-out AUROC of the best latent of each pool with its interval, a row per behaviour."""
    results = [result for result in coder.behaviour_results() if result.question == question]
    pools = list(dict.fromkeys(pool for result in results for pool in result.scores))
    traces = []
    for place, pool in enumerate(pools):
        # Pools share a behaviour's row, a little apart so that their intervals do not hide each other.
        shift = 0.6 * ((place + 0.5) / len(pools) - 0.5)
        scored = {row + shift: result.scores[pool].auroc for row, result in enumerate(results) if pool in result.scores}
        scored = {row: auroc for row, auroc in scored.items() if not math.isnan(auroc.value)}
        mark = pool_mark(pool, pools)
        traces.append({
            "type": "scatter", "mode": "markers", "name": _plain(POOLS.get(pool, words(pool))), "showlegend": True,
            "x": [auroc.value for auroc in scored.values()], "y": list(scored),
            "text": [interval(auroc) for auroc in scored.values()], "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": mark.colour, "symbol": mark.symbol, "size": mark.size},
            "error_x": {
                "type": "data", "symmetric": False, "thickness": 1.5, "width": 0, "color": mark.colour,
                "array": [_length(auroc.high - auroc.value) for auroc in scored.values()],
                "arrayminus": [_length(auroc.value - auroc.low) for auroc in scored.values()],
            },
        })  # fmt: skip
    names = [words(result.behaviour) for result in results]
    layout = {
        "shapes": [_rule("x", 0.5, "dash")],
        "xaxis": {
            "title": {"text": "held-out AUROC (0.5 is chance)"}, "range": [0.25, 1.02],
            "zeroline": False,
        },
        "yaxis": {
            "tickvals": list(range(len(names))), "ticktext": [_plain(name) for name in names], "zeroline": False,
            "range": [len(names) - 0.5, -0.5], "showgrid": False, "automargin": True,
        },
        "legend": {**_LEGEND, "y": 1.01},
    }  # fmt: skip
    description = f"AUROC of the best of each pool of {coder.title} for {', '.join(names)}; the table has the values."
    return Figure(figure_json(traces, layout, 130 + 56 * len(names)), description)


def frequency_histogram(coder: CrosscoderReport) -> Figure | None:
    """Latents by how often they are active, from health.json; None when the file has no histogram."""
    histogram = coder.health.frequency_histogram
    if histogram is None or len(histogram.log10_edges) != len(histogram.counts) + 1:
        return None
    edges = np.asarray(histogram.log10_edges)
    occupied = np.flatnonzero(histogram.counts)
    low, high = (math.floor(edges[occupied[0]]), math.ceil(edges[occupied[-1] + 1])) if len(occupied) else (-3, 0)
    bars = {
        "type": "bar", "x": (edges[:-1] + edges[1:]) / 2, "y": histogram.counts, "width": np.diff(edges),
        "marker": {"color": "#0072b2", "line": {"width": 0}},
        "customdata": [f"{_percent(low)} to {_percent(high)} of tokens" for low, high in pairwise(edges)],
        "hovertemplate": "%{customdata}<br>%{y} latents<extra></extra>",
    }  # fmt: skip
    ticks = list(range(low, high + 1))
    layout = {
        "xaxis": {
            "title": {"text": "share of tokens a latent is active on"}, "tickvals": ticks,
            "ticktext": [_percent(float(tick)) for tick in ticks], "range": [low, high],
        },
        "yaxis": {"title": {"text": "latents"}},
    }  # fmt: skip
    return Figure(figure_json([bars], layout, 240), f"Histogram of how often the latents of {coder.title} are active.")


def figure_json(traces: list[dict[str, Any]], layout: dict[str, Any], height: int) -> str:
    """Serialise a figure; its axes get the lines that all figures have. Tests validate what this leaves unvalidated."""
    lines = {"gridcolor": "#dddddd", "linecolor": _RULE, "showline": True, "fixedrange": False}
    common = {
        "template": {}, "height": height, "margin": {"l": 58, "r": 16, "t": 40, "b": 58}, "dragmode": False,
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"family": _FONT, "size": 12},
        "hoverlabel": {"bgcolor": "#222222", "bordercolor": "#222222", "font": {"color": "#ffffff"}, "align": "left"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": _RULE, "activecolor": "#d55e00"},
    }  # fmt: skip
    axes = {"xaxis": {"ticks": "outside", "tickcolor": _RULE} | lines, "yaxis": {"title": {"standoff": 8}} | lines}
    axes = {name: style | layout[name] for name, style in axes.items()}
    return str(plotly.io.to_json({"data": traces, "layout": {**common, **layout, **axes}}, validate=False))


def _rule(axis: str, at: float, dash: str) -> dict[str, Any]:
    """A line across the whole plot at a value of one axis."""
    across = "y" if axis == "x" else "x"
    ends = {f"{axis}0": at, f"{axis}1": at, f"{across}0": 0, f"{across}1": 1, f"{across}ref": "paper"}
    return {"type": "line", **ends, "line": {"color": _RULE, "width": 1, "dash": dash}}


def _percent(exponent: float) -> str:
    """A power of ten as a percentage, however small."""
    return f"{np.format_float_positional(100 * 10**exponent, 2, fractional=False, trim='-')}%"


def _length(value: float) -> float:
    """An error bar's length: none where the interval is undefined."""
    return 0.0 if math.isnan(value) else max(0.0, value)


def _plain(text: str) -> str:
    """Plotly reads tags in labels; a name from a file has none."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
