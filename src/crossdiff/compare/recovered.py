"""Do the models still work on the reconstruction? Cross-entropy recovered, and KL on the tokens of the answers.

A model's activations at the layer are replaced by the crosscoder's reconstruction, and the layers above run on it:

    recovered = (CE(mean) - CE(reconstruction)) / (CE(mean) - CE(as it is))

where `mean` replaces them by their mean over the training tokens. 1 means that nothing is lost, 0 no better than the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils.rnn import pad_sequence

from crossdiff.activations.store import Store
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.models.access import UpperHalf, residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Bool, Float, Float64, Int64, Tensor
from crossdiff.statistics import UNDEFINED, Estimate, jackknife
from crossdiff.text.chat import Flag

BLOCKS = 20
AS_IT_IS, MEAN = "as it is", "mean"


@dataclass
class Sums:
    """Sums over the predicted tokens of each block of documents, per arm: what the activations are replaced by.

    They are on the models' device until `on_host`.
    """

    arms: tuple[str, ...]
    n: Float64[Tensor, " block"]
    cross_entropy: Float64[Tensor, "arm block"]
    n_answer: Float64[Tensor, " block"]
    answer_kl: Float64[Tensor, "arm block"]

    @classmethod
    def empty(cls, arms: tuple[str, ...], device: torch.device) -> Sums:
        per_block = torch.zeros(BLOCKS, dtype=torch.float64, device=device)
        per_arm = torch.zeros(len(arms), BLOCKS, dtype=torch.float64, device=device)
        return cls(arms, per_block, per_arm, per_block.clone(), per_arm.clone())

    def on_host(self) -> Sums:
        """The same sums on the host, where they are read."""
        return Sums(self.arms, self.n.cpu(), self.cross_entropy.cpu(), self.n_answer.cpu(), self.answer_kl.cpu())

    def recovered(self, arm: str) -> Estimate[float]:
        """Share of the cross-entropy between the mean and the unchanged model."""
        mean, chosen, unchanged = (self.arms.index(name) for name in (MEAN, arm, AS_IT_IS))
        return _of_means(self.cross_entropy, self.n, lambda ce: (ce[mean] - ce[chosen]) / (ce[mean] - ce[unchanged]))

    def mean_cross_entropy(self, arm: str) -> Estimate[float]:
        """Mean cross-entropy per token, in nats."""
        return _of_means(self.cross_entropy, self.n, lambda ce: ce[self.arms.index(arm)])

    def mean_answer_kl(self, arm: str) -> Estimate[float]:
        """Mean KL(as it is || arm) of the next-token distributions on the assistant's tokens, in nats."""
        return _of_means(self.answer_kl, self.n_answer, lambda kl: kl[self.arms.index(arm)])


def _of_means(
    sums: Float64[Tensor, "arm block"], n: Float64[Tensor, " block"], value: Callable[[Tensor], Tensor]
) -> Estimate[float]:
    """`value` of the means per token, with its jackknife interval over blocks; NaN with fewer than two blocks of tokens."""
    filled = (n > 0).nonzero().squeeze(1)
    if len(filled) < 2:
        return UNDEFINED
    left_out = torch.stack([value((sums.sum(1) - sums[:, b]) / (n.sum() - n[b])) for b in filled])
    found = jackknife(value(sums.sum(1) / n.sum()), left_out)
    return Estimate(float(found.value), float(found.low), float(found.high))


@dataclass(frozen=True)
class _Batch:
    """Held-out sequences, right-padded, on the models' device. `kept` marks tokens, `counted` those past the left-out
    positions."""

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
    """Indices of held-out sequences with about `max_tokens` tokens, evenly spread over the store."""
    bounds = store.sequences()
    document = store.column("document")[bounds[:-1]]
    heldout = store.documents.filter(store.documents["split"] == "heldout")["document"].to_numpy()
    numbers = np.flatnonzero(np.isin(document, heldout))
    n_tokens = np.diff(bounds)[numbers].sum()
    n = max(1, round(len(numbers) * min(1.0, max_tokens / max(1, n_tokens))))
    return numbers[np.linspace(0, len(numbers) - 1, min(n, len(numbers))).astype(np.int64)]


