"""One self-contained HTML page of a run: no file and no host is needed to read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

import polars as pl
from markupsafe import Markup
from pydantic import JsonValue

from crossdiff.report import figures, wording
from crossdiff.report.cards import LEVELS, Card, Sign, anchor_of, card_of, sign_of
from crossdiff.report.environment import environment
from crossdiff.report.inline import OPEN_EXAMPLES
from crossdiff.report.interpretation import score_table
from crossdiff.report.records import BehaviourResult, CrosscoderReport, Limits, RunReport

DEAD_LIMIT = 0.2
"""Share of dead latents from which the page warns."""
LOW_FVE = 0.7
"""Fraction of variance explained below which the page warns."""
QUESTION_NOTES = {
    "before_answer": "Only positions up to the last template token before the answer count, so that the answer's own "
    "words cannot give it away.",
    "whole_conversation": "The easier question: the answer's own tokens count as well.",
}


@dataclass(frozen=True, slots=True)
class PoolCell:
    """A pool's score in the behaviours table."""

    label: str
    sign: Sign
    auroc: str
    origin: str
    anchor: str | None


@dataclass(frozen=True, slots=True)
class BehaviourRow:
    """One behaviour of the behaviours table."""

    behaviour: str
    cases: str
    cells: tuple[PoolCell, ...]
    judgement: str
    verdict: str


@dataclass(frozen=True, slots=True)
class BehaviourTable:
    """The behaviours under one question."""

    title: str
    explanation: str
    figure: figures.Figure | None
    pools: tuple[Sign, ...]
    rows: tuple[BehaviourRow, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """Everything the page shows of one crosscoder."""

    title: str
    anchor: str
    histogram: figures.Figure | None
    scatter: figures.Figure | None
    frequencies: figures.Figure | None
    behaviour_tables: tuple[BehaviourTable, ...]
    selection: str
    cards: tuple[Card, ...]
    behaviour_cards: tuple[Card, ...]


def write_html(report: RunReport, path: Path) -> None:
    """Write the report's page; an existing page is replaced only once the new one is complete."""
    page = render_html(report)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def render_html(report: RunReport) -> str:
    """The page's text."""
    others = [coder for coder in report.crosscoders if coder is not report.primary]
    highest = figures.highest_bar(report.crosscoders)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title(report),
            facts=facts(report),
            answer=wording.answer(report),
            crosscoders=[coder.title for coder in report.crosscoders],
            health=health_rows(report),
            controls=_control_rows(report),
            sections=[_section(coder, report.limits, highest) for coder in report.crosscoders],
            detailed=[coder.name for coder in (report.primary, *others)],
            interpretation=score_table([(c.title, c.interpretation) for c in report.crosscoders if c.interpretation]),
            caveats=caveats(report),
            datasets=report.datasets,
            open_examples=OPEN_EXAMPLES,
            levels=range(1, LEVELS + 1),
            whole=wording.whole,
            plotly=Markup(figures.plotly_script()),
        )
    )


def title(report: RunReport) -> str:
    chat, base = short(report.chat, "the chat model"), short(report.base, "its base")
    return f"What {chat} has and {base} has not"


