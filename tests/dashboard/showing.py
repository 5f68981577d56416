"""Runs that the dashboard's tests show: a synthetic one whose texts try to break out of the page, and requests to it."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from crossdiff.files import write_json
from crossdiff.interp.explanation_table import FILE, SCHEMA
from crossdiff.latents.example_schema import SCHEMA as EXAMPLES
from crossdiff.run_manifest import FORMAT
from crossdiff.text.token_texts import written
from report.synthetic_run import latent_table, write_activations, write_concepts, write_crosscoder

DANGER = "<script>alert(1)</script>{{ 1337 * 3 }}\"'><img src=x onerror=alert(2)>"
ADDRESS = "http://127.0.0.1:8321"
BATCHTOPK = "/run/a-b-1/batchtopk"
"""Where the synthetic run's second crosscoder is."""
CONCEPTS = "/run/a-b-1/concepts"
"""Where its concepts are."""

NEW_TABLES = "".join(re.findall(r"CREATE TABLE (?:histograms|correlated) .*?\n\);", EXAMPLES, re.DOTALL))
"""The tables of the example database that older analyses lack."""


def write_run(folder: Path) -> Path:
    """Two crosscoders of 60 latents in a run whose name and explanations are made to break out of a page."""
    directory = folder / "a<b>'\"{{1}}"
    directory.mkdir(parents=True)
    write_activations(directory)
    stages = {f"train/{name}": {"fingerprint": name} for name in ("l1", "batchtopk")}
    write_json(directory / "manifest.json", {"format": FORMAT, "stages": stages, "swap": []})
    for seed, name in enumerate(("l1", "batchtopk")):
        write_crosscoder(directory / name, latent_table(seed))
        # The last row is of a crosscoder that stood here before.
        explained = [
            {"latent": 3, "explanation": DANGER, "explainer": "model", "crosscoder": name},
            {"latent": 5, "explanation": "greetings in the morning", "explainer": "model", "crosscoder": name},
            {"latent": 7, "explanation": "outdated", "explainer": "model", "crosscoder": "another training"},
        ]
        pl.DataFrame(explained, schema=SCHEMA).write_parquet(directory / name / FILE)
        write_links(directory / name, latent=0, twin=20, neighbour=9)
    write_concepts(directory)
    return directory


def write_links(folder: Path, latent: int, twin: int, neighbour: int) -> None:
    """One twin and one nearest latent of a latent."""
    near = {"latent": [latent], "rank": [0], "neighbour": [neighbour], "cosine": [0.9]}
    pl.DataFrame(near).write_parquet(folder / "neighbours.parquet")
    counts = {"n_active": [100], "n_active_twin": [120], "n_both": [90], "jaccard": [0.69]}
    pair = {"latent": [latent], "twin": [twin], "twin_class": ["shared"], "cosine": [0.95]}
    pl.DataFrame({**pair, **counts, "share_of_latent": [0.9], "share_of_twin": [0.75]}).write_parquet(folder / "twins.parquet")


def requests_to(run: Path, cache: Path, live: bool = False, **options: Any) -> Any:
    """A client of the pages of a run."""
    from fastapi.testclient import TestClient

    from crossdiff.dashboard.app import create_app
    from crossdiff.dashboard.catalogue import Catalogue
    from crossdiff.dashboard.live import Live

    app = create_app(Catalogue([run]), Live(live), cache, **options)
    return TestClient(app, base_url=ADDRESS, follow_redirects=False)


def add_strengths(folder: Path) -> None:
    """Give a crosscoder's database what a new analysis stores: histograms, correlated latents, and the bytes of tokens.

    Its texts say "café": tokens 12 and 13 are "caf" with the first byte of "é", and its second byte.
    """
    with closing(sqlite3.connect(folder / "examples.sqlite")) as database, database:
        database.executescript(f"ALTER TABLE vocabulary ADD bytes BLOB; {NEW_TABLES}")
        for token_id, data in ((12, b"caf\xc3"), (13, b"\xa9")):
            database.execute("UPDATE vocabulary SET text = ?, bytes = ? WHERE token_id = ?", (written(data), data, token_id))
        counts = np.array([1000, 50, 0, 1], "<i8").tobytes()
        database.executemany("INSERT INTO histograms VALUES (?, ?, ?)", [(latent, 1.0, counts) for latent in (0, 3)])
        database.execute("INSERT INTO correlated VALUES (3, 0, 9, 0.75, 41)")
        database.execute("INSERT INTO metadata VALUES ('correlated_over', '131072')")


@contextmanager
def watched(browser: Any, address: str, patience: int, allowed: str = "") -> Iterator[Any]:
    """A page that fails the test when it logs an error, breaks its policy, or asks another host.

    Args:
        patience: milliseconds that it waits for what is expected.
        allowed: part of the text of errors that a test provokes, such as `status of 4`.
    """
    from playwright.sync_api import expect

    from crossdiff.dashboard.screenshots import WIDE

    opened = browser.new_page(viewport=WIDE)
    opened.set_default_timeout(patience)
    expect.set_options(timeout=patience)
    problems: list[str] = []

    def log(message: Any) -> None:
        if message.type == "error" and not (allowed and allowed in message.text):
            problems.append(message.text)

    def ask(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            problems.append(request.url)

    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", log)
    opened.on("request", ask)
    yield opened
    opened.close()
    assert not problems
