"""The first look of a run as the dashboard shows it: texts tinted by KL, the distance between both models' predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from crossdiff.dashboard.editions import Edition
from crossdiff.errors import UserError
from crossdiff.look.reading import COMMAND, LookResults
from crossdiff.report import wording
from crossdiff.report.cards import LEVELS, ExampleView, Piece, pieces
from crossdiff.report.examples import Context, Token, visible
from crossdiff.report.look import LookSection, look_section
from crossdiff.sources import SOURCES
from crossdiff.text.chat import Flag
from crossdiff.text.token_texts import TokenText, token_text

PAGE = 5
"""Documents on a page of the texts."""
MOST_TOKENS = 1500
"""Tokens that are shown of a document."""
STRONGEST = 0.99
"""Quantile of the KL from which on the tint is the strongest."""
FLAGS = {"bos": Flag.BOS, "template": Flag.TEMPLATE, "user": Flag.USER, "assistant": Flag.ASSISTANT}


class Predicted(NamedTuple):
    """A text with one row per token, with the columns of `tokens.parquet` about what comes after it."""

    table: pl.DataFrame
    decode: Callable[[int], TokenText]


class RunLook:
    """The first look of one run; `name` is the crosscoder whose models it shares, "" if none is analysed."""

    def __init__(self, run: str, edition: Edition, directory: Path, found: LookResults, name: str) -> None:
        self.run = run
        self.edition = edition
        self.directory = directory
        self.found = found
        self.name = name
        self.path = f"/run/{run}/look"

    @cached_property
    def section(self) -> LookSection:
        """The section of the report."""
        return look_section(self.found)

    @property
    def tokens(self) -> pl.DataFrame:
        return self.found.tokens

    @cached_property
    def documents(self) -> pl.DataFrame:
        """One row per document, the largest mean KL first."""
        tokens = self.tokens.group_by("document").agg(
            pl.col("dataset").first().cast(pl.String), pl.col("kl").cast(pl.Float64).mean(), n_tokens=pl.len()
        )
        return tokens.sort("kl", "document", descending=[True, False])

    @cached_property
    def highest(self) -> float:
        """The KL of the strongest tint, in nats: where the models rarely differ, rounding errors stay without a tint."""
        kl = self.tokens["kl"].to_numpy()
        return float(max(np.quantile(kl, STRONGEST), kl.max() / 10))

    @cached_property
    def decode(self) -> Callable[[int], TokenText]:
        """The text of a token, by the tokenizer of the run's chat model.

        Raises:
            UserError: the tokenizer cannot be loaded, or is not the one of the look.
        """
        from crossdiff import diff
        from crossdiff.models.loading import load_tokenizer

        config = diff.open(self.directory).config
        tokenizer = load_tokenizer(config.chat, config.base)
        for token_id, text in self.found.words.select("token_id", "token").iter_rows():
            if (own := tokenizer.decode([token_id])) != text:
                raise UserError(
                    f"the tokenizer of {config.chat} is not the one of this look: token {token_id} is {own!r} in "
                    f"it, and was {text!r}; restore the model, or run `{COMMAND} {self.directory}` again"
                )
        return decoder(tokenizer)

    def text(self, document: int) -> list[ExampleView]:
        """One document tinted by KL: a view of each part that the models read by itself."""
        rows = self.tokens.filter(document=document).sort("sequence", "position")
        found = self.documents.row(by_predicate=pl.col("document") == document, named=True)
        parts = rows.head(MOST_TOKENS).partition_by("sequence", maintain_order=True)
        facts = [f"document {document}", found["dataset"], f"{rows.height:,} tokens", f"mean KL {found['kl']:.3f} nats"]
        if rows.height > MOST_TOKENS:
            facts.append(f"the first {MOST_TOKENS:,} tokens shown")
        origins = [" \N{MIDDLE DOT} ".join(facts), *[f"another part of document {document}, read by itself"] * (len(parts) - 1)]
        return [ExampleView(origin, self._tinted(part, self.decode)) for origin, part in zip(origins, parts, strict=True)]

    def prompt(self, predicted: Predicted) -> ExampleView:
        """A prompt tinted by KL, on the scale of the texts."""
        mean = predicted.table["kl"].to_numpy().mean()
        origin = f"{predicted.table.height} tokens \N{MIDDLE DOT} mean KL {mean:.3f} nats"
        return ExampleView(origin, self._tinted(predicted.table, predicted.decode))

    def _tinted(self, rows: pl.DataFrame, decode: Callable[[int], TokenText]) -> tuple[Piece, ...]:
        """Tokens tinted by the KL of what comes after them, which the title of each explains."""
        least = self.highest / (2 * LEVELS)
        tokens = tuple(
            Token(text, int(FLAGS.get(group, 0)), kl if kl > least else 0.0, token_id, data)
            for token_id, group, kl in rows.select("token_id", "group", "kl").iter_rows()
            for text, data in [decode(token_id)]
        )
        plain = pieces(Context(tokens, -1, False, False), self.highest or 1.0)
        titles = [after(row, decode) for row in rows.iter_rows(named=True)]
        return tuple(piece._replace(title="\n\n".join(titles[piece.first : piece.first + piece.n])) for piece in plain)


def decoder(tokenizer: Any) -> Callable[[int], TokenText]:
    """The text of each token by itself."""
    return lru_cache(None)(lambda token_id: token_text(tokenizer, token_id))


def after(row: Mapping[str, Any], decode: Callable[[int], TokenText]) -> str:
    """What both models expect after a token, and what follows."""
    models = [(source, row[f"top_{source}"], row[f"p_{source}"], row[f"log_{source}"]) for source in SOURCES]
    lines = [f"After {_quoted(decode(row['token_id']))}, KL {row['kl']:.2f} nats"]
    lines += [f"{source} model expects {_quoted(decode(top))} {wording.share(p)}" for source, top, p, _ in models]
    if row["next_id"] >= 0:
        own = ", ".join(f"{source} {_probability(log_p)}" for source, _, _, log_p in models)
        lines.append(f"what follows: {_quoted(decode(row['next_id']))} ({own})")
    return "\n".join(lines)


def _quoted(token: TokenText) -> str:
    return f"\N{LEFT DOUBLE QUOTATION MARK}{visible(token.text)}\N{RIGHT DOUBLE QUOTATION MARK}"


def _probability(log_p: float) -> str:
    return "does not have it" if math.isnan(log_p) else wording.share(math.exp(log_p))
