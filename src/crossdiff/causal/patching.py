"""Patching: continue from edited activations and compare the next-token distributions with those of the two models.

For a batch of conversations, the lower half of each model, the crosscoder and the reference distribution are computed once. An
arm then costs one upper half over the sequences that it changes; the other sequences have the divergence of the unedited ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

import torch

from crossdiff.activations.counted import Counted
from crossdiff.causal.conversations import SPANS, number_in_message, pad, pad_column, span_of
from crossdiff.causal.interventions import (
    Arm,
    DifferencePart,
    FirstTokens,
    MeanDifferencePart,
    OtherPart,
    PatchedTokens,
    PrincipalPart,
    Start,
)
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.models.access import UpperHalf, residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Float64, Int, Tensor
from crossdiff.sources import BASE, CHAT, SOURCES
from crossdiff.text.sequences import TokenSequence

RANK_TOLERANCE = 1e-10
"""Squared singular values below this share of the largest are 0."""
KL = "kl"
"""The first measure of every arm: KL(p_chat || p). The others are those of `interventions.Measure`."""
ROWS = 64
"""Rows of logits that are compared at a time: few enough to stay in the cache, which is three times as fast (measured)."""


def _biases(crosscoder: Crosscoder) -> Float[Tensor, "source d_model"]:
    """The reconstructions when no latent is active."""
    return crosscoder.decoder_bias.view(crosscoder.n_sources, -1) / crosscoder.scale + crosscoder.mean


@dataclass(frozen=True)
class DecoderDifference:
    """The difference between the models according to a coder and to the mean difference, in the models' own space.

    Attributes:
        crosscoder: the coder itself.
        directions: d_j^chat - d_j^base, or the single decoder of a coder of the difference (a diff-SAE).
        bias: the difference of the reconstructions when no latent is active.
        means: see `conversations.mean_differences`.
        principal: see `conversations.principal_directions`; None where no arm needs them.
        ends: the sources of the crosscoder that are the base and the chat model here, as indices.
    """

    crosscoder: Crosscoder
    directions: Float[Tensor, "latent d_model"]
    bias: Float[Tensor, " d_model"]
    means: Float[Tensor, "group d_model"]
    principal: Float[Tensor, "component d_model"] | None = None
    ends: tuple[int, int] = (BASE_INDEX, CHAT_INDEX)

    @classmethod
    def from_crosscoder(
        cls,
        crosscoder: Crosscoder,
        means: Float[Tensor, "group d_model"],
        principal: Tensor | None = None,
        ends: tuple[int, int] = (BASE_INDEX, CHAT_INDEX),
    ) -> DecoderDifference:
        """Undo the normalisation: direction d_j / scale, bias mean_m + b_m / scale."""
        directions = crosscoder.directions() / crosscoder.scale
        biases = _biases(crosscoder)
        means = means.to(directions)
        principal = None if principal is None else principal.to(directions)
        if crosscoder.n_sources == 1:
            return cls(crosscoder, directions[0].contiguous(), biases[0], means, principal)
        before, after = ends
        difference = directions[after] - directions[before]
        return cls(crosscoder, difference.contiguous(), biases[after] - biases[before], means, principal, ends)

    def of_model(self, model: int) -> Float[Tensor, "latent d_model"]:
        """d_j of one model."""
        return (self.crosscoder.directions()[model] / self.crosscoder.scale).contiguous()

    @cached_property
    def chat(self) -> Float[Tensor, "latent d_model"]:
        """d_j^chat."""
        return self.of_model(self.ends[1])

    @cached_property
    def _projections(self) -> dict[tuple[int, ...] | None, Tensor]:
        return {}

    def span(self, chosen: tuple[int, ...] | None) -> Float[Tensor, "d_model d_model"]:
        """The projection onto the span of the chosen latents' chat directions."""
        if chosen not in self._projections:
            directions = self.chat if chosen is None else self.chat[list(chosen)]
            # In float64: the squares of singular values that are 0 are far below those that count.
            values, vectors = torch.linalg.eigh(directions.double().T @ directions.double())
            basis = vectors[:, values > RANK_TOLERANCE * values.max()]
            self._projections[chosen] = (basis @ basis.T).to(self.directions)
        return self._projections[chosen]


