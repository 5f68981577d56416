"""From the name of a model to what is loaded: a folder, a GGUF file, a Hub name, or an adapter on another model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from crossdiff.errors import UserError
from crossdiff.files import read_json

ADAPTER = "adapter_config.json"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
DIGESTED = {".safetensors", ".json", ".bin", ".model", ".jinja", ".gguf"}
"""Suffixes of the files that decide what a model computes."""


@dataclass(frozen=True)
class Adapter:
    """An adapter (LoRA and its relatives), and the model that it changes.

    Attributes:
        folder: where its files are; for a Hub name, in the Hub's cache.
        model: name of the model that it is merged into.
        remark: what the user should know about that choice.
    """

    name: str
    folder: Path
    model: str
    remark: str | None = None


def local_path(name: str) -> Path | None:
    """The path behind a name: an embedded model (`demo:base`), a local folder or a GGUF file; None for a Hub name."""
    if name.startswith("demo:"):
        from crossdiff.pairs import demo_path

        return demo_path(name)
    path = Path(name).expanduser()
    return path if path.is_dir() or (path.suffix == ".gguf" and path.is_file()) else None


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    """Arguments for transformers to find a model or tokenizer: a folder or Hub name, and a GGUF file in it."""
    path = local_path(name)
    if path is None or path.suffix != ".gguf":
        return str(path or name), {}
    missing = [package for package in ("accelerate", "gguf") if find_spec(package) is None]
    if missing:
        raise UserError(f"{name} is a GGUF file, and reading it needs {' and '.join(missing)}: pip install 'crossdiff[gguf]'")
    return str(path.parent), {"gguf_file": path.name}


def identify(name: str, base: str | None = None) -> dict[str, Any]:
    """What identifies a model's weights: a digest of a folder or file, or a Hub name.

    The digest covers the name, size, and first and last MiB of each file, so large models need not be read in full. That of an
    adapter also covers the identity of the model that it is merged into.

    Args:
        base: the base model of the pair, if `name` is the chat model; see `find_adapter`.
    """
    if adapter := find_adapter(name, base):
        identity = identify(adapter.model)
        digest = _digest(adapter.folder)
        digest.update(str(identity.get("digest", identity["name"])).encode())
        return {"name": name, "digest": digest.hexdigest()[:16], "adapter_of": adapter.model}
    path = local_path(name)
    return {"name": name} if path is None else {"name": name, "digest": _digest(path).hexdigest()[:16]}


def identify_all(models: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The identity of each model of a pair or a chain, of which the first is the base model."""
    base = next(iter(models.values()))
    return {source: identify(name, None if number == 0 else base) for number, (source, name) in enumerate(models.items())}


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are those of one model."""
    return bool(one.get("digest", one["name"]) == other.get("digest", other["name"]))


def find_adapter(name: str, base: str | None = None) -> Adapter | None:
    """The adapter behind a name; None for a whole model.

    It is merged into the model that it names. If it names none, or a folder that does not exist on this machine, it is merged
    into `base`.

    Raises:
        UserError: it is unclear or unknown which model the adapter belongs to.
    """
    folder = local_path(name) or _cached_adapter(name)
    if folder is None or not (folder / ADAPTER).is_file():
        return None
    named = read_json(folder / ADAPTER).get("base_model_name_or_path")
    path = local_path(named) if named else None
    is_here = path is not None or bool(named and HUB_NAME.fullmatch(named))
    if path is not None and path.resolve() == folder.resolve():
        raise UserError(f"{folder / ADAPTER} names its own folder as the adapter's model; move the adapter to another folder")
    weights = _digest(folder, _is_weights)
    if any(map(_is_weights, folder.iterdir())) and (path is None or _digest(path, _is_weights).digest() != weights.digest()):
        raise UserError(
            f"{name} holds an adapter ({ADAPTER}) and the weights of a whole model, which are not those of {named!r} that the "
            "adapter names; keep the one that you mean in a folder of its own"
        )
    if is_here:
        return Adapter(name, folder, named)
    what = f"is an adapter for {named!r}, which does not exist here" if named else "is an adapter that names no model"
    if base is None:
        raise UserError(f"{name} {what}; set base_model_name_or_path in its {ADAPTER} to the model's folder or Hub name")
    return Adapter(name, folder, base, f"{name} {what}; it is merged into {base}")


def _digest(path: Path, wanted: Any = lambda file: file.suffix in DIGESTED) -> Any:
    digest = hashlib.sha256()
    for file in sorted(path.glob("*")) if path.is_dir() else [path]:
        if not wanted(file):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest


def _is_weights(file: Path) -> bool:
    return file.suffix in {".safetensors", ".bin"} and file.name.startswith(("model", "pytorch_model"))


@lru_cache
def fetch_adapter(name: str) -> None:
    """If the name is that of an adapter on the Hub, bring its files into the Hub's cache, where `find_adapter` looks for it.

    Whatever loads a model calls this first; the Hub is asked once per process.
    """
    if local_path(name) is not None or not HUB_NAME.fullmatch(name):
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    if not isinstance(try_to_load_from_cache(name, ADAPTER), str | None):
        return  # the cache knows that there is no such file
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.hf_hub_download(name, ADAPTER)
    except (OSError, EntryNotFoundError):
        return  # a whole model, or none at all
    try:
        api.snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.*"])
    except (OSError, EntryNotFoundError) as error:
        raise UserError(f"cannot fetch the adapter {name}: {str(error).splitlines()[0]}; check the network") from None


def _cached_adapter(name: str) -> Path | None:
    """The folder of an adapter in the Hub's cache."""
    if not HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, ADAPTER)
    return Path(found).parent if isinstance(found, str) else None
