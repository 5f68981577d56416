"""Crosscoders side by side: how much they explain, how sparsely, and whether the models still work on their reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from crossdiff.activations.store import Store
from crossdiff.compare.recovered import AS_IT_IS, MEAN, run_on_reconstructions
from crossdiff.config import CompareConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.models.pair import Pair


def compare_coders(
    crosscoders: Mapping[str, Crosscoder],
    store: Store,
    pair: Pair,
    config: CompareConfig,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> dict[str, Any]:
    """Held-out metrics of each crosscoder, and of each model running on its reconstruction, with intervals.

    Returns:
        `crosscoders`: name -> architecture, health on held-out tokens, and per source the cross-entropy recovered and the KL
        on answers; `models`: source -> cross-entropy of the unchanged model and on its mean.
    """
    runs = run_on_reconstructions(crosscoders, store, pair, config.max_tokens, config.batch_tokens, advance)
    rows: dict[str, Any] = {}
    for name, coder in crosscoders.items():
        settings = coder.origin["settings"]
        rows[name] = {
            "architecture": [settings[part]["kind"] for part in ("inputs", "structure", "sparsity")],
            "n_latents": coder.n_latents,
            "heldout": health(coder, heldout_sums(coder, store, "heldout", config.batch_tokens)),
            "recovered": {s: asdict(sums.recovered(name)) for s, sums in runs.items() if name in sums.arms},
            "answer_kl": {s: asdict(sums.mean_answer_kl(name)) for s, sums in runs.items() if name in sums.arms},
        }
    models = {
        source: {arm: asdict(sums.mean_cross_entropy(arm)) for arm in (AS_IT_IS, MEAN)}
        | {"mean_answer_kl": asdict(sums.mean_answer_kl(MEAN)), "n_tokens": int(sums.n.sum())}
        for source, sums in runs.items()
    }
    return {"crosscoders": rows, "models": models}
