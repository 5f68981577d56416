"""Rows of a tensor in a safetensors file, read as byte ranges.

A memory map would do too where the file is local, but every page that was read counts as the process's memory until the
system is short of it, and a file that is cut off under a map ends the process without a word.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from crossdiff.activations.folder import Folder
from crossdiff.shapes import Int64, Tensor

SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class StoredRows:
    """One tensor of a safetensors file, of which only the rows asked for are ever in memory; the file's header is sound."""

    def __init__(self, place: Folder, file_name: str, skim: Path, name: str) -> None:
        """`skim` is a local file with the header of the one called `file_name` (`Folder.skims`)."""
        self.path = place.at(file_name)
        self._place, self._file_name = place, file_name
        with skim.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[name]
        self.shape = tuple(entry["shape"])
        self.dtype = next(dtype for dtype, known in SAFETENSORS_NAMES.items() if known == entry["dtype"])
        self._first = 8 + length + entry["data_offsets"][0]

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: Int64[Tensor, " row"]) -> Tensor:
        """The given rows in the given order; neighbours that follow each other are read together.

        Raises:
            UserError: the file ends before them, or the system cannot read it.
        """
        out = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        if not out.numel():
            return out
        content, row_bytes = out.view(-1).view(torch.uint8).numpy(), out[0].nbytes
        numbers = rows.numpy()
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(numbers) != 1) + 1, [len(numbers)]])
        runs = zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
        pieces = (
            (self._first + int(numbers[first]) * row_bytes, content[first * row_bytes : last * row_bytes].data)
            for first, last in runs
        )
        self._place.read(self._file_name, pieces)
        return out
