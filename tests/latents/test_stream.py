"""Bad input of the pass: a crosscoder of other models or width, an activation that is not finite, a latent that is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdiff.activations.store import Store
from crossdiff.config import L1Config, UserError
from crossdiff.crosscoder.model import Crosscoder, new_crosscoder
from crossdiff.latents.behaviours import conversation_scores
from crossdiff.latents.stream import chunks
from stores import PAIR, make_store

D = 6


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", torch.randn(400, 2, D, generator=torch.Generator().manual_seed(0)))


def crosscoder(d_model: int = D, **origin: Any) -> Crosscoder:
    coder = new_crosscoder(8, torch.zeros(2, d_model), 1.0, L1Config(), 1.0, seed=0)
    coder.origin = {"pair": PAIR, "layer": 1, "sources": ["base", "chat"], **origin}
    return coder


def run(coder: Crosscoder, store: Store) -> None:
    for _ in chunks(coder, store, 4, 100):
        pass


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({"pair": PAIR | {"chat": {"name": "other"}}}, r"trained on chat {'name': 'other'}, .* holds chat {'name': 'b'}"),
        ({"pair": PAIR | {"tokenizer": "u"}}, "trained on tokenizer u, .* holds tokenizer t"),
        ({"layer": 5}, "trained on layer 5, .* holds layer 1; train again"),
        ({"sources": ["base", "tuned"]}, "has no source 'tuned'; it has base, chat"),
    ],
)
def test_a_crosscoder_of_other_activations(store: Store, origin: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(crosscoder(**origin), store)


def test_a_crosscoder_of_another_width(store: Store) -> None:
    with pytest.raises(UserError, match=r"reads width 7, the store .* holds 6"):
        run(crosscoder(d_model=7), store)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite(tmp_path: Path, value: float) -> None:
    activations = torch.randn(400, 2, D)
    activations[47, 1, 3] = value
    broken = make_store(tmp_path / "broken", activations)
    # The normalisation of a store with such a value is not finite either; here only the token is to blame.
    whole = make_store(tmp_path / "whole", torch.randn(400, 2, D))
    shutil.copy(whole.folder / "statistics.safetensors", broken.folder / "statistics.safetensors")
    with pytest.raises(UserError, match=r"not finite, in document 2 at position 7; .*store verify"):
        run(crosscoder(), broken)


def test_a_latent_that_does_not_exist(store: Store) -> None:
    with pytest.raises(UserError, match="there is no latent 8: the crosscoder has 8, 0 to 7"):
        conversation_scores(crosscoder(), store, [0, 8], 100)
    with pytest.raises(UserError, match="no latent -1"):
        conversation_scores(crosscoder(), store, [-1], 100)
