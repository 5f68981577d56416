"""A judge that can be checked: its explanation is a regular expression, and it calls active what matches it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from scripted import Reply

from crossdiff.interp.prompts import CLOSE, DETECT, EXPLAIN, FUZZ, OPEN


def answer_by_pattern(explain: Callable[[str], str]) -> Callable[[dict[str, Any], int], Reply]:
    """A server's script. `explain` maps the user's message of an explanation request to the pattern.

    Detection: the pattern occurs in the excerpt. Fuzzing: all of the marked text, put together, matches the pattern.
    """

    def answer(body: dict[str, Any], number: int) -> Reply:
        system, user = (message["content"] for message in body["messages"][:2])
        if system == EXPLAIN:
            return Reply(json.dumps({"explanation": explain(user)}))
        pattern = re.match("Explanation: (.*)\n\n", user)[1]  # type: ignore[index]
        excerpts = re.findall(r"(?m)^\d+\. (.*)$", user.partition("\n\n")[2])
        if system == FUZZ:
            excerpts = [" ".join(re.findall(f"{OPEN}(.*?){CLOSE}", excerpt)) for excerpt in excerpts]
        else:
            assert system == DETECT
        return Reply(json.dumps({"active": [re.search(pattern, excerpt) is not None for excerpt in excerpts]}))

    return answer
