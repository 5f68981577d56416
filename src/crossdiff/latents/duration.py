"""How long the encoding in the analysis of a crosscoder will take, from encoding a few tokens with a smaller one."""

from __future__ import annotations

import statistics
import time

import torch

from crossdiff.config import BatchTopKConfig
from crossdiff.crosscoder.cost import TIMED, WARMUP, Size
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.latents.stream import PIECE_BYTES

PER_ENCODING = 1.7
"""How many times as long as encoding the pass of an analysis takes on the CPU (docs/performance.md#the-analysis)."""
LARGEST = 4096
"""Number of latents of the smaller crosscoder. The time of both kinds of work, per token and per latent, grows with it."""


def encoding_seconds(size: Size, n_tokens: int, device: torch.device) -> float:
    """Seconds of encoding so many tokens on a device, with as many tokens at a time as the pass has."""
    n_latents = min(size.n_latents, LARGEST)
    n_at_once = max(1, PIECE_BYTES // (4 * size.n_latents))
    coder = new_crosscoder(n_latents, torch.zeros(size.n_sources, size.d_model), 1.0, BatchTopKConfig(k=1), 1.0, seed=0)
    coder = coder.to(device)
    x = torch.randn(n_at_once, size.n_sources, size.d_model, generator=torch.Generator().manual_seed(0)).to(device)
    n_active = max(1, round(n_at_once * size.active * n_latents / size.n_latents))
    coder.threshold = float((coder.pre_activations(x) * coder.norm_sums()).flatten().topk(n_active).values[-1])
    seconds = []
    for _ in range(WARMUP + TIMED):
        started = time.perf_counter()
        coder.sparse_code(x).values.sum().item()  # a number on the host, so a device has finished
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARMUP:]) / n_at_once * size.n_latents / n_latents * n_tokens
