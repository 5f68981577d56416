"""Merge an adapter into its model with `peft`, so that the rest of crossdiff sees an ordinary model."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.names import Adapter

WRAPPER = "base_model.model."
"""Prefix of the names of an adapter's tensors."""


def check_installed(adapter: Adapter) -> None:
    """Raises `UserError` if the package that reads adapters is missing."""
    if find_spec("peft") is None:
        raise UserError(
            f"{adapter.name} is an adapter for {adapter.model}, and reading it needs peft: pip install 'crossdiff[peft]'; or "
            "merge it into its model (peft's merge_and_unload) and give the folder of the merged model"
        )


def merge_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The model with the adapter merged into its weights. `model` is changed in place.

    Raises:
        UserError: the adapter is damaged, of a kind that is no change of weights, or does not fit the model exactly.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            # Otherwise peft ignores settings that it does not know, and computes something else.
            warnings.filterwarnings("error", message="Unexpected keyword arguments")
            config = PeftConfig.from_pretrained(str(adapter.folder))
        if config.is_prompt_learning:
            raise UserError(
                f"{adapter.name} is an adapter of the kind {config.peft_type.value}, which adds vectors to the prompt; only "
                "kinds that change weights, such as LoRA, can be merged into a model"
            )
        _resize(model, adapter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about names that peft uses
            wrapped: Any = PeftModel(model, config)
            loaded = wrapped.load_adapter(str(adapter.folder), "default")
        # Of resized embeddings that were trained in full, peft writes two copies under two names, and reads one.
        unexpected = [name for name in loaded.unexpected_keys if not name.endswith(".modules_to_save.weight")]
        for what, names in (("lacks", loaded.missing_keys), ("holds, and the model has no place for,", unexpected)):
            if names:
                raise UserError(
                    f"the adapter {adapter.name} does not fit {adapter.model}: it {what} {len(names)} tensors, such as "
                    f"{min(names)}; was it trained on another model?"
                )
        merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"cannot merge the adapter {adapter.name} into {adapter.model}: {' '.join(lines[:2])}; check that it was trained "
            "on this model, and that its files are complete"
        ) from None
    return merged


def _resize(model: Any, adapter: Adapter) -> None:
    """Give the model as many embeddings as the adapter replaces them with: it was trained with tokens of its own."""
    shapes = _shapes(adapter.folder)
    names = {id(module): name for name, module in model.named_modules()}
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    rows = {}
    for table in tables:
        name, width = names[id(table)], table.weight.shape[1]
        for key, shape in shapes.items():
            if key.startswith(f"{WRAPPER}{name}.") and key.endswith(".weight") and "lora_" not in key and shape[1:] == (width,):
                rows[name] = shape[0]
    wanted = {count for count in rows.values() if count != len(tables[0].weight)}
    if not wanted:
        return
    is_tied = len(tables) == 1 or tables[0].weight is tables[1].weight
    if len(wanted) > 1 or not (is_tied or len(rows) == len(tables)):
        raise UserError(
            f"the adapter {adapter.name} resizes the embeddings of {adapter.model} ({rows}), but does not hold all of them, so "
            "the new rows would be left to chance; save it again with save_embedding_layers=True"
        )
    model.resize_token_embeddings(wanted.pop(), mean_resizing=False)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors."""
    from peft.utils import load_peft_weights

    return {name: tuple(tensor.shape) for name, tensor in load_peft_weights(str(folder), device="cpu").items()}
