"""Measures the loader on a store larger than its memory: peak resident memory, rows/s, and its share of a training step.

    python benchmarks/loader.py [--gigabytes 10] [--steps 200] [--folder DIR]

Builds the store in a temporary folder (random float16 activations of two sources), then reads batches as fast as possible
without training, and trains a BatchTopK crosscoder on them, each in its own process. Resident memory is as the system reports
it: `anonymous` is the process's own memory, `of files` counts pages of mapped files. The page cache of the files that were read
comes on top. Its size is printed too; the system frees it when memory runs short.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import polars as pl
import torch
from safetensors.torch import save_file

from crossdiff.activations.loader import Batches
from crossdiff.activations.shards import ShardBuffer
from crossdiff.activations.store import COLUMNS, FORMAT, Store
from crossdiff.config import BatchTopKConfig, CrosscoderConfig
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.trainer import Trainer
from crossdiff.files import write_json
from crossdiff.memory import keep_freed_memory

D_MODEL, N_LATENTS, BATCH, LENGTH, SHARD = 576, 8192, 2048, 256, 65536
TRAINED = 170  # more than three buffers, so that it includes the change from one to the next


def make(folder: Path, gigabytes: float) -> None:
    """Write a store of sequences of `LENGTH` tokens, one training document each, with the same numbers in every shard."""
    row_bytes = 2 * D_MODEL * 2
    n_shards = max(1, round(gigabytes * 1e9 / row_bytes / SHARD))
    buffer, number = ShardBuffer(SHARD, 2, D_MODEL, torch.float16), torch.arange(SHARD)
    streams = [torch.randn(SHARD, D_MODEL, generator=torch.Generator().manual_seed(source)) for source in range(2)]
    mean = torch.stack([stream.double().mean(0) for stream in streams])
    gram = torch.tensor([[float((a.double() * b).sum(1).mean()) for a in streams] for b in streams], dtype=torch.float64)
    shards, per_shard = [], SHARD // LENGTH
    for index in range(n_shards):
        columns = {name: torch.zeros(SHARD, dtype=dtype) for name, dtype in COLUMNS.items()}
        columns["document"] = columns["sequence"] = (number // LENGTH + index * per_shard).int()
        columns["position"] = (number % LENGTH).int()
        buffer.add(columns, [{"activations": stream.half()} for stream in streams])
        path = folder / f"shard-{index:05d}.safetensors"
        size, digest = buffer.write(path)
        shards.append({"file": path.name, "n_tokens": SHARD, "bytes": size, "sha256": digest})
    save_file({"mean": mean, "gram": gram}, folder / "statistics.safetensors")
    n_documents = n_shards * per_shard
    pl.DataFrame({
        "document": range(n_documents), "dataset": ["random"] * n_documents, "split": ["train"] * n_documents,
    }).write_parquet(folder / "documents.parquet")  # fmt: skip
    write_json(folder / "manifest.json", {
        "format": FORMAT, "pair": {}, "sources": ["base", "chat"], "layer": 0, "d_model": D_MODEL, "dtype": "float16",
        "max_length": LENGTH, "leave_out": 1, "datasets": ["random"], "n_tokens": n_shards * SHARD, "shards": shards,
    })  # fmt: skip


def status() -> dict[str, float]:
    """Memory of this process in megabytes, by kind, as the system reports it."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) / 1e3 for words in lines if words[0] in {"VmHWM:", "RssAnon:", "RssFile:"}}


class Peaks:
    """Records the largest values of `status` while a block runs, checking every 20 ms."""

    def __enter__(self) -> Peaks:
        self.values, self._ended = status(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.values = {key: max(value, self.values[key]) for key, value in status().items()}

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._watcher.join()


def read_alone(store: Store, steps: int) -> dict[str, float]:
    """Measure rows/s without training."""
    batches = Batches(store, BATCH, seed=0)
    _ = batches[0]
    started = time.perf_counter()
    for step in range(1, steps):
        _ = batches[step]
    return {"rows/s": BATCH * (steps - 1) / (time.perf_counter() - started)}


def train(store: Store, steps: int) -> dict[str, float]:
    """Measure the share of a training step that waits for its batch."""
    batches, normalisation = Batches(store, BATCH, seed=0), store.normalisation
    coder = new_crosscoder(N_LATENTS, normalisation.mean, normalisation.scale, BatchTopKConfig(k=50), 1.0, seed=0)
    config = CrosscoderConfig(sparsity=coder.sparsity, n_latents=N_LATENTS, batch_size=BATCH)
    trainer, waited = Trainer(config, coder, 10_000), 0.0
    trainer.train_step(coder.normalise(batches[0]))
    started = time.perf_counter()
    for step in range(1, steps):
        asked = time.perf_counter()
        h = batches[step]
        waited += time.perf_counter() - asked
        trainer.train_step(coder.normalise(h))
    taken = time.perf_counter() - started
    return {"rows/s": BATCH * (steps - 1) / taken, "share": waited / taken, "step": 1e3 * taken / (steps - 1)}


WORK = {"reading alone": read_alone, "training": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=None, help="number of batches [a full epoch without training, 170 with]")
    parser.add_argument(
        "--folder", type=Path, help="folder in which the store is built and deleted again [the system's temporary folder]"
    )
    parser.add_argument("--inside", nargs=2, metavar=("WORK", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.inside:
        name, store = args.inside[0], Store(Path(args.inside[1]))
        steps = args.steps or (store.n_tokens * (LENGTH - 1) // LENGTH // BATCH if name == "reading alone" else TRAINED)
        with Peaks() as peaks:
            numbers = WORK[name](store, steps)
        print(json.dumps({"steps": steps, **numbers, **peaks.values}))
        return
    with tempfile.TemporaryDirectory(prefix="crossdiff-loader-", dir=args.folder) as name:
        folder, needed = Path(name), 1.05 * args.gigabytes * 1e9
        if (free := shutil.disk_usage(folder).free) < 2 * needed:
            sys.exit(
                f"{folder} has {free / 1e9:.1f} GB left; {2 * needed / 1e9:.1f} GB are needed, so that half of it stays free"
            )
        make(folder, args.gigabytes)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"store of {size / 1e9:.2f} GB, {torch.get_num_threads()} threads\n")
        print("| | batches | peak MB resident | anonymous | of files | rows/s | step ms | share waiting for the batch |")
        print("|---|---|---|---|---|---|---|---|")
        for work in WORK:
            steps = [] if args.steps is None else ["--steps", str(args.steps)]
            command = [sys.executable, __file__, "--inside", work, name, *steps]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            step = f"{row['step']:.0f} | {row['share']:.1%}" if "share" in row else "- | -"
            sizes = f"{row['VmHWM']:.0f} | {row['RssAnon']:.0f} | {row['RssFile']:.0f}"
            print(f"| {work} | {row['steps']} | {sizes} | {row['rows/s']:,.0f} | {step} |", flush=True)
        cached = [line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Cached:")]
        print(f"\npage cache of the whole system afterwards: {int(cached[0]) / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
