"""Tokens and short phrases whose probability rises or falls most from the base model to the chat model.

A token is judged on what the models expect anywhere in the texts, whether it is written there or not. A phrase is judged where
the texts have it: its gain is the sum of log p_chat - log p_base over its tokens, in nats, added over all places. Phrases with
tokens of the chat template are left out, since everybody knows that the base model does not expect these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.shapes import Tensor

MIN_PLACES, MIN_DOCUMENTS = 5, 2
"""Phrases in fewer places or documents are not listed."""
CONTAINED = 0.8
"""A phrase is not listed beside a longer one that contains it, and has at least this share of its places."""
LARGE = ("large_position", "large_token", "large_change")
PHRASE_COLUMNS: dict[str, Any] = {
    "phrase": pl.String, "token_ids": pl.List(pl.Int64), "n_tokens": pl.Int64, "gain": pl.Float64, "mean_gain": pl.Float64,
    "n_places": pl.Int64, "n_documents": pl.Int64,
}  # fmt: skip
TOKEN_COLUMNS: dict[str, Any] = {
    "token_id": pl.Int64, "token": pl.String, "rise": pl.Float64, "per_thousand": pl.Float64, "n_up": pl.Int64,
    "n_down": pl.Int64, "n_documents": pl.Int64,
}  # fmt: skip


def token_table(shifts: dict[str, Tensor], document: npt.NDArray[np.int64], tokenizer: Any, n: int) -> pl.DataFrame:
    """The `n` tokens that rise most and the `n` that fall most, the largest rise first.

    Args:
        shifts: see `Shifts.tensors`.
        document: of each position, in the order in which the shifts were collected.

    Returns:
        `rise` in expected occurrences over all positions, and per thousand of them; `n_up` and `n_down`: positions where the
        probability changes by more than `LARGE_SHIFT`, in `n_documents` documents.
    """
    rise, position, token, change = (shifts[name].numpy() for name in ("rise", *LARGE))
    order = np.argsort(-rise, kind="stable")
    chosen = np.unique(np.concatenate([order[:n], order[len(order) - n :]]))
    places = pl.DataFrame({"token_id": token, "change": change, "document": document[position]}).group_by("token_id").agg(
        n_up=(pl.col("change") > 0).sum(), n_down=(pl.col("change") < 0).sum(), n_documents=pl.col("document").n_unique()
    )  # fmt: skip
    table = pl.DataFrame({"token_id": chosen, "rise": rise[chosen]}).filter(pl.col("rise") != 0)
    texts = [tokenizer.decode([int(each)]) for each in table["token_id"]]
    per_thousand = 1000 * pl.col("rise") / max(1, len(document))
    return (
        table.with_columns(pl.Series("token", texts, dtype=pl.String), per_thousand=per_thousand)
        .join(places.cast({"token_id": pl.Int64}), on="token_id", how="left")
        .with_columns(pl.col("n_up", "n_down", "n_documents").fill_null(0))
        .select(pl.col(name).cast(dtype) for name, dtype in TOKEN_COLUMNS.items())
        .sort("rise", "token_id", descending=[True, False])
    )


def phrase_table(tokens: pl.DataFrame, tokenizer: Any, longest: int, n: int) -> pl.DataFrame:
    """The `n` phrases of up to `longest` tokens that gain most and the `n` that lose most, the largest gain first.

    Args:
        tokens: one row per position in the order of the texts, with `sequence`, `document`, `group`, `next_id`, `log_base` and
            `log_chat`.
    """
    of_template = pl.col("group").cast(pl.String).shift(-1).over("sequence").is_in(["template", "bos"])
    gain = pl.col("log_chat") - pl.col("log_base")
    usable = tokens.with_columns(gain=pl.when(gain.is_finite() & ~of_template).then(gain))
    found = [_phrases(usable, length) for length in range(1, longest + 1)]
    every = pl.concat(found)
    kept = pl.concat([_listed(every, rising, n) for rising in (True, False)])
    texts = [tokenizer.decode(ids) for ids in kept["token_ids"].to_list()]
    return (
        kept.with_columns(pl.Series("phrase", texts, dtype=pl.String), mean_gain=pl.col("gain") / pl.col("n_places"))
        .select(pl.col(name).cast(dtype) for name, dtype in PHRASE_COLUMNS.items())
        .sort("gain", "n_tokens", descending=[True, True])
    )


def _phrases(tokens: pl.DataFrame, length: int) -> pl.DataFrame:
    """All phrases of one length with their total gain, where they stand and in how many documents."""
    ids = [pl.col("next_id").shift(-offset).over("sequence").alias(f"t{offset}") for offset in range(length)]
    gains = [pl.col("gain").shift(-offset).over("sequence") for offset in range(length)]
    names = [f"t{offset}" for offset in range(length)]
    return (
        tokens.select("document", *ids, gain=pl.sum_horizontal(gains, ignore_nulls=False))
        .drop_nulls()
        .group_by(names)
        .agg(pl.col("gain").sum(), n_places=pl.len().cast(pl.Int64), n_documents=pl.col("document").n_unique().cast(pl.Int64))
        .filter((pl.col("n_places") >= MIN_PLACES) & (pl.col("n_documents") >= MIN_DOCUMENTS))
        .select(
            pl.concat_list(pl.col(names).cast(pl.Int64)).alias("token_ids"), pl.lit(length, pl.Int64).alias("n_tokens"),
            pl.col("gain").cast(pl.Float64), "n_places", "n_documents",
        )
    )  # fmt: skip


def _listed(phrases: pl.DataFrame, rising: bool, n: int) -> pl.DataFrame:
    """The `n` with the largest gain (or loss), without those that are hardly ever seen outside a longer one in the list."""
    side = phrases.filter(pl.col("gain") > 0 if rising else pl.col("gain") < 0)
    side = side.sort("gain", "n_tokens", descending=[rising, True])
    rows: list[dict[str, Any]] = []
    for row in side.head(20 * n).iter_rows(named=True):
        if any(_same(row, other) for other in rows):
            continue
        rows = [other for other in rows if not _same(other, row)]
        rows.append(row)
        if len(rows) == n:
            break
    return pl.DataFrame(rows, schema=phrases.schema)


def _same(short: dict[str, Any], long: dict[str, Any]) -> bool:
    """Whether one phrase is part of another, longer one, and mostly seen there."""
    a, b = short["token_ids"], long["token_ids"]
    if len(a) >= len(b) or long["n_places"] < CONTAINED * short["n_places"]:
        return False
    return any(b[start : start + len(a)] == a for start in range(len(b) - len(a) + 1))
