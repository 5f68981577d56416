"""What each model writes while a mean difference is added to its residual stream.

At strength 1 the mean difference itself is added, which moves the base model's mean activation to the chat model's. A narrow
fine-tune can show its subject there on prompts that have nothing to do with it (Minder et al. 2025, arXiv:2510.13900).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from crossdiff.causal.generation import Addition, Answerer, Prompt, Sampling, ask
from crossdiff.look.directions import BEGINNING, direction_name
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float64, Tensor
from crossdiff.sources import SOURCES

STEERED = tuple(direction_name(group) for group in (BEGINNING, "user", "assistant"))
"""The directions that are added. Those of the template's tokens would only make the models write its tokens."""
STRENGTHS = (1.0, 2.0)
N_TOKENS = 30
BEGINNING_TOKENS = 8
"""Tokens of a plain text that are continued if there are no questions."""
STEERED_COLUMNS: dict[str, Any] = {
    "direction": pl.String, "model": pl.String, "strength": pl.Float64, "prompt": pl.String, "text": pl.String,
}  # fmt: skip


def choose_prompts(
    questions: Sequence[str], tokens: pl.DataFrame, tokenizer: Any, max_length: int, n: int
) -> list[tuple[str, Prompt]]:
    """Up to `n` prompts from the texts: distinct questions or, without any, the beginnings of texts.

    Args:
        tokens: `document`, `position` and `token_id` of the texts' tokens.
        max_length: tokens that a prompt and its answer may have; a longer question is left out.
    """
    asked = ((question, ask(tokenizer, question)) for question in dict.fromkeys(questions))
    found = [(text, prompt) for text, prompt in asked if len(prompt.token_ids) + N_TOKENS <= max_length]
    if not found:
        firsts = tokens.filter(pl.col("position") < BEGINNING_TOKENS).unique(("document", "position"), keep="first")
        beginnings = firsts.sort("document", "position").group_by("document", maintain_order=True).agg("token_id")
        for ids in beginnings["token_id"].to_list():
            found.append((tokenizer.decode(ids, skip_special_tokens=True), Prompt(tuple(ids), (False,) * len(ids))))
    spread = np.unique(np.linspace(0, len(found) - 1, min(n, len(found))).round().astype(int))
    return [found[index] for index in spread]


def steered_table(
    pair: Pair,
    layer: int,
    leave_out: int,
    directions: pl.DataFrame,
    vectors: Float64[Tensor, "direction d_model"],
    prompts: Sequence[tuple[str, Prompt]],
) -> pl.DataFrame:
    """What both models write, greedily, after each prompt: at strength 0 without a direction, then with each one added.

    Args:
        leave_out: number of leading positions that are not edited.
        directions: one row per direction, with its name in `direction`; vectors: the directions.
    """
    if not prompts or not len(vectors):
        return pl.DataFrame(schema=STEERED_COLUMNS)
    answerer, sampling = Answerer(pair, layer, leave_out), Sampling(max_new_tokens=N_TOKENS)
    texts, asked = zip(*prompts, strict=True)
    conditions: list[tuple[str | None, float, Tensor | None]] = [(None, 0.0, None)]
    for name, vector in zip(directions["direction"], vectors, strict=True):
        conditions += [(name, strength, strength * vector) for strength in STRENGTHS if name in STEERED]
    rows = []
    for name, strength, vector in conditions:
        for source in SOURCES:
            answers = answerer.answer(asked, source, sampling, None if vector is None else partial(Addition, vector.float()))
            rows += [(name, source, strength, text, answer.text) for text, answer in zip(texts, answers, strict=True)]
    return pl.DataFrame(rows, schema=STEERED_COLUMNS, orient="row")
