"""Activations of latents on a text, computed now by running both models on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.counted import Counted
from crossdiff.activations.passes import paired_residuals
from crossdiff.errors import UserError, check_latents
from crossdiff.report.cards import prompt_view
from crossdiff.report.examples import Token, role_of
from crossdiff.report.templating import fragment
from crossdiff.report.wording import number, share, words
from crossdiff.text.chat import tokenise_chat, tokenise_prompt
from crossdiff.text.documents import Document
from crossdiff.text.messages import check_messages
from crossdiff.text.sequences import TokenSequence, tokenise
from crossdiff.text.token_texts import token_text

if TYPE_CHECKING:
    from crossdiff.crosscoder.crosscoder import Crosscoder
    from crossdiff.models.pair import Pair

STRONGEST = 5
"""Number of latents that are shown by default."""

NOTE = (
    "The value is v, the activation times the sum of the decoder norms. The strongest tint is the largest value that the "
    "latent is known to reach, on the text that was analysed or on this one."
)

Text = str | Sequence[Mapping[str, Any]]


class Known(NamedTuple):
    """What is known of a latent: the largest activation on the analysed text, its verdict, and its meaning; 0 and "" if not."""

    largest: float = 0.0
    verdict: str = ""
    label: str = ""

    def strength(self, peak: float) -> str:
        """The largest value on a text, compared with the largest on the analysed text."""
        if not self.largest:
            return f"strongest here {number(peak)}"
        if number(peak) == number(self.largest):
            return f"strongest here {number(peak)}, as strong as on the analysed text"
        if peak > self.largest:
            return f"strongest here {number(peak)}, above the {number(self.largest)} of the analysed text"
        return f"strongest here {number(peak)}, {share(peak / self.largest)} of its largest on the analysed text"


def known_latents(latents: pl.DataFrame, labels: Mapping[int, str]) -> dict[int, Known]:
    """What the latent table says of each latent; `labels` name those that nobody has explained."""
    columns = latents.select("latent", "max_activation", "verdict", "explanation")
    return {
        latent: Known(largest, verdict, explanation or labels.get(latent, ""))
        for latent, largest, verdict, explanation in columns.iter_rows()
    }


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations v of some latents on one text. A notebook shows the text once per latent, tinted by its activation.

    Examples:
        >>> run = crossdiff.open("runs/demo")
        >>> found = run.activations("The sea is cold", latents=[3, 1])
        >>> found.values.shape == (len(found.tokens), 2)
        True
        >>> found.table.columns
        ['position', 'token', 'role', 'latent_3', 'latent_1']

    Attributes:
        tokens: the text of each token; bytes that are not a whole character stand as `<0xE2>`.
        roles: bos, template, user, assistant or plain, for each token.
        flags: bits of `Flag`, for each token.
        latents: numbers of the latents, in the requested order, or the strongest first.
        values: `[token, latent]`, v = f * sum over sources of ||d^s||; 0 at the first positions and on tokens of
            massive norm, which training leaves out.
        highest: the largest known activation of each latent, which gets the strongest tint.
        ids: the id of each token.
        data: the bytes of each token that is not made of whole characters; empty for the others.
        verdicts, labels: of each latent, as far as they are known; else "".
    """

    tokens: tuple[str, ...]
    roles: tuple[str, ...]
    flags: tuple[int, ...]
    latents: tuple[int, ...]
    values: npt.NDArray[np.float32]
    highest: tuple[float, ...]
    ids: tuple[int, ...] = field(repr=False)
    data: tuple[bytes, ...] = field(repr=False)
    verdicts: tuple[str, ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = field(default=(), repr=False)

    @property
    def table(self) -> pl.DataFrame:
        """One row per token: position, token, role, and a column `latent_J` per latent."""
        columns: dict[str, Any] = {"position": range(len(self.tokens)), "token": self.tokens, "role": self.roles}
        return pl.DataFrame(columns | {f"latent_{name}": self.values[:, i] for i, name in enumerate(self.latents)})

    def __repr__(self) -> str:
        maxima = ", ".join(f"{name}: {number(float(top))}" for name, top in zip(self.latents, self.values.max(0), strict=True))
        return f"<Activations on {len(self.tokens)} tokens; largest per latent: {maxima or 'no latent is active'}>"

    def _repr_html_(self) -> str:
        views = []
        for index, name in enumerate(self.latents):
            values = self.values[:, index].tolist()
            columns = zip(self.tokens, self.flags, values, self.ids, self.data, strict=True)
            tokens = tuple(Token(*token) for token in columns)
            known = Known(self.highest[index], self.verdicts[index], self.labels[index])
            parts = (f"latent {name}", words(known.verdict), known.label, known.strength(max(values)))
            origin = " \N{MIDDLE DOT} ".join(part for part in parts if part)
            views.append(prompt_view(origin, tokens, max(known.largest, *values) or 1.0))
        if not views:
            return fragment(title="No latent is active on this text")
        return fragment(views=views, title="Activations on a text", note=NOTE)


Measure = Callable[[Activations], npt.ArrayLike]
"""A function of the activations of all latents that gives one number per token."""


def check_text(text: object) -> None:
    """Raises `UserError` if `text` is neither a string nor a list of messages."""
    if isinstance(text, bytes) or not isinstance(text, str | Sequence):
        raise UserError(f"{text!r} is not a text; expected a string, or a list of messages with role and content")
    if not isinstance(text, str):
        check_messages(text)


def read_text(tokenizer: Any, text: Text, max_length: int) -> TokenSequence:
    """The tokens of a plain text or a conversation. Unless it ends with the assistant, the header of the answer follows."""
    if isinstance(text, str):
        document = Document(0, 0, text, None, "heldout", None, None)
        sequences = tokenise(document, tokenizer, max(max_length, 2 * len(text.encode()) + 2))
        if not sequences:
            raise UserError("the text is empty; give a non-empty string or a list of messages")
        (sequence,) = sequences
    else:
        answered = bool(text) and isinstance(text[-1], Mapping) and text[-1].get("role") == "assistant"
        chat = (tokenise_chat if answered else tokenise_prompt)(tokenizer, text)
        sequence = TokenSequence(0, chat.token_ids, chat.flags, chat.template_index, chat.turn, 0)
    if len(sequence.token_ids) > max_length:
        raise UserError(
            f"the text has {len(sequence.token_ids)} tokens; the sequences of this run had at most {max_length} "
            "(harvest.max_length), so shorten it"
        )
    return sequence


@dataclass(frozen=True)
class Pairs:
    """Active (token, latent) pairs of a text with their activation `v`; each array is `[pair]`."""

    token: npt.NDArray[np.int64]
    latent: npt.NDArray[np.int64]
    v: npt.NDArray[np.float32]


@torch.no_grad()
def active_pairs(pair: Pair, crosscoder: Crosscoder, sequence: TokenSequence, rule: Counted) -> Pairs:
    """Run the models and the crosscoder on a text, without the tokens that do not count in training."""
    layer, device = crosscoder.origin["layer"], crosscoder.encoder.device
    found = (stream.to(device) for stream in paired_residuals(pair, [sequence.token_ids], [layer])[0])
    streams = dict(zip(pair.sources, found, strict=True))
    h = torch.stack([streams[name] for name in crosscoder.view.reads], dim=1)
    code = crosscoder.sparse_code(crosscoder.normalise(h))
    v = crosscoder.v(code)
    counted = rule(torch.arange(len(h), device=device), list(streams.values()))
    kept = counted[code.token] & (v > 0)
    return Pairs(*(values[kept].cpu().numpy() for values in (code.token, code.latent, v.float())))


@dataclass(frozen=True)
class Reading:
    """A text that both models have read: its tokens, without activations, and the active latents of each."""

    tokens: tuple[Token, ...]
    pairs: Pairs
    n_latents: int

    def values(self) -> npt.NDArray[np.float32]:
        """The activation of every latent on every token, `[token, latent]`."""
        v = np.zeros((len(self.tokens), self.n_latents), np.float32)
        v[self.pairs.token, self.pairs.latent] = self.pairs.v
        return v


def read(sequence: TokenSequence, pair: Pair, crosscoder: Crosscoder, rule: Counted) -> Reading:
    """Run both models and the crosscoder on a text; `rule` says which tokens have activations, as in training."""
    ids, flags = sequence.token_ids.tolist(), sequence.flags.tolist()
    texts = [token_text(pair.tokenizer, token) for token in ids]
    tokens = tuple(Token(own.text, flag, 0.0, token, own.data) for own, flag, token in zip(texts, flags, ids, strict=True))
    return Reading(tokens, active_pairs(pair, crosscoder, sequence, rule), crosscoder.n_latents)


def activations_on(reading: Reading, latents: Sequence[int] | None, known: Mapping[int, Known]) -> Activations:
    """The activations of latents on a text.

    Args:
        latents: numbers of the latents; None for the strongest on this text.
        known: what is known of each latent.
    """
    check_latents(latents or (), reading.n_latents)
    v = reading.values()
    if latents is None:
        top = v.max(0)
        latents = [int(latent) for latent in np.argsort(-top, kind="stable")[:STRONGEST] if top[latent] > 0]
    about = [known.get(latent, Known()) for latent in latents]
    return Activations(
        tokens=tuple(token.text for token in reading.tokens),
        roles=tuple(map(role_of, reading.tokens)),
        flags=tuple(token.flags for token in reading.tokens),
        latents=tuple(latents),
        values=v[:, list(latents)],
        highest=tuple(each.largest for each in about),
        ids=tuple(token.id or 0 for token in reading.tokens),
        data=tuple(token.data for token in reading.tokens),
        verdicts=tuple(each.verdict for each in about),
        labels=tuple(each.label for each in about),
    )
