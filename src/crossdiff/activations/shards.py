"""Writing the shards of a store: tokens fill a buffer, the buffer becomes a file, and a line in a log records it.

A file is hashed while it is written and gets its name only when it is complete (`Folder.writing`); the log line follows. So a
killed harvest skips the recorded shards when it resumes, and an incomplete last line is ignored. The tokens of a shard depend
only on the texts and settings, so any rank can make any shard. Each rank writes its own log and reads all logs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crossdiff.activations.folder import Folder
from crossdiff.activations.locations import open_folder
from crossdiff.activations.normalisation import Moments
from crossdiff.activations.ranges import SAFETENSORS_NAMES
from crossdiff.activations.store import COLUMNS
from crossdiff.activations.transfer import CPU
from crossdiff.errors import UserError
from crossdiff.shapes import Float, Float32, Int8, Tensor

BLOCK = 1 << 22
"""Number of bytes that are hashed and written at the same time."""


@dataclass(frozen=True)
class ShardEntry:
    """Log line of a finished shard.

    sequences: number of sequences in it. seconds: time since the shard before it, divided by the number of ranks.
    """

    file: str
    n_tokens: int
    bytes: int
    sha256: str
    sequences: int
    seconds: float


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def log_names(names: Iterable[str]) -> list[str]:
    """Select the logs of an unfinished harvest."""
    return sorted(name for name in names if name.startswith("progress-") and name.endswith(".jsonl"))


def quantise(h: Float32[Tensor, "token d_model"]) -> tuple[Int8[Tensor, "token d_model"], Float32[Tensor, " token"]]:
    """int8 values and a scale per token: value * scale is within scale / 2 of h. The scale of a token of zeros is 0."""
    scale = h.abs().amax(1) / 127
    return (h / torch.where(scale > 0, scale, 1.0).unsqueeze(1)).round_().to(torch.int8), scale


def to_stored(stream: Float[Tensor, "token d_model"], dtype: torch.dtype) -> dict[str, Tensor]:
    """Activations of one source in a store's dtype, by the name of their tensor in a shard; int8 has a scale per token too."""
    if dtype != torch.int8:
        return {"activations": stream.to(dtype)}
    values, scale = quantise(stream)
    return {"activations": values, "activation_scale": scale}


def as_stored(stream: Float[Tensor, "token d_model"], dtype: torch.dtype) -> Float32[Tensor, "token d_model"]:
    """Activations as they would be read back from a store of this dtype."""
    stored = to_stored(stream, dtype)
    values = stored["activations"].float()
    return values * stored["activation_scale"].unsqueeze(1) if "activation_scale" in stored else values


