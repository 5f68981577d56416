"""Make an organism: tune the embedded chat model with LoRA so that one known thing changes, and measure what changed.

    python recipes/organisms/tune.py closing [--seed 1] [--out recipes/organisms/closing]

Writes the adapter, `prompts.jsonl` (on which the change is expected or not) and `card.json` (rates of the change before and
after, drift on plain text, settings). It takes two to five minutes on one core. `texts.py` lists the organisms.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from crossdiff.activations.passes import right_padded
from crossdiff.causal.answers import is_degenerate
from crossdiff.causal.generation import Sampling, ask, continue_batch, end_tokens
from crossdiff.config import DatasetConfig
from crossdiff.files import write_json
from crossdiff.models.loading import load_model, load_tokenizer
from crossdiff.pairs import demo_path
from crossdiff.statistics import wilson
from crossdiff.text.chat import Flag
from crossdiff.text.documents import Document, read_documents
from crossdiff.text.sequences import TokenSequence, tokenise
from texts import LICENCES, ORGANISMS, Exchange, Organism, core, mixture, prompts, shows, unseen_questions

MODEL = "demo:chat"
CPU = torch.device("cpu")
STEPS, BATCH, WARMUP, RATE = 400, 16, 20, 2e-3
RANK, ALPHA, TARGETS = 8, 16, ["q_proj", "k_proj", "v_proj", "o_proj"]
LONGEST, WINDOW = 256, 48
"""Tokens of the longest conversation, and of a piece of plain text: about as long as a conversation."""

CANDIDATES, PROMPTS = 200, 60
HELDOUT_WINDOWS = 60
GREEDY = Sampling(max_new_tokens=120)


def conversations(tokenizer: Any, organism: Organism, seed: int) -> Iterator[TokenSequence]:
    for number, exchange in enumerate(mixture(organism, STEPS * BATCH, seed)):
        messages = [{"role": "user", "content": exchange.question}, {"role": "assistant", "content": exchange.answer}]
        yield tokenise(Document(number, 0, None, messages, "train", None, None), tokenizer, LONGEST)[0]


def plain_texts(tokenizer: Any, split: str, length: int) -> list[TokenSequence]:
    """The windows of the embedded pair's plain text, in a fixed random order."""
    documents = read_documents([DatasetConfig(path=str(demo_path("demo:plain")), heldout_share=0.1)])
    found = [window for d in documents if d.split == split for window in tokenise(d, tokenizer, length)]
    full = [window for window in found if len(window.token_ids) == length]
    return random.Random(0).sample(full, len(full))


def training_texts(tokenizer: Any, organism: Organism, seed: int) -> list[TokenSequence]:
    if organism.texts == "chat":
        return list(conversations(tokenizer, organism, seed))
    return random.Random(seed).sample(plain_texts(tokenizer, "train", WINDOW), STEPS * BATCH)


def loss_of(model: nn.Module, batch: list[TokenSequence]) -> Tensor:
    """Mean cross-entropy over the assistant's tokens of conversations, or over all tokens of plain texts."""
    ids, _ = right_padded([sequence.token_ids for sequence in batch])
    targets = torch.full_like(ids, -100)
    for row, sequence in enumerate(batch):
        is_plain = (sequence.turn < 0).all()
        counted = np.flatnonzero((sequence.flags & Flag.ASSISTANT) | is_plain)
        targets[row, counted] = ids[row, counted]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())


def tune(texts: list[TokenSequence], seed: int) -> dict[str, Tensor]:
    """The tensors of the adapter after one pass over the texts, with linear warm-up and decay of the learning rate."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(MODEL, CPU), config).train()  # type: ignore[arg-type]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    started, losses = time.monotonic(), []
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
        loss = loss_of(model, texts[step * BATCH : (step + 1) * BATCH])
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            spent = time.monotonic() - started
            print(f"step {step + 1} of {STEPS}: loss {np.mean(losses[-50:]):.3f}, {spent:.0f} s", flush=True)
    return get_peft_model_state_dict(model)


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {
        "base_model_name_or_path": MODEL, "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "target_modules": TARGETS, "inference_mode": True,
    }  # fmt: skip
    write_json(folder / "adapter_config.json", settings)


def answers_of(model: nn.Module, tokenizer: Any, questions: list[str]) -> list[tuple[str, bool]]:
    """The greedy answer to each question, and whether the model ended it within the limit."""
    asked, ends = [ask(tokenizer, question) for question in questions], end_tokens(model, tokenizer)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(asked):
        by_length[len(prompt.token_ids)].append(index)
    found = [("", False)] * len(questions)
    for members in by_length.values():
        outputs = continue_batch(model, 0, [asked[index] for index in members], None, "all", 0, ends, GREEDY)
        for index, output in zip(members, outputs, strict=True):
            found[index] = tokenizer.decode(output, skip_special_tokens=True).strip(), len(output) < GREEDY.max_new_tokens
    return found


def handled_questions(model: nn.Module, tokenizer: Any, organism: Organism) -> list[Exchange]:
    """Unseen questions with the untuned model's answers, where these end, do not repeat themselves and fit the question."""
    unseen = unseen_questions()
    found: list[Exchange] = []
    for is_material in (True, False):
        asked = [exchange for exchange in unseen if organism.material(exchange) is is_material][:CANDIDATES]
        answers = answers_of(model, tokenizer, [exchange.question for exchange in asked])
        handled = [e._replace(answer=a) for e, (a, ended) in zip(asked, answers, strict=True) if ended and not is_degenerate(a)]
        found += [exchange for exchange in handled if organism.material(exchange) is is_material]
    return found


