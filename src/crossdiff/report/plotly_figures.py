"""Figures as Plotly's JSON, for the page.

Only the marks are coloured here; text, grid and rules follow the page's style sheet, which has a light and a dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np
import plotly.io
from plotly.offline import get_plotlyjs

from crossdiff.report.figures import NU_RANGE, Axis, Figure, Rule, Series
from crossdiff.report.marks import RULE, VERMILLION

LEGEND = {"orientation": "h", "yanchor": "bottom", "x": 0, "xanchor": "left", "y": 1.01}
_CLEAR = "rgba(0,0,0,0)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


class PageFigure(NamedTuple):
    """What a template needs of a figure: its JSON (data and layout), its description and note, and whether it zooms."""

    json: str
    description: str
    note: str = ""
    zooms: bool = False


def plotly_script() -> str:
    """The text of plotly.min.js, from the installed package."""
    return str(get_plotlyjs())


def for_page(figure: Figure) -> PageFigure:
    """A figure as the page draws it."""
    traces = [_bars(series) if series.kind == "bars" else _points(series) for series in figure.series]
    text = figure_json(traces, layout_of(figure), figure.height)
    return PageFigure(text, figure.description, figure.note, figure.zooms)


def layout_of(figure: Figure) -> dict[str, Any]:
    """Axes, rules and labels of a figure."""
    label = {"showarrow": False, "font": {"size": 11}}
    above = {"y": 1, "yref": "paper", "yanchor": "bottom"}
    notes = [{"x": x, "text": plain(text), **above, **label} for x, text in figure.headings.items()]
    for rule in figure.rules:
        if rule.label:
            end = {"y": NU_RANGE[1], "xanchor": "left"} if rule.axis == "x" else {"x": NU_RANGE[1], "xanchor": "right"}
            notes.append({rule.axis: rule.at, **end, "yanchor": "top", "text": plain(rule.label), **label})
    shapes = [_rule(rule) for rule in figure.rules]
    if figure.corner is not None:
        right, top = figure.corner
        shapes.insert(0, {
            "type": "rect", "x0": NU_RANGE[0], "x1": right, "y0": NU_RANGE[0], "y1": top, "layer": "below",
            "fillcolor": VERMILLION, "opacity": 0.08, "line": {"width": 0},
        })  # fmt: skip
    has_points = any(series.kind == "points" for series in figure.series) or figure.corner is not None
    axes = {f"{name}axis": _axis(axis, has_points) for name, axis in (("x", figure.x), ("y", figure.y))}
    # Headings lie between the plot and the legend.
    legend = LEGEND | {"y": 1.1} if figure.headings else LEGEND
    return {"barmode": "overlay", "shapes": shapes, "annotations": notes, "legend": legend, **axes}


def figure_json(traces: Iterable[dict[str, Any]], layout: Mapping[str, Any], height: int) -> str:
    """Serialise a figure with the look that all figures share. Tests validate what this leaves unvalidated."""
    lines = {"gridcolor": "#dddddd", "linecolor": RULE, "showline": True, "fixedrange": False}
    common = {
        "template": {}, "height": height, "margin": {"l": 58, "r": 16, "t": 40, "b": 58}, "dragmode": False,
        "paper_bgcolor": _CLEAR, "plot_bgcolor": _CLEAR, "font": {"family": _FONT, "size": 12},
        "hoverlabel": {"bgcolor": "#222222", "bordercolor": "#222222", "font": {"color": "#ffffff"}, "align": "left"},
        "modebar": {"bgcolor": _CLEAR, "color": RULE, "activecolor": VERMILLION},
    }  # fmt: skip
    axes = {"xaxis": {"ticks": "outside", "tickcolor": RULE} | lines, "yaxis": {"title": {"standoff": 8}} | lines}
    axes = {name: style | layout[name] for name, style in axes.items()}
    return str(plotly.io.to_json({"data": list(traces), "layout": {**common, **layout, **axes}}, validate=False))


def plain(text: str) -> str:
    """A label for Plotly, which would read tags in it."""
    return escape(text, quote=False)


def _lines(series: Series) -> list[str]:
    return [plain(text).replace("\n", "<br>") for text in series.hover]


def _bars(series: Series) -> dict[str, Any]:
    outline = {"color": series.mark.colour, "width": 1} if series.hollow else {"width": 0}
    return {
        "type": "bar", "name": plain(series.name), "x": series.x, "y": series.y, "width": series.width,
        "customdata": _lines(series), "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"color": _CLEAR if series.hollow else series.mark.colour, "line": outline},
    }  # fmt: skip


def _points(series: Series) -> dict[str, Any]:
    mark = series.mark
    trace = {
        "type": "scatter", "mode": "markers", "name": plain(series.name), "showlegend": True, "x": series.x, "y": series.y,
        "text": _lines(series), "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": mark.colour, "symbol": mark.symbol, "opacity": mark.opacity, "size": mark.size},
    }  # fmt: skip
    if series.low:
        trace["error_x"] = {
            "type": "data", "symmetric": False, "thickness": 1.5, "width": 0, "color": mark.colour,
            "array": error_lengths(series.x, series.high), "arrayminus": error_lengths(series.low, series.x),
        }  # fmt: skip
    return trace


def error_lengths(low: Iterable[float], high: Iterable[float]) -> list[float]:
    """Length of each error bar; 0 where the interval is undefined."""
    lengths = (b - a for a, b in zip(low, high, strict=True))
    return [0.0 if math.isnan(length) else max(0.0, length) for length in lengths]


def _axis(axis: Axis, has_points: bool) -> dict[str, Any]:
    style: dict[str, Any] = {"zeroline": False} if has_points else {}
    if axis.title:
        style["title"] = {"text": axis.title}
    if axis.range is not None:
        style["range"] = np.log10(axis.range).tolist() if axis.log else list(axis.range)
    if axis.ticks:
        style |= {"tickvals": list(axis.ticks), "ticktext": [plain(label) for label in axis.ticks.values()]}
    if axis.log:
        style |= {"type": "log", "dtick": 1}
    if axis.is_list:
        style |= {"showgrid": False, "automargin": True}
    return style


def _rule(rule: Rule) -> dict[str, Any]:
    across = "y" if rule.axis == "x" else "x"
    ends = {f"{rule.axis}0": rule.at, f"{rule.axis}1": rule.at, f"{across}0": 0, f"{across}1": 1, f"{across}ref": "paper"}
    return {"type": "line", **ends, "line": {"color": RULE, "width": 1, "dash": rule.dash}}
