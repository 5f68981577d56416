"""How two models predict the next token differently, at every position of a text.

    KL(chat || base) = sum_w p_chat(w) log(p_chat(w) / p_base(w))      in nats

over the ids that both models have. Chat models often have a few more, for their own template; both distributions are
renormalised over the common ids, and the probability that the chat model gives to the others is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crossdiff.shapes import Float, Float64, Int64, Tensor

CHUNK_BYTES = 1 << 27
"""Size of the log-probabilities of one model that are computed at a time."""
LARGE_SHIFT = 0.05
"""Change of a token's probability from which a position counts as one where it rises or falls."""


@dataclass(frozen=True)
class Predictions:
    """The next token as both models predict it, one entry per position.

    Attributes:
        kl: KL(chat || base) in nats.
        log_base, log_chat: log-probability of the text's own next token; NaN where the text ends, or a model lacks the token.
        top_base, top_chat: each model's likeliest token, with its probabilities `p_base` and `p_chat` in that model.
        outside: probability that the chat model gives to ids that the base model lacks.
    """

    kl: Float[Tensor, " position"]
    log_base: Float[Tensor, " position"]
    log_chat: Float[Tensor, " position"]
    top_base: Int64[Tensor, " position"]
    p_base: Float[Tensor, " position"]
    top_chat: Int64[Tensor, " position"]
    p_chat: Float[Tensor, " position"]
    outside: Float[Tensor, " position"]


class Shifts:
    """Collects, for every token of the vocabulary, how much more often the chat model expects it.

    Args:
        first: number of positions before the ones that are added.
    """

    def __init__(self, n_tokens: int, device: torch.device, first: int = 0) -> None:
        self._rise: Float64[Tensor, " token"] = torch.zeros(n_tokens, dtype=torch.float64, device=device)
        self._large: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_positions = first

    def add(self, p_base: Float[Tensor, "position token"], p_chat: Float[Tensor, "position token"]) -> None:
        """Add positions."""
        change = p_chat - p_base
        self._rise += change.sum(0)
        position, token = (change.abs() > LARGE_SHIFT).nonzero(as_tuple=True)
        self._large.append(((position + self._n_positions).cpu(), token.cpu(), change[position, token].cpu()))
        self._n_positions += len(change)

    def tensors(self) -> dict[str, Tensor]:
        """`rise`: sum over positions of p_chat - p_base, in expected occurrences, one per token of the vocabulary;
        `large_position`, `large_token`, `large_change`: the single changes of more than `LARGE_SHIFT`, in the order of the
        positions.
        """
        nothing = torch.zeros(0, dtype=torch.int64)
        position, token, change = (
            torch.cat(parts) for parts in zip((nothing, nothing, torch.zeros(0)), *self._large, strict=True)
        )
        return {"rise": self._rise, "large_position": position, "large_token": token, "large_change": change}


@torch.no_grad()
def compare(
    base_logits: Float[Tensor, "position base_token"],
    chat_logits: Float[Tensor, "position chat_token"],
    base_next: Int64[Tensor, " position"],
    chat_next: Int64[Tensor, " position"],
    shifts: Shifts | None = None,
) -> Predictions:
    """Compare the predictions of two models, some positions at a time. Logits that are not finite make the KL NaN.

    Args:
        base_next, chat_next: the text's next token as each model reads it; -1 where there is none.
    """
    n_common = min(base_logits.shape[1], chat_logits.shape[1])
    size = max(1, CHUNK_BYTES // (4 * chat_logits.shape[1]))
    parts = []
    for first in range(0, len(chat_logits), size):
        part = slice(first, first + size)
        base, whole = base_logits[part, :n_common].float(), chat_logits[part].float()
        chat = whole if whole.shape[1] == n_common else whole[:, :n_common]
        p_base, p_chat = base.softmax(1), chat.softmax(1)
        if shifts is not None:
            shifts.add(p_base, p_chat)
        (best_base, top_base), (best_chat, top_chat) = p_base.max(1), p_chat.max(1)
        # log p = logit - total; the totals follow from the likeliest token, without another pass.
        total_base = base.gather(1, top_base.unsqueeze(1)).squeeze(1) - best_base.log()
        total_chat = chat.gather(1, top_chat.unsqueeze(1)).squeeze(1) - best_chat.log()
        kl = torch.linalg.vecdot(p_chat, chat) - torch.linalg.vecdot(p_chat, base) - (total_chat - total_base)
        log_base, log_chat = _at(base, base_next[part]) - total_base, _at(chat, chat_next[part]) - total_chat
        outside = kl.new_zeros(len(kl)) if chat is whole else whole.softmax(1)[:, n_common:].sum(1)
        found = (kl.clamp(min=0), log_base, log_chat, top_base, best_base, top_chat, best_chat, outside)
        parts.append(tuple(each.cpu() for each in found))
    return Predictions(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _at(logits: Float[Tensor, "position token"], token: Int64[Tensor, " position"]) -> Float[Tensor, " position"]:
    """The logit of one token per position; NaN where there is none, or the model lacks it."""
    known = (token >= 0) & (token < logits.shape[1])
    found = logits.gather(1, token.where(known, torch.zeros_like(token)).unsqueeze(1)).squeeze(1)
    return found.where(known, torch.full_like(found, torch.nan))
