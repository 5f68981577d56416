"""The tokens that the directions of latents or concepts promote and demote (logit lens), as a table that needs no model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl
import torch

from crossdiff.errors import UserError
from crossdiff.models.lens import NAMES, direction_logits, read_in
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float, Int, Tensor
from crossdiff.text.token_texts import token_text

PROMOTED = 10
"""Tokens on either side of each direction."""
LOGITS = 2**25
"""Logits that are held at once."""


@torch.no_grad()
def promoted_table(
    pair: Pair,
    base: Float[Tensor, "unit d_model"],
    chat: Float[Tensor, "unit d_model"],
    numbers: Int[Tensor, " unit"],
    unit: str,
    advance: Callable[[int], None] = lambda n_units: None,
) -> pl.DataFrame:
    """Tokens that the directions of each unit promote and demote: unit, direction, side, rank, token, logit.

    It has no rows, and there is a warning, if a model has no logit lens.

    Args:
        base: their directions in the base model.
        chat: their directions in the chat model.
        numbers: the latents or concepts that the directions belong to.
        unit: name of the column with these numbers, `latent` or `concept`.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    try:
        parts += _batches(pair, base, chat, advance)
    except UserError as error:
        warnings.warn(f"{error}; the {unit}s have no promoted tokens", stacklevel=2)
    if not parts:
        return pl.DataFrame(schema=_schema(unit))
    tokens, logits = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    unit_at, direction_at, side_at, rank = (each.ravel() for each in np.indices(tokens.shape))
    ids, where = np.unique(tokens, return_inverse=True)
    texts = pl.Series([token_text(pair.tokenizer, token).text for token in ids.tolist()], dtype=pl.String)
    return pl.DataFrame({
        unit: numbers.cpu().numpy()[unit_at], "direction": pl.Series(NAMES)[direction_at],
        "side": pl.Series(["up", "down"])[side_at], "rank": rank, "token": texts[where.ravel()], "logit": logits.ravel(),
    }).cast(_schema(unit))  # fmt: skip


def _schema(unit: str) -> Any:  # a polars.Schema, which the run-time check of types cannot name
    return pl.Schema({
        unit: pl.Int64, "direction": pl.String, "side": pl.String, "rank": pl.Int64, "token": pl.String, "logit": pl.Float32,
    })  # fmt: skip


def _batches(
    pair: Pair, base: Float[Tensor, "unit d_model"], chat: Float[Tensor, "unit d_model"], advance: Callable[[int], None]
) -> Iterator[tuple[Int[Tensor, "unit direction side rank"], Float[Tensor, "unit direction side rank"]]]:
    """Tokens and logits of a batch of units at a time."""
    models: tuple[Any, ...] = pair.models
    n_tokens = max(model.get_output_embeddings().weight.shape[0] for model in models)
    for own in torch.split(torch.arange(len(base)), max(1, LOGITS // n_tokens)):
        found: list[tuple[Tensor, Tensor]] = []
        for _, model, direction in read_in(pair, base[own].to(pair.device), chat[own].to(pair.device)):
            logits = direction_logits(model, direction)
            n = min(PROMOTED, logits.shape[-1])
            up, down = logits.topk(n), logits.topk(n, largest=False)
            found.append((torch.stack([up.indices, down.indices], 1).cpu(), torch.stack([up.values, down.values], 1).cpu()))
        tokens, values = (torch.stack(each, 1) for each in zip(*found, strict=True))
        yield tokens, values
        advance(len(own))
