"""Reach into a causal language model with plain hooks: read the residual stream, replace it, continue from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from crossdiff.errors import UserError
from crossdiff.shapes import Bool, Float, Int, Tensor


class _Stop(Exception):
    """Raised by the hook at the last wanted layer; never leaves this module."""


def n_layers(model: nn.Module) -> int:
    """Number of decoder layers, from the model's config."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)  # type: ignore[operator, union-attr]


def d_model(model: nn.Module) -> int:
    """Width of the residual stream, from the model's config."""
    return int(model.config.get_text_config(decoder=True).hidden_size)  # type: ignore[operator, union-attr]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: the shallowest `nn.ModuleList` of the trunk with the config's number of layers."""
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


def hidden_of(output: Any) -> Tensor:
    """The residual stream in what a decoder layer returns."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


@torch.no_grad()
def residuals_after(
    model: nn.Module, token_ids: Int[Tensor, "sequence position"], layers: Sequence[int]
) -> list[Float[Tensor, "sequence position d_model"]]:
    """Residual streams after each of the decoder layers (0-based); the forward pass stops after the last of them.

    There is no attention mask: in a causal model, later tokens do not change earlier ones, so padding on the right only has to
    be dropped from the result. Loading a pair checks this.
    """
    kept: dict[int, Tensor] = {}
    last = max(layers)

    def keep(layer: int, output: Any) -> None:
        kept[layer] = hidden_of(output)
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


@torch.no_grad()
def residuals_and_logits(
    model: nn.Module, token_ids: Int[Tensor, "sequence position"]
) -> tuple[list[Float[Tensor, "sequence position d_model"]], Float[Tensor, "sequence position vocabulary"]]:
    """Residual streams after every decoder layer, and the logits; see `residuals_after` about padding."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int, output: Any) -> None:
        kept[layer] = hidden_of(output)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, layer=layer: keep(layer, output))
        for layer, module in enumerate(decoder_layers(model))
    ]
    try:
        logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return [kept[layer] for layer in range(len(handles))], logits


@contextmanager
def edited_after(model: nn.Module, layer: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, `edit` is applied to the residual stream after `layer`."""

    def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
        edited = edit(hidden_of(output))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = decoder_layers(model)[layer].register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def starting_after(model: nn.Module, layer: int, hidden: Float[Tensor, "sequence position d_model"]) -> Iterator[None]:
    """Within the block, a forward pass continues from `hidden` as its residual stream after `layer`.

    The layers up to `layer` are not computed. The model still derives positions, masks and rotary tables from the ids, so the
    layers above get their usual inputs (a pass from `inputs_embeds` would scale them on some architectures).
    """

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def start(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    layers = list(decoder_layers(model))[: layer + 1]
    own = [module.__dict__.get("forward") for module in layers]
    try:
        for index, module in enumerate(layers):
            module.forward = start if index == layer else skip
        yield
    finally:
        for module, forward in zip(layers, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextmanager
def _head_at(model: nn.Module, kept: Bool[Tensor, "sequence position"]) -> Iterator[None]:
    """Within the block, only the kept positions go through the LM head, so the logits are `[kept, vocabulary]`."""

    def pick(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][kept], *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


class UpperHalf:
    """The part of a model above a layer: from the residual stream after the layer to logits.

    The lower layers are skipped if an unedited residual then gives the logits of the plain model, which is tested on creation.
    If it does not (layers that share keys with lower ones, or that cannot be skipped), the whole model runs and the residual
    stream is replaced on the way, which costs more. A `UserError` names a model for which that fails, too.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model, self.layer = model, layer
        self.skips_lower = True
        device = next(model.parameters()).device
        ids = torch.arange(8, device=device).unsqueeze(0)
        everywhere = torch.ones_like(ids)
        with torch.no_grad():
            plain = model(input_ids=ids, attention_mask=everywhere, use_cache=False).logits[0]
        hidden = residuals_after(model, ids, [layer])[0]

        def gives(rtol: float, atol: float) -> bool:
            try:
                return torch.allclose(self.logits(hidden, ids, everywhere, everywhere.bool()), plain, rtol=rtol, atol=atol)
            except Exception:  # what the layers of an unknown architecture do when others are skipped is up to them
                return False

        self.skips_lower = gives(1e-4, 1e-4)
        if not self.skips_lower and not gives(0.0, tolerance(plain)):
            raise UserError(
                f"{type(model).__name__} does not give its own logits when its residual stream after layer {layer} is replaced "
                "by itself, so interventions on this architecture are not supported; choose another layer or model"
            )

    @torch.no_grad()
    def logits(
        self,
        hidden: Float[Tensor, "sequence position d_model"],
        token_ids: Int[Tensor, "sequence position"],
        attention_mask: Int[Tensor, "sequence position"],
        kept: Bool[Tensor, "sequence position"],
    ) -> Float[Tensor, "kept vocabulary"]:
        """Logits at the kept positions, in the order of the sequences, with `hidden` as the residual stream after the layer."""
        hidden = hidden.to(next(self.model.parameters()).dtype)
        if self.skips_lower:
            replaced = starting_after(self.model, self.layer, hidden)
        else:
            replaced = edited_after(self.model, self.layer, lambda computed: hidden)
        with replaced, _head_at(self.model, kept):
            logits: Tensor = self.model(input_ids=token_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def tolerance(values: Tensor) -> float:
    """Largest difference of two computations of the same values by other kernels; bfloat16 has 8 bits of precision."""
    share = 0.05 if values.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return share * max(1.0, float(values.abs().max()))


@torch.no_grad()
def continues_from_cache(model: nn.Module, layer: int) -> bool:
    """Whether the model gives the same when it reads tokens in steps, with a cache and after dropping a row, as all at once.

    Recurrent models have other caches than `past_key_values`, or keep their state in their layers.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ids = torch.stack([torch.arange(8, device=device), torch.arange(1, 9, device=device)])
    row = torch.tensor([1], device=device)
    expected = model(input_ids=ids, use_cache=False).logits[1, -1]
    residual = residuals_after(model, ids, [layer])[0][1, -1]
    try:
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
        cache.batch_select_indices(row)
        logits = model(input_ids=ids[1:, 7:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        lower: Any = DynamicCache(config=model.config)  # type: ignore[arg-type]
        next_residual_after(model, ids[:, :7], layer, lower)
        lower.batch_select_indices(row)
        hidden = next_residual_after(model, ids[1:, 7:], layer, lower)[0, -1]
    except Exception:  # a cache of another kind can fail in any way
        return False
    pairs = ((logits, expected), (hidden, residual))
    return all(bool((got - want).abs().max() <= tolerance(want)) for got, want in pairs)


@torch.no_grad()
def next_residual_after(
    model: nn.Module, token_ids: Int[Tensor, "sequence position"], layer: int, cache: Any
) -> Float[Tensor, "sequence position d_model"]:
    """Residual stream after `layer` of the next tokens; `cache` holds the previous ones and grows, up to the layer."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(hidden_of(output))
        raise _Stop

    handle = decoder_layers(model)[layer].register_forward_hook(keep)
    try:
        model.base_model(input_ids=token_ids, past_key_values=cache, use_cache=True)  # type: ignore[operator]
    except _Stop:
        pass
    finally:
        handle.remove()
    return kept[0]
