"""Live prompts: activations, answers and steering. The models are loaded once, and one request runs at a time."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.editions import one_edition
from crossdiff.dashboard.looks import Predicted, RunLook
from crossdiff.errors import UserError

if TYPE_CHECKING:
    from crossdiff.causal.steering import Steerer, Steering
    from crossdiff.dashboard.editions import Edition
    from crossdiff.diff import Diff
    from crossdiff.models.lens import Promoted
    from crossdiff.text.sequences import TokenSequence

MAX_NEW_TOKENS = 120
MAX_CHARACTERS = 20_000
MAX_STRENGTH = 20.0
MAX_LATENTS = 12
WAITING = 8
"""Requests that may wait for the models; further ones are turned away."""
KEPT = 64
"""Readings that are kept, so that clicking a token does not run the models again."""
PATIENCE = 120.0
"""Seconds that a request waits for the models."""

Order = Literal["active", "specific"]
Prompt = str | Sequence[Mapping[str, str]]


class Busy(Exception):
    """Too many requests are waiting for the models."""


@dataclass(frozen=True)
class Reading:
    """One text with its active latents: arrays `[pair]` of token, latent and v; and the text, flags and id of each token.

    `data` has the bytes of each token that is not made of whole characters, and is empty for the others.
    """

    key: str
    texts: tuple[str, ...]
    flags: tuple[int, ...]
    token: npt.NDArray[np.int64]
    latent: npt.NDArray[np.int64]
    v: npt.NDArray[np.float32]
    ids: tuple[int, ...]
    data: tuple[bytes, ...]

    def of(self, latent: int) -> npt.NDArray[np.float32]:
        """The latent's v on every token."""
        values = np.zeros(len(self.texts), np.float32)
        mine = self.latent == latent
        values[self.token[mine]] = self.v[mine]
        return values

    def at(self, position: int) -> list[tuple[int, float]]:
        """The active latents of a token, the strongest first."""
        here = np.flatnonzero(self.token == position)
        order = here[np.argsort(-self.v[here], kind="stable")]
        return [(int(self.latent[pair]), float(self.v[pair])) for pair in order]

    def counts(self) -> npt.NDArray[np.int64]:
        """Number of active latents per token."""
        return np.bincount(self.token, minlength=len(self.texts))

    def strongest(self, order: Order, rank_sum: Mapping[int, float], n: int) -> list[int]:
        """The most active latents, or the active ones with the lowest `rank_sum`, which are the most chat-specific."""
        latents, where = np.unique(self.latent, return_inverse=True)
        top = np.zeros(len(latents), np.float32)
        np.maximum.at(top, where, self.v)
        if order == "active":
            return [int(latents[i]) for i in np.argsort(-top, kind="stable")[:n]]
        ranked = [(rank_sum[int(latent)], int(latent)) for latent in latents if rank_sum.get(int(latent), np.nan) >= 0]
        return [latent for _, latent in sorted(ranked)[:n]]


@dataclass(frozen=True)
class Sides:
    """One latent's input from each model on a stored example: `<x_s, e^s>` per token, and the bias added to their sum."""

    base: npt.NDArray[np.float32]
    chat: npt.NDArray[np.float32]
    bias: float


class Live:
    """The models of all runs. Threads take turns with them; earlier readings are available without them."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._turn = threading.Lock()
        self._line = threading.Semaphore(WAITING + 1)
        self._diffs: dict[str, tuple[Edition, Diff]] = {}
        self._readings: OrderedDict[str, tuple[str, Edition, Reading]] = OrderedDict()
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

            sequence = read_text(diff.pair.tokenizer, text, diff.harvest.max_length)
            reading = _reading(diff, sequence)
        self._readings[reading.key] = coder.path, coder.edition, reading
        while len(self._readings) > KEPT:
            self._readings.popitem(last=False)
        return reading

    def predictions(self, look: RunLook, text: Prompt) -> Predicted:
        """What both models expect after each token of a text."""
        check_length(text)
        with self._models(look) as diff:
            from crossdiff.dashboard.look_predictions import predicted
            from crossdiff.text_activations import read_text

            return predicted(diff.pair, read_text(diff.pair.tokenizer, text, diff.harvest.max_length))

    def recall(self, coder: Coder, key: str) -> Reading | None:
        """An earlier reading by these results of the crosscoder, while it is kept."""
        path, edition, reading = self._readings.get(key, ("", None, None))
        return reading if (path, edition) == (coder.path, coder.edition) else None

    def answer(
        self, coder: Coder, text: Prompt, steering: Sequence[Steering | None], models: Sequence[str], n: int
    ) -> list[str]:
        """One answer of at most `n` tokens for each pair of steering and model."""
        check_length(text)
        with self._models(coder) as diff:
            from crossdiff.causal.generation import Prompt, Sampling
            from crossdiff.text.chat import Flag
            from crossdiff.text_activations import read_text

            sequence = read_text(diff.pair.tokenizer, text, diff.harvest.max_length)
            template = tuple(bool(flag & Flag.TEMPLATE) for flag in sequence.flags.tolist())
            prompt, sampling = Prompt(tuple(sequence.token_ids.tolist()), template), Sampling(min(n, MAX_NEW_TOKENS))
            steerer = _steerer(diff, coder)
            return [
                steerer.answer_prompts([prompt], each, sampling, model)[0].text
                for each, model in zip(steering, models, strict=True)
            ]

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
            base, chat = parts.cpu().numpy().T
            return Sides(base, chat, float(crosscoder.encoder_bias[latent] * scale))

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


def _reading(diff: Diff, sequence: TokenSequence) -> Reading:
    from crossdiff.text.token_texts import token_text
    from crossdiff.text_activations import active_pairs

    found = active_pairs(diff.pair, diff.crosscoder_at_pair, sequence, diff.rule)
    ids = tuple(sequence.token_ids.tolist())
    words = [token_text(diff.pair.tokenizer, token) for token in ids]
    return Reading(
        key=secrets.token_urlsafe(12),
        texts=tuple(word.text for word in words),
        flags=tuple(sequence.flags.tolist()),
        token=found.token,
        latent=found.latent,
        v=found.v,
        ids=ids,
        data=tuple(word.data for word in words),
    )


def _steerer(diff: Diff, coder: Coder) -> Steerer:
    from crossdiff.causal.steering import Steerer

    return Steerer(diff.pair, diff.crosscoder_at_pair, diff.crosscoder.origin["layer"], coder.table, diff.rule)


def _lens(diff: Diff, latent: int, n: int) -> tuple[Promoted, ...]:
    from crossdiff.models.lens import lenses

    base, chat = (direction[latent] for direction in diff.crosscoder.directions())
    return lenses(diff.pair, base, chat, n)
