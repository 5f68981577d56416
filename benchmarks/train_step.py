"""Compares our training step with plain dense autograd, alternating in one process on the same inputs.

    python benchmarks/train_step.py [--rounds 5] [--only NAME] [--cpu-time]

Dense is the published method: einsum per source, flat `topk` over batch x latents, scatter, dense decode, autograd,
`clip_grad_norm_`, default Adam. Inputs are sparse mixtures of random directions. Prints medians, their ratio, tokens/s, the
share of the machine's measured GEMM peak that the encoder's product alone would need, and the peak memory of each step (in a
separate process). On a busy machine, use `OMP_NUM_THREADS=1` and `--cpu-time` to compare CPU times instead of wall times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from crossdiff.config import BatchTopKConfig, CrosscoderConfig, L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.crosscoder.trainer import Trainer
from crossdiff.memory import keep_freed_memory

N_SOURCES, WARMUP = 2, 12


@dataclass(frozen=True)
class Case:
    """One training setting. `bias` shifts the encoder's bias, so that an L1 crosscoder is sparse from the start."""

    d_model: int
    n_latents: int
    batch: int
    k: int | None
    bias: float = 0.0
    dead_share: float = 0.0


CASES = {
    "batchtopk-256": Case(256, 4096, 2048, 32),
    "batchtopk-576": Case(576, 8192, 2048, 50),
    "batchtopk-576-dead": Case(576, 8192, 2048, 50, dead_share=0.1),
    "batchtopk-2304": Case(2304, 16384, 512, 100),
    "l1-576-dense": Case(576, 8192, 2048, None),
    "l1-576-295": Case(576, 8192, 2048, None, bias=-2.55),
    "l1-576-91": Case(576, 8192, 2048, None, bias=-3.3),
    "l1-576-55": Case(576, 8192, 2048, None, bias=-3.6),
}


CPU = torch.device("cpu")


def inputs(case: Case, n_batches: int, device: torch.device = CPU) -> list[torch.Tensor]:
    """Sparse mixtures of 4 d directions, scaled to a mean square of d. A direction occurs on 1% of the tokens."""
    generator = torch.Generator(device).manual_seed(1)
    random = {"generator": generator, "device": device}
    directions = torch.randn(4 * case.d_model, N_SOURCES * case.d_model, **random)
    batches = []
    for _ in range(n_batches):
        amount = torch.rand(case.batch, len(directions), **random)
        x = (amount * (torch.rand(amount.shape, **random) < 0.01)) @ directions
        x *= (case.d_model * N_SOURCES / x.square().sum(1).mean()) ** 0.5
        batches.append(x.view(case.batch, N_SOURCES, case.d_model))
    return batches


@cache
def _start(d_model: int, n_latents: int, device: torch.device) -> Crosscoder:
    return new_crosscoder(n_latents, torch.zeros(N_SOURCES, d_model), 1.0, L1Config(mu=0.1, resamplings=0), 1.0, seed=0).to(
        device
    )


def new_coder(case: Case, device: torch.device = CPU) -> Crosscoder:
    coder = _start(case.d_model, case.n_latents, device).of_latents(slice(None))
    bias = torch.zeros_like(coder.decoder_bias)
    coder = replace(coder, sparsity=BatchTopKConfig(k=case.k) if case.k else coder.sparsity, decoder_bias=bias)
    coder.encoder_bias += case.bias
    return coder


class Ours:
    """The step of crossdiff's trainer."""

    def __init__(self, case: Case, device: torch.device = CPU, **settings: Any) -> None:
        coder = new_coder(case, device)
        config = CrosscoderConfig(sparsity=coder.sparsity, n_latents=case.n_latents, batch_size=case.batch, lr=1e-5, **settings)
        self.trainer = Trainer(config, coder, 10_000)
        n_dead = round(case.dead_share * case.n_latents)
        self.trainer.since_fired.tokens[:n_dead] = 10**12
        coder.encoder_bias[:n_dead] = -1e3
        self.l0 = torch.zeros(())

    def step(self, x: torch.Tensor) -> None:
        self.l0 = self.trainer.train_step(x).l0


