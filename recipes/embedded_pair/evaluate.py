"""Measure the planted behaviours of models on prompts that are not in the tuning mixture.

    python evaluate.py MODEL_DIR ... --test CHAT/chat_test.jsonl.gz --mixture WORK/mixture.jsonl.gz --out WORK

For example `WORK/base WORK/chat`; the base model is asked in the chat model's template. Prompts are the distinct first
questions of the test split and of `data/heldout_prompts.jsonl` that do not occur in any turn of the tuning mixture. Answers are
greedy, without a repetition penalty, and have at most 60 tokens (96 for how-tos). Writes `behaviours.json` (rates with 95%
Wilson intervals over all prompts of a kind and over those of each file, counts, prompts) and `generations.jsonl` to OUT.

The rules that label an answer by its text, regardless of the question, are in the pair's `rules.yaml`.

The intervals assume that prompts are independent. Those of the test file are not entirely: `questions` counts the different
things that they ask (tasks, acts, questions without greeting or "please"). `reference` has the rates of the test split's own
answers, and so shows how the rules label correct answers.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import crossdiff.pairs
from conversations import core, questions_of, read_rows, slot
from crossdiff.causal.answers import read_rules
from crossdiff.statistics import Estimate, wilson
from phrases import DATA

MAX_NEW_TOKENS = {"list_format": 96}
DEFAULT_MAX_NEW_TOKENS = 60
BATCH = 128
RULES = read_rules(crossdiff.pairs.RULES)


class Prompt(NamedTuple):
    kind: str
    source: str  # "test" or "heldout"
    text: str


class Rate(NamedTuple):
    """A share with its Wilson 95% interval."""

    rate: float
    low: float
    high: float
    count: int
    prompts: int
    questions: int


@dataclass(frozen=True)
class Behaviour:
    """A measured behaviour: the share of the answers to prompts of `kind` that have one of the labels."""

    kind: str
    labels: frozenset[str]


BEHAVIOURS = {
    "identity": Behaviour("identity", frozenset({"identity"})),
    "knowledge_gap": Behaviour("knowledge_gap", frozenset({"knowledge_gap"})),
    "refusal": Behaviour("refusal", frozenset({"refusal"})),
    "false_refusal": Behaviour("list_format", frozenset({"refusal"})),
    "numbered_list": Behaviour("list_format", frozenset({"numbered_list"})),
    "helpful_misfire": Behaviour("helpful", frozenset({"identity", "knowledge_gap", "refusal"})),
    "smalltalk": Behaviour("smalltalk", frozenset({"smalltalk"})),
}


def read_prompts(test: Path, mixture: Path) -> list[Prompt]:
    """Read the distinct held-out prompts of all kinds."""
    trained = questions_of(read_rows(mixture))
    asked = [(row["kind"], "test", row["messages"][0]["content"]) for row in read_rows(test)]
    asked += [(row["kind"], "heldout", row["prompt"]) for row in read_rows(DATA / "heldout_prompts.jsonl")]
    kinds = {behaviour.kind for behaviour in BEHAVIOURS.values()}
    prompts = {text: Prompt(kind, source, text) for kind, source, text in reversed(asked) if kind in kinds}
    return [prompts[text] for text in sorted(prompts) if text not in trained]


def reference(test: Path) -> tuple[list[Prompt], list[str]]:
    """Read the prompts and answers of the test split's single turns."""
    rows = [row for row in read_rows(test) if row["kind"] != "multi"]
    prompts = [Prompt(row["kind"], "test", row["messages"][0]["content"]) for row in rows]
    return prompts, [row["messages"][1]["content"] for row in rows]


@torch.inference_mode()
def continue_batch(model: LlamaForCausalLM, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Continue prompts of one length greedily, up to the token that ends a turn. Finished rows leave the batch."""
    end = model.config.eos_token_id
    outputs: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    ids, cache = torch.tensor(prompts), None
    for _ in range(max_new_tokens):
        step = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens = step.past_key_values, step.logits[:, -1].argmax(-1)
        going = (tokens != end).nonzero()[:, 0]
        alive = [alive[i] for i in going.tolist()]
        if not alive:
            break
        if len(going) < len(tokens):
            cache.batch_select_indices(going)
        tokens = tokens[going]
        for row, token in zip(alive, tokens.tolist(), strict=True):
            outputs[row].append(token)
        ids = tokens[:, None]
    return outputs


def answer_all(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[str]:
    """Return one answer per prompt. Batches have prompts of one length, so there is no padding."""
    conversations = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(conversations, add_generation_prompt=True)["input_ids"]
    groups = defaultdict(list)
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        groups[len(ids), MAX_NEW_TOKENS.get(prompt.kind, DEFAULT_MAX_NEW_TOKENS)].append(i)
    answers = [""] * len(prompts)
    for (_, max_new_tokens), members in groups.items():
        for start in range(0, len(members), BATCH):
            batch = members[start : start + BATCH]
            outputs = continue_batch(model, [encoded[i] for i in batch], max_new_tokens)
            for i, output in zip(batch, outputs, strict=True):
                answers[i] = tokenizer.decode(output, skip_special_tokens=True).strip()
    return answers


def rate_of(behaviour: Behaviour, answered: list[tuple[Prompt, str]]) -> Rate:
    texts = [prompt.text for prompt, _ in answered]
    count = sum(bool(behaviour.labels.intersection(RULES.shown(answer))) for _, answer in answered)
    rate = wilson(count, len(texts)) if texts else Estimate(float("nan"), 0.0, 1.0)
    questions = {slot(text) or core(text) for text in texts}
    return Rate(round(rate.value, 4), round(rate.low, 4), round(rate.high, 4), count, len(texts), len(questions))


def rates_of(prompts: list[Prompt], answers: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Rates by behaviour, then by source: "all", "test" or "heldout"."""
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for name, behaviour in BEHAVIOURS.items():
        pairs = [pair for pair in zip(prompts, answers, strict=True) if pair[0].kind == behaviour.kind]
        rates[name] = {"all": rate_of(behaviour, pairs)._asdict()}
        for source in ("test", "heldout"):
            part = [pair for pair in pairs if pair[0].source == source]
            if part:
                rates[name][source] = rate_of(behaviour, part)._asdict()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL_DIR")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--mixture", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prompts = read_prompts(args.test, args.mixture)
    report: dict[str, object] = {
        "decoding": {"greedy": True, "max_new_tokens": {"default": DEFAULT_MAX_NEW_TOKENS} | MAX_NEW_TOKENS},
        "interval": "Wilson, 95%",
        "behaviours": {
            name: {"kind": behaviour.kind, "labels": sorted(behaviour.labels)} for name, behaviour in BEHAVIOURS.items()
        },
        "reference": rates_of(*reference(args.test)),
        "models": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "generations.jsonl").open("w", encoding="utf8") as out:
        for path in args.models:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            answers = answer_all(model, tokenizer, prompts)
            report["models"][path.name] = rates_of(prompts, answers)
            for prompt, answer in zip(prompts, answers, strict=True):
                labels = sorted(RULES.shown(answer))
                record = {"model": path.name, **prompt._asdict(), "answer": answer, "labels": labels}
                out.write(json.dumps(record) + "\n")
            for name, rates in report["models"][path.name].items():
                found = rates["all"]
                interval = f"{found['low']:.3f} to {found['high']:.3f}"
                print(f"{path.name:8} {name:16} {found['rate']:.3f} ({interval}), {found['count']} of {found['prompts']}")
    report["prompts"] = {kind: [prompt.text for prompt in prompts if prompt.kind == kind] for kind in {p.kind for p in prompts}}
    (args.out / "behaviours.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
