"""Where a published coder reads: only the residual stream after a decoder layer is read here, as in our own stores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from crossdiff.errors import UserError

RESIDUAL = re.compile(
    r"blocks\.(?P<lens>\d{1,6})\.hook_resid_(?P<side>pre|post)"  # TransformerLens
    r"|((language_)?model\.|transformer\.|gpt_neox\.)*(layers|h)\.(?P<module>\d{1,6})"  # the module of a decoder layer
    r"|resid_post_layer_(?P<trained>\d{1,6})"  # dictionary_learning
)
SCOPE = re.compile(r"gemma-scope-[\w.]+(-[\w.]+)*?-(?P<site>res|mlp|att|transcoders)\b")


def layer_after(path: Path, hookpoint: Any) -> int | None:
    """The decoder layer after which a hookpoint reads the residual stream; None if there is no hookpoint.

    Raises:
        UserError: it reads another place, such as the output of an MLP or of attention, or the embeddings.
    """
    if hookpoint is None:
        return None
    found = RESIDUAL.fullmatch(str(hookpoint))
    layer = -1
    if found is not None:
        number = next(int(found[name]) for name in ("lens", "module", "trained") if found[name] is not None)
        layer = number - (found["side"] == "pre")
    if layer < 0:
        raise UserError(
            f"{path} reads {hookpoint}, which is not the residual stream after a decoder layer; expected a hookpoint such as "
            "blocks.5.hook_resid_post, blocks.6.hook_resid_pre or model.layers.5"
        )
    return layer


def hookpoint_of_scope(path: Path) -> str | None:
    """The hookpoint of a Gemma Scope SAE, which only its repository's name and its folders tell."""
    layer = re.search(r"layer_(\d+)", str(path))
    site = SCOPE.search(str(path))
    if site is not None and site["site"] != "res":
        return f"Gemma Scope's {site['site']}"
    return None if layer is None else f"blocks.{layer[1]}.hook_resid_post"
