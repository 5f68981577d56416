"""One self-contained HTML page of a run: reading it needs no other file and no network."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from crossdiff.files import write_text
from crossdiff.look.reading import LookResults
from crossdiff.report import concept_wording, figures, wording
from crossdiff.report.cards import Card, anchor_of, card_of
from crossdiff.report.chain import chain_section
from crossdiff.report.concept_cards import BehaviourLine, Group, behaviour_lines, groups
from crossdiff.report.concept_records import RunConcepts
from crossdiff.report.interpretation import score_table
from crossdiff.report.look import LookSection, look_section
from crossdiff.report.marks import Sign, pool_mark, sign_of
from crossdiff.report.overlap import shown_already
from crossdiff.report.overview import caveats, control_rows, facts, health_rows, title
from crossdiff.report.plotly_figures import PageFigure, for_page, plotly_script
from crossdiff.report.records import BehaviourResult, CrosscoderReport, RunReport
from crossdiff.report.templating import environment

OPEN_CARDS = 12
"""Cards of each group of concepts that are visible without unfolding."""
QUESTION_NOTES = {
    "before_answer": "Only positions up to the last template token before the answer count, so that the answer's own "
    "words cannot give it away.",
    "whole_conversation": "The easier question: the answer's own tokens count as well.",
}


class PoolCell(NamedTuple):
    """A pool's score in the behaviours table."""

    label: str
    auroc: str
    origin: str = ""
    anchor: str | None = None


class BehaviourRow(NamedTuple):
    """One behaviour of the behaviours table."""

    behaviour: str
    cases: str
    cells: tuple[PoolCell, ...]
    judgement: str
    verdict: str


class BehaviourTable(NamedTuple):
    """The behaviours under one question."""

    title: str
    explanation: str
    figure: PageFigure | None
    pools: tuple[Sign, ...]
    rows: tuple[BehaviourRow, ...]


class ConceptSection(NamedTuple):
    """Everything that a page shows of the concepts; the first `open` cards of each group are visible without unfolding."""

    introduction: list[str]
    controls: list[str]
    behaviours: tuple[BehaviourLine, ...]
    rungs: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    open: int


def concept_section(concepts: RunConcepts) -> ConceptSection:
    """The section of the concepts."""
    found = groups(concepts)
    cards = {card.number: card for group in found for card in group.cards}
    lines = behaviour_lines(concepts, cards)
    introduction, controls = concept_wording.introduction(concepts), concept_wording.controls(concepts)
    return ConceptSection(introduction, controls, lines, concept_wording.RUNGS, found, OPEN_CARDS)


class Section(NamedTuple):
    """Everything that the page shows of one crosscoder."""

    title: str
    anchor: str
    histogram: PageFigure | None
    scatter: PageFigure | None
    frequencies: PageFigure
    behaviour_tables: tuple[BehaviourTable, ...]
    selection: str
    cards: tuple[Card, ...]
    behaviour_cards: tuple[Card, ...]


def write_html(report: RunReport, path: Path) -> None:
    """Write the report's page; an existing page is replaced only once the new one is complete."""
    write_text(path, render_html(report))


def _look(look: LookResults, report: RunReport) -> LookSection:
    already = "" if report.concepts is None else shown_already(report.concepts.table)
    return look_section(look)._replace(concepts=already)


def render_html(report: RunReport) -> str:
    """The page's text."""
    coders = report.crosscoders
    highest = figures.highest_bar(coders)
    sections = [_section(coder, highest) for coder in coders]
    return environment().get_template("report.html.j2").render(
        title=title(report),
        facts=facts(report),
        headline=concept_wording.lead(report),
        concepts=None if report.concepts is None else concept_section(report.concepts),
        chain=None if report.concepts is None else chain_section(report.concepts, report.titles),
        look=None if report.look is None else _look(report.look, report),
        answer=wording.answer(report),
        one_decoder=wording.one_decoder(report),
        crosscoders=[coder.title for coder in coders],
        health=health_rows(report),
        controls=control_rows(report),
        sections=sections,
        detailed=sorted(sections, key=lambda section: section.anchor != report.primary.name),
        interpretation=score_table([(coder.title, coder.interpretation) for coder in coders if coder.interpretation]),
        caveats=caveats(report),
        datasets=report.datasets,
        labels=report.labels,
        whole=wording.whole,
        words=wording.words,
        plotly=Markup(plotly_script()),
    )  # fmt: skip


def _section(coder: CrosscoderReport, highest: int) -> Section:
    shown = {latent.latent for latent in (*coder.top.latents, *coder.behaviour_latents)}
    questions = dict.fromkeys(result.question for result in coder.behaviours)
    predicts = wording.predicted(coder.behaviours)
    cards, behaviour_cards = (
        tuple(card_of(coder.name, latent, predicts.get(latent.latent, ())) for latent in latents)
        for latents in (coder.top.latents, coder.behaviour_latents)
    )
    return Section(
        title=coder.title,
        anchor=coder.name,
        histogram=for_page(figures.delta_norm_histogram(coder, highest)) if coder.compares else None,
        scatter=for_page(figures.scaling_scatter(coder)) if coder.compares else None,
        frequencies=for_page(figures.frequency_histogram(coder)),
        behaviour_tables=tuple(_behaviour_table(coder, question, shown) for question in questions),
        selection=wording.selection(coder),
        cards=cards,
        behaviour_cards=behaviour_cards,
    )


def _behaviour_table(coder: CrosscoderReport, question: str, shown: set[int]) -> BehaviourTable:
    results = [result for result in coder.behaviours if result.question == question]
    pools = list(dict.fromkeys(pool for result in results for pool in result.scores))
    rows = []
    for result in results:
        cells = tuple(_pool_cell(coder, result, pool, shown) for pool in pools)
        ahead = "ahead" if wording.gain(result) >= wording.CLEAR_GAIN else "not-ahead"
        rows.append(
            BehaviourRow(wording.words(result.behaviour), wording.cases(result), cells, wording.judgement(result), ahead)
        )
    figure = for_page(figures.behaviour_figure(coder, question)) if question == "before_answer" else None
    signs = tuple(sign_of(wording.pool(pool), pool_mark(pool, pools)) for pool in pools)
    return BehaviourTable(wording.question(question), QUESTION_NOTES.get(question, ""), figure, signs, tuple(rows))


def _pool_cell(coder: CrosscoderReport, result: BehaviourResult, pool: str, shown: set[int]) -> PoolCell:
    score = result.scores.get(pool)
    if score is None:
        return PoolCell(wording.pool(pool), "not scored")
    origin = [] if score.latent is None else [f"latent {score.latent}"]
    if score.pool_size and score.pool_size > 1:
        origin.append(f"best of {score.pool_size:,}")
    anchor = None
    if pool == "chat_specific" and score.latent is not None and score.latent in shown:
        anchor = anchor_of(coder.name, score.latent)
    return PoolCell(wording.pool(pool), wording.interval(score.auroc), ", ".join(origin), anchor)
