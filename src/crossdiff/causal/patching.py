"""Patching: continue from edited activations and measure KL to the chat model's next-token distributions.

For a batch of conversations, the lower half of each model, the crosscoder and the reference distribution are computed once. An
arm then costs one upper half over the sequences that it changes; the other sequences have the divergence of the unedited ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from crossdiff.activations.counted import Counted
from crossdiff.causal.conversations import SPANS, pad, pad_column, span_of
from crossdiff.causal.interventions import Arm
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.models.access import UpperHalf, residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Float64, Int, Tensor
from crossdiff.sources import BASE, CHAT, SOURCES
from crossdiff.text.sequences import TokenSequence

BASE_INDEX, CHAT_INDEX = SOURCES.index(BASE), SOURCES.index(CHAT)
ROWS = 64
"""Rows of logits that are compared at a time: few enough to stay in the cache, which is three times as fast (measured)."""


@dataclass(frozen=True)
class DecoderDifference:
    """The difference between the models according to a coder and to the mean difference, in the models' own space.

    Attributes:
        directions: d_j^chat - d_j^base, or the single decoder of a coder of the difference (a diff-SAE).
        bias: the difference of the reconstructions when no latent is active.
        means: see `conversations.mean_differences`.
    """

    directions: Float[Tensor, "latent d_model"]
    bias: Float[Tensor, " d_model"]
    means: Float[Tensor, "group d_model"]

    @classmethod
    def from_crosscoder(cls, crosscoder: Crosscoder, means: Float[Tensor, "group d_model"]) -> DecoderDifference:
        """Undo the normalisation: direction d_j / scale, bias mean_m + b_m / scale."""
        directions = crosscoder.directions() / crosscoder.scale
        biases = crosscoder.decoder_bias.view(crosscoder.n_sources, -1) / crosscoder.scale + crosscoder.mean
        means = means.to(directions)
        if crosscoder.n_sources == 1:
            return cls(directions[0].contiguous(), biases[0], means)
        difference = directions[CHAT_INDEX] - directions[BASE_INDEX]
        return cls(difference.contiguous(), biases[CHAT_INDEX] - biases[BASE_INDEX], means)


@dataclass(frozen=True)
class Differences:
    """The difference between the models on some tokens, split into parts that add up.

    Attributes:
        base, chat: activations.
        groups: index into `GROUPS` of each token.
        code: active latents.
    """

    decoder: DecoderDifference
    base: Float[Tensor, "token d_model"]
    chat: Float[Tensor, "token d_model"]
    groups: Int[Tensor, " token"]
    code: SparseCode

    @cached_property
    def _all_latents(self) -> Float[Tensor, "token d_model"]:
        return self.code.decode(self.decoder.directions)

    def latents(self, chosen: tuple[int, ...] | None) -> Float[Tensor, "token d_model"]:
        """sum_{j in T} f_j (d_j^chat - d_j^base); T is all latents for None."""
        if chosen is None:
            return self._all_latents
        code = self.code
        is_chosen = torch.zeros(code.n_latents, dtype=torch.bool, device=code.latent.device)
        is_chosen[list(chosen)] = True
        kept = is_chosen[code.latent]
        part = SparseCode(code.token[kept], code.latent[kept], code.values[kept], code.n_tokens, code.n_latents)
        return part.decode(self.decoder.directions)

    def part(self, kind: str) -> Float[Tensor, "#token d_model"]:
        """A part of an arm other than latents."""
        match kind:
            case "activation":
                return self.chat - self.base
            case "bias":
                return self.decoder.bias.unsqueeze(0)
            case "error":
                return self.chat - self.base - self._all_latents - self.decoder.bias
            case "mean_difference_conversations":
                return self.decoder.means[-1:]
            case "mean_difference_token_group":
                return self.decoder.means[self.groups]
        raise AssertionError(kind)

    def added_by(self, arm: Arm) -> Float[Tensor, "token d_model"]:
        """What an arm adds to the base activations."""
        total = torch.zeros_like(self.base) if arm.latents == () else self.latents(arm.latents).clone()
        for kind in arm.others:
            total += self.part(kind)
        if arm.tokens != "all":
            on_template = self.groups == GROUPS.index("template")
            total[~on_template if arm.tokens == "template" else on_template] = 0
        return total


class Reference:
    """The chat model's next-token distributions, from its logits `[prediction, vocabulary]`."""

    def __init__(self, logits: Float[Tensor, "prediction vocabulary"]) -> None:
        self.logits = logits.float()
        self.log_total = self.logits.logsumexp(1)
        self.p = (self.logits - self.log_total.unsqueeze(1)).exp()

    def kl(self, logits: Float[Tensor, "row vocabulary"], rows: Bool[Tensor, " prediction"]) -> Float[Tensor, " row"]:
        """KL(p_chat || p) of the given rows in nats: <p_chat, z_chat - z> + log sum exp z - log sum exp z_chat.

        Equal logits give exactly 0. With log-probabilities, the rounding errors of large logits would not cancel.
        """
        blocks = zip(torch.split(logits, ROWS), torch.split(rows.nonzero().squeeze(1), ROWS), strict=True)
        kl = torch.cat([self._block(block.float(), index) for block, index in blocks])
        return kl.clamp(min=0)  # rounding can make it slightly negative

    def _block(self, logits: Float[Tensor, "row vocabulary"], index: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        product: Tensor = torch.linalg.vecdot(self.p[index], self.logits[index] - logits)
        return product + logits.logsumexp(1) - self.log_total[index]


@dataclass(frozen=True)
class Divergences:
    """KL of a batch, summed over the tokens of each span, and the number of these tokens, which all arms share."""

    total: Float64[Tensor, "arm conversation span"]
    n: Int[Tensor, "conversation span"]


class Patcher:
    """Measures the arms of an experiment on batches of conversations.

    Args:
        means: mean differences, for the arms that add one.
        rule: tokens that it does not count take the chat model's activations in every arm.
    """

    def __init__(
        self,
        pair: Pair,
        crosscoder: Crosscoder,
        layer: int,
        arms: tuple[Arm, ...],
        means: Float[Tensor, "group d_model"],
        rule: Counted,
    ) -> None:
        self.pair = pair
        self.crosscoder = crosscoder
        self.layer = layer
        self.arms = arms
        self.rule = rule
        self.decoder = DecoderDifference.from_crosscoder(crosscoder, means)
        needed = {CHAT, *(arm.continues for arm in arms)}
        self.upper: Mapping[str, UpperHalf] = {name: UpperHalf(getattr(pair, name), layer) for name in sorted(needed)}

    def differences(
        self, base: Float[Tensor, "token d_model"], chat: Float[Tensor, "token d_model"], groups: Int[Tensor, " token"]
    ) -> Differences:
        """The parts of the models' difference on some tokens, on the crosscoder's device."""
        device = self.crosscoder.encoder.device
        base = base.float().to(device)
        chat = chat.float().to(device)
        code = self.crosscoder.sparse_code(self.crosscoder.normalise(torch.stack([base, chat], dim=1)))
        return Differences(self.decoder, base, chat, groups.to(device), code)

    @torch.no_grad()
    def measure(self, batch: list[TokenSequence]) -> Divergences:
        """KL of each arm on each conversation, summed over the tokens of each span."""
        device = self.pair.device
        pad_id = self.pair.tokenizer.pad_token_id
        ids, mask = pad(batch, 0 if pad_id is None else pad_id, device)
        span = pad_column([span_of(sequence.flags) for sequence in batch], -1, device)
        group = pad_column([group_of(sequence.flags) for sequence in batch], 0, device)
        base = residuals_after(self.pair.base, self.pair.base_ids(ids), [self.layer])[0]
        chat = residuals_after(self.pair.chat, ids, [self.layer])[0]
        counted = mask.bool() & self.rule(torch.arange(ids.shape[1], device=device), [base, chat])
        predicts = span >= 0
        reference = Reference(self.upper[CHAT].logits(chat, ids, mask, predicts))
        differences = self.differences(base[counted], chat[counted], group[counted])
        unedited = torch.where(counted.unsqueeze(2), base, chat)
        conversation = predicts.nonzero()[:, 0]

        def divergence(hidden: Tensor, continues: str, rows: Bool[Tensor, " sequence"]) -> Float[Tensor, " row"]:
            read = self.pair.ids_of(continues, ids[rows])
            logits = self.upper[continues].logits(hidden[rows], read, mask[rows], predicts[rows])
            return reference.kl(logits, rows[conversation])

        every_row = torch.ones(len(batch), dtype=torch.bool, device=device)
        kl_unedited = {name: divergence(unedited, name, every_row) for name in dict.fromkeys(a.continues for a in self.arms)}
        cell = (conversation * len(SPANS) + span[predicts]).cpu()
        n_cells = len(batch) * len(SPANS)
        totals = []
        for arm in self.arms:
            kl = kl_unedited[arm.continues].clone()
            edited = unedited.clone()
            edited[counted] += differences.added_by(arm).to(edited)
            changed = (edited != unedited).flatten(1).any(1)
            if changed.any():
                kl[changed[conversation]] = divergence(edited, arm.continues, changed)
            totals.append(torch.zeros(n_cells, dtype=torch.float64).index_add_(0, cell, kl.double().cpu()))
        n = torch.bincount(cell, minlength=n_cells)
        return Divergences(torch.stack(totals).view(len(self.arms), len(batch), -1), n.view(len(batch), -1))
