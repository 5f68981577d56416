"""The widget of a run: a prompt that both models read, a list of what to show, and the latents of a token that is clicked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import numpy.typing as npt
import traitlets

from crossdiff.errors import UserError
from crossdiff.report.cards import LEVELS, pieces
from crossdiff.report.concept_choices import ConceptChoice
from crossdiff.report.examples import Context, visible
from crossdiff.report.marks import sign_of, verdict_mark
from crossdiff.report.templating import scoped_style
from crossdiff.report.wording import words
from crossdiff.text_activations import Known, Measure, Reading, Text, activations_on

_FOLDER = Path(__file__).parent


class Explorer(anywidget.AnyWidget):
    """What `Diff.widget` returns. `read` does what the button does; the other attributes are what the page shows.

    Attributes:
        prompt: the text of the prompt's field.
        asks: whether that text is a user's question, and not plain text.
        choices: the concepts that can be shown, with the latents that each adds up.
        reading: the tokens, and of each active pair of token and latent its value; empty before the first prompt.
        error: why the last prompt was refused, or "".
    """

    _esm = _FOLDER / "widget.js"
    _css = scoped_style() + "\n" + (_FOLDER / "widget.css").read_text(encoding="utf-8")
    prompt = traitlets.Unicode("").tag(sync=True)
    asks = traitlets.Bool(True).tag(sync=True)
    choices: Any = traitlets.List().tag(sync=True)
    levels = traitlets.Int(LEVELS).tag(sync=True)
    n_latents = traitlets.Int(0).tag(sync=True)
    reading = traitlets.Dict().tag(sync=True)
    error = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        run: Callable[[Text], Reading],
        known: Mapping[int, Known],
        concepts: Sequence[ConceptChoice],
        measure: Measure | None,
        prompt: Text,
    ) -> None:
        super().__init__()
        self._run, self._known, self._measure, self._n_read = run, known, measure, 0
        self.choices = [
            {"number": number, "name": name, "members": members, **_verdict(verdict)}
            for number, name, verdict, members in concepts
        ]
        self.on_msg(self._asked)
        if prompt:
            self.read(prompt)

    def read(self, text: Text) -> None:
        """Let both models read a text, and show it. A string is a user's question, unless `asks` is false.

        Raises:
            UserError: what `Diff.activations` raises, and a measure that is not one finite number per token.
        """
        if isinstance(text, str):
            self.prompt = text
            text = [{"role": "user", "content": text}] if self.asks else text
        found = self._run(text)
        measured = None if self._measure is None else measured_on(found, self._measure)
        self._n_read += 1
        self.error = ""
        self.n_latents = found.n_latents
        self.reading = {"count": self._n_read, **_shown(found, self._known), "measure": measured}

    def _asked(self, _: Any, content: Any, buffers: Any) -> None:
        """What the button does: an error is shown in place of the text."""
        self.asks = bool(content.get("asks"))
        try:
            self.read(str(content.get("prompt", "")))
        except UserError as error:
            self.error = ""  # so that the same error again is a change as well
            self.error = str(error)


def measured_on(reading: Reading, measure: Measure) -> list[float]:
    """The value of a user's function on each token.

    Raises:
        UserError: the function raises, or does not return one finite number per token.
    """
    n = len(reading.tokens)
    activations = activations_on(reading, range(reading.n_latents), {})
    try:
        found = measure(activations)
    except Exception as error:
        raise UserError(f"the measure raised {type(error).__name__}: {error}") from error
    expected = f"expected one finite number per token, an array of shape ({n},)"
    try:
        values: npt.NDArray[np.float64] = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"the measure returned {found!r}; {expected}") from None
    if values.shape != (n,):
        raise UserError(f"the measure returned an array of shape {values.shape}; {expected}")
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UserError(f"the measure is {values[at]} on token {at}, {reading.tokens[at].text!r}; {expected}")
    return [float(value) for value in values]


def _shown(reading: Reading, known: Mapping[int, Known]) -> dict[str, Any]:
    """The text in pieces as the report shows it, its active pairs by token with the strongest first, and their latents."""
    pairs = reading.pairs
    order = np.lexsort((-pairs.v, pairs.token))
    about = {latent: known.get(latent, Known()) for latent in np.unique(pairs.latent).tolist()}
    return {
        "pieces": [piece._asdict() for piece in pieces(Context(reading.tokens, -1, False, False), 1.0)],
        "texts": [visible(token.text) for token in reading.tokens],
        "ids": [token.id for token in reading.tokens],
        "token": pairs.token[order].tolist(),
        "latent": pairs.latent[order].tolist(),
        "v": [round(float(value), 4) for value in pairs.v[order]],
        "latents": {
            str(latent): {"largest": each.largest, "label": each.label, **_verdict(each.verdict)}
            for latent, each in about.items()
        },
    }


def _verdict(verdict: str) -> dict[str, str]:
    """The words of a verdict with its sign; empty where none is known."""
    if not verdict:
        return {"verdict": "", "glyph": "", "colour": ""}
    sign = sign_of(words(verdict), verdict_mark(verdict))
    return {"verdict": sign.name, "glyph": sign.glyph, "colour": sign.colour}
