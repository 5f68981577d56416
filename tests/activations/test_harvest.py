"""Harvests store the models' residuals, resume after a kill, and report bad activations."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import crossdiff.activations.harvest as module
from crossdiff.activations.harvest import harvest
from crossdiff.activations.live import open_store
from crossdiff.activations.passes import paired_residuals, right_padded
from crossdiff.activations.store import Store, verify
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.files import sha256
from crossdiff.models.access import residuals_after
from crossdiff.models.pair import Pair, load_pair
from crossdiff.text.sequences import TokenSequence

SETTINGS = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=700, dtype="float32")


class Killed(Exception):
    """Stops a harvest in the middle."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pair: Pair, datasets: tuple[DatasetConfig, ...]) -> Store:
    folder = tmp_path_factory.mktemp("store")
    (remark,) = harvest({1: folder}, pair, datasets, SETTINGS)
    assert remark.startswith("40.1% of the assistant's tokens of chat are beyond harvest.max_length 32 and left out; raise it")
    return Store(folder)


def shards(folder: Path) -> dict[str, bytes]:
    """Content of every file of a store except the manifest, which contains times."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}


def test_stored_residuals_are_those_of_each_model_on_the_same_ids(store: Store, pair: Pair) -> None:
    bounds, ids = store.sequences(), store.column("token_id")
    for number in (0, 7, len(bounds) - 2):
        rows = np.arange(bounds[number], bounds[number + 1])
        alone = torch.from_numpy(ids[rows].astype(np.int64)).unsqueeze(0)
        for source, model in enumerate(pair.models):
            (expected,) = residuals_after(model, alone, [1])
            torch.testing.assert_close(store.gather(rows)[:, source], expected[0], rtol=0, atol=1e-5)


def test_right_padding() -> None:
    def sequence(*ids: int) -> np.ndarray:
        return np.array(ids, dtype=np.int32)

    ids, held = right_padded([sequence(7, 8, 9), sequence(5)])
    assert ids.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert held is not None
    assert held.tolist() == [0, 1, 2, 3]
    ids, held = right_padded([sequence(7, 8), sequence(5, 6)])
    assert ids.tolist() == [[7, 8], [5, 6]]
    assert held is None


def test_the_base_model_reads_the_stand_ins(tiny_pair: tuple[Path, Path], pair: Pair) -> None:
    mapped = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"), {"<|user|>": "<|end|>"})
    user, end = mapped.tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    batch = [np.array([1, user, 70, 80], dtype=np.int32)]
    ((base, chat),) = paired_residuals(mapped, batch, [1])
    (expected,) = residuals_after(pair.base, torch.tensor([[1, end, 70, 80]]), [1])
    assert torch.equal(base, expected[0])
    (expected,) = residuals_after(pair.chat, torch.tensor([[1, user, 70, 80]]), [1])
    assert torch.equal(chat, expected[0])


def test_layers_of_one_pass_are_the_stores_of_a_pass_each(
    tmp_path: Path, store: Store, pair: Pair, datasets: tuple[DatasetConfig, ...]
) -> None:
    folders = {layer: tmp_path / str(layer) for layer in (2, 1)}
    for folder in folders.values():
        folder.mkdir()
    harvest(folders, pair, datasets, SETTINGS)
    assert shards(folders[1]) == shards(store.folder)
    other = Store(folders[2])
    assert other.layer == 2
    assert np.array_equal(other.column("token_id"), store.column("token_id"))
    ids = torch.from_numpy(other.column("token_id")[: other.sequences()[1]].astype(np.int64)).unsqueeze(0)
    (expected,) = residuals_after(pair.chat, ids, [2])
    torch.testing.assert_close(other.gather(np.arange(ids.shape[1]))[:, 1], expected[0], rtol=0, atol=1e-5)


def test_a_batch_in_flight_changes_nothing(
    tmp_path: Path, store: Store, pair: Pair, datasets: tuple[DatasetConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_asynchronous", lambda device: True)
    harvest({1: tmp_path}, pair, datasets, SETTINGS)
    assert shards(tmp_path) == shards(store.folder)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_narrow_dtypes_are_close_to_float32(
    tmp_path: Path, store: Store, pair: Pair, datasets: tuple[DatasetConfig, ...], dtype: str, tolerance: float
) -> None:
    """The error is relative to the value for floats, and to the largest value of the token and source for int8."""
    harvest({1: tmp_path}, pair, datasets, SETTINGS.model_copy(update={"dtype": dtype}))
    narrow, rows = Store(tmp_path), np.arange(store.n_tokens)
    assert verify(tmp_path) == []
    exact = store.gather(rows)
    largest = exact.abs().amax(2, keepdim=True) if dtype == "int8" else exact.abs()
    error = (narrow.gather(rows) - exact).abs()
    assert bool((error <= tolerance * 1.001 * largest + 1e-7).all())
    assert float(error.max()) > 0
    # The statistics are those of the activations, not of what is stored.
    assert torch.equal(narrow.normalisation.mean, store.normalisation.mean)
    some = np.array([5, 3000, 1, 3000])
    assert torch.equal(narrow.gather(some), narrow.gather(rows)[torch.from_numpy(some)])


def test_every_document_is_there_once_and_the_counts_agree(store: Store) -> None:
    documents = store.documents
    assert documents.height == 150  # 60 plain, 90 conversations
    assert verify(store.folder) == []
    counts = np.bincount(store.column("document"), minlength=150)
    assert counts.tolist() == documents["n_tokens"].to_list()
    assert int(counts.sum()) == store.n_tokens
    positions, bounds = store.column("position"), store.sequences()
    for first, last in itertools.pairwise(bounds):
        assert positions[first:last].tolist() == list(range(last - first))
    assert set(documents["label"].unique()) == {None, "greeting", "question", "order"}


def test_statistics_are_over_counted_training_tokens(store: Store) -> None:
    h = store.gather(store.rows("train")).double()
    found = store.normalisation
    assert float((found.mean - h.mean(0)).norm() / h.mean(0).norm()) < 1e-6
    torch.testing.assert_close(found.gram, torch.einsum("nsd,ntd->st", h, h) / len(h), rtol=1e-6, atol=0)
    x = (h - h.mean(0)) * found.scale
    assert float(x.square().sum(2).mean()) == pytest.approx(16, rel=1e-6)
    assert store.manifest["n_statistics_tokens"] == len(h)


def test_padding_is_below_five_percent(store: Store, pair: Pair, datasets: tuple[DatasetConfig, ...]) -> None:
    lengths = np.random.default_rng(0).integers(5, 256, size=4000).tolist()
    none = np.empty(0, dtype=np.int8)
    sequences = (TokenSequence(0, np.zeros(length, dtype=np.int32), none.astype(np.uint8), none, none, 0) for length in lengths)
    batches = list(module.bucketed(sequences, 8192, module.POOL))
    padded = sum(len(batch) * max(len(sequence.token_ids) for sequence in batch) for batch in batches)
    assert sum(lengths) / padded > 0.95


@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_a_stopped_harvest_resumes_to_the_same_store(
    tmp_path: Path, store: Store, pair: Pair, datasets: tuple[DatasetConfig, ...], layers: list[int]
) -> None:
    original, calls = module.ForwardPass, 0

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise Killed
        return original(*arguments)  # type: ignore[arg-type]

    folders = {layer: tmp_path / str(layer) for layer in layers}
    for folder in folders.values():
        folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ForwardPass", counted)
        with pytest.raises(Killed):
            harvest(folders, pair, datasets, SETTINGS)
    assert not (folders[1] / "manifest.json").exists()
    n_whole = len(list(folders[1].glob("*.safetensors")))
    assert n_whole >= 2
    with pytest.raises(UserError, match="has an unfinished harvest with other settings"):
        harvest(folders, pair, datasets, SETTINGS.model_copy(update={"leave_out": 2}))
    if len(layers) == 2:  # as if killed between the two layers' shards
        log = folders[2] / "progress-0.jsonl"
        *whole, _ = log.read_text().splitlines(keepends=True)
        log.write_text("".join(whole) + '{"file": "shard-00')
    calls = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ForwardPass", counted)
        harvest(folders, pair, datasets, SETTINGS)
    assert shards(folders[1]) == shards(store.folder)
    assert Store(folders[1]).manifest["shards"] == store.manifest["shards"]
    computed, n_batches = calls + 100, len(list(module.bucketed(_all(pair, datasets), SETTINGS.batch_tokens, module.POOL)))
    n_first = len(next(module._shards(_all(pair, datasets), SETTINGS)))  # run once more for the median norm
    assert computed < n_batches + n_first - 4, "finished shards are not computed again"


def _all(pair: Pair, datasets: tuple[DatasetConfig, ...]) -> Iterator[TokenSequence]:
    return module.Texts(datasets, pair.tokenizer, SETTINGS, lambda: None).sequences()


KILL = """
import os, signal, sys, torch
from pathlib import Path
import crossdiff.activations.shards as shards
from crossdiff.activations.harvest import harvest
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.models.pair import load_pair

