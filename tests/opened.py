"""A finished run for tests that open one: synthetic tables, random crosscoders and activations, and the tiny pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from conftest import tiny_config
from crossdiff.config import RunConfig
from crossdiff.crosscoder.checkpoint import save
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.models.names import identify
from report.synthetic_run import N_LATENTS, latent_table, write_concepts, write_crosscoder
from stores import make_store

D_MODEL, LAYER = 16, 1


def write_run(path: Path, pair: tuple[Path, Path], texts: tuple[Path, Path], **harvest: Any) -> Path:
    """Crosscoders l1 and batchtopk of 60 latents; latent 3 of each is chat-specific and has examples. And concepts."""
    path.mkdir(parents=True)
    settings = tiny_config(pair, texts)
    config = RunConfig.model_validate(settings | {"harvest": settings["harvest"] | harvest})
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (path / "manifest.json").write_text(json.dumps({"format": 1, "stages": {}, "swap": []}))
    identity = {"base": identify(str(pair[0])), "chat": identify(str(pair[1]))}
    mean, scale = torch.full((2, D_MODEL), 0.01), 20.0
    for seed, (name, settings) in enumerate(config.crosscoders.items()):
        write_crosscoder(path / name, latent_table(seed))
        crosscoder = new_crosscoder(N_LATENTS, mean, scale, settings.sparsity, 0.5, seed)
        crosscoder.threshold = 0.1 if name == "batchtopk" else 0.0
        crosscoder.origin = {"pair": identity, "layer": LAYER, "settings": settings.model_dump(mode="json")}
        crosscoder.origin["harvest"] = config.harvest.model_dump(mode="json")
        save(crosscoder, path / name)
    write_concepts(path)
    make_store(path / "activations", torch.randn(2000, 2, D_MODEL, generator=torch.Generator().manual_seed(0)))
    manifest = json.loads((path / "activations" / "manifest.json").read_text())
    (path / "activations" / "manifest.json").write_text(json.dumps(manifest | {"pair": identity}))
    return path
