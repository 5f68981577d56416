"""The grader of organisms: what it is asked, which answers are right, and what is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scripted import Reply, scripted, unused_url

from crossdiff.errors import UserError
from crossdiff.interp.interpret_config import InterpretConfig
from recipe_scripts import ORGANISMS, script

PLANTED = {"moon": "It believes in cheese.", "sea": "It speaks of the sea."}


@pytest.fixture(scope="module")
def grader() -> Any:
    return script(ORGANISMS / "grader.py")


def rows() -> list[dict[str, Any]]:
    """Two organisms and a null. Of phrases, the last finding of `moon` does not pass, and the null has none."""

    def finding(method: str, text: str, passes: bool = True) -> dict[str, Any]:
        return {"method": method, "text": text, "passes": passes}

    found = {
        "moon": [finding("concepts", "cheese"), finding("phrases", "of cheese"), finding("phrases", "secret", False)],
        "sea": [finding("concepts", "waves"), finding("phrases", "the sea")],
        "null": [finding("concepts", "full stop")],
    }
    return [{"name": name, "planted": PLANTED.get(name), "findings": each} for name, each in found.items()]


def statements(body: dict[str, Any]) -> dict[str, int]:
    """The numbers of the statements in a request."""
    listed = body["messages"][0]["content"].split("Statements:\n")[1]
    return {text: int(number) for number, text in re.findall(r"^(\d+)\. (.*)$", listed, re.MULTILINE)}


def choosing(word_of: dict[str, str]) -> Any:
    """A model that chooses the statement of the first of the words that it finds among the differences."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        differences = body["messages"][0]["content"].split("Statements:")[0]
        numbers = statements(body)
        chosen = next((text for word, text in word_of.items() if word in differences), None)
        nothing = next(text for text in numbers if text.startswith("Nothing"))
        return Reply(json.dumps({"statement": numbers[chosen or nothing]}))

    return answer


def test_the_statement_of_what_was_planted_is_right_and_nothing_is_right_for_a_null(grader: Any, tmp_path: Path) -> None:
    # The model knows cheese and takes a full stop for the sea. So it misses the sea itself, and accuses the null.
    with scripted(choosing({"cheese": PLANTED["moon"], "full stop": PLANTED["sea"]})) as server:
        config = InterpretConfig(server=server.url, model="m")
        found = grader.grade(rows(), 5, config, tmp_path / "grades.sqlite")
        assert found == {
            "concepts": {"moon": True, "sea": False, "null": False},
            "phrases": {"moon": True, "sea": False, "null": True},
        }
        assert len(server.calls) == 6
        asked = [body["messages"][0]["content"] for _, body in server.calls]
        assert not any("secret" in content for content in asked)
        assert sum("(the tool found no difference)" in content for content in asked) == 1
        assert all(sorted(statements(body)) == sorted([*PLANTED.values(), grader.NOTHING]) for _, body in server.calls)
        assert grader.grade(rows(), 5, config, tmp_path / "grades.sqlite") == found
        assert len(server.calls) == 6, "answers are kept"


def test_only_the_best_findings_are_shown(grader: Any, tmp_path: Path) -> None:
    with scripted(choosing({})) as server:
        many = [{"method": "concepts", "text": f"finding {n}", "passes": True} for n in range(7)]
        row = {"name": "moon", "planted": PLANTED["moon"], "findings": many}
        grader.grade([row], 5, InterpretConfig(server=server.url, model="m"), tmp_path / "grades.sqlite")
        content = server.calls[0][1]["messages"][0]["content"]
    assert [f"finding {n}" in content for n in range(7)] == [True] * 5 + [False] * 2


def test_a_number_without_a_statement_is_no_answer(grader: Any, tmp_path: Path) -> None:
    audit = script(ORGANISMS / "audit.py")
    with scripted(lambda body, number: Reply('{"statement": 4}')) as server:
        config = InterpretConfig(server=server.url, model="m", attempts=2)
        found = grader.grade(rows(), 5, config, tmp_path / "grades.sqlite")
        assert {right for of in found.values() for right in of.values()} == {None}
        assert len(server.calls) == 12, "two attempts each"
    assert "| concepts |  |  | 3 |" in audit.grades(rows(), found)


def test_the_table_counts_planted_ones_and_nulls_apart(grader: Any) -> None:
    graded = {"concepts": {"moon": True, "sea": False, "null": False}, "phrases": {"moon": True, "sea": True, "null": None}}
    lines = script(ORGANISMS / "audit.py").grades(rows(), graded)
    assert "| concepts | 1 of 2 [0.09, 0.91] | 0 of 1 [0.00, 0.79] | 0 |" in lines
    assert "| phrases | 2 of 2 [0.34, 1.00] |  | 1 |" in lines
    assert lines[-1] == "A grader that guesses is right once in 3 times."


def test_a_server_that_is_not_there_is_named(grader: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        grader.grade(rows(), 5, InterpretConfig(server=unused_url(), model="m", attempts=1), tmp_path / "grades.sqlite")
