"""Errors that the user can fix, and the checks of input that several packages share."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """A problem that the user can fix. The message names the value, what was expected and what to do.

    Examples:
        >>> try:
        ...     crossdiff.open("runs/demo", crosscoder="topk")
        ... except crossdiff.UserError as error:
        ...     print(error)
        there is no crosscoder 'topk' in runs/demo; there are l1, batchtopk
    """


def check_latents(latents: Iterable[int], n_latents: int, name: str = "the crosscoder") -> None:
    """Check that requested latents exist.

    Args:
        name: what has the latents, for the message.

    Raises:
        UserError: names the first latent that does not exist.
    """
    for latent in latents:
        if not 0 <= latent < n_latents:
            raise UserError(f"there is no latent {latent}: {name} has {n_latents}, from 0 to {n_latents - 1}")
