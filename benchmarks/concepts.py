"""Measures the two passes of the stage `concepts` against the analysis of the same trainings.

    python benchmarks/concepts.py       # d_model 576, 3 trainings of 8,192 latents with 333 candidates, 20,480 tokens
    python benchmarks/concepts.py --help

333 of 8,192 latents is the share of 3,000 of 73,728. The trainings have the same planted latents in other orders, so every
concept has a member in each. Prints CPU time, of which only the ratio counts; see `latent_scaling.py`.
"""

from __future__ import annotations

import argparse
import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from latent_scaling import make, timed, whole_pass

from crossdiff.concepts.agreement import Pool
from crossdiff.concepts.candidates import Codes, Training
from crossdiff.concepts.clustering import group
from crossdiff.concepts.coder import coded
from crossdiff.concepts.completeness import Completeness
from crossdiff.concepts.group_scaling import GroupProducts
from crossdiff.concepts.similarity import Similarity, matrix_of
from crossdiff.config import AnalyzeConfig
from crossdiff.latents.activity import Activity
from crossdiff.latents.example_collector import ExampleCollector
from crossdiff.latents.groups import Cells
from crossdiff.latents.stream import read_blocks


def passes(trainings: list[Training], store: Any, config: AnalyzeConfig) -> int:
    """Run both passes with their accumulators, and return the number of concepts."""
    codes = Codes(trainings, store)
    similarity = Similarity(codes, seed=0)
    for read in read_blocks(store, config.blocks, config.batch_tokens):
        similarity.add(read)
    pool = Pool(codes.training, np.ones(codes.n_candidates), np.ones(codes.n_candidates, dtype=np.bool_))
    grouping = group(similarity.products.pairs(), pool.training, np.arange(len(trainings)), 0.6, 2 / 3)
    cells = Cells(pl.DataFrame({"dataset": ["synthetic"], "group": ["plain"]}), np.zeros(store.n_tokens, dtype=np.int64))
    activity = Activity.empty(cells, grouping.n_concepts)
    examples = ExampleCollector(store, grouping.n_concepts, config)
    products = GroupProducts(codes, grouping, config.blocks)
    completeness = Completeness(codes, grouping, config.blocks, seed=0)
    weights = grouping.weights(codes.training)
    for read in read_blocks(store, config.blocks, config.batch_tokens):
        inputs = codes.inputs(read)
        found = codes.of_inputs(inputs)
        chunk = coded(read, matrix_of(found, codes.first, codes.v(found)) @ weights)
        activity.add(chunk)
        examples.add(chunk)
        products.add(read.block, matrix_of(found, codes.first, [code.values for code in found]))
        completeness.add(read, inputs, found)
    examples.finish()
    return grouping.n_concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--candidates", type=int, default=333)
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--l0", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = AnalyzeConfig()
    crosscoder, store = make(args.tokens, args.d_model, args.latents, args.l0)
    table = pl.DataFrame({"latent": range(args.candidates), "verdict": ["chat_specific"] * args.candidates})
    others = torch.arange(args.candidates, args.latents)
    unused: Any = SimpleNamespace()  # the sums of latent scaling, which the passes do not read
    trainings = []
    for number in range(args.trainings):
        order = torch.randperm(args.candidates, generator=torch.Generator().manual_seed(number))
        own = crosscoder.of_latents(torch.cat([order, others]))
        trainings.append(Training(f"t{number}", "batchtopk", own, table, unused, others))
    ratios: list[float] = []
    found: list[int] = []
    for _ in range(args.rounds):
        analysis = timed(lambda: [whole_pass(training.crosscoder, store, config) for training in trainings])
        concepts = timed(lambda: found.append(passes(trainings, store, config)))
        ratios.append(concepts / analysis)
        print(f"round: analysis {analysis:.1f} s, concepts {concepts:.1f} s")
    print(f"{found[0]:,} concepts of {args.trainings} x {args.candidates:,} candidates; {args.latents:,} latents")
    print(f"both passes of concepts / one analysis of the trainings   {statistics.median(ratios):.2f}   target <= 1")


if __name__ == "__main__":
    main()
