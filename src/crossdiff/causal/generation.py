"""Answers of a model whose residual stream is edited while it speaks, with the KV cache, seeded.

Prompts of one length are answered together, so that nothing is padded; rows that have ended leave the batch. What a prompt is
answered depends on nothing but the prompt, the edit and the seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.access import edited_after
from crossdiff.shapes import Bool, Float, Int, Tensor
from crossdiff.text.chat import Flag, tokenise_prompt

Tokens = Literal["all", "prompt", "template", "generated"]


@runtime_checkable
class Edit(Protocol):
    """A change of the residual stream during one generation; it may keep a state for each row."""

    def __call__(
        self,
        hidden: Float[Tensor, "row position d_model"],
        token_ids: Int[Tensor, "row position"],
        chosen: Bool[Tensor, "row position"],
    ) -> Float[Tensor, "row position d_model"]:
        """The edited stream of the tokens that are read now; only chosen ones may change."""

    def keep(self, rows: Int[Tensor, " row"]) -> None:
        """Only these rows go on."""


@dataclass(frozen=True)
class Prompt:
    """A question with the header of the answer. template: which of its tokens are the template's."""

    token_ids: tuple[int, ...]
    template: tuple[bool, ...]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else by a draw that the seed and the prompt decide."""

    max_new_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Answer:
    """text: without special tokens. finished: whether the model ended it, rather than the limit of tokens."""

    text: str
    n_tokens: int
    finished: bool


def ask(tokenizer: Any, question: str) -> Prompt:
    """Render a question with the chat template, up to where the answer begins.

    Raises:
        UserError: no chat template, or one that cannot render it.
    """
    chat = tokenise_prompt(tokenizer, [{"role": "user", "content": question}])
    return Prompt(tuple(chat.token_ids.tolist()), tuple(bool(flags & Flag.TEMPLATE) for flags in chat.flags.tolist()))


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's generation settings."""
    configured: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (*found, tokenizer.eos_token_id) if token is not None)


def choose(logits: Float[Tensor, "row vocabulary"], temperature: float, uniform: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The next tokens: the likeliest, or the inverse of the cumulative distribution at `uniform`."""
    if temperature == 0:
        return logits.argmax(1)
    cumulative = (logits.double() / temperature).softmax(1).cumsum(1)
    return torch.searchsorted(cumulative, uniform.unsqueeze(1)).squeeze(1).clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def continue_batch(
    model: nn.Module,
    layer: int,
    prompts: Sequence[Prompt],
    edit: Edit | None,
    tokens: Tokens,
    leave_out: int,
    ends: frozenset[int],
    sampling: Sampling,
) -> list[list[int]]:
    """Continuations of prompts of one length, without the token that ends them.

    Args:
        edit: applied to the residual stream after `layer`, at the tokens that `tokens` names but the left-out positions.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([prompt.token_ids for prompt in prompts], device=device)
    uniforms = torch.from_numpy(np.stack([_uniforms(prompt, sampling) for prompt in prompts])).to(device)
    chosen = torch.ones_like(ids, dtype=torch.bool)
    if tokens == "template":
        chosen = torch.tensor([prompt.template for prompt in prompts], device=device)
    elif tokens == "generated":
        chosen = torch.zeros_like(chosen)
    chosen[:, :leave_out] = False
    outputs: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=device)
    cache: Any = None
    for step in range(sampling.max_new_tokens):
        editing: AbstractContextManager[None] = nullcontext()
        if edit is not None:
            editing = edited_after(model, layer, _bound(edit, ids, chosen))
        with editing:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        following = choose(out.logits[:, -1], sampling.temperature, uniforms[alive, step])
        going = torch.tensor([token not in ends for token in following.tolist()], device=device).nonzero().squeeze(1)
        if not len(going):
            break
        if len(going) < len(following):
            cache.batch_select_indices(going)
            if edit is not None:
                edit.keep(going)
            alive, following = alive[going], following[going]
        for row, token in zip(alive.tolist(), following.tolist(), strict=True):
            outputs[row].append(token)
        ids = following.unsqueeze(1)
        chosen = torch.full_like(ids, tokens in ("all", "generated"), dtype=torch.bool)
    return outputs


def _uniforms(prompt: Prompt, sampling: Sampling) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng([sampling.seed, *prompt.token_ids]).random(sampling.max_new_tokens)


def _bound(edit: Edit, ids: Tensor, chosen: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden: edit(hidden, ids, chosen)


def _check_length(model: nn.Module, longest: int, max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the {limit} that the model can read; "
            "ask something shorter, or lower max_new_tokens"
        )


def answers(
    model: nn.Module,
    tokenizer: Any,
    layer: int,
    prompts: Sequence[Prompt],
    make_edit: Callable[[], Edit] | None,
    tokens: Tokens,
    leave_out: int,
    ends: frozenset[int],
    sampling: Sampling,
) -> list[Answer]:
    """The answer to each prompt. `make_edit` makes a fresh edit for each batch, None leaves the model as it is.

    Raises:
        UserError: a prompt and its answer are longer than what the model can read.
    """
    _check_length(model, max(len(prompt.token_ids) for prompt in prompts), sampling.max_new_tokens)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt.token_ids)].append(index)
    found: dict[int, Answer] = {}
    for members in by_length.values():
        for first in range(0, len(members), sampling.batch_size):
            part = members[first : first + sampling.batch_size]
            edit = None if make_edit is None else make_edit()
            batch = [prompts[index] for index in part]
            outputs = continue_batch(model, layer, batch, edit, tokens, leave_out, ends, sampling)
            for index, output in zip(part, outputs, strict=True):
                text = tokenizer.decode(output, skip_special_tokens=True).strip()
                found[index] = Answer(text, len(output), len(output) < sampling.max_new_tokens)
    return [found[index] for index in range(len(prompts))]
