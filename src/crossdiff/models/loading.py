"""Load single models and tokenizers. Every weight comes from the files, or the model is refused."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.adapters import check_installed, merge_adapter
from crossdiff.models.names import fetch_adapter, find_adapter, local_path, source_of

UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""Errors of transformers for names, folders and files that it cannot load."""

UNUSED = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|audio_tower|embed_vision|embed_audio|mtp|mtp_layers)\."
    r"|^(v_head|value_head|score|classifier)\.|(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids)$"
)
"""Tensors that no logits of a text depend on: other modalities, other heads, and buffers that follow from the config."""

WRAPPERS = {
    "_orig_mod.": ("a compiled model", "model._orig_mod.save_pretrained(FOLDER)"),
    "base_model.model.": ("a model that peft wraps", "model.merge_and_unload().save_pretrained(FOLDER)"),
    "_fsdp_wrapped_module.": ("FSDP", "save_pretrained(FOLDER, state_dict=...) with the full state dict"),
    "module.": ("data-parallel training", "model.module.save_pretrained(FOLDER)"),
}
"""What training tools put before the names of tensors: where it comes from, and how to save without it."""


def choose_device(name: str) -> torch.device:
    """The torch device; `auto` is the accelerator if there is one (each local rank gets its own), else the CPU."""
    try:
        accelerator = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else torch.device(name)
        device = torch.device("cpu") if accelerator is None else accelerator
        if device.type != "cpu" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device(device.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}; try auto or cpu") from None
    return device


def choose_dtype(setting: str, device: torch.device, base: str, *others: str) -> torch.dtype:
    """The dtype that all models of a pair, or of a chain, run in.

    `auto` is float32 on the CPU. On an accelerator it is the dtype of the models' files if they have the same one, and
    bfloat16 otherwise: run in two dtypes, even equal models would differ.
    """
    if setting != "auto":
        dtype: torch.dtype = getattr(torch, setting)
        return dtype
    if device.type == "cpu":
        return torch.float32
    stored = {stored_dtype(base), *(stored_dtype(other, base) for other in others)}
    return (stored.pop() if len(stored) == 1 else None) or torch.bfloat16


def stored_dtype(name: str, base: str | None = None) -> torch.dtype | None:
    """The dtype of a model's files, if its config tells it; that of an adapter is its model's."""
    if adapter := find_adapter(name, base):
        return stored_dtype(adapter.model)
    config = _config(name)
    found: torch.dtype | None = config.get_text_config(decoder=True).dtype or config.dtype
    return found


def stored_sizes(name: str, base: str | None = None) -> tuple[int, int]:
    """Width of a model's residual stream and its number of decoder layers, from its config alone."""
    if adapter := find_adapter(name, base):
        return stored_sizes(adapter.model)
    config = _config(name).get_text_config(decoder=True)
    return int(config.hidden_size), int(config.num_hidden_layers)


def load_tokenizer(name: str, base: str | None = None) -> Any:
    """Load a tokenizer from a folder, an embedded model or the Hub, without running code that comes with it.

    Args:
        base: the base model of the pair, if `name` is the chat model. An adapter without a tokenizer has that of its model.
    """
    fetch_adapter(name)
    if adapter := find_adapter(name, base):
        check_installed(adapter)
        own = any((adapter.folder / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"))
        if not own:
            return load_tokenizer(adapter.model)
        name = str(adapter.folder)
    from transformers import AutoTokenizer

    where, file = source_of(name)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **file)
    except UNLOADABLE as error:
        raise _load_error(name, error) from None


def load_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32, base: str | None = None) -> nn.Module:
    """Load a causal language model for inference. Code that comes with the model is not run.

    Args:
        base: the base model of the pair, if `name` is the chat model; see `find_adapter`.

    Raises:
        UserError: the model cannot be found or read, or its files do not hold all of its weights.
    """
    fetch_adapter(name)
    if adapter := find_adapter(name, base):
        check_installed(adapter)
        return merge_adapter(load_model(adapter.model, device, dtype), adapter).requires_grad_(False).eval()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    where, options = source_of(name)
    config = _config(name)
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        options["attn_implementation"] = "eager"  # transformers 5.17 would choose one that drops the cap without a word
    method = _quantisation(config)
    if method is not None:
        options["device_map"] = {"": device}  # quantised weights cannot be moved later
    options |= {"dtype": dtype, "trust_remote_code": False, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, **options)
    except UNLOADABLE as error:
        raise _load_error(name, error, method) from None
    model, report = loaded
    _check_complete(name, report)
    module: nn.Module = model if method is not None else model.to(device)
    return module.requires_grad_(False).eval()


def _config(name: str) -> Any:
    from transformers import AutoConfig

    where, file = source_of(name)
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False, **file)
    except UNLOADABLE as error:
        raise _load_error(name, error) from None


def _quantisation(config: Any) -> str | None:
    """How a model's weights are quantised, from its config; None if they are not."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """Refuse a model whose weights are not those of its files: what is missing would be random, what is left over was part of
    another function."""
    missing = _used(report["missing_keys"])
    unexpected = _used(report["unexpected_keys"])
    shapes = {
        key: f"{key} ({list(file)} in the files, {list(model)} expected)" for key, file, model in report["mismatched_keys"]
    }
    problems = [
        f"{len(found)} {what}, such as {found[0]}"
        for found, what in (
            (missing, "tensors of the model are not in its files"),
            (unexpected, "tensors in its files are not part of the model"),
            ([shapes[key] for key in _used(shapes)], "tensors have another shape"),
        )
        if found
    ]
    if not problems:
        return
    remedy = "check that config.json and the weights belong together, and that the weights are complete"
    for prefix, (origin, saving) in WRAPPERS.items():
        if any(prefix in key for key in unexpected):
            remedy = f"the names contain {prefix!r}, from {origin}: save the model again with {saving}"
            break
    raise UserError(f"cannot load {name!r}: {'; '.join(problems)}; {remedy}")


def _used(keys: Collection[str]) -> list[str]:
    return sorted(key for key in keys if not UNUSED.search(key))


def _load_error(name: str, error: Exception, method: str | None = None) -> UserError:
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    if method is not None:
        return UserError(
            f"cannot load {name!r}, whose weights are quantised ({method}): {reason}; install what is missing, or "
            "give a copy of the model in full precision"
        )
    if kind := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", reason):
        return UserError(
            f"cannot load {name!r}: transformers has no model for text alone of the kind {kind[1]}; if it contains a text "
            "model, save that on its own and give it"
        )
    if local_path(name) is None and not name.startswith((".", "/")):
        hint = (
            "for a Hub model, check the name and the network; without a network, run `hf download NAME --local-dir FOLDER` on "
            "a machine that has one, copy the folder and pass its path"
        )
    else:
        hint = "expected a GGUF file, or a folder that transformers can load, with config.json, weights and tokenizer files"
    return UserError(f"cannot load {name!r}: {reason}; {hint}")
