"""The logit lens: the tokens that a direction of the residual stream promotes in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.access import decoder_layers
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float, Tensor
from crossdiff.text.token_texts import token_text

NAMES = ("base direction, base model", "chat direction, chat model", "chat minus base direction, chat model")


@dataclass(frozen=True)
class Promoted:
    """Logit lens of one direction: the tokens that it promotes (`up`) and demotes (`down`), with their logits."""

    name: str
    up: tuple[tuple[str, float], ...]
    down: tuple[tuple[str, float], ...]


@torch.no_grad()
def lenses(pair: Pair, base: Float[Tensor, " d_model"], chat: Float[Tensor, " d_model"], n: int) -> tuple[Promoted, ...]:
    """What a base and a chat direction promote: base in the base model, chat and chat minus base in the chat model.

    Raises:
        UserError: a model has no norm after its layers, or its unembedding reads other vectors than the residual stream's.
    """
    found = []
    for name, model, direction in read_in(pair, base, chat):
        logits = direction_logits(model, direction)
        up, down = (_tokens(pair.tokenizer, logits, n, largest) for largest in (True, False))
        found.append(Promoted(name, up, down))
    return tuple(found)


def read_in(
    pair: Pair, base: Float[Tensor, "*direction d_model"], chat: Float[Tensor, "*direction d_model"]
) -> tuple[tuple[str, Any, Float[Tensor, "*direction d_model"]], ...]:
    """What the lens reads, in the order of `NAMES`: name, model and directions of each."""
    return tuple(zip(NAMES, (pair.base, pair.chat, pair.chat), (base, chat, chat - base), strict=True))


def _tokens(tokenizer: Any, logits: Float[Tensor, " vocabulary"], n: int, largest: bool) -> tuple[tuple[str, float], ...]:
    top = logits.cpu().topk(min(n, len(logits)), largest=largest)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple((token_text(tokenizer, token).text, value) for token, value in pairs)


def direction_logits(model: Any, direction: Float[Tensor, "*direction d_model"]) -> Float[Tensor, "*direction vocabulary"]:
    """Logits of directions of the residual stream, through the final norm and the unembedding.

    Applying the norm module to a direction covers every architecture's way of storing its gain. The norm of a zero vector,
    which is the norm's bias, is subtracted.
    """
    norm, weight = _final_norm(model), model.get_output_embeddings().weight
    if weight.shape[1] != direction.shape[-1]:
        raise UserError(
            f"the unembedding of {type(model).__name__} reads vectors of {weight.shape[1]} dimensions, and its residual stream "
            f"has {direction.shape[-1]}, so the logit lens is unavailable"
        )
    vectors = direction.to(weight).view(-1, weight.shape[1])
    normed = norm(vectors) - norm(torch.zeros_like(vectors[:1]))
    logits: Tensor = (normed @ weight.T).float()
    return logits.view(*direction.shape[:-1], weight.shape[0])


def _final_norm(model: Any) -> nn.Module:
    """The norm between the last decoder layer and the unembedding: the last one after the list of layers in the module that
    holds it, or before it (as in OPT), where an architecture has none after it."""
    layers = decoder_layers(model)
    beside = next(list(module.children()) for module in model.modules() if any(child is layers for child in module.children()))
    norms = [child for child in beside if "norm" in type(child).__name__.lower()]  # those after the list are the last
    if not norms:
        raise UserError(f"{type(model).__name__} has no norm after its decoder layers, so the logit lens is unavailable")
    norm: nn.Module = norms[-1]
    return norm
