"""A finished first look, opened for reading."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict, ValidationError

from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.integrity import intact, read_parquet

COMMAND = "crossdiff look"
NARROW = 0.2
"""Relative norm of the difference below which the look advises to weigh it: between 0.07 and 0.18, where a BatchTopK crosscoder
without weight finds next to nothing, and 0.26, where it finds what was planted (docs/organisms.md)."""
COLUMNS = {
    "places": ("kl", "document", "dataset", "before", "base_says", "p_base", "chat_says", "p_chat"),
    "groups": ("dataset", "group", "n_tokens", "kl", "kl_low", "kl_high", "total_kl"),
    "words": ("token_id", "token", "rise", "per_thousand", "n_documents"),
    "phrases": ("phrase", "gain", "mean_gain", "n_places", "n_documents"),
    "depth": ("layer", "relative_norm", "centred_cosine", "effective_rank", "kl", "kl_low", "kl_high"),
    "directions": (
        "direction", "n_tokens", "norm_share", "halves_cosine", "share", "chat_up", "chat_down", "top_logit", "random_logit",
    ),
    "steered": ("direction", "model", "strength", "prompt", "text"),
    "probes": ("behaviour", "reading", "activations", "auroc", "auroc_low", "auroc_high", "n_positive", "n_negative"),
}  # fmt: skip
"""The tables besides `tokens`, with the columns that readers need."""
TOKEN_COLUMNS = (
    "document", "sequence", "position", "dataset", "group", "token_id", "next_id", "kl", "log_base", "log_chat", "top_base",
    "p_base", "top_chat", "p_chat",
)  # fmt: skip

OVERLAP_FILE = "overlap.parquet"
"""Of a crosscoder's folder, or that of the concepts: what a direction of the look says of each latent or concept."""
OVERLAP_COLUMNS = {
    "look_cosine": "cosine of its decoder direction in the chat model with a direction of the first look: the largest in size",
    "look_cosine_direction": "that direction, as directions.parquet of the look names it",
    "look_correlation": "correlation of its activation with the difference along a direction: the largest in size; NaN where "
    "it is never active in the sample",
    "look_correlation_direction": "that direction",
}
OVERLAP_SCHEMA: dict[str, Any] = {key: pl.String if key.endswith("direction") else pl.Float64 for key in OVERLAP_COLUMNS}


