"""Compile the decoder layers of a model with `torch.compile`."""

from __future__ import annotations

import torch
from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.access import decoder_layers, n_layers, residuals_after, tolerance

VARIANTS = 64
"""Kinds of inputs that one layer's code is compiled for: shapes, masks, and whatever else tells layers apart."""


def compile_layers(model: nn.Module, name: str) -> None:
    """Compile the decoder layers of a model, for good. They share the compiled code, and hooks run outside of it.

    Raises:
        UserError: they cannot be compiled here, or then give other activations than before. `name` is the model's, for it.
    """
    from torch._dynamo import config

    config.recompile_limit = max(VARIANTS, config.recompile_limit)
    # Prime numbers: a size that is equal to one of the model's would be compiled as a constant.
    ids = torch.arange(33, device=next(model.parameters()).device).reshape(3, 11)
    (expected,) = residuals_after(model, ids, [n_layers(model) - 1])
    for layer in decoder_layers(model):
        # Only whole layers: with parts left uncompiled, nobody would notice that it is not worth it.
        layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True)
    try:
        (found,) = residuals_after(model, ids, [n_layers(model) - 1])
    except Exception as error:  # whatever the compiler, its backend and the C++ or CUDA toolchain raise
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise UserError(
            f"the decoder layers of {name} cannot be compiled here: {type(error).__name__}: {reason[0]}; set harvest.compile "
            "to false"
        ) from error
    if not bool((found - expected).abs().max() <= tolerance(expected)):
        raise UserError(
            f"the compiled decoder layers of {name} give activations that differ by up to "
            f"{float((found - expected).abs().max()):.3g} from those of the model, which are up to "
            f"{float(expected.abs().max()):.3g}; set harvest.compile to false"
        )
