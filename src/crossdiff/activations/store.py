"""The activation store: safetensors shards, a manifest with checksums, and a table of documents.

    manifest.json            models, layer, tokenizer, sizes, and each shard's size and SHA-256
    shard-00000.safetensors  activations [token, source, d_model], the columns of `COLUMNS` with one entry per token, and
                             the moments of the shard's training tokens; int8 adds activation_scale [token, source]
    documents.parquet        document, dataset, split, label, sub_label, prompt, n_messages, n_tokens, left_out
    statistics.safetensors   float64: mean [source, d_model], gram [source, source], over the training tokens, or over all if
                             every document is held out

The tokens of a sequence are consecutive rows of one shard, in order. There is no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from crossdiff.activations.counted import Counted
from crossdiff.activations.folder import DOCUMENTS, MANIFEST, Folder
from crossdiff.activations.locations import open_folder, read_pointer
from crossdiff.activations.normalisation import Normalisation
from crossdiff.activations.ranges import StoredRows
from crossdiff.activations.transfer import CPU
from crossdiff.config import HarvestConfig
from crossdiff.errors import UserError
from crossdiff.files import read_json, sha256
from crossdiff.integrity import intact
from crossdiff.shapes import Float, Tensor
from crossdiff.text.chat import Flag
from crossdiff.text.sequences import POOL, batch_bounds

FORMAT = 2
STATISTICS = "statistics.safetensors"
COLUMNS: dict[str, torch.dtype] = {
    "token_id": torch.int32,
    "document": torch.int32,
    "sequence": torch.int32,
    "position": torch.int32,
    "dataset": torch.uint8,
    "flags": torch.uint8,
    "template_index": torch.int8,
    "turn": torch.int8,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def _open(location: str | Path) -> tuple[Folder, dict[str, Any]]:
    """Return the folder of the store at `location`, or the one that a pointer there leads to, and the manifest."""
    folder = open_folder(location)
    pointer = read_pointer(folder)
    if pointer is not None:
        folder = open_folder(pointer.url)
    try:
        path = folder.fetch(MANIFEST)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder.location} is not an activation store: it has no {MANIFEST} ({error}); run `crossdiff harvest` first"
        ) from None
    if pointer is not None and sha256(path) != pointer.sha256:
        raise UserError(
            f"the store {folder.location} is not the one that {location} was made with; restore it or delete {location}"
        )
    manifest = read_json(intact(path))
    if not isinstance(manifest, dict) or "shards" not in manifest:
        raise UserError(
            f"{folder.location} is not an activation store: its {MANIFEST} lists no shards; the store of a run is its folder "
            "`activations`"
        )
    return folder, manifest


class SequenceBatch(NamedTuple):
    """Whole sequences of a store.

    Attributes:
        numbers: indices of the sequences in the store, `[sequence]`.
        rows: rows of their tokens in the store, `[token]`.
        sequence: position in `numbers` of each token's sequence, `[token]`.
    """

    numbers: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    sequence: npt.NDArray[np.int64]


class Store:
    """A harvested store. Its columns are memory-mapped; only requested rows of its activations are loaded into memory.

    Examples:
        >>> store = crossdiff.Store("runs/demo/activations")
        >>> store.sources, store.documents["n_tokens"].sum() == store.n_tokens
        (('base', 'chat'), True)

    Args:
        folder: a local folder, or the URL of a remote one (`s3://bucket/folder`). The columns of a remote store are copied
            to the local disk.

    Raises:
        UserError: the folder is not a store or has another format, or a shard is missing or has the wrong size.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder, self.manifest = _open(folder)
        self.folder = folder = self._folder.location
        if self.manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder} has store format {self.manifest.get('format')!r}; this version reads {FORMAT}; harvest again"
            )
        sizes = self._folder.sizes()
        for shard in self.manifest["shards"]:
            size = sizes.get(self._folder.checked_name(shard["file"]))
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                path = self._folder.path_of(shard["file"])
                raise UserError(f"shard {path} {found}; restore it, or harvest again with --force")
        if not self.manifest["n_tokens"]:
            raise UserError(f"{folder} holds no tokens; harvest again with texts")
        if (n_rows := int(self.offsets[-1])) != self.n_tokens:
            raise UserError(
                f"the shards of {folder} hold {n_rows} tokens, but the manifest says {self.n_tokens}; harvest again"
            )

    @property
    def n_tokens(self) -> int:
        return int(self.manifest["n_tokens"])

    @property
    def d_model(self) -> int:
        return int(self.manifest["d_model"])

    @property
    def layer(self) -> int:
        return int(self.manifest["layer"])

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.manifest["sources"])

    @property
    def float_dtype(self) -> torch.dtype:
        """Floating-point type that holds stored activations; float16 for int8 with its scale per token."""
        dtype = DTYPES[self.manifest["dtype"]]
        return dtype if dtype.is_floating_point else torch.float16

    @property
    def is_live(self) -> bool:
        """Whether the activations are computed when they are read."""
        return self.order == "live"

    @property
    def order(self) -> str:
        """Order in which training reads the tokens: the value of `harvest.storage`."""
        return str(self.manifest.get("storage", "blocks"))

    @property
    def leave_out(self) -> int:
        return int(self.manifest["leave_out"])

    @property
    def rule(self) -> Counted:
        """The rule by which tokens count. Stores of earlier versions have no limit of the norm."""
        return Counted(self.leave_out, tuple(self.manifest.get("massive", {}).get("norm_limits", ())))

    @cached_property
    def counted(self) -> npt.NDArray[np.bool_]:
        """Whether each token takes part in training and statistics: it is not in a leading position that is omitted, and its
        activation has no massive norm."""
        ordinary: npt.NDArray[np.bool_] = (self.column("flags") & Flag.MASSIVE) == 0
        return ordinary & (self.column("position") >= self.leave_out)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the harvest that its results depend on, with the keys of `HarvestConfig`."""
        return {key: self.manifest[key] for key in HarvestConfig.model_fields if key in self.manifest}

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.manifest["datasets"])

    @property
    def pair(self) -> dict[str, Any]:
        """Identity of the two models and their tokenizer."""
        identity: dict[str, Any] = self.manifest["pair"]
        return identity

    @cached_property
    def documents(self) -> pl.DataFrame:
        """Table with one row per document, sorted by its number."""
        try:
            return pl.read_parquet(self._checked(DOCUMENTS)).sort("document")
        except (OSError, pl.exceptions.PolarsError) as error:
            path = self._folder.path_of(DOCUMENTS)
            raise UserError(f"cannot read {path}: {error}; restore it, or harvest again with --force") from None

    @cached_property
    def normalisation(self) -> Normalisation:
        """Moments over the training tokens."""
        statistics = load_file(self._checked(STATISTICS))
        return Normalisation(statistics["mean"], statistics["gram"])

    def _checked(self, name: str) -> Path:
        """A file whose digest is in the manifest, if it is what the harvest wrote."""
        path, expected = self._folder.fetch(name), self.manifest.get("files", {}).get(name)
        if expected is not None and sha256(path) != expected:
            raise UserError(
                f"{self._folder.path_of(name)} is damaged: its content has changed since the harvest (its SHA-256 differs); "
                "restore it, or harvest again with --force"
            )
        return path

    @cached_property
    def _headers(self) -> list[Path]:
        return self._folder.headers([shard["file"] for shard in self.manifest["shards"]])

    @cached_property
    def shards(self) -> list[dict[str, Tensor]]:
        """The columns of each shard, memory-mapped."""
        scaled = self.manifest["dtype"] == "int8" and not self.is_live
        names = [*COLUMNS, *(["activation_scale"] if scaled else [])]
        opened = []
        for shard, header in zip(self.manifest["shards"], self._headers, strict=True):
            path = self._folder.path_of(shard["file"])
            try:
                with safe_open(header, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in names}
            except SafetensorError as error:
                raise UserError(f"shard {path} is damaged: {error}; harvest again with --force") from None
            for name, tensor in tensors.items():
                if len(tensor) != shard["n_tokens"]:
                    raise UserError(
                        f"shard {path} has {len(tensor)} entries of {name}, but the manifest says {shard['n_tokens']}; "
                        "harvest again with --force"
                    )
            opened.append(tensors)
        return opened

    @cached_property
    def activations(self) -> list[StoredRows]:
        """The activations of each shard, `[token, source, d_model]`, in the stored dtype."""
        opened = []
        for shard, header, columns in zip(self.manifest["shards"], self._headers, self.shards, strict=True):
            rows = StoredRows(self._folder, shard["file"], header, "activations")
            expected = (len(columns["position"]), len(self.sources), self.d_model)
            if rows.shape != expected:
                raise UserError(
                    f"shard {rows.path} holds activations of shape {rows.shape}, but the manifest says {expected}; "
                    "harvest again with --force"
                )
            opened.append(rows)
        return opened

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """First row of each shard, followed by the total number of rows."""
        return np.cumsum([0, *(shard["n_tokens"] for shard in self.manifest["shards"])], dtype=np.int64)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column of `COLUMNS` for every token of the store."""
        return np.concatenate([shard[name].numpy() for shard in self.shards])

    def rows(self, split: str | None = None) -> npt.NDArray[np.int64]:
        """Rows of the tokens that count, in one split or in all; see `counted`.

        Raises:
            UserError: there are no such tokens.
        """
        wanted = self.counted
        if split is not None:
            members = self.documents.filter(pl.col("split") == split)["document"].to_numpy()
            wanted = wanted & np.isin(self.column("document"), members)
        rows = np.flatnonzero(wanted)
        if not len(rows):
            what = f"in the split {split!r} " if split else ""
            raise UserError(
                f"{self.folder} has no tokens {what}to work on: the first {self.leave_out} of each sequence are omitted, and "
                "so are tokens of massive norm; add text or lower harvest.leave_out"
            )
        return rows

    def gather(self, rows: npt.NDArray[np.int64], device: torch.device = CPU) -> Float[Tensor, "batch source d_model"]:
        """Activations of the given rows as float32, in the order given, on a device.

        Raises:
            UserError: one of them is NaN or infinite.
        """
        if self.is_live:
            raise UserError(f"{self.folder} stores no activations; open it with the models that compute them (`open_store`)")
        out = torch.empty(len(rows), len(self.sources), self.d_model)
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], self.offsets)
        parts = {index: order[cuts[index] : cuts[index + 1]] for index in np.flatnonzero(np.diff(cuts)).tolist()}
        local = {index: torch.from_numpy(rows[part] - self.offsets[index]) for index, part in parts.items()}
        calls = [partial(self.activations[index].__getitem__, chosen) for index, chosen in local.items()]
        for index, stored in zip(parts, self._folder.gather_calls(calls), strict=True):
            h = stored.float()
            if (scale := self.shards[index].get("activation_scale")) is not None:
                h *= scale[local[index]].unsqueeze(2)
            out[torch.from_numpy(parts[index])] = h
        # A NaN or infinity makes the sum non-finite, and a sum is cheaper than checking every number.
        if not torch.isfinite(out.sum()):
            self._refuse_non_finite(rows, out)
        return out.to(device)

    def home(self, device: torch.device) -> torch.device:
        """The device where activations that are needed on `device` are best kept until then: where they come from."""
        return CPU

    def _refuse_non_finite(self, rows: npt.NDArray[np.int64], h: Float[Tensor, "batch source d_model"]) -> None:
        wrong = (~torch.isfinite(h).flatten(1).all(1)).numpy()
        if wrong.any():
            row = int(rows[wrong].min())
            shard = int(np.searchsorted(self.offsets, row, side="right")) - 1
            raise UserError(
                f"{int(wrong.sum())} of {len(rows)} tokens read from {self.folder} have NaN or infinite activations, the first "
                f"in row {row - int(self.offsets[shard])} of {self.manifest['shards'][shard]['file']} (row {row} of the "
                "store); check it with `crossdiff store verify`, and harvest again with --force"
            )

    def sequences(self) -> npt.NDArray[np.int64]:
        """Row bounds of the sequences: sequence i, in stored order, has the rows `bounds[i]` to `bounds[i + 1]`."""
        return sequence_bounds(self.column("sequence"))

    @cached_property
    def passes(self) -> npt.NDArray[np.int64]:
        """Row bounds of the forward passes of the harvest."""
        return pass_bounds(self.sequences(), int(self.manifest["batch_tokens"]))

    def batches_of_sequences(self, numbers: npt.NDArray[np.int64], batch_tokens: int) -> Iterator[SequenceBatch]:
        """Batches of whole sequences, in the order given, with at most `batch_tokens` tokens each (at least one sequence)."""
        bounds = self.sequences()
        lengths = bounds[numbers + 1] - bounds[numbers]
        for first, last in consecutive(np.concatenate([[0], np.cumsum(lengths)]), batch_tokens):
            members = numbers[first:last]
            rows = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in members])
            yield SequenceBatch(members, rows, np.repeat(np.arange(len(members)), lengths[first:last]))

    def check_models(self, models: Mapping[str, dict[str, Any]], layer: int | None) -> None:
        """Check that the store was harvested from the models with these identities at this layer (None: any layer).

        Raises:
            UserError: it was not. The message names both sides.
        """
        layer = self.layer if layer is None else layer
        found = {source: self.pair[source] for source in self.sources}
        if (found, self.layer) != (dict(models), layer):
            ours, theirs = (" and ".join(map(str, each.values())) for each in (found, models))
            raise UserError(
                f"the store {self.folder} was harvested from {ours} at layer {self.layer}, but {theirs} at layer {layer} are "
                "requested; use another run directory, or harvest again with --force"
            )


