"""Seeded generation while the residual stream is edited, with the KV cache where the architecture has a usable one.

Prompts of equal length are answered together, without padding, and finished rows leave the batch. An answer depends only on the
prompt, the edit and the seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.access import continues_from_cache, edited_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Int, Tensor
from crossdiff.text.chat import Flag, tokenise_prompt

SteeredTokens = Literal["all", "prompt", "template", "generated"]
Hidden = Float[Tensor, "row position d_model"]
Watch = Callable[[Sequence[Sequence[int]]], bool]
"""Gets the tokens that each prompt of a batch has been answered with so far, after each step; False stops the batch there."""


@runtime_checkable
class Edit(Protocol):
    """An edit of the residual stream during one generation; it may keep a state per row."""

    def __call__(self, hidden: Hidden, token_ids: Int[Tensor, "row position"], chosen: Bool[Tensor, "row position"]) -> Hidden:
        """The edited residual stream of the current tokens; only chosen tokens may change."""
        ...

    def keep_rows(self, rows: Int[Tensor, " row"]) -> None:
        """Drop the state of all other rows, which are finished."""


@dataclass(frozen=True)
class Prompt:
    """A question with the header of the answer. template: whether each token is a template token."""

    token_ids: tuple[int, ...]
    template: tuple[bool, ...]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else by a draw that depends on the seed and the prompt."""

    max_new_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Answer:
    """text, token_ids: without the special tokens that end the answer. finished: whether the model ended it, rather than the
    limit of tokens or whoever watches."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


def ask(tokenizer: Any, question: str) -> Prompt:
    """Render a question with the chat template, up to the start of the answer."""
    chat = tokenise_prompt(tokenizer, [{"role": "user", "content": question}])
    return Prompt(tuple(chat.token_ids.tolist()), tuple(bool(flags & Flag.TEMPLATE) for flags in chat.flags.tolist()))


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer, from the tokenizer and from the model's generation settings."""
    configured: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (*found, tokenizer.eos_token_id) if token is not None)


