"""Full-text search over explanations and example texts: an SQLite FTS5 index beside nothing of the run's own.

The run is only read, so the index lies in the user's cache, under a name that changes with the files it was made from. It is
built in the background at the first start: the text of a latent is its explanation and the contexts of its strongest examples.
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
from crossdiff.report.examples import TOKENS_AFTER, TOKENS_BEFORE

FORMAT = 1
CONTEXTS = 5
"""Strongest examples of a latent whose text is found."""
BATCH = 2000
MAX_WORDS = 12


def cache_folder() -> Path:
    """Where indexes lie: `crossdiff/search` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossdiff" / "search"


class Search:
    """The index of one crosscoder. `state` is "building", "ready" or the reason why there is none."""

    def __init__(self, coder: Coder, folder: Path) -> None:
        self.coder, self.state = coder, "building"
        self.path = folder / f"{_fingerprint(coder)}.sqlite"
        self._own = threading.local()

    def start(self) -> None:
        """Build in the background, unless it is there."""
        if self.path.is_file():
            self.state = "ready"
        else:
            threading.Thread(target=self.build, daemon=True, name=f"search {self.coder.name}").start()

    def build(self) -> None:
        """Write the index whole or not at all."""
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(partial)) as index, index:
                index.execute("CREATE VIRTUAL TABLE texts USING fts5(explanation, contexts, content='')")
                self._fill(index)
            partial.replace(self.path)
            self.state = "ready"
        except (OSError, sqlite3.Error, UserError) as error:
            self.state = f"no search: {error}"
        finally:
            partial.unlink(missing_ok=True)

    def _fill(self, index: sqlite3.Connection) -> None:
        explanations = dict(self.coder.table.select("latent", "explanation").rows()) if self.coder.has_explanations else {}
        latents = self.coder.table["latent"].to_list()
        vocabulary, uri = self.coder.database.vocabulary, f"{self.coder.database.path.resolve().as_uri()}?mode=ro"
        query = (
            "SELECT latent, position, token_ids FROM examples JOIN sequences USING (sequence) "
            "WHERE latent >= ? AND latent < ? AND kind = 'top' AND rank < ?"
        )
        with closing(sqlite3.connect(uri, uri=True)) as examples:
            for first in range(0, max(latents, default=-1) + 1, BATCH):
                contexts: dict[int, list[str]] = {latent: [] for latent in latents if first <= latent < first + BATCH}
                for latent, position, blob in examples.execute(query, (first, first + BATCH, CONTEXTS)):
                    ids = np.frombuffer(blob, "<i4")[max(0, position - TOKENS_BEFORE) : position + TOKENS_AFTER + 1].tolist()
                    contexts.setdefault(latent, []).append("".join(vocabulary.get(token, "") for token in ids))
                rows = ((latent, explanations.get(latent) or "", "\n".join(texts)) for latent, texts in contexts.items())
                index.executemany("INSERT INTO texts (rowid, explanation, contexts) VALUES (?, ?, ?)", rows)

    def latents(self, text: str) -> npt.NDArray[np.int64]:
        """The latents whose explanation or contexts have all the words; the last word may go on.

        Raises:
            UserError: there is no index yet, or it cannot be read.
        """
        if self.state != "ready":
            reason = "the search index is being built; try again in a moment" if self.state == "building" else self.state
            raise UserError(reason)
        if not (wanted := match(text)):
            return np.empty(0, np.int64)
        try:
            if not hasattr(self._own, "database"):
                self._own.database = sqlite3.connect(
                    f"{self.path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False
                )
            rows = self._own.database.execute("SELECT rowid FROM texts WHERE texts MATCH ?", (wanted,)).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"the search index {self.path} cannot be read ({error}); delete it and start again") from error
        return np.array([row[0] for row in rows], np.int64)


def match(text: str) -> str:
    """A reader's words in FTS5's language: each quoted, so that none is an operator; the last one as a prefix."""
    words = re.findall(r"\w+", text)[:MAX_WORDS]
    return " ".join(f'"{word}"' for word in words) + ("*" if words else "")


def _fingerprint(coder: Coder) -> str:
    digest = hashlib.sha256(f"{FORMAT} {coder.folder.resolve()}".encode())
    for name in ("examples.sqlite", "interpretation.parquet", "latents.parquet"):
        path = coder.folder / name
        if path.is_file():
            digest.update(f" {name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:24]
