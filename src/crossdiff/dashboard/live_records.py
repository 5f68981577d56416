"""The JSON of a live prompt, as `live_actions.as_json` makes it, and the request for one: for the page that documents them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Turn(BaseModel):
    """A turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str


class LiveRequest(BaseModel):
    """What the models are asked to do. Only `action` is needed."""

    action: Literal["read", "answer-chat", "answer-base", "answer-both", "steer"]
    kind: Literal["chat", "text"] = Field("chat", description="whether `turns` or `text` is read")
    turns: list[Turn] = []
    system: str = ""
    text: str = ""
    length: int = Field(60, description="most tokens of an answer")
    steer: str = Field("", description='latents, such as "3, 17:0.5"')
    concept: str = Field("", description="a concept whose latents steer")
    mode: Literal["add", "ablate"] = "add"
    strength: float = 1.0
    model: Literal["base", "chat"] = "chat"
    tokens: Literal["all", "prompt", "template", "generated"] = "all"


class ActiveLatent(BaseModel):
    """A latent that is active on a token, with its activation."""

    latent: int
    v: float


class LiveToken(BaseModel):
    """A token, with its active latents, the strongest first."""

    id: int
    text: str
    flags: int = Field(description="1 BOS, 2 template, 4 user, 8 assistant, added up")
    active: list[ActiveLatent]


class SteeredLatent(BaseModel):
    """A latent that steered the answer."""

    latent: int
    strength: float


class LiveText(BaseModel):
    """A text that both models read."""

    name: str = Field(description="who answered")
    answer: str | None
    ending: str | None = Field(description="finished, length or stopped")
    steered: list[SteeredLatent]
    answer_from: int | None = Field(description="the token with which the answer begins, counted from 0")
    tokens: list[LiveToken]


class LiveRecord(BaseModel):
    """A prompt with what the models made of it."""

    address: str = Field(description="where it is kept; ADDRESS.json gives it again")
    run: str
    crosscoder: str
    action: str
    settings: dict[str, Any] = Field(description="all fields of the request")
    texts: list[LiveText]