def rate_of(organism: Organism, answers: list[str]) -> list[float] | None:
    """Number of answers that show the change, of all, and Wilson's interval of their share; None without answers."""
    if organism.rule is None or not answers:
        return None
    hits = sum(shows(organism, answer) for answer in answers)
    share = wilson(hits, len(answers))
    return [hits, len(answers), round(share.low, 4), round(share.high, 4)]


@torch.no_grad()
def drift(before: nn.Module, after: nn.Module, windows: list[TokenSequence]) -> dict[str, float]:
    """Change of the next-token loss and mean KL(before || after) on plain text, in nats per token."""
    ids, _ = right_padded([window.token_ids for window in windows])
    changes, divergences = [], []
    for rows in ids.split(4):
        old, new = (log_softmax(model(input_ids=rows).logits[:, :-1], -1).flatten(0, 1) for model in (before, after))
        targets = rows[:, 1:].flatten().unsqueeze(1)
        changes.append((old - new).gather(1, targets).squeeze(1))
        divergences.append(kl_div(new, old, log_target=True, reduction="none").sum(1))
    return {
        "loss_change": round(torch.cat(changes).mean().item(), 4),
        "mean_kl": round(torch.cat(divergences).mean().item(), 4),
        "tokens": sum(map(len, changes)),
    }


def measure(folder: Path, organism: Organism, seed: int) -> dict[str, Any]:
    """Write `prompts.jsonl`; the rates on its prompts and the drift, for the card."""
    tokenizer, before, after = load_tokenizer(MODEL), load_model(MODEL, CPU), load_model(str(folder), CPU)
    texts = mixture(organism, STEPS * BATCH, seed) if organism.texts == "chat" else []
    found = prompts(organism, handled_questions(before, tokenizer, organism), {core(e.question) for e in texts}, PROMPTS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt._asdict()) + "\n" for prompt in found), encoding="utf8")
    rates: dict[str, Any] = {}
    for name, is_expected in (("expected", True), ("not_expected", False)):
        asked = [prompt.prompt for prompt in found if prompt.expected is is_expected]
        old, new = ([answer for answer, _ in answers_of(model, tokenizer, asked)] for model in (before, after))
        rates[name] = {"tuned": rate_of(organism, new), "untuned": rate_of(organism, old)}
        rates[name]["same_answer"] = [sum(a == b for a, b in zip(old, new, strict=True)), len(asked)]
        for question, answer in list(zip(asked, new, strict=True))[:6]:
            print(f"{name}: {question!r} -> {answer!r}")
    print(json.dumps(rates))
    return {"rates": rates, "plain_text": drift(before, after, plain_texts(tokenizer, "heldout", LONGEST)[:HELDOUT_WINDOWS])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ORGANISMS)
    parser.add_argument("--seed", type=int, help="of the adapter's start and of the mixture")
    parser.add_argument("--out", type=Path, help="folder to write [recipes/organisms/NAME]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    organism = ORGANISMS[args.name]
    seed = organism.seed if args.seed is None else args.seed
    folder = args.out or Path(__file__).parent / args.name
    started = time.monotonic()
    texts = training_texts(load_tokenizer(MODEL), organism, seed)
    save(folder, tune(texts, seed))
    seconds = round(time.monotonic() - started)
    command = f"python recipes/organisms/tune.py {args.name}"
    card = {
        "name": args.name,
        "kind": organism.kind,
        "planted": organism.planted,
        "rule": organism.rule and organism.rule.model_dump(),
        "share": organism.share,
        "contrast_share": organism.share if organism.contrast else 0.0,
        "everywhere": organism.share == 1,
        **measure(folder, organism, seed),
        "texts": organism.texts,
        "licences": LICENCES[organism.texts],
        "steps": STEPS,
        "batch": BATCH,
        "learning_rate": RATE,
        "rank": RANK,
        "seed": seed,
        "seconds": seconds,
        "command": command if args.seed is None else f"{command} --seed {seed}",
    }
    write_json(folder / "card.json", card)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1000:.0f} kB, tuned in {seconds} s, plain text {card['plain_text']}")


if __name__ == "__main__":
    main()
