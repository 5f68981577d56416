"""Counts the latents that the inference threshold of a BatchTopK crosscoder keeps, per dataset and split.

    python recipes/threshold.py [RUN] [NAME] [--tokens 12288]

Prints theta, and the threshold that would keep k latents per token on a sample of the training tokens. For every dataset and
split, the table has the mean number of active latents per token under both (on samples of at most --tokens tokens).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store
from crossdiff.config import BatchTopKConfig, RunConfig, validate
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.yaml_files import read_yaml

BATCH = 1024


def strongest(coder: Crosscoder, store: Store, rows: np.ndarray, n: int) -> torch.Tensor:
    """The n largest v of each token, `[token, n]`."""
    reads, norms = source_indices(store, coder.view.reads), coder.norm_sums()
    found = []
    for start in range(0, len(rows), BATCH):
        x = coder.normalise(store.gather(rows[start : start + BATCH])[:, reads]).flatten(1)
        v = torch.addmm(coder.encoder_bias, x, coder.encoder.T).clamp(min=0) * norms
        found.append(v.topk(min(n, coder.n_latents)).values)
    return torch.cat(found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("name", nargs="?", default="batchtopk")
    parser.add_argument("--tokens", type=int, default=12_288, help="number of tokens of each sample")
    args = parser.parse_args()
    store, coder = Store(args.run / "activations"), load(args.run / args.name)
    config = validate(RunConfig, read_yaml(args.run / "config.yaml"), str(args.run / "config.yaml"))
    sparsity = config.crosscoders[args.name].sparsity
    if not isinstance(sparsity, BatchTopKConfig):
        raise UserError(
            f"{args.name} is of kind {sparsity.kind}; choose a batchtopk crosscoder, the only kind with a threshold"
        )
    k = sparsity.k
    documents = store.column("document")

    def sample(split: str, dataset: str | None = None) -> np.ndarray:
        rows = store.rows(split)
        if dataset is not None:
            members = store.documents.filter(pl.col("dataset") == dataset)["document"].to_numpy()
            rows = rows[np.isin(documents[rows], members)]
        return np.sort(np.random.default_rng(0).permutation(rows)[: args.tokens])

    trained = strongest(coder, store, sample("train"), 4 * k)
    keeps_k = float(trained.flatten().sort(descending=True).values[k * len(trained)])
    print(f"theta {coder.threshold:.3f}; {keeps_k:.3f} keeps {k} per training token\n")
    print(f"| tokens | active at {coder.threshold:.3f} | at {keeps_k:.3f} |\n|---|---|---|")
    parts = [(split, dataset) for split in ("train", "heldout") for dataset in (None, *store.datasets)]
    present = set(store.documents.filter(pl.col("n_tokens") > 0).select("split", "dataset").unique().rows())
    for split, dataset in parts:
        if dataset is None or (split, dataset) in present:
            v = strongest(coder, store, sample(split, dataset), 8 * k)
            kept = [float((v > limit).sum() / len(v)) for limit in (coder.threshold, keeps_k)]
            print(f"| {split}, {dataset or 'all'} | {kept[0]:.1f} | {kept[1]:.1f} |")


if __name__ == "__main__":
    main()
