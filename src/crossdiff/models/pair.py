"""Load a base model and the chat model made from it, and check that they can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.access import d_model, decoder_layers, n_layers
from crossdiff.models.compiled import compile_layers
from crossdiff.models.loading import choose_dtype, load_model, load_tokenizer
from crossdiff.models.names import find_adapter, identify, identify_all, same_weights
from crossdiff.models.positions import Positions, check_length, positions
from crossdiff.models.probe import probe
from crossdiff.models.tokenizers import BaseReading, check_tokenizers, pin_date, unknown_token
from crossdiff.shapes import Int, Tensor
from crossdiff.sources import BASE, CHAT


class Step(NamedTuple):
    """A model between the base and the chat model, and the ids that it reads in place of ids that it lacks."""

    model: nn.Module
    stand_ins: dict[int, int]


@dataclass(frozen=True)
class Pair:
    """A base and a chat model that read the same token ids, with the tokenizer of the chat model.

    stand_ins: ids that the base model was never trained on, and the ids that it reads instead.
    unreadable: ids that a model lacks, with their tokens.
    remarks: what the user should know about the choice of the models.
    steps: the models between the two by name, in the order of the training; a chain has some.
    """

    base: nn.Module
    chat: nn.Module
    tokenizer: Any
    identity: dict[str, Any]
    stand_ins: dict[int, int] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    steps: Mapping[str, Step] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the models, in the order of every source axis."""
        return (BASE, *self.steps, CHAT)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The models in the order of `sources`."""
        return (self.base, *(step.model for step in self.steps.values()), self.chat)

    def model(self, source: str) -> nn.Module:
        """The model of a source."""
        return self.models[self.sources.index(source)]

    def compile(self) -> None:
        """Compile the decoder layers of both models; see `compile_layers`."""
        for source, model in zip(self.sources, self.models, strict=True):
            compile_layers(model, self.identity[source]["name"])

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> str:
        """Name of the dtype that both models run in."""
        return str(next(self.base.parameters()).dtype).removeprefix("torch.")

    @property
    def n_layers(self) -> int:
        return n_layers(self.base)

    @property
    def d_model(self) -> int:
        return d_model(self.base)

    @property
    def revisions(self) -> dict[str, str | None]:
        """The commit of each model that came from the Hub."""
        return {
            name: getattr(model.config, "_commit_hash", None) for name, model in zip(self.sources, self.models, strict=True)
        }

    def base_ids(self, token_ids: Int[Tensor, "sequence position"]) -> Int[Tensor, "sequence position"]:
        """The ids that the base model reads where the chat model reads `token_ids`. Raises `UserError` if it lacks one."""
        for token in set(token_ids.flatten().tolist()) if self.unreadable else ():
            if token in self.unreadable:
                raise unknown_token(self.unreadable[token])
        return _with_stand_ins(token_ids, self.stand_ins)

    def ids_of(self, source: str, token_ids: Int[Tensor, "sequence position"]) -> Int[Tensor, "sequence position"]:
        """The ids that a source's model reads."""
        if source == BASE:
            return self.base_ids(token_ids)
        return _with_stand_ins(token_ids, self.steps[source].stand_ins) if source in self.steps else token_ids

    def check_layer(self, layer: int | None) -> int:
        """The layer to use: the given one, or the middle one."""
        if layer is None:
            return self.n_layers // 2
        if not 0 <= layer < self.n_layers:
            raise UserError(f"layer {layer} does not exist: the models have {self.n_layers} layers, 0 to {self.n_layers - 1}")
        return layer

    @cached_property
    def _positions(self) -> list[tuple[str, Positions | None]]:
        names = [self.identity[source]["name"] for source in self.sources]
        return [(name, positions(model)) for name, model in zip(names, self.models, strict=True)]

    def check_length(self, n_tokens: int, what: str, remedy: str) -> list[str]:
        """Check that both models can read sequences of this length; see `positions.check_length`."""
        remarks = (check_length(name, found, n_tokens, what, remedy) for name, found in self._positions)
        return [remark for remark in remarks if remark is not None]

    def check_max_length(self, max_length: int) -> list[str]:
        """The same for a harvest's longest sequences."""
        return self.check_length(max_length, f"harvest.max_length {max_length}", "lower it")


