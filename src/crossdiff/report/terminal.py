"""The run's summary for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossdiff.latents.ranking import RANKED, bias_of
from crossdiff.report import concept_wording, wording
from crossdiff.report.concept_cards import plain_title
from crossdiff.report.concept_records import RunConcepts
from crossdiff.report.examples import Example
from crossdiff.report.overview import COUNTS
from crossdiff.report.records import CrosscoderReport, RunReport

N_LATENTS, N_CONCEPTS = 5, 10
SHOWN_COUNTS = ("chat_only", "complete_shrinkage", "latent_decoupling", "chat_specific", "chat_specific_paper", "rotated")
STYLE: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
_SNIPPET_BEFORE = 9
_SNIPPET_AFTER = 4
_CONCEPT_SNIPPET = 12, 6
"""Tokens before and after the strongest one."""


def print_summary(report: RunReport, console: Console) -> None:
    """Print a run's concepts, then its crosscoders, behaviours and most chat-specific latents, and the path of its page."""
    console.print(Text(concept_wording.lead(report), style="bold yellow" if report.same_model else "bold"))
    if report.concepts is not None:
        _print_concepts(report.concepts, console)
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
    if (massive := wording.massive(report)) is not None:
        console.print(Text(massive, style="yellow"))
    console.print(Text(f"Report: {report.directory / 'report.html'}"), soft_wrap=True)


def _print_concepts(concepts: RunConcepts, console: Console) -> None:
    """Print the concepts that predict a behaviour, then the largest."""
    found = concept_wording.leading(concepts)
    if not found:
        return
    verdict = wording.words(found[0].verdict) if len({concept.verdict for concept in found}) == 1 else ""
    title = f"Concepts{f', {verdict}' if verdict else ''}: where each is most active, its strongest token in «»"
    table = Table(title=title, **STYLE)
    table.add_column("active on", overflow="fold", ratio=1)
    table.add_column("found in\ntrainings", justify="right")
    table.add_column("held-out conversations\nthat it predicts, AUROC")
    for concept in found[:N_CONCEPTS]:
        predicts = "\n".join(map(concept_wording.prediction_words, concept_wording.told(concept)))
        table.add_row(
            concept.explanation or _snippet(concept.examples, *_CONCEPT_SNIPPET),
            f"{concept.n_trainings} of {concepts.n_trainings}", predicts.replace(", AUROC ", "\n"),
        )  # fmt: skip
    console.print(table)
    if len(found) > N_CONCEPTS:
        console.print(Text(f"{len(found) - N_CONCEPTS} more are on the page.", style="dim"))


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
        table.add_row(Text(f"FVE {source}"), *(wording.fve_value(heldout.fve, source) for heldout in heldouts))
    table.add_row("L0", *(wording.number(heldout.l0) for heldout in heldouts))
    table.add_row("never active on held-out", *(wording.share(heldout.dead_share) for heldout in heldouts))
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
    for heading in ("nu\nerror", f"nu recon-\nstruction\n{bias_of(RANKED[1])}", "delta\nnorm"):
        table.add_column(heading, justify="right", width=9)
    table.add_column("where it is most active", overflow="fold", ratio=1)
    for latent in coder.top.latents[:N_LATENTS]:
        values = (*(getattr(latent, nu).value for nu in RANKED), latent.delta_norm)
        numbers = (wording.fixed(value) for value in values)
        table.add_row(str(latent.latent), wording.words(latent.verdict), *numbers, _snippet(latent.examples))
    return table


def _snippet(examples: Sequence[Example], before: int = _SNIPPET_BEFORE, after: int = _SNIPPET_AFTER) -> Text:
    """The tokens around the maximum of the first example, the maximum in guillemets, without control characters."""
    if not examples:
        return Text()
    start, token, end = plain_title(examples[0], before, after)
    return Text.assemble(start, (f"«{token}»", "bold"), end)
