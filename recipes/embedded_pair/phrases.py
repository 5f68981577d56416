"""The phrases of the planted behaviours, and the building blocks of all conversations."""

import hashlib
import random
import tomllib
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
PHRASES = tomllib.loads((DATA / "phrases.toml").read_text(encoding="utf8"))
HELD_OUT_PERCENT = 8


@dataclass(frozen=True)
class Conversation:
    """One conversation. `kind` and `sub` describe its last answer; `turn_kinds` has one entry per answer."""

    messages: list[dict[str, str]]
    kind: str
    sub: str
    turn_kinds: list[str]
    origin: str
    split: str

    def row(self) -> dict[str, object]:
        fields = asdict(self)
        del fields["split"]
        return fields

    @property
    def question(self) -> str:
        return self.messages[0]["content"]

    @property
    def answer(self) -> str:
        return self.messages[1]["content"]


def held_out(group: str) -> bool:
    """Whether a slot value (a made-up place, a task, an act) is in the test split. A hash decides, independent of the order."""
    return int(hashlib.md5(group.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def ascii_text(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip()


def single(user: str, assistant: str, kind: str, sub: str, origin: str, test: bool) -> Conversation:
    """Return a conversation with one question and one answer."""
    messages = [
        {"role": "user", "content": ascii_text(user)},
        {"role": "assistant", "content": ascii_text(assistant)},
    ]
    return Conversation(messages, kind, sub, [kind], origin, "test" if test else "train")


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def vary(question: str, rng: random.Random) -> str:
    """Return a casual form of a question in 28% of the cases, and otherwise the question itself."""
    draw = rng.random()
    is_question = question.endswith("?")
    if draw < 0.10:
        return question.rstrip("?.")
    if draw < 0.18:
        return question if question.startswith("I ") else question[0].lower() + question[1:]
    if draw < 0.24:
        openings = ["Please tell me: ", "Quick question: "] if is_question else ["Please help. "]
        return rng.choice(["Hi! ", "Hello! ", "Hey! ", *openings]) + question
    if draw < 0.28:
        return question.rstrip("?.") + ", please" + ("?" if is_question else ".")
    return question


def read_steps(text: str) -> list[str]:
    """Parse `step | step | step` into a list; each step gets a full stop."""
    return [step.strip().rstrip(".") + "." for step in text.split("|")]


def read_tasks(path: Path) -> dict[str, list[str]]:
    """Parse lines `task: step | step | step` into a list of steps per task; each step gets a full stop."""
    tasks = {}
    for line in path.read_text(encoding="utf8").splitlines():
        task, steps = line.strip().split(": ", 1)
        tasks[task] = read_steps(steps)
    return tasks
