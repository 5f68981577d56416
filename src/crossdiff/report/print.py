"""The page's figures for print: PDF and SVG at the width of a column, with captions that state the numbers.

They are drawn from the very figures of the page (`figures.py`), of which this module understands bars, markers with error bars,
lines and rectangles over the plot, and annotations; a caption is made of the same report.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from crossdiff.report import figures, wording
from crossdiff.report.records import CrosscoderReport, RunReport

WIDTH = 3.4
"""Inches: one column of a two-column page."""
PIXELS_PER_INCH = 115
"""Of the page's figure heights."""
STYLE: Any = {
    "font.size": 8, "font.family": "serif", "mathtext.fontset": "dejavuserif", "axes.linewidth": 0.6, "legend.frameon": False,
    "legend.fontsize": 7, "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "crossdiff", "axes.axisbelow": True,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
MARKERS = {
    "circle": "o", "circle-open": "o", "diamond": "D", "square": "s", "star": "*", "triangle-up": "^", "x": "x",
}  # fmt: skip
DASHES = {"dot": ":", "dash": "--"}
FORMATS = {"pdf": {"CreationDate": None, "Producer": None}, "svg": {"Date": None}}
"""Formats, and metadata that would differ from one time to the next."""


def write_figures(report: RunReport, folder: Path) -> None:
    """Write every figure of the report as `NAME.pdf` and `NAME.svg` into a new folder, and `captions.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = ["# Captions", ""]
    highest = figures.highest_bar(report.crosscoders)
    for coder in report.crosscoders:
        for kind, figure, caption in _figures_of(coder, report, highest):
            name = f"{coder.name}-{kind}"
            draw(json.loads(figure.json), folder / name)
            captions += [f"**{name}.** {caption}", ""]
    (folder / "captions.md").write_text("\n".join(captions), encoding="utf-8")


def _figures_of(coder: CrosscoderReport, report: RunReport, highest: int) -> list[tuple[str, figures.Figure, str]]:
    """The figures of one crosscoder with their captions."""
    about = _about(coder, report)
    found = []
    if coder.compares:
        norms, scatter = figures.delta_norm_histogram(coder, highest), figures.scaling_scatter(coder, report.limits)
        found = [
            ("delta-norm", norms, f"{norms.description} Dotted: borders of the classes. {about}"),
            ("latent-scaling", scatter, f"{scatter.description} {_verdicts(coder, report)} {scatter.note} {about}"),
        ]
    if (frequencies := figures.frequency_histogram(coder)) is not None:
        heldout = coder.health.heldout
        caption = (
            f"{frequencies.description} {wording.number(heldout.l0)} are active per token, {heldout.n_dead:,} are dead. {about}"
        )
        found.append(("frequency", frequencies, caption))
    if any(result.question == "before_answer" for result in coder.behaviour_results()):
        found.append(("behaviours", figures.behaviour_figure(coder, "before_answer"), f"{_behaviours(coder)} {about}"))
    return found


def _about(coder: CrosscoderReport, report: RunReport) -> str:
    """What the numbers are of."""
    fve = ", ".join(f"{wording.fve(coder, source)} {source}" for source in coder.health.heldout.fve if source != "total")
    return (
        f"{coder.title}, {coder.health.n_latents:,} latents, layer {coder.health.layer}; held-out FVE {fve}; "
        f"L0 {wording.number(coder.health.heldout.l0)}; {wording.whole(coder.health.heldout.n_tokens)} held-out tokens."
    )


def _verdicts(coder: CrosscoderReport, report: RunReport) -> str:
    counts = coder.latents["verdict"].value_counts(sort=True).rows()
    listed = ", ".join(f"{count:,} {wording.words(verdict)}" for verdict, count in counts)
    limits = report.limits
    return f"Dashed: the limits {limits.nu_error:g} and {limits.nu_reconstruction:g}. Verdicts: {listed}."


def _behaviours(coder: CrosscoderReport) -> str:
    parts = []
    for result in coder.behaviour_results():
        if result.question == "before_answer":
            scores = ", ".join(
                f"{wording.POOLS.get(pool, wording.words(pool))} {wording.interval(score.auroc)}"
                for pool, score in result.scores.items()
            )
            first = next(iter(result.scores.values()))
            parts.append(
                f"{wording.words(result.behaviour)} ({first.n_positive:,} with, {first.n_negative:,} without): {scores}"
            )
    return f"Held-out AUROC of the best of each pool, tokens before the answer, 95% bootstrap intervals. {'; '.join(parts)}."


def draw(figure: Mapping[str, Any], path: Path) -> None:
    """Draw a figure of the page, as plain data, into `path` with each of the formats' endings."""
    layout = figure["layout"]
    with rc_context(STYLE):
        canvas = Canvas(figsize=(WIDTH, layout["height"] / PIXELS_PER_INCH), layout="constrained")
        axes = canvas.subplots()
        for trace in figure["data"]:
            _bars(axes, trace) if trace["type"] == "bar" else _markers(axes, trace)
        _axis(axes, "x", layout["xaxis"])
        _axis(axes, "y", layout["yaxis"])
        for shape in layout.get("shapes", ()):
            _shape(axes, shape)
        for note in layout.get("annotations", ()):
            _annotation(axes, note)
        if sum(bool(trace.get("name")) for trace in figure["data"]) > 1:
            canvas.legend(loc="outside upper left", ncols=2, handletextpad=0.3, columnspacing=1.0)
        for ending, metadata in FORMATS.items():
            canvas.savefig(path.with_suffix(f".{ending}"), metadata=metadata)


def _bars(axes: Axes, trace: Mapping[str, Any]) -> None:
    marker = trace["marker"]
    hollow = str(marker["color"]).startswith("rgba(0,0,0,0")
    outline = marker["line"]
    axes.bar(
        _values(trace["x"]), _values(trace["y"]), _values(trace["width"]), label=trace.get("name"),
        color="none" if hollow else marker["color"], edgecolor=outline.get("color", "none"), linewidth=outline["width"] * 0.6,
    )  # fmt: skip


def _markers(axes: Axes, trace: Mapping[str, Any]) -> None:
    marker = trace["marker"]
    x, y = _values(trace["x"]), _values(trace["y"])
    if (error := trace.get("error_x")) is not None:
        axes.errorbar(
            x, y, xerr=[_values(error["arrayminus"]), _values(error["array"])], fmt="none", ecolor=error["color"], lw=0.8
        )
    hollow = marker["symbol"].endswith("-open")
    colours = {"facecolors": "none", "edgecolors": marker["color"]} if hollow else {"color": marker["color"]}
    shape = {"s": (marker["size"] * 0.45) ** 2, "marker": MARKERS[marker["symbol"]], "linewidths": 0.6}
    opacity = marker.get("opacity", 1.0)
    axes.scatter(x, y, label=trace["name"], alpha=opacity, rasterized=len(x) > 2000, **shape, **colours)


def _values(found: Any) -> Any:
    """The numbers of a trace; Plotly writes arrays as base64."""
    if isinstance(found, Mapping):
        return np.frombuffer(base64.b64decode(found["bdata"]), dtype=found["dtype"])
    return found


def _axis(axes: Axes, name: str, style: Mapping[str, Any]) -> None:
    getattr(axes, f"set_{name}label")(_words(style.get("title", {}).get("text", "")))
    low, high = style.get("range", (None, None))
    if style.get("type") == "log":
        getattr(axes, f"set_{name}scale")("log")
        low, high = 10**low, 10**high
    if low is not None:
        getattr(axes, f"set_{name}lim")(low, high)
    if "tickvals" in style:
        labels = style.get("ticktext") or [f"{value:g}" for value in style["tickvals"]]
        getattr(axes, f"set_{name}ticks")(style["tickvals"], [_words(label) for label in labels])


def _shape(axes: Axes, shape: Mapping[str, Any]) -> None:
    """A rule across the plot, or a tinted rectangle."""
    if shape["type"] == "rect":
        edges = {"color": shape["fillcolor"], "alpha": shape["opacity"], "lw": 0}
        axes.axvspan(shape["x0"], shape["x1"], *_shares(axes, shape["y0"], shape["y1"]), **edges)
        return
    line = {"color": shape["line"]["color"], "lw": 0.6, "ls": DASHES[shape["line"]["dash"]], "zorder": 0}
    if shape.get("yref") == "paper":
        axes.axvline(shape["x0"], **line)
    else:
        axes.axhline(shape["y0"], **line)


def _shares(axes: Axes, low: float, high: float) -> tuple[float, float]:
    """Two values of the y axis as shares of its length."""
    bottom, top = axes.get_ylim()
    return (low - bottom) / (top - bottom), (high - bottom) / (top - bottom)


def _annotation(axes: Axes, note: Mapping[str, Any]) -> None:
    outside = note.get("yref") == "paper"
    axes.annotate(
        _words(note["text"]), (note["x"], note["y"]), xycoords=("data", "axes fraction") if outside else "data", fontsize=6.5,
        ha=note.get("xanchor", "center" if outside else "right"), va=note.get("yanchor", "top"), annotation_clip=False,
    )  # fmt: skip


def _words(text: str) -> str:
    """Plotly's labels as plain text; a dollar sign would begin mathematics."""
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("$", r"\$")
