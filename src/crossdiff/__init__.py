"""crossdiff: find out what fine-tuning changed inside a model.

    run = crossdiff.open("runs/demo")       # a finished diff, for reading
    run.concepts                            # what replicates over trainings: one row per concept (polars)
    run.concept(0)                          # one concept as a card, with the evidence for it
    run.latents                             # the latent table (polars)
    run.latent(42)                          # one latent as a card
    run.activations("Some text")            # run both models on it: which latents are active where

Names are imported when they are first used, so that `import crossdiff` takes almost no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossdiff.activations.store import Store
    from crossdiff.config import CrosscoderConfig, RunConfig
    from crossdiff.crosscoder.crosscoder import Crosscoder
    from crossdiff.crosscoder.train import train
    from crossdiff.diff import Diff, open
    from crossdiff.errors import UserError
    from crossdiff.notes.of_run import RunNotes
    from crossdiff.published.hub import load, load_table, pull, push
    from crossdiff.text_activations import Activations

    __version__: str

__all__ = [
    "Activations", "Crosscoder", "CrosscoderConfig", "Diff", "RunConfig", "RunNotes", "Store", "UserError", "__version__",
    "load", "load_table", "open", "pull", "push", "train",
]  # fmt: skip

_HOMES = {
    "Activations": "text_activations",
    "Crosscoder": "crosscoder.crosscoder",
    "CrosscoderConfig": "config",
    "Diff": "diff",
    "RunConfig": "config",
    "RunNotes": "notes.of_run",
    "Store": "activations.store",
    "UserError": "errors",
    "load": "published.hub",
    "load_table": "published.hub",
    "open": "diff",
    "pull": "published.hub",
    "push": "published.hub",
    "train": "crosscoder.train",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("crossdiff")
    if name not in _HOMES:
        raise AttributeError(f"module 'crossdiff' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"crossdiff.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
