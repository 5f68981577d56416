"""The run's summary for a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossdiff.report import wording
from crossdiff.report.examples import context_of, visible
from crossdiff.report.model import CrosscoderReport, Latent, RunReport

N_LATENTS = 5
_SNIPPET_BEFORE = 7
_SNIPPET_AFTER = 3


def print_summary(report: RunReport, console: Console) -> None:
    """Print the crosscoders, the behaviours and the most chat-specific latents of a run, and where its page is."""
    console.print(_crosscoders(report))
    for coder in report.crosscoders:
        if coder.name in report.null:
            rates = (f"{wording.words(key)} {wording.null_rate(report, coder, key)}" for key in wording.NULL_RATES)
            console.print(Text(f"{coder.title}, shares of live latents: {'; '.join(rates)}"), soft_wrap=True)
    if report.primary.behaviour_results():
        console.print(_behaviours(report.primary))
    top = report.primary.top
    if top.latents:
        console.print(_latents(report.primary))
    if top.n_specific < len(top.latents) or not top.latents:
        console.print(Text(wording.selection(report.primary), style="dim"))
    console.print(Text(f"Report: {report.directory / 'report.html'}"), soft_wrap=True)


def _crosscoders(report: RunReport) -> Table:
    sources = list(dict.fromkeys(source for coder in report.crosscoders for source in coder.health.heldout.fve))
    sources = [source for source in sources if source != "total"]
    table = Table(title="Crosscoders", title_justify="left")
    table.add_column("")
    for heading in (*(f"FVE {source}" for source in sources), "L0", "dead", "chat_only by delta_norm"):
        table.add_column(heading, justify="right")
    for heading in ("chat_specific", "chat_specific_paper", "rotated"):
        table.add_column(heading, justify="right")
    for coder in report.crosscoders:
        heldout = coder.health.heldout
        table.add_row(
            Text(coder.title),
            *(wording.number(heldout.fve.get(source)) for source in sources),
            wording.number(heldout.l0),
            wording.share(heldout.dead_share),
            *(wording.count(coder, key) for key in ("chat_only", "chat_specific", "chat_specific_paper", "rotated")),
        )
    return table


def _behaviours(coder: CrosscoderReport) -> Table:
    """Before the answer where that was asked, else the file's first question."""
    results = coder.behaviour_results()
    question = next((result.question for result in results if result.question == "before_answer"), results[0].question)
    results = tuple(result for result in results if result.question == question)
    pools = list(dict.fromkeys(pool for result in results for pool in result.scores))
    title = f"Behaviours, {wording.QUESTIONS.get(question, wording.words(question)).lower()}: held-out AUROC, {coder.title}"
    table = Table(title=title, title_justify="left")
    table.add_column("behaviour")
    for pool in pools:
        table.add_column(wording.POOLS.get(pool, wording.words(pool)))
    table.add_column("in words", overflow="fold")
    for result in results:
        scores = (result.scores.get(pool) for pool in pools)
        cells = ("" if score is None else wording.interval(score.auroc) for score in scores)
        table.add_row(Text(wording.words(result.behaviour)), *cells, wording.judgement(result))
    return table


def _latents(coder: CrosscoderReport) -> Table:
    table = Table(title=f"Most chat-specific latents, {coder.title}", title_justify="left")
    for heading in ("latent", "verdict", "nu_error", "nu_reconstruction", "delta_norm"):
        table.add_column(heading, justify="left" if heading == "verdict" else "right")
    table.add_column("where it is most active", overflow="fold")
    for latent in coder.top.latents[:N_LATENTS]:
        values = (latent.nu_error.value, latent.nu_reconstruction.value, latent.delta_norm)
        table.add_row(
            str(latent.latent),
            wording.words(latent.verdict),
            *(wording.fixed(value) for value in values),
            _snippet(latent),
        )
    return table


def _snippet(latent: Latent) -> Text:
    """The tokens around the first example's maximum, the maximum between guillemets; control characters never pass."""
    text = Text()
    if not latent.examples:
        return text
    context = context_of(latent.examples[0], _SNIPPET_BEFORE, _SNIPPET_AFTER)
    for index, token in enumerate(context.tokens):
        shown = visible(token.text)
        if index == context.peak:
            text.append(" " * shown.startswith(" "))
            text.append(f"\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}{shown.strip()}", "bold")
            text.append("\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}", "bold")
        else:
            text.append(shown)
    return text
