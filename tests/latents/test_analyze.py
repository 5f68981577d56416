"""The control of the analysis: random directions are random."""

from __future__ import annotations

import torch

from crossdiff.config import BatchTopKConfig
from crossdiff.crosscoder.model import new_crosscoder
from crossdiff.latents.analyze import RANDOM, with_random_directions


def test_random_directions_have_the_norms_and_nothing_else_of_the_decoder() -> None:
    # The same seed as the decoder's start: with one stream for both, the control would be the decoder itself.
    coder = new_crosscoder(200, torch.zeros(2, 64), 1.0, BatchTopKConfig(), 0.7, seed=0)
    directions = with_random_directions(coder, seed=0)
    assert torch.equal(directions[:2], coder.directions())
    torch.testing.assert_close(directions[RANDOM].norm(dim=1), torch.full((200,), 0.7))
    cosine = torch.nn.functional.cosine_similarity(directions[RANDOM], coder.directions()[1])
    assert float(cosine.abs().mean()) < 0.15  # about sqrt(2 / (pi * 64)) = 0.1
