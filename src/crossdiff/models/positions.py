"""How many positions a model can read, and how many it was trained on."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

from torch import nn

from crossdiff.errors import UserError


class Positions(NamedTuple):
    """The positions of a model. is_table: each has an embedding, so the model cannot read any beyond."""

    number: int
    is_table: bool


def positions(model: nn.Module) -> Positions | None:
    """The positions that a model's config names; None if it names none, as for recurrent models."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    number = getattr(config, "max_position_embeddings", None)
    if not isinstance(number, int):
        return None
    tables = (
        tensor
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if "position" in name or "wpe" in name.split(".")
    )
    # Some tables have one or two more rows, for padding.
    return Positions(number, any(table.ndim == 2 and number <= table.shape[0] <= number + 2 for table in tables))


def check_length(name: str, found: Positions | None, n_tokens: int, what: str, remedy: str) -> str | None:
    """Check that a model can read sequences of this length.

    Args:
        what: what the length is, for messages: `harvest.max_length 256`, say.

    Returns:
        A remark if the model can read them but was not trained to.

    Raises:
        UserError: the model has no embeddings for so many positions.
    """
    if found is None or n_tokens <= found.number:
        return None
    if found.is_table:
        raise UserError(f"{what} is more than the {found.number} positions that {name} can read; {remedy}")
    return (
        f"{what} is more than the {found.number} positions that {name} was trained on; its activations at later positions are "
        f"not to be trusted: {remedy}"
    )