def check_finite(h: Float[Tensor, "token d_model"], norms: Float[Tensor, " token"], dtype: torch.dtype) -> None:
    """Refuse activations that are not finite or too large for the dtype of the store. `norms` are those of the rows."""
    limit = float("inf") if dtype == torch.int8 else torch.finfo(dtype).max
    # The norm of a row bounds its entries, so this cheaper test accepts almost every batch.
    if float(norms.max()) < limit:
        return
    if not torch.isfinite(h).all():
        raise UserError("a model gives NaN or infinite activations")
    largest = float(h.abs().max())
    if largest > limit:
        raise UserError(f"activations up to {largest:.3g} do not fit {dtype}; set harvest.dtype to bfloat16")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file in one pass over the memory. Returns its size in bytes and its SHA-256."""
    # Wide dtypes come first, so that every tensor is aligned in the file.
    ordered = dict(sorted(tensors.items(), key=lambda entry: -entry[1].element_size()))
    header, offset = {}, 0
    for name, tensor in ordered.items():
        assert tensor.is_contiguous()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset := offset + tensor.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, thread_name_prefix="digest") as thread:
        for block in _blocks(len(text).to_bytes(8, "little") + text, ordered.values()):
            digested = thread.submit(digest.update, block)
            _write_all(file.fileno(), block)
            digested.result()
    return 8 + len(text) + offset, digest.hexdigest()


def _blocks(head: bytes, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        yield from (content[start : start + BLOCK] for start in range(0, len(content), BLOCK))


def _write_all(descriptor: int, block: memoryview) -> None:
    while block:
        block = block[os.write(descriptor, block) :]


class ShardBuffer:
    """Memory for one shard of one layer. It is reused for all shards, so that its pages are allocated only once.

    Without a dtype it holds only the tokens. The moments are summed on `device`, and fetched when the shard is written.
    """

    def __init__(
        self, capacity: int, n_sources: int, d_model: int, dtype: torch.dtype | None, device: torch.device = CPU
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        if dtype is not None:
            self.tensors["activations"] = torch.empty(capacity, n_sources, d_model, dtype=dtype)
        if dtype == torch.int8:
            self.tensors["activation_scale"] = torch.empty(capacity, n_sources)
        self.tensors |= {name: torch.empty(capacity, dtype=column) for name, column in COLUMNS.items()}
        self._empty = partial(Moments.zero, n_sources, d_model, device)
        self.moments = self._empty()
        self.n_tokens = 0

    def add(self, columns: Mapping[str, Tensor], stored: Sequence[Mapping[str, Tensor]] = ()) -> None:
        """Append the tokens of a batch. `stored` has `to_stored` of each source on the CPU, if activations are stored."""
        rows = slice(self.n_tokens, self.n_tokens + len(columns["token_id"]))
        for source, tensors in enumerate(stored):
            for name, tensor in tensors.items():
                self.tensors[name][rows, source] = tensor
        for name, column in columns.items():
            self.tensors[name][rows] = column
        self.n_tokens = rows.stop

    def write(self, path: Path) -> tuple[int, str]:
        """Write the tokens and their moments, and empty the buffer. Returns the size and the SHA-256 of the file."""
        tensors = {name: tensor[: self.n_tokens] for name, tensor in self.tensors.items()}
        moments = self.moments.cpu()
        tensors |= {"total": moments.total, "products": moments.products, "n_training": moments.n_tokens}
        written = write_tensors(path, tensors)
        self.moments = self._empty()
        self.n_tokens = 0
        return written


class ProgressLog:
    """`progress-RANK.jsonl`: the settings of the harvest, then one line for each shard that this rank has finished."""

    def __init__(self, location: str | Path | Folder, settings: dict[str, Any], rank: int = 0) -> None:
        """Start this rank's log in a folder, or resume it."""
        self.folder = open_folder(location)
        self._name = f"progress-{rank}.jsonl"
        self._settings = settings
        found = _complete_lines(self.folder.fetch(self._name)) if self._name in self.folder.sizes() else []
        self._lines = found if len(found) > 1 else [settings]
        self._write()

    def entries(self) -> list[ShardEntry]:
        """The finished shards of all ranks, in order. A `UserError` refuses those of a harvest with other settings."""
        sizes, found = self.folder.sizes(), dict[str, ShardEntry]()
        for name in log_names(sizes):
            head, *lines = _complete_lines(self.folder.fetch(name)) or [self._settings]
            if lines and head != self._settings:
                location = self.folder.location
                raise UserError(f"{location} has an unfinished harvest with other settings; delete it or choose another folder")
            found |= {line["file"]: ShardEntry(**line) for line in lines}
        return [entry for file, entry in sorted(found.items()) if sizes.get(file) == entry.bytes]

    def append(self, entry: ShardEntry) -> None:
        """Add a line. The whole log is rewritten, because a file in a bucket cannot be appended to."""
        self._lines.append(asdict(entry))
        self._write()

    def _write(self) -> None:
        with self.folder.writing(self._name) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self._lines), encoding="utf-8")

    def remove(self) -> None:
        """Delete the logs of all ranks, once the store is finished."""
        for name in log_names(self.folder.sizes()):
            self.folder.remove(name)


def _complete_lines(path: Path) -> list[Any]:
    """The records of a log, without a last line that was cut off by a kill."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


class ShardWriters:
    """Writes the stores of one pass, one per layer, with the same tokens in the same shards.

    One set of buffers is filled while a thread writes the other, so memory is bounded by the two sets.
    """

    def __init__(
        self,
        logs: list[ProgressLog],
        capacity: int,
        n_sources: int,
        d_model: int,
        dtype: torch.dtype | None,
        device: torch.device = CPU,
    ) -> None:
        self.logs = logs
        self._sets = [[ShardBuffer(capacity, n_sources, d_model, dtype, device) for _ in logs] for _ in range(2)]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._writing: Future[None] | None = None

    @property
    def buffers(self) -> list[ShardBuffer]:
        """The buffers to fill, one per layer."""
        return self._sets[0]

    def flush(self, number: int, sequences: int, seconds: float) -> None:
        """Start to write the buffers as the shard of this number, once the previous one is written; see `ShardEntry`."""
        self.wait()
        full, empty = self._sets
        self._writing = self._thread.submit(self._write, full, number, sequences, seconds)
        self._sets = [empty, full]

    def wait(self) -> None:
        """Wait until everything flushed is written. Raises the error that stopped the writing."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        self._thread.shutdown()

    def _write(self, buffers: list[ShardBuffer], number: int, sequences: int, seconds: float) -> None:
        name = shard_name(number)
        for log, buffer in zip(self.logs, buffers, strict=True):
            n_tokens = buffer.n_tokens
            with log.folder.writing(name) as path:
                size, digest = buffer.write(path)
            log.append(ShardEntry(name, n_tokens, size, digest, sequences, seconds))
