"""The logit lens: the tokens that a direction of the residual stream promotes in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float, Tensor


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
        UserError: a model has no final norm that is known.
    """
    found = []
    for name, model, direction in (
        ("base direction, base model", pair.base, base),
        ("chat direction, chat model", pair.chat, chat),
        ("chat minus base direction, chat model", pair.chat, chat - base),
    ):
        logits = direction_logits(model, direction)
        up, down = (_tokens(pair.tokenizer, logits, n, largest) for largest in (True, False))
        found.append(Promoted(name, up, down))
    return tuple(found)


def _tokens(tokenizer: Any, logits: Float[Tensor, " vocabulary"], n: int, largest: bool) -> tuple[tuple[str, float], ...]:
    top = logits.topk(min(n, len(logits)), largest=largest)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple((tokenizer.decode([token]), value) for token, value in pairs)


def direction_logits(model: Any, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " vocabulary"]:
    """Logits of a direction of the residual stream, through the final norm and the unembedding.

    Applying the norm module to the direction covers every architecture's way of storing its gain. The norm of a zero vector,
    which is the norm's bias, is subtracted.
    """
    trunk = model.base_model
    names = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
    norm = next((getattr(trunk, name) for name in names if hasattr(trunk, name)), None)
    if norm is None:
        raise UserError(f"{type(model).__name__} has no final norm named {', '.join(names)}, so the logit lens is unavailable")
    unembedding = model.get_output_embeddings()
    weight = unembedding.weight
    vectors = torch.stack([direction.to(weight), torch.zeros_like(direction).to(weight)])
    normed = norm(vectors)
    logits: Tensor = ((normed[0] - normed[1]) @ weight.T).float().cpu()
    return logits
