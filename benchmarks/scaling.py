"""Fits the cost model of a training step on three sizes, checks it on three others, and projects it to larger ones.

    python benchmarks/scaling.py

Prints the measured and modelled step time of each size, the measured and modelled peak memory of a process that trains it, and
a projection to three training runs on an accelerator. The projection assumes that the accelerator reaches the same shares of
its data sheet as this machine does of its own measured peaks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from crossdiff.crosscoder.cost import Rates, Size, fit, time_step
from crossdiff.memory import keep_freed_memory

FITTED = (Size(1024, 8192, 16, 1024), Size(576, 4096, 200, 1024), Size(2304, 8192, 16, 128))
"""One size that is dominated by each kind of work."""
CHECKED = (Size(256, 4096, 32, 2048), Size(576, 8192, 50, 2048), Size(2304, 16384, 100, 512))
PROJECTED = {
    "Gemma-2-2B, F = 73,728, 100M tokens": (Size(2304, 73_728, 100, 2048), 100e6, 1, 1.01e9),
    "Llama-3.1-8B, F = 131,072, 1B tokens": (Size(4096, 131_072, 100, 4096), 1e9, 8, 3.49e9),
    "Llama-3.1-8B, F = 1M, 1B tokens": (Size(4096, 1_048_576, 100, 4096), 1e9, 32, 3.49e9),
}
"""Size, tokens, ranks, and parameters of one model's layers up to the middle one, without embeddings."""
ACCELERATOR = {"products": 989e12 / 2, "bytes": 3.35e12, "link": 450e9}
"""Data sheet of an H100 SXM, per second: multiply-adds in bfloat16, memory bytes, NVLink bytes in one direction."""


def peak_memory(size: Size) -> int:
    """Peak memory in bytes of a separate process, beyond its memory after the imports."""
    command = [sys.executable, __file__, "--memory", *map(str, (size.d_model, size.n_latents, size.active, size.batch))]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def peak_resident() -> int:
    """Peak resident memory in bytes. getrusage would include the process that started this one."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def product_peak() -> float:
    """Multiply-adds per second of a large float32 product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = min(_seconds(lambda: a @ b) for _ in range(8))
    return 2048**3 / best


def copy_peak() -> float:
    """Bytes read and written per second when a large tensor is copied."""
    a, b = torch.randn(1 << 26), torch.empty(1 << 26)
    return 2 * a.nbytes / min(_seconds(lambda: b.copy_(a)) for _ in range(5))


def _seconds(work: object) -> float:
    assert callable(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.memory:
        before = peak_resident()
        time_step(Size(*args.memory), torch.device("cpu"), steps=1)
        print(peak_resident() - before)
        return
    device = torch.device("cpu")
    timed = {size: time_step(size, device, steps=9) for size in (*FITTED, *CHECKED)}
    rates = fit([(size, timed[size]) for size in FITTED])
    products, copied = product_peak(), copy_peak()
    print(f"{torch.get_num_threads()} threads; peak {products / 1e9:.0f} G multiply-adds/s, copy {copied / 1e9:.1f} GB/s")
    print(f"fitted: dense {rates.dense / 1e9:.1f} G multiply-adds/s, pairs {rates.pairs / 1e9:.2f} G multiply-adds/s, "
          f"parameters {rates.parameters / 1e9:.2f} G/s\n")  # fmt: skip
    print("| size (d, F, k, batch) | | ms | model ms | error | MB | model MB |\n|---|---|---|---|---|---|---|")
    for size, seconds in timed.items():
        model, kind = rates.seconds(size), "fitted" if size in FITTED else "checked"
        print(f"| {size.d_model}, {size.n_latents:,}, {size.active}, {size.batch} | {kind} | {seconds * 1e3:.0f} | "
              f"{model * 1e3:.0f} | {model / seconds - 1:+.0%} | {peak_memory(size) / 1e6:.0f} | "
              f"{size.memory_bytes() / 1e6:.0f} |", flush=True)  # fmt: skip
    far = Rates(
        dense=ACCELERATOR["products"] * min(1.0, rates.dense / products),
        pairs=ACCELERATOR["bytes"] * rates.pairs / copied,
        parameters=ACCELERATOR["bytes"] * rates.parameters / copied,
    )
    print("\n| | ranks | harvest h | step ms | of which sending | training h | memory GB per rank | store TB (bf16) | int8 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (size, tokens, ranks, parameters) in PROJECTED.items():
        step, sent = far.seconds(size, ranks), size.traffic_bytes(ranks, 1) / ACCELERATOR["link"]
        store = tokens * size.columns
        forwards = size.n_sources * parameters * tokens / far.dense / ranks
        step += sent
        print(f"| {name} | {ranks} | {forwards / 3600:.1f} | {step * 1e3:.0f} | {sent * 1e3:.1f} | "
              f"{step * tokens / size.batch / 3600:.1f} | "
              f"{size.memory_bytes(ranks) / 1e9:.1f} | {2 * store / 1e12:.2f} | {store / 1e12:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
