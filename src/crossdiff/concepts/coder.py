"""Concepts as the latents of a coder, so that whatever reads latents can read concepts.

The activation of a concept on a token is the sum of its members' v within a training, averaged over the trainings that have it.
"""

from __future__ import annotations

import numpy as np
import torch

from crossdiff.concepts.similarity import Matrix
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.stream import Coded, Read


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