class LookSummary(BaseModel):
    """look.json. KL is that of the chat model's prediction of the next token to the base model's, in nats per token.

    Attributes:
        layer: after which directions were read and probes fitted.
        kl_interval: 95% interval of the mean KL; None with fewer than two blocks of documents.
        identical: both models predict exactly the same everywhere.
        same_top: share of the positions where both models' likeliest token is the same.
        outside: probability that the chat model gives to tokens that the base model lacks.
        recommended_layer, reason: the earliest layer worth trying, and why; None if the models do not differ.
        skipped: labels with too few conversations for a probe.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    n_tokens: int
    n_documents: int
    layer: int
    kl: float
    kl_interval: tuple[float, float] | None
    identical: bool
    same_top: float
    outside: float
    depth_tokens: int
    recommended_layer: int | None
    reason: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class LookResults:
    """What `crossdiff look` found; `docs/run-directory.md` has the columns of the tables.

    Attributes:
        places: the positions of the largest KL; groups: KL by dataset and kind of token; words, phrases: whose probability
            rises or falls; depth: one row per layer; directions: of the difference between the models, with the tokens that
            they promote; steered: what the models write when a mean difference is added; probes: how well simple readings of
            the activations predict labels.
    """

    folder: Path
    summary: LookSummary
    places: pl.DataFrame
    groups: pl.DataFrame
    words: pl.DataFrame
    phrases: pl.DataFrame
    depth: pl.DataFrame
    directions: pl.DataFrame
    steered: pl.DataFrame
    probes: pl.DataFrame

    @property
    def has_tokens(self) -> bool:
        """Whether `tokens` is there; it is not published."""
        return (self.folder / "tokens.parquet").is_file()

    @cached_property
    def tokens(self) -> pl.DataFrame:
        """One row per token that was read, with what both models expect after it. The largest table, read when first used.

        Raises:
            UserError: it is missing, as in a run from `crossdiff pull`, or damaged.
        """
        if not self.has_tokens:
            raise UserError(
                f"{self.folder} has no tokens.parquet: `crossdiff push` does not publish it, since it holds whole texts; "
                f"`{COMMAND}` on the models and texts makes it"
            )
        return read_table(self.folder, "tokens", TOKEN_COLUMNS)

    @property
    def sentences(self) -> list[str]:
        """What the look found, in plain sentences."""
        summary, groups = self.summary, self.groups
        read = f"{summary.n_tokens:,} tokens of {summary.n_documents:,} documents"
        if summary.identical:
            return [f"No difference: on {read}, both models predict exactly the same."]
        ends = "" if summary.kl_interval is None else " [{:.3f}, {:.3f}]".format(*summary.kl_interval)
        by_group = groups.group_by("group").agg(pl.col("total_kl", "n_tokens").sum()).sort("total_kl", descending=True)
        first = by_group.row(0, named=True)
        found = [
            f"On {read}, the mean KL(chat || base) of the next token is {summary.kl:.3f}{ends} nats: that is how far apart the "
            f"two models' predictions are. Their likeliest token is the same at {summary.same_top:.0%} of the positions.",
            f"{first['total_kl'] / groups['total_kl'].sum():.0%} of the difference is at {first['group']} tokens "
            f"({first['n_tokens']:,} tokens, {first['total_kl'] / first['n_tokens']:.3f} nats each). Averages depend on "
            "the mix of texts.",
        ]
        if summary.recommended_layer is not None:
            found.append(
                f"The earliest layer worth trying is {summary.recommended_layer}: {summary.reason} (on "
                f"{summary.depth_tokens:,} tokens). Later layers show more of what is specific, but less of the model is left "
                "to act on it."
            )
        if (size := self.depth.filter(layer=summary.layer)["relative_norm"].item()) < NARROW:
            found.append(
                f"The models hardly differ: after layer {summary.layer} the difference has {size:.2f} of the norm of the base "
                "model's activations. A crosscoder sees so little only if difference_weight is set (recipes/narrow.yaml)."
            )
        if summary.skipped:
            found.append(f"Labels with too few conversations to score simple classifiers: {', '.join(summary.skipped)}.")
        if summary.outside > 1e-4:
            found.append(f"The chat model gives {summary.outside:.2%} of its probability to tokens that the base model lacks.")
        return found

    def __repr__(self) -> str:
        return "\n".join(self.sentences)


def read_look(folder: Path) -> LookResults | None:
    """Read the folder `look` of a run; None if the run has none.

    Raises:
        UserError: a file is missing, damaged, or of another version.
    """
    if not folder.is_dir():
        return None
    path = folder / "look.json"
    try:
        summary = LookSummary.model_validate(read_json(intact(path)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {key}: {first['msg']}; run `{COMMAND}` again") from error
    return LookResults(folder, summary, **{name: read_table(folder, name, columns) for name, columns in COLUMNS.items()})


def read_table(folder: Path, name: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """A table of a look, with these columns at least."""
    path = folder / f"{name}.parquet"
    table = read_parquet(path, COMMAND)
    if missing := [column for column in columns if column not in table.columns]:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; run `{COMMAND}` again with this version")
    return table


def with_overlap(table: pl.DataFrame, path: Path, number: str = "latent") -> pl.DataFrame:
    """A table of latents or concepts with the columns of the file at `path`; null if there is none.

    Args:
        number: the column that has the number of each.
    """
    if not path.is_file():
        return table.with_columns(pl.lit(None, dtype=kind).alias(name) for name, kind in OVERLAP_SCHEMA.items())
    found = read_parquet(path, "crossdiff report").select(pl.col(number).cast(table.schema[number]), *OVERLAP_SCHEMA)
    return table.join(found, on=number, how="left", maintain_order="left")
