"""Steering: generate while latents' contributions are added to the residual stream or removed (docs/method.md#steering).

- `add`: h + strength * a_j * d_j^chat, where a_j is the latent's mean activation over the analysed tokens on which it is
  active. Strength 1 is thus the latent's own mean contribution where it is active. Its largest activation, some three to five
  times as much, would be a poor unit: a single odd token decides it. The direction is the chat model's in either model.
- `ablate`: h - strength * f_j(x) * d_j^m, where f_j(x) is computed from both models on the current tokens, and d_j^m is the
  direction of the steered model m. Strength 1 removes the latent's contribution and nothing else. Strength 1 + c clamps the
  latent to -c times its activation.

With several latents, each has its own strength, and the contributions add up. Those that are removed are all computed from the
residual stream as it was.
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
from crossdiff.causal.generation import Addition, Answer, Answerer, Edit, Hidden, Prompt, Sampling, SteeredTokens, Watch, ask
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError, check_latents
from crossdiff.latents.decoder import CHAT_INDEX
from crossdiff.models.access import next_residual_after, residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Int, Tensor
from crossdiff.sources import CHAT


@dataclass(frozen=True)
class Steering:
    """How one or more latents are steered, in which model.

    Attributes:
        norm: for `add`, the norm of the vector of `latent` at strength 1; by default that of its own mean contribution.
        others: further latents that are steered in the same way, each with its strength.
    """

    latent: int
    mode: Literal["add", "ablate"]
    strength: float
    model: str = CHAT
    tokens: SteeredTokens = "all"
    norm: float | None = None
    others: tuple[tuple[int, float], ...] = ()

    @property
    def strengths(self) -> dict[int, float]:
        """The strength of each latent."""
        return {self.latent: self.strength, **dict(self.others)}


class Ablation:
    """Removes the latents' contributions from the chosen tokens.

    The crosscoder reads all models, so the lower halves of the others read the same tokens, each with its own cache. If not
    `cached`, they get all tokens in each step.
    """

    def __init__(
        self, pair: Pair, crosscoder: Crosscoder, layer: int, steering: Steering, rule: Counted, cached: bool = True
    ) -> None:
        from transformers import DynamicCache

        self.pair = pair
        self.others = [source for source in crosscoder.view.reads if source != steering.model]
        self.crosscoder = crosscoder
        self.layer = layer
        self.steering = steering
        self.rule = rule
        latents = list(steering.strengths)
        device = crosscoder.encoder.device
        self.column = torch.full((crosscoder.n_latents,), -1, device=device)
        self.column[latents] = torch.arange(len(latents), device=device)
        strengths = torch.tensor(list(steering.strengths.values()), device=device).unsqueeze(1)
        self.removed = strengths * crosscoder.directions()[crosscoder.sources.index(steering.model), latents] / crosscoder.scale
        configs: dict[str, Any] = {source: pair.model(source).config for source in self.others}
        self.caches: dict[str, Any] = {source: DynamicCache(config=configs[source]) for source in self.others if cached}

    def __call__(self, hidden: Hidden, token_ids: Int[Tensor, "row position"], chosen: Bool[Tensor, "row position"]) -> Hidden:
        of = {source: self._residual(source, token_ids) for source in self.others} | {self.steering.model: hidden}
        streams = [of[source] for source in self.crosscoder.view.reads]
        device = self.crosscoder.encoder.device
        h = torch.stack([stream.flatten(0, 1).float().to(device) for stream in streams], dim=1)
        code = self.crosscoder.sparse_code(self.crosscoder.normalise(h))
        column = self.column[code.latent]
        steered = column >= 0
        f = torch.zeros(len(h), len(self.removed), device=device)
        f[code.token[steered], column[steered]] = code.values[steered]
        # A code of a massive token is meaningless; `chosen` has left the leading positions out.
        f = f.where(self.rule.ordinary(h.unbind(1)).unsqueeze(1), 0.0)
        removed = (f.to(hidden) @ self.removed.to(hidden)).view(hidden.shape)
        return hidden - chosen.unsqueeze(2) * removed

    def _residual(self, source: str, token_ids: Int[Tensor, "row position"]) -> Hidden:
        """The residual stream of another model on the tokens of this step."""
        model, read = self.pair.model(source), self.pair.ids_of(source, token_ids)
        if source not in self.caches:
            return residuals_after(model, read, [self.layer])[0]
        return next_residual_after(model, read, self.layer, self.caches[source])

    def keep_rows(self, rows: Int[Tensor, " row"]) -> None:
        """Drop all other rows from the caches."""
        for cache in self.caches.values():
            cache.batch_select_indices(rows)


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
        """Raise a `UserError` for a coder of one source, or latents that do not exist or were never active."""
        if self.crosscoder.n_sources == 1:
            raise UserError(
                f"this coder has one source, {self.crosscoder.sources[0]}, and no direction in the chat model; "
                "steer with a crosscoder that reads both models"
            )
        if steering.model not in self.crosscoder.sources:
            raise UserError(f"there is no model {steering.model!r} to steer; choose from {', '.join(self.crosscoder.sources)}")
        check_latents(steering.strengths, self.crosscoder.n_latents)
        for latent in steering.strengths if steering.mode == "add" else ():
            has_norm = latent == steering.latent and steering.norm is not None
            if not has_norm and not self.typical_norm(latent) > 0:
                raise UserError(f"latent {latent} was never active, so strength has no unit; choose another latent")

    def typical_norm(self, latent: int) -> float:
        """Norm of the latent's contribution to the chat model, mean over its active tokens, in the models' own space."""
        mean_v = float(self.table["mean_activation"][latent])
        norms = self.crosscoder.norms()[latent]
        return mean_v / float(norms.sum()) * float(norms[CHAT_INDEX]) / self.crosscoder.scale

    def vector(self, steering: Steering) -> Float[Tensor, " d_model"]:
        """The vector that `add` adds to each chosen token."""
        vector = torch.zeros(self.crosscoder.d_model, device=self.crosscoder.encoder.device)
        for latent, strength in steering.strengths.items():
            direction = self.crosscoder.directions()[CHAT_INDEX, latent]
            is_given = latent == steering.latent and steering.norm is not None
            norm = steering.norm if is_given else self.typical_norm(latent)
            vector = vector + direction / direction.norm() * norm * strength
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
        self,
        prompts: Sequence[Prompt],
        steering: Steering | None,
        sampling: Sampling,
        model: str = CHAT,
        watch: Watch = lambda outputs: True,
    ) -> list[Answer]:
        """Answer each tokenised prompt; see `answer`. `watch` is told of every step."""
        tokens: SteeredTokens = "all"
        if steering is not None:
            self.check(steering)
            model = steering.model
            tokens = steering.tokens
        make_edit = None if steering is None else partial(self.make_edit, steering)
        return self.answerer.answer(prompts, model, sampling, make_edit, tokens, watch)


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
