"""Fine-tune a small chat model on the embedded pair's conversations, on a CPU.

    python recipes/smollm2/tune.py SmolLM2-135M-Instruct.gguf runs/smollm2-tuned

The model is a folder, a Hub name or a GGUF file. The loss counts the assistant's tokens alone. It prints the loss on held-out
conversations before and after.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from crossdiff.activations.passes import right_padded
from crossdiff.config import DatasetConfig
from crossdiff.models.loading import load_model, load_tokenizer
from crossdiff.pairs import demo_path
from crossdiff.text.chat import Flag
from crossdiff.text.documents import read_documents
from crossdiff.text.sequences import TokenSequence, tokenise


def conversations(tokenizer: object, name: str, max_length: int, n: int) -> list[TokenSequence]:
    """The first n conversations of an embedded dataset that fit, in a fixed random order."""
    documents = list(read_documents([DatasetConfig(path=str(demo_path(name)), heldout_share=0)]))
    random.Random(0).shuffle(documents)
    found: list[TokenSequence] = []
    for document in documents:
        (sequence,) = tokenise(document, tokenizer, max_length + 1)  # type: ignore[arg-type]
        if len(sequence.token_ids) <= max_length:
            found.append(sequence)
        if len(found) == n:
            break
    return found


def answer_loss(model: nn.Module, batch: list[TokenSequence]) -> tuple[Tensor, int]:
    """Summed cross-entropy of the assistant's tokens, and their number."""
    ids, _ = right_padded([sequence.token_ids for sequence in batch])
    targets = torch.full_like(ids, -100)
    for row, sequence in enumerate(batch):
        answered = torch.from_numpy(np.flatnonzero(sequence.flags & Flag.ASSISTANT))
        targets[row, answered] = ids[row, answered]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    n_tokens = int((targets[:, 1:] != -100).sum())
    return cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten(), reduction="sum"), n_tokens


@torch.no_grad()
def heldout_loss(model: nn.Module, batches: list[list[TokenSequence]]) -> float:
    losses = [answer_loss(model, batch) for batch in batches]
    return float(sum(loss for loss, _ in losses)) / sum(n for _, n in losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="conversations a step")
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-4)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, torch.device("cpu")).requires_grad_(True)
    train = conversations(tokenizer, "demo:chat_train", args.max_length, args.steps * args.batch)
    heldout = conversations(tokenizer, "demo:chat_test", args.max_length, 24)
    held = [heldout[start : start + 8] for start in range(0, len(heldout), 8)]
    print(f"held-out loss of an answer's token before: {heldout_loss(model, held):.3f}", flush=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.95))
    started, n_tokens = time.monotonic(), 0
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 5, (args.steps - step) / (0.5 * args.steps))
        batch = train[step * args.batch : (step + 1) * args.batch]
        loss, n_answers = answer_loss(model, batch)
        (loss / n_answers).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        n_tokens += sum(len(sequence.token_ids) for sequence in batch)
        if step % 5 == 4:
            spent = time.monotonic() - started
            print(f"step {step + 1}: loss {loss.item() / n_answers:.3f}, {n_tokens / spent:.0f} tokens/s", flush=True)
    print(f"held-out loss after {n_tokens:,} tokens: {heldout_loss(model, held):.3f}", flush=True)
    # What transformers keeps of a GGUF file's quantisation would be saved, although the weights are no longer in it.
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(args.folder)  # type: ignore[operator]
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