class Dense:
    """The step of plain dense autograd."""

    def __init__(self, case: Case, device: torch.device = CPU) -> None:
        coder, self.case = new_coder(case, device), case
        shape = (case.n_latents, N_SOURCES, case.d_model)
        self.encoder = coder.encoder.view(shape).permute(1, 2, 0).contiguous().requires_grad_()
        self.decoder = coder.decoder.view(shape).permute(1, 0, 2).contiguous().requires_grad_()
        self.bias, self.decoder_bias = (
            coder.encoder_bias.requires_grad_(),
            torch.zeros(N_SOURCES, case.d_model, device=device).requires_grad_(),
        )
        self.dead = torch.zeros(case.n_latents, dtype=torch.bool, device=device)
        self.dead[: round(case.dead_share * case.n_latents)] = True
        self.optimiser = torch.optim.Adam([self.encoder, self.decoder, self.bias, self.decoder_bias], lr=1e-5)
        self.l0 = torch.zeros(())

    def step(self, x: torch.Tensor) -> None:
        f = torch.relu(torch.einsum("bsd,sdf->bsf", x, self.encoder).sum(1) + self.bias)
        v = f * self.decoder.norm(dim=2).sum(0)
        code = f
        if self.case.k:
            kept = v.flatten().topk(self.case.k * len(x), sorted=False).indices
            mask = torch.zeros_like(v).view(-1).scatter_(0, kept, 1.0).view_as(v)
            code = f * mask
        error = torch.einsum("bf,sfd->bsd", code, self.decoder) + self.decoder_bias - x
        loss = error.square().sum((1, 2)).mean()
        if not self.case.k:
            loss = loss + 0.1 * v.sum(1).mean()
        elif self.case.dead_share:
            residual, k_aux = -error.detach(), self.case.d_model // 2
            chosen = v[:, self.dead].topk(min(k_aux, int(self.dead.sum())), dim=1, sorted=False).indices
            auxiliary = torch.zeros_like(v[:, self.dead]).scatter(1, chosen, 1.0) * f[:, self.dead]
            guess = torch.einsum("bf,sfd->bsd", auxiliary, self.decoder[:, self.dead])
            variance = (residual - residual.mean(0)).square().sum((1, 2)).mean()
            loss = loss + (residual - guess).square().sum((1, 2)).mean() / variance / 32
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.encoder, self.decoder, self.bias, self.decoder_bias], 1.0)
        self.optimiser.step()
        self.l0 = (code > 0).sum() / len(x)


clock = time.perf_counter


def timed(step: Callable[[torch.Tensor], None], x: torch.Tensor) -> float:
    started = clock()
    step(x)
    return clock() - started


def gemm_peak() -> float:
    """FLOP/s of the fastest of several large products."""
    a, out = torch.randn(2048, 2048), torch.empty(2048, 2048)
    torch.mm(a, a, out=out)

    def product(m: torch.Tensor) -> None:
        torch.mm(m, m, out=out)

    best = min(timed(product, a) for _ in range(8))
    return 2 * 2048**3 / best


def peak_memory(name: str, kind: str) -> float:
    """Peak resident memory in megabytes during a few steps, in a separate process."""
    command = [sys.executable, __file__, "--memory", name, kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(name: str, case: Case, rounds: int, peak: float) -> dict[str, float]:
    batches = inputs(case, 4)
    ours, dense = Ours(case), Dense(case)
    for i in range(WARMUP):
        ours.step(batches[i % 4])
    dense.step(batches[0])
    times = [(timed(ours.step, batches[i % 4]), timed(dense.step, batches[i % 4])) for i in range(rounds)]
    mine, theirs = (statistics.median(values) for values in zip(*times, strict=True))
    encoder = 2 * case.batch * case.n_latents * case.d_model * N_SOURCES
    return {
        "ours_ms": 1e3 * mine, "dense_ms": 1e3 * theirs, "ratio": statistics.median(d / o for o, d in times),
        "tokens_per_s": case.batch / mine, "encoder_share_of_peak": encoder / mine / peak, "l0": float(ours.l0),
        "ours_mb": peak_memory(name, "ours"), "dense_mb": peak_memory(name, "dense"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time of the process instead of wall time; use one thread"
    )
    args = parser.parse_args()
    if args.cpu_time:
        global clock
        clock = time.process_time
    keep_freed_memory()
    if args.memory:
        case = CASES[args.memory[0]]
        stepper = Ours(case) if args.memory[1] == "ours" else Dense(case)
        for x in inputs(case, 3):
            stepper.step(x)
        peaks = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        print(float(peaks[0]) / 1e3)  # getrusage would count the parent's memory
        return
    peak = gemm_peak()
    print(
        f"{torch.get_num_threads()} threads, GEMM peak {peak / 1e9:.0f} GFLOP/s, medians of {args.rounds} alternating rounds\n"
    )
    print("| step | ours ms | dense ms | ratio | tokens/s | encoder GEMM, share of peak | L0 | ours MB | dense MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if args.only in (None, name):
            row = measure(name, case, args.rounds, peak)
            print(
                f"| {name} | {row['ours_ms']:.0f} | {row['dense_ms']:.0f} | {row['ratio']:.1f}x | {row['tokens_per_s']:.0f} | "
                f"{row['encoder_share_of_peak']:.0%} | {row['l0']:.0f} | {row['ours_mb']:.0f} | {row['dense_mb']:.0f} |",
                flush=True,
            )
            print(json.dumps({name: row}), file=sys.stderr)


if __name__ == "__main__":
    main()
