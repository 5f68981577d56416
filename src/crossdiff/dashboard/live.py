"""Live prompts: activations, answers and steering. The models are loaded once, and one request runs at a time."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.editions import one_edition
from crossdiff.dashboard.looks import Predicted, RunLook
from crossdiff.dashboard.readings import Ending, Part, Reading
from crossdiff.errors import UserError

if TYPE_CHECKING:
    from crossdiff.causal.generation import Answer
    from crossdiff.causal.steering import Steerer, Steering
    from crossdiff.dashboard.editions import Edition
    from crossdiff.diff import Diff
    from crossdiff.models.lens import Promoted
    from crossdiff.text.chat import Tokenizer
    from crossdiff.text.sequences import TokenSequence

MAX_NEW_TOKENS = 120
MAX_CHARACTERS = 20_000
MAX_STRENGTH = 20.0
MAX_LATENTS = 12
WAITING = 8
"""Requests that may wait for the models; further ones are turned away."""
PATIENCE = 120.0
"""Seconds that a request waits for the models."""

Prompt = str | Sequence[Mapping[str, str]]
Hear = Callable[[int, str, str], bool]
"""Gets the number of an answer, its name, and its text so far after each token; False ends the answers there."""


class Busy(Exception):
    """Too many requests are waiting for the models."""


class Wanted(NamedTuple):
    """One answer: its name on the page, the model that answers, and how it is steered."""

    name: str
    model: str
    steering: Steering | None = None


@dataclass(frozen=True)
class Sides:
    """One latent's input from each model on a stored example: `<x_s, e^s>` per token, and the bias added to their sum."""

    parts: dict[str, npt.NDArray[np.float32]]
    bias: float


