"""Activations of latents on a text, computed now by running both models on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
from crossdiff.report.wording import number
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

Text = str | Sequence[Mapping[str, Any]]


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
    """

    tokens: tuple[str, ...]
    roles: tuple[str, ...]
    flags: tuple[int, ...]
    latents: tuple[int, ...]
    values: npt.NDArray[np.float32]
    highest: tuple[float, ...]
    ids: tuple[int, ...] = field(repr=False)
    data: tuple[bytes, ...] = field(repr=False)

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
            peak, highest = max(values), max(self.highest[index], *values)
            origin = f"latent {name} \N{MIDDLE DOT} maximum {number(peak)} here, largest known {number(highest)}"
            views.append(prompt_view(origin, tokens, highest or 1.0))
        return fragment(views=views, title="" if views else "No latent is active on this text")


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


def activations_on(
    sequence: TokenSequence,
    pair: Pair,
    crosscoder: Crosscoder,
    rule: Counted,
    latents: Sequence[int] | None,
    largest: Mapping[int, float],
) -> Activations:
    """The activations of latents on a text.

    Args:
        rule: which tokens have activations, as in training.
        latents: numbers of the latents; None for the strongest on this text.
        largest: the largest known activation of each latent, from the latent table.
    """
    check_latents(latents or (), crosscoder.n_latents)
    found = active_pairs(pair, crosscoder, sequence, rule)
    v = np.zeros((len(sequence.token_ids), crosscoder.n_latents), np.float32)
    v[found.token, found.latent] = found.v
    if latents is None:
        top = v.max(0)
        latents = [int(latent) for latent in np.argsort(-top, kind="stable")[:STRONGEST] if top[latent] > 0]
    ids, flags = sequence.token_ids.tolist(), tuple(sequence.flags.tolist())
    words = [token_text(pair.tokenizer, token) for token in ids]
    texts = tuple(each.text for each in words)
    return Activations(
        tokens=texts,
        roles=tuple(role_of(Token(text, flag, 0.0)) for text, flag in zip(texts, flags, strict=True)),
        flags=flags,
        latents=tuple(latents),
        values=v[:, list(latents)],
        highest=tuple(largest.get(latent, 0.0) for latent in latents),
        ids=tuple(ids),
        data=tuple(each.data for each in words),
    )
