"""A store that keeps only the tokens and runs the models whenever their activations are read.

The same sequences go through the models in the same batches as during the harvest of a store on disk, so the activations are
equal to the last bit. Training reads whole passes in random order. Each token costs one pass per epoch for all crosscoders that
share the batches, and none after the first epoch if the activations fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from crossdiff.activations.folder import Folder
from crossdiff.activations.normalisation import Moments
from crossdiff.activations.passes import ForwardPass, NotFiniteError
from crossdiff.activations.shards import ShardEntry, as_stored, check_finite
from crossdiff.activations.store import DTYPES, Store, pass_bounds, sequence_bounds
from crossdiff.activations.transfer import CPU, send
from crossdiff.config import HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float32, Tensor

STATISTICS_TOKENS = 1_000_000
"""Number of training tokens, from randomly chosen passes, that give a live store its mean and scale."""


class Passes:
    """The forward passes of a harvest, any of which can be run again. `bounds` are their row bounds."""

    def __init__(
        self,
        pair: Pair,
        layer: int,
        token_ids: npt.NDArray[np.int32],
        documents: npt.NDArray[np.int32],
        sequences: npt.NDArray[np.int64],
        batch_tokens: int,
    ) -> None:
        self._pair, self._layer, self._token_ids, self._documents, self._sequences = (
            pair,
            layer,
            token_ids,
            documents,
            sequences,
        )
        self.bounds = pass_bounds(sequences, batch_tokens)

    def run(self, index: int) -> tuple[list[Float32[Tensor, "token d_model"]], Float32[Tensor, "source token"]]:
        """Run one pass. Returns the residual streams of the sources on the models' device, and their rows' norms on the CPU."""
        first, last = np.searchsorted(self._sequences, self.bounds[index : index + 2])
        cuts = self._sequences[first : last + 1]
        batch = [self._token_ids[start:stop] for start, stop in pairwise(cuts)]
        forward = ForwardPass(self._pair, batch, [self._layer])
        norms = forward.norms.cpu()
        try:
            forward.check(norms)
        except NotFiniteError as error:
            raise error.in_document(int(self._documents[self.bounds[index] + error.row])) from None
        return forward.streams[0], norms[0]


class LiveStore(Store):
    """A store whose activations are computed when they are read."""

    def __init__(self, folder: str | Path, pair: Pair) -> None:
        super().__init__(folder)
        self._pair, batch_tokens = pair, int(self.manifest["batch_tokens"])
        token_ids, documents = self.column("token_id"), self.column("document")
        self._passes = Passes(pair, self.layer, token_ids, documents, self.sequences(), batch_tokens)
        self._last: tuple[int, Tensor] = (-1, torch.empty(0))

    def home(self, device: torch.device) -> torch.device:
        return device if device == self._pair.device else CPU

    def gather(self, rows: npt.NDArray[np.int64], device: torch.device = CPU) -> Float32[Tensor, "batch source d_model"]:
        """Activations of the given rows, in the order given, as a store on disk of the same dtype returns them."""
        out = torch.empty(len(rows), len(self.sources), self.d_model, device=device)
        order = np.argsort(rows, kind="stable")
        bounds = self._passes.bounds
        cuts = np.searchsorted(rows[order], bounds)
        for index in np.flatnonzero(np.diff(cuts)):
            part = order[cuts[index] : cuts[index + 1]]
            h = self._computed(int(index))
            chosen = h.index_select(0, send(torch.from_numpy(rows[part] - bounds[index]), h.device))
            out.index_copy_(0, send(torch.from_numpy(part), device), chosen.to(device))
        return out

    def _computed(self, index: int) -> Float32[Tensor, "token source d_model"]:
        """Activations of a pass on the models' device. The last pass is kept: readers go through the rows in order, but may
        stop within a pass."""
        number, h = self._last
        if number != index:
            dtype = DTYPES[self.manifest["dtype"]]
            streams, norms = self._passes.run(index)
            try:
                for stream, norm in zip(streams, norms, strict=True):
                    check_finite(stream, norm, dtype)
            except UserError as error:
                first, last = self._passes.bounds[index : index + 2]
                raise UserError(f"{error} (in rows {first} to {last - 1} of {self.folder})") from error
            h = torch.stack([as_stored(stream, dtype) for stream in streams], dim=1)
            self._last = (index, h)
        return h


def open_store(folder: str | Path, load_pair: Callable[[], Pair]) -> Store:
    """Open the store in a folder or at a URL. The models are loaded only for a live store, which refuses other models."""
    store = Store(folder)
    if not store.is_live:
        return store
    pair = load_pair()
    if pair.identity != store.pair:
        raise UserError(
            f"the live store {folder} was harvested from {store.pair}, not from {pair.identity}; harvest again with --force"
        )
    dtype = store.manifest.get("model_dtype", pair.dtype)  # earlier versions did not record it
    if pair.dtype != dtype:
        raise UserError(f"the live store {folder} was harvested in {dtype}, not in {pair.dtype}; set model_dtype to {dtype}")
    if store.manifest.get("compile"):
        pair.compile()
    return LiveStore(folder, pair)


def sampled_moments(
    folder: Folder, entries: Sequence[ShardEntry], pair: Pair, layer: int, config: HarvestConfig, in_statistics: Sequence[bool]
) -> Moments:
    """Moments over the training tokens of randomly chosen passes, or of all passes of a small corpus.

    Raises:
        UserError: some of them have a massive norm. A live store cannot omit them, because it knows no norms before it is read.
    """
    parts: dict[str, list[npt.NDArray[np.int32]]] = {name: [] for name in ("token_id", "sequence", "position", "document")}
    for path in folder.headers([entry.file for entry in entries]):
        with safe_open(path, framework="pt") as file:
            for name, found in parts.items():
                found.append(file.get_tensor(name).numpy())
    columns = {name: np.concatenate(found) for name, found in parts.items()}
    sequences = sequence_bounds(columns["sequence"])
    passes = Passes(pair, layer, columns["token_id"], columns["document"], sequences, config.batch_tokens)
    counted = (columns["position"] >= config.leave_out) & np.asarray(in_statistics)[columns["document"]]
    per_pass = np.add.reduceat(counted.astype(np.int64), passes.bounds[:-1])
    order = np.random.default_rng(0).permutation(len(per_pass))
    n_chosen = int(np.searchsorted(np.cumsum(per_pass[order]), STATISTICS_TOKENS)) + 1
    moments = Moments.zero(len(pair.sources), pair.d_model, pair.device)
    norms = []
    for index in np.sort(order[:n_chosen]):
        chosen = torch.from_numpy(counted[passes.bounds[index] : passes.bounds[index + 1]])
        streams, of_sources = passes.run(int(index))
        norms.append(of_sources[:, chosen])
        rows = send(chosen.nonzero().squeeze(1), pair.device)
        moments.add([stream.index_select(0, rows) for stream in streams])
    if config.max_norm_multiple is not None and moments.n_tokens:
        relative = torch.cat(norms, dim=1)
        n_massive = int((relative > config.max_norm_multiple * relative.median(dim=1, keepdim=True).values).any(0).sum())
        if n_massive:
            raise UserError(
                f"{n_massive} of {int(moments.n_tokens)} sampled tokens have activations of more than "
                f"{config.max_norm_multiple:g} times the median norm, which a live store cannot leave out; set harvest.storage "
                "to blocks or passes, or harvest.max_norm_multiple to null to train on them"
            )
    return moments.cpu()
