"""The latents that may belong to a concept: those of every training whose verdict says that the models differ there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.crosscoder import Crosscoder, Part
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.errors import UserError
from crossdiff.integrity import read_parquet
from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX
from crossdiff.latents.scaling import Sums
from crossdiff.latents.stream import Read, check_fits, encode
from crossdiff.shapes import Float, Float64, Int64, Tensor

SPECIFIC = ("chat_specific", "base_specific", "rotated")
"""Verdicts that say that the models differ."""
ARTIFACTS = ("complete_shrinkage", "latent_decoupling")
"""Verdicts on latents that only look specific. They are candidates so that a concept can be seen to be one of them."""
CANDIDATES = (*SPECIFIC, *ARTIFACTS)


@dataclass(frozen=True)
class Training:
    """One training of a crosscoder, analysed.

    Attributes:
        kind: kind of sparsity.
        crosscoder: on any device; everything else is on the host.
        table: rows of the candidates in the latent table.
        sums: sums of latent scaling of the candidates.
        others: live latents that are not candidates, for random sets.
    """

    name: str
    kind: str
    crosscoder: Crosscoder
    table: pl.DataFrame
    sums: Sums
    others: Int64[Tensor, " latent"]

    @cached_property
    def latents(self) -> Int64[Tensor, " candidate"]:
        """The candidates' numbers."""
        return torch.tensor(self.table["latent"].to_list(), dtype=torch.int64)

    @cached_property
    def energy(self) -> Float64[Tensor, " candidate"]:
        """E_j = sum_i f_ij^2 ||d_j||^2, with the direction of the model that has the latent (docs/concepts.md#energy)."""
        directions = self.crosscoder.directions()[:, self.latents].cpu().double()
        if len(directions) > 2:  # of a chain, the model that has most of it
            return directions.square().sum(2).amax(0) * self.sums.f2.sum(0)
        side = torch.from_numpy((self.table["verdict"] == "base_specific").to_numpy())
        square = torch.where(side, directions[BASE_INDEX].square().sum(1), directions[CHAT_INDEX].square().sum(1))
        return square * self.sums.f2.sum(0)


def training_of(
    name: str, crosscoder: Crosscoder, table: pl.DataFrame, sums: Sums, chain: pl.DataFrame | None = None
) -> Training:
    """A training from its whole latent table, the sums of its analysis and, for more than two models, its `chain.parquet`."""
    is_candidate = pl.col("verdict").is_in(CANDIDATES)
    if chain is not None:
        is_candidate |= pl.col("latent").is_in(chain.filter(pl.col("verdict").is_in(CANDIDATES))["latent"].unique().implode())
    chosen = table.filter(is_candidate)
    latents = torch.tensor(chosen["latent"].to_list(), dtype=torch.int64)
    others = table.filter(~is_candidate & (pl.col("verdict") != "dead"))["latent"].to_list()
    kind = crosscoder.sparsity.kind
    return Training(name, kind, crosscoder, chosen, sums.of_latents(latents), torch.tensor(others, dtype=torch.int64))


def read_training(folder: Path, name: str, device: torch.device = CPU) -> Training:
    """Read an analysed training of a run, its crosscoder to `device`.

    Raises:
        UserError: a file is missing, damaged or of another version.
    """
    crosscoder = load(folder / name).to(device)
    path = folder / name / "latents.parquet"
    if not path.is_file():
        raise UserError(f"{path} is missing; run `crossdiff analyze {folder}` first")
    chain = folder / name / "chain.parquet"
    return training_of(
        name,
        crosscoder,
        read_parquet(path),
        Sums.load(folder / name / "scaling.safetensors"),
        read_parquet(chain) if chain.is_file() else None,
    )


class Codes:
    """Encodes the candidates of all trainings, and random latents of each, in one pass over a store.

    Candidates are numbered through all trainings, in their order. The crosscoders are on one device.

    Attributes:
        first: number of each training's first candidate, and the number of all at the end, `[training + 1]`.
        training: training of each candidate, `[candidate]`.
    """

    def __init__(self, trainings: Sequence[Training], store: Store) -> None:
        for training in trainings:
            check_fits(training.crosscoder, store)
        self.trainings = tuple(trainings)
        sizes = [len(training.latents) for training in trainings]
        self.first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.training = np.repeat(np.arange(len(sizes)), sizes)
        self._index = [source_indices(store, training.crosscoder.view.reads) for training in trainings]
        self._like = [_first_with_the_same_input(self.trainings, number) for number in range(len(trainings))]
        self._parts = [Part(training.crosscoder, training.latents) for training in trainings]

    @property
    def device(self) -> torch.device:
        """Where the batches of a store are encoded."""
        return self.trainings[0].crosscoder.encoder.device

    @property
    def n_candidates(self) -> int:
        return int(self.first[-1])

    def inputs(self, read: Read) -> list[Float[Tensor, "token source d_model"]]:
        """The normalised activations that each training reads; those of the same normalisation are computed once."""
        found: list[Tensor] = []
        for number, training in enumerate(self.trainings):
            like = self._like[number]
            h = read.h if self._index[number].tolist() == list(range(read.h.shape[1])) else read.h[:, self._index[number]]
            found.append(found[like] if like < number else training.crosscoder.normalise(h))
        return found

    def of(self, read: Read) -> list[SparseCode]:
        """The candidates' activations f in each training, numbered within the training."""
        return self.of_inputs(self.inputs(read))

    def of_inputs(self, inputs: Sequence[Float[Tensor, "token source d_model"]]) -> list[SparseCode]:
        """The same from the normalised activations that each training reads."""
        return [encode(part, x) for part, x in zip(self._parts, inputs, strict=True)]

    def v(self, codes: Sequence[SparseCode]) -> list[Float[Tensor, " pair"]]:
        """Their activations v = f * sum of decoder norms."""
        return [part.crosscoder.v(code) for part, code in zip(self._parts, codes, strict=True)]

    def candidates_of(self, training: int) -> npt.NDArray[np.int64]:
        """Numbers of a training's candidates."""
        return np.arange(self.first[training], self.first[training + 1])


def _first_with_the_same_input(trainings: Sequence[Training], number: int) -> int:
    own = trainings[number].crosscoder
    for other, training in enumerate(trainings[:number]):
        coder = training.crosscoder
        if coder.view.reads == own.view.reads and coder.scale == own.scale and torch.equal(coder.mean, own.mean):
            return other
    return number
