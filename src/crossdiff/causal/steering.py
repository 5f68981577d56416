"""Steering: generate with a latent's contribution added to, or taken from, the residual stream (METHOD: causal test).

- `add`: h + strength * a_j * d_j^chat, where a_j is the mean activation of the latent over the tokens of the analysed text on
  which it is active. Strength 1 is thus what the latent itself adds where it speaks. Its largest activation, some three to
  five times that, would be a unit that one odd token decides. The direction is the chat model's, in whichever model is steered.
- `ablate`: h - strength * f_j(x) * d_j^m, where f_j(x) is what the crosscoder reads from both models on the tokens at hand and
  d_j^m is the direction of the steered model m. Strength 1 takes out the latent's contribution, and nothing else;
  strength 1 + c is the latent clamped to -c times what it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import nn

from crossdiff.causal.generation import Answer, Edit, Prompt, Sampling, Tokens, answers, ask, end_tokens
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.models.access import next_residual_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Int, Tensor
from crossdiff.sources import SOURCES

CHAT = SOURCES.index("chat")


@dataclass(frozen=True)
class Steering:
    """What is done to which model. norm: for `add`, the norm of the vector at strength 1, by default the latent's own."""

    latent: int
    mode: Literal["add", "ablate"]
    strength: float
    model: Literal["base", "chat"] = "chat"
    tokens: Tokens = "all"
    norm: float | None = None


class Addition:
    """Adds one vector to the chosen tokens."""

    def __init__(self, vector: Float[Tensor, " d_model"]) -> None:
        self.vector = vector

    def __call__(
        self,
        hidden: Float[Tensor, "row position d_model"],
        token_ids: Int[Tensor, "row position"],
        chosen: Bool[Tensor, "row position"],
    ) -> Float[Tensor, "row position d_model"]:
        return hidden + chosen.unsqueeze(2) * self.vector.to(hidden)

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Nothing is kept for a row."""


class Ablation:
    """Takes a latent's contribution out of the chosen tokens.

    The crosscoder reads both models, so the lower half of the other one reads the same tokens beside, with its own cache.
    """

    def __init__(self, other: nn.Module, crosscoder: Crosscoder, layer: int, steering: Steering) -> None:
        from transformers import DynamicCache

        self.other, self.crosscoder, self.layer, self.steering = other, crosscoder, layer, steering
        self.source = SOURCES.index(steering.model)
        self.direction = crosscoder.directions()[self.source, steering.latent] / crosscoder.scale
        self.cache: Any = DynamicCache(config=other.config)  # type: ignore[arg-type]

    def __call__(
        self,
        hidden: Float[Tensor, "row position d_model"],
        token_ids: Int[Tensor, "row position"],
        chosen: Bool[Tensor, "row position"],
    ) -> Float[Tensor, "row position d_model"]:
        beside = next_residual_after(self.other, token_ids, self.layer, self.cache)
        streams = [hidden, beside] if self.source == 0 else [beside, hidden]
        home = self.crosscoder.encoder.device
        h = torch.stack([stream.flatten(0, 1).float().to(home) for stream in streams], dim=1)
        code = self.crosscoder.sparse_code(self.crosscoder.normalise(h))
        f = torch.zeros(len(h), device=home)
        of_latent = code.latent == self.steering.latent
        f[code.token[of_latent]] = code.values[of_latent]
        taken = self.steering.strength * f.view(chosen.shape).to(hidden).unsqueeze(2) * self.direction.to(hidden)
        return hidden - chosen.unsqueeze(2) * taken

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Drop the other rows from the cache."""
        self.cache.batch_select_indices(rows)


