"""Steering: generate while a latent's contribution is added to the residual stream or removed (docs/method.md#steering).

- `add`: h + strength * a_j * d_j^chat, where a_j is the latent's mean activation over the analysed tokens on which it is
  active. Strength 1 is thus the latent's own mean contribution where it is active. Its largest activation, some three to five
  times as much, would be a poor unit: a single odd token decides it. The direction is the chat model's in either model.
- `ablate`: h - strength * f_j(x) * d_j^m, where f_j(x) is computed from both models on the current tokens, and d_j^m is the
  direction of the steered model m. Strength 1 removes the latent's contribution and nothing else. Strength 1 + c clamps the
  latent to -c times its activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from crossdiff.activations.counted import Counted
from crossdiff.causal.generation import Addition, Answer, Answerer, Edit, Hidden, Prompt, Sampling, SteeredTokens, ask
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError, check_latents
from crossdiff.models.access import next_residual_after, residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Int, Tensor
from crossdiff.sources import BASE, CHAT, SOURCES

CHAT_INDEX = SOURCES.index(CHAT)


@dataclass(frozen=True)
class Steering:
    """How a latent is steered, in which model.

    Attributes:
        norm: for `add`, the norm of the vector at strength 1; by default that of the latent's own mean contribution.
    """

    latent: int
    mode: Literal["add", "ablate"]
    strength: float
    model: Literal["base", "chat"] = "chat"
    tokens: SteeredTokens = "all"
    norm: float | None = None


class Ablation:
    """Removes a latent's contribution from the chosen tokens.

    The crosscoder reads both models, so the lower half of the other model reads the same tokens, with its own cache. If not
    `cached`, it gets all tokens in each step.
    """

    def __init__(
        self, pair: Pair, crosscoder: Crosscoder, layer: int, steering: Steering, rule: Counted, cached: bool = True
    ) -> None:
        from transformers import DynamicCache

        self.pair = pair
        self.source = BASE if steering.model == CHAT else CHAT
        self.other = getattr(pair, self.source)
        self.crosscoder = crosscoder
        self.layer = layer
        self.steering = steering
        self.rule = rule
        self.direction = crosscoder.directions()[SOURCES.index(steering.model), steering.latent] / crosscoder.scale
        self.cache: Any = DynamicCache(config=self.other.config) if cached else None

    def __call__(self, hidden: Hidden, token_ids: Int[Tensor, "row position"], chosen: Bool[Tensor, "row position"]) -> Hidden:
        read = self.pair.ids_of(self.source, token_ids)
        if self.cache is None:
            of_other = residuals_after(self.other, read, [self.layer])[0]
        else:
            of_other = next_residual_after(self.other, read, self.layer, self.cache)
        streams = [hidden, of_other] if self.steering.model == BASE else [of_other, hidden]
        device = self.crosscoder.encoder.device
        h = torch.stack([stream.flatten(0, 1).float().to(device) for stream in streams], dim=1)
        code = self.crosscoder.sparse_code(self.crosscoder.normalise(h))
        of_latent = code.latent == self.steering.latent
        f = torch.zeros(len(h), device=device)
        f[code.token[of_latent]] = code.values[of_latent]
        # A code of a massive token is meaningless; `chosen` has left the leading positions out.
        f = f.where(self.rule.ordinary(h.unbind(1)), 0.0)
        removed = self.steering.strength * f.view(chosen.shape).to(hidden).unsqueeze(2) * self.direction.to(hidden)
        return hidden - chosen.unsqueeze(2) * removed

    def keep_rows(self, rows: Int[Tensor, " row"]) -> None:
        """Drop all other rows from the cache."""
        if self.cache is not None:
            self.cache.batch_select_indices(rows)


class Steerer:
    """Answers questions with either model of a pair, steered or not.

    Args:
        table: the latent table, for the mean activation of each latent.
        rule: the leading positions that it does not count are never edited; no latent is ablated on tokens of massive norm.
    """

    def __init__(self, pair: Pair, crosscoder: Crosscoder, layer: int, table: pl.DataFrame, rule: Counted) -> None:
        self.pair = pair
        self.crosscoder = crosscoder
        self.layer = layer
        self.table = table
        self.rule = rule
        self.answerer = Answerer(pair, layer, rule.leave_out)

    def check(self, steering: Steering) -> None:
        """Raise a `UserError` for a coder of one source, or a latent that does not exist or was never active."""
        if self.crosscoder.n_sources == 1:
            raise UserError(
                f"this coder has one source, {self.crosscoder.sources[0]}, and no direction in the chat model; "
                "steer with a crosscoder that reads both models"
            )
        check_latents([steering.latent], self.crosscoder.n_latents)
        if steering.mode == "add" and steering.norm is None and not self.typical_norm(steering.latent) > 0:
            raise UserError(f"latent {steering.latent} was never active, so strength has no unit; choose another latent")

    def typical_norm(self, latent: int) -> float:
        """Norm of the latent's contribution to the chat model, mean over its active tokens, in the models' own space."""
        mean_v = float(self.table["mean_activation"][latent])
        norms = self.crosscoder.norms()[latent]
        return mean_v / float(norms.sum()) * float(norms[CHAT_INDEX]) / self.crosscoder.scale

    def vector(self, steering: Steering) -> Float[Tensor, " d_model"]:
        """The vector that `add` adds to each chosen token."""
        direction = self.crosscoder.directions()[CHAT_INDEX, steering.latent]
        norm = self.typical_norm(steering.latent) if steering.norm is None else steering.norm
        vector: Tensor = direction / direction.norm() * norm * steering.strength
        return vector

    def make_edit(self, steering: Steering) -> Edit:
        """A new edit, for one batch."""
        if steering.mode == "add":
            return Addition(self.vector(steering))
        return Ablation(self.pair, self.crosscoder, self.layer, steering, self.rule, self.answerer.cached)

    def answer(
        self, questions: Sequence[str], steering: Steering | None, sampling: Sampling, model: str = CHAT
    ) -> list[Answer]:
        """Answer each question; `model` answers if `steering` is None."""
        return self.answer_prompts([ask(self.pair.tokenizer, question) for question in questions], steering, sampling, model)

    def answer_prompts(
        self, prompts: Sequence[Prompt], steering: Steering | None, sampling: Sampling, model: str = CHAT
    ) -> list[Answer]:
        """Answer each tokenised prompt; see `answer`."""
        tokens: SteeredTokens = "all"
        if steering is not None:
            self.check(steering)
            model = steering.model
            tokens = steering.tokens
        make_edit = None if steering is None else partial(self.make_edit, steering)
        return self.answerer.answer(prompts, model, sampling, make_edit, tokens)


def matched_controls(table: pl.DataFrame, latent: int, n: int, seed: int) -> list[int]:
    """Random latents with the verdict `shared` and similar frequency and chat norm: `n` drawn from the `5 n` nearest.

    The distance is the sum of the absolute logarithms of the two ratios.
    """
    own = table.row(latent, named=True)
    others = table.filter((pl.col("verdict") == "shared") & (pl.col("latent") != latent) & (pl.col("frequency") > 0))
    if not own["frequency"] > 0:
        raise UserError(f"latent {latent} was never active, so no latent has a similar frequency; pass --controls 0")
    if others.height < n:
        raise UserError(f"there are only {others.height} shared latents for {n} controls; lower --controls")
    distance = pl.sum_horizontal([(pl.col(name) / own[name]).log().abs() for name in ("frequency", "norm_chat")])
    nearest = others.sort(distance, "latent").head(5 * n)["latent"].to_numpy()
    return sorted(np.random.default_rng(seed).choice(nearest, n, replace=False).tolist())
