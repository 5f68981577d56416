"""Times a training step on two, three and four models, alternating in one process: what a longer chain costs.

    python benchmarks/chain.py [--rounds 9] [--cpu-time]

Prints the median of each and its ratio to two models. `--cpu-time` compares CPU times, for a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from crossdiff.config import BatchTopKConfig, CrosscoderConfig
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.trainer import Trainer
from crossdiff.crosscoder.view import identity
from crossdiff.memory import keep_freed_memory

SIZES = {"d_model 256, 4,096 latents": (256, 4096, 32), "d_model 576, 8,192 latents": (576, 8192, 50)}
CHAINS, BATCH, WARMUP = (2, 3, 4), 2048, 3


def trainer_of(n_sources: int, d_model: int, n_latents: int, k: int) -> Trainer:
    sparsity, sources = BatchTopKConfig(k=k), tuple(f"model{number}" for number in range(n_sources))
    coder = new_crosscoder(n_latents, torch.zeros(n_sources, d_model), 1.0, sparsity, 1.0, seed=0, view=identity(sources))
    return Trainer(CrosscoderConfig(sparsity=sparsity, n_latents=n_latents, batch_size=BATCH, lr=1e-5), coder, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    keep_freed_memory()
    for name, (d_model, n_latents, k) in SIZES.items():
        generator = torch.Generator().manual_seed(1)
        trainers = {n: trainer_of(n, d_model, n_latents, k) for n in CHAINS}
        inputs = {n: torch.randn(BATCH, n, d_model, generator=generator) for n in CHAINS}
        times: dict[int, list[float]] = {n: [] for n in CHAINS}
        for number in range(WARMUP + args.rounds):
            for n, trainer in trainers.items():
                started = clock()
                trainer.train_step(inputs[n])
                if number >= WARMUP:
                    times[n].append(clock() - started)
        print(name)
        for n, found in times.items():
            ratio = statistics.median(mine / two for mine, two in zip(found, times[2], strict=True))
            print(f"  {n} models: {1e3 * statistics.median(found):6.0f} ms per step, {ratio:.2f} times two models")


if __name__ == "__main__":
    main()
