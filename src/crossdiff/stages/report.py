"""The stage `report`: the page, the figures for print, and the summary on the terminal."""

from __future__ import annotations

from pathlib import Path

from crossdiff.stages.definitions import report_stage
from crossdiff.stages.session import Session


def report(session: Session) -> None:
    """Write `report.html` and `figures/`, and print the summary."""
    from crossdiff.report.reading import read_run
    from crossdiff.report.terminal import print_summary

    for name in session.names:
        session.check_analysed(name)
    found = read_run(session.path, session.names) if session.ranks.is_first else None

    def work(folder: Path) -> None:
        if found is not None:
            from crossdiff.report.html import write_html
            from crossdiff.report.print_figures import write_figures

            write_html(found, folder / "report.html")
            write_figures(found, folder / "figures")

    session.run(report_stage(session.config, session.names, session.run_directory), work)
    if found is not None:
        print_summary(found, session.console)
