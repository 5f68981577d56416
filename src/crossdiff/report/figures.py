"""The figures of one crosscoder, as records of what they show.

`plotly_figures` draws a record for the page, `print_figures` for print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from crossdiff.latents.ranking import PLAUSIBLE, RANKED, RECONSTRUCTIONS, title
from crossdiff.report.marks import BLUE, VERDICT_MARKS, VERMILLION, Mark, pool_mark
from crossdiff.report.records import CrosscoderReport, Limits
from crossdiff.report.tables import estimate
from crossdiff.report.wording import POOLS, VERDICTS, fixed, interval, latents, number, share, words

NU_RANGE = (-0.2, 1.5)
NUS = RANKED
AGAINST = " against ".join(map(title, NUS))
"""What the figures of latent scaling show, in words."""
CLASS_BORDERS = (0.1, 0.4, 0.6, 0.9)
"""Borders of the delta_norm classes base-only, shared and chat-only; what lies between is other."""
DELTA_NORM_EDGES = np.linspace(0, 1, 51)
DELTA_NORM_TITLE = "delta_norm (0 base-only, 1 chat-only)"
MAX_POINTS = 4000
"""Largest number of points of one verdict in a figure, which keeps the page light; more are thinned out evenly."""

Number = int | float


@dataclass(frozen=True, slots=True)
class Series:
    """Marks of one group: bars around `x` up to `y`, or points at (x, y) with optional error bars along x.

    Attributes:
        name: label in the legend; "" for none.
        hover: text of each mark, in lines.
        width: of each bar.
        hollow: bars have only an outline.
        low, high: ends of each point's error bar; NaN where it has none.
    """

    kind: Literal["bars", "points"]
    x: Sequence[Number] | NDArray[np.float64]
    y: Sequence[Number] | NDArray[np.intp]
    hover: Sequence[str]
    mark: Mark
    name: str = ""
    width: Sequence[Number] | NDArray[np.float64] = ()
    hollow: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its title, its ends, and its ticks by value. `range` and `ticks` are chosen by the renderer if missing."""

    title: str = ""
    range: tuple[Number, Number] | None = None
    ticks: Mapping[Any, str] = field(default_factory=dict)
    log: bool = False
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A line across the plot at a value of one axis, with a label at its end."""

    axis: Literal["x", "y"]
    at: Number
    dash: Literal["dot", "dash"]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """Everything that a figure shows.

    Attributes:
        height: in pixels of the page.
        description: what the figure shows, for captions and for readers who cannot see it.
        note: what the figure omits or moves.
        headings: texts above the plot, by their x.
        corner: right and upper end of a tinted rectangle that starts at the lower left of `NU_RANGE`.
        zooms: whether the page offers zooming.
    """

    series: tuple[Series, ...]
    x: Axis
    y: Axis
    height: int
    description: str = ""
    note: str = ""
    rules: tuple[Rule, ...] = ()
    headings: Mapping[float, str] = field(default_factory=dict)
    corner: tuple[Number, Number] | None = None
    zooms: bool = False


def delta_norm_histogram(coder: CrosscoderReport, highest: int) -> Figure:
    """Latents by delta_norm on a logarithmic count axis up to `highest`, with the borders of its classes."""
    edges = DELTA_NORM_EDGES
    series = []
    for name, dead in (("active", False), ("dead", True)):
        counts = _delta_norm_counts(coder, dead)
        if counts.sum() or not dead:
            bins = zip(pairwise(edges), counts.tolist(), strict=True)
            series.append(
                Series(
                    "bars",
                    x=(edges[:-1] + edges[1:]) / 2,
                    y=counts,
                    hover=[f"delta_norm {low:.2f} to {high:.2f}\n{name}: {latents(count)}" for (low, high), count in bins],
                    mark=Mark(VERMILLION if dead else BLUE, "square"),
                    name=name,
                    width=np.diff(edges),
                    hollow=dead,
                )
            )
    classes = ", ".join(f"{coder.count(key)} {words(key)}" for key in ("base_only", "shared", "chat_only", "other"))
    return Figure(
        tuple(series),
        x=Axis(DELTA_NORM_TITLE, (0, 1), {at: f"{at:g}" for at in (0, *CLASS_BORDERS, 1)}),
        y=Axis("latents (log scale)", (0.6, max(highest, 10) * 1.5), log=True),
        height=300,
        description=f"Histogram of delta_norm for the latents of {coder.title}: {classes}.",
        rules=tuple(Rule("x", border, "dot") for border in CLASS_BORDERS),
        headings={0.05: "base-only", 0.25: "other", 0.5: "shared", 0.75: "other", 0.95: "chat-only"},
    )


def highest_bar(coders: Sequence[CrosscoderReport]) -> int:
    """The largest count of any bar of the delta_norm histograms, so that they can share an axis."""
    return max(int(_delta_norm_counts(coder, dead).max()) for coder in coders for dead in (False, True))


def _delta_norm_counts(coder: CrosscoderReport, dead: bool) -> NDArray[np.intp]:
    is_dead = pl.col("verdict") == "dead"
    values = coder.latents.filter(is_dead if dead else ~is_dead)["delta_norm"].drop_nans().drop_nulls()
    return np.histogram(values.to_numpy(), bins=DELTA_NORM_EDGES)[0]


def with_both_nus(table: pl.DataFrame) -> pl.DataFrame:
    """The latents whose two ranked nu are defined."""
    return table.filter(*(pl.col(nu).is_not_null() & pl.col(nu).is_not_nan() for nu in NUS))


def scaling_scatter(coder: CrosscoderReport) -> Figure:
    """The two ranked nus against each other, one point per latent with both defined, with the two limits."""
    defined = with_both_nus(coder.latents)
    series, thinned = [], []
    for verdict, mark in VERDICT_MARKS.items():
        rows = defined.filter(pl.col("verdict") == verdict)
        if rows.height > MAX_POINTS:
            thinned.append(f"{MAX_POINTS:,} of {rows.height:,} {VERDICTS[verdict]} latents")
            rows = rows[np.linspace(0, rows.height - 1, MAX_POINTS).astype(int)]
        if rows.height:
            series.append(_points(rows, verdict, mark))
    note = scaling_note(coder.latents)
    if thinned:
        note += f" To keep the page light, the figure shows {' and '.join(thinned)}, evenly thinned."
    description = f"Scatter of {AGAINST} for {defined.height} latents of {coder.title}."
    return scaling_plot(coder.limits, tuple(series), description, note)


def scaling_plot(limits: Limits, series: tuple[Series, ...] = (), description: str = "", note: str = "") -> Figure:
    """The frame of the ranked nus: axes, limits and the tinted corner below both."""
    low, high = NU_RANGE
    ticks = {at: fixed(at, 1) if at in NU_RANGE else f"{at:g}" for at in (low, 0, 0.5, 1, high)}
    error, reconstruction = (Axis(title(nu), (low - 0.05, high + 0.05), ticks) for nu in NUS)
    rules = (
        Rule("x", limits.nu_error, "dash", f"{limits.nu_error:g}"),
        Rule("y", limits.nu_reconstruction, "dash", f"{limits.nu_reconstruction:g}"),
    )
    corner = (limits.nu_error, limits.nu_reconstruction)
    return Figure(series, error, reconstruction, 440, description, note, rules, corner=corner, zooms=True)


def scaling_note(table: pl.DataFrame) -> str:
    """How many latents the scatter moves to its edge, how many have a negative nu, and how many it cannot show."""
    defined = with_both_nus(table)
    low, high = NU_RANGE
    outside = defined.filter(pl.any_horizontal(~pl.col(nu).is_between(low, high) for nu in NUS)).height
    note = f"Values outside {fixed(low, 1)} to {fixed(high, 1)} are drawn at the edge ({latents(outside)})."
    negative, published = (defined.filter(pl.col(nu) < PLAUSIBLE[0]).height for nu in RECONSTRUCTIONS)
    if negative or published:
        shown, beside = map(title, RECONSTRUCTIONS)
        note += (
            f" {shown} is below {fixed(PLAUSIBLE[0], 1)} for {latents(negative)}, {beside} for {published:,}: there the base "
            "model has the chat direction with the opposite sign."
        )
    absent = table.height - defined.height
    return f"{note} Not drawn: {latents(absent)} with an undefined nu, which includes dead latents." if absent else note


def _points(rows: pl.DataFrame, verdict: str, mark: Mark) -> Series:
    hover = [
        "\n".join([
            f"latent {row['latent']}, {VERDICTS[verdict]}", f"delta_norm {number(row['delta_norm'])}",
            *(f"{title(nu)} {interval(estimate(row, nu))}" for nu in ("nu_error", *RECONSTRUCTIONS)),
            f"active on {share(row['frequency'])} of tokens",
        ])
        for row in rows.iter_rows(named=True)
    ]  # fmt: skip
    x, y = (rows[nu].clip(*NU_RANGE).round(4).to_list() for nu in NUS)
    return Series("points", x, y, hover, mark, f"{VERDICTS[verdict]} ({rows.height:,})")


def behaviour_figure(coder: CrosscoderReport, question: str) -> Figure:
    """Held-out AUROC of the best latent of each pool with its interval, one row per behaviour."""
    results = [result for result in coder.behaviours if result.question == question]
    pools = list(dict.fromkeys(pool for result in results for pool in result.scores))
    series = []
    for place, pool in enumerate(pools):
        # Pools share a behaviour's row, a little apart so that their intervals do not hide each other.
        shift = 0.6 * ((place + 0.5) / len(pools) - 0.5)
        scored = {row + shift: result.scores[pool].auroc for row, result in enumerate(results) if pool in result.scores}
        scored = {row: auroc for row, auroc in scored.items() if not math.isnan(auroc.value)}
        title = POOLS.get(pool, words(pool))
        series.append(
            Series(
                "points",
                x=[auroc.value for auroc in scored.values()],
                y=list(scored),
                hover=[
                    f"{words(results[round(row)].behaviour)}\n{title}: AUROC {interval(auroc)}" for row, auroc in scored.items()
                ],
                mark=pool_mark(pool, pools),
                name=title,
                low=[auroc.low for auroc in scored.values()],
                high=[auroc.high for auroc in scored.values()],
            )
        )
    names = [words(result.behaviour) for result in results]
    return Figure(
        tuple(series),
        x=Axis("held-out AUROC (0.5 is chance)", (0.25, 1.02)),
        y=Axis(range=(len(names) - 0.5, -0.5), ticks=dict(enumerate(names)), is_list=True),
        height=130 + 56 * len(names),
        description=f"AUROC of the best latent of each pool of {coder.title} for {', '.join(names)}; the table has the values.",
        rules=(Rule("x", 0.5, "dash"),),
    )


def frequency_histogram(coder: CrosscoderReport) -> Figure:
    """Latents by the share of tokens on which they are active."""
    histogram = coder.health.frequency_histogram
    edges = np.asarray(histogram.log10_edges)
    occupied = np.flatnonzero(histogram.counts)
    low, high = (math.floor(edges[occupied[0]]), math.ceil(edges[occupied[-1] + 1])) if len(occupied) else (-3, 0)
    bins = zip(pairwise(edges), histogram.counts, strict=True)
    bars = Series(
        "bars",
        x=(edges[:-1] + edges[1:]) / 2,
        y=histogram.counts,
        hover=[f"{_percent(low)} to {_percent(high)} of tokens\n{latents(count)}" for (low, high), count in bins],
        mark=Mark(BLUE, "square"),
        width=np.diff(edges),
    )
    ticks = {tick: _percent(tick) for tick in range(low, high + 1)}
    return Figure(
        (bars,),
        x=Axis("share of tokens a latent is active on", (low, high), ticks),
        y=Axis("latents"),
        height=240,
        description=f"Histogram of how often the latents of {coder.title} are active.",
    )


def _percent(exponent: Number) -> str:
    """A power of ten as a percentage, however small."""
    return f"{np.format_float_positional(100 * 10.0**exponent, 2, fractional=False, trim='-')}%"
