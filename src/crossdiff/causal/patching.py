"""Patching: go on from edited activations and measure how far the next-token distributions are from the chat model's.

For a batch of conversations the lower half of each model runs once, the crosscoder encodes once and the reference
distribution is computed once; an arm then costs one upper half over the sequences that it changes. A sequence that an arm
leaves as it was has the divergence of the unedited one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from crossdiff.causal.conversations import SPANS, pad, pad_column, span_of
from crossdiff.causal.interventions import Arm
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.models.access import UpperHalf, residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Float64, Int, Tensor
from crossdiff.text.sequences import TokenSequence

BASE, CHAT = 0, 1
ROWS = 64
"""Rows of logits that are compared at a time: few enough to stay in the cache, which is three times as fast (measured)."""


@dataclass(frozen=True)
class DecoderDifference:
    """What a coder and the mean difference say separates the models, in the models' own space.

    Attributes:
        directions: d_j^chat - d_j^base, or the one decoder of a coder of the difference itself (a diff-SAE).
        bias: the same of what the reconstructions hold when no latent is active.
        means: see `conversations.mean_differences`.
    """

    directions: Float[Tensor, "latent d_model"]
    bias: Float[Tensor, " d_model"]
    means: Float[Tensor, "group d_model"]

    @classmethod
    def of(cls, crosscoder: Crosscoder, means: Float[Tensor, "group d_model"]) -> DecoderDifference:
        """Undo the normalisation: direction d_j / scale, bias mean_m + b_m / scale."""
        directions = crosscoder.directions() / crosscoder.scale
        held = crosscoder.decoder_bias.view(crosscoder.n_sources, -1) / crosscoder.scale + crosscoder.mean
        if crosscoder.n_sources == 1:
            return cls(directions[0].contiguous(), held[0], means.to(directions))
        return cls((directions[CHAT] - directions[BASE]).contiguous(), held[CHAT] - held[BASE], means.to(directions))


@dataclass(frozen=True)
class Differences:
    """What separates the models on some tokens, split into parts that add up.

    Attributes:
        base, chat: activations. code: active latents. groups: index into `GROUPS` of each token.
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
        """sum_{j in T} f_j (d_j^chat - d_j^base); T is all for None."""
        if chosen is None:
            return self._all_latents
        member = torch.zeros(self.code.n_latents, dtype=torch.bool, device=self.code.latent.device)
        member[list(chosen)] = True
        kept = member[self.code.latent]
        code = SparseCode(
            self.code.token[kept], self.code.latent[kept], self.code.values[kept], self.code.n_tokens, self.code.n_latents
        )
        return code.decode(self.decoder.directions)

    def part(self, kind: str) -> Float[Tensor, "#token d_model"]:
        """A part of an arm beside its latents."""
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

    def of(self, arm: Arm) -> Float[Tensor, "token d_model"]:
        """What the arm adds to the base activations."""
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

        Equal logits give 0 exactly. Written with log-probabilities, the rounding of large logits would not cancel.
        """
        blocks = zip(torch.split(logits, ROWS), torch.split(rows.nonzero().squeeze(1), ROWS), strict=True)
        kl = torch.cat([self._block(block.float(), index) for block, index in blocks])
        return kl.clamp(min=0)  # rounding can leave it a little below

    def _block(self, logits: Float[Tensor, "row vocabulary"], index: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        product: Tensor = torch.linalg.vecdot(self.p[index], self.logits[index] - logits)
        return product + logits.logsumexp(1) - self.log_total[index]


@dataclass(frozen=True)
class Divergences:
    """KL of a batch: sums over the tokens of each span and, the same for all arms, their numbers."""

    total: Float64[Tensor, "arm conversation span"]
    n: Int[Tensor, "conversation span"]


class Patcher:
    """Measures the arms of an experiment on batches of conversations.

    Args:
        means: mean differences, for arms that add one.
        leave_out: leading positions that take the chat model's activations in every arm.
    """

    def __init__(
        self,
        pair: Pair,
        crosscoder: Crosscoder,
        layer: int,
        arms: tuple[Arm, ...],
        means: Float[Tensor, "group d_model"],
        leave_out: int,
    ) -> None:
        self.pair, self.crosscoder, self.layer, self.arms = pair, crosscoder, layer, arms
        self.decoder, self.leave_out = DecoderDifference.of(crosscoder, means), leave_out
        self.device = next(pair.base.parameters()).device
        needed = {"chat", *(arm.continues for arm in arms)}
        self.upper: Mapping[str, UpperHalf] = {name: UpperHalf(getattr(pair, name), layer) for name in sorted(needed)}

    def differences(
        self, base: Float[Tensor, "token d_model"], chat: Float[Tensor, "token d_model"], groups: Int[Tensor, " token"]
    ) -> Differences:
        """The parts of the models' difference on some tokens, on the crosscoder's device."""
        home = self.crosscoder.encoder.device
        base, chat = base.float().to(home), chat.float().to(home)
        code = self.crosscoder.sparse_code(self.crosscoder.normalise(torch.stack([base, chat], dim=1)))
        return Differences(self.decoder, base, chat, groups.to(home), code)

    @torch.no_grad()
    def measure(self, batch: list[TokenSequence]) -> Divergences:
        """KL of each arm on each conversation, summed over the tokens of each span."""
        pad_id = self.pair.tokenizer.pad_token_id if self.pair.tokenizer.pad_token_id is not None else 0
        ids, mask = pad(batch, pad_id, self.device)
        span = pad_column([span_of(sequence.flags) for sequence in batch], -1, self.device)
        group = pad_column([group_of(sequence.flags) for sequence in batch], 0, self.device)
        base, chat = (
            residuals_after(model, read, [self.layer])[0]
            for model, read in ((self.pair.base, self.pair.base_ids(ids)), (self.pair.chat, ids))
        )
        counted = mask.bool() & (torch.arange(ids.shape[1], device=self.device) >= self.leave_out)
        predicts = span >= 0
        reference = Reference(self.upper["chat"].logits(chat, ids, mask, predicts))
        differences = self.differences(base[counted], chat[counted], group[counted])
        unedited = torch.where(counted.unsqueeze(2), base, chat)
        conversation = predicts.nonzero()[:, 0]
        cell = conversation * len(SPANS) + span[predicts]
        plain: dict[str, Tensor] = {}

        def divergence(hidden: Tensor, continues: str, rows: Bool[Tensor, " sequence"]) -> Float[Tensor, " row"]:
            logits = self.upper[continues].logits(hidden[rows], ids[rows], mask[rows], predicts[rows])
            return reference.kl(logits, rows[conversation])

        totals = []
        for arm in self.arms:
            if arm.continues not in plain:
                plain[arm.continues] = divergence(unedited, arm.continues, torch.ones_like(mask[:, 0], dtype=torch.bool))
            kl, edited = plain[arm.continues].clone(), unedited.clone()
            edited[counted] += differences.of(arm).to(edited)
            changed = (edited != unedited).flatten(1).any(1)
            if changed.any():
                kl[changed[conversation]] = divergence(edited, arm.continues, changed)
            totals.append(
                torch.zeros(len(batch) * len(SPANS), dtype=torch.float64).index_add_(0, cell.cpu(), kl.double().cpu())
            )
        n = torch.bincount(cell.cpu(), minlength=len(batch) * len(SPANS))
        return Divergences(torch.stack(totals).view(len(self.arms), len(batch), -1), n.view(len(batch), -1))
