"""Checks and times crossdiff on one GPU, against the card's own limits and against plain dense autograd.

    python benchmarks/gpu.py [--out DIR] [--only PART ...] [--tiny]

The parts, in this order: `correct` (whole steps against float64), `peaks` (the card's matrix product and copy), `step` (our
training step at Gemma-2-2B's width and the paper's size, batches of 2,048 and 8,192), `kernels` (each kernel alone), `dense`
(the same step by dense autograd with bfloat16 autocast), `training` (the embedded pair's activations: the GPU's crosscoder
against the CPU's), `harvest` and `scaling`. It takes some five minutes on an H200, prints the rows of docs/performance.md and
writes all numbers to DIR/gpu.json. `--tiny` runs small sizes, also on a CPU under TRITON_INTERPRET=1, to see that the script
itself works.

The limit of a step is the time of what no exact step can do without: the encoder's product at the matrix peak measured in the
same run, and at the measured copy rate the pre-activations written and read once in bfloat16, the inputs, and Adam's parameters
and moments read and written once in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from harvest import Sizes, measure_on_device
from latent_scaling import make
from train_step import N_SOURCES, Case, Dense, Ours, inputs

from crossdiff.config import BatchTopKConfig, CrosscoderConfig
from crossdiff.crosscoder import gpu
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.kernels import SparseCode, above, matmul
from crossdiff.crosscoder.losses import Loss, TokensSinceFired
from crossdiff.crosscoder.structure import constraint_of
from crossdiff.crosscoder.trainer import Trainer
from crossdiff.latents.scaling import ScalingAccumulator
from crossdiff.latents.stream import Read, coded, encode

PAPER = Case(2304, 73_728, 2048, 100)
TINY = Case(24, 96, 32, 3)


@dataclass(frozen=True)
class Machine:
    """Where the benchmark runs, and its sizes."""

    device: torch.device
    tiny: bool

    @property
    def cases(self) -> dict[int, Case]:
        """The step's cases by batch size."""
        first = TINY if self.tiny else PAPER
        return {first.batch * times: replace(first, batch=first.batch * times) for times in (1, 4)}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object], repeats: int = 10) -> float:
        """Median milliseconds between events around each repetition, after two to warm up."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - started)
        for _ in range(2):
            work()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            work()
            end.record()
        self.wait()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else float("nan")

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; NaN where found has one."""
    difference = (found.double().cpu() - expected.double().cpu()).norm()
    return float(difference / expected.double().cpu().norm().clamp(min=1e-12))