class Live:
    """The models of all runs. Threads take turns with them.

    Attributes:
        stops: the answers that are being written, each with what stops it.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._turn = threading.Lock()
        self._line = threading.Semaphore(WAITING + 1)
        self._diffs: dict[str, tuple[Edition, Diff]] = {}
        self.stops: dict[str, threading.Event] = {}
        self._lenses: dict[tuple[str, Edition, int], tuple[Promoted, ...]] = {}

    @contextmanager
    def _models(self, coder: Coder | RunLook) -> Iterator[Diff]:
        """The crosscoder, or the run of a first look, with its pair of models, for this thread alone. Raises `Busy` if too many
        wait already, or after `PATIENCE`."""
        if not self.enabled:
            raise UserError("this dashboard was started with --no-live, so no model is loaded; start it without that option")
        if not self._line.acquire(blocking=False):
            raise Busy
        try:
            if not self._turn.acquire(timeout=PATIENCE):
                raise Busy
            try:
                yield self._diff(coder)
            finally:
                self._turn.release()
        finally:
            self._line.release()

    def _diff(self, coder: Coder | RunLook) -> Diff:
        """The crosscoder of the page's results; those on disk may be others by now."""
        edition, held = self._diffs.get(coder.path, (None, None))
        if held is None or edition != coder.edition:
            with one_edition([coder.directory]) as found:
                if found != (coder.edition,):
                    raise UserError(f"the results of {coder.run} were replaced after this page was opened; load it again")
                held = self._opened(coder)
            self._diffs[coder.path] = coder.edition, held
        return held

    def _opened(self, coder: Coder | RunLook) -> Diff:
        """A crosscoder with everything of the run that the models' requests need."""
        from crossdiff import diff

        opened = diff.open(coder.directory, coder.name or None)
        settings = _pair_settings(opened)
        # Crosscoders of one run share a pair, which is loaded once.
        for _, other in self._diffs.values():
            if _pair_settings(other) == settings:
                opened.__dict__["pair"] = other.pair
        _ = opened.pair
        return opened

    def read(self, coder: Coder, text: Prompt) -> Reading:
        """Run both models on a text."""
        check_length(text)
        with self._models(coder) as diff:
            from crossdiff.text_activations import read_text

            return _reading(diff, read_text(diff.pair.tokenizer, text, diff.harvest.max_length))

    def predictions(self, look: RunLook, text: Prompt) -> Predicted:
        """What both models expect after each token of a text."""
        check_length(text)
        with self._models(look) as diff:
            from crossdiff.dashboard.look_predictions import predicted
            from crossdiff.text_activations import read_text

            return predicted(diff.pair, read_text(diff.pair.tokenizer, text, diff.harvest.max_length))

    def answer(
        self, coder: Coder, text: Prompt, wanted: Sequence[Wanted], n: int, hear: Hear = lambda number, name, text: True
    ) -> tuple[Part, ...]:
        """Answers of at most `n` tokens, each read by both models together with the prompt. When `hear` ends them, what is
        written by then is read."""
        check_length(text)
        with self._models(coder) as diff:
            from crossdiff.text_activations import read_text

            sequence = read_text(diff.pair.tokenizer, text, diff.harvest.max_length)
            written = _write(diff, coder, sequence, wanted, n, hear)
            return tuple(
                Part(
                    _reading(diff, sequence, answer.token_ids, is_chat=not isinstance(text, str)),
                    each.name,
                    answer.text,
                    ending,
                    () if each.steering is None else tuple(each.steering.strengths.items()),
                )
                for each, (answer, ending) in zip(wanted, written, strict=False)
            )

    @contextmanager
    def stoppable(self) -> Iterator[tuple[str, threading.Event]]:
        """A name that nobody can guess and the event that it stops, while the block runs."""
        name, stop = secrets.token_urlsafe(16), threading.Event()
        self.stops[name] = stop
        try:
            yield name, stop
        finally:
            stop.set()
            del self.stops[name]

    def sides(self, coder: Coder, latent: int, token_ids: npt.NDArray[np.int32]) -> Sides:
        """Each model's part of one latent's pre-activation on the tokens of a stored example."""
        _check_compares(coder)
        with self._models(coder) as diff:
            import torch

            from crossdiff.activations.passes import paired_residuals

            crosscoder = diff.crosscoder_at_pair
            with torch.no_grad():
                h = torch.stack(paired_residuals(diff.pair, [token_ids], [crosscoder.origin["layer"]])[0], dim=1)
                x = crosscoder.normalise(h.to(crosscoder.encoder.device))
                encoder = crosscoder.encoder[latent].view(crosscoder.n_sources, crosscoder.d_model)
                # In the unit of v, like every activation that is shown.
                scale = crosscoder.norm_sums()[latent]
                parts = torch.einsum("tsd,sd->ts", x, encoder) * scale
            by_source = dict(zip(crosscoder.sources, parts.cpu().numpy().T, strict=True))
            return Sides(by_source, float(crosscoder.encoder_bias[latent] * scale))

    def lens(self, coder: Coder, latent: int, n: int = 10) -> tuple[Promoted, ...]:
        """Tokens that a latent's directions promote: base in the base model, chat and chat minus base in the chat model."""
        _check_compares(coder)
        key = coder.path, coder.edition, latent
        if key not in self._lenses:
            with self._models(coder) as diff:
                self._lenses[key] = _lens(diff, latent, n)
        return self._lenses[key]


def _pair_settings(diff: Diff) -> tuple[object, ...]:
    """Everything that decides which models are loaded, and how."""
    config, origin = diff.config, diff.crosscoder.origin if diff.name else {}
    named = config.base, config.chat, config.model_dtype
    return diff.path, named, origin.get("pair"), origin.get("model_dtype"), diff.harvest


def _check_compares(coder: Coder) -> None:
    """Refuse a coder with one decoder before waiting for a model."""
    if not coder.compares:
        raise UserError(f"{coder.title} has one decoder, so it has no base and chat side to compare")


def check_length(text: Prompt) -> None:
    """Refuse a text of more than `MAX_CHARACTERS` before it is tokenised."""
    length = len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
    if length > MAX_CHARACTERS:
        raise UserError(f"the text has {length:,} characters; at most {MAX_CHARACTERS:,} are read, so shorten it")


