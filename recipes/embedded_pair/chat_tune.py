"""Fine-tune all weights of the base model on the conversations. Run it again after an interruption to resume.

    python chat_tune.py BASE_DIR WORK [--rate 5e-4] [--epochs 2.5] [--replay 0.25] [--anchor 1.0] [--name chat]

Reads WORK/mixture.jsonl.gz (see `conversations.py`), WORK/train.npy and WORK/heldout.npy. Writes WORK/NAME.pt (checkpoint,
every five minutes), WORK/NAME.jsonl (log) and, at the end, WORK/NAME (float16 weights and the tokenizer).

The loss counts the assistant's tokens and the <|end|> that closes them. A share of the batches is plain text from
pretraining, with the next-token loss or, with `--anchor W`, W times KL(base || chat) of the next-token distributions. This
keeps the chat model close to the base model on text that is not a conversation. `--null` trains only on plain text, for the
same number of steps at the same rate, as a control: it shows what further training changes by itself.
"""

import argparse
import gzip
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from optimiser import Muon, save_checkpoint
from pretrain import CONTEXT, heldout_loss, loss_of, rows

BATCH_TOKENS = 4096  # padding included
REPLAY_ROWS = BATCH_TOKENS // CONTEXT
BUCKET_ROWS = 1024  # rows that are sorted by length before they are split into batches
IGNORED = -100
HELDOUT_ROWS, LOG_STEPS, HELDOUT_STEPS = 40, 20, 100


@dataclass(frozen=True)
class Settings:
    """The settings that determine the weights. A checkpoint with other settings is not resumed."""

    rate: float
    epochs: float
    replay: float
    anchor: float
    warmup: int
    weight_decay: float
    optimiser: str
    null: bool
    seed: int
    inputs: str  # fingerprint of the mixture and the base model


class Conversations(NamedTuple):
    """Token ids, mask of the assistant's tokens, and weight of each conversation."""

    ids: list[list[int]]
    spoken: list[list[int]]
    weights: list[float]


def read_mixture(path: Path, tokenizer: PreTrainedTokenizerFast) -> Conversations:
    with gzip.open(path, "rt", encoding="utf8") as lines:
        mixture = [json.loads(line) for line in lines]
    encoded = tokenizer.apply_chat_template(
        [row["messages"] for row in mixture], return_dict=True, return_assistant_tokens_mask=True
    )
    return Conversations(encoded["input_ids"], encoded["assistant_masks"], [row["weight"] for row in mixture])


