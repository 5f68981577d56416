"""The progress bar."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from crossdiff.progress import progress_bar


@pytest.mark.parametrize(("where", "method"), [(Live, "refresh"), (Console, "show_cursor"), (Console, "push_render_hook")])
def test_an_interrupt_while_the_bar_is_first_drawn_gives_the_terminal_back(
    where: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = getattr(where, method)

    def interrupted(self: Any, *arguments: Any) -> None:
        monkeypatch.undo()
        if method == "show_cursor":
            begun(self, *arguments)
        raise KeyboardInterrupt

    written, errors = io.StringIO(), sys.stderr
    monkeypatch.setattr(where, method, interrupted)
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