def choose(logits: Float[Tensor, "row vocabulary"], temperature: float, uniform: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The next tokens: the most likely ones, or the inverse of the cumulative distribution at `uniform`."""
    if temperature == 0:
        return logits.argmax(1)
    cumulative = (logits.double() / temperature).softmax(1).cumsum(1)
    return torch.searchsorted(cumulative, uniform.unsqueeze(1)).squeeze(1).clamp(max=logits.shape[1] - 1)


class Addition:
    """Adds one vector to the chosen tokens."""

    def __init__(self, vector: Float[Tensor, " d_model"]) -> None:
        self.vector = vector

    def __call__(self, hidden: Hidden, token_ids: Int[Tensor, "row position"], chosen: Bool[Tensor, "row position"]) -> Hidden:
        return hidden + chosen.unsqueeze(2) * self.vector.to(hidden)

    def keep_rows(self, rows: Int[Tensor, " row"]) -> None:
        """Do nothing: an addition has no state."""


class Answerer:
    """Answers prompts with either model of a pair while its residual stream after a layer may be edited.

    Args:
        leave_out: number of leading positions that are never edited.
    """

    def __init__(self, pair: Pair, layer: int, leave_out: int) -> None:
        self.pair = pair
        self.layer = layer
        self._leave_out = leave_out
        self._ends = end_tokens(pair.chat, pair.tokenizer)

    @cached_property
    def cached(self) -> bool:
        """Whether both models can read one token at a time, from a cache. If not, each step reads all tokens again."""
        return all(continues_from_cache(model, self.layer) for model in self.pair.models)

    def answer(
        self,
        prompts: Sequence[Prompt],
        source: str,
        sampling: Sampling,
        make_edit: Callable[[], Edit] | None = None,
        tokens: SteeredTokens = "all",
        watch: Watch = lambda outputs: True,
    ) -> list[Answer]:
        """What a model answers to each prompt.

        Args:
            source: which model answers.
            make_edit: makes the edit of a batch; tokens: where it is applied.
            watch: is told of every step.

        Raises:
            UserError: a prompt with its answer is longer than the model can read.
        """
        answering, read = self.pair.model(source), partial(self.pair.ids_of, source)
        _check_length(answering, prompts, sampling)
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[len(prompt.token_ids)].append(index)
        found: dict[int, Answer] = {}
        for members in by_length.values():
            for first in range(0, len(members), sampling.batch_size):
                part = members[first : first + sampling.batch_size]
                batch = [prompts[index] for index in part]
                edit = None if make_edit is None else make_edit()
                stopped: list[bool] = []

                def heard(outputs: Sequence[Sequence[int]], stopped: list[bool] = stopped) -> bool:
                    if not watch(outputs):
                        stopped.append(True)
                    return not stopped

                outputs = continue_batch(
                    answering, self.layer, batch, edit, tokens, self._leave_out, self._ends, sampling, self.cached, read, heard
                )
                for index, output in zip(part, outputs, strict=True):
                    finished = not stopped and len(output) < sampling.max_new_tokens
                    found[index] = Answer(self.text(output), tuple(output), finished)
        return [found[index] for index in range(len(prompts))]

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of an answer."""
        return str(self.pair.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()


def _check_length(model: nn.Module, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones are more than the {limit} that the model "
            "can read; shorten the prompt, or lower max_new_tokens"
        )


@torch.no_grad()
def continue_batch(
    model: nn.Module,
    layer: int,
    prompts: Sequence[Prompt],
    edit: Edit | None,
    tokens: SteeredTokens,
    leave_out: int,
    ends: frozenset[int],
    sampling: Sampling,
    cached: bool = True,
    read: Callable[[Tensor], Tensor] = lambda token_ids: token_ids,
    watch: Watch = lambda outputs: True,
) -> list[list[int]]:
    """Continuations of prompts of equal length, without the token that ends them.

    Args:
        cached: read only the new token in each step, from a cache. Otherwise each step reads all tokens again.
        read: maps the ids of tokens to those that the model reads in their place.
        edit: applied to the residual stream after `layer`, on the tokens that `tokens` selects.
        leave_out: number of leading positions that are never edited.
        watch: is told of every step, and may stop the batch.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([prompt.token_ids for prompt in prompts], device=device)
    draws = [np.random.default_rng([sampling.seed, *prompt.token_ids]).random(sampling.max_new_tokens) for prompt in prompts]
    uniforms = torch.from_numpy(np.stack(draws)).to(device)
    chosen = torch.ones_like(ids, dtype=torch.bool)
    if tokens == "template":
        chosen = torch.tensor([prompt.template for prompt in prompts], device=device)
    elif tokens == "generated":
        chosen = torch.zeros_like(chosen)
    chosen[:, :leave_out] = False
    outputs: list[list[int]] = [[] for _ in prompts]
    unfinished = torch.arange(len(prompts), device=device)
    cache: Any = None
    for step in range(sampling.max_new_tokens):
        editing: AbstractContextManager[None] = nullcontext()
        if edit is not None:
            editing = edited_after(model, layer, partial(edit, token_ids=ids, chosen=chosen))
        with editing:
            if cached:
                out = model(input_ids=read(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
            else:
                out = model(input_ids=read(ids), use_cache=False)
        following = choose(out.logits[:, -1], sampling.temperature, uniforms[unfinished, step])
        kept = torch.tensor([token not in ends for token in following.tolist()], device=device).nonzero().squeeze(1)
        if not len(kept):
            break
        if len(kept) < len(following):
            ids, chosen = ids[kept], chosen[kept]
            if cached:
                cache.batch_select_indices(kept)
            if edit is not None:
                edit.keep_rows(kept)
            unfinished = unfinished[kept]
            following = following[kept]
        for row, token in zip(unfinished.tolist(), following.tolist(), strict=True):
            outputs[row].append(token)
        if not watch(outputs):
            break
        new = following.unsqueeze(1)
        also = torch.full_like(new, tokens in ("all", "generated"), dtype=torch.bool)
        ids, chosen = (new, also) if cached else (torch.cat([ids, new], 1), torch.cat([chosen, also], 1))
    return outputs
