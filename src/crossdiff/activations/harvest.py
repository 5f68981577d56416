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

from crossdiff.activations.counted import Counted
from crossdiff.activations.folder import MANIFEST, Folder
from crossdiff.activations.live import sampled_moments
from crossdiff.activations.passes import NotFiniteError, paired_residuals
from crossdiff.activations.shards import ProgressLog, ShardEntry, ShardWriters, log_names, shard_name
from crossdiff.activations.store import COLUMNS, FORMAT, Store
from crossdiff.activations.texts import Texts
from crossdiff.activations.writer import Origin, finish_store, summed_moments
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Tensor
from crossdiff.sources import SOURCES
from crossdiff.text.chat import Flag
from crossdiff.text.documents import check_datasets
from crossdiff.text.sequences import POOL, TokenSequence, bucketed

MEDIAN_TOKENS = 8192
"""Number of tokens of the first shard that the median norm is taken from."""


def _token_columns(batch: Sequence[TokenSequence], first_sequence: int) -> dict[str, Tensor]:
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
    n_shards, rules = _write_shards(logs, pair, texts, config, ranks)
    if not one_sided:
        texts.check_sides()  # the shards stay, so a repetition with one_sided finishes at once
    ranks.wait()
    for layer, log in logs.items() if ranks.is_first else ():
        names = tuple(record.name for record in texts.records)
        entries = log.entries()
        massive = _massive(log.folder, entries, rules[layer], pair.tokenizer) | {"multiple": config.max_norm_multiple or 0.0}
        origin = Origin(pair.identity, layer, pair.n_layers, names, texts.report(), pair.revisions, pair.dtype, massive)
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
    dtype = None if config.storage == "live" else config.dtype
    writers = ShardWriters(list(logs.values()), config.shard_tokens + config.batch_tokens, len(SOURCES), pair.d_model, dtype)
    number, n_before, since = -1, 0, time.time()
    rules = {layer: Counted(config.leave_out) for layer in logs}
    try:
        for number, batches in enumerate(_shards(texts.sequences(), config)):
            n_sequences = sum(map(len, batches))
            if number == 0 and config.max_norm_multiple is not None and config.storage != "live":
                rules = _rules(batches, pair, config.leave_out, config.max_norm_multiple, list(logs))
            if ranks.has(number) and shard_name(number) in done:
                _check_stored(logs.values(), number, batches, n_before)
            elif ranks.has(number):
                first = n_before
                for batch in batches:
                    _add(writers, batch, first, pair, rules, texts.in_statistics, config)
                    first += len(batch)
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
    norms: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    n_tokens = 0
    for batch in batches:
        kept = torch.from_numpy(np.concatenate([np.arange(len(sequence.token_ids)) for sequence in batch]) >= leave_out)
        for layer, streams in zip(layers, _streams(pair, batch, layers), strict=True):
            norms[layer].append(torch.stack([torch.linalg.vector_norm(stream, dim=1).cpu()[kept] for stream in streams]))
        n_tokens += int(kept.sum())
        if n_tokens >= MEDIAN_TOKENS:
            break
    if not n_tokens:
        return {layer: Counted(leave_out) for layer in layers}
    medians = {layer: torch.cat(found, dim=1).median(dim=1).values for layer, found in norms.items()}
    return {layer: Counted(leave_out, tuple((multiple * median).tolist())) for layer, median in medians.items()}


def _check_stored(logs: Iterable[ProgressLog], number: int, batches: list[list[TokenSequence]], first: int) -> None:
    """Check that the texts give the tokens that a finished shard holds; `first` is the number of its first sequence.

    Raises:
        UserError: they do not, because the texts or the tokenizer's rules changed in between.
    """
    firsts = np.cumsum([first, *map(len, batches)])
    parts = [_token_columns(batch, int(start)) for batch, start in zip(batches, firsts, strict=False)]
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


def _add(
    writers: ShardWriters,
    batch: list[TokenSequence],
    first_sequence: int,
    pair: Pair,
    rules: Mapping[int, Counted],
    in_statistics: Sequence[bool],
    config: HarvestConfig,
) -> None:
    """Run the models over a batch and append the activations to the layers' buffers. The moments are over the training tokens
    that count."""
    columns = _token_columns(batch, first_sequence)
    lengths = [len(sequence.token_ids) for sequence in batch]
    in_counted_document = torch.from_numpy(np.repeat([in_statistics[sequence.document] for sequence in batch], lengths))
    computed: list[list[Tensor]] = [[] for _ in rules]
    if config.storage != "live":
        computed = _streams(pair, batch, list(rules))
    for buffer, streams, rule in zip(writers.buffers, computed, rules.values(), strict=True):
        flags, counted = columns["flags"], in_counted_document & (columns["position"] >= rule.leave_out)
        if streams:
            ordinary = rule.ordinary(streams).cpu()
            flags, counted = flags.where(ordinary, flags | Flag.MASSIVE), counted & ordinary
        try:
            buffer.add(streams, columns | {"flags": flags}, counted.nonzero().squeeze(1))
        except UserError as error:
            numbers = [sequence.document for sequence in batch]
            raise UserError(f"{error} (in documents {min(numbers)} to {max(numbers)})") from error


def _streams(pair: Pair, batch: list[TokenSequence], layers: list[int]) -> list[list[Tensor]]:
    """`paired_residuals` of a batch; an error names the document."""
    try:
        return paired_residuals(pair, [sequence.token_ids for sequence in batch], layers)
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