@dataclass(frozen=True)
class Differences:
    """The difference between the models on some tokens, split into parts that add up.

    Attributes:
        base, chat: activations.
        groups: index into `GROUPS` of each token.
        numbers: see `conversations.number_in_message`.
        code: active latents.
    """

    decoder: DecoderDifference
    base: Float[Tensor, "token d_model"]
    chat: Float[Tensor, "token d_model"]
    groups: Int[Tensor, " token"]
    numbers: Int[Tensor, " token"]
    code: SparseCode

    @cached_property
    def _all_latents(self) -> Float[Tensor, "token d_model"]:
        return self.code.decode(self.decoder.directions)

    def latents(self, arm: Arm) -> Float[Tensor, "token d_model"]:
        """What the latents of an arm contribute; see `LatentsPart`."""
        match arm.use:
            case "difference":
                if arm.latents is None:
                    return self._all_latents
                return self._code_of(arm.latents).decode(self.decoder.directions)
            case "chat":
                return self._code_of(arm.latents).decode(self.decoder.chat)
            case "projection" | "complement":
                difference = self.chat - self.base
                projected = difference @ self.decoder.span(arm.latents)
                return projected if arm.use == "projection" else difference - projected
        assert_never(arm.use)

    def _code_of(self, chosen: tuple[int, ...] | None) -> SparseCode:
        """The code of the chosen latents alone."""
        code = self.code
        if chosen is None:
            return code
        is_chosen = torch.zeros(code.n_latents, dtype=torch.bool, device=code.latent.device)
        is_chosen[list(chosen)] = True
        kept = is_chosen[code.latent]
        return SparseCode(code.token[kept], code.latent[kept], code.values[kept], code.n_tokens, code.n_latents)

    def part(self, part: OtherPart) -> Float[Tensor, "#token d_model"]:
        """A part of an arm other than latents."""
        match part:
            case DifferencePart(kind="activation"):
                return self.chat - self.base
            case DifferencePart(kind="bias"):
                return self.decoder.bias.unsqueeze(0)
            case DifferencePart():
                return self.chat - self.base - self._all_latents - self.decoder.bias
            case MeanDifferencePart(over="conversations"):
                return self.decoder.means[-1:]
            case MeanDifferencePart():
                return self.decoder.means[self.groups]
            case PrincipalPart():
                assert self.decoder.principal is not None
                basis = self.decoder.principal[list(part.components)]
                difference = self.chat - self.base
                projected = difference @ basis.T @ basis
                return difference - projected if part.complement else projected
        assert_never(part)

    def start(self, start: Start) -> Float[Tensor, "token d_model"]:
        """What an arm edits: a model's activations or their reconstruction without its error."""
        match start:
            case "base":
                return self.base
            case "chat":
                return self.chat
        model = self.decoder.ends[start == "chat_reconstruction"]
        return self.code.decode(self.decoder.of_model(model)) + _biases(self.decoder.crosscoder)[model]

    def change(self, arm: Arm) -> Float[Tensor, "token d_model"]:
        """What an arm adds to its start: the parts, or minus the parts where it starts from the chat side."""
        total = torch.zeros_like(self.base) if arm.latents == () else self.latents(arm).clone()
        for part in arm.others:
            total += self.part(part)
        total[~self._is_edited(arm.tokens)] = 0
        return -total if arm.start.startswith(CHAT) else total

    def _is_edited(self, tokens: PatchedTokens) -> Bool[Tensor, " token"]:
        on_template = self.groups == GROUPS.index("template")
        match tokens:
            case "all":
                return torch.ones_like(on_template)
            case "template":
                return on_template
            case "content":
                return ~on_template
            case FirstTokens():
                first = (self.numbers > 0) & (self.numbers <= tokens.k) & ~on_template
                return first | on_template if tokens.template else first
        assert_never(tokens)


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
class References:
    """What the distributions of an arm are compared with: those of both models, and the tokens that follow.

    Attributes:
        base: None where no measure needs it.
    """

    chat: Reference
    base: Reference | None
    answer: Int[Tensor, " prediction"]

    def measured(
        self, measures: Sequence[str], logits: Float[Tensor, "row vocabulary"], rows: Bool[Tensor, " prediction"]
    ) -> Float[Tensor, "measure row"]:
        """Each measure of the given rows, in nats."""
        return torch.stack([self._measure(name, logits, rows) for name in measures])

    def _measure(
        self, name: str, logits: Float[Tensor, "row vocabulary"], rows: Bool[Tensor, " prediction"]
    ) -> Float[Tensor, " row"]:
        match name:
            case "kl":
                return self.chat.kl(logits, rows)
            case "kl_base":
                assert self.base is not None
                return self.base.kl(logits, rows)
            case "nll":
                return -_log_probability(logits, self.answer[rows])
            case "cross_entropy":
                return -_log_probability(logits, self.chat.logits[rows].argmax(1))
        raise AssertionError(name)


