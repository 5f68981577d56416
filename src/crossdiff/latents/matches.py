"""Latents of other trainings by the cosine of chat directions, the same measure as for the nearest latents of one training.

The directions are read with numpy alone, so that a page does not wait for torch to start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from crossdiff.errors import UserError
from crossdiff.integrity import intact
from crossdiff.sources import CHAT

N_MATCHES = 3

Directions = npt.NDArray[np.float32]
EVERY = slice(None)


class Match(NamedTuple):
    """A latent of another training, and the cosine of the two chat directions."""

    training: str
    latent: int
    cosine: float


def matches(folder: Path, latent: int, others: Sequence[Path]) -> list[Match]:
    """The `N_MATCHES` nearest latents of each other training, those of one training together and the nearest first.

    Trainings without a chat direction of the same width are left out. A direction of length 0 has cosine 0 with everything.

    Args:
        folder, others: folders of trained crosscoders.

    Raises:
        UserError: a crosscoder cannot be read.
    """
    own = directions_of(folder, CHAT, slice(latent, latent + 1))
    found: list[Match] = []
    for other in others if own is not None else ():
        theirs = directions_of(other, CHAT)
        if own is None or theirs is None or theirs.shape[1] != own.shape[1]:
            continue
        cosines = _cosines(theirs, own[0])
        top = np.argsort(-cosines, kind="stable")[:N_MATCHES]
        found += [Match(other.name, int(number), float(cosines[number])) for number in top]
    return found


def cosine_between(folder: Path, latent: int, other_folder: Path, other: int, source: str) -> float | None:
    """The cosine of two latents' directions for one source; None if a crosscoder has none of it.

    Raises:
        UserError: a crosscoder cannot be read.
    """
    mine = directions_of(folder, source, slice(latent, latent + 1))
    theirs = directions_of(other_folder, source, slice(other, other + 1))
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return None
    return float(_cosines(theirs, mine[0])[0])


def _cosines(directions: Directions, direction: npt.NDArray[np.float32]) -> Directions:
    lengths = np.linalg.norm(directions, axis=1) * np.linalg.norm(direction)
    found: Directions = (directions @ direction) / np.maximum(lengths, np.float32(1e-12))
    return found


def directions_of(folder: Path, source: str, latents: slice = EVERY) -> Directions | None:
    """Decoder directions `[latent, d_model]` for one source of the crosscoder in a folder, read without its other weights.

    None if it has none for the source.

    Raises:
        UserError: the crosscoder cannot be read.
    """
    path = folder / "model.safetensors"
    try:
        with safe_open(intact(path), framework="numpy") as file:
            names = json.loads(file.metadata()["crossdiff"])["view"]["names"]
            if source not in names:
                return None
            found: Directions = file.get_slice("decoder.weight")[names.index(source), latents]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot read the decoder of {path}: {error}; train the crosscoder again") from None
    return found
