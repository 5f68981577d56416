"""Measures the overhead of patching over the forward passes that it needs in any case.

    python benchmarks/causal.py [--conversations 32] [--repeats 5]

Runs on the embedded pair, with the same number of arms as the package's list and a random crosscoder of 2,048 latents, about 30
of them active per token. The unavoidable passes are the lower halves of both models, the reference, and one upper half per arm,
all with the LM head only at the assistant's positions. Both sides alternate in one process, and their medians are compared.
Arms for single latents are omitted, because an arm that changes few sequences costs less than a full upper half.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from crossdiff.causal.conversations import pad, pad_column, span_of
from crossdiff.causal.interventions import Arm
from crossdiff.causal.patching import Patcher
from crossdiff.config import DatasetConfig, L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.latents.groups import GROUPS
from crossdiff.models.access import residuals_after
from crossdiff.models.pair import Pair, load_pair
from crossdiff.pairs import demo_path
from crossdiff.text.documents import read_documents
from crossdiff.text.sequences import TokenSequence, tokenise

LAYER, N_LATENTS, N_ARMS, ACTIVE, LIMIT = 3, 2048, 40, 30, 1.2


def conversations(pair: Pair, n: int) -> list[TokenSequence]:
    """Return the first conversations of the pair's test split."""
    dataset = DatasetConfig(path=str(demo_path("demo:chat_test")), max_documents=n)
    return [sequence for document in read_documents([dataset]) for sequence in tokenise(document, pair.tokenizer, 256)]


def active_crosscoder(pair: Pair, batch: list[TokenSequence]) -> Crosscoder:
    """Random crosscoder whose biases leave `ACTIVE` latents active per token of the batch."""
    ids, mask = pad(batch, 0, torch.device("cpu"))
    h = torch.stack([residuals_after(model, ids, [LAYER])[0][mask.bool()] for model in pair.models], dim=1)
    mean = h.mean(0)
    scale = float((h.shape[2] / (h - mean).square().sum(2).mean()) ** 0.5)
    coder = new_crosscoder(N_LATENTS, mean, scale, L1Config(), 1.0, seed=0)
    coder.decoder += 0.3 * torch.randn(coder.decoder.shape, generator=torch.Generator().manual_seed(1))
    pre = coder.pre_activations(coder.normalise(h))
    coder.encoder_bias -= torch.quantile(pre[:500], 1 - ACTIVE / N_LATENTS, dim=0)
    return coder


def arms() -> tuple[Arm, ...]:
    """Arms that patch half of the latents, like most arms of the list, and arms that patch entire differences."""
    generator = torch.Generator().manual_seed(2)
    halves = [
        tuple(sorted(torch.randperm(N_LATENTS, generator=generator)[: N_LATENTS // 2].tolist())) for _ in range(N_ARMS - 4)
    ]
    whole = [("none", (), ()), ("all", None, ()), ("error", (), ("error",)), ("full", (), ("activation",))]
    every = [(f"half_{index}", half, ()) for index, half in enumerate(halves)]
    return tuple(Arm(name, name, latents, None, others, "all", "chat") for name, latents, others in [*whole, *every])


def unavoidable(patcher: Patcher, batch: list[TokenSequence]) -> None:
    """Run only the unavoidable forward passes."""
    ids, mask = pad(batch, 0, torch.device("cpu"))
    predicts = pad_column([span_of(sequence.flags) for sequence in batch], -1, torch.device("cpu")) >= 0
    _, chat = (residuals_after(model, ids, [LAYER])[0] for model in patcher.pair.models)
    for _ in range(1 + len(patcher.arms)):
        patcher.upper["chat"].logits(chat, ids, mask, predicts)


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pair = load_pair("demo:base", "demo:chat", torch.device("cpu"))
    batch = conversations(pair, args.conversations)
    patcher = Patcher(pair, active_crosscoder(pair, batch), LAYER, arms(), torch.zeros(len(GROUPS) + 1, pair.d_model), 1)
    unavoidable(patcher, batch)
    pairs = [
        (seconds(lambda: unavoidable(patcher, batch)), seconds(lambda: patcher.measure(batch))) for _ in range(args.repeats)
    ]
    bare, whole = (statistics.median(side) for side in zip(*pairs, strict=True))
    n_tokens = sum(len(sequence.token_ids) for sequence in batch)
    print(f"{len(batch)} conversations, {n_tokens} tokens, {len(patcher.arms)} arms, CPU seconds, medians of {args.repeats}")
    print(f"unavoidable forward passes {bare:.2f} s, patching {whole:.2f} s, ratio {whole / bare:.3f} (limit {LIMIT})")


if __name__ == "__main__":
    main()
