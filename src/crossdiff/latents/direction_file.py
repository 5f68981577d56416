"""The directions of one latent or concept as a small safetensors file, in the models' own space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from crossdiff.crosscoder.checkpoint import FORMAT, OWN
from crossdiff.errors import UserError
from crossdiff.integrity import intact

READING = (
    "With h the residual streams of the sources after the layer (d_model each): "
    "pre = encoder_bias + sum over sources of <h[source], encoder.source>; "
    "f = the activation function of the crosscoder applied to pre; "
    "the latent adds f * decoder.source to the residual stream of each source; "
    "v = f * norm_sum is the activation that crossdiff shows. A BatchTopK latent is active where v is above the threshold."
)


def latent_directions(folder: Path, latent: int) -> bytes:
    """The file of one latent of the crosscoder in a folder: only its part of the weights is read.

    Tensors: `encoder.SOURCE` and `decoder.SOURCE` `[d_model]` for each source that the crosscoder reads, `encoder_bias`,
    `norm_sum` and `scale` `[1]`. The metadata explains them.

    Raises:
        UserError: the weights are missing, damaged, or of another version.
    """
    path = folder / "model.safetensors"
    try:
        with safe_open(intact(path), framework="pt") as file:
            own: dict[str, Any] = json.loads((file.metadata() or {}).get(OWN, "{}"))
            if own.get("format") != FORMAT:
                raise UserError(
                    f"{path} has format {own.get('format')}, this version reads {FORMAT}; train the crosscoder again"
                )
            scale, sources = float(own["scale"]), tuple(own["view"]["names"])
            encoder = file.get_slice("encoder.weight")[:, :, latent : latent + 1][..., 0].double()
            decoder = file.get_slice("decoder.weight")[:, latent : latent + 1][:, 0].double()
            bias = file.get_slice("encoder.bias")[latent : latent + 1].double()
            mean = file.get_tensor("activation_mean").double()
    except UserError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot read the weights of the crosscoder in {path}: {error}; its directions are not known") from None
    origin = own.get("origin") or {}
    tensors = {
        "encoder_bias": bias - scale * (mean * encoder).sum(),
        "norm_sum": decoder.norm(dim=1).sum().reshape(1),
        "scale": torch.tensor([scale]),
    }
    for source, reads, writes in zip(sources, encoder, decoder, strict=True):
        tensors |= {f"encoder.{source}": reads * scale, f"decoder.{source}": writes / scale}
    metadata = {
        "about": f"latent {latent} of the crosscoder {folder.name}",
        "latent": str(latent),
        "crosscoder": folder.name,
        "sources": json.dumps(sources),
        "layer": json.dumps(origin.get("layer")),
        "pair": json.dumps(origin.get("pair")),
        "space": "the models' own: nothing has to be normalised; `scale` is what the crosscoder multiplies activations by",
        "threshold": json.dumps(own.get("threshold")),
        "sparsity": json.dumps(own.get("sparsity")),
        "reading": READING,
    }
    return save({name: tensor.float().contiguous() for name, tensor in tensors.items()}, metadata)


def concept_directions(folder: Path, concept: int, sources: tuple[str, ...]) -> bytes:
    """The file of one concept: its mean contribution `contribution.SOURCE` `[d_model]` to each model where it is active.

    Raises:
        UserError: the run has no file of directions, or a damaged one.
    """
    path = folder / "directions.safetensors"
    try:
        with safe_open(intact(path), framework="pt") as file:
            found = file.get_slice("directions")[:, concept : concept + 1][:, 0]
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; run `crossdiff concepts` again") from None
    names = sources if len(found) == len(sources) else sources[-len(found) :]
    metadata = {
        "about": f"concept {concept} of a run",
        "concept": str(concept),
        "sources": json.dumps(names),
        "space": "the models' own: nothing has to be normalised",
        "reading": "Mean over the concept's trainings of what its latents add to the residual stream of the source, each at "
        "its mean activation where it is active.",
    }
    tensors = {f"contribution.{name}": row.float().contiguous() for name, row in zip(names, found, strict=True)}
    return save(tensors, metadata)
