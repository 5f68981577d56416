"""Load a base model and the chat model made from it, and check that they can be compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossdiff.config import UserError
from crossdiff.models.access import d_model, decoder_layers, edited_after, n_layers

SOURCES = ("base", "chat")


@dataclass(frozen=True)
class Pair:
    """Two models that read the same token ids, and the tokenizer of the chat model."""

    base: nn.Module
    chat: nn.Module
    tokenizer: Any
    identity: dict[str, Any]

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        return self.base, self.chat

    @property
    def n_layers(self) -> int:
        return n_layers(self.base)

    @property
    def d_model(self) -> int:
        return d_model(self.base)

    def check_layer(self, layer: int | None) -> int:
        """The layer to use: the given one, or the middle one.

        Raises:
            UserError: the layer does not exist.
        """
        if layer is None:
            return self.n_layers // 2
        if not 0 <= layer < self.n_layers:
            raise UserError(f"layer {layer} does not exist: the models have {self.n_layers} layers, 0 to {self.n_layers - 1}")
        return layer


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator if there is one, else the CPU.

    Raises:
        UserError: torch does not know or cannot use the device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}; try auto or cpu") from None
    return device


def local_path(name: str) -> Path | None:
    """The folder behind a name: one of the embedded models (`demo:base`), or a local folder; None for a Hub name."""
    if name.startswith("demo:"):
        from crossdiff.pairs import demo_path

        return demo_path(name)
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def identify(name: str) -> dict[str, Any]:
    """What identifies a model's weights: for a folder a digest of its files, for a Hub name the name.

    Files are digested by name, size, and the first and last MiB, so that large models cost no full read.
    """
    path = local_path(name)
    if path is None:
        return {"name": name}
    digest = hashlib.sha256()
    for file in sorted(path.glob("*")):
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
        hint = "for a Hub model check the name and the network, or download it and give its folder"
    else:
        hint = "expected a folder that transformers can load, with config.json, weights and tokenizer files"
    return UserError(f"cannot load {name!r}: {reason}; {hint}")


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer from a folder, an embedded model or the Hub."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(local_path(name) or name))
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(name, error) from None


def load_model(name: str, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a causal language model for inference; on the CPU in float32, elsewhere in its own dtype."""
    from transformers import AutoModelForCausalLM

    wanted: Any = dtype if dtype is not None else (torch.float32 if device.type == "cpu" else "auto")
    try:
        model = AutoModelForCausalLM.from_pretrained(str(local_path(name) or name), dtype=wanted)
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(name, error) from None
    module: nn.Module = model
    return module.requires_grad_(False).to(device).eval()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the vocabulary and of what turns text into ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation settings of the backend change with use; the id of a text does not depend on them.
    rules = "" if backend is None else json.dumps({**json.loads(backend.to_str()), "padding": None, "truncation": None})
    return hashlib.sha256((vocabulary + rules).encode()).hexdigest()[:16]


def check_tokenizers(base: Any, chat: Any, base_name: str, chat_name: str) -> None:
    """Both models must read the same ids.

    Raises:
        UserError: a token has different ids, or one tokenizer has tokens that the other lacks.
    """
    left, right = base.get_vocab(), chat.get_vocab()
    if left == right:
        return
    differing = [token for token in left if token in right and left[token] != right[token]]
    if differing:
        token = differing[0]
        what = f"{len(differing)} tokens have different ids, such as {token!r}: {left[token]} and {right[token]}"
    else:
        only = sorted(set(left) ^ set(right))
        what = f"{len(only)} tokens exist in one only, such as {only[0]!r}"
    raise UserError(f"{base_name} and {chat_name} have different tokenizers: {what}; a pair must share one tokenizer")


def probe(model: nn.Module, name: str) -> None:
    """Check that the layer list found is the one that makes the logits: editing the middle layer must move them.

    Raises:
        UserError: the edit changes nothing.
    """
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device).unsqueeze(0)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with edited_after(model, n_layers(model) // 2, lambda hidden: hidden.flip(0, 1) + 1.0):
            edited = model(input_ids=ids, use_cache=False).logits
    if torch.equal(plain, edited):
        raise UserError(f"{name}: editing the residual stream does not move the logits, so this architecture is not supported")


def load_pair(base: str, chat: str, device: torch.device) -> Pair:
    """Load two models with one tokenizer and check that they are a pair.

    Raises:
        UserError: a model cannot be loaded, tokenizers or layer counts or widths differ, or hooks do not work on it.
    """
    base_tokenizer, tokenizer = load_tokenizer(base), load_tokenizer(chat)
    check_tokenizers(base_tokenizer, tokenizer, base, chat)
    models = load_model(base, device), load_model(chat, device)
    for what, count in (("decoder layers", n_layers), ("residual dimensions", d_model)):
        found = [count(model) for model in models]
        if found[0] != found[1]:
            raise UserError(f"{base} has {found[0]} {what}, {chat} has {found[1]}; a pair needs the same number")
    for model, name in zip(models, (base, chat), strict=True):
        if model.get_input_embeddings().num_embeddings < len(tokenizer):  # type: ignore[operator]
            raise UserError(f"{name} has fewer embeddings than the tokenizer has tokens ({len(tokenizer)})")
        decoder_layers(model)
        probe(model, name)
    identity = {"base": identify(base), "chat": identify(chat), "tokenizer": tokenizer_digest(tokenizer)}
    return Pair(models[0], models[1], tokenizer, identity)
