"""Do the models still work on the reconstruction? Cross-entropy recovered, and KL on the tokens of the answers.

A model's activations at the layer are replaced by what the crosscoder makes of them, and the model's upper half goes on:

    recovered = (CE(mean) - CE(reconstruction)) / (CE(mean) - CE(as it is))

where `mean` replaces them by their mean over the training tokens. 1 is nothing lost, 0 no better than the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import t as student
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils.rnn import pad_sequence

from crossdiff.activations.store import Store, consecutive
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.models.access import UpperHalf, residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Float64, Int64, Tensor
from crossdiff.text.chat import Flag

BLOCKS = 20
AS_IT_IS, MEAN = "as it is", "mean"


@dataclass(frozen=True)
class Quantity:
    """A value with its 95% jackknife interval over blocks of documents."""

    value: float
    low: float
    high: float


@dataclass
class Sums:
    """Per arm (what the activations are replaced by) sums over the predicted tokens of each block of documents."""

    arms: tuple[str, ...]
    n: Float64[Tensor, " block"]
    cross_entropy: Float64[Tensor, "arm block"]
    n_answer: Float64[Tensor, " block"]
    answer_kl: Float64[Tensor, "arm block"]

    @classmethod
    def empty(cls, arms: tuple[str, ...]) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, BLOCKS, dtype=torch.float64)

        return cls(arms, zeros(), zeros(len(arms)), zeros(), zeros(len(arms)))

    def recovered(self, arm: str) -> Quantity:
        """Share of the cross-entropy between the mean and the model as it is."""
        index = {name: i for i, name in enumerate(self.arms)}

        def value(ce: Tensor) -> Tensor:
            return (ce[index[MEAN]] - ce[index[arm]]) / (ce[index[MEAN]] - ce[index[AS_IT_IS]])

        return _jackknife(self.cross_entropy, self.n, value)

    def mean_cross_entropy(self, arm: str) -> Quantity:
        """Mean cross-entropy per token, in nats."""
        return _jackknife(self.cross_entropy, self.n, lambda ce: ce[self.arms.index(arm)])

    def mean_answer_kl(self, arm: str) -> Quantity:
        """Mean KL(as it is || arm) of the next-token distributions on the assistant's tokens, in nats."""
        return _jackknife(self.answer_kl, self.n_answer, lambda kl: kl[self.arms.index(arm)])


def _jackknife(sums: Float64[Tensor, "arm block"], n: Float64[Tensor, " block"], value: Callable[[Tensor], Tensor]) -> Quantity:
    """`value` of the mean per token, and its interval from leaving out one block at a time; NaN without tokens."""
    filled = (n > 0).nonzero().squeeze(1)
    if len(filled) < 2:
        return Quantity(float("nan"), float("nan"), float("nan"))
    whole = float(value(sums.sum(1) / n.sum()))
    left_out = torch.stack([value((sums.sum(1) - sums[:, b]) / (n.sum() - n[b])) for b in filled])
    se = float(((len(filled) - 1) * (left_out - left_out.mean()).square().mean()).sqrt())
    half = se * float(student.ppf(0.975, len(filled) - 1))
    return Quantity(whole, whole - half, whole + half)


@dataclass(frozen=True)
class _Batch:
    """Some held-out sequences, right-padded."""

    ids: Int64[Tensor, "sequence position"]
    kept: Bool[Tensor, "sequence position"]
    counted: Bool[Tensor, "sequence position"]
    answer: Bool[Tensor, "sequence position"]
    block: Int64[Tensor, " sequence"]
    h: Float[Tensor, "token source d_model"]

    @property
    def predicts(self) -> Bool[Tensor, "sequence position"]:
        """Positions at which a token of the sequence is predicted: all but the last."""
        return torch.cat([self.kept[:, 1:], torch.zeros_like(self.kept[:, :1])], dim=1)


def heldout_sequences(store: Store, max_tokens: int) -> npt.NDArray[np.int64]:
    """Indices of held-out sequences, evenly spread over the store, with about `max_tokens` tokens."""
    bounds, document = store.sequences(), store.column("document")
    held = set(store.documents.filter(store.documents["split"] == "heldout")["document"].to_list())
    members = np.array([i for i, row in enumerate(bounds[:-1]) if int(document[row]) in held], dtype=np.int64)
    lengths = bounds[members + 1] - bounds[members]
    n = max(1, round(len(members) * min(1.0, max_tokens / max(1, lengths.sum()))))
    return members[np.linspace(0, len(members) - 1, min(n, len(members))).astype(np.int64)]


