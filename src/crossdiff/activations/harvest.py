"""Run both models over the same tokens and store their residual streams after one or several layers.

Ranks that share a harvest all read the texts, which is cheap, and take turns with the shards. So the store is the same, to the
last bit, for any number of ranks. A live harvest stores only the tokens, see `live`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from crossdiff.activations.ahead import after_next, read_ahead
from crossdiff.activations.counted import Counted
from crossdiff.activations.folder import MANIFEST, Folder
from crossdiff.activations.live import sampled_moments
from crossdiff.activations.passes import ForwardPass, NotFiniteError
from crossdiff.activations.shards import (
    ProgressLog,
    ShardBuffer,
    ShardEntry,
    ShardWriters,
    check_finite,
    log_names,
    shard_name,
    to_stored,
)
from crossdiff.activations.store import COLUMNS, DTYPES, FORMAT, Store
from crossdiff.activations.texts import Texts
from crossdiff.activations.transfer import ToHost, is_asynchronous, send
from crossdiff.activations.writer import Origin, finish_store, summed_moments
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Tensor
from crossdiff.text.chat import Flag
from crossdiff.text.documents import check_datasets
from crossdiff.text.sequences import POOL, TokenSequence, bucketed

MEDIAN_TOKENS = 8192
"""Number of tokens of the first shard that the median norm is taken from."""


def token_columns(batch: Sequence[TokenSequence], first_sequence: int) -> dict[str, Tensor]:
    """The columns of a batch's tokens. `first_sequence` is the number of its first sequence."""
    lengths = [len(sequence.token_ids) for sequence in batch]
    values: dict[str, Any] = {
        "token_id": np.concatenate([sequence.token_ids for sequence in batch]),
        "document": np.repeat([sequence.document for sequence in batch], lengths),
        "sequence": np.repeat(np.arange(first_sequence, first_sequence + len(batch)), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "dataset": np.repeat([sequence.dataset for sequence in batch], lengths),
        "flags": np.concatenate([sequence.flags for sequence in batch]),
        "template_index": np.concatenate([sequence.template_index for sequence in batch]),
        "turn": np.concatenate([sequence.turn for sequence in batch]),
    }
    return {name: torch.from_numpy(values[name]).to(dtype) for name, dtype in COLUMNS.items()}


def harvest(
    folders: Mapping[int, str | Path | Folder],
    pair: Pair,
    datasets: tuple[DatasetConfig, ...],
    config: HarvestConfig,
    advance: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    one_sided: bool = False,
) -> list[str]:
    """Write an activation store per layer, in one pass over the texts, and resume unfinished ones.

    The stores hold the same tokens in the same order.

    Args:
        folders: folder of each layer's store, local or at a URL.
        advance: called after each document.
        ranks: the processes that share the work. All of them must see the folders.
        one_sided: accept conversations without any token of the user, or of the assistant.

    Returns:
        Remarks for the user: layouts that were found, datasets shorter than requested, omitted damaged records, cut answers.
    """
    check_datasets(datasets)
    texts = Texts(datasets, pair.tokenizer, config, advance, pair.unreadable)
    settings = {layer: _settings(pair, layer, datasets, config) for layer in sorted(folders)}
    logs = {layer: ProgressLog(folders[layer], each, ranks.rank) for layer, each in settings.items()}
    ranks.wait()
    if config.compile:
        pair.compile()
    n_shards, rules = _write_shards(logs, pair, texts, config, ranks)
    if not one_sided:
        texts.check_sides()  # the shards stay, so a repetition with one_sided finishes at once
    ranks.wait()
    for layer, log in logs.items() if ranks.is_first else ():
        names = tuple(record.name for record in texts.records)
        entries = log.entries()
        massive = _massive(log.folder, entries, rules[layer], pair.tokenizer) | {"multiple": config.max_norm_multiple or 0.0}
        origin = Origin(
            pair.identity, layer, pair.n_layers, names, texts.report(), pair.revisions, pair.dtype, massive, pair.sources
        )
        assert len(entries) == n_shards, f"{log.folder.location} has {len(entries)} of {n_shards} shards"
        assert sum(entry.n_tokens for entry in entries) == sum(record.n_tokens for record in texts.records)
        if config.storage == "live":
            moments = sampled_moments(log.folder, entries, pair, layer, config, texts.in_statistics)
        else:
            moments = summed_moments(log.folder, entries)
        finish_store(log.folder, origin, config, entries, texts.table(), moments)
        log.remove()
    remarks = [massive_remark(Store(log.folder.location).manifest) for log in logs.values()]
    return [*texts.remarks(), *dict.fromkeys(filter(None, remarks))]


def is_finished(folder: Folder) -> bool:
    """Whether a harvest into this folder has finished."""
    names = folder.sizes()
    return MANIFEST in names and not log_names(names)


def _write_shards(
    logs: Mapping[int, ProgressLog], pair: Pair, texts: Texts, config: HarvestConfig, ranks: Ranks
) -> tuple[int, dict[int, Counted]]:
    """Write this rank's missing shards of every layer. Returns the number of shards of all ranks, and the layers' rules."""
    done = set.intersection(*({entry.file for entry in log.entries()} for log in logs.values()))
    ranks.wait()  # all ranks must read the logs before any of them writes
    dtype = None if config.storage == "live" else DTYPES[config.dtype]
    capacity, layers = config.shard_tokens + config.batch_tokens, list(logs)
    writers = ShardWriters(list(logs.values()), capacity, len(pair.sources), pair.d_model, dtype, pair.device)
    number, n_before, since = -1, 0, time.time()
    rules = {layer: Counted(config.leave_out) for layer in logs}
    try:
        sequences = read_ahead(texts.sequences(), POOL)
        for number, batches in enumerate(_shards(sequences, config)):
            n_sequences = sum(map(len, batches))
            if number == 0 and config.max_norm_multiple is not None and config.storage != "live":
                rules = _rules(batches, pair, config.leave_out, config.max_norm_multiple, layers)
            if ranks.has(number) and shard_name(number) in done:
                _check_stored(logs.values(), number, batches, n_before)
            elif ranks.has(number):
                firsts = (n_before + np.cumsum([0, *map(len, batches)])).tolist()
                started = (_Batch(batch, first, pair, layers, dtype) for batch, first in zip(batches, firsts, strict=False))
                # On the CPU, another batch in progress would only take memory.
                for running in after_next(started) if is_asynchronous(pair.device) else started:
                    running.add(writers.buffers, [rules[layer] for layer in layers], texts.in_statistics)
                writers.flush(number, n_sequences, (time.time() - since) / ranks.size)
                since = time.time()
            n_before += n_sequences
        writers.wait()
    finally:
        writers.close()
    return number + 1, rules


def _rules(
    batches: list[list[TokenSequence]], pair: Pair, leave_out: int, multiple: float, layers: list[int]
) -> dict[int, Counted]:
    """The rule of each layer, from the median norms of the first shard's first tokens after the leading positions.

    All ranks make the same rules, and so does a harvest that is resumed.
    """
    found, n_tokens = [], 0
    for batch in batches:
        kept = torch.from_numpy(np.concatenate([np.arange(len(sequence.token_ids)) for sequence in batch]) >= leave_out)
        forward = _forward(pair, batch, layers)
        norms = forward.norms.cpu()
        _check(forward, norms, batch)
        found.append(norms[:, :, kept])
        n_tokens += int(kept.sum())
        if n_tokens >= MEDIAN_TOKENS:
            break
    if not n_tokens:
        return {layer: Counted(leave_out) for layer in layers}
    medians = torch.cat(found, dim=2).median(dim=2).values
    limits = {layer: tuple((multiple * median).tolist()) for layer, median in zip(layers, medians, strict=True)}
    return {layer: Counted(leave_out, limit) for layer, limit in limits.items()}


def _check_stored(logs: Iterable[ProgressLog], number: int, batches: list[list[TokenSequence]], first: int) -> None:
    """Check that the texts give the tokens that a finished shard holds; `first` is the number of its first sequence.

    Raises:
        UserError: they do not, because the texts or the tokenizer's rules changed in between.
    """
    firsts = np.cumsum([first, *map(len, batches)])
    parts = [token_columns(batch, int(start)) for batch, start in zip(batches, firsts, strict=False)]
    for log in logs:
        (path,) = log.folder.headers([shard_name(number)])
        with safe_open(path, framework="pt") as file:
            for name in COLUMNS:
                found, stored = torch.cat([part[name] for part in parts]), file.get_tensor(name)
                if name == "flags":
                    stored = stored & ~Flag.MASSIVE  # not from the texts
                if len(found) == len(stored) and torch.equal(found, stored):
                    continue
                raise UserError(
                    f"{log.folder.path_of(shard_name(number))} holds {len(stored)} tokens of an earlier start of this harvest, "
                    f"but the texts now give {len(found)} tokens there, with another {name}: the texts, the chat template or "
                    "the tokenizer changed in between. Delete the unfinished harvest with `crossdiff clean RUN "
                    "--unfinished-harvests`, and start it again"
                )


def _shards(sequences: Iterable[TokenSequence], config: HarvestConfig) -> Iterator[list[list[TokenSequence]]]:
    """Yield the batches of each shard. All shards but the last reach `shard_tokens`."""
    shard: list[list[TokenSequence]] = []
    n_tokens = 0
    for batch in bucketed(sequences, config.batch_tokens, POOL):
        shard.append(batch)
        n_tokens += sum(len(sequence.token_ids) for sequence in batch)
        if n_tokens >= config.shard_tokens:
            yield shard
            shard, n_tokens = [], 0
    if shard:
        yield shard


class _Batch:
    """A batch on its way into the store: both models start on it when it is created, and an accelerator sends their activations
    to the CPU when they are done.

    Without a dtype, the store holds only the tokens, and the models do not run.
    """

    def __init__(
        self, sequences: list[TokenSequence], first_sequence: int, pair: Pair, layers: list[int], dtype: torch.dtype | None
    ) -> None:
        self._sequences, self._dtype = sequences, dtype
        if dtype is not None:
            self._forward = _forward(pair, sequences, layers)
            self._stored = [[to_stored(stream, dtype) for stream in streams] for streams in self._forward.streams]
            tensors = [tensor for layer in self._stored for each in layer for tensor in each.values()]
            self._arriving = ToHost([self._forward.norms, *tensors])
        self._columns = token_columns(sequences, first_sequence)

    def add(self, buffers: Sequence[ShardBuffer], rules: Sequence[Counted], in_statistics: Sequence[bool]) -> None:
        """Append the batch to the buffer of each layer. The moments are over the training tokens that count.

        Raises:
            UserError: a model gives activations that the store cannot hold.
        """
        if self._dtype is None:
            for buffer in buffers:
                buffer.add(self._columns)
            return
        norms, *tensors = self._arriving.wait()
        _check(self._forward, norms, self._sequences)
        arrived = iter(tensors)
        training = np.concatenate([np.full(len(each.token_ids), in_statistics[each.document]) for each in self._sequences])
        columns = self._columns
        for layer, (buffer, rule) in enumerate(zip(buffers, rules, strict=True)):
            streams, of_sources = self._forward.streams[layer], norms[layer].unbind()
            ordinary = rule.within(of_sources)
            for stream, norm in zip(streams, of_sources, strict=True):
                self._check_fits(stream, norm, self._dtype)
            flags = columns["flags"].where(ordinary, columns["flags"] | Flag.MASSIVE)
            stored = [{name: next(arrived) for name in each} for each in self._stored[layer]]
            buffer.add(columns | {"flags": flags}, stored)
            counted = torch.from_numpy(training) & (columns["position"] >= rule.leave_out) & ordinary
            chosen = send(counted.nonzero().squeeze(1), streams[0].device)
            buffer.moments.add([stream.index_select(0, chosen) for stream in streams])
        del self._forward, self._stored, self._arriving  # the memory, before the next batch needs it

    def _check_fits(self, stream: Tensor, norms: Tensor, dtype: torch.dtype) -> None:
        try:
            check_finite(stream, norms, dtype)
        except UserError as error:
            numbers = [sequence.document for sequence in self._sequences]
            raise UserError(f"{error} (in documents {min(numbers)} to {max(numbers)})") from error


def _forward(pair: Pair, batch: list[TokenSequence], layers: list[int]) -> ForwardPass:
    return ForwardPass(pair, [sequence.token_ids for sequence in batch], layers)


def _check(forward: ForwardPass, norms: Tensor, batch: list[TokenSequence]) -> None:
    """`ForwardPass.check`, with an error that names the document."""
    try:
        forward.check(norms)
    except NotFiniteError as error:
        documents = np.repeat([sequence.document for sequence in batch], [len(sequence.token_ids) for sequence in batch])
        raise error.in_document(int(documents[error.row])) from None


def _massive(folder: Folder, entries: Sequence[ShardEntry], rule: Counted, tokenizer: Any) -> dict[str, Any]:
    """The limits of the norm, the number of tokens beyond them, and the tokens that most of them are, with their numbers."""
    found: Counter[int] = Counter()
    for path in folder.headers([entry.file for entry in entries]):
        with safe_open(path, framework="pt") as file:
            massive = (file.get_tensor("flags") & Flag.MASSIVE) != 0
            # The leading positions are omitted whatever their norm.
            found.update(file.get_tensor("token_id")[massive & (file.get_tensor("position") >= rule.leave_out)].tolist())
    most = [[tokenizer.decode([token]), count] for token, count in found.most_common(3)]
    return {"norm_limits": list(rule.norm_limits), "n_tokens": found.total(), "most_often": most}


def massive_remark(manifest: Mapping[str, Any]) -> str | None:
    """What to tell the user about the tokens of massive norm in a store; None if there are none."""
    massive = manifest.get("massive", {})
    if not massive.get("n_tokens"):
        return None
    often = ", ".join(f"{token!r} ({count:,})" for token, count in massive["most_often"])
    return (
        f"{massive['n_tokens']:,} of {manifest['n_tokens']:,} tokens ({massive['n_tokens'] / manifest['n_tokens']:.2%}) have "
        f"activations of more than {massive['multiple']:g} times the median norm and are left out, as the leading "
        f"positions are (harvest.max_norm_multiple); most often {often}"
    )


def _settings(pair: Pair, layer: int, datasets: tuple[DatasetConfig, ...], config: HarvestConfig) -> dict[str, Any]:
    """The settings that a resumed harvest must share with the unfinished one."""
    return {
        "format": FORMAT, "pair": pair.identity, "layer": layer, "settings": config.model_dump(mode="json", exclude={"store"}),
        "datasets": [dataset.model_dump(mode="json") for dataset in datasets], "model_dtype": pair.dtype,
        "max_norm_multiple": config.max_norm_multiple,
    }  # fmt: skip
