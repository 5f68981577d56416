"""Measures the cost of the analysis: latent scaling against the published method, and the passes against one encode.

    python benchmarks/latent_scaling.py            # d_model 576, 8,192 latents, 20,480 tokens
    python benchmarks/latent_scaling.py --help

Prints ratios of CPU time, which other processes on the machine disturb less than wall time. Each is the median over rounds in
which the two sides are measured one after the other:

(a) The published method of latent scaling over our pass. For 128 latents at a time it computes the error targets of every
    token, latent and source, multiplies them with the directions and sums. It is measured on one group of latents and a
    sample of the tokens, and extrapolated to all of them. The other targets, which the published code computes separately,
    and its encoding of the tokens for each group are not counted. A second number is for the same without any copies
    other than the targets.
(b) The pass of latent scaling over one encode of the same tokens.
(c) The pass that collects and writes the examples over one encode, and (d) everything in one pass, as in `crossdiff analyze`.
    Examples are written once per run, so a measurement on few tokens would be misleading: the cost is measured on the codes
    of `--example-tokens` tokens, which are drawn rather than encoded, and divided by the encode of the same number of tokens.

An encode is the normalisation, the pre-activations, and the selection of the active pairs. Only the passes include reading
the store.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.store import COLUMNS, Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.activity import Activity
from crossdiff.latents.example_collector import ExampleCollector
from crossdiff.latents.example_database import write_examples
from crossdiff.latents.groups import Cells
from crossdiff.latents.scaling import ScalingAccumulator, scaling
from crossdiff.latents.stream import Chunk, accumulate, encode

LENGTH, GROUP, SAMPLE = 256, 128, 512
CPU = torch.device("cpu")
PAIR = {"base": "synthetic", "chat": "synthetic"}


class SyntheticStore(Store):
    """A store in memory, with sequences of `LENGTH` tokens, one document each, and activations in float16."""

    def __init__(self, activations: torch.Tensor) -> None:
        n_tokens, n_sources, d_model = activations.shape
        number = torch.arange(n_tokens)
        columns = {name: torch.zeros(n_tokens, dtype=dtype) for name, dtype in COLUMNS.items()}
        columns["document"] = columns["sequence"] = (number // LENGTH).int()
        columns["position"] = (number % LENGTH).int()
        columns["token_id"] = torch.randint(0, 32_000, (n_tokens,), dtype=torch.int32)
        n_documents = -(-n_tokens // LENGTH)
        self.folder = Path("synthetic")
        self.manifest = {
            "n_tokens": n_tokens, "d_model": d_model, "layer": 0, "sources": ["base", "chat"][:n_sources], "leave_out": 1,
            "pair": PAIR, "shards": [{"n_tokens": n_tokens}],
        }  # fmt: skip
        self.shards, self.activations = [columns], [activations]
        self.documents = pl.DataFrame({
            "document": range(n_documents), "dataset": ["synthetic"] * n_documents, "label": [None] * n_documents,
            "split": ["heldout" if i % 5 == 0 else "train" for i in range(n_documents)],
        })  # fmt: skip

    def gather(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        return self.activations[0][torch.from_numpy(rows)].float()


class Words:
    """The part of a tokenizer that the examples need."""

    def decode(self, ids: list[int]) -> str:
        return f" {ids[0]}"


def frequencies(n_latents: int, l0: float) -> torch.Tensor:
    """Log-normal frequencies, roughly like those of trained crosscoders, with `l0` active latents per token on average."""
    spread = torch.exp(torch.randn(n_latents))
    return (spread * l0 / spread.sum()).clamp(max=0.5)


def make(n_tokens: int, d_model: int, n_latents: int, l0: int, device: torch.device = CPU) -> tuple[Crosscoder, SyntheticStore]:
    """Sparse mixtures of random directions with noise, and a crosscoder of these directions with a threshold for this L0."""
    torch.manual_seed(0)
    with device:
        decoder = torch.randn(n_latents, 2 * d_model)
        decoder *= 2**0.5 / decoder.norm(dim=1, keepdim=True)
        often = frequencies(n_latents, l0)
        parts = []
        for first in range(0, n_tokens, 4096):
            n = min(4096, n_tokens - first)
            f = (torch.rand(n, n_latents) < often) * (1 + torch.rand(n, n_latents))
            parts.append((f @ decoder + 0.05 * torch.randn(n, 2 * d_model)).view(n, 2, d_model).half())
        crosscoder = Crosscoder(
            encoder=decoder / 2, encoder_bias=torch.full((n_latents,), -0.2), decoder=decoder,
            decoder_bias=torch.zeros(2 * d_model), mean=torch.zeros(2, d_model), scale=1.0, sparsity=BatchTopKConfig(k=l0),
            origin={"pair": PAIR, "layer": 0},
        )  # fmt: skip
        v = crosscoder.pre_activations(parts[0].float()[:1024]) * crosscoder.norm_sums()
    crosscoder.threshold = float(v.flatten().topk(1024 * l0).values.min())
    return crosscoder, SyntheticStore(torch.cat([part.cpu() for part in parts]))


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of all threads."""
    before = time.process_time()
    work()
    return time.process_time() - before


