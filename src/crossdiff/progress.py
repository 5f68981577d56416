"""Progress bars for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(console: Console, title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar with elapsed and remaining time; yields `advance(n=1, note="", total=None)`."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    progress, shown = Progress(*columns, console=console), ""
    task = progress.add_task(title, total=total, note="")

    def advance(n: int = 1, note: str = "", total: int | None = None) -> None:
        nonlocal shown
        shown = note or shown
        progress.update(task, advance=n, total=total, note=shown)

    try:
        progress.start()
    except BaseException:
        # An interrupt while the bar is first drawn: its own `with` would leave the cursor hidden and stderr redirected.
        with suppress(IndexError):  # the bar had not started yet
            progress.stop()
        console.show_cursor(True)
        raise
    try:
        yield advance
    finally:
        progress.stop()