def _write(
    diff: Diff, coder: Coder, sequence: TokenSequence, wanted: Sequence[Wanted], n: int, hear: Hear
) -> list[tuple[Answer, Ending]]:
    """The answers, up to the one at which `hear` ended them."""
    from crossdiff.causal.generation import Prompt, Sampling
    from crossdiff.text.chat import Flag

    room = diff.harvest.max_length - len(sequence.token_ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(sequence.token_ids)} tokens, as many as a sequence of this run (harvest.max_length), so none "
            "are left for an answer; shorten it"
        )
    template = tuple(bool(flag & Flag.TEMPLATE) for flag in sequence.flags.tolist())
    prompt, sampling = Prompt(tuple(sequence.token_ids.tolist()), template), Sampling(min(n, MAX_NEW_TOKENS, room))
    steerer = _steerer(diff, coder)
    written: list[tuple[Answer, Ending]] = []
    for number, each in enumerate(wanted):
        stopped = threading.Event()

        def watch(
            outputs: Sequence[Sequence[int]], number: int = number, name: str = each.name, stopped: threading.Event = stopped
        ) -> bool:
            # A character whose bytes have not all been written yet is left out.
            if not hear(number, name, steerer.answerer.text(outputs[0]).rstrip("\N{REPLACEMENT CHARACTER}")):
                stopped.set()
            return not stopped.is_set()

        (answer,) = steerer.answer_prompts([prompt], each.steering, sampling, each.model, watch)
        written.append((answer, "stopped" if stopped.is_set() else "finished" if answer.finished else "length"))
        if stopped.is_set():
            break
    return written


def _reading(diff: Diff, sequence: TokenSequence, answer: Sequence[int] = (), is_chat: bool = False) -> Reading:
    """Both models' reading of a prompt with the tokens of an answer."""
    from crossdiff.text.chat import Flag
    from crossdiff.text.sequences import TokenSequence
    from crossdiff.text.token_texts import token_text
    from crossdiff.text_activations import active_pairs

    n = len(answer)
    whole = TokenSequence(
        sequence.document,
        np.concatenate([sequence.token_ids, np.array(answer, sequence.token_ids.dtype)]),
        np.concatenate([sequence.flags, np.full(n, Flag.ASSISTANT if is_chat else 0, sequence.flags.dtype)]),
        np.concatenate([sequence.template_index, np.full(n, -1, sequence.template_index.dtype)]),
        np.concatenate([sequence.turn, np.full(n, sequence.turn[-1], sequence.turn.dtype)]),
        sequence.dataset,
    )
    found = active_pairs(diff.pair, diff.crosscoder_at_pair, whole, diff.rule)
    ids = tuple(whole.token_ids.tolist())
    words = [token_text(diff.pair.tokenizer, token) for token in ids]
    return Reading(
        texts=tuple(word.text for word in words),
        data=tuple(word.data for word in words),
        ids=ids,
        flags=tuple(whole.flags.tolist()),
        token=found.token,
        latent=found.latent,
        v=found.v,
        answer_from=len(sequence.token_ids),
        control=_typed_control(diff.pair.tokenizer, sequence),
    )


def _typed_control(tokenizer: Tokenizer, sequence: TokenSequence) -> tuple[str, ...]:
    """The control tokens of a prompt that neither the template nor the tokenizer has put there."""
    from crossdiff.text.chat import Flag

    special, ids = set(tokenizer.all_special_ids), sequence.token_ids.tolist()
    typed = [
        i
        for i, flag in zip(ids, sequence.flags.tolist(), strict=True)
        if not flag & (Flag.BOS | Flag.TEMPLATE) and i in special
    ]
    return tuple(str(tokenizer.convert_ids_to_tokens(i)) for i in dict.fromkeys(typed))


def _steerer(diff: Diff, coder: Coder) -> Steerer:
    from crossdiff.causal.steering import Steerer

    return Steerer(diff.pair, diff.crosscoder_at_pair, diff.crosscoder.origin["layer"], coder.table, diff.rule)


def _lens(diff: Diff, latent: int, n: int) -> tuple[Promoted, ...]:
    from crossdiff.models.lens import lenses

    base, chat = (direction[latent] for direction in diff.crosscoder.directions())
    return lenses(diff.pair, base, chat, n)