def _batches(store: Store, members: npt.NDArray[np.int64], batch_tokens: int) -> Iterator[_Batch]:
    bounds, document = store.sequences(), store.column("document")
    ids, flags, position = store.column("token_id"), store.column("flags"), store.column("position")
    order = members[np.argsort(bounds[members + 1] - bounds[members], kind="stable")]
    lengths = bounds[order + 1] - bounds[order]
    for first, last in consecutive(np.concatenate([[0], np.cumsum(lengths)]), batch_tokens):
        spans = [(bounds[n], bounds[n + 1]) for n in order[first:last]]

        def padded(values: npt.NDArray[np.generic], spans: list[tuple[int, int]] = spans) -> Tensor:
            return pad_sequence([torch.from_numpy(values[a:b].copy()) for a, b in spans], batch_first=True)

        yield _Batch(
            ids=padded(ids).long(),
            kept=padded(np.ones(len(ids), dtype=np.bool_)),
            counted=padded(position >= store.leave_out),
            answer=padded((flags & Flag.ASSISTANT) != 0),
            block=torch.tensor([int(document[a]) % BLOCKS for a, _ in spans]),
            h=store.gather(np.concatenate([np.arange(a, b) for a, b in spans])),
        )


@torch.no_grad()
def run_on_reconstructions(
    crosscoders: Mapping[str, Crosscoder],
    store: Store,
    pair: Pair,
    max_tokens: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> dict[str, Sums]:
    """Run each model as it is, on its mean, and on every crosscoder's reconstruction of it, over held-out text.

    Activations of the left-out positions stay as they are. A crosscoder is an arm of the models whose activations its
    view determines; a difference is added to the base model's own activation.

    Returns:
        Source name -> sums.
    """
    device = next(pair.base.parameters()).device
    arms = {
        source: (AS_IT_IS, MEAN, *(name for name, coder in crosscoders.items() if source in coder.view.writes()))
        for source in store.sources
    }
    sums = {source: Sums.empty(arms[source]) for source in store.sources}
    members = heldout_sequences(store, max_tokens)
    mean = store.normalisation.mean.float()
    upper = {source: UpperHalf(model, store.layer) for source, model in zip(store.sources, pair.models, strict=True)}
    for batch in _batches(store, members, batch_tokens):
        index = {source: i for i, source in enumerate(store.sources)}
        replaced = {(MEAN, source): mean[index[source]].expand(len(batch.h), -1) for source in store.sources}
        for name, coder in crosscoders.items():
            h = batch.h[:, [index[source] for source in coder.view.reads]]
            for source, tensor in coder.view.written(h, coder.reconstruct(h)).items():
                replaced[name, source] = tensor
        for source, model in zip(store.sources, pair.models, strict=True):
            read = (pair.base_ids(batch.ids) if model is pair.base else batch.ids).to(device)
            hidden = residuals_after(model, read, [store.layer])[0]
            reference: Tensor | None = None
            for number, arm in enumerate(arms[source]):
                edited = hidden if arm == AS_IT_IS else _replaced(hidden, batch, replaced[arm, source])
                logits = upper[source].logits(edited, read, batch.kept.long().to(device), batch.predicts.to(device)).float()
                reference = logits if reference is None else reference
                _add(sums[source], number, batch, logits, reference)
        advance(int(batch.kept.sum()))
    return sums


def _replaced(
    hidden: Float[Tensor, "sequence position d_model"], batch: _Batch, by: Float[Tensor, "token d_model"]
) -> Float[Tensor, "sequence position d_model"]:
    """The activations with those of the counted positions replaced."""
    full = torch.zeros_like(hidden)
    full[batch.kept.to(hidden.device)] = by.to(hidden)
    return torch.where(batch.counted.unsqueeze(2).to(hidden.device), full, hidden)


def _add(
    sums: Sums,
    arm: int,
    batch: _Batch,
    logits: Float[Tensor, "prediction vocabulary"],
    reference: Float[Tensor, "prediction vocabulary"],
) -> None:
    """Add a batch's cross-entropy and KL; a token is predicted at the position before it."""
    kept, answer = batch.kept[:, 1:], batch.answer[:, 1:]
    ce = cross_entropy(logits, batch.ids[:, 1:][kept].to(logits.device), reduction="none").double().cpu()
    of_answer = answer[kept].to(logits.device)
    own, clean = log_softmax(logits[of_answer], 1), log_softmax(reference[of_answer], 1)
    kl = (clean.exp() * (clean - own)).sum(1).double().cpu()
    block, answer_block = (batch.block.unsqueeze(1).expand_as(mask)[mask] for mask in (kept, answer))
    sums.cross_entropy[arm].index_add_(0, block, ce)
    sums.answer_kl[arm].index_add_(0, answer_block, kl)
    if arm == 0:
        sums.n.index_add_(0, block, torch.ones_like(ce))
        sums.n_answer.index_add_(0, answer_block, torch.ones_like(kl))
