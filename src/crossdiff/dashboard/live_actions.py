"""What the buttons of the live page stand for: from a form to texts that were read, kept under an address, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.kept import Kept
from crossdiff.dashboard.live import Hear, Live, Wanted
from crossdiff.dashboard.live_form import Form, continued, question, whole
from crossdiff.dashboard.readings import Part
from crossdiff.errors import UserError, check_latents
from crossdiff.report.concept_reading import check_concept
from crossdiff.sources import SOURCES

if TYPE_CHECKING:
    from crossdiff.causal.steering import Steering

FORMAT = 2
ANSWERS = {"answer-chat": ("chat",), "answer-base": ("base",), "answer-both": SOURCES}
"""The models that each button lets answer."""


class Lost(Exception):
    """A request that cannot be shown again, with the reason, and its form as far as it is known."""

    def __init__(self, message: str, form: Form | None = None, status: int = 404) -> None:
        super().__init__(message)
        self.form = form or Form()
        self.status = status


@dataclass(frozen=True)
class Done:
    """A request that was carried out: its form and button, and the texts that were read."""

    form: Form
    action: str
    parts: tuple[Part, ...]

    @property
    def next_form(self) -> Form:
        """The form to fill in next. The answer of one model is a turn of the conversation now."""
        is_turn = len(ANSWERS.get(self.action, ())) == 1 and self.form.kind == "chat"
        return continued(self.form, self.parts[0].answer or "") if is_turn else self.form


def carry_out(live: Live, coder: Coder, form: Form, action: str, hear: Hear = lambda number, name, text: True) -> Done:
    """Read the text, or let the models answer its last question and read it with the answers.

    Args:
        hear: gets the answers while they are written; see `Live.answer`.
    """
    check_shown(coder, form)
    if action == "read":
        return Done(form, action, (Part(live.read(coder, form.prompt())),))
    answers = wanted(coder, form, action)
    form = question(form)
    prompt = form.prompt()
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise UserError("the conversation ends with an answer; type the next message, or remove the answer, then ask again")
    return Done(form, action, live.answer(coder, prompt, answers, form.length, hear))


def check_shown(coder: Coder, form: Form) -> list[int]:
    """The latents that the reader chose to see; none unless the form asks for chosen ones."""
    chosen = form.latents() if form.order == "chosen" else []
    if form.order == "chosen" and not chosen:
        raise UserError("no latent is chosen; give numbers, or show the most active or most chat-specific ones")
    check_latents(chosen, coder.table.height, coder.title)
    return chosen


def wanted(coder: Coder, form: Form, action: str) -> tuple[Wanted, ...]:
    """The answers that a button asks for."""
    if action in ANSWERS:
        return tuple(Wanted(f"{model} model", model) for model in ANSWERS[action])
    if action != "steer":
        raise UserError(f"there is no action {action[:40]!r}; load the page again")
    steering = _steering(coder, form)
    done = "added" if form.mode == "add" else "ablated"
    strengths = ", ".join(f"{latent} at strength {strength:g}" for latent, strength in steering.strengths.items())
    named = f"concept {form.concept.strip()} {done}: latents" if form.concept.strip() else f"{done}: latents"
    if len(steering.strengths) == 1:
        named = named.replace("latents", "latent")
    return (
        Wanted(f"{form.model} model, not steered", form.model),
        Wanted(f"{form.model} model, {named} {strengths}", form.model, steering),
    )


def _steering(coder: Coder, form: Form) -> Steering:
    from crossdiff.causal.steering import Steering

    strengths = form.steered()
    if form.concept.strip():
        strengths = {**dict.fromkeys(members(coder, whole(form.concept.strip())), form.strength), **strengths}
    if not strengths:
        raise UserError("no latent to steer with is chosen; give its number; those that are active are listed below the text")
    check_latents(strengths, coder.table.height, coder.title)
    (latent, strength), *others = strengths.items()
    choices: dict[str, Any] = {"mode": form.mode, "model": form.model, "tokens": form.tokens}
    return Steering(latent, strength=strength, others=tuple(others), **choices)


def members(coder: Coder, concept: int) -> list[int]:
    """The latents of a concept in this training."""
    if coder.concepts is None:
        raise UserError("this run has no concepts; `crossdiff concepts` finds them, or give numbers of latents")
    check_concept(coder.concepts.found, concept)
    found = coder.concepts.found.members.filter((pl.col("concept") == concept) & (pl.col("training") == coder.name))[
        "latent"
    ].to_list()
    if not found:
        raise UserError(
            f"concept {concept} has no latent in {coder.title}; steer with a training that has one, or with latents"
        )
    return sorted(found)


def keep(kept: Kept, coder: Coder, done: Done) -> str:
    """Keep what was done with these results, and return its key."""
    parts = [part.as_json() for part in done.parts]
    return kept.put({**_results(coder), "form": done.form.as_json(), "action": done.action, "parts": parts})


def recall(kept: Kept, coder: Coder, key: str) -> Done:
    """What was done under a key.

    Raises:
        Lost: it is not kept, belongs to another crosscoder, or the results were replaced since.
    """
    entry = kept.get(key)
    results = _results(coder)
    if entry is None or any(entry.get(name) != results[name] for name in ("format", "run", "crosscoder")):
        raise Lost("Nothing is kept under this address any more. Type the text again, then press Read.")
    form = Form.from_json(entry["form"])
    if entry["edition"] != results["edition"]:
        raise Lost("The results of this run were replaced since this text was read. Press Read to read it again.", form, 409)
    return Done(form, entry["action"], tuple(map(Part.from_json, entry["parts"])))


def _results(coder: Coder) -> dict[str, Any]:
    """What an entry was made with."""
    run = str(coder.directory.resolve())
    return {"format": FORMAT, "run": run, "crosscoder": coder.name, "edition": coder.edition.digest}


def as_json(coder: Coder, done: Done, address: str) -> Mapping[str, Any]:
    """What was done, for programs: each text with its tokens and the active latents of each, the strongest first."""
    return {
        "address": address,
        "run": coder.run,
        "crosscoder": coder.name,
        "action": done.action,
        "settings": done.form.as_json(),
        "texts": [_text_json(part) for part in done.parts],
    }


def _text_json(part: Part) -> dict[str, Any]:
    reading = part.reading
    active: list[list[dict[str, Any]]] = [
        [{"latent": latent, "v": float(f"{v:.9g}")} for latent, v in reading.at(position)]
        for position in range(len(reading.ids))
    ]
    tokens = zip(reading.ids, reading.texts, reading.data, reading.flags, active, strict=True)
    return {
        "name": part.name,
        "answer": part.answer,
        "ending": part.ending if part.answer is not None else None,
        "steered": [{"latent": latent, "strength": strength} for latent, strength in part.strengths],
        "answer_from": reading.answer_from if part.answer is not None else None,
        "tokens": [
            {"id": each, "text": text, **({"bytes": data.hex()} if data else {}), "flags": flags, "active": latents}
            for each, text, data, flags, latents in tokens
        ],
    }
