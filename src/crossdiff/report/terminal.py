"""The run's summary for a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossdiff.report import wording
from crossdiff.report.examples import context_of, visible
from crossdiff.report.overview import COUNTS
from crossdiff.report.records import CrosscoderReport, Latent, RunReport

N_LATENTS = 5
SHOWN_COUNTS = ("chat_only", "complete_shrinkage", "latent_decoupling", "chat_specific", "chat_specific_paper", "rotated")
STYLE: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
_SNIPPET_BEFORE = 9
_SNIPPET_AFTER = 4


def print_summary(report: RunReport, console: Console) -> None:
    """Print the crosscoders, the behaviours and the most chat-specific latents of a run, and the path of its page."""
    if report.same_model:
        console.print(Text(wording.SAME_MODEL, style="bold yellow"))
    console.print(_crosscoders(report))
    console.print(Text(
        "FVE: fraction of variance explained. L0: active latents per token. A latent has one direction per model. delta_norm "
        "compares their lengths; the other counts come from latent scaling, which checks whether the base model has the "
        "concept.",
        style="dim",
    ))  # fmt: skip
    if report.primary.behaviours:
        console.print(_behaviours(report.primary))
    top = report.primary.top
    if top.latents:
        console.print(_latents(report.primary))
    if top.n_specific < len(top.latents) or not top.latents:
        console.print(Text(wording.selection(report.primary), style="dim"))
    console.print(Text(f"Report: {report.directory / 'report.html'}"), soft_wrap=True)


def _crosscoders(report: RunReport) -> Table:
    """One row per measure and one column per crosscoder, so that nothing is cut off in a narrow terminal."""
    coders = report.crosscoders
    sources = dict.fromkeys(source for coder in coders for source in coder.health.heldout.fve if source != "total")
    table = Table(title="Crosscoders, on held-out tokens", **STYLE)
    table.add_column("")
    for coder in coders:
        table.add_column(Text(coder.title), justify="right")
    heldouts = [coder.health.heldout for coder in coders]
    for source in sources:
        table.add_row(Text(f"FVE {source}"), *(wording.number(heldout.fve.get(source)) for heldout in heldouts))
    table.add_row("L0", *(wording.number(heldout.l0) for heldout in heldouts))
    table.add_row("dead latents", *(wording.share(heldout.dead_share) for heldout in heldouts))
    for key in SHOWN_COUNTS:
        table.add_row(COUNTS[key][0], *(wording.count(coder, key) for coder in coders))
    for key in wording.NULL_RATES if report.null else ():
        table.add_row(f"{COUNTS[key][0]}, share", *(wording.null_rate(report, coder, key) for coder in coders))
    return table


def _behaviours(coder: CrosscoderReport) -> Table:
    """The scores before the answer if they were made, otherwise those of the table's first question."""
    results = coder.behaviours
    question = next((result.question for result in results if result.question == "before_answer"), results[0].question)
    results = tuple(result for result in results if result.question == question)
    pools = list(dict.fromkeys(pool for result in results for pool in result.scores))
    when = wording.question(question).lower()
    title = f"Behaviours, {when}, {coder.title}: held-out AUROC of the best of each pool; 0.5 is chance"
    table = Table(title=title, **STYLE)
    table.add_column("behaviour", no_wrap=True)
    for pool in pools:
        table.add_column(wording.pool(pool), justify="right", min_width=12)
    table.add_column("ahead of\nshared", justify="right")
    for result in results:
        scores = (result.scores.get(pool) for pool in pools)
        # Each interval has a line of its own, so that five columns fit into 80 characters.
        cells = ("" if score is None else wording.interval(score.auroc).replace(" ", "\n", 1) for score in scores)
        table.add_row(Text(wording.words(result.behaviour)), *cells, wording.fixed(wording.gain(result)))
    return table


def _latents(coder: CrosscoderReport) -> Table:
    table = Table(title=f"Most chat-specific latents, {coder.title}", **STYLE)
    table.add_column("latent", justify="right")
    table.add_column("verdict", no_wrap=True)
    for heading in ("nu\nerror", "nu recon-\nstruction", "delta\nnorm"):
        table.add_column(heading, justify="right", width=9)
    table.add_column("where it is most active", overflow="fold", ratio=1)
    for latent in coder.top.latents[:N_LATENTS]:
        values = (latent.nu_error.value, latent.nu_reconstruction.value, latent.delta_norm)
        numbers = (wording.fixed(value) for value in values)
        table.add_row(str(latent.latent), wording.words(latent.verdict), *numbers, _snippet(latent))
    return table


def _snippet(latent: Latent) -> Text:
    """The tokens around the maximum of the first example, the maximum in guillemets, without control characters."""
    text = Text()
    if not latent.examples:
        return text
    context = context_of(latent.examples[0], _SNIPPET_BEFORE, _SNIPPET_AFTER)
    for index, token in enumerate(context.tokens):
        shown = visible(token.text)
        if index == context.peak:
            text.append(" " * shown.startswith(" "))
            text.append(f"«{shown.strip()}»", "bold")
        else:
            text.append(shown)
    return text