def sequence_bounds(numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Row bounds of the sequences, given the sequence number of each row."""
    return np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1, [len(numbers)]]).astype(np.int64)


def pass_bounds(sequences: npt.NDArray[np.int64], batch_tokens: int) -> npt.NDArray[np.int64]:
    """Row bounds of a harvest's forward passes, given those of its sequences."""
    return sequences[batch_bounds(np.diff(sequences), batch_tokens, POOL)]


def consecutive(bounds: npt.NDArray[np.int64], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole sequences with at most `batch_tokens` tokens each (at least one sequence)."""
    first = 0
    while first < len(bounds) - 1:
        last = int(np.searchsorted(bounds, bounds[first] + batch_tokens, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def verify(folder: str | Path) -> list[str]:
    """Read the whole store and list everything that is wrong with it. An empty list means that the store is intact."""
    found, manifest = _open(folder)
    sizes, problems = found.sizes(), []
    files = [(shard["file"], shard["bytes"], shard["sha256"]) for shard in manifest["shards"]]
    files += [(name, None, digest) for name, digest in manifest["files"].items()]
    for name, n_bytes, digest in files:
        size = sizes.get(found.checked_name(name))
        if size is None:
            problems.append(f"{name}: missing")
        elif n_bytes not in (None, size):
            problems.append(f"{name}: {size} bytes instead of {n_bytes} (truncated?)")
        elif found.digest(name) != digest:
            problems.append(f"{name}: the content has changed (its SHA-256 differs)")
    if sum(shard["n_tokens"] for shard in manifest["shards"]) != manifest["n_tokens"]:
        problems.append("manifest.json: the shards' tokens do not add up to n_tokens")
    return problems or _lost_documents(folder)


def _lost_documents(folder: str | Path) -> list[str]:
    """What is wrong with the documents of a store whose files are intact: each must be in the shards, or left out."""
    store = Store(folder)
    table, stored = store.documents, store.column("document")
    numbers, n_tokens = table["document"].to_numpy(), table["n_tokens"].to_numpy()
    if not np.array_equal(numbers, np.arange(store.manifest["n_documents"])):
        return [f"{DOCUMENTS}: the documents are not numbered from 0 to {store.manifest['n_documents'] - 1}"]
    problems = []
    if strangers := sorted(set(stored[(stored < 0) | (stored >= len(numbers))].tolist())):
        problems.append(f"the shards hold tokens of document {strangers[0]}, which {DOCUMENTS} lacks")
    found = np.bincount(stored[(stored >= 0) & (stored < len(numbers))], minlength=len(numbers))
    for number in np.flatnonzero(found != n_tokens)[:10]:
        problems.append(f"document {number}: {found[number]} tokens in the shards, {n_tokens[number]} in {DOCUMENTS}")
    if "left_out" in table.columns:  # stores from before this column existed give no reasons
        unexplained = np.flatnonzero((n_tokens == 0) == table["left_out"].is_null().to_numpy())
        problems += [f"document {number}: it has no tokens, and {DOCUMENTS} gives no reason" for number in unexplained[:10]]
    positions, bounds = store.column("position"), store.sequences()
    expected = np.arange(store.n_tokens) - np.repeat(bounds[:-1], np.diff(bounds))
    if (wrong := np.flatnonzero(positions != expected)).size:
        problems.append(f"row {wrong[0]}: the tokens of its sequence are not all there, or in another order")
    return problems
