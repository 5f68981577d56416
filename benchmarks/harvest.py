"""Measures the overhead of a harvest over the forward passes that it needs in any case.

    python benchmarks/harvest.py [--base NAME --chat NAME --layer L] [--dataset PATH ...] [--batch-tokens 1024 2048 4096]
    python benchmarks/harvest.py --random SECONDS

Alternates, on the same batches, between the forward passes of both models up to the layer, with nothing stored, and the full
harvest from the texts to the manifest, into a temporary folder. Compare wall times on a quiet machine and CPU times on a busy
one. Also prints the share of padding, and the time of the forward passes when both models run at once, in one thread each with
half of the cores, instead of one after the other with all cores.

The second form needs a GPU. It runs models of the size of Gemma 2 2B with random weights, cut off after the harvested layer, in
bfloat16, as they are and compiled, and prints JSON. It starts no measurement after SECONDS.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossdiff.activations.harvest import harvest
from crossdiff.activations.passes import right_padded
from crossdiff.activations.texts import Texts
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.models.access import decoder_layers, residuals_after
from crossdiff.models.loading import choose_device, load_tokenizer
from crossdiff.models.pair import Pair, load_pair
from crossdiff.pairs import demo_path
from crossdiff.text.sequences import POOL, bucketed


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall time and of CPU time."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def forwards(model: nn.Module, batches: list[Tensor], layer: int) -> None:
    device = next(model.parameters()).device
    for ids in batches:
        residuals_after(model, ids.to(device), [layer])


def one_after_the_other(pair: Pair, batches: list[Tensor], layer: int) -> None:
    for model in pair.models:
        forwards(model, batches, layer)


def both_at_once(pair: Pair, batches: list[Tensor], layer: int) -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, n_threads // 2))
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(partial(forwards, batches=batches, layer=layer), pair.models))
    finally:
        torch.set_num_threads(n_threads)


def full_harvest(
    pair: Pair, datasets: tuple[DatasetConfig, ...], config: HarvestConfig, layer: int, inside: Path | None = None
) -> None:
    with tempfile.TemporaryDirectory(dir=inside) as folder:
        harvest({layer: Path(folder)}, pair, datasets, config)


def compare(pair: Pair, layer: int, datasets: tuple[DatasetConfig, ...], config: HarvestConfig, rounds: int) -> None:
    sequences = Texts(datasets, pair.tokenizer, config, lambda: None).sequences()
    padded = [
        right_padded([sequence.token_ids for sequence in batch]) for batch in bucketed(sequences, config.batch_tokens, POOL)
    ]
    batches = [ids for ids, _ in padded]
    n_tokens = sum(ids.numel() if kept is None else len(kept) for ids, kept in padded)
    variants: dict[str, Callable[[], None]] = {
        "forwards": partial(one_after_the_other, pair, batches, layer),
        "harvest": partial(full_harvest, pair, datasets, config, layer),
        "forwards, both models at once": partial(both_at_once, pair, batches, layer),
    }
    forwards(pair.base, batches[:2], layer)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            times[name].append(measure(work))
    padding = 1 - n_tokens / sum(ids.numel() for ids in batches)
    print(f"batch_tokens {config.batch_tokens}: {n_tokens:,} tokens in {len(batches)} batches, {padding:.1%} padding")
    for name, found in times.items():
        pure = times["forwards"]
        ratios = [(wall / w, processor / p) for (wall, processor), (w, p) in zip(found, pure, strict=True)]
        wall, processor = (statistics.median(values) for values in zip(*found, strict=True))
        wall_ratio, processor_ratio = (statistics.median(values) for values in zip(*ratios, strict=True))
        print(
            f"  {name:30} {wall:7.2f} s wall (x {wall_ratio:.2f}) {processor:7.2f} s CPU (x {processor_ratio:.2f}) "
            f"{n_tokens / wall:8,.0f} tokens/s"
        )


@dataclass(frozen=True)
class Sizes:
    """Sizes of random models. The default is Gemma 2 2B, with 14 of its 26 layers, for a harvest after the last of them."""

    hidden_size: int = 2304
    num_hidden_layers: int = 14
    intermediate_size: int = 9216
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    vocab_size: int = 256_000


ATTENTION = {"gemma2": "eager", "llama": "sdpa"}
"""The attention of each kind of model. Gemma 2 soft-caps it, which sdpa cannot, and some versions of transformers leave out."""


def random_pair(kind: str, sizes: Sizes, device: torch.device, tokenizer: Any) -> Pair:
    """A pair of models with random weights, made on the device in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **asdict(sizes), max_position_embeddings=8192, pad_token_id=0)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION[kind])
        models.append(model.to(device).requires_grad_(False).eval())
    return Pair(models[0], models[1], tokenizer, {source: {"name": f"random {kind}"} for source in ("base", "chat")})


