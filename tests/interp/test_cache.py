"""Answers that were paid for: kept as they arrive, and never to be deleted for a disk or a lock."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from scripted import Reply, scripted

from crossdiff.errors import UserError
from crossdiff.interp.cache import Cache, Entry
from crossdiff.interp.client import Client
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.prompts import DETECT, judge_request

ENTRY = Entry("yes", 3, 1)


def test_a_locked_file_is_waited_for_and_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    mine, other = Cache(path, patience=0.05), sqlite3.connect(path)
    mine.put("a", ENTRY)
    other.execute("BEGIN EXCLUSIVE")
    message = (
        r"answers\.sqlite is locked by another process, for more than 0\.05 s; wait for it, and run the same command again"
    )
    with pytest.raises(UserError, match=message):
        mine.put("b", ENTRY)
    with pytest.raises(UserError, match=message):
        mine.get("a")
    with pytest.raises(UserError, match=message):
        Cache(path, patience=0.05)
    other.rollback()
    assert mine.get("a") == ENTRY and mine.get("b") is None


def test_a_full_disk_is_named_and_keeps_the_answers(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "answers.sqlite")
    cache.put("a", ENTRY)
    database: Any = cache._database
    database.execute("PRAGMA max_page_count = 3")  # SQLite then reports a full disk
    with pytest.raises(UserError, match=r"the disk of .* is full .*; free some space") as caught:
        cache.put("b", Entry("x" * 100_000, 1, 1))
    assert "delete" not in str(caught.value)
    assert cache.get("a") == ENTRY and cache.get("b") is None


def test_a_damaged_file_is_to_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    cache = Cache(path)
    for number in range(200):
        cache.put(str(number), Entry("x" * 500, 1, 1))
    cache.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    cache = Cache(path)
    for act in (lambda: cache.get("7"), lambda: cache.put("new", ENTRY)):
        with pytest.raises(UserError, match=r"is damaged .*; move it aside and keep it") as caught:
            act()
        assert "delete" not in str(caught.value)


def ask_all(url: str, path: Path) -> int:
    """Ask 40 questions, three at a time; returns the number of answers from the cache."""

    async def run() -> int:
        client = Client(InterpretConfig(server=url, model="m", temperature=0.0, concurrency=3), cache, {})
        await asyncio.gather(*(client.ask(judge_request(DETECT, f"number {n}", ["1", "a"])) for n in range(40)))
        await client.close()
        return client.usage.cached

    cache = Cache(path)
    try:
        return asyncio.run(run())
    finally:
        cache.close()


def test_a_kill_loses_at_most_the_answers_in_flight(tmp_path: Path) -> None:
    """At the call that kills, three are in flight, so the answers of all before them are on disk."""
    path, process = tmp_path / "answers.sqlite", None
    kept: list[int] = []
    counted = threading.Event()

    def answer(body: dict[str, Any], number: int) -> Reply:
        if number == 20 and process is not None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            database = sqlite3.connect(path)
            kept.append(database.execute("SELECT count(*) FROM answers").fetchone()[0])
            database.close()
            counted.set()
        return Reply('{"active": [true, false]}')

    with scripted(answer) as server:
        process = subprocess.Popen([sys.executable, __file__, server.url, str(path)])
        process.wait(timeout=60)
        assert counted.wait(timeout=60)
        before = len(server.calls)
        cached = ask_all(server.url, path)
        assert len(server.calls) - before == 40 - cached
    assert process.returncode == -signal.SIGKILL
    assert cached == kept[0] >= before - 3 >= 18


if __name__ == "__main__":
    ask_all(sys.argv[1], Path(sys.argv[2]))
