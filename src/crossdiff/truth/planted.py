"""Activations generated from known concepts (docs/method.md#ground-truth).

    h[i, s] = mean[s] + sum_c amplitude[s, i, c] * direction[s, c] + noise

There are more concepts than dimensions, so their directions interfere. Every concept belongs to a topic and fires more often in
documents of that topic, so concepts fire together and documents differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from crossdiff.activations.shards import ProgressLog, ShardWriters, to_stored
from crossdiff.activations.store import COLUMNS, Store
from crossdiff.activations.writer import DOCUMENT_COLUMNS, Origin, finish_store, summed_moments
from crossdiff.config import HarvestConfig
from crossdiff.shapes import Float, Int64, Tensor
from crossdiff.sources import BASE, CHAT, SOURCES
from crossdiff.truth.truth_config import PlantedConfig

KINDS = ("shared", "chat_only", "base_only", "weaker", "rotated", "decoupled")
BASE_INDEX, CHAT_INDEX = SOURCES.index(BASE), SOURCES.index(CHAT)
BLOCK = 250
"""Number of documents that are drawn at a time."""
MEAN_NORM = 1.0
"""Norm of each model's constant part, which the normalisation removes."""


@dataclass(frozen=True)
class Concepts:
    """The planted dictionary.

    Attributes:
        kind: index into `KINDS`; topic: index of the topic.
        directions: unit directions; strength: factor on the amplitude in each source, 0 where the concept is absent.
        rate: probability to fire on a token outside the concept's topic.
        mean: constant part of each source, `[source, d_model]`.
    """

    kind: Int64[Tensor, " concept"]
    topic: Int64[Tensor, " concept"]
    directions: Float[Tensor, "source concept d_model"]
    strength: Float[Tensor, "source concept"]
    rate: Float[Tensor, " concept"]
    mean: Float[Tensor, "source d_model"]


@dataclass(frozen=True)
class Tokens:
    """Whole documents.

    Attributes:
        h: activations; amplitude: of each concept in each source, 0 where it does not fire.
        document: number of each token's document.
    """

    h: Float[Tensor, "token source d_model"]
    amplitude: Float[Tensor, "source token concept"]
    document: Int64[Tensor, " token"]


def _unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def plant(config: PlantedConfig) -> Concepts:
    """Draw a dictionary of concepts."""
    generator = torch.Generator().manual_seed(config.seed)
    sizes = torch.tensor([getattr(config, kind) for kind in KINDS])
    kind = torch.repeat_interleave(torch.arange(len(KINDS)), sizes)
    n, d = config.n_concepts, config.d_model
    chat = _unit(generator, n, d)
    base = chat.clone()
    # The base direction of a rotated concept is c times the chat direction plus an orthogonal rest.
    other = torch.randn(n, d, generator=generator)
    other = torch.nn.functional.normalize(other - (other * chat).sum(1, keepdim=True) * chat, dim=1)
    cosine = config.rotated_cosine * torch.rand(n, 1, generator=generator)
    turned = kind == KINDS.index("rotated")
    base[turned] = (cosine * chat + (1 - cosine.square()).sqrt() * other)[turned]
    strength = torch.exp(config.concept_spread * torch.randn(n, generator=generator)).repeat(2, 1)
    strength[BASE_INDEX, kind == KINDS.index("chat_only")] = 0.0
    strength[CHAT_INDEX, kind == KINDS.index("base_only")] = 0.0
    ratio = config.weaker_low + (config.weaker_high - config.weaker_low) * torch.rand(n, generator=generator)
    weaker = kind == KINDS.index("weaker")
    strength[BASE_INDEX, weaker] *= ratio[weaker]
    rate = torch.exp(config.rate_spread * torch.randn(n, generator=generator))
    share = config.topics_per_document / config.topics
    boosted = rate * (1 + share * (config.topic_boost - 1))  # mean over documents
    in_chat = strength[CHAT_INDEX] > 0
    rate = rate * config.active / boosted[in_chat].sum()
    return Concepts(
        kind=kind,
        topic=torch.randint(config.topics, (n,), generator=generator),
        directions=torch.stack([base, chat]),
        strength=strength,
        rate=rate,
        mean=MEAN_NORM * _unit(generator, 2, d),
    )


