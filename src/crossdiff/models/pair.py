"""Load a base model and the chat model made from it, and check that they can be compared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from crossdiff.errors import UserError
from crossdiff.models.access import d_model, decoder_layers, edited_after, n_layers, residuals_after
from crossdiff.models.tokenizers import check_tokenizers, pin_date, unknown_token
from crossdiff.shapes import Int, Tensor
from crossdiff.sources import SOURCES


@dataclass(frozen=True)
class Pair:
    """Two models that read the same token ids, and the tokenizer of the chat model.

    stand_ins: ids that the base model was never trained on, and the ids that it reads instead.
    unreadable: ids that the base model lacks, with their tokens.
    """

    base: nn.Module
    chat: nn.Module
    tokenizer: Any
    identity: dict[str, Any]
    stand_ins: dict[int, int] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        return self.base, self.chat

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def n_layers(self) -> int:
        return n_layers(self.base)

    @property
    def d_model(self) -> int:
        return d_model(self.base)

    @property
    def revisions(self) -> dict[str, str | None]:
        """The commit of each model that came from the Hub."""
        return {name: getattr(model.config, "_commit_hash", None) for name, model in zip(SOURCES, self.models, strict=True)}

    def base_ids(self, token_ids: Int[Tensor, "sequence position"]) -> Int[Tensor, "sequence position"]:
        """The ids that the base model reads where the chat model reads `token_ids`. Raises `UserError` if it lacks one."""
        for token in set(token_ids.flatten().tolist()) if self.unreadable else ():
            if token in self.unreadable:
                raise unknown_token(self.unreadable[token])
        if not self.stand_ins:
            return token_ids
        mapped = token_ids.clone()
        for token, stand_in in self.stand_ins.items():
            mapped[token_ids == token] = stand_in
        return mapped

    def check_layer(self, layer: int | None) -> int:
        """The layer to use: the given one, or the middle one."""
        if layer is None:
            return self.n_layers // 2
        if not 0 <= layer < self.n_layers:
            raise UserError(f"layer {layer} does not exist: the models have {self.n_layers} layers, 0 to {self.n_layers - 1}")
        return layer


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


def local_path(name: str) -> Path | None:
    """The path behind a name: an embedded model (`demo:base`), a local folder or a GGUF file; None for a Hub name."""
    if name.startswith("demo:"):
        from crossdiff.pairs import demo_path

        return demo_path(name)
    path = Path(name).expanduser()
    return path if path.is_dir() or (path.suffix == ".gguf" and path.is_file()) else None


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Arguments for transformers to find a model: a folder or Hub name, and a GGUF file in it."""
    path = local_path(name)
    if path is None or path.suffix != ".gguf":
        return str(path or name), {}
    missing = [package for package in ("accelerate", "gguf") if find_spec(package) is None]
    if missing:
        raise UserError(f"{name} is a GGUF file, and reading it needs {' and '.join(missing)}: pip install 'crossdiff[gguf]'")
    return str(path.parent), {"gguf_file": path.name}


def identify(name: str) -> dict[str, Any]:
    """What identifies a model's weights: a digest of a folder or file, or a Hub name.

    The digest covers the name, size, and first and last MiB of each file, so large models need not be read in full.
    """
    path = local_path(name)
    if path is None:
        return {"name": name}
    digest = hashlib.sha256()
    for file in sorted(path.glob("*")) if path.is_dir() else [path]:
        if file.suffix not in {".safetensors", ".json", ".bin", ".model", ".jinja", ".gguf"}:
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return {"name": name, "digest": digest.hexdigest()[:16]}


def _load_error(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if local_path(name) is None and not name.startswith((".", "/")):
        hint = (
            "for a Hub model, check the name and the network; without a network, run `hf download NAME --local-dir FOLDER` on "
            "a machine that has one, copy the folder and pass its path"
        )
    else:
        hint = "expected a GGUF file, or a folder that transformers can load, with config.json, weights and tokenizer files"
    return UserError(f"cannot load {name!r}: {reason}; {hint}")


UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""Errors of transformers for names, folders and files that it cannot load."""


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer from a folder, an embedded model or the Hub, without running code that comes with it."""
    from transformers import AutoTokenizer

    where, file = _source(name)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **file)
    except UNLOADABLE as error:
        raise _load_error(name, error) from None


def load_model(name: str, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a causal language model for inference, in float32 on the CPU and in its own dtype elsewhere.

    Code that comes with the model is not run.
    """
    from transformers import AutoModelForCausalLM

    wanted: Any = dtype if dtype is not None else (torch.float32 if device.type == "cpu" else "auto")
    where, file = _source(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=wanted, trust_remote_code=False, **file)
    except UNLOADABLE as error:
        raise _load_error(name, error) from None
    module: nn.Module = model
    return module.requires_grad_(False).to(device).eval()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary and of the rules that turn text into ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation settings change with use, and ids do not depend on them.
    rules = "" if backend is None else json.dumps({**json.loads(backend.to_str()), "padding": None, "truncation": None})
    return hashlib.sha256((vocabulary + rules).encode()).hexdigest()[:16]


def check_embeddings(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raises `UserError` if the model has fewer embeddings than its tokenizer has ids."""
    found = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    needed = max(tokenizer.get_vocab().values()) + 1
    if found < needed:
        raise UserError(
            f"{name} has {found} embeddings, but its tokenizer's ids go up to {needed - 1}; were tokens added without "
            "resizing the model? Resize its embeddings and save both again"
        )


def probe(model: nn.Module, name: str) -> None:
    """Check that hooks work on a model: editing the residual stream moves the logits, and residuals ignore later tokens."""
    device, middle = next(model.parameters()).device, n_layers(model) // 2
    ids = torch.arange(8, device=device).unsqueeze(0)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with edited_after(model, middle, lambda hidden: hidden.flip(0, 1) + 1.0):
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


def load_pair(
    base: str,
    chat: str,
    device: torch.device,
    base_tokens: Mapping[str, str] | None = None,
    template_date: date | None = None,
) -> Pair:
    """Load two models with one tokenizer and check that they are a pair.

    Args:
        base_tokens: tokens that the base model lacks or was never trained on, and its own tokens that it reads instead.
        template_date: the date that the chat template writes where it asks for today's.
    """
    base_tokenizer, tokenizer = load_tokenizer(base), load_tokenizer(chat)
    if template_date is not None:
        pin_date(tokenizer, template_date)
    reading = check_tokenizers(base_tokenizer, tokenizer, base, chat, base_tokens or {})
    models = load_model(base, device), load_model(chat, device)
    for what, count in (("decoder layers", n_layers), ("residual dimensions", d_model)):
        found = [count(model) for model in models]
        if found[0] != found[1]:
            raise UserError(
                f"{base} has {found[0]} {what}, {chat} has {found[1]}; a pair needs the same number, because both models' "
                "activations at a layer are stored in one tensor"
            )
    for model, own, name in zip(models, (base_tokenizer, tokenizer), (base, chat), strict=True):
        check_embeddings(model, own, name)
        decoder_layers(model)
        probe(model, name)
    identity = {"base": identify(base), "chat": identify(chat), "tokenizer": tokenizer_digest(tokenizer)}
    return Pair(models[0], models[1], tokenizer, identity, reading.stand_ins, reading.unreadable)
