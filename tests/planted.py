"""Activations made from concepts that are known: shared, chat-only, and shared but weaker in the base model."""

from __future__ import annotations

import torch

D, CONCEPTS = 16, 12
CHAT_ONLY, WEAKER, SHARED = (0, 1, 2), (3, 4, 5), (6, 7, 8, 9, 10, 11)


def planted_activations(n_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations `[token, source, d]` and the concepts' directions `[concept, d]`.

    Each concept fires on 8% of the tokens with an amplitude between 1 and 2; weaker ones have 0.5 of it in the base model.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(99)))[0][:CONCEPTS]
    fires = torch.rand(n_tokens, CONCEPTS, generator=generator) < 0.08
    amplitude = (1 + torch.rand(n_tokens, CONCEPTS, generator=generator)) * fires
    strength = torch.ones(2, CONCEPTS)
    strength[0, list(CHAT_ONLY)] = 0.0
    strength[0, list(WEAKER)] = 0.5
    clean = torch.einsum("tc,sc,cd->tsd", amplitude, strength, directions)
    return clean + 0.03 * torch.randn(clean.shape, generator=generator), directions
