"""The progress bar."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.live import Live

from crossdiff.progress import progress_bar


def test_an_interrupt_while_the_bar_is_first_drawn_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Live) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    written, errors = io.StringIO(), sys.stderr
    monkeypatch.setattr(Live, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt), progress_bar(Console(file=written, force_terminal=True), "work", 3):
        pytest.fail("the bar was drawn")
    assert sys.stderr is errors
    shown, hidden = "\x1b[?25h", "\x1b[?25l"
    assert written.getvalue().rfind(shown) > written.getvalue().rfind(hidden) >= 0


def test_the_bar_counts_and_keeps_its_note() -> None:
    written = io.StringIO()
    with progress_bar(Console(file=written, force_terminal=True, width=100), "work", 3) as advance:
        advance(2, "loss 0.5")
        advance()
    assert "3/3" in written.getvalue() and "loss 0.5" in written.getvalue()
