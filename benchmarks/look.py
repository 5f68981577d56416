"""Measures the first look against the forward passes of both models that it cannot avoid.

    python benchmarks/look.py [--tokens 20000] [--rounds 3]

Processor time, both sides alternating in one process on the embedded pair: every batch once through both models with their
logits, and the whole look with its tables. Prints the median ratio, and where the rest goes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from crossdiff.activations.passes import right_padded
from crossdiff.activations.texts import Texts
from crossdiff.config import DatasetConfig, RunConfig, merge, validate
from crossdiff.corpus import resolve
from crossdiff.look.look import Look, sampled
from crossdiff.models.pair import Pair, load_pair
from crossdiff.pairs import CONFIG
from crossdiff.text.sequences import POOL, bucketed
from crossdiff.yaml_files import read_yaml


def forwards(pair: Pair, datasets: tuple[DatasetConfig, ...], config: RunConfig) -> None:
    """Both models on every batch of the sample."""
    texts = Texts(sampled(datasets, config.look.max_tokens), pair.tokenizer, config.harvest, lambda: None)
    for batch in bucketed(texts.sequences(), config.look.batch_tokens, POOL):
        ids, _ = right_padded([sequence.token_ids for sequence in batch])
        with torch.no_grad():
            for model in pair.models:
                model(input_ids=ids, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    look = {"max_tokens": args.tokens, "depth_tokens": max(100, args.tokens // 50)}
    config = validate(RunConfig, merge(read_yaml(CONFIG), {"look": look}), "the embedded pair's settings")
    datasets = tuple(resolve(dataset) for dataset in config.dataset)
    pair = load_pair(config.base, config.chat, torch.device("cpu"))
    ratios = []
    for _ in range(args.rounds):
        started = time.process_time()
        forwards(pair, datasets, config)
        middle = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = Look(pair, pair.check_layer(config.layer), datasets, config.look, config.harvest)
            parts = found.read(Path(folder))
            read = time.process_time()
            found.write(parts, Path(folder))
        ended = time.process_time()
        ratios.append((ended - middle) / (middle - started))
        forward, of_pass, tables = middle - started, read - middle, ended - read
        print(f"forwards {forward:.2f} s, pass {of_pass:.2f} s, tables {tables:.2f} s, ratio {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}; goal at most 1.3")


if __name__ == "__main__":
    main()
