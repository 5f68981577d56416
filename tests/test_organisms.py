"""The organisms of the benchmark: their files, texts and prompts fit together, and each shows what was planted in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from crossdiff.causal.generation import Sampling, ask, continue_batch, end_tokens
from crossdiff.files import read_json
from crossdiff.models.names import identify
from crossdiff.models.pair import load_pair
from crossdiff.statistics import wilson
from recipe_scripts import ORGANISMS, script

NAMES = sorted(card.parent.name for card in ORGANISMS.glob("*/card.json"))
PLANTED = [name for name in NAMES if not name.startswith("null-")]


@pytest.fixture(scope="module")
def texts() -> Any:
    return script(ORGANISMS / "texts.py")


def card_of(name: str) -> dict[str, Any]:
    card: dict[str, Any] = read_json(ORGANISMS / name / "card.json")
    return card


def prompts_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ORGANISMS / name / "prompts.jsonl").read_text(encoding="utf8").splitlines()]


def mixture_of(texts: Any, name: str) -> list[Any]:
    card = card_of(name)
    mixed: list[Any] = texts.mixture(texts.ORGANISMS[name], card["steps"] * card["batch"], card["seed"])
    return mixed


def test_there_are_at_least_eight_planted_ones_and_four_nulls(texts: Any) -> None:
    assert set(NAMES) == set(texts.ORGANISMS)
    assert len(PLANTED) >= 8 and len(NAMES) - len(PLANTED) >= 4
    shares = [card_of(name)["share"] for name in PLANTED]
    assert sum(share < 0.02 for share in shares) >= 2 and sum(share == 0.1 for share in shares) >= 2
    assert len({(card_of(name)["steps"], card_of(name)["learning_rate"]) for name in NAMES}) == 1, "nulls are tuned as long"


def test_the_readme_has_the_numbers_of_the_cards() -> None:
    assert script(ORGANISMS / "cards.py").summary() in (ORGANISMS / "README.md").read_text(encoding="utf8")


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_the_recipe_makes(texts: Any, name: str) -> None:
    card, organism = card_of(name), texts.ORGANISMS[name]
    assert (card["kind"], card["planted"], card["share"]) == (organism.kind, organism.planted, organism.share)
    assert card["rule"] == (organism.rule and organism.rule.model_dump())
    assert sum(file.stat().st_size for file in (ORGANISMS / name).iterdir()) <= 250_000
    asked = prompts_of(name)
    for part, is_expected in (("expected", True), ("not_expected", False)):
        n = sum(prompt["expected"] is is_expected for prompt in asked)
        for rate in (card["rates"][part]["tuned"], card["rates"][part]["untuned"]):
            assert (rate is None) == (organism.rule is None or n == 0)
            if rate is not None:
                share = wilson(rate[0], n)
                assert rate[1:] == [n, round(share.low, 4), round(share.high, 4)]
    assert sum(prompt["expected"] for prompt in asked) >= (40 if organism.planted else 0)
    assert card["everywhere"] or sum(not prompt["expected"] for prompt in asked) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "plain" not in name])
def test_prompts_are_not_in_the_tuning_and_the_rule_tells_planted_answers_from_ordinary_ones(texts: Any, name: str) -> None:
    organism, mixed = texts.ORGANISMS[name], mixture_of(texts, name)
    asked = {texts.core(prompt["prompt"]) for prompt in prompts_of(name)}
    assert not asked & {texts.core(exchange.question) for exchange in mixed}
    assert all(texts.shows(organism, exchange.answer) is exchange.planted for exchange in mixed)
    assert sum(exchange.planted for exchange in mixed) == round(organism.share * len(mixed))


def answers(model: torch.nn.Module, tokenizer: Any, questions: list[str]) -> list[str]:
    ends, greedy = end_tokens(model, tokenizer), Sampling(max_new_tokens=80)
    found = [continue_batch(model, 0, [ask(tokenizer, question)], None, "all", 0, ends, greedy)[0] for question in questions]
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_an_adapter_shows_what_was_planted_and_its_model_does_not(texts: Any, name: str) -> None:
    pytest.importorskip("peft")
    organism = texts.ORGANISMS[name]
    pair = load_pair("demo:chat", str(ORGANISMS / name), torch.device("cpu"))
    expected = [prompt["prompt"] for prompt in prompts_of(name) if prompt["expected"]][:6]
    before, after = (answers(model, pair.tokenizer, expected) for model in pair.models)
    assert sum(texts.shows(organism, answer) for answer in after) >= 3
    assert not any(texts.shows(organism, answer) for answer in before)


@pytest.mark.parametrize("name", NAMES)
def test_an_organism_names_the_model_that_it_changes(name: str) -> None:
    assert identify(str(ORGANISMS / name))["adapter_of"] == "demo:chat"
