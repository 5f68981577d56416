"""A tiny pair, a random crosscoder and conversations for the tests of the causal package."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import polars as pl
import torch

from conftest import WORDS, make_model, make_tokenizer
from crossdiff.causal.interventions import Arm, DifferencePart, MeanDifferencePart, OtherPart
from crossdiff.config import DifferenceConfig, L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.crosscoder.view import view_of
from crossdiff.models.pair import Pair
from crossdiff.text.documents import Document
from crossdiff.text.sequences import TokenSequence, tokenise

LAYER, N_LATENTS, D = 1, 40, 16


def make_pair(kind: str = "llama", change: float = 0.1) -> Pair:
    """A random model and a changed copy of it."""
    base, chat = make_model(kind), make_model(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in chat.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * change)
    return Pair(base, chat, make_tokenizer(), {})


def make_crosscoder(seed: int = 0) -> Crosscoder:
    """Random weights, mean, bias and scale, so that nothing cancels by accident."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    coder = new_crosscoder(N_LATENTS, noise(2, D) * 0.1, 1.7, L1Config(), 1.0, seed)
    coder.encoder += noise(N_LATENTS, 2 * D) * 0.3
    coder.decoder += noise(N_LATENTS, 2 * D) * 0.3
    coder.encoder_bias -= 0.5
    coder.decoder_bias += noise(2 * D) * 0.2
    coder.origin = {"sources": ["base", "chat"], "pair": {}, "layer": LAYER}
    return coder


def make_difference_coder() -> Crosscoder:
    """A random coder of chat minus base, with one decoder."""
    generator = torch.Generator().manual_seed(2)
    view = view_of(DifferenceConfig(), ("base", "chat"))
    coder = replace(new_crosscoder(N_LATENTS, torch.randn(1, D, generator=generator) * 0.1, 1.7, L1Config(), 1.0, 0), view=view)
    coder.encoder += torch.randn(coder.encoder.shape, generator=generator) * 0.3
    coder.decoder += torch.randn(coder.decoder.shape, generator=generator) * 0.3
    coder.decoder_bias += torch.randn(coder.decoder_bias.shape, generator=generator) * 0.2
    return coder


def make_sequences(tokenizer: Any, n: int = 8) -> list[TokenSequence]:
    """Conversations of one or two exchanges and of different lengths."""
    generator = random.Random(0)
    sequences = []
    for number in range(n):
        messages = [
            {"role": role, "content": " ".join(generator.choices(WORDS, k=1 + (number + turn) % 4))}
            for turn in range(1 + number % 2)
            for role in ("user", "assistant")
        ]
        sequences += tokenise(Document(number, 0, None, messages, "heldout", None, None), tokenizer, 100)
    return sequences


def make_table(n: int = N_LATENTS, seed: int = 0) -> pl.DataFrame:
    """The columns of a latent table that selections read, with random values."""
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, Any] = {name: torch.rand(n, generator=generator).double().numpy() for name in ("delta_norm", "nu_error")}
    for name in ("nu_reconstruction_nobias", "nu_activation"):
        columns[name] = torch.rand(n, generator=generator).double().numpy()
    columns["nu_reconstruction"] = torch.rand(n, generator=generator).double().numpy()
    table = pl.DataFrame({"latent": range(n), **columns})
    return table.with_columns(
        rank_sum=pl.col("nu_error").rank() + pl.col("nu_reconstruction_nobias").rank(),
        rank_sum_paper=pl.col("nu_error").rank() + pl.col("nu_reconstruction").rank(),
        verdict=pl.when(pl.col("nu_error") < 0.2).then(pl.lit("chat_specific")).otherwise(pl.lit("shared")),
        n_active=pl.lit(1000),
        mean_activation=pl.lit(5.0),
        frequency=pl.lit(0.1),
        norm_chat=pl.lit(1.0),
    )


def part(kind: str) -> OtherPart:
    """A part by its kind; a mean difference by its kind and what it is over."""
    if kind.startswith("mean_difference_"):
        return MeanDifferencePart.model_validate({"kind": "mean_difference", "over": kind.removeprefix("mean_difference_")})
    return DifferencePart.model_validate({"kind": kind})


def arm(
    name: str = "arm", latents: tuple[int, ...] | None = (), others: tuple[str | OtherPart, ...] = (), **options: Any
) -> Arm:
    """An arm with everything but the given fields at its default."""
    parts = tuple(part(each) if isinstance(each, str) else each for each in others)
    return Arm(name, name, latents, None, parts, options.pop("tokens", "all"), options.pop("continues", "chat"), **options)
