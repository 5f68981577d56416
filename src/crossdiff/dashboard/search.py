"""Full-text search over explanations and example texts, with an SQLite FTS5 index.

The run itself is only read, so the index is in the user's cache, under a name that changes with the files it is built from. The
first start builds it in the background. A latent is found by its explanation and the contexts of its strongest examples.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crossdiff.dashboard.catalogue import Coder
from crossdiff.errors import UserError
from crossdiff.files import open_sqlite
from crossdiff.report.examples import TOKENS_AFTER, TOKENS_BEFORE

FORMAT = 1
CONTEXTS = 5
"""Strongest examples of a latent whose text is indexed."""
BATCH = 2000
MAX_WORDS = 12


def cache_folder() -> Path:
    """Folder of the indexes: `crossdiff/search` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossdiff" / "search"


class Search:
    """The index of one crosscoder. `state` is "building", "ready" or the reason why it could not be built."""

    def __init__(self, coder: Coder, folder: Path) -> None:
        self.coder = coder
        self.state = "building"
        self.path = folder / f"{_fingerprint(coder)}.sqlite"
        self._own = threading.local()

    def start(self) -> None:
        """Build the index in the background unless it exists."""
        if self.path.is_file():
            self.state = "ready"
        else:
            threading.Thread(target=self.build, daemon=True, name=f"search {self.coder.name}").start()

    def build(self) -> None:
        """Write the index completely or not at all. Two dashboards may build it at once, hence the name of the partial file."""
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(partial)) as index, index:
                index.execute("CREATE VIRTUAL TABLE texts USING fts5(explanation, contexts, content='')")
                self._fill(index)
            partial.replace(self.path)
            self.state = "ready"
        except (OSError, sqlite3.Error, UserError) as error:
            self.state = f"search is unavailable: {error}"
        finally:
            partial.unlink(missing_ok=True)

    def _fill(self, index: sqlite3.Connection) -> None:
        explanations = dict(self.coder.table.select("latent", "explanation").rows()) if self.coder.has_explanations else {}
        latents = self.coder.table["latent"].to_list()
        query = (
            "SELECT latent, position, token_ids FROM examples JOIN sequences USING (sequence) "
            "WHERE latent >= ? AND latent < ? AND kind = 'top' AND rank < ?"
        )
        for first in range(0, max(latents, default=-1) + 1, BATCH):
            contexts: dict[int, list[str]] = {latent: [] for latent in latents if first <= latent < first + BATCH}
            for latent, position, blob in self.coder.database.rows(query, (first, first + BATCH, CONTEXTS)):
                ids = np.frombuffer(blob, "<i4")[max(0, position - TOKENS_BEFORE) : position + TOKENS_AFTER + 1].tolist()
                contexts.setdefault(latent, []).append(self.coder.database.text(ids))
            rows = ((latent, explanations.get(latent) or "", "\n".join(texts)) for latent, texts in contexts.items())
            index.executemany("INSERT INTO texts (rowid, explanation, contexts) VALUES (?, ?, ?)", rows)

    def latents(self, text: str) -> npt.NDArray[np.int64]:
        """The latents whose explanation or contexts have all the words; the last word may be the beginning of one."""
        if self.state != "ready":
            reason = "the search index is being built; try again in a moment" if self.state == "building" else self.state
            raise UserError(reason)
        if not (wanted := match(text)):
            return np.empty(0, np.int64)
        try:
            if not hasattr(self._own, "database"):
                self._own.database = open_sqlite(self.path, any_thread=True)
            rows = self._own.database.execute("SELECT rowid FROM texts WHERE texts MATCH ?", (wanted,)).fetchall()
        except sqlite3.Error as error:
            raise UserError(
                f"the search index {self.path} cannot be read ({error}); delete it and restart the dashboard"
            ) from error
        return np.array([row[0] for row in rows], np.int64)


def match(text: str) -> str:
    """A query in FTS5's language: each word is quoted, so that none is an operator, and the last one is a prefix."""
    words = re.findall(r"\w+", text)[:MAX_WORDS]
    return " ".join(f'"{word}"' for word in words) + ("*" if words else "")


def _fingerprint(coder: Coder) -> str:
    digest = hashlib.sha256(f"{FORMAT} {coder.folder.resolve()}".encode())
    for name, size, time in coder.indexed:
        digest.update(f" {name} {size} {time}".encode())
    return digest.hexdigest()[:24]