base, chat, plain, chats, folder = sys.argv[1:]
write, written = shards._write_all, 0

def dying(descriptor, block):
    global written
    written += 1
    if written == 40:  # a shard has about 16 blocks, so this is among the activations of the third
        write(descriptor, block[: len(block) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(descriptor, block)

shards._write_all, shards.BLOCK = dying, 25_000
datasets = DatasetConfig(path=plain, heldout_share=0.3), DatasetConfig(path=chats, label_column="kind", heldout_share=0.3)
settings = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=700, dtype="float32")
harvest({1: Path(folder)}, load_pair(base, chat, torch.device("cpu")), datasets, settings)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_shard(
    tmp_path: Path,
    store: Store,
    pair: Pair,
    datasets: tuple[DatasetConfig, ...],
    tiny_pair: tuple[Path, Path],
    tiny_texts: tuple[Path, Path],
) -> None:
    result = subprocess.run([sys.executable, "-c", KILL, *map(str, (*tiny_pair, *tiny_texts, tmp_path))], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert list(tmp_path.glob("*.partial")), "it was killed while it wrote"
    harvest({1: tmp_path}, pair, datasets, SETTINGS)
    assert shards(tmp_path) == shards(store.folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB, if the system allows one to be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_the_harvest_and_room_lets_it_resume(
    small_disk: Path, store: Store, pair: Pair, datasets: tuple[DatasetConfig, ...]
) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        harvest({1: small_disk}, pair, datasets, SETTINGS)
    assert list(small_disk.glob("shard-*.safetensors"))
    assert not (small_disk / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    harvest({1: small_disk}, pair, datasets, SETTINGS)
    assert shards(small_disk) == shards(store.folder)


def test_damaged_records_are_omitted_counted_and_reported(
    tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path], store: Store
) -> None:
    lines = tiny_texts[0].read_bytes().splitlines(keepends=True)
    damaged = tmp_path / "plain.jsonl"
    damaged.write_bytes(
        b"".join([*lines[:3], b'{"text": "cut o\n', *lines[3:40], b'{"text": "\xff"}\n', *lines[40:], b"[1]\n"])
    )
    folder = tmp_path / "store"
    folder.mkdir()
    remarks = harvest({1: folder}, pair, (DatasetConfig(path=str(damaged), max_documents=99, heldout_share=0.3),), SETTINGS)
    assert remarks[0] == "plain is shorter than requested: 63 of max_documents 99"
    assert remarks[1].startswith("3 damaged records of plain were omitted; the first: ")
    assert "record 4 (line 4): not valid JSON" in remarks[1]
    found = Store(folder)
    (record,) = found.manifest["texts"]
    assert (record["n_documents"], record["damaged"], len(record["reasons"])) == (60, 3, 3)
    assert "not UTF-8" in record["reasons"][1]
    assert json.loads((folder / "manifest.json").read_text())["n_documents"] == 60
    assert found.documents["n_tokens"].to_list() == store.documents["n_tokens"].to_list()[:60]


def test_values_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_pair: tuple[Path, Path], datasets: tuple[DatasetConfig, ...]
) -> None:
    pair = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))
    pair.chat.get_input_embeddings().weight.mul_(1e9)  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match=r"do not fit torch\.float16; set harvest.dtype to bfloat16"):
        harvest({1: tmp_path}, pair, datasets, SETTINGS.model_copy(update={"dtype": "float16"}))


