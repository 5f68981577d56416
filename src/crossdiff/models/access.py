"""Reach into a causal language model with plain hooks: read the residual stream after a layer, or replace it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from crossdiff.config import UserError
from crossdiff.shapes import Float, Int, Tensor


class _Stop(Exception):
    """Raised by the hook at the last wanted layer; never leaves this module."""


def n_layers(model: nn.Module) -> int:
    """Number of decoder layers, from the model's config."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)  # type: ignore[operator, union-attr]


def d_model(model: nn.Module) -> int:
    """Width of the residual stream, from the model's config."""
    return int(model.config.get_text_config(decoder=True).hidden_size)  # type: ignore[operator, union-attr]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: the shallowest `nn.ModuleList` of the trunk with the config's number of layers.

    Raises:
        UserError: the architecture has no such list.
    """
    wanted = n_layers(model)
    found = [
        (name.count("."), module)
        for name, module in model.base_model.named_modules()  # type: ignore[union-attr]
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no list of {wanted} decoder layers; supported are decoder-only language models "
            "such as Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX, Phi and OLMo"
        )
    return min(found, key=lambda entry: entry[0])[1]


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


@torch.no_grad()
def residuals_after(
    model: nn.Module, token_ids: Int[Tensor, "sequence position"], layers: Sequence[int]
) -> list[Float[Tensor, "sequence position d_model"]]:
    """Residual streams after each of the decoder layers (0-based); the forward pass stops after the last of them.

    No attention mask is given: in a causal model nothing that follows a token changes it, so what stands right of a
    sequence (padding) only has to be left out of the result. Loading a pair tests that.
    """
    kept: dict[int, Tensor] = {}
    last = max(layers)

    def keep(layer: int, output: Any) -> None:
        kept[layer] = _hidden(output)
        if layer == last:
            raise _Stop

    found = decoder_layers(model)
    handles = [
        found[layer].register_forward_hook(lambda _module, _inputs, output, layer=layer: keep(layer, output))
        for layer in set(layers)
    ]
    try:
        model.base_model(input_ids=token_ids, use_cache=False)  # type: ignore[operator]
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [kept[layer] for layer in layers]


@contextmanager
def edited_after(model: nn.Module, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, the residual stream after `layer` is what `edit` makes of it."""

    def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
        edited = edit(_hidden(output))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = decoder_layers(model)[layer].register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
