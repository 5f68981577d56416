"""The embedded pair: a small base model, the chat model made from it, sample text, and the run that diffs them."""

from __future__ import annotations

from pathlib import Path

from crossdiff.errors import UserError

FOLDER = Path(__file__).parent / "demo"
CONFIG = FOLDER / "run.yaml"
RULES = FOLDER / "rules.yaml"


def demo_path(name: str) -> Path:
    """The file or folder behind a `demo:` name."""
    part = name.removeprefix("demo:")
    parts = {"base": FOLDER / "base", "chat": FOLDER / "chat"}
    parts |= {file.name.split(".")[0]: file for file in sorted((FOLDER / "text").glob("*.jsonl.gz"))}
    if part not in parts:
        raise UserError(f"the embedded pair has no {part!r}; it has {', '.join('demo:' + known for known in parts)}")
    return parts[part]