def short(model: str | None, otherwise: str) -> str:
    """A model's name; of a local path its last two parts, since the rest says more about a disk than about a model."""
    if model is None:
        return otherwise
    path = PurePath(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def facts(report: RunReport) -> list[str]:
    facts = []
    if report.layer is not None:
        facts.append(f"residual stream after layer {report.layer}")
    if report.n_tokens is not None:
        facts.append(f"{wording.compact(report.n_tokens)} tokens")
    datasets = list(dict.fromkeys(share.dataset for share in report.datasets))
    if datasets:
        facts.append(", ".join(datasets))
    facts.append(" and ".join(coder.title for coder in report.crosscoders))
    return facts


def health_rows(report: RunReport) -> list[tuple[str, list[str]]]:
    """Rows of the health table: a name and a value per crosscoder."""
    coders = report.crosscoders
    sources = list(dict.fromkeys(source for coder in coders for source in coder.health.heldout.fve))
    rows = [("latents", [_latents_words(coder) for coder in coders])]
    rows += [(f"FVE, {source}", [wording.fve(coder, source) for coder in coders]) for source in sources]
    rows += [
        ("L0, active latents per token", [wording.number(coder.health.heldout.l0) for coder in coders]),
        ("dead latents", [_dead_words(coder) for coder in coders]),
        ("held-out tokens", [wording.whole(coder.health.heldout.n_tokens) for coder in coders]),
        ("tokens of massive norm, apart", [_massive_words(coder) for coder in coders]),
    ]
    for name, counts in (
        ("tokens trained on", [coder.health.training_tokens for coder in coders]),
        ("tokens analysed", [coder.health.analysed_tokens for coder in coders]),
    ):
        if any(count is not None for count in counts):
            rows.append((name, [wording.whole(count) for count in counts]))
    for key, name in (("chat_only", "chat-only"), ("base_only", "base-only"), ("shared", "shared"), ("other", "other")):
        rows.append((f"{name} by delta_norm", [wording.count(coder, key) for coder in coders]))
    rows += [
        ("chat-specific by latent scaling", [wording.count(coder, "chat_specific") for coder in coders]),
        ("the same by the paper's rule", [wording.count(coder, "chat_specific_paper") for coder in coders]),
        ("of them on template tokens almost only", [wording.count(coder, "template_only") for coder in coders]),
    ]
    if report.null:
        rows += [
            (f"{wording.words(key)}, share of live latents", [wording.null_rate(report, coder, key) for coder in coders])
            for key in wording.NULL_RATES
        ]
    for key in ("complete_shrinkage", "latent_decoupling", "rotated", "base_specific"):
        rows.append((wording.words(key), [wording.count(coder, key) for coder in coders]))
    movements = [_flat(coder.health.decoder_norm_movement) for coder in coders]
    for key in dict.fromkeys(key for movement in movements for key in movement):
        rows.append((f"decoder norms, {wording.words(key)}", [movement.get(key, "") for movement in movements]))
    return rows


def _latents_words(coder: CrosscoderReport) -> str:
    k = "" if coder.health.k is None else f", k {coder.health.k}"
    return f"{coder.health.n_latents:,} in d {coder.health.d_model:,}{k}"


def _dead_words(coder: CrosscoderReport) -> str:
    return f"{wording.share(coder.health.heldout.dead_share)} ({coder.health.heldout.n_dead:,})"


def _massive_words(coder: CrosscoderReport) -> str:
    massive = coder.health.heldout.massive
    if massive is None or massive.n_tokens == 0:
        return "none"
    values = ", ".join(f"FVE {source} {wording.number(value)}" for source, value in massive.fve.items())
    return f"{massive.n_tokens:,}" + (f" ({values})" if values else "")


def _control_rows(report: RunReport) -> list[tuple[str, list[str]]]:
    found = [_flat(coder.health.controls) for coder in report.crosscoders]
    keys = dict.fromkeys(key for control in found for key in control)
    return [(wording.words(key), [control.get(key, "") for control in found]) for key in keys]


def _flat(record: Mapping[str, JsonValue], prefix: str = "") -> dict[str, str]:
    """A nested record as one row a value, keys joined by a comma; `quantiles` says what lists beside it hold."""
    quantiles = record.get("quantiles")
    of = ""
    if isinstance(quantiles, list):
        of = f" (quantiles {', '.join(f'{at:.3g}' for at in quantiles if isinstance(at, int | float))})"
    rows: dict[str, str] = {}
    for key, value in record.items():
        name = f"{prefix}, {key}" if prefix else key
        if isinstance(value, dict):
            rows.update(_flat(value, name))
        elif isinstance(value, list):
            rows.update({} if key == "quantiles" else {name + of: _value_words(value)})
        else:
            rows[name] = _value_words(value)
    return rows


def _value_words(value: JsonValue) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_value_words(part) for part in value)
    return wording.number(value, 2) if isinstance(value, float) else wording.UNDEFINED