def _batches(store: Store, numbers: npt.NDArray[np.int64], batch_tokens: int, device: torch.device) -> Iterator[_Batch]:
    ids, flags, document = store.column("token_id"), store.column("flags"), store.column("document")
    counted = store.counted
    lengths = np.diff(store.sequences())[numbers]
    for batch in store.batches_of_sequences(numbers[np.argsort(lengths, kind="stable")], batch_tokens):
        first = np.flatnonzero(np.diff(batch.sequence, prepend=-1))

        def padded(values: npt.NDArray[np.generic], first: npt.NDArray[np.int64] = first) -> Tensor:
            parts = [torch.from_numpy(part) for part in np.split(values, first[1:])]
            return pad_sequence(parts, batch_first=True).to(device)

        yield _Batch(
            ids=padded(ids[batch.rows]).long(),
            kept=padded(np.ones(len(batch.rows), dtype=np.bool_)),
            counted=padded(counted[batch.rows]),
            answer=padded((flags[batch.rows] & Flag.ASSISTANT) != 0),
            block=torch.from_numpy(document[batch.rows[first]] % BLOCKS).to(device).long(),
            h=store.gather(batch.rows).to(device),
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
    """Run each model over held-out text as it is, on its mean, and on every crosscoder's reconstruction of it.

    Activations of the left-out positions stay as they are. A crosscoder is an arm of those models whose activations its view
    determines; a reconstructed difference is added to the base model's own activation.

    Returns:
        Source name -> sums.
    """
    index = {source: i for i, source in enumerate(store.sources)}
    models = dict(zip(store.sources, pair.models, strict=True))
    device = pair.device
    arms = {
        source: (AS_IT_IS, MEAN, *(name for name, coder in crosscoders.items() if source in coder.view.writes()))
        for source in store.sources
    }
    sums = {source: Sums.empty(names, device) for source, names in arms.items()}
    mean = store.normalisation.mean.float().to(device)
    upper = {source: UpperHalf(model, store.layer) for source, model in models.items()}
    for batch in _batches(store, heldout_sequences(store, max_tokens), batch_tokens, device):
        replaced = {(MEAN, source): mean[index[source]].expand(len(batch.h), -1) for source in store.sources}
        for name, coder in crosscoders.items():
            h = batch.h[:, [index[source] for source in coder.view.reads]].to(coder.encoder.device)
            for source, tensor in coder.view.written(h, coder.reconstruct(h)).items():
                replaced[name, source] = tensor
        for source, model in models.items():
            ids = pair.ids_of(source, batch.ids)
            hidden = residuals_after(model, ids, [store.layer])[0]
            unchanged: Tensor | None = None
            for number, arm in enumerate(sums[source].arms):
                edited = hidden if arm == AS_IT_IS else _replaced(hidden, batch, replaced[arm, source])
                logits = upper[source].logits(edited, ids, batch.kept.long(), batch.predicts).float()
                unchanged = logits if unchanged is None else unchanged
                _add(sums[source], number, batch, logits, unchanged)
        advance(len(batch.h))
    return {source: of_source.on_host() for source, of_source in sums.items()}


def _replaced(
    hidden: Float[Tensor, "sequence position d_model"], batch: _Batch, by: Float[Tensor, "token d_model"]
) -> Float[Tensor, "sequence position d_model"]:
    """The activations with those of the counted positions replaced."""
    full = torch.zeros_like(hidden)
    full[batch.kept] = by.to(hidden)
    return torch.where(batch.counted.unsqueeze(2), full, hidden)


def _add(
    sums: Sums,
    arm: int,
    batch: _Batch,
    logits: Float[Tensor, "prediction vocabulary"],
    unchanged: Float[Tensor, "prediction vocabulary"],
) -> None:
    """Add a batch's cross-entropy and KL; a token is predicted at the position before it."""
    kept, answer = batch.kept[:, 1:], batch.answer[:, 1:]
    ce = cross_entropy(logits, batch.ids[:, 1:][kept], reduction="none").double()
    of_answer = answer[kept]
    log_q = log_softmax(logits[of_answer], 1)
    log_p = log_softmax(unchanged[of_answer], 1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).double()
    block, answer_block = (batch.block.unsqueeze(1).expand_as(mask)[mask] for mask in (kept, answer))
    sums.cross_entropy[arm].index_add_(0, block, ce)
    sums.answer_kl[arm].index_add_(0, answer_block, kl)
    if arm == 0:
        sums.n.index_add_(0, block, torch.ones_like(ce))
        sums.n_answer.index_add_(0, answer_block, torch.ones_like(kl))