def _with_stand_ins(ids: Int[Tensor, "sequence position"], stand_ins: dict[int, int]) -> Int[Tensor, "sequence position"]:
    if not stand_ins:
        return ids
    mapped = ids.clone()
    for token, stand_in in stand_ins.items():
        mapped[ids == token] = stand_in
    return mapped


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary and of the rules that turn text into ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation settings change with use, and ids do not depend on them.
    rules = "" if backend is None else json.dumps({**json.loads(backend.to_str()), "padding": None, "truncation": None})
    return hashlib.sha256((vocabulary + rules).encode()).hexdigest()[:16]


def check_embeddings(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raises `UserError` if the model has fewer embeddings than its tokenizer has ids."""
    found = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    needed = max(tokenizer.get_vocab().values()) + 1
    if found < needed:
        raise UserError(
            f"{name} has {found} embeddings, but its tokenizer's ids go up to {needed - 1}; were tokens added without "
            "resizing the model? Resize its embeddings and save both again"
        )


def load_pair(
    base: str,
    chat: str,
    device: torch.device,
    base_tokens: Mapping[str, str] | None = None,
    template_date: date | None = None,
    dtype: str = "auto",
    steps: Mapping[str, str] | None = None,
) -> Pair:
    """Load two models with one tokenizer, in one dtype, and check that they are a pair.

    Args:
        base_tokens: tokens that the base model lacks or was never trained on, and its own tokens that it reads instead.
        template_date: the date that the chat template writes where it asks for today's.
        dtype: name of the dtype that all run in; see `choose_dtype` for `auto`.
        steps: models between the two by name. They read `base_tokens` in place of those that they lack themselves.
    """
    steps = steps or {}
    names = (base, *steps.values(), chat)
    tokenizers = [load_tokenizer(base), *(load_tokenizer(name, base) for name in names[1:])]
    tokenizer = tokenizers[-1]
    if template_date is not None:
        pin_date(tokenizer, template_date)
    readings: list[BaseReading] = []
    for own, name in zip(tokenizers[:-1], names[:-1], strict=True):
        known = own.get_vocab() if readings else {}  # the base model may have base_tokens, but never have been trained on them
        lacking = {token: stand_in for token, stand_in in (base_tokens or {}).items() if token not in known}
        readings.append(check_tokenizers(own, tokenizer, name, chat, lacking))
    chosen = choose_dtype(dtype, device, *names)
    models = [load_model(base, device, chosen), *(load_model(name, device, chosen, base) for name in names[1:])]
    for what, count in (("decoder layers", n_layers), ("residual dimensions", d_model)):
        found = [count(model) for model in models]
        for other, name in zip(found[1:], names[1:], strict=True):
            if other != found[0]:
                raise UserError(
                    f"{base} has {found[0]} {what}, {name} has {other}; all models need the same number, because their "
                    "activations at a layer are stored in one tensor"
                )
    for model, own, name in zip(models, tokenizers, names, strict=True):
        check_embeddings(model, own, name)
        decoder_layers(model)
        probe(model, name)
    identities = identify_all({BASE: base, **steps, CHAT: chat})
    identity = {**identities, "tokenizer": tokenizer_digest(tokenizer)}
    between = {
        step: Step(model, reading.stand_ins) for step, model, reading in zip(steps, models[1:-1], readings[1:], strict=True)
    }
    unreadable = {token: text for reading in readings for token, text in reading.unreadable.items()}
    remarks = _remarks(list(identities.values()))
    return Pair(models[0], models[-1], tokenizer, identity, readings[0].stand_ins, unreadable, remarks, between)


def _remarks(identities: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What the user should know before the models with these identities run, which are in the order of the training."""
    remarks = []
    base = identities[0]["name"]
    for before, after in pairwise(identities):
        name = after["name"]
        if same_weights(before, after):
            remarks.append(
                f"{before['name']} and {name} are the same model: their files are equal, so there is nothing to compare"
            )
        adapter = find_adapter(name, base)
        if adapter is not None and adapter.remark is not None:
            remarks.append(adapter.remark)
        elif adapter is not None and not any(same_weights(identify(adapter.model), each) for each in identities):
            remarks.append(
                f"{name} is an adapter for {adapter.model}, not for {base}; the diff also shows how those two differ"
            )
    return tuple(remarks)