def fingerprint(mixture: Path, base_dir: Path) -> str:
    with gzip.open(mixture, "rb") as file:
        digest = hashlib.sha256(file.read())
    digest.update((base_dir / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def epoch_batches(conversations: Conversations, rng: np.random.Generator) -> list[list[int]]:
    """Repeat each row according to its weight (a fraction is a probability), in randomly ordered batches of similar lengths."""
    copies = [int(weight) + (rng.random() < weight % 1) for weight in conversations.weights]
    order = rng.permutation(np.repeat(np.arange(len(copies)), copies))
    lengths = [len(ids) for ids in conversations.ids]
    batches: list[list[int]] = []
    for start in range(0, len(order), BUCKET_ROWS):
        batch: list[int] = []
        for row in sorted(order[start : start + BUCKET_ROWS].tolist(), key=lengths.__getitem__):
            if batch and lengths[row] * (len(batch) + 1) > BATCH_TOKENS:  # rows are sorted: this one is the longest
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
    return [batches[i] for i in rng.permutation(len(batches))]


def plan(conversations: Conversations, settings: Settings) -> list[list[int] | None]:
    """The rows of every step's batch, or None for a step on plain text. Depends only on the settings."""
    rng = np.random.default_rng(settings.seed)
    chat: list[list[int]] = []
    left = settings.epochs
    while left > 0:
        batches = epoch_batches(conversations, rng)
        chat += batches[: round(min(left, 1.0) * len(batches))]
        left -= 1
    n_steps = round(len(chat) / (1 - settings.replay))
    steps: list[list[int] | None] = []
    for step in range(n_steps):
        is_chat = (step + 1) * len(chat) // n_steps > step * len(chat) // n_steps
        steps.append(chat[(step + 1) * len(chat) // n_steps - 1] if is_chat and not settings.null else None)
    return steps


def chat_loss(model: LlamaForCausalLM, conversations: Conversations, batch: list[int]) -> tuple[Tensor, int]:
    """Mean cross-entropy over the assistant's tokens, and the number of tokens in the batch, padding included.

    Padding is on the right, where causal attention does not see it, so no mask is needed.
    """
    longest = max(len(conversations.ids[row]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.full((len(batch), longest), IGNORED)
    for i, row in enumerate(batch):
        tokens = torch.tensor(conversations.ids[row])
        spoken = torch.tensor(conversations.spoken[row], dtype=torch.bool)
        ids[i, : len(tokens)] = tokens
        targets[i, : len(tokens)] = torch.where(spoken, tokens, IGNORED)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = targets[:, 1:]
    counted = targets != IGNORED
    return cross_entropy(model.lm_head(hidden[counted]), targets[counted]), ids.numel()


def anchor_loss(model: LlamaForCausalLM, base: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """KL(base || model) of the next-token distributions, mean over tokens, in nats."""
    with torch.no_grad():
        target = log_softmax(base(input_ids=ids, use_cache=False).logits, dim=-1)
    predicted = log_softmax(model(input_ids=ids, use_cache=False).logits, dim=-1)
    return kl_div(predicted.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")


def new_optimisers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    betas, decay = (0.9, 0.95), settings.weight_decay
    if settings.optimiser == "muon":
        return [
            Muon(matrices, lr=settings.rate, weight_decay=decay),
            torch.optim.AdamW(others, lr=settings.rate, betas=betas, weight_decay=0.0, fused=True),
        ]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=settings.rate, betas=betas, fused=True)]


def new_losses() -> dict[str, list[float]]:
    return {"chat_loss": [], "replay_loss": [], "anchor_kl": []}


class Run:
    """Model, optimisers and current step, with their checkpoint and log in WORK."""

    def __init__(self, base_dir: Path, work: Path, name: str, settings: Settings):
        self.model = LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32).train()
        self.optimisers = new_optimisers(self.model, settings)
        self.settings, self.step = settings, 0
        self.losses = new_losses()  # since the last record of the log
        self.checkpoint, self.log = work / f"{name}.pt", work / f"{name}.jsonl"
        if self.checkpoint.exists():
            self._resume()
        else:
            self.log.unlink(missing_ok=True)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"{self.checkpoint} is from a run with {state['settings']}, not {asdict(self.settings)}; "
                "remove it to start again, or choose another --name for this run"
            )
        self.step, self.losses = state["step"], state["losses"]
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        # Steps that were logged after the checkpoint are repeated.
        records = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= self.step]
        self.log.write_text("".join(kept))

    def save(self) -> None:
        states = [optimiser.state_dict() for optimiser in self.optimisers]
        save_checkpoint(
            self.checkpoint,
            step=self.step,
            losses=self.losses,
            settings=asdict(self.settings),
            model=self.model.state_dict(),
            optimisers=states,
        )

    def update(self, loss: Tensor, n_steps: int) -> None:
        """Make one step at the rate of the schedule: linear warm-up, then linear decay to zero."""
        warmed_up = (self.step + 1) / self.settings.warmup if self.settings.warmup else 1.0
        left = (n_steps - self.step) / max(n_steps - self.settings.warmup, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.settings.rate * min(warmed_up, left, 1.0)
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1


def train(run: Run, base_dir: Path, work: Path, conversations: Conversations, checkpoint_seconds: float) -> None:
    steps = plan(conversations, run.settings)
    plain, heldout = rows(np.load(work / "train.npy")), rows(np.load(work / "heldout.npy"))[:HELDOUT_ROWS]
    n_replays = sum(batch is None for batch in steps)
    # Rows are drawn again if there are more replay steps than text.
    generator = torch.Generator().manual_seed(run.settings.seed)
    rounds = -(-n_replays * REPLAY_ROWS // len(plain))
    order = torch.cat([torch.randperm(len(plain), generator=generator) for _ in range(max(rounds, 1))])
    anchor = None
    if run.settings.anchor:
        anchor = LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval().requires_grad_(False)
    print(f"steps {run.step} to {len(steps)}, {n_replays} of them on plain text", flush=True)

    n_replayed = sum(batch is None for batch in steps[: run.step])
    started = saved_at = time.time()
    n_tokens = 0
    with run.log.open("a") as log:
        while run.step < len(steps):
            batch = steps[run.step]
            if batch is not None:
                loss, batch_tokens = chat_loss(run.model, conversations, batch)
                run.losses["chat_loss"].append(loss.item())
            else:
                text = plain[order[n_replayed * REPLAY_ROWS : (n_replayed + 1) * REPLAY_ROWS]]
                n_replayed, batch_tokens = n_replayed + 1, text.numel()
                loss = loss_of(run.model, text) if anchor is None else anchor_loss(run.model, anchor, text)
                run.losses["replay_loss" if anchor is None else "anchor_kl"].append(loss.item())
                loss = loss if anchor is None else run.settings.anchor * loss
            run.update(loss, len(steps))
            n_tokens += batch_tokens
            last = run.step == len(steps)
            if run.step % LOG_STEPS == 0 or last:
                record: dict[str, float] = {"step": run.step}
                record |= {name: round(float(np.mean(values)), 4) for name, values in run.losses.items() if values}
                if run.step % HELDOUT_STEPS == 0 or last:
                    record["heldout_loss"] = round(heldout_loss(run.model, heldout), 4)
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(json.dumps(record), f"{n_tokens / (time.time() - started):.0f} tokens/s", flush=True)
                run.losses = new_losses()
            if time.time() - saved_at > checkpoint_seconds:
                run.save()
                saved_at = time.time()
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_dir", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--epochs", type=float, default=2.5, help="passes over the conversations, by weight")
    parser.add_argument("--replay", type=float, default=0.25, help="share of the batches with plain text")
    parser.add_argument("--anchor", type=float, default=0.0, metavar="W", help="W x KL(base || chat) on plain text")
    parser.add_argument("--warmup", type=int, default=40, help="number of warm-up steps")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--optimiser", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--null", action="store_true", help="train only on plain text, for the same number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="name of the results [chat, or null with --null]")
    parser.add_argument(
        "--compile", choices=["no", "yes"], default="no", help="torch.compile the model; rarely worth it, because shapes vary"
    )
    parser.add_argument("--checkpoint-seconds", type=float, default=300)
    args = parser.parse_args()
    if not 0 <= args.replay < 1:
        parser.error(f"--replay is {args.replay}; expected a share of at least 0 and below 1")
    if args.null and args.anchor:
        parser.error("--null trains with the next-token loss; omit --anchor")
    name = args.name or ("null" if args.null else "chat")
    mixture = args.work / "mixture.jsonl.gz"
    settings = Settings(
        rate=args.rate,
        epochs=args.epochs,
        replay=args.replay,
        anchor=args.anchor,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        optimiser=args.optimiser,
        null=args.null,
        seed=args.seed,
        inputs=fingerprint(mixture, args.base_dir),
    )
    tokenizer = AutoTokenizer.from_pretrained(args.base_dir)
    conversations = read_mixture(mixture, tokenizer)
    print(f"{len(conversations.ids)} conversations, {sum(map(len, conversations.ids))} tokens,", end=" ")
    print(f"{sum(map(sum, conversations.spoken))} of the assistant", flush=True)

    run = Run(args.base_dir, args.work, name, settings)
    if args.compile == "yes":
        run.model.model.compile(dynamic=True)
    train(run, args.base_dir, args.work, conversations, args.checkpoint_seconds)
    run.model.eval().half().save_pretrained(args.work / name)
    tokenizer.save_pretrained(args.work / name)


if __name__ == "__main__":
    main()
