"""The first look as a section of the page: what both models predict differently, before any crosscoder is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from markupsafe import Markup

from crossdiff.errors import UserError
from crossdiff.files import write_text
from crossdiff.look.reading import COMMAND, LookResults, read_look
from crossdiff.report import wording
from crossdiff.report.examples import visible
from crossdiff.report.figures import Axis, Figure, Series
from crossdiff.report.marks import BLUE, VERMILLION, Mark
from crossdiff.report.plotly_figures import PageFigure, for_page, plotly_script
from crossdiff.report.tables import estimate
from crossdiff.report.templating import environment, fragment
from crossdiff.sources import SOURCES

N_WORDS, N_PLACES, N_ALIKE, N_PROMOTED = 12, 20, 3, 8
PAGE = "look.html"
MINUS = "\N{MINUS SIGN}"
TEXT_BEFORE = 90
"""Characters of text before a listed place."""
READINGS = {"diffmean": "difference of means", "probe": "logistic probe"}
KL = (
    "KL (Kullback-Leibler divergence) says how far apart the two models' predictions of the next token are, in nats: 0 where "
    "they are equal. At 1 nat, the tokens that the chat model expects are on average 2.7 times as probable in it as in the "
    "base model, at 2 nats 7.4 times."
)
REST = (
    "Brackets hold 95% intervals over documents. The residual stream is what each layer of a model reads from the layers "
    "before it, changes, and hands on; its values are the model's activations."
)


class Table(NamedTuple):
    """A table as text; a cell that holds tokens or phrases has a tuple of them."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | tuple[str, ...], ...], ...]


class TitledTable(NamedTuple):
    """Tokens or phrases that rise or fall, or what the models write after a prompt."""

    title: str
    table: Table


class Place(NamedTuple):
    """A position of large KL: the text up to it, and each model's likeliest next token with its probability."""

    document: int
    before: str
    base: tuple[str, str]
    chat: tuple[str, str]
    kl: str


class LookSection(NamedTuple):
    """Everything that a page shows of a first look; the tables are empty if the models do not differ.

    `kl` says what KL is, `explained` that and the other terms of the sentences.
    """

    sentences: list[str]
    kl: str = KL
    explained: str = f"{KL} {REST}"
    groups: Table | None = None
    words: tuple[TitledTable, ...] = ()
    places: tuple[Place, ...] = ()
    depth: PageFigure | None = None
    layers: Table | None = None
    directions: Table | None = None
    layer: int = 0
    concepts: str = ""
    steered: tuple[TitledTable, ...] = ()
    probes: Table | None = None


class NotebookLook(LookResults):
    """A first look that a notebook shows like the section of the report."""

    def _repr_html_(self) -> str:
        return fragment(look=look_section(self)._replace(depth=None))  # a notebook has no script that draws it


def notebook_look(run: Path) -> NotebookLook:
    """The first look of a run; raises `UserError` if it has none."""
    found = read_look(run / "look")
    if found is None:
        raise UserError(f"{run} has no first look; run `{COMMAND} {run}` first")
    return NotebookLook(**vars(found))


def look_section(look: LookResults) -> LookSection:
    """The section of a first look."""
    if look.summary.identical:
        return LookSection(look.sentences)
    return LookSection(
        look.sentences,
        groups=_groups(look.groups),
        words=tuple(_words(look)),
        places=tuple(_place(row) for row in _distinct(look.places).head(N_PLACES).iter_rows(named=True)),
        depth=for_page(depth_figure(look)),
        layers=_layers(look.depth),
        directions=_directions(look.directions),
        layer=look.summary.layer,
        steered=tuple(_steered(look.steered)),
        probes=_probes(look.probes) if look.probes.height else None,
    )


def write_look_page(run: Path, base: str, chat: str) -> None:
    """Write `look/look.html`, the section as a page of its own, into a run.

    Args:
        base, chat: names of the models.
    """
    found = read_look(run / "look")
    assert found is not None
    page = (
        environment()
        .get_template("look_page.html.j2")
        .render(
            title=f"First look: {base} and {chat}",
            facts=[f"{found.summary.n_tokens:,} tokens", f"{found.summary.n_documents:,} documents"],
            look=look_section(found),
            plotly=Markup(plotly_script()),
        )
    )
    write_text(run / "look" / PAGE, page)


def depth_figure(look: LookResults) -> Figure:
    """The KL that is there after each layer, with the recommended layer in another colour."""
    chosen = look.summary.recommended_layer
    series = []
    for name, mine, colour in (("earliest layer worth trying", True, VERMILLION), ("other layers", False, BLUE)):
        rows = [row for row in look.depth.iter_rows(named=True) if (row["layer"] == chosen) == mine]
        if rows:
            hover = [f"after layer {row['layer']}\n{wording.interval(estimate(row, 'kl'), 3)} nats" for row in rows]
            x, y = ([row[column] for row in rows] for column in ("layer", "kl"))
            series.append(Series("bars", x, y, hover, Mark(colour, "square"), name, width=[0.8] * len(rows)))
    step = max(1, math.ceil(look.depth.height / 12))
    return Figure(
        tuple(series),
        x=Axis("layer", (-0.6, look.depth.height - 0.4), {at: str(at) for at in range(0, look.depth.height, step)}),
        y=Axis("KL after the layer, in nats"),
        height=300,
        description=f"Bars of the KL that is present after each of {look.depth.height} layers; layer {chosen} is marked.",
        note="Point at a bar for its 95% interval.",
    )


