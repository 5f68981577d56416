"""Concepts as the latents of a coder, so that whatever reads latents can read concepts.

The activation of a concept on a token is the sum of its members' v within a training, averaged over the trainings that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU
from crossdiff.concepts.similarity import Matrix, matrix_of
from crossdiff.crosscoder.crosscoder import Crosscoder, Part
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.integrity import read_parquet
from crossdiff.latents.stream import Coded, Read, encode
from crossdiff.shapes import Float, Tensor


def code_of(activations: Matrix) -> SparseCode:
    """Activations `[token, concept]` as a code."""
    activations.sort_indices()
    token = np.repeat(np.arange(activations.shape[0]), np.diff(activations.indptr))
    return SparseCode(
        token=torch.from_numpy(token),
        latent=torch.from_numpy(activations.indices.astype(np.int64)),
        values=torch.from_numpy(activations.data).float(),
        n_tokens=activations.shape[0],
        n_latents=activations.shape[1],
    )


def coded(read: Read, activations: Matrix) -> Coded:
    """A batch of a store with the activations of concepts, `[token, concept]`."""
    code = code_of(activations)
    return Coded(block=read.block, rows=read.rows, sequence=read.sequence, numbers=read.numbers, code=code, v=code.values)


class ConceptCoder:
    """Encodes the concepts of a run by their members in each training.

    Args:
        trainings: the crosscoders by name.
        members: rows (concept, training, latent), see `concept_table.MEMBER_COLUMNS`.

    Attributes:
        crosscoders: the trainings that have a member.
        n_latents: number of concepts.
    """

    def __init__(self, trainings: Mapping[str, Crosscoder], members: pl.DataFrame) -> None:
        self.n_latents = int(members["concept"].to_numpy().max(initial=-1)) + 1
        n_trainings = members.group_by("concept").agg(pl.col("training").n_unique())
        weight = np.zeros(self.n_latents)
        weight[n_trainings["concept"].to_numpy()] = 1 / n_trainings["training"].to_numpy()
        own = {name: members.filter(pl.col("training") == name) for name in trainings}
        kept = [name for name in trainings if own[name].height]
        self.crosscoders = [trainings[name] for name in kept]
        self._parts = [Part(trainings[name], torch.tensor(own[name]["latent"].to_list())) for name in kept]
        concept = np.concatenate([np.zeros(0, dtype=np.int64), *(own[name]["concept"].to_numpy() for name in kept)])
        shape = (len(concept), self.n_latents)
        self._weights = Matrix((weight[concept], (np.arange(len(concept)), concept)), shape=shape)
        self._first = np.concatenate([[0], np.cumsum([part.n_latents for part in self._parts])]).astype(np.int64)

    @classmethod
    def load(cls, run: Path, device: torch.device = CPU) -> ConceptCoder:
        """Load the concepts of a run directory, and to `device` the crosscoders that they are made of."""
        from crossdiff.crosscoder.checkpoint import load

        members = read_parquet(run / "concepts" / "members.parquet")
        names = members["training"].unique(maintain_order=True).to_list()
        return cls({name: load(run / name).to(device) for name in names}, members)

    @property
    def reads(self) -> tuple[str, ...]:
        """The sources that it reads; none without a concept."""
        return self.crosscoders[0].view.reads if self.crosscoders else ()

    def inputs(self, store: Store, rows: npt.NDArray[np.int64]) -> Float[Tensor, "token source d_model"]:
        """Activations of rows of a store, in the models' own space."""
        return store.gather(rows)[:, source_indices(store, self.reads)]

    def sparse_code(self, h: Float[Tensor, "token source d_model"]) -> SparseCode:
        """Activations of the concepts, on the host, from those of the models in their own space."""
        on_device = h.to(self.crosscoders[0].encoder)
        codes = [encode(part, part.crosscoder.normalise(on_device)) for part in self._parts]
        v = [part.crosscoder.v(code) for part, code in zip(self._parts, codes, strict=True)]
        return code_of(matrix_of(codes, self._first, v) @ self._weights)

    def v(self, code: SparseCode) -> Float[Tensor, " pair"]:
        """The activations of a code, which are in the unit of v already."""
        return code.values