def encode_seconds(crosscoder: Crosscoder, store: Store, batch_tokens: int) -> float:
    """CPU seconds of one encode of all analysed tokens, without reading them."""
    seconds, rows = 0.0, store.rows()
    for part in np.array_split(rows, max(1, len(rows) // batch_tokens)):
        h = store.gather(part)
        seconds += timed(lambda h=h: encode(crosscoder, crosscoder.normalise(h)))
    return seconds


def scaling_pass(crosscoder: Crosscoder, store: Store, config: AnalyzeConfig) -> None:
    """Run latent scaling for all targets and latents, with the estimates along both directions."""
    accumulator = ScalingAccumulator(crosscoder, config.blocks)
    accumulate([(crosscoder, [accumulator])], store, config.blocks, config.batch_tokens)
    for direction in (0, 1):
        scaling(crosscoder, accumulator.sums, direction, 1 - direction, direction)


def whole_pass(crosscoder: Crosscoder, store: Store, config: AnalyzeConfig) -> None:
    """Run scaling, activity and the collection of examples in one pass."""
    cells = Cells(pl.DataFrame({"dataset": ["synthetic"], "group": ["plain"]}), np.zeros(store.n_tokens, dtype=np.int64))
    accumulators = (
        ScalingAccumulator(crosscoder, config.blocks),
        Activity.empty(cells, crosscoder.n_latents),
        ExampleCollector(store, crosscoder.n_latents, config),
    )
    accumulate([(crosscoder, accumulators)], store, config.blocks, config.batch_tokens)


def published_seconds(crosscoder: Crosscoder, store: Store) -> tuple[float, float]:
    """CPU seconds to materialise the error targets of all latents and sources, extrapolated from a group and a sample.

    The first number is for all tensors that the published code creates, the second for the targets alone. Computes, for `GROUP`
    latents at a time, the targets h - (hhat - f d) of `SAMPLE` tokens `[latent, token, d_model]`, and <sum f y, d_chat> of
    these. The cost per token and latent does not depend on their number. The encoding and decoding, which the published code
    repeats for each group, are not counted.
    """
    x = crosscoder.normalise(store.gather(store.rows()[:SAMPLE]))
    code = crosscoder.sparse_code(x)
    reconstruction = crosscoder.decode(code)
    f = torch.zeros(SAMPLE, crosscoder.n_latents)
    f[code.token, code.latent] = code.values
    f = f[:, :GROUP].T.unsqueeze(2).contiguous()
    directions = crosscoder.directions()[:, :GROUP]

    def products(target: torch.Tensor, weights: torch.Tensor, active: torch.Tensor) -> None:
        torch.matmul(target.transpose(1, 2), weights).squeeze(2).mul(directions[1, active]).sum(1)

    def as_published() -> None:
        for source in (0, 1):
            stacked = reconstruction[:, source].unsqueeze(0).repeat(GROUP, 1, 1)
            own = directions[source].unsqueeze(1).repeat(1, SAMPLE, 1) * f
            target = x[:, source] - (stacked - own)
            active = (f != 0).any(1).squeeze(1)
            products(target[active], f[active], active)

    def lean() -> None:
        for source in (0, 1):
            target = (x - reconstruction)[:, source] + f * directions[source].unsqueeze(1)
            products(target, f, torch.ones(GROUP, dtype=torch.bool))

    times = len(store.rows()) / SAMPLE * crosscoder.n_latents / GROUP
    return timed(as_published) * times, timed(lean) * times


def drawn_chunks(n_tokens: int, often: torch.Tensor, batch_tokens: int) -> Iterator[Chunk]:
    """Yield chunks that contain only codes, with frequencies `often`. Latents are active on neighbouring tokens, as in text."""
    n_latents, nothing = len(often), torch.empty(0, 0)
    for first in range(0, n_tokens, batch_tokens):
        n = min(batch_tokens, n_tokens - first)
        starts = torch.poisson(often * n / 2).long()
        latent = torch.repeat_interleave(torch.arange(n_latents), starts).repeat(2)
        token = torch.randint(0, n - 1, (len(latent) // 2,))
        flat = torch.unique(torch.cat([token, token + 1]) * n_latents + latent)
        code = SparseCode(flat // n_latents, flat % n_latents, 1 + torch.rand(len(flat)), n, n_latents)
        rows = np.arange(first, first + n)
        sequence = torch.from_numpy(rows // LENGTH - first // LENGTH)
        yield Chunk(
            block=0, rows=rows, sequence=sequence, numbers=np.unique(rows // LENGTH), x=nothing, code=code, v=code.values,
            reconstruction=nothing, error=nothing, h=nothing.unsqueeze(1),
        )  # fmt: skip


def examples_seconds(n_tokens: int, n_latents: int, l0: int, config: AnalyzeConfig) -> tuple[float, float, int, int]:
    """Seconds to collect and to write the examples of drawn codes, number of active pairs, and bytes of the database."""
    store = SyntheticStore(torch.empty(n_tokens, 2, 0))
    collector = ExampleCollector(store, n_latents, config)
    collecting, pairs = 0.0, 0
    for chunk in drawn_chunks(n_tokens, frequencies(n_latents, l0), config.batch_tokens):
        collecting += timed(lambda chunk=chunk: collector.add(chunk))
        pairs += len(chunk.code.values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "examples.sqlite"
        writing = timed(lambda: write_examples(path, *collector.finish(), store, Words(), n_latents))
        return collecting, writing, pairs, path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--example-tokens", type=int, default=1_000_000)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--l0", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = AnalyzeConfig()
    crosscoder, store = make(args.tokens, args.d_model, args.latents, args.l0)
    n_counted = len(store.rows())
    rounds: list[tuple[float, float, float, float, float]] = []
    for _ in range(args.rounds):
        encode = encode_seconds(crosscoder, store, config.batch_tokens)
        one = timed(lambda: scaling_pass(crosscoder, store, config))
        everything = timed(lambda: whole_pass(crosscoder, store, config))
        published, lean = published_seconds(crosscoder, store)
        rounds.append((encode, one, everything, published, lean))
        print(
            f"round: encode {encode:.1f} s, scaling {one:.1f} s, whole pass {everything:.1f} s, "
            f"published {published:.0f} s (lean {lean:.0f} s)"
        )
    published, lean, scaling_alone, everything = (
        statistics.median(row[upper] / row[lower] for row in rounds) for upper, lower in ((3, 1), (4, 1), (1, 0), (2, 0))
    )
    collecting, writing, pairs, size = examples_seconds(args.example_tokens, args.latents, args.l0, config)
    encode_as_many = statistics.median(row[0] for row in rounds) * args.example_tokens / n_counted
    examples = 1 + (collecting + writing) / encode_as_many
    print(f"{n_counted:,} tokens, d_model {args.d_model}, {args.latents:,} latents, L0 {args.l0}, {args.threads} thread(s)")
    print(f"(a) published / scaling pass, extrapolated   {published:8.0f}   target >= 300")
    print(f"    without copies other than the targets    {lean:8.0f}")
    print(f"(b) scaling pass / encode                    {scaling_alone:8.2f}   target <= 1.8")
    print(f"(c) examples pass / encode                   {examples:8.2f}   target <= 2")
    print(f"    {args.example_tokens:,} tokens, {pairs:,} active pairs, {size / 1e6:.0f} MB of examples")
    print(f"    {collecting:.1f} s to collect, {writing:.1f} s to select and write; one encode {encode_as_many:.0f} s")
    print(f"(d) all in one pass / encode                 {everything:8.2f}   (without writing)")


if __name__ == "__main__":
    main()
