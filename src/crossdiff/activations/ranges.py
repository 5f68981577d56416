"""Rows of a tensor in a safetensors file, read as byte ranges.

A memory map of a local file would work too, but every page that was read counts as the process's memory until the system runs
short of it, and a file that is truncated under a map kills the process without a message.
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
    """One tensor of a safetensors file. Only requested rows are loaded into memory."""

    def __init__(self, folder: Folder, file_name: str, header: Path, name: str) -> None:
        """`header` is a local file with a valid header of the file called `file_name`, see `Folder.header`."""
        self.path = folder.path_of(file_name)
        self._folder, self._file_name = folder, file_name
        with header.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[name]
        self.shape = tuple(entry["shape"])
        self.dtype = next(dtype for dtype, known in SAFETENSORS_NAMES.items() if known == entry["dtype"])
        self._first_byte = 8 + length + entry["data_offsets"][0]

    def __getitem__(self, rows: Int64[Tensor, " row"]) -> Tensor:
        """The given rows in the given order; consecutive rows are read together."""
        out = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        if not out.numel():
            return out
        content = out.view(-1).view(torch.uint8).numpy()
        row_bytes = out[0].nbytes
        numbers = rows.numpy()
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(numbers) != 1) + 1, [len(numbers)]])
        runs = zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
        pieces = (
            (self._first_byte + int(numbers[first]) * row_bytes, content[first * row_bytes : last * row_bytes].data)
            for first, last in runs
        )
        self._folder.read(self._file_name, pieces)
        return out
