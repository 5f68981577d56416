"""What `torchrun` starts for the tests: `worker.py NAME ARGUMENTS`, once a rank."""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from crossdiff.activations.store import Store
from crossdiff.config import (
    AuxConfig,
    BatchTopKConfig,
    CrosscoderConfig,
    DesignatedConfig,
    FreeConfig,
    JumpReLUConfig,
    L1Config,
    PartitionedConfig,
    TopKConfig,
)
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.losses import Loss, StepResult, TokensSinceFired
from crossdiff.crosscoder.mesh import Mesh, mesh_of
from crossdiff.crosscoder.structure import constraint_of
from crossdiff.crosscoder.train import Job, train_together
from crossdiff.crosscoder.trainer import EVERYWHERE
from crossdiff.crosscoder.view import identity
from crossdiff.ranks import Ranks, current, leave

N_LATENTS, D, N_TOKENS, DEAD = 22, 7, 24, (6, 7, 13, 20, 21)  # none of the first rank's of four
AUX = AuxConfig(weight=0.1, k=3)
SPARSITIES = (L1Config(), BatchTopKConfig(k=3, aux=AUX), TopKConfig(k=3, aux=AUX), JumpReLUConfig())
STRUCTURES = (FreeConfig(), DesignatedConfig(shared_share=0.3), PartitionedConfig(exclusive_share=0.1))
CPU = torch.device("cpu")


def make(sparsity: Any, structure: Any, equal: bool) -> tuple[Crosscoder, torch.Tensor]:
    """A random crosscoder of two sources, and a batch; with equal values everywhere a selection has to break ties."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.sign() if equal else values

    own = {"log_threshold": random(N_LATENTS) * 0.3} if isinstance(sparsity, JumpReLUConfig) else {}
    crosscoder = Crosscoder(
        encoder=random(N_LATENTS, 2 * D), encoder_bias=random(N_LATENTS) - 0.5, decoder=random(N_LATENTS, 2 * D),
        decoder_bias=random(2 * D), mean=torch.zeros(2, D), scale=1.0, sparsity=sparsity, view=identity(("a", "b")), own=own,
    )  # fmt: skip
    constraint_of(structure, N_LATENTS, 2).settle(crosscoder.parameters())
    return crosscoder, random(N_TOKENS, 2, D)


def step(crosscoder: Crosscoder, x: torch.Tensor, structure: Any, mesh: Mesh) -> StepResult:
    part = mesh.latent.part(N_LATENTS)
    tokens = torch.zeros(N_LATENTS, dtype=torch.int64)
    tokens[list(DEAD)] = 10**9
    constraint = constraint_of(structure, N_LATENTS, 2).of_latents(part)
    # The dead ones cannot fire, so that they stay dead.
    loss = Loss(crosscoder, "squared", constraint, mesh)
    return loss.gradients(x, TokensSinceFired(tokens[part], 10**8), weight=0.4, guess=0.5)


def whole_of(mesh: Mesh, part: torch.Tensor, n_rows: int | None) -> torch.Tensor:
    return mesh.placed(part, n_rows).full_tensor()  # type: ignore[attr-defined,no-any-return]


def gradients(ranks: Ranks, out: Path) -> None:
    """The largest relative errors of every tensor and number of a step that the ranks share, against one process."""
    found: dict[str, dict[str, float]] = {}
    for n_latent in (n for n in (1, 2, 4) if ranks.size % n == 0):
        mesh = mesh_of(ranks, n_latent, CPU)
        for sparsity, structure, equal in product(SPARSITIES, STRUCTURES, (False, True)):
            crosscoder, x = make(sparsity, structure, equal)
            crosscoder.encoder_bias[list(DEAD)] = -100.0 if not isinstance(sparsity, TopKConfig) else -3.0
            whole = step(crosscoder, x, structure, Mesh())
            mine = step(crosscoder.of_latents(mesh.latent.part(N_LATENTS)), x[mesh.data.part(N_TOKENS)], structure, mesh)
            errors = {}
            for name, expected in whole.gradients.items():
                gathered = whole_of(mesh, mine.gradients[name], None if name == EVERYWHERE else N_LATENTS)
                errors[name] = float((gathered - expected).norm() / expected.norm().clamp(min=1e-6))
            for name in ("loss", "reconstruction", "sparsity", "aux", "l0"):
                expected = getattr(whole, name)
                errors[name] = abs(float(getattr(mine, name) - expected)) / max(abs(float(expected)), 1e-6)
            silent = whole_of(mesh, mine.since_fired.tokens, N_LATENTS)
            errors["since_fired"] = float((silent != whole.since_fired.tokens).sum())
            errors["smallest_kept"] = abs((mine.smallest_kept or 0.0) - (whole.smallest_kept or 0.0))
            title = f"{sparsity.kind} {structure.kind} {'equal ' if equal else ''}{ranks.size // n_latent}x{n_latent}"
            found[title] = errors | {"aux_loss": float(whole.aux)}
    if ranks.is_first:
        out.write_text(json.dumps(found))


def settings() -> dict[str, CrosscoderConfig]:
    common: dict[str, Any] = {"n_latents": 30, "batch_size": 128, "epochs": 2, "warmup_steps": 5, "lr": 3e-3}
    common |= {"dead_after_tokens": 700, "checkpoint_seconds": 0.2}
    return {
        "l1": CrosscoderConfig(sparsity=L1Config(mu=0.5, resamplings=2), **common),
        "batchtopk": CrosscoderConfig(sparsity=BatchTopKConfig(k=2, aux=AUX), **common),
        "partitioned": CrosscoderConfig(
            sparsity=BatchTopKConfig(k=2, aux=AUX), structure=PartitionedConfig(exclusive_share=0.1), **common
        ),
    }


def training(ranks: Ranks, out: Path, folder: str, latent_ranks: str, die_at: str = "0") -> None:
    """Train on the store in `folder`; once, at step `die_at`, the last rank takes its own life."""
    out.mkdir(exist_ok=True)
    jobs = []
    for name, config in settings().items():
        (out / name).mkdir(exist_ok=True)
        jobs.append(Job(out / name, config, out / name))

    def report(step: int, n_steps: int, records: dict[str, Any]) -> None:
        if ranks.is_first:
            with (out / "steps").open("a") as file:
                file.write(f"{step}\n")
        if step == int(die_at) and ranks.rank == ranks.size - 1 and not (out / "died").exists():
            (out / "died").touch()
            os.kill(os.getpid(), 9)

    train_together(jobs, Store(Path(folder)), CPU, (), report, ranks, int(latent_ranks))


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, target, *arguments = sys.argv[1:]
    {"gradients": gradients, "training": training}[name](current(), Path(target), *arguments)
    leave()