@pytest.mark.parametrize("storage", ["blocks", "live"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_nan_is_traced_to_model_token_and_document(
    tmp_path: Path, tiny_pair: tuple[Path, Path], storage: str, dtype: str
) -> None:
    pair = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))
    texts = ("a boat", "the sea", "a @ sign", "land")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    datasets = (DatasetConfig(path=str(tmp_path / "texts.jsonl"), heldout_share=0),)
    settings = SETTINGS.model_copy(update={"storage": storage, "dtype": dtype})
    token = pair.tokenizer.convert_tokens_to_ids("@")
    for name in ("embedding", "layer"):
        (tmp_path / name).mkdir()
    pair.chat.get_input_embeddings().weight[token] = torch.nan  # type: ignore[operator, union-attr]
    expected = r"the chat model \(.*chat\) gives NaN or infinite activations: its embedding of the token '@' is not finite.*"
    with pytest.raises(UserError, match=expected + r"\(document 2, counted from 0 over all datasets\)"):
        harvest({1: tmp_path / "embedding"}, pair, datasets, settings)
    pair = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))
    pair.base.model.layers[0].mlp.up_proj.weight[0] = torch.inf  # type: ignore[index, union-attr]
    with pytest.raises(
        UserError, match=r"the base model .*: set model_dtype to float32 if they overflow, .* \(document [0-3], "
    ):
        harvest({1: tmp_path / "layer"}, pair, datasets, settings)