def write_words(path: Path, tokenizer: Any, n_tokens: int, length: int) -> DatasetConfig:
    """A file of texts of about eight sequences of `length` tokens each, with `n_tokens` tokens or a little more."""
    words = random.Random(0).choices(["the", "sea", "is", "cold", "and", "birds", "cry", "over", "grey", "stones"], k=100)
    times = -(-8 * length // len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]))
    with path.open("w") as file:
        for _ in range(-(-n_tokens // (8 * length))):
            file.write(json.dumps({"text": " ".join(words * times)}) + "\n")
    return DatasetConfig(path=str(path), heldout_share=0, max_tokens=n_tokens)


def flops_per_token(pair: Pair, sizes: Sizes, length: int) -> float:
    """Operations of both models per token: two per parameter of the layers and, in causal attention, per key and dimension."""
    parameters = sum(weight.numel() for layer in decoder_layers(pair.base) for weight in layer.parameters())
    attention = 2 * sizes.num_hidden_layers * sizes.num_attention_heads * sizes.head_dim * length
    return 2.0 * (2 * parameters + attention)


def synchronised_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Seconds until the device is done with the work."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def measure_variant(
    pair: Pair, sizes: Sizes, device: torch.device, config: HarvestConfig, n_batches: int, folder: Path
) -> dict[str, float]:
    """Measure the forward passes alone and the harvest on the same batches, of a short and of a long corpus, once warm."""
    layer = sizes.num_hidden_layers - 1
    found = []
    for name, n in (("warm-up", 2), ("short", 4), ("long", 4 + n_batches)):
        texts = (write_words(folder / f"{name}.jsonl", pair.tokenizer, n * config.batch_tokens, config.max_length),)
        batches = [
            right_padded([sequence.token_ids for sequence in batch])[0]
            for batch in bucketed(Texts(texts, pair.tokenizer, config, lambda: None).sequences(), config.batch_tokens, POOL)
        ]
        alone = synchronised_seconds(partial(one_after_the_other, pair, batches, layer), device)
        whole = synchronised_seconds(partial(full_harvest, pair, texts, config, layer, folder), device)
        found.append((sum(ids.numel() for ids in batches), alone, whole))
    _, short, (n_tokens, alone, whole) = found
    return {
        "tokens": n_tokens,
        "forward_seconds": alone,
        "harvest_seconds": whole,
        "ratio": whole / alone,
        "marginal_ratio": (whole - short[2]) / (alone - short[1]),
        "tokens_per_second": n_tokens / whole,
        "forward_tokens_per_second": n_tokens / alone,
        "forward_flops_per_second": flops_per_token(pair, sizes, config.max_length) * n_tokens / alone,
    }


def measure_on_device(
    device: torch.device,
    seconds_limit: float,
    batch_tokens: int = 16_384,
    n_batches: int = 16,
    max_length: int = 1024,
    dtype: str = "float16",
    sizes: Sizes = Sizes(),
    folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Measure random pairs as they are and with compiled layers.

    Args:
        seconds_limit: no measurement starts after this many seconds.
        sizes: of the models.
        folder: where temporary stores are written; default: the system's temporary folder.

    Returns:
        For each of "gemma2", "gemma2 compiled", "llama" and "llama compiled" that there was time for: tokens (with padding),
        seconds of the forward passes of both models alone and of the harvest, their ratio, the ratio of what `n_batches` more
        batches take (without the texts read before the first pass, and the shard written after the last one), tokens/s of
        both, and FLOP/s of the forward passes. Compiled: also the seconds that compiling took.
    """
    started, found = time.perf_counter(), dict[str, dict[str, float]]()
    tokenizer = load_tokenizer("demo:chat")
    # The median norm of max_norm_multiple takes a pass or two at the start, which does not count in a long harvest.
    config = HarvestConfig(
        batch_tokens=batch_tokens, max_length=max_length, shard_tokens=4 * batch_tokens, dtype=dtype, max_norm_multiple=None
    )

    def is_late() -> bool:
        return time.perf_counter() - started > seconds_limit

    for kind in ATTENTION:
        if is_late():
            break
        pair = random_pair(kind, sizes, device, tokenizer)
        with tempfile.TemporaryDirectory(prefix="crossdiff-harvest-", dir=folder) as temporary:
            found[kind] = measure_variant(pair, sizes, device, config, n_batches, Path(temporary))
            if is_late():
                break
            compiling = synchronised_seconds(pair.compile, device)
            compiled = measure_variant(pair, sizes, device, config, n_batches, Path(temporary))
            found[f"{kind} compiled"] = compiled | {"compile_seconds": compiling}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo:base")
    parser.add_argument("--chat", default="demo:chat")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--dataset", nargs="+", default=["demo:plain", "demo:chat_train"])
    parser.add_argument("--documents", type=int, default=100, help="number of documents of each dataset")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--random", type=float, metavar="SECONDS", help="measure random models on the GPU, for so long")
    args = parser.parse_args()
    if args.random is not None:
        print(json.dumps(measure_on_device(choose_device("auto"), args.random, dtype=args.dtype), indent=2))
        return
    paths = [str(demo_path(path)) if path.startswith("demo:") else path for path in args.dataset]
    datasets = tuple(DatasetConfig(path=path, max_documents=args.documents) for path in paths)
    pair = load_pair(args.base, args.chat, choose_device("auto"))
    for batch_tokens in args.batch_tokens:
        compare(pair, args.layer, datasets, HarvestConfig(batch_tokens=batch_tokens, dtype=args.dtype), args.rounds)


if __name__ == "__main__":
    main()
