"""The cost of a training step: time from three kinds of work, memory and traffic from the sizes.

    seconds = a * (encoder's product) + b * (products over active pairs) + c * (update of the weights)

The rates 1/a, 1/b and 1/c belong to a machine. They are fitted to a few small steps timed on it (`calibrate`), or entered by
hand for a machine that is not available.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import nnls

from crossdiff.config import BatchTopKConfig, CrosscoderConfig
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.trainer import Trainer
from crossdiff.crosscoder.view import view_of
from crossdiff.errors import UserError
from crossdiff.sources import SOURCES

WARMUP, TIMED = 3, 5
"""Number of steps before timing starts, and of steps whose median is taken."""
PER_PRE_ACTIVATION = 500
"""Writing and reading a pre-activation costs about as much as this many multiply-adds of the encoder's product (measured on a
CPU with six sizes; docs/scaling.md)."""


@dataclass(frozen=True)
class Size:
    """The size of a training step; `active` is the number of active latents per token."""

    d_model: int
    n_latents: int
    active: int
    batch: int
    n_sources: int = 2

    @property
    def columns(self) -> int:
        return self.n_sources * self.d_model

    @property
    def n_parameters(self) -> int:
        """Number of parameters of encoder and decoder."""
        return 2 * self.n_latents * self.columns

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights in float32."""
        return 4 * self.n_parameters

    def work(self, latent_ranks: int = 1) -> tuple[float, float, float]:
        """Work of each rank: multiply-adds of the encoder's product with the selection; multiply-adds of decoding and of the
        three gradients over active pairs; number of parameters updated."""
        pairs = self.batch * self.active / latent_ranks
        dense = self.batch * self.n_latents * (self.columns + PER_PRE_ACTIVATION) / latent_ranks
        return dense, 4 * pairs * self.columns, self.n_parameters / latent_ranks

    def memory_bytes(self, latent_ranks: int = 1) -> float:
        """Memory of each rank: weights, gradient and Adam's two moments in float32; pre-activations and the selection's mask;
        inputs, error, its gradient and the reconstruction. A GPU holds no mask, but the weights in bfloat16 too."""
        return (
            16 * self.n_parameters / latent_ranks
            + 6 * self.batch * self.n_latents / latent_ranks
            + 20 * self.batch * self.columns
        )

    def traffic_bytes(self, latent_ranks: int, data_ranks: int) -> float:
        """Bytes that each rank sends per step, in a ring: the reconstruction to the ranks that share the latents, the gradients
        to those that share the batch, candidates of the selection to all."""
        own_batch = self.batch / data_ranks
        reconstruction = 2 * (latent_ranks - 1) / latent_ranks * 4 * own_batch * self.columns
        gradients = 2 * (data_ranks - 1) / data_ranks * 4 * self.n_parameters / latent_ranks
        ranks = latent_ranks * data_ranks
        return reconstruction + gradients + (ranks - 1) / ranks * 4 * 1.1 * self.batch * self.active


def check_memory(
    configs: Mapping[str, CrosscoderConfig],
    d_model: int,
    device: torch.device,
    latent_ranks: int = 1,
    sources: tuple[str, ...] = SOURCES,
) -> None:
    """Check that the weights of crosscoders that are trained together fit into a device's memory.

    Only weights, gradients and Adam's moments are counted, so it refuses what cannot work, and not what may be tight.

    Raises:
        UserError: they do not fit.
    """
    n_sources = {name: len(view_of(config.inputs, sources).names) for name, config in configs.items()}
    sizes = {name: Size(d_model, config.latents_for(d_model), 1, 0, n_sources[name]) for name, config in configs.items()}
    needed = {name: size.memory_bytes(latent_ranks) for name, size in sizes.items()}
    available = _total_memory(device)
    if sum(needed.values()) > available:
        largest = max(needed, key=lambda name: needed[name])
        total, held, most = (f"{n_bytes / 1e9:,.1f} GB" for n_bytes in (sum(needed.values()), available, needed[largest]))
        raise UserError(
            f"the weights, gradients and moments of {', '.join(needed)} need {total}, and {device} has {held}; lower n_latents "
            f"or expansion (the {sizes[largest].n_latents:,} latents of {largest} need {most}), or train fewer at a "
            "time with --only"
        )


def _total_memory(device: torch.device) -> int:
    """Memory of a device in bytes, whether in use or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Rates:
    """Rates of a machine: multiply-adds per second in dense products and over active pairs, parameters updated per second."""

    dense: float
    pairs: float
    parameters: float

    def seconds(self, size: Size, latent_ranks: int = 1, data_ranks: int = 1) -> float:
        """Duration of a step, without communication between ranks."""
        own = replace(size, batch=size.batch // data_ranks)
        return sum(
            amount / rate
            for amount, rate in zip(own.work(latent_ranks), (self.dense, self.pairs, self.parameters), strict=True)
        )


def fit(timed: Sequence[tuple[Size, float]]) -> Rates:
    """The rates with the smallest relative errors on timed steps, of at least three sizes that differ in kind."""
    weighed = np.array([np.array(size.work()) / seconds for size, seconds in timed])
    scale = weighed.max(0)
    costs, _ = nnls(weighed / scale, np.ones(len(timed)))
    dense, pairs, parameters = (float("inf") if cost == 0 else float(of / cost) for cost, of in zip(costs, scale, strict=True))
    return Rates(dense, pairs, parameters)


def time_step(size: Size, device: torch.device, steps: int = TIMED) -> float:
    """Median seconds of a BatchTopK step of this size on random inputs."""
    config = CrosscoderConfig(
        sparsity=BatchTopKConfig(k=size.active), n_latents=size.n_latents, expansion=None, batch_size=size.batch, warmup_steps=0
    )
    mean = torch.zeros(size.n_sources, size.d_model)
    coder = new_crosscoder(size.n_latents, mean, 1.0, config.sparsity, 1.0, seed=0).to(device)
    trainer = Trainer(config, coder, n_steps=10_000)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, size.n_sources, size.d_model, generator=generator).to(device)
    seconds = []
    for _ in range(WARMUP + steps):
        started = time.perf_counter()
        float(trainer.train_step(x).loss)  # waits for the device
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARMUP:])


def calibrate(size: Size, device: torch.device) -> Rates:
    """Fit the rates to three timed steps of smaller sizes with similar proportions."""
    n_latents = max(512, size.n_latents // 8)
    batch = max(128, size.batch // 4)
    active = max(1, min(size.active, n_latents // 8))
    small = Size(size.d_model, n_latents, active, batch, size.n_sources)
    sizes = (small, replace(small, batch=batch // 4), replace(small, active=min(4 * active, n_latents // 4)))
    return fit([(each, time_step(each, device)) for each in sizes])
