"""What an answer shows: behaviours by rules that the user gives as data, and text that has broken down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from crossdiff.config import Config, read_yaml, validate

NGRAM, MIN_NGRAMS, DISTINCT_SHARE = 3, 6, 0.6
Z_95 = 1.959964


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


class Rule(Config):
    """A behaviour is shown by an answer in which the pattern is found so many times."""

    pattern: Annotated[str, AfterValidator(_compiles)] = Field(description="regular expression, searched in the answer")
    at_least: int = Field(1, ge=1, description="occurrences that are needed")

    def holds(self, answer: str) -> bool:
        return sum(1 for _ in re.finditer(self.pattern, answer)) >= self.at_least


class Rules(Config):
    """Name of a behaviour -> rule. An answer may show several, or none."""

    behaviours: dict[str, Rule]

    def shown(self, answer: str) -> tuple[str, ...]:
        """The behaviours that an answer shows, by what it says and not by what was asked."""
        return tuple(name for name, rule in self.behaviours.items() if rule.holds(answer))


def read_rules(path: Path) -> Rules:
    """The rules of a YAML file.

    Raises:
        UserError: it cannot be read, or a pattern is no regular expression.
    """
    return validate(Rules, read_yaml(path), str(path))


def is_degenerate(answer: str) -> bool:
    """Empty, or going round in circles: under 60% of its 3-grams of words are distinct (from 6 of them on)."""
    words = answer.lower().split()
    if not words:
        return True
    ngrams = [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]
    return len(ngrams) >= MIN_NGRAMS and len(set(ngrams)) < DISTINCT_SHARE * len(ngrams)


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's score interval at 95% for `count` of `n`.

    Raises:
        ValueError: no observations.
    """
    if n == 0:
        raise ValueError("a share of no observations has no interval")
    share, z2 = count / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