def _fires(concepts: Concepts, probability: Tensor, config: PlantedConfig, generator: torch.Generator) -> Tensor:
    """Which concepts fire where, `[source, token, concept]`: on the same tokens in both models, except for decoupled concepts.

    A decoupled concept fires in both models on `decoupled_overlap` of all its tokens, and in each model alone on half of the
    others.
    """
    decoupled = concepts.kind == KINDS.index("decoupled")
    alone = (1 - config.decoupled_overlap) / 2
    # The tokens of both models together are more numerous, so that each model has its rate.
    probability = torch.where(decoupled, probability / (1 - alone), probability).clamp(max=1.0)
    either = torch.rand(probability.shape, generator=generator) < probability
    part = torch.rand(probability.shape, generator=generator)
    base = either & ~(decoupled & (part < alone))
    chat = either & ~(decoupled & (part > 1 - alone))
    return torch.stack([base, chat])


def draw(concepts: Concepts, config: PlantedConfig, stream: int = 0) -> Iterator[Tokens]:
    """Draw all documents, a block at a time; another `stream` gives other documents from the same concepts."""
    decoupled = concepts.kind == KINDS.index("decoupled")
    for first in range(0, config.documents, BLOCK):
        seed = int(np.random.SeedSequence([config.seed, stream, first]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        n_documents = min(BLOCK, config.documents - first)
        topics = torch.rand(n_documents, config.topics, generator=generator).argsort(1)[:, : config.topics_per_document]
        on_topic = (topics.unsqueeze(2) == concepts.topic).any(1)
        probability = torch.where(on_topic, config.topic_boost, 1.0) * concepts.rate
        probability = probability.repeat_interleave(config.document_tokens, dim=0).clamp(max=1.0)
        fires = _fires(concepts, probability, config, generator)
        amplitude = torch.exp(config.amplitude_spread * torch.randn(probability.shape, generator=generator))
        again = torch.exp(config.amplitude_spread * torch.randn(probability.shape, generator=generator))
        both = torch.stack([torch.where(decoupled, again, amplitude), amplitude])
        both *= fires * concepts.strength.unsqueeze(1)
        h = torch.einsum("stc,scd->tsd", both, concepts.directions) + concepts.mean
        h += config.noise * torch.randn(h.shape, generator=generator)
        document = torch.arange(first, first + n_documents).repeat_interleave(config.document_tokens)
        yield Tokens(h, both, document)


def write_store(folder: Path, concepts: Concepts, config: PlantedConfig, stream: int = 0) -> Store:
    """Write the documents as an activation store, one shard per block; the last `heldout_share` of them are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    length = config.document_tokens
    n_train = config.documents - max(1, round(config.heldout_share * config.documents))
    settings = HarvestConfig(max_length=length, dtype="float32", leave_out=0, max_norm_multiple=None)
    log = ProgressLog(folder, {"planted": config.model_dump(), "stream": stream})
    writers = ShardWriters([log], BLOCK * length, 2, config.d_model, torch.float32)
    try:
        for number, tokens in enumerate(draw(concepts, config, stream)):
            training, streams = (tokens.document < n_train).nonzero().squeeze(1), tokens.h.unbind(1)
            writers.buffers[0].add(_columns(tokens, length), [to_stored(stream, torch.float32) for stream in streams])
            writers.buffers[0].moments.add([stream[training] for stream in streams])
            writers.flush(number, int(tokens.document[-1] - tokens.document[0]) + 1, 0.0)
        writers.wait()
    finally:
        writers.close()
    facts = {"dataset": "planted", "label": None, "sub_label": None, "prompt": None, "n_messages": 0, "n_tokens": length}
    documents = [
        {"document": number, "split": "train" if number < n_train else "heldout", **facts} for number in range(config.documents)
    ]
    identity = {"base": {"name": "planted base"}, "chat": {"name": "planted chat"}, "tokenizer": "planted"}
    origin = Origin(identity | {"planted": config.model_dump()}, 0, 1, ("planted",))
    table, entries = pl.DataFrame(documents, schema=DOCUMENT_COLUMNS), log.entries()
    finish_store(log.folder, origin, settings, entries, table, summed_moments(log.folder, entries))
    log.remove()
    return Store(folder)


def _columns(tokens: Tokens, length: int) -> dict[str, Tensor]:
    """The store's columns. Every document is one sequence of plain text without particular tokens."""
    n = len(tokens.document)
    columns = {name: torch.zeros(n, dtype=dtype) for name, dtype in COLUMNS.items()}
    columns |= {"document": tokens.document.int(), "sequence": tokens.document.int()}
    columns["position"] = (torch.arange(n) % length).int()
    columns["template_index"] -= 1
    columns["turn"] -= 1
    return columns