class Steerer:
    """Answers questions with either model of a pair, steered or not.

    Args:
        table: the latent table, which knows each latent's mean activation.
        leave_out: leading positions that are never edited.
    """

    def __init__(self, pair: Pair, crosscoder: Crosscoder, layer: int, table: pl.DataFrame, leave_out: int) -> None:
        self.pair, self.crosscoder, self.layer, self.table, self.leave_out = pair, crosscoder, layer, table, leave_out
        self.ends = end_tokens(pair.chat, pair.tokenizer)

    def check(self, steering: Steering) -> None:
        """Raises `UserError` for a coder of one source, a latent that does not exist, or one that was never active and so has
        no strength."""
        n = self.crosscoder.n_latents
        if self.crosscoder.n_sources == 1:
            name = self.crosscoder.sources[0]
            raise UserError(
                f"this coder has one source, {name}, and no direction in the chat model; steer with one of both models"
            )
        if not 0 <= steering.latent < n:
            raise UserError(f"there is no latent {steering.latent}: the crosscoder has {n}, 0 to {n - 1}")
        if steering.mode == "add" and steering.norm is None and not self.typical_norm(steering.latent) > 0:
            raise UserError(f"latent {steering.latent} was never active, so a strength has no unit; choose another latent")

    def typical_norm(self, latent: int) -> float:
        """Norm of the latent's contribution to the chat model, mean over its active tokens, in the models' own space."""
        mean_v = float(self.table["mean_activation"][latent])
        norms = self.crosscoder.norms()[latent]
        return mean_v / float(norms.sum()) * float(norms[CHAT]) / self.crosscoder.scale

    def vector(self, steering: Steering) -> Float[Tensor, " d_model"]:
        """What `add` adds to each chosen token."""
        direction = self.crosscoder.directions()[CHAT, steering.latent]
        norm = self.typical_norm(steering.latent) if steering.norm is None else steering.norm
        vector: Tensor = direction / direction.norm() * norm * steering.strength
        return vector

    def edit(self, steering: Steering) -> Callable[[], Edit]:
        """Makes the edit anew for each batch."""
        if steering.mode == "add":
            vector = self.vector(steering)
            return lambda: Addition(vector)
        other = self.pair.base if steering.model == "chat" else self.pair.chat
        return lambda: Ablation(other, self.crosscoder, self.layer, steering)

    def answer(
        self, questions: Sequence[str], steering: Steering | None, sampling: Sampling, model: str = "chat"
    ) -> list[Answer]:
        """Answer each question; `model` says whose answers are wanted where nothing is steered.

        Raises:
            UserError: a latent that cannot be steered with, or a question that the template cannot render.
        """
        return self.answer_prompts([ask(self.pair.tokenizer, question) for question in questions], steering, sampling, model)

    def answer_prompts(
        self, prompts: Sequence[Prompt], steering: Steering | None, sampling: Sampling, model: str = "chat"
    ) -> list[Answer]:
        """The same for prompts as token ids; raises `UserError` for a latent that cannot be steered with."""
        if steering is not None:
            self.check(steering)
            model = steering.model
        make_edit = None if steering is None else self.edit(steering)
        tokens: Tokens = "all" if steering is None else steering.tokens
        return answers(
            getattr(self.pair, model), self.pair.tokenizer, self.layer, prompts, make_edit, tokens, self.leave_out,
            self.ends, sampling,
        )  # fmt: skip


def matched_controls(table: pl.DataFrame, latent: int, n: int, seed: int) -> list[int]:
    """Random latents of like frequency and chat norm whose verdict is shared: `n` drawn from the `5 n` nearest.

    Nearness is the sum of the absolute logarithms of the two ratios.

    Raises:
        UserError: fewer than `n` shared latents.
    """
    own = table.row(latent, named=True)
    others = table.filter((pl.col("verdict") == "shared") & (pl.col("latent") != latent) & (pl.col("frequency") > 0))
    if others.height < n:
        raise UserError(f"{n} controls are asked for, but only {others.height} latents are shared; lower the number")
    distance = pl.sum_horizontal([(pl.col(name) / own[name]).log().abs() for name in ("frequency", "norm_chat")])
    nearest = others.sort(distance, "latent").head(5 * n)["latent"].to_numpy()
    return sorted(np.random.default_rng(seed).choice(nearest, n, replace=False).tolist())
