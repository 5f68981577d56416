"""Pretrain the base model from scratch on the packed plain text. Run it again after an interruption to resume.

    python pretrain.py WORK [--tokens 15e6]

Reads WORK/tokenizer, WORK/train.npy and WORK/heldout.npy. Writes WORK/pretrain.pt (checkpoint, every ten minutes),
WORK/pretrain.jsonl (log) and, at the end, WORK/base. Muon updates the matrices, AdamW the embeddings and norms. The learning
rate has a linear warm-up, then is constant, and decays linearly over the last 60% of the tokens.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimiser import Muon, save_checkpoint

CONTEXT, BATCH, MICRO_BATCH = 256, 32, 8
PEAK_RATE, WEIGHT_DECAY, WARMUP_STEPS, DECAY_SHARE = 5e-3, 0.05, 40, 0.6
CHECKPOINT_SECONDS = 600


def new_model(vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def loss_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def rows(tokens: np.ndarray) -> Tensor:
    """Cut a token stream into `[sequence, position]` rows of one context each."""
    n = len(tokens) // CONTEXT
    return torch.from_numpy(tokens[: n * CONTEXT].astype(np.int64)).view(n, CONTEXT)


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, heldout: Tensor) -> float:
    return float(np.mean([loss_of(model, batch).item() for batch in heldout.split(MICRO_BATCH)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=float, default=15e6)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: a third faster, but a minute to start")
    args = parser.parse_args()
    work: Path = args.work
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    train, heldout = rows(np.load(work / "train.npy")), rows(np.load(work / "heldout.npy"))[:160]
    n_steps = round(args.tokens / (BATCH * CONTEXT))
    generator = torch.Generator().manual_seed(0)
    epochs = -(-n_steps * BATCH // len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)])

    torch.manual_seed(0)
    model = new_model(len(tokenizer))
    named = [(name, p) for name, p in model.named_parameters()]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    optimisers = [
        Muon(matrices, lr=PEAK_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    step, checkpoint = 0, work / "pretrain.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, steps {step} to {n_steps}", flush=True)

    forward = torch.compile(model) if args.compile else model

    def save() -> None:
        save_checkpoint(checkpoint, step=step, model=model.state_dict(), optimisers=[o.state_dict() for o in optimisers])

    started, saved_at, first_step, losses = time.time(), time.time(), step, []
    with (work / "pretrain.jsonl").open("a") as log:
        while step < n_steps:
            left = 1 - step / n_steps
            rate = PEAK_RATE * min((step + 1) / WARMUP_STEPS, 1.0, left / DECAY_SHARE)
            batch = train[order[step * BATCH : (step + 1) * BATCH]]
            for micro in batch.split(MICRO_BATCH):
                loss = loss_of(forward, micro) * len(micro) / len(batch)
                loss.backward()
                losses.append(loss.item() * len(batch) / len(micro))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.step()
                optimiser.zero_grad()
            step += 1
            if step % 20 == 0 or step == n_steps:
                speed = (step - first_step) * BATCH * CONTEXT / (time.time() - started)
                record = {"step": step, "tokens": step * BATCH * CONTEXT, "train_loss": round(float(np.mean(losses)), 4)}
                if step % 100 == 0 or step == n_steps:
                    record["heldout_loss"] = round(heldout_loss(forward, heldout), 4)
                left_minutes = (n_steps - step) * BATCH * CONTEXT / speed / 60
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(json.dumps(record), f"{speed:.0f} tokens/s, {left_minutes:.0f} minutes left", flush=True)
                losses = []
            if time.time() - saved_at > CHECKPOINT_SECONDS:
                save()
                saved_at = time.time()
    save()
    model.eval().half().save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")


if __name__ == "__main__":
    main()
