"""Checks that a model is of a kind that hooks can read and edit."""

from __future__ import annotations

import torch
from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.access import d_model, decoder_layers, edited_after, hidden_of, n_layers, residuals_after


def probe(model: nn.Module, name: str) -> None:
    """Check that hooks work on a model: editing the residual stream moves the logits, and residuals ignore later tokens."""
    device, middle = next(model.parameters()).device, n_layers(model) // 2
    ids = torch.arange(8, device=device).unsqueeze(0)
    shapes: list[list[int]] = []
    handle = decoder_layers(model)[middle].register_forward_hook(
        lambda module, inputs, output: shapes.append(list(hidden_of(output).shape))
    )
    try:
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # quantised layers without their scales, a kernel that the device lacks, and so on
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise UserError(
            f"{name} cannot be run on {device}: {type(error).__name__}: {reason[0]}; check that its files are complete, and "
            "that the packages that it needs support this device"
        ) from error
    finally:
        handle.remove()
    if shapes != [[1, 8, d_model(model)]]:
        raise UserError(
            f"{name}: a layer of {type(model).__name__} gives {shapes} for 8 tokens, expected [1, 8, {d_model(model)}] once; "
            "models that keep several residual streams per token, as Gemma 3n does, are not supported"
        )
    with torch.no_grad(), edited_after(model, middle, lambda hidden: hidden.flip(0, 1) + 1.0):
        edited = model(input_ids=ids, use_cache=False).logits
    if torch.equal(plain, edited):
        raise UserError(f"{name}: editing the residual stream does not move the logits, so this architecture is not supported")
    # There is no attention mask, so the second pass sees four more tokens.
    (alone,) = residuals_after(model, ids[:, :4], [middle])
    (followed,) = residuals_after(model, ids, [middle])
    # bfloat16 has 8 bits of precision, and other lengths may use other kernels.
    tolerance = 0.05 if alone.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not torch.allclose(followed[:, :4], alone, rtol=tolerance, atol=tolerance * float(alone.abs().max())):
        raise UserError(f"{name}: a token's residual stream depends on later tokens; only causal models are supported")
