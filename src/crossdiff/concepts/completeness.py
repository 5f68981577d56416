"""How much of the difference between the models the replicated concepts account for, in each training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from crossdiff.concepts.candidates import Codes, Training
from crossdiff.concepts.clustering import Grouping
from crossdiff.crosscoder.crosscoder import Part
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.difference import Variance, difference, explained
from crossdiff.latents.stream import Read, encode
from crossdiff.ranks import Ranks
from crossdiff.shapes import Bool, Float, Tensor

RANDOM = "random"
"""As many live latents that are not candidates, drawn at random."""
SETS = ("replicated", "candidates", RANDOM)


class _OneTraining:
    """The sets of latents of one training, and the variance of what each leaves of the difference."""

    def __init__(self, training: Training, chosen: dict[str, Bool[Tensor, " candidate"]], n_blocks: int, seed: int) -> None:
        coder = training.crosscoder
        self.n_sources = coder.n_sources
        device = coder.encoder.device
        self.chosen = {name: kept.to(device) for name, kept in chosen.items()}
        directions = coder.directions()
        self._difference = directions[-1] - directions[0]
        self._latents = training.latents
        n_random = min(int(chosen["replicated"].sum()), len(training.others))
        drawn = np.random.default_rng([seed, 1]).permutation(training.others.numpy())[:n_random]
        self._random_latents = torch.from_numpy(np.sort(drawn))
        self._random = Part(coder, self._random_latents)
        self.whole = Variance(n_blocks, coder.d_model, device)
        self.residuals = {name: Variance(n_blocks, coder.d_model, device) for name in SETS}
        self.sizes = {name: int(kept.sum()) for name, kept in chosen.items()} | {RANDOM: n_random}

    def add(self, block: int, x: Float[Tensor, "token source d_model"], code: SparseCode) -> None:
        whole = difference(x.flatten(1), self.n_sources)
        self.whole.add(block, whole)
        for name in SETS:
            part = whole
            if self.sizes[name]:
                if name == RANDOM:
                    found = encode(self._random, x)
                    part = whole - found.decode(self._difference[self._random_latents])
                else:
                    found = code.with_values(code.values * code.of_latents(self.chosen[name].to(code.values)))
                    part = whole - found.decode(self._difference[self._latents])
            self.residuals[name].add(block, part)


class Completeness:
    """Collects what sets of latents account for, from the same pass as the descriptions."""

    def __init__(self, codes: Codes, grouping: Grouping, n_blocks: int, seed: int) -> None:
        replicated = torch.from_numpy(grouping.in_replicated)
        self._names = [training.name for training in codes.trainings]
        self._trainings = []
        for t, training in enumerate(codes.trainings):
            mine = slice(int(codes.first[t]), int(codes.first[t + 1]))
            chosen = {"replicated": replicated[mine], "candidates": torch.ones_like(replicated[mine])}
            self._trainings.append(_OneTraining(training, chosen, n_blocks, seed))

    def add(self, read: Read, inputs: list[Float[Tensor, "token source d_model"]], codes: list[SparseCode]) -> None:
        """Add a batch: the activations that each training reads, and its code."""
        for training, x, code in zip(self._trainings, inputs, codes, strict=True):
            training.add(read.block, x, code)

    def over(self, ranks: Ranks) -> Completeness:
        """Merge the passes of several ranks, in place."""
        for training in self._trainings:
            training.whole.over(ranks)
            for residual in training.residuals.values():
                residual.over(ranks)
        return self

    def results(self) -> list[dict[str, Any]]:
        """For every training and set of latents: their number, and the share of the difference that they account for."""
        return [
            {
                "training": name,
                "set": key,
                "n_latents": training.sizes[key],
                "explained": asdict(explained(training.residuals[key], training.whole)),
            }
            for name, training in zip(self._names, self._trainings, strict=True)
            for key in SETS
        ]
