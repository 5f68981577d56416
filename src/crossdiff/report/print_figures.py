"""The page's figures for print: PDF and SVG at the width of a column, with captions that state the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from crossdiff.files import write_text
from crossdiff.report import figures, wording
from crossdiff.report.figures import NU_RANGE, Axis, Figure, Rule, Series
from crossdiff.report.look import depth_figure
from crossdiff.report.marks import RULE, VERMILLION
from crossdiff.report.plotly_figures import error_lengths
from crossdiff.report.records import CrosscoderReport, RunReport

WIDTH = 3.4
"""Inches: one column of a two-column page."""
PIXELS_PER_INCH = 115
"""Converts the height of a figure on the page."""
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
"""The formats, each without the metadata that would differ between two identical runs."""


def write_figures(report: RunReport, folder: Path) -> None:
    """Write every figure of the report into a new folder as `NAME.pdf` and `NAME.svg`, and `captions.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = ["# Captions", ""]
    highest = figures.highest_bar(report.crosscoders)
    for coder in report.crosscoders:
        for kind, figure, caption in _figures_of(coder, report, highest):
            name = f"{coder.name}-{kind}"
            draw(figure, folder / name)
            captions += [f"**{name}.** {caption}", ""]
    if report.look is not None and not report.look.summary.identical:
        depth = depth_figure(report.look)
        draw(depth, folder / "first-look-depth")
        captions += [f"**first-look-depth.** {depth.description} {' '.join(report.look.sentences)}", ""]
    write_text(folder / "captions.md", "\n".join(captions))


def _figures_of(coder: CrosscoderReport, report: RunReport, highest: int) -> list[tuple[str, Figure, str]]:
    """The figures of one crosscoder with their captions."""
    about = _about(coder)
    found = []
    if coder.compares:
        norms, scatter = figures.delta_norm_histogram(coder, highest), figures.scaling_scatter(coder)
        found = [
            ("delta-norm", norms, f"{norms.description} Dotted lines: borders of the classes. {about}"),
            ("latent-scaling", scatter, f"{scatter.description} {_verdicts(coder)} {scatter.note} {about}"),
        ]
    frequencies = figures.frequency_histogram(coder)
    heldout = coder.health.heldout
    activity = f"On average {wording.number(heldout.l0)} latents are active per token; {heldout.n_dead:,} are never active."
    found.append(("frequency", frequencies, f"{frequencies.description} {activity} {about}"))
    if any(result.question == "before_answer" for result in coder.behaviours):
        found.append(("behaviours", figures.behaviour_figure(coder, "before_answer"), f"{_behaviours(coder)} {about}"))
    return found


def _about(coder: CrosscoderReport) -> str:
    """What the numbers of a caption describe."""
    fve = ", ".join(f"{wording.fve(coder, source)} {source}" for source in coder.health.heldout.fve if source != "total")
    return (
        f"Crosscoder {coder.title}, {coder.health.n_latents:,} latents, layer {coder.health.layer}; held-out fraction of "
        f"variance explained (FVE) {fve}; active latents per token (L0) {wording.number(coder.health.heldout.l0)}; "
        f"{wording.whole(coder.health.heldout.n_tokens)} held-out tokens."
    )


def _verdicts(coder: CrosscoderReport) -> str:
    counts = coder.latents["verdict"].value_counts(sort=True).rows()
    listed = ", ".join(f"{count:,} {wording.words(verdict)}" for verdict, count in counts)
    limits = coder.limits
    return f"Dashed lines: the limits {limits.nu_error:g} and {limits.nu_reconstruction:g}. Verdicts: {listed}."


def _behaviours(coder: CrosscoderReport) -> str:
    parts = []
    for result in coder.behaviours:
        if result.question == "before_answer":
            scores = ", ".join(f"{wording.pool(pool)} {wording.interval(score.auroc)}" for pool, score in result.scores.items())
            parts.append(f"{wording.words(result.behaviour)} ({wording.cases(result)}): {scores}")
    return (
        "How well the best latent of each pool predicts a behaviour before the answer begins: AUROC on held-out "
        f"conversations with 95% bootstrap intervals; 0.5 is chance. {'; '.join(parts)}."
    )


def draw(figure: Figure, path: Path) -> None:
    """Draw a figure into `path` with each of the formats' endings."""
    with rc_context(STYLE):
        canvas = Canvas(figsize=(WIDTH, figure.height / PIXELS_PER_INCH), layout="constrained")
        axes = canvas.subplots()
        for series in figure.series:
            _bars(axes, series) if series.kind == "bars" else _points(axes, series)
        _axis(axes, "x", figure.x)
        _axis(axes, "y", figure.y)
        if figure.corner is not None:
            right, top = figure.corner
            low = NU_RANGE[0]
            axes.fill_between([low, right], low, top, color=VERMILLION, alpha=0.08, lw=0)
        for rule in figure.rules:
            _rule(axes, rule)
        for x, text in figure.headings.items():
            axes.annotate(
                _words(text), (x, 1), xycoords=("data", "axes fraction"), fontsize=6.5, ha="center", va="bottom",
                annotation_clip=False,
            )  # fmt: skip
        if sum(bool(series.name) for series in figure.series) > 1:
            canvas.legend(loc="outside upper left", ncols=2, handletextpad=0.3, columnspacing=1.0)
        for ending, metadata in FORMATS.items():
            canvas.savefig(path.with_suffix(f".{ending}"), metadata=metadata)


def _bars(axes: Axes, series: Series) -> None:
    colour = series.mark.colour
    axes.bar(
        series.x, series.y, series.width, label=_words(series.name), color="none" if series.hollow else colour,
        edgecolor=colour if series.hollow else "none", linewidth=0.6 if series.hollow else 0,
    )  # fmt: skip


def _points(axes: Axes, series: Series) -> None:
    mark = series.mark
    if series.low:
        lengths = [error_lengths(series.low, series.x), error_lengths(series.x, series.high)]
        axes.errorbar(series.x, series.y, xerr=lengths, fmt="none", ecolor=mark.colour, lw=0.8)
    hollow = mark.symbol.endswith("-open")
    colours: dict[str, Any] = {"facecolors": "none", "edgecolors": mark.colour} if hollow else {"color": mark.colour}
    axes.scatter(
        series.x, series.y, s=(mark.size * 0.45) ** 2, marker=MARKERS[mark.symbol], linewidths=0.6, alpha=mark.opacity,
        label=_words(series.name), rasterized=len(series.x) > 2000, **colours,
    )  # fmt: skip


def _axis(axes: Axes, name: str, axis: Axis) -> None:
    getattr(axes, f"set_{name}label")(_words(axis.title))
    if axis.log:
        getattr(axes, f"set_{name}scale")("log")
    if axis.range is not None:
        getattr(axes, f"set_{name}lim")(*axis.range)
    if axis.ticks:
        getattr(axes, f"set_{name}ticks")(list(axis.ticks), [_words(label) for label in axis.ticks.values()])


def _rule(axes: Axes, rule: Rule) -> None:
    style: dict[str, Any] = {"color": RULE, "lw": 0.6, "ls": DASHES[rule.dash], "zorder": 0}
    axes.axvline(rule.at, **style) if rule.axis == "x" else axes.axhline(rule.at, **style)
    if rule.label:
        at = (rule.at, NU_RANGE[1]) if rule.axis == "x" else (NU_RANGE[1], rule.at)
        axes.annotate(_words(rule.label), at, fontsize=6.5, ha="left" if rule.axis == "x" else "right", va="top")


def _words(text: str) -> str:
    """A label for Matplotlib, which would read mathematics between dollar signs."""
    return text.replace("$", r"\$")
