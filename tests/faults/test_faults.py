"""A few of each kind of fault. `make faults` tries all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("faults.py")


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What the script prints when it tries a part of the faults.

    It runs in a process of its own: this one has threads, which a fork would lose.
    """
    folder = tmp_path_factory.mktemp("faults")
    words = [sys.executable, str(SCRIPT), "sample", "--folder", str(folder)]
    ended = subprocess.run(words, capture_output=True, text=True, env=os.environ, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    yield ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kills", "bits", "forged"])
def test_nothing_is_lost(survived: str, kind: str) -> None:
    rows = [row.split("|")[1:-1] for row in survived.splitlines() if row.startswith(f"| {kind} |")]
    assert rows
    for _, place, tried, kept, lost in rows:
        assert int(tried) == int(kept) > 0 and int(lost) == 0, place


def test_a_lost_file_is_seen(tmp_path: Path) -> None:
    """The script itself must be able to fail: a flipped bit that no command reads counts as lost."""
    from tiny import Tally

    tally = Tally("bits", "x")
    tally.add("byte 0", None)
    tally.add("byte 1", "no command names the file")
    assert (tally.tried, tally.lost) == (2, ["byte 1: no command names the file"])
