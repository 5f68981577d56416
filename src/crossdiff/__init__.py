"""crossdiff: what did fine-tuning change inside this model?"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from crossdiff.config import CrosscoderConfig, RunConfig, UserError

if TYPE_CHECKING:
    from crossdiff.activations.store import Store
    from crossdiff.crosscoder.checkpoint import load
    from crossdiff.crosscoder.train import train

__version__ = version("crossdiff")
__all__ = ["CrosscoderConfig", "RunConfig", "Store", "UserError", "__version__", "load", "train"]

_HEAVY = {"Store": "activations.store", "load": "crosscoder.checkpoint", "train": "crosscoder.train"}
"""What is imported when it is first used: it brings torch."""


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module 'crossdiff' has no attribute {name!r}")
    return getattr(import_module(f"crossdiff.{_HEAVY[name]}"), name)