@pytest.mark.parametrize("storage", ["blocks", "live"])
def test_without_training_documents_the_statistics_are_over_all_tokens(
    storage: str, tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path]
) -> None:
    datasets = (DatasetConfig(path=str(tiny_texts[0]), heldout_share=1.0),)
    harvest({1: tmp_path}, pair, datasets, SETTINGS.model_copy(update={"storage": storage}))
    store = open_store(tmp_path, lambda: pair)
    h = store.gather(store.rows("heldout")).double()
    assert store.manifest["n_statistics_tokens"] == len(h) > 100
    torch.testing.assert_close(store.normalisation.mean, h.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(store.normalisation.gram, torch.einsum("bsd,btd->st", h, h) / len(h), rtol=1e-3, atol=1e-3)


def test_texts_that_are_all_held_out_by_chance_are_refused(tmp_path: Path, pair: Pair) -> None:
    """The share asks for training text, so the statistics must not be those of the held-out text."""
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a single document"}) + "\n")
    datasets = (DatasetConfig(path=str(tmp_path / "texts.jsonl"), heldout_share=0.9999),)
    with pytest.raises(UserError, match="no training tokens: every document is held out"):
        harvest({1: tmp_path}, pair, datasets, SETTINGS)


def test_a_harvest_does_not_resume_with_other_tokens(
    tmp_path: Path, tiny_pair: tuple[Path, Path], datasets: tuple[DatasetConfig, ...]
) -> None:
    """As if a dataset on the Hub, or what the chat template depends on, had changed since the harvest was stopped."""
    pair = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))
    stop_after(tmp_path, pair, datasets, n_shards=6)
    before = shards(tmp_path)
    template = pair.tokenizer.chat_template
    pair.tokenizer.chat_template = template.replace("<|bos|>", "").replace("{{ bos_token }}", "{{ bos_token }}<|pad|>")
    with pytest.raises(UserError, match=r"shard-0000\d\.safetensors holds \d+ tokens of an earlier start .* `crossdiff clean"):
        harvest({1: tmp_path}, pair, datasets, SETTINGS)
    assert {name: content for name, content in shards(tmp_path).items() if name in before} == before
    pair.tokenizer.chat_template = template
    harvest({1: tmp_path}, pair, datasets, SETTINGS)
    assert verify(tmp_path) == []


