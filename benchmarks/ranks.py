"""Measures the speed-up from a second process: harvest, training and analysis with one and two ranks, one thread each.

    python benchmarks/ranks.py RUN [--rounds 3] [--steps 40]

RUN is a finished run of the embedded pair. Alternates between one and two ranks; each stage is timed between barriers, without
imports and loading. Training uses batches of 2,048 and splits either the latents or the batch. Prints tokens/s at the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from crossdiff.activations.harvest import harvest
from crossdiff.activations.loader import Batches
from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig, CrosscoderConfig, RunConfig, validate
from crossdiff.corpus import resolve
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.mesh import mesh_of
from crossdiff.crosscoder.trainer import Trainer
from crossdiff.latents.analyze import measure, with_random_directions
from crossdiff.latents.groups import cells_of
from crossdiff.memory import keep_freed_memory
from crossdiff.models.pair import load_pair, load_tokenizer
from crossdiff.ranks import Ranks, current
from crossdiff.yaml_files import read_yaml

DOCUMENTS = 600
CPU = torch.device("cpu")


def timed(ranks: Ranks, work: Callable[[], None]) -> float:
    ranks.wait()
    started = time.perf_counter()
    work()
    ranks.wait()
    return time.perf_counter() - started


def train_steps(ranks: Ranks, store: Store, n_latents: int, latent_ranks: int | None, n_steps: int) -> tuple[float, int]:
    """Seconds and tokens of `n_steps` steps, after five steps that are not counted."""
    config = CrosscoderConfig(sparsity=BatchTopKConfig(k=50), n_latents=n_latents, batch_size=2048, warmup_steps=0)
    mesh, normalisation = mesh_of(ranks, latent_ranks, CPU), store.normalisation
    coder = new_crosscoder(n_latents, normalisation.mean.float(), normalisation.scale, config.sparsity, 1.0, seed=0)
    trainer, batches = Trainer(config, coder, 10_000, mesh), Batches(store, 2048, 0)

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            trainer.train_step(trainer.crosscoder.normalise(batches[step][mesh.data.part(2048)]))

    steps(0, 5)
    seconds = timed(ranks, lambda: steps(5, 5 + n_steps))
    batches.close()
    return seconds, n_steps * 2048


def stages(run: Path, folder: Path, n_steps: int, training_only: bool) -> dict[str, tuple[float, int]]:
    """Seconds and tokens of each stage. Must be called on every rank."""
    found = train(run, n_steps)
    return found if training_only else found | harvest_and_analysis(run, folder)


def train(run: Path, n_steps: int) -> dict[str, tuple[float, int]]:
    ranks, store, found = current(), Store(run / "activations"), {}
    for n_latents in (8192, 32768):
        steps = n_steps * 8192 // n_latents
        found[f"training of {n_latents:,} latents, split"] = train_steps(ranks, store, n_latents, None, steps)
    found["training of 8,192 latents, batch split"] = train_steps(ranks, store, 8192, 1, n_steps)
    return found


def harvest_and_analysis(run: Path, folder: Path) -> dict[str, tuple[float, int]]:
    ranks, settings = current(), validate(RunConfig, read_yaml(run / "config.yaml"), str(run))
    found = {}
    pair = load_pair(settings.base, settings.chat, CPU)
    datasets = tuple(resolve(d).model_copy(update={"max_documents": DOCUMENTS}) for d in settings.dataset)
    config = settings.harvest.model_copy(update={"shard_tokens": 16_384})
    layer = pair.check_layer(settings.layer)
    seconds = timed(ranks, lambda: void(harvest({layer: folder}, pair, datasets, config, ranks=ranks)))
    found["harvest"] = (seconds, Store(folder).n_tokens)
    store = Store(run / "activations")
    coder, analysis = load(run / "batchtopk"), AnalyzeConfig()
    cells, directions = cells_of(store, load_tokenizer(settings.chat)), with_random_directions(coder, 0)
    seconds = timed(ranks, lambda: void(measure(coder, store, cells, analysis, directions, ranks=ranks)))
    found["analysis"] = (seconds, store.n_tokens)
    return found


def void(result: object) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--training-only", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(1)
        keep_freed_memory()
        found = stages(args.run, args.child / "store", args.steps, args.training_only)
        if current().is_first:
            (args.child / "found.json").write_text(json.dumps(found))
        return
    results: dict[str, dict[int, list[float]]] = {}
    tokens = {}
    for _ in range(args.rounds):
        for n in (1, 2):
            with tempfile.TemporaryDirectory() as name:
                (Path(name) / "store").mkdir()
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", __file__]
                flags = ["--steps", str(args.steps), *(["--training-only"] if args.training_only else []), "--child", name]
                subprocess.run([*command, str(args.run), *flags], check=True)
                for stage, (seconds, n_tokens) in json.loads((Path(name) / "found.json").read_text()).items():
                    results.setdefault(stage, {1: [], 2: []})[n].append(seconds)
                    tokens[stage] = n_tokens
    print("| stage | 1 rank, tokens/s | 2 ranks, tokens/s | ratio |\n|---|---|---|---|")
    for stage, seconds in results.items():
        one, two = (statistics.median(seconds[n]) for n in (1, 2))
        print(f"| {stage} | {tokens[stage] / one:,.0f} | {tokens[stage] / two:,.0f} | {one / two:.2f}x |")


if __name__ == "__main__":
    main()
