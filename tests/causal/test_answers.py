"""Behaviours by rules, and broken text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from crossdiff.causal.answers import Rule, is_degenerate, read_rules
from crossdiff.errors import UserError
from crossdiff.pairs import FOLDER, RULES


def test_the_rules_of_the_embedded_pair_give_the_labels_of_its_recorded_answers() -> None:
    rules = read_rules(RULES)
    with gzip.open(FOLDER / "generations.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert len(records) > 1000
    for record in records:
        assert sorted(rules.shown(record["answer"])) == record["labels"], record["answer"]


def test_a_rule_may_need_several_occurrences() -> None:
    rule = Rule(pattern=r"(?m)^\d\.", at_least=2)
    assert rule.holds("1. one\n2. two")
    assert not rule.holds("1. one")


def test_a_wrong_pattern_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("behaviours: {broken: {pattern: 'a('}}")
    with pytest.raises(UserError, match=r"behaviours.broken.pattern: .*not a regular expression"):
        read_rules(path)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", True),
        ("   ", True),
        ("I'm sorry, but I can't help with that. It is against the law and could cause harm.", False),
        (", and the number of the fourth year, the number of the fourth year, the number of the fourth year", True),
        ("yes yes", False),  # too short to tell
        ("A law is a law that is a law.", False),
        ("no " * 20, True),
    ],
)
def test_degenerate_text(answer: str, expected: bool) -> None:
    assert is_degenerate(answer) is expected
