"""Flip single bits in every result file, and see whether a command names the damaged file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tiny import FINISHED, Outcome, Tally, Tiny, command, forked

POSITIONS = 8
"""Bits that are flipped in each file, one at a time, spread from its first byte to its last."""
NO_RESULTS = (".lock", "config.yaml", "manifest.json", "tensorboard/")
"""What no digest covers: the settings are the user's to change, and the manifest holds the digests."""


def flip(path: Path, share: float) -> int:
    """Flip one bit at a share of a file's length. Returns the number of the byte."""
    content = bytearray(path.read_bytes())
    byte = round(share * (len(content) - 1))
    content[byte] ^= 1 << (byte % 8)
    path.write_bytes(content)
    return byte


def read_all(run: Path) -> None:
    """Read what the dashboard shows, in Python."""
    import crossdiff

    for name in crossdiff.open(run).names:
        found = crossdiff.open(run, name)
        found.scaling()
        found.causal()
        for latent in range(found.latents.height):
            found.latent(latent)
            found.examples(latent)
    for concept in found.concepts["concept"]:
        found.concept(concept)
    found.store.column("token_id")


def is_noticed(outcome: Outcome, name: str) -> bool:
    """Whether a command failed and named the file."""
    return outcome.status != 0 and name in "".join(outcome.output.split("\n"))


def who_notices(tiny: Tiny, name: str) -> str | None:
    """Which command says that a file is damaged; None if no command does."""
    run = str(tiny.run)
    if is_noticed(command(["verify", run], tiny.folder), name):
        return "verify"
    if name.startswith("activations/"):
        stored = command(["store", "verify", f"{run}/activations"], tiny.folder)
        return "store verify" if is_noticed(stored, name.removeprefix("activations/")) else None
    if is_noticed(forked(lambda: read_all(tiny.run), tiny.folder / "output.txt"), name):
        return "reading"
    if (tiny.run / "report.html").is_file() and name != "report.html":
        (tiny.run / "report.html").unlink()  # otherwise there is nothing to do
    return "report" if is_noticed(command(["report", run], tiny.folder), name) else None


def bits(tiny: Tiny, every: int = 1, positions: int = POSITIONS) -> Iterator[Tally]:
    """Flip bits in every result file, or in every `every`-th."""
    state = tiny.state(FINISHED)
    files = [str(path.relative_to(state)) for path in sorted(state.rglob("*")) if path.is_file()]
    for name in [name for name in files if not name.startswith(NO_RESULTS)][::every]:
        tally = Tally("bits", name)
        for number in range(positions):
            tiny.restore(state)
            byte = flip(tiny.run / name, number / max(1, positions - 1))
            tally.add(f"byte {byte}", None if who_notices(tiny, name) else "no command names the file")
        yield tally
