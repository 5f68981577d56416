"""What identifies the results that a note is about, wherever their run lies.

A latent is a row of its crosscoder's weights, so it is identified by the digest of the weights: analysing again keeps notes,
training again does not. Concepts are identified by which latents are members of which, and by the concepts' strongest tokens.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import polars as pl

from crossdiff.files import fingerprint, sha256
from crossdiff.notes.note import Place
from crossdiff.notes.store import Notebook, Notes
from crossdiff.run_manifest import MANIFEST, RunManifest

CONCEPTS = "concepts"
LENGTH = 32
"""Hexadecimal digits of a digest that are kept."""


def latent_notes(notes: Notes, folder: Path) -> Notebook:
    """The notes about the latents of the crosscoder in a folder of a run."""
    run = folder.parent.resolve()
    return Notebook(notes, "latent", _coder(folder), Place(str(run), folder.name))


def concept_notes(notes: Notes, folder: Path, table: pl.DataFrame, members: pl.DataFrame) -> Notebook:
    """The notes about the concepts in a folder of a run.

    Args:
        table: the concepts, with the columns `concept` and `tokens`.
        members: one row per member, with the columns `concept`, `training` and `latent`.
    """
    tokens = table.select("concept", "tokens").sort("concept").rows()
    latents = members.select("training", "latent", "concept").sort("training", "latent").rows()
    of = fingerprint([tokens, latents])
    return Notebook(notes, "concept", of, Place(str(folder.parent.resolve()), CONCEPTS))


def _coder(folder: Path) -> str:
    """The digest of a crosscoder's weights; of its latent table where a run has no weights."""
    path = folder / "model.safetensors"
    if not path.is_file():
        path = folder / "latents.parquet"
    manifest = folder.parent / MANIFEST
    if manifest.is_file():
        known = RunManifest.read(folder.parent).digests.get(f"{folder.name}/{path.name}")
        if known is not None:
            return known[:LENGTH]
    found = path.stat()
    return _digest(path, (found.st_mtime_ns, found.st_size, found.st_ino))


@lru_cache(maxsize=64)
def _digest(path: Path, state: tuple[int, ...]) -> str:
    """The digest of a file that has not changed since (`state`)."""
    return sha256(path)[:LENGTH]