def _section(coder: CrosscoderReport, limits: Limits, highest: int) -> Section:
    results = coder.behaviour_results()
    shown = {latent.latent for latent in (*coder.top.latents, *coder.behaviour_latents)}
    questions = list(dict.fromkeys(result.question for result in results))
    predicts = wording.predicted(results)
    return Section(
        title=coder.title,
        anchor=coder.name,
        histogram=figures.delta_norm_histogram(coder, highest) if coder.compares else None,
        scatter=figures.scaling_scatter(coder, limits) if coder.compares else None,
        frequencies=figures.frequency_histogram(coder),
        behaviour_tables=tuple(_behaviour_table(coder, question, shown) for question in questions),
        selection=wording.selection(coder),
        cards=tuple(card_of(coder.name, latent, predicts.get(latent.latent, ())) for latent in coder.top.latents),
        behaviour_cards=tuple(
            card_of(coder.name, latent, predicts.get(latent.latent, ())) for latent in coder.behaviour_latents
        ),
    )


def _behaviour_table(coder: CrosscoderReport, question: str, shown: set[int]) -> BehaviourTable:
    results = [result for result in coder.behaviour_results() if result.question == question]
    pools = list(dict.fromkeys(pool for result in results for pool in result.scores))
    signs = {pool: _pool_sign(pool, pools) for pool in pools}
    rows = []
    for result in results:
        cells = tuple(_pool_cell(coder, result, pool, signs[pool], shown) for pool in pools)
        first = next(iter(result.scores.values()))
        cases = f"{first.n_positive:,} with, {first.n_negative:,} without"
        ahead = "ahead" if wording.gain(result) >= wording.CLEAR_GAIN else "not-ahead"
        rows.append(BehaviourRow(wording.words(result.behaviour), cases, cells, wording.judgement(result), ahead))
    title = wording.QUESTIONS.get(question, wording.words(question).capitalize())
    figure = figures.behaviour_figure(coder, question) if question == "before_answer" else None
    return BehaviourTable(title, QUESTION_NOTES.get(question, ""), figure, tuple(signs.values()), tuple(rows))


def _pool_sign(pool: str, pools: list[str]) -> Sign:
    mark = figures.pool_mark(pool, pools)
    return sign_of(wording.POOLS.get(pool, wording.words(pool)), mark)


def _pool_cell(coder: CrosscoderReport, result: BehaviourResult, pool: str, sign: Sign, shown: set[int]) -> PoolCell:
    score = result.scores.get(pool)
    if score is None:
        return PoolCell(sign.name, sign, "not scored", "", None)
    origin = "" if score.latent is None else f"latent {score.latent}"
    if score.pool_size and score.pool_size > 1:
        origin += f"{', ' if origin else ''}best of {score.pool_size:,}"
    anchor = None
    if pool == "chat_specific" and score.latent is not None and score.latent in shown:
        anchor = anchor_of(coder.name, score.latent)
    return PoolCell(sign.name, sign, wording.interval(score.auroc), origin, anchor)


def caveats(report: RunReport) -> list[str]:
    """What in this run weakens the page; what no run's page can show stands in the template."""
    caveats = [f"{name} is trained but not analysed, so it is not on this page." for name in report.not_analysed]
    notes: dict[str, list[str]] = {}
    for coder in report.crosscoders:
        heldout = coder.health.heldout
        if heldout.dead_share > DEAD_LIMIT:
            caveats.append(f"{wording.share(heldout.dead_share)} of the {coder.title} latents are dead.")
        low = {source: value for source, value in heldout.fve.items() if value is not None and value < LOW_FVE}
        if low:
            parts = ", ".join(f"{wording.number(value)} of {source}" for source, value in low.items())
            caveats.append(f"{coder.title} explains little of the variance ({parts}); what it misses is in no count.")
        for note in coder.health.notes:
            notes.setdefault(note, []).append(coder.title)
        if not coder.compares:
            caveats.append(f"{coder.title} has one decoder: {wording.ONE_DECODER}")
            continue
        if without := coder.latents.filter(pl.col("verdict") == "undecided").height:
            caveats.append(
                f"{coder.title}: {wording.latents(without)} undecided, because of too few active tokens, an undefined nu or "
                f"an interval that reaches over its limit; the latent table names the reason of each."
            )
        if coder.count("chat_only") == 0:
            caveats.append(
                f"No {coder.title} latent has delta_norm of 0.9 or above. In a short training decoder norms have "
                f"little time to part from a symmetric start, so this alone does not rule out chat-only concepts."
            )
        if not coder.behaviour_results():
            caveats.append(f"{coder.title} was not compared with labelled behaviours.")
    return caveats + [f"{' and '.join(titles)}: {note}" for note, titles in notes.items()]
