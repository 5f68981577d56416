"""The pass: encoding in pieces, and every counted token once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crossdiff.config import BatchTopKConfig
from crossdiff.crosscoder.model import Crosscoder, new_crosscoder
from crossdiff.latents import stream
from crossdiff.latents.stream import chunks, encode
from planted import planted_activations
from stores import make_store


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
        torch.testing.assert_close(chunk.error, (coder.normalise(h) - xhat).flatten(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(store.column("sequence")[chunk.rows], chunk.numbers[chunk.sequence.numpy()])
    assert n_tokens == 950  # 50 sequences of 20, position 0 left out
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), store.rows())
