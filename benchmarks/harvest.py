"""Measures the overhead of a harvest over the forward passes that it needs in any case.

    python benchmarks/harvest.py [--base NAME --chat NAME --layer L] [--dataset PATH ...] [--batch-tokens 1024 2048 4096]

Alternates, on the same batches, between the forward passes of both models up to the layer, with nothing stored, and the full
harvest from the texts to the manifest, into a temporary folder. Compare wall times on a quiet machine and CPU times on a busy
one. Also prints the share of padding, and the time of the forward passes when both models run at once, in one thread each with
half of the cores, instead of one after the other with all cores.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from crossdiff.activations.harvest import harvest
from crossdiff.activations.passes import right_padded
from crossdiff.activations.texts import Texts
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.models.access import residuals_after
from crossdiff.models.pair import Pair, choose_device, load_pair
from crossdiff.pairs import demo_path
from crossdiff.text.sequences import POOL, bucketed


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall time and of CPU time."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def forwards(model: nn.Module, batches: list[Tensor], layer: int) -> None:
    device = next(model.parameters()).device
    for ids in batches:
        residuals_after(model, ids.to(device), [layer])


def one_after_the_other(pair: Pair, batches: list[Tensor], layer: int) -> None:
    for model in pair.models:
        forwards(model, batches, layer)


def both_at_once(pair: Pair, batches: list[Tensor], layer: int) -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, n_threads // 2))
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(partial(forwards, batches=batches, layer=layer), pair.models))
    finally:
        torch.set_num_threads(n_threads)


def full_harvest(pair: Pair, datasets: tuple[DatasetConfig, ...], config: HarvestConfig, layer: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        harvest({layer: Path(folder)}, pair, datasets, config)


def compare(pair: Pair, layer: int, datasets: tuple[DatasetConfig, ...], config: HarvestConfig, rounds: int) -> None:
    sequences = Texts(datasets, pair.tokenizer, config, lambda: None).sequences()
    padded = [
        right_padded([sequence.token_ids for sequence in batch]) for batch in bucketed(sequences, config.batch_tokens, POOL)
    ]
    batches = [ids for ids, _ in padded]
    n_tokens = sum(ids.numel() if kept is None else len(kept) for ids, kept in padded)
    variants: dict[str, Callable[[], None]] = {
        "forwards": partial(one_after_the_other, pair, batches, layer),
        "harvest": partial(full_harvest, pair, datasets, config, layer),
        "forwards, both models at once": partial(both_at_once, pair, batches, layer),
    }
    forwards(pair.base, batches[:2], layer)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            times[name].append(measure(work))
    padding = 1 - n_tokens / sum(ids.numel() for ids in batches)
    print(f"batch_tokens {config.batch_tokens}: {n_tokens:,} tokens in {len(batches)} batches, {padding:.1%} padding")
    for name, found in times.items():
        pure = times["forwards"]
        ratios = [(wall / w, processor / p) for (wall, processor), (w, p) in zip(found, pure, strict=True)]
        wall, processor = (statistics.median(values) for values in zip(*found, strict=True))
        wall_ratio, processor_ratio = (statistics.median(values) for values in zip(*ratios, strict=True))
        print(
            f"  {name:30} {wall:7.2f} s wall (x {wall_ratio:.2f}) {processor:7.2f} s CPU (x {processor_ratio:.2f}) "
            f"{n_tokens / wall:8,.0f} tokens/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo:base")
    parser.add_argument("--chat", default="demo:chat")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--dataset", nargs="+", default=["demo:plain", "demo:chat_train"])
    parser.add_argument("--documents", type=int, default=100, help="number of documents of each dataset")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    paths = [str(demo_path(path)) if path.startswith("demo:") else path for path in args.dataset]
    datasets = tuple(DatasetConfig(path=path, max_documents=args.documents) for path in paths)
    pair = load_pair(args.base, args.chat, choose_device("auto"))
    for batch_tokens in args.batch_tokens:
        compare(pair, args.layer, datasets, HarvestConfig(batch_tokens=batch_tokens, dtype=args.dtype), args.rounds)


if __name__ == "__main__":
    main()