def exact_step(parameters: dict[str, torch.Tensor], x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients of a BatchTopK step with a given selection, by dense autograd in float64."""
    wide = {name: tensor.double().requires_grad_() for name, tensor in parameters.items()}
    columns = x.flatten(1).double()
    f = (columns @ wide["encoder"].T + wide["encoder_bias"]).relu() * mask
    error = f @ wide["decoder"] + wide["decoder_bias"] - columns
    loss = error.square().sum() / len(x)
    found = dict(zip(wide, torch.autograd.grad(loss, list(wide.values())), strict=True))
    return found | {"loss": loss.detach()}


def correct(machine: Machine) -> dict[str, Any]:
    """Relative errors of a step on the device with its own selection, in both precisions, and whether it is repeatable."""
    n_latents, d_model, batch, k = (96, 24, 32, 3) if machine.tiny else (3001, 301, 513, 17)
    errors: dict[str, Any] = {}
    for name in ("float32", "bfloat16"):
        products = getattr(torch, name)
        coder = new_crosscoder(n_latents, torch.zeros(2, d_model), 1.0, BatchTopKConfig(k=k), 1.0, seed=0).to(machine.device)
        generator = torch.Generator().manual_seed(0)
        coder.encoder += 0.3 * torch.randn(coder.encoder.shape, generator=generator).to(machine.device) / d_model**0.5
        coder.encoder_bias += 0.1 * torch.randn(n_latents, generator=generator).to(machine.device)
        x = torch.randn(batch, 2, d_model, generator=generator).to(machine.device)
        free = constraint_of(CrosscoderConfig(sparsity=BatchTopKConfig()).structure, n_latents, 2).to(machine.device)
        copies = {key: coder.parameters()[key].to(products) for key in ("encoder", "decoder")}
        since = TokensSinceFired(torch.zeros(n_latents, dtype=torch.int64, device=machine.device), 10**9)

        def step(coder=coder, free=free, x=x, since=since, copies=copies):  # type: ignore[no-untyped-def]
            return Loss(coder, "squared", free).gradients(x, since, copies=copies)

        first, again = step(), step()
        raw = x.flatten(1).to(products).double() @ copies["encoder"].double().T
        v = ((raw + coder.encoder_bias.double()).relu() * coder.norm_sums().double()).flatten()
        mask = torch.zeros_like(v).index_fill_(0, v.topk(k * batch).indices, 1.0).view_as(raw)
        expected = exact_step(coder.parameters(), x, mask)
        found = first.gradients | {"loss": first.loss}
        errors[name] = {key: relative(found[key], expected[key]) for key in expected}
        errors[name]["repeatable"] = all(torch.equal(first.gradients[key], again.gradients[key]) for key in first.gradients)
    errors["resumed"] = resumed(machine)
    return errors


def resumed(machine: Machine) -> bool:
    """Whether 12 steps are the same to the last bit as 6, a copy of the state, and 6 more."""
    case = replace(TINY if machine.tiny else Case(301, 3001, 512, 17), dead_share=0.1)
    batches = inputs(case, 4, machine.device)

    def steps(trainer: Trainer, first: int, last: int) -> None:
        for index in range(first, last):
            trainer.train_step(batches[index % 4])

    whole, half, rest = (Ours(case, machine.device, warmup_steps=2, optimizer_state="bfloat16").trainer for _ in range(3))
    steps(whole, 0, 12)
    steps(half, 0, 6)
    state, target = half.state(), rest.state()
    for name, tensor in state.tensors.items():
        target.tensors[name].copy_(tensor)
    target.step, target.guess, target.threshold = state.step, state.guess, state.threshold
    rest.restore(target)
    steps(rest, 6, 12)
    return all(torch.equal(tensor, rest.state().tensors[name]) for name, tensor in whole.state().tensors.items())


def peaks(machine: Machine) -> dict[str, Any]:
    """The card: FLOP/s of a large product in bfloat16, and bytes read and written per second by a copy."""
    n = 256 if machine.tiny else 8192
    a, b = (torch.randn(n, n, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    x, w = (torch.randn(m, 2 * n // 4, device=machine.device, dtype=torch.bfloat16) for m in (n // 4, 9 * n))
    source = torch.randn(n * n * 8, device=machine.device)
    target = torch.empty_like(source)
    square = machine.milliseconds(lambda: a @ b, 20)
    flat = machine.milliseconds(lambda: x @ w.T, 20)
    copy = machine.milliseconds(lambda: target.copy_(source), 20)
    name = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else "cpu"
    flops = max(2 * n**3 / square, 2 * x.shape[0] * x.shape[1] * w.shape[0] / flat) * 1e3
    return {
        "card": name, "torch": torch.__version__, "flops": flops, "bytes": 2 * source.nbytes / copy * 1e3,
        "flops_square": 2 * n**3 / square * 1e3,
    }  # fmt: skip


def limit_ms(case: Case, peak: dict[str, Any]) -> float:
    """Milliseconds that no exact step can undercut on this card."""
    columns = N_SOURCES * case.d_model
    product = 2 * case.batch * case.n_latents * columns / peak["flops"]
    n_bytes = 24 * 2 * case.n_latents * columns + 2 * 2 * case.batch * case.n_latents + 4 * case.batch * columns
    return 1e3 * (product + n_bytes / peak["bytes"])


def timed_steps(machine: Machine, case: Case, stepper: Ours | Dense, n_steps: int) -> float:
    """Median milliseconds of a step; batches take turns."""
    batches = inputs(case, 4, machine.device)
    for index in range(3 if isinstance(stepper, Dense) else 10):
        stepper.step(batches[index % 4])
    turn = iter(range(10**9))
    return machine.milliseconds(lambda: stepper.step(batches[next(turn) % 4]), n_steps)


def step(machine: Machine, peak: dict[str, Any]) -> dict[str, Any]:
    """Our step at each batch size, with float32 and with bfloat16 moments, and with a tenth of the latents dead."""
    rows = {}
    variants: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "": ({}, {}), ", 16-bit moments": ({}, {"optimizer_state": "bfloat16"}), ", a tenth dead": ({"dead_share": 0.1}, {}),
    }  # fmt: skip
    for batch, plain in machine.cases.items():
        for name, (changes, settings) in variants.items():
            case = replace(plain, **changes)
            machine.reset()
            stepper = Ours(case, machine.device, **settings)
            milliseconds = timed_steps(machine, case, stepper, 20)
            rows[f"{batch}{name}"] = {
                "ms": milliseconds, "tokens_per_s": 1e3 * batch / milliseconds, "limit_ms": limit_ms(case, peak),
                "over_limit": milliseconds / limit_ms(case, peak), "gb": machine.peak_gb(), "l0": float(stepper.l0),
            }  # fmt: skip
            if machine.device.type == "cuda" and not name:
                rows[f"{batch}"]["profile"] = profile(machine, case, stepper)
            del stepper
    return rows


def profile(machine: Machine, case: Case, stepper: Ours) -> dict[str, Any]:
    """Milliseconds per step in each kernel, and in none."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    batches, n_steps = inputs(case, 4, machine.device), 5
    machine.wait()
    with profiling(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        for index in range(n_steps):
            stepper.step(batches[index % 4])
        machine.wait()
        wall = 1e3 * (time.perf_counter() - started) / n_steps
    kernels = {
        event.key[:90]: (event.self_device_time_total / 1e3 / n_steps, event.count / n_steps)
        for event in found.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total
    }
    busy = sum(ms for ms, _ in kernels.values())
    most = dict(sorted(kernels.items(), key=lambda entry: -entry[1][0])[:24])
    return {"wall_ms": wall, "busy_ms": busy, "launches": sum(n for _, n in kernels.values()), "kernels": most}


def kernels_alone(machine: Machine, peak: dict[str, Any]) -> dict[str, Any]:
    """Each kernel of a step on the inputs of a real one."""
    return {str(batch): kernels_of(machine, case, peak) for batch, case in machine.cases.items()}


def kernels_of(machine: Machine, case: Case, peak: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each kernel, and the share of the copy rate that its bytes reach."""
    machine.reset()
    trainer = Ours(case, machine.device).trainer
    x = inputs(case, 1, machine.device)[0]
    for _ in range(3):
        trainer.train_step(x)
    coder, adam, copies = trainer.crosscoder, trainer.adam, trainer.adam.copies
    norms = coder.norm_sums()
    read = x.flatten(1).to(copies["encoder"].dtype)
    raw = matmul(read, copies["encoder"].T)
    encoded = coder.encoded(raw, norms, trainer.guess)
    code, _ = coder.rule.select(encoded, trainer.mesh)
    limits = trainer.guess / norms - coder.encoder_bias
    gradient = coder.decode(code).flatten(1).to(read.dtype)
    dense = torch.randn_like(coder.encoder)
    scale = torch.ones((), device=machine.device)
    pairs, columns, weights = len(code.values), N_SOURCES * case.d_model, coder.encoder.numel()

    def order() -> object:
        return SparseCode(code.token, code.latent, code.values, code.n_tokens, code.n_latents).by_latent

    def update() -> None:
        moments = adam.first["encoder"], adam.second["encoder"]
        gpu.kernels().adam(coder.encoder, dense, *moments, copies["encoder"], scale, 1e-9, 5, 0)

    works: dict[str, tuple[Callable[[], object], float]] = {
        "encoder's product": (lambda: matmul(read, copies["encoder"].T), 2 * weights + 4 * raw.numel()),
        "decoder's norms": (coder.norms, 4 * weights),
        "candidates of the selection": (lambda: above(raw, limits).positions(), 2 * 4 * raw.numel()),
        "the whole selection": (lambda: coder.rule.select(encoded, trainer.mesh), 2 * 4 * raw.numel()),
        "order by latent": (order, 64 * pairs),
        "decode": (lambda: code.decode(copies["decoder"]), 2 * pairs * columns + 4 * case.batch * columns),
        "dots and decoder's gradient": (
            lambda: code.dot_and_accumulate(gradient, copies["decoder"]), 2 * pairs * columns + 6 * weights,
        ),
        "encoder's gradient": (lambda: code.accumulate(code.values, read), 2 * pairs * columns + 4 * weights),
        "norm of a gradient": (lambda: torch.linalg.vector_norm(dense), 4 * weights),
        "Adam of one matrix": (update, 30 * weights),
    }  # fmt: skip
    rows: dict[str, Any] = {}
    for name, (work, n_bytes) in works.items():
        milliseconds = machine.milliseconds(work, 10)
        rows[name] = {"ms": milliseconds, "share_of_copy_rate": n_bytes / milliseconds * 1e3 / peak["bytes"]}
    if machine.device.type == "cuda":
        rows["tiles"] = tiles(machine, code, copies, gradient, read)
    return rows


def tiles(machine: Machine, code: Any, copies: dict[str, torch.Tensor], gradient: torch.Tensor, read: torch.Tensor) -> Any:
    """Milliseconds of the sums of rows with other tiles: decode, dots and decoder's gradient, encoder's gradient."""
    module, found = gpu.kernels(), {}
    before = (module.COLUMNS, module.ROWS, module.WARPS)
    for tile in ((512, 4, 1), (512, 8, 2), (512, 2, 1), (1024, 4, 4), (1024, 2, 2), (512, 4, 2), (256, 8, 1), (2048, 2, 4)):
        module.COLUMNS, module.ROWS, module.WARPS = tile
        found[str(tile)] = [
            round(machine.milliseconds(work, 5), 3)
            for work in (
                lambda: code.decode(copies["decoder"]),
                lambda: code.dot_and_accumulate(gradient, copies["decoder"]),
                lambda: code.accumulate(code.values, read),
            )
        ]
    module.COLUMNS, module.ROWS, module.WARPS = before
    return found


def dense(machine: Machine) -> dict[str, Any]:
    """The step of dense autograd with bfloat16 autocast."""
    rows = {}
    for batch, case in machine.cases.items():
        machine.reset()
        stepper = Dense(case, machine.device)
        with torch.autocast(machine.device.type, torch.bfloat16):
            rows[str(batch)] = {"ms": timed_steps(machine, case, stepper, 5), "gb": machine.peak_gb()}
        del stepper
    return rows


def training(machine: Machine) -> dict[str, Any]:
    """A small diff of the embedded pair whose crosscoder is trained and analysed on the CPU, and one on the device.

    Both read the same store. The trainings differ by rounding alone, which moves single latents, not what is found.
    """
    few, many = (20, 120) if machine.tiny else (400, 3000)
    settings = {
        "base": "demo:base", "chat": "demo:chat", "layer": 2,
        "dataset": [
            {"path": "demo:plain", "max_documents": few, "heldout_share": 0.2},
            {"path": "demo:chat_train", "max_documents": many, "heldout_share": 0.2},
        ],
        "crosscoders": {"batchtopk": {
            "sparsity": {"kind": "batchtopk", "k": 32}, "n_latents": 256 if machine.tiny else 1024, "epochs": 1, "seeds": 1,
            "warmup_steps": 5 if machine.tiny else 100,
        }},
        "analyze": {"blocks": 5},
    }  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "settings.yaml").write_text(json.dumps(settings))
        crossdiff = [sys.executable, "-m", "crossdiff"]
        harvest = [*crossdiff, "harvest", "cpu", "--config", "settings.yaml", "--device", "cpu"]
        subprocess.run(harvest, cwd=folder, check=True, capture_output=True)
        shutil.copytree(folder / "cpu", folder / "device")
        for run, device in (("cpu", "cpu"), ("device", machine.device.type)):
            started = time.perf_counter()
            command = [*crossdiff, "analyze", run, "--device", device]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
            heldout = json.loads((folder / run / "batchtopk" / "health.json").read_text())["heldout"]
            verdicts = pl.read_parquet(folder / run / "batchtopk" / "latents.parquet")["verdict"].value_counts()
            found[run] = {
                "seconds": time.perf_counter() - started, "fve": heldout["fve"]["total"],
                "fve_interval": heldout["fve_interval"]["total"], "l0": heldout["l0"], "verdicts": dict(verdicts.iter_rows()),
            }  # fmt: skip
    return found


def harvests(machine: Machine) -> dict[str, Any]:
    """Harvests of random pairs of Gemma 2 2B's size, in times of their forward passes."""
    if machine.tiny:
        sizes = Sizes(32, 2, 64, 2, 1, 16, 4096)
        return dict(measure_on_device(machine.device, 60, batch_tokens=256, n_batches=3, max_length=64, sizes=sizes))
    machine.reset()
    return dict(measure_on_device(machine.device, 45))


def scaling(machine: Machine) -> dict[str, Any]:
    """Latent scaling of all latents, all targets along both directions, in encodes of the same tokens on the device."""
    d_model, n_latents, l0, batch, n_chunks = (24, 96, 3, 64, 2) if machine.tiny else (2304, 73_728, 100, 8192, 4)
    coder, store = make(batch * n_chunks, d_model, n_latents, l0, machine.device)
    chosen = [store.gather(rows).to(machine.device) for rows in np.array_split(store.rows(), n_chunks)]
    accumulator = ScalingAccumulator(coder, 1)

    def encoding() -> None:
        for h in chosen:
            encode(coder, coder.normalise(h))

    def measuring() -> None:
        for h in chosen:
            rows = np.arange(len(h))
            accumulator.add(coded(coder, store, Read(0, rows, torch.zeros(len(h), dtype=torch.int64), rows[:1], h)))

    alone, both = machine.milliseconds(encoding, 5), machine.milliseconds(measuring, 5)
    n_tokens = sum(map(len, chosen))
    return {
        "encode_ms": alone, "scaling_ms": both, "encodes": both / alone, "tokens_per_s": 1e3 * n_tokens / both,
        "l0": len(encode(coder, coder.normalise(chosen[0])).values) / len(chosen[0]),
    }  # fmt: skip


PARTS: dict[str, Callable[[Machine, dict[str, Any]], Any]] = {
    "correct": lambda machine, found: correct(machine),
    "peaks": lambda machine, found: peaks(machine),
    "step": lambda machine, found: step(machine, found["peaks"]),
    "kernels": lambda machine, found: kernels_alone(machine, found["peaks"]),
    "dense": lambda machine, found: dense(machine),
    "training": lambda machine, found: training(machine),
    "harvest": lambda machine, found: harvests(machine),
    "scaling": lambda machine, found: scaling(machine),
}


def table(found: dict[str, Any]) -> str:
    """The rows of docs/performance.md."""
    steps, dense = found.get("step", {}), found.get("dense", {})
    lines = ["| batch | ms | tokens/s | times the limit | times as fast as dense autograd | GB |", "|---|---|---|---|---|---|"]
    for name, row in steps.items() if "failed" not in steps else ():
        against = dense.get(name, {}).get("ms")
        ratio = "" if against is None else f"{against / row['ms']:.1f}"
        lines.append(
            f"| {name} | {row['ms']:.2f} | {row['tokens_per_s']:,.0f} | {row['over_limit']:.2f} | {ratio} | {row['gb']:.1f} |"
        )
    kernels = found.get("kernels", {})
    for batch, rows in kernels.items() if "failed" not in kernels else ():
        lines += ["", f"| kernel, batch {batch} | ms | share of the copy rate |", "|---|---|---|"]
        timed = {name: row for name, row in rows.items() if "share_of_copy_rate" in row}
        lines += [f"| {name} | {row['ms']:.3f} | {row['share_of_copy_rate']:.0%} |" for name, row in timed.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        raise SystemExit("there is no GPU here; --tiny checks that the script works")
    machine = Machine(device, args.tiny)
    found: dict[str, Any] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [part for part in PARTS if part in {*args.only, "peaks"}]:
        started = time.perf_counter()
        try:
            found[name] = PARTS[name](machine, found)
        except Exception:  # the other parts can still say something
            traceback.print_exc()
            found[name] = {"failed": traceback.format_exc()}
        print(f"\n{name}: {time.perf_counter() - started:.0f} s", flush=True)
        print(json.dumps(found[name], indent=1), flush=True)
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1))
    print(f"\n{table(found)}", flush=True)
    if any("failed" in part for part in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
