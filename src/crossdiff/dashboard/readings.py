"""What the models made of a live prompt: its tokens with their active latents, and the answers, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Order = Literal["active", "specific"]
Ending = Literal["finished", "length", "stopped"]


@dataclass(frozen=True)
class Reading:
    """One text with its active latents.

    Attributes:
        texts, ids, flags: of each token; the bits of a flag are those of `Flag`.
        data: the bytes of each token that is not made of whole characters (see `TokenText`), and empty for the others.
        token, latent, v: `[pair]`, the active (token, latent) pairs and their activation.
        answer_from: position of the first token that a model wrote; the number of tokens if none did.
        control: control tokens that were typed as text, each once.
    """

    texts: tuple[str, ...]
    data: tuple[bytes, ...]
    ids: tuple[int, ...]
    flags: tuple[int, ...]
    token: npt.NDArray[np.int64]
    latent: npt.NDArray[np.int64]
    v: npt.NDArray[np.float32]
    answer_from: int
    control: tuple[str, ...] = ()

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

    def as_json(self) -> dict[str, Any]:
        """Plain data. Nine digits are enough to give a float32 back exactly."""
        pairs = {
            "token": self.token.tolist(),
            "latent": self.latent.tolist(),
            "v": [float(f"{v:.9g}") for v in self.v.tolist()],
        }
        tokens = {"texts": self.texts, "data": [each.hex() for each in self.data], "ids": self.ids, "flags": self.flags}
        return {**tokens, **pairs, "answer_from": self.answer_from, "control": self.control}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Reading:
        """The reading of `as_json`."""
        return cls(
            tuple(found["texts"]),
            tuple(map(bytes.fromhex, found["data"])),
            tuple(found["ids"]),
            tuple(found["flags"]),
            np.array(found["token"], np.int64),
            np.array(found["latent"], np.int64),
            np.array(found["v"], np.float32),
            found["answer_from"],
            tuple(found.get("control", ())),  # results that were kept earlier lack it
        )


@dataclass(frozen=True)
class Part:
    """One text that was read: the prompt alone, or with an answer.

    Attributes:
        name: who answered; empty for the prompt alone.
        answer: what was answered; None for the prompt alone.
        ending: whether the model ended the answer, the limit of tokens did, or the reader.
        strengths: the latents that were steered.
    """

    reading: Reading
    name: str = ""
    answer: str | None = None
    ending: Ending = "finished"
    strengths: tuple[tuple[int, float], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "reading": self.reading.as_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Part:
        """The part of `as_json`."""
        strengths = tuple((latent, strength) for latent, strength in found["strengths"])
        return cls(**{**found, "reading": Reading.from_json(found["reading"]), "strengths": strengths})


def strongest(
    parts: tuple[Part, ...], order: Order, rank_sum: Mapping[int, float], n: int, maxima: Mapping[int, float] | None = None
) -> list[int]:
    """The most active latents of all texts; or the most chat-specific of the active ones.

    Args:
        rank_sum: of the latents that lean to the chat model; those with the lowest fill up what is left of `n`.
        maxima: largest known activation of each latent whose verdict is chat-specific. They come first, by their activation
            relative to it.
    """
    latents, where = np.unique(np.concatenate([part.reading.latent for part in parts]), return_inverse=True)
    top = np.zeros(len(latents), np.float32)
    np.maximum.at(top, where, np.concatenate([part.reading.v for part in parts]))
    if order == "active":
        return [int(latents[i]) for i in np.argsort(-top, kind="stable")[:n]]
    reached = {latent: float(v) for latent, v in zip(latents.tolist(), top, strict=True)}
    known = {latent: v / max(maxima[latent], v) for latent, v in reached.items() if latent in maxima} if maxima else {}
    specific = sorted(known, key=lambda latent: (-known[latent], latent))
    ranked = sorted(
        (rank_sum[latent], latent) for latent in reached if latent not in known and rank_sum.get(latent, np.nan) >= 0
    )
    return [*specific, *(latent for _, latent in ranked)][:n]
