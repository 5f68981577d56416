"""The pass: encoding in pieces, every counted token once, and crosscoders that do not belong to the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdiff.activations.store import Store
from crossdiff.config import BatchTopKConfig, L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.crosscoder.view import identity
from crossdiff.errors import UserError
from crossdiff.latents import stream
from crossdiff.latents.behaviours import conversation_scores
from crossdiff.latents.stream import chunks, encode
from planted import planted_activations
from stores import PAIR, make_store


def crosscoder() -> Crosscoder:
    coder = new_crosscoder(24, torch.zeros(2, 16), 1.3, BatchTopKConfig(), 0.7, seed=3)
    coder.threshold, coder.origin = 1.0, {"pair": {}, "layer": 1, "sources": ["base", "chat"]}
    return coder


@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
def test_pieces_make_the_same_code_as_the_whole(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", tokens * 24 * 4)
    coder, x = crosscoder(), planted_activations(100)[0]
    code, whole = encode(coder, x), coder.sparse_code(x)
    assert torch.equal(code.token, whole.token) and torch.equal(code.latent, whole.latent)
    torch.testing.assert_close(code.values, whole.values, rtol=1e-6, atol=1e-6)
    assert (code.n_tokens, code.n_latents) == (100, 24)


def test_a_pass_sees_every_counted_token_once_with_its_error(tmp_path: Path) -> None:
    store = make_store(tmp_path, planted_activations(1000)[0])
    coder = crosscoder()
    coder.origin["pair"] = store.pair
    seen, n_tokens = [], 0
    for chunk in chunks(coder, store, 5, 130, lambda n: None):
        seen.append(chunk.rows)
        n_tokens += len(chunk.rows)
        assert (store.column("document")[chunk.rows] % 5 == chunk.block).all()
        h = store.gather(chunk.rows)
        xhat = coder.decode(coder.code(coder.normalise(h)))
        torch.testing.assert_close(chunk.v, coder.v(chunk.code))
        torch.testing.assert_close(chunk.error, (coder.normalise(h) - xhat).flatten(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(store.column("sequence")[chunk.rows], chunk.numbers[chunk.sequence.numpy()])
    assert n_tokens == 950  # 50 sequences of 20, position 0 left out
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), store.rows())


D = 6


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", torch.randn(400, 2, D, generator=torch.Generator().manual_seed(0)))


def other_crosscoder(d_model: int = D, sources: tuple[str, ...] = ("base", "chat"), **origin: Any) -> Crosscoder:
    coder = new_crosscoder(8, torch.zeros(2, d_model), 1.0, L1Config(), 1.0, seed=0, view=identity(sources))
    coder.origin = {"pair": PAIR, "layer": 1, **origin}
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
        ({"sources": ("base", "tuned")}, "has no source 'tuned'; it has base, chat"),
    ],
)
def test_a_crosscoder_of_other_activations(store: Store, origin: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(other_crosscoder(**origin), store)


def test_a_crosscoder_of_another_width(store: Store) -> None:
    with pytest.raises(UserError, match=r"trained on width 7, but the store .* holds width 6"):
        run(other_crosscoder(d_model=7), store)


def test_a_latent_that_does_not_exist(store: Store) -> None:
    with pytest.raises(UserError, match="there is no latent 8: the crosscoder has 8, from 0 to 7"):
        conversation_scores(other_crosscoder(), store, [0, 8], 100)
    with pytest.raises(UserError, match="no latent -1"):
        conversation_scores(other_crosscoder(), store, [-1], 100)
