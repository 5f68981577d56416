"""Errors that the user can fix, and the checks of input that several packages share."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import SupportsIndex


class UserError(ValueError):
    """A problem that the user can fix. The message names the value, what was expected and what to do.

    Examples:
        >>> try:
        ...     crossdiff.open("runs/demo", crosscoder="topk")
        ... except crossdiff.UserError as error:
        ...     print(error)
        there is no crosscoder 'topk' in runs/demo; there are l1, batchtopk
    """


def check_latents(latents: object, n_latents: int, name: str = "the crosscoder", unit: str = "latent") -> None:
    """Check that `latents` are numbers of latents that exist.

    Args:
        name: what has the latents, for the message.
        unit: what a latent is called: "concept", where the coder has one latent per concept.

    Raises:
        UserError: names the first one that is not a whole number, or that does not exist.
    """
    if not isinstance(latents, Iterable) or isinstance(latents, str | bytes):
        raise UserError(f"expected a list of {unit}s, found {latents!r}; give their numbers, such as [3, 17]")
    for latent in latents:
        if isinstance(latent, bool) or not isinstance(latent, SupportsIndex):
            raise UserError(
                f"{latent!r} is not the number of a {unit}; expected a whole number from 0 to {n_latents - 1}, the {unit}s of "
                f"{name}"
            )
        if not 0 <= index(latent) < n_latents:
            raise UserError(f"there is no {unit} {latent}: {name} has {n_latents}, from 0 to {n_latents - 1}")