def _words(look: LookResults) -> list[TitledTable]:
    """Tokens and phrases, those that rise before those that fall."""
    found = []
    for sign, what in ((1, "more"), (-1, "less")):
        words = look.words.filter(pl.col("rise") * sign > 0).sort("rise", descending=sign > 0).head(N_WORDS)
        phrases = look.phrases.filter(pl.col("gain") * sign > 0).sort("gain", descending=sign > 0).head(N_WORDS)
        tokens = Table(("token", "per 1,000", "documents"), tuple(
            ((visible(token),), _signed(rise), f"{n_documents:,}")
            for token, rise, n_documents in words.select("token", "per_thousand", "n_documents").rows()
        ))  # fmt: skip
        columns = ("phrase", "mean_gain", "n_places", "gain", "n_documents")
        texts = Table(("phrase", "nats each", "places", "in all", "documents"), tuple(
            ((visible(phrase),), _signed(each), f"{n_places:,}", f"{gain:+,.0f}".replace("-", MINUS), f"{n_documents:,}")
            for phrase, each, n_places, gain, n_documents in phrases.select(columns).rows()
        ))  # fmt: skip
        found.append(TitledTable(f"Tokens that the chat model expects {what} often", tokens))
        found.append(TitledTable(f"Phrases of the texts that it finds {what} probable", texts))
    return [each for each in found if each.table.rows]


def _groups(groups: pl.DataFrame) -> Table:
    """The mean KL of each dataset and kind of token, the largest share of the difference first."""
    total = groups["total_kl"].sum()
    rows = tuple(
        (
            row["dataset"], row["group"], f"{row['n_tokens']:,}", wording.interval(estimate(row, "kl")),
            wording.share(row["total_kl"] / total),
        )
        for row in groups.iter_rows(named=True)
    )  # fmt: skip
    return Table(("text", "kind of token", "tokens", "KL", "share of the difference"), rows)


def _distinct(places: pl.DataFrame) -> pl.DataFrame:
    """The places without those beyond the third at which the models expect the same two tokens."""
    same = ("base_says", "chat_says")
    return places.filter(pl.int_range(pl.len()).over(same) < N_ALIKE)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def _place(row: dict[str, Any]) -> Place:
    before = row["before"]
    cut = "\N{HORIZONTAL ELLIPSIS}" if len(before) > TEXT_BEFORE else ""
    base, chat = ((visible(row[f"{source}_says"]), wording.share(row[f"p_{source}"])) for source in SOURCES)
    return Place(row["document"], cut + visible(before[-TEXT_BEFORE:]), base, chat, f"{row['kl']:.2f}")


def _layers(depth: pl.DataFrame) -> Table:
    rows = tuple(
        (
            str(row["layer"]), wording.interval(estimate(row, "kl"), 3), wording.fixed(row["relative_norm"]),
            wording.fixed(row["centred_cosine"]), wording.number(row["effective_rank"]),
        )
        for row in depth.iter_rows(named=True)
    )  # fmt: skip
    return Table(("layer", "KL", "size of the difference", "similarity", "dimensions"), rows)


def _directions(directions: pl.DataFrame) -> Table:
    rows = []
    for row in directions.iter_rows(named=True):
        up, down = (tuple(map(visible, _whole(row[side])[:N_PROMOTED])) for side in ("chat_up", "chat_down"))
        size, of = (row["share"], " of the variance") if row["norm_share"] is None else (row["norm_share"], "")
        halves = "" if row["halves_cosine"] is None else wording.fixed(row["halves_cosine"])
        chance = f"{wording.fixed(row['top_logit'], 1)} / {wording.fixed(row['random_logit'], 1)}"
        rows.append((row["direction"], f"{row['n_tokens']:,}", f"{wording.share(size)}{of}", halves, chance, up, down))
    columns = ("direction", "tokens", "size", "halves agree", "top logit / by chance", "promotes", "demotes")
    return Table(columns, tuple(rows))


def _whole(tokens: list[str]) -> list[str]:
    """The tokens that are whole characters."""
    return [token for token in tokens if "\N{REPLACEMENT CHARACTER}" not in token]


def _steered(steered: pl.DataFrame) -> list[TitledTable]:
    """One table per prompt: what both models write, unsteered and with each direction."""
    columns = ("added", "base model writes", "chat model writes")
    found = []
    for prompt in steered["prompt"].unique(maintain_order=True):
        part = steered.filter(prompt=prompt)
        rows = []
        for direction, strength in part.select("direction", "strength").unique(maintain_order=True).rows():
            said = part.filter(pl.col("direction").eq_missing(direction), strength=strength)
            texts = (visible(said.filter(model=source)["text"][0]) for source in SOURCES)
            rows.append(("nothing" if direction is None else f"{direction}, strength {strength:g}", *texts))
        found.append(TitledTable(visible(prompt), Table(columns, tuple(rows))))
    return found


def _probes(probes: pl.DataFrame) -> Table:
    """One row per behaviour: the bag of words, then each reading of each model's activations."""
    columns = [("bag_of_words", None), *((name, read) for name in READINGS for read in ("base", "chat", "difference"))]
    rows = []
    for behaviour in probes["behaviour"].unique(maintain_order=True):
        scored = {(row["reading"], row["activations"]): row for row in probes.filter(behaviour=behaviour).iter_rows(named=True)}
        cells = (wording.interval(estimate(scored[column], "auroc")) for column in columns)
        rows.append((wording.words(behaviour), *cells))
    names = [f"{READINGS[name]}, {read}" for name, read in columns[1:]]
    return Table(("behaviour", wording.pool("bag_of_words"), *names), tuple(rows))
