"""The form of the live page: what a reader typed and chose, read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from crossdiff.dashboard.live import MAX_LATENTS, MAX_NEW_TOKENS, MAX_STRENGTH, Prompt
from crossdiff.errors import UserError

MAX_TURNS = 20
CHOICES = {
    "kind": ("chat", "text"), "order": ("active", "specific", "chosen"), "mode": ("add", "ablate"), "model": ("chat", "base"),
    "tokens": ("all", "prompt", "template", "generated"),
}  # fmt: skip


class Turn(NamedTuple):
    """One message."""

    role: str
    content: str


@dataclass(frozen=True)
class Form:
    """The fields of the form; the page shows them again with the result."""

    kind: str = "chat"
    text: str = ""
    system: str = ""
    turns: tuple[Turn, ...] = (Turn("user", ""),)
    order: str = "specific"
    chosen: str = ""
    steer: str = ""
    concept: str = ""
    mode: str = "add"
    strength: float = 1.0
    model: str = "chat"
    tokens: str = "all"
    length: int = 60

    def prompt(self) -> Prompt:
        """The text or messages that the models read."""
        if self.kind == "text":
            if not self.text.strip():
                raise UserError("there is no text yet; type some, then press Read")
            return self.text
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        turns = [{"role": turn.role, "content": turn.content} for turn in self.turns if turn.content.strip()]
        if not turns:
            raise UserError("the conversation is empty; type a message, then press Read")
        return [*system, *turns]

    def latents(self) -> list[int]:
        """The chosen latents."""
        words = self.chosen.replace(",", " ").split()
        if len(words) > MAX_LATENTS:
            raise UserError(f"{len(words)} latents are chosen; at most {MAX_LATENTS} can be shown at once")
        return [whole(word) for word in words]

    def steered(self) -> dict[int, float]:
        """The latents to steer with, each with its strength: that of the form, times the factor behind its number."""
        words = self.steer.replace(",", " ").split()
        if len(words) > MAX_LATENTS:
            raise UserError(f"{len(words)} latents are to be steered; at most {MAX_LATENTS} can be steered at once")
        found: dict[int, float] = {}
        for word in words:
            number, colon, factor = word.partition(":")
            latent = whole(number)
            if latent in found:
                raise UserError(f"latent {latent} is named twice; give each latent once, with one factor, such as {latent}:0.5")
            found[latent] = _strength(f"{self.strength * _factor(factor):g}") if colon else self.strength
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` reads."""
        return {**asdict(self), "turns": [turn._asdict() for turn in self.turns]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Form:
        """The form of `as_json`."""
        return cls(**{**found, "turns": tuple(Turn(**turn) for turn in found["turns"])})


def read_json(found: object) -> list[tuple[str, str]]:
    """The fields of a form that a program sent as a JSON object: `turns` is a list of role and content, the rest is plain."""
    names = {field.name for field in fields(Form)} | {"action"}
    if not isinstance(found, dict) or not set(found) <= names:
        unknown = sorted(set(found) - names)[:1] if isinstance(found, dict) else type(found).__name__
        raise UserError(f"the request has {unknown}; expected a JSON object with some of {', '.join(sorted(names))}")
    turns = found.get("turns", [])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and set(turn) == {"role", "content"} for turn in turns):
        raise UserError("turns is not a list of messages; expected objects with role and content alone")
    plain = [(key, value) for key, value in found.items() if key != "turns"]
    plain += [(key, turn[key]) for turn in turns for key in ("role", "content")]
    for key, value in plain:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{key} is {str(value)[:40]}; expected a text or a number")
    return [(key, str(value)) for key, value in plain]


def read_form(pairs: list[tuple[str, str]]) -> Form:
    """A form from its fields, in their order."""
    last = dict(pairs)
    roles, contents = ([value for key, value in pairs if key == name] for name in ("role", "content"))
    if len(roles) != len(contents) or len(roles) > MAX_TURNS:
        raise UserError(
            f"the conversation has {len(contents)} messages with {len(roles)} roles; expected a role for each of at most "
            f"{MAX_TURNS} messages"
        )
    if wrong := [role for role in roles if role not in ("user", "assistant")]:
        raise UserError(f"the role {wrong[0][:40]!r} is not known; expected user or assistant")
    for key, choices in CHOICES.items():
        if last.get(key, choices[0]) not in choices:
            raise UserError(f"{key} is {last[key][:40]!r}; expected one of {', '.join(choices)}")
    turns = tuple(map(Turn, roles, contents)) or (Turn("user", ""),)
    texts = {key: last[key] for key in (*CHOICES, "text", "system", "chosen", "steer", "concept") if key in last}
    return Form(turns=turns, strength=_strength(last.get("strength", "1")), length=_length(last.get("length", "60")), **texts)


def continued(form: Form, answer: str) -> Form:
    """The form with an answer as the next turn, and room for the message after it."""
    written = tuple(turn for turn in form.turns if turn.content.strip())
    return replace(form, turns=(*written, Turn("assistant", answer), Turn("user", ""))[:MAX_TURNS])


def question(form: Form) -> Form:
    """The form without the answer that is followed by an empty message: nothing was asked since, so the same is asked again."""
    is_answered = len(form.turns) > 1 and form.turns[-2].role == "assistant" and not form.turns[-1].content.strip()
    return replace(form, turns=form.turns[:-2]) if form.kind == "chat" and is_answered else form


def edited(form: Form, action: str) -> Form | None:
    """The form with a message more or less; None if the action is another one. An answer goes with an empty one after it."""
    if action == "add":
        role = "assistant" if form.turns[-1].role == "user" else "user"
        if len(form.turns) >= MAX_TURNS:
            raise UserError(f"the conversation already has {MAX_TURNS} messages, the most that it can have here")
        return replace(form, turns=(*form.turns, Turn(role, "")))
    if action == "remove":
        shorter = question(form)
        turns = form.turns[:-1] if shorter is form else shorter.turns
        return replace(form, turns=turns or (Turn("user", ""),))
    return None


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_STRENGTH:
        raise UserError(f"the strength is {text[:40]!r}; expected a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
    return value


def _factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{text[:40]!r} is not a factor of the strength; expected a number, such as 3:0.5") from None


def _length(text: str) -> int:
    value = whole(text)
    if not 1 <= value <= MAX_NEW_TOKENS:
        raise UserError(f"the length is {value} tokens; expected 1 to {MAX_NEW_TOKENS}")
    return value


def whole(text: str) -> int:
    """A whole number that a reader typed."""
    if not (text.strip().isdecimal() and len(text) < 10):
        raise UserError(f"{text[:40]!r} is not a whole number")
    return int(text)