def _log_probability(logits: Float[Tensor, "row vocabulary"], token: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    chosen = logits.gather(1, token.unsqueeze(1)).squeeze(1).float()
    blocks = [block.float().logsumexp(1) for block in torch.split(logits, ROWS)]
    return chosen - torch.cat(blocks)


@dataclass(frozen=True)
class Divergences:
    """The measures of a batch, summed over the tokens of each span, and the number of these tokens, which all arms share."""

    total: Float64[Tensor, "measure arm conversation span"]
    n: Int[Tensor, "conversation span"]


class Patcher:
    """Measures the arms of an experiment on batches of conversations.

    Args:
        means: mean differences, for the arms that add one.
        rule: tokens that it does not count take the activations of the model that continues.
        principal: principal directions of the difference, for the arms that project onto some.
        measures: names of the measures.
        between: the models that are the base and the chat model here: of a chain, any two of them.
    """

    def __init__(
        self,
        pair: Pair,
        crosscoder: Crosscoder,
        layer: int,
        arms: tuple[Arm, ...],
        means: Float[Tensor, "group d_model"],
        rule: Counted,
        principal: Float[Tensor, "component d_model"] | None = None,
        measures: tuple[str, ...] = (KL,),
        between: tuple[str, str] = SOURCES,
    ) -> None:
        self.pair = pair
        self.crosscoder = crosscoder
        self.layer = layer
        self.arms = arms
        self.rule = rule
        self.measures = measures
        self.reads = crosscoder.view.reads
        self.ends = (self.reads.index(between[0]), self.reads.index(between[1]))
        self.decoder = DecoderDifference.from_crosscoder(crosscoder, means, principal, self.ends)
        needed = {CHAT, *(arm.continues for arm in arms), *([BASE] if "kl_base" in measures else [])}
        self.model_of = dict(zip(SOURCES, between, strict=True))
        self.upper: Mapping[str, UpperHalf] = {
            name: UpperHalf(pair.model(self.model_of[name]), layer) for name in sorted(needed)
        }

    def differences(
        self,
        streams: Sequence[Float[Tensor, "token d_model"]],
        groups: Int[Tensor, " token"],
        numbers: Int[Tensor, " token"],
    ) -> Differences:
        """The parts of the models' difference on some tokens, on the crosscoder's device, from all streams that it reads."""
        device = self.crosscoder.encoder.device
        streams = [stream.float().to(device) for stream in streams]
        code = self.crosscoder.sparse_code(self.crosscoder.normalise(torch.stack(streams, dim=1)))
        base, chat = (streams[end] for end in self.ends)
        return Differences(self.decoder, base, chat, groups.to(device), numbers.to(device), code)

    @torch.no_grad()
    def measure(self, batch: list[TokenSequence]) -> Divergences:
        """The measures of each arm on each conversation, summed over the tokens of each span."""
        device = self.pair.device
        pad_id = self.pair.tokenizer.pad_token_id
        ids, mask = pad(batch, 0 if pad_id is None else pad_id, device)
        span, group, number = (
            pad_column([of(sequence.flags) for sequence in batch], fill, device)
            for of, fill in ((span_of, -1), (group_of, 0), (number_in_message, 0))
        )
        streams = [
            residuals_after(self.pair.model(source), self.pair.ids_of(source, ids), [self.layer])[0] for source in self.reads
        ]
        base, chat = (streams[end] for end in self.ends)
        counted = mask.bool() & self.rule(torch.arange(ids.shape[1], device=device), streams)
        predicts = span >= 0
        conversation = predicts.nonzero()[:, 0]

        def logits(hidden: Tensor, continues: str, rows: Bool[Tensor, " sequence"]) -> Float[Tensor, "row vocabulary"]:
            read = self.pair.ids_of(self.model_of[continues], ids[rows])
            return self.upper[continues].logits(hidden[rows], read, mask[rows], predicts[rows])

        every_row = torch.ones(len(batch), dtype=torch.bool, device=device)
        references = References(
            chat=Reference(logits(chat, CHAT, every_row)),
            base=Reference(logits(base, BASE, every_row)) if "kl_base" in self.measures else None,
            answer=ids.roll(-1, 1)[predicts],
        )

        def measured(hidden: Tensor, continues: str, rows: Bool[Tensor, " sequence"]) -> Float[Tensor, "measure row"]:
            return references.measured(self.measures, logits(hidden, continues, rows), rows[conversation])

        differences = self.differences([stream[counted] for stream in streams], group[counted], number[counted])
        unedited, of_unedited = {}, {}
        for key in dict.fromkeys((arm.start, arm.continues) for arm in self.arms):
            hidden = (chat if key[1] == CHAT else base).clone()
            hidden[counted] = differences.start(key[0]).to(hidden)
            unedited[key], of_unedited[key] = hidden, measured(hidden, key[1], every_row)
        cell = (conversation * len(SPANS) + span[predicts]).cpu()
        n_cells = len(batch) * len(SPANS)
        totals = []
        for arm in self.arms:
            key = (arm.start, arm.continues)
            values, edited = of_unedited[key].clone(), unedited[key].clone()
            edited[counted] += differences.change(arm).to(edited)
            changed = (edited != unedited[key]).flatten(1).any(1)
            if changed.any():
                values[:, changed[conversation]] = measured(edited, arm.continues, changed)
            # Summed on the host, in one order: a GPU's atomic adds would give arms with equal logits different sums.
            empty = torch.zeros(len(self.measures), n_cells, dtype=torch.float64)
            totals.append(empty.index_add_(1, cell, values.double().cpu()))
        n = torch.bincount(cell, minlength=n_cells)
        shape = (len(self.measures), len(self.arms), len(batch), -1)
        return Divergences(torch.stack(totals, 1).view(shape), n.view(len(batch), -1))
