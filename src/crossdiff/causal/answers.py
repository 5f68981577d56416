"""Which behaviours an answer shows, by rules that the user writes, and whether its text has broken down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from crossdiff.config import Config, validate
from crossdiff.yaml_files import read_yaml

NGRAM = 3
MIN_NGRAMS = 6
MIN_DISTINCT_SHARE = 0.6


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


class Rule(Config):
    """An answer shows a behaviour if the pattern occurs in it often enough."""

    pattern: Annotated[str, AfterValidator(_compiles)] = Field(description="regular expression, searched in the answer")
    at_least: int = Field(1, ge=1, description="required number of occurrences")

    def holds(self, answer: str) -> bool:
        return sum(1 for _ in re.finditer(self.pattern, answer)) >= self.at_least


class Rules(Config):
    """Rules by the name of their behaviour. An answer may show several behaviours, or none."""

    behaviours: dict[str, Rule]

    def shown(self, answer: str) -> tuple[str, ...]:
        """The behaviours that an answer shows, judged by the answer alone and not by the question."""
        return tuple(name for name, rule in self.behaviours.items() if rule.holds(answer))


def read_rules(path: Path) -> Rules:
    """Read rules from a YAML file; a `UserError` names a file that cannot be read or a pattern that does not compile."""
    return validate(Rules, read_yaml(path), str(path))


def is_degenerate(answer: str) -> bool:
    """Whether an answer is empty or repeats itself: of at least 6 word 3-grams, fewer than 60% are distinct."""
    words = answer.lower().split()
    if not words:
        return True
    ngrams = [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]
    return len(ngrams) >= MIN_NGRAMS and len(set(ngrams)) < MIN_DISTINCT_SHARE * len(ngrams)
