"""A judge that can be checked: its explanation is a regular expression, and it calls active what matches it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from scripted import Reply

from crossdiff.interp.prompts import CLOSE, DETECT, EXPLAIN, FUZZ, OPEN


def task_of(body: dict[str, Any]) -> tuple[str, str]:
    """Which of the three questions a call asks, and what it asks about."""
    content = body["messages"][0]["content"]
    task = next(task for task in (EXPLAIN, DETECT, FUZZ) if content.startswith(task))
    return task, content.removeprefix(f"{task}\n\n")


def answer_by_pattern(explain: Callable[[str], str]) -> Callable[[dict[str, Any], int], Reply]:
    """A server's script. `explain` maps the user's message of an explanation request to the pattern.

    Detection: the pattern occurs in the excerpt. Fuzzing: all of the marked text, put together, matches the pattern.
    """

    def answer(body: dict[str, Any], number: int) -> Reply:
        task, user = task_of(body)
        if task == EXPLAIN:
            return Reply(json.dumps({"explanation": explain(user)}))
        pattern = re.match("Explanation: (.*)\n\n", user)[1]  # type: ignore[index]
        excerpts = re.findall(r"(?m)^\d+\. (.*)$", user.partition("\n\n")[2])
        if task == FUZZ:
            excerpts = [" ".join(re.findall(f"{OPEN}(.*?){CLOSE}", excerpt)) for excerpt in excerpts]
        else:
            assert task == DETECT
        return Reply(json.dumps({"active": [re.search(pattern, excerpt) is not None for excerpt in excerpts]}))

    return answer