def stop_after(folder: Path, pair: Pair, datasets: tuple[DatasetConfig, ...], n_shards: int) -> None:
    """Harvest until this many shards are written."""
    write = module.ShardWriters.flush

    def flush(self: module.ShardWriters, number: int, sequences: int, seconds: float) -> None:
        write(self, number, sequences, seconds)
        if number == n_shards - 1:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.ShardWriters, "flush", flush)
        with pytest.raises(Killed):
            harvest({1: folder}, pair, datasets, SETTINGS)


def test_a_stopped_mix_resumes_to_the_same_store(tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path]) -> None:
    mixed = tuple(DatasetConfig(path=str(path), weight=weight) for path, weight in zip(tiny_texts, (1, 2), strict=True))
    for folder in (whole := tmp_path / "whole", stopped := tmp_path / "stopped"):
        folder.mkdir()
    remarks = harvest({1: whole}, pair, mixed, SETTINGS)
    assert any("the mix ended with the end of" in remark for remark in remarks)
    stop_after(stopped, pair, mixed, n_shards=2)
    harvest({1: stopped}, pair, mixed, SETTINGS)
    assert shards(stopped) == shards(whole)
    assert verify(whole) == []
    tokens = Store(whole).documents.group_by("dataset").agg(pl.col("n_tokens").sum()).sort("dataset")["n_tokens"].to_list()
    assert tokens[0] / tokens[1] == pytest.approx(2, rel=0.05)  # chat and plain


def test_conversations_of_one_side_need_consent(tmp_path: Path, pair: Pair) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' * 40)
    prompts, folder = (DatasetConfig(path=str(path), heldout_share=0),), tmp_path / "store"
    folder.mkdir()
    with pytest.raises(UserError, match="40 conversations were read, and none of their tokens is the assistant's"):
        harvest({1: folder}, pair, prompts, SETTINGS)
    assert not (folder / "manifest.json").exists()
    harvest({1: folder}, pair, prompts, SETTINGS, one_sided=True)
    assert Store(folder).manifest["texts"][0]["n_assistant"] == 0


def test_verify_finds_documents_that_are_not_in_the_shards(tmp_path: Path, store: Store) -> None:
    """Every file is intact, but the table of documents does not describe the shards."""
    assert verify(store.folder) == []
    table = store.documents
    more = table["n_tokens"].to_list()
    more[3] += 1
    explained = pl.Series(["why"] + [None] * (table.height - 1), dtype=pl.String)
    for changed, problem in (
        (
            table.with_columns(n_tokens=pl.Series(more, dtype=pl.Int32)),
            f"document 3: {more[3] - 1} tokens in the shards, {more[3]}",
        ),
        (table.with_columns(left_out=explained), "document 0: "),
        (table.head(-1), "the documents are not numbered from 0 to 149"),
        (table.with_columns(document=table["document"] + 1), "the documents are not numbered"),
    ):
        shutil.copytree(store.folder, tmp_path, dirs_exist_ok=True)
        changed.write_parquet(tmp_path / "documents.parquet")
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        manifest["files"]["documents.parquet"] = sha256(tmp_path / "documents.parquet")
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        (found,) = verify(tmp_path)
        assert problem in found


def test_two_datasets_of_one_name_are_refused(tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path]) -> None:
    twice = (DatasetConfig(path=str(tiny_texts[0])), DatasetConfig(path=str(tiny_texts[0])))
    with pytest.raises(UserError, match="two datasets are called 'plain'"):
        harvest({1: tmp_path}, pair, twice, SETTINGS)


def test_passes_in_two_threads_do_not_catch_each_other(pair: Pair) -> None:
    batches = [[np.arange(1, 2 + n, dtype=np.int32)] for n in range(40)]
    expected = [paired_residuals(pair, batch, [0])[0] for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: paired_residuals(pair, batch, [0])[0], batches))
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
