"""Break a tiny run in every way that we can think of, and count what survives.

    python tests/faults/faults.py kills      # kill each command before each of its file changes, and run it again
    python tests/faults/faults.py disk       # let the disk run full in every stage (Linux, as root)
    python tests/faults/faults.py bits       # flip single bits in every result file: is it noticed?
    python tests/faults/faults.py forged     # run directories made by somebody hostile
    python tests/faults/faults.py requests   # hostile requests to a dashboard
    python tests/faults/faults.py sample     # a few of them, within a minute
    python tests/faults/faults.py all        # everything: `make faults`

`--every N` tries only every N-th of them. The exit status is 1 if anything is lost. docs/reliability.md describes what each
part claims, and holds the table that this script prints.
"""

# ruff: noqa: E402 (the imports need what is set before them)

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Threads do not survive a fork, so the libraries get none. They read this when they are imported.
os.environ |= {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from bits import bits
from disk import disk
from forged import forged
from hostile_requests import requests
from kills import kills
from tiny import Tally, Tiny, make


def sample(tiny: Tiny, every: int) -> Iterator[Tally]:
    """A few faults of the kinds that need no rights and no server, for the tests."""
    yield from kills(tiny, 6 * every, ("report", "clean"))
    yield from bits(tiny, 12 * every, positions=1)
    yield from forged(tiny, 12 * every)


PARTS: dict[str, Callable[[Tiny, int], Iterator[Tally]]] = {
    "kills": kills, "disk": disk, "bits": bits, "forged": forged, "requests": requests,
}  # fmt: skip


def table(tallies: list[Tally]) -> str:
    """The tallies as a Markdown table, with a line for each loss below."""
    lines = ["| kind | stage or file | tried | survived | lost |", "|---|---|---:|---:|---:|"]
    for each in tallies:
        lines.append(f"| {each.kind} | {each.place} | {each.tried} | {each.tried - len(each.lost)} | {len(each.lost)} |")
    tried, lost = sum(each.tried for each in tallies), sum(len(each.lost) for each in tallies)
    lines.append(f"| all | | {tried} | {tried - lost} | {lost} |")
    return "\n".join([*lines, "", *(f"LOST {each.kind}, {each.place}, {loss}" for each in tallies for loss in each.lost)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all", "sample"])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try only every N-th fault [1]")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="an empty folder to work in [a temporary one]")
    args = parser.parse_args()
    # The tests check shapes at run time. The runs of this script are broken as users have them.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "jaxtyping" not in type(finder).__module__]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        started, tallies = time.monotonic(), []
        tiny = make((args.folder or Path(temporary)).resolve(), twice=args.part != "sample")
        for part in PARTS.values() if args.part == "all" else (PARTS.get(args.part, sample),):
            for tally in part(tiny, args.every):
                tallies.append(tally)
                print(
                    f"{time.monotonic() - started:6.0f} s  {tally.kind}, {tally.place}: {len(tally.lost)} of {tally.tried} lost"
                )
                print(*(f"          {loss}" for loss in tally.lost), sep="\n", end="\n" if tally.lost else "", flush=True)
    print(f"\n{table(tallies)}")
    sys.exit(any(tally.lost for tally in tallies))


if __name__ == "__main__":
    main()
