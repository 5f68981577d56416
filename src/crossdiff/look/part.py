"""A part of the sample of a first look: what is collected from some batches, as tensors that add up or follow one another.

The parts of a sample are files. So a look that is killed loses one part at most, and several ranks deal the parts out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from crossdiff.activations.harvest import token_columns
from crossdiff.activations.passes import right_padded
from crossdiff.errors import UserError
from crossdiff.files import replacing
from crossdiff.look.depth import Continuations
from crossdiff.look.directions import MeanDifferences
from crossdiff.look.predictions import Shifts, compare
from crossdiff.look.probes import conversation_means
from crossdiff.models.access import residuals_and_logits
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float, Tensor
from crossdiff.sources import SOURCES
from crossdiff.text.sequences import TokenSequence

SUMMED = ("rise", "total", "n", "square")
"""Tensors that are added up over the parts; all others follow one another."""


class Part:
    """Runs both models over batches and collects what the tables of a look are made from.

    Args:
        layer: where conversations are averaged for the probes.
        every: one of so many sequences is compared layer by layer.
        first_token: number of tokens in the parts before.
    """

    def __init__(self, pair: Pair, layer: int, every: int, first_token: int) -> None:
        self._pair, self._layer, self._every = pair, layer, every
        self._shifts: Shifts | None = None
        self._first_token = first_token
        self._means = MeanDifferences.empty(pair.n_layers, pair.d_model)
        self._continuations = Continuations(pair)
        self._found: dict[str, list[Tensor]] = {}

    def add(self, batch: list[TokenSequence], first_sequence: int) -> None:
        """Compare the models on a batch of sequences; `first_sequence` is the number of the first one."""
        pair = self._pair
        ids, kept = right_padded([sequence.token_ids for sequence in batch])
        pair.check_length(ids.shape[1], f"a sequence of {ids.shape[1]} tokens", "lower harvest.max_length")
        ends = torch.tensor([len(sequence.token_ids) for sequence in batch]).cumsum(0) - 1
        nexts, streams, logits = [], [], []
        for source in SOURCES:
            model = pair.model(source)
            own = pair.ids_of(source, ids)
            hidden, predicted = residuals_and_logits(model, own.to(next(model.parameters()).device))
            streams.append([_unpadded(h, kept) for h in hidden])
            logits.append(_unpadded(predicted, kept))
            following = (own.flatten() if kept is None else own.flatten()[kept]).roll(-1)
            following[ends] = -1
            nexts.append(following)
        device = logits[0].device
        if self._shifts is None:
            self._shifts = Shifts(min(part.shape[1] for part in logits), device, self._first_token)
        found = compare(logits[0], logits[1], nexts[0].to(device), nexts[1].to(device), self._shifts)
        if not bool(found.kl.isfinite().all()):
            raise _not_finite(pair, logits)
        of_tokens = token_columns(batch, first_sequence)
        base, chat = streams
        flags = of_tokens["flags"].numpy()
        position, sequence, document = (of_tokens[name].long().numpy() for name in ("position", "sequence", "document"))
        self._means.add(base, chat, flags, position, document)
        self._collect(of_tokens | {"next_id": nexts[1]} | {name: getattr(found, name) for name in found.__dataclass_fields__})
        self._collect(conversation_means(base[self._layer], chat[self._layer], flags, sequence, document))
        self._go_deeper(batch, first_sequence, ids, streams, logits[1])

    def _go_deeper(
        self, batch: list[TokenSequence], first_sequence: int, ids: Tensor, streams: list[list[Tensor]], chat_logits: Tensor
    ) -> None:
        """Compare the models layer by layer on every so many-th sequence."""
        lengths = [len(sequence.token_ids) for sequence in batch]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        chosen = [i for i in range(len(batch)) if (first_sequence + i) % self._every == 0]
        if not chosen:
            return
        rows = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in chosen])
        device = chat_logits.device
        taken = torch.from_numpy(rows).to(device)
        base, chat = ([h[taken] for h in side] for side in streams)
        longest = max(lengths[i] for i in chosen)
        mask = torch.zeros(len(chosen), longest, dtype=torch.int64)
        for row, i in enumerate(chosen):
            mask[row, : lengths[i]] = 1
        padded = [torch.zeros(len(chosen), longest, h.shape[1], dtype=h.dtype, device=device) for h in base]
        for target, h in zip(padded, base, strict=True):
            target[mask.bool().to(device)] = h
        kl = self._continuations.kl(padded, chat_logits[taken], ids[chosen, :longest].to(device), mask.to(device))
        document = torch.from_numpy(np.repeat([batch[i].document for i in chosen], [lengths[i] for i in chosen]))
        sample = {"sample_base": torch.stack(base, 1), "sample_chat": torch.stack(chat, 1), "sample_document": document}
        self._collect(sample | {"sample_kl": kl})

    def _collect(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._found.setdefault(name, []).append(tensor.cpu())

    def write(self, path: Path) -> None:
        """Write what was collected to a file."""
        assert self._shifts is not None
        tensors = {name: torch.cat(parts) for name, parts in self._found.items()}
        tensors |= self._shifts.tensors() | self._means.tensors()
        with replacing(path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)


def holds(path: Path, batches: Sequence[Sequence[TokenSequence]], first_sequence: int) -> bool:
    """Whether a file is the finished part of these batches: the texts may have changed since, or the size of the batches."""
    if not path.is_file():
        return False
    firsts = np.cumsum([first_sequence, *map(len, batches)])
    expected = [token_columns(batch, int(first)) for batch, first in zip(batches, firsts, strict=False)]
    with safe_open(path, framework="pt") as file:
        return all(torch.equal(file.get_tensor(name), torch.cat([each[name] for each in expected])) for name in expected[0])


def merge(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all parts together."""
    found: dict[str, list[Tensor]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                found.setdefault(name, []).append(file.get_tensor(name))
    return {name: sum(parts[1:], parts[0]) if name in SUMMED else torch.cat(parts) for name, parts in found.items()}


def _unpadded(h: Float[Tensor, "sequence position width"], kept: Tensor | None) -> Float[Tensor, "token width"]:
    flat = h.flatten(0, 1)
    return flat if kept is None else flat.index_select(0, kept.to(flat.device))


def _not_finite(pair: Pair, logits: list[Tensor]) -> UserError:
    """Which of the models it was that gave logits that are not finite."""
    source = next(source for source, found in zip(SOURCES, logits, strict=True) if not bool(found.isfinite().all()))
    return UserError(
        f"the {source} model ({pair.identity[source]['name']}) gives NaN or infinite logits: set model_dtype to float32 if "
        "they overflow, otherwise check the model's weights"
    )
