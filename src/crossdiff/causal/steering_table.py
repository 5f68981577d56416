"""Steering over many prompts: answers at every strength beside those of matched random latents, and rates of behaviours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.activations.store import Store
from crossdiff.causal.answers import Rules, is_degenerate, wilson
from crossdiff.causal.generation import Answer, Sampling
from crossdiff.causal.steering import Steerer, Steering, matched_controls
from crossdiff.config import SteerConfig
from crossdiff.errors import UserError

UNSTEERED, STEERED, CONTROL = "unsteered", "latent", "control"
RESAMPLES = 2000
COLUMNS = {
    "prompt, label": "what was asked, and its label in the dataset",
    "role": "unsteered, latent (the one asked for) or control (a random one of like frequency and norm)",
    "latent, strength": "what was added or ablated; null and 0 where nothing was",
    "answer, n_tokens, finished": "what the model said; finished: it ended by itself",
    "shows": "behaviours that the answer shows by the rules",
    "degenerate": "empty, or going round in circles",
}
"""Columns of the table of answers."""


def labelled_prompts(store: Store, config: SteerConfig) -> pl.DataFrame:
    """Distinct labelled questions of a split that no training conversation asks, so many of each label: `prompt`, `label`.

    Raises:
        UserError: there are none, or none with one of the labels asked for.
    """
    single = (pl.col("n_messages") == 2) & pl.col("label").is_not_null()
    table = store.documents.filter(single & (pl.col("split") == config.split)).unique(
        "prompt", keep="first", maintain_order=True
    )
    if config.split == "heldout":
        trained = store.documents.filter(pl.col("split") == "train")["prompt"].drop_nulls()
        table = table.filter(~pl.col("prompt").is_in(trained.unique().to_list()))
    for label in config.labels:
        if label not in table["label"]:
            found = ", ".join(sorted(table["label"].unique())) or "none"
            raise UserError(f"no {config.split} prompt has the label {label!r}; the labels are {found}")
    if config.labels:
        table = table.filter(pl.col("label").is_in(config.labels))
    if not table.height:
        raise UserError(f"the store has no labelled {config.split} prompts; name some with --prompt, or set a label_column")
    digests = [hashlib.sha256(f"{config.seed}{prompt}".encode()).hexdigest() for prompt in table["prompt"]]
    chosen = table.with_columns(digest=pl.Series(digests)).sort("digest").group_by("label").head(config.prompts_per_label)
    return chosen.sort("label", "digest").select("prompt", "label")


def _plan(steerer: Steerer, config: SteerConfig, latent: int) -> list[tuple[str, Steering]]:
    """What is generated beside the unsteered answers. Controls add as much as the latent: the norm is the same exactly."""
    norm = steerer.typical_norm(latent) if config.mode == "add" else None
    controls = matched_controls(steerer.table, latent, config.controls, config.seed) if config.controls else []
    return [
        (role, Steering(number, config.mode, strength, config.model, config.tokens, norm))
        for strength in config.strength
        for role, number in [(STEERED, latent), *((CONTROL, control) for control in controls)]
    ]


def steering_table(
    steerer: Steerer,
    prompts: pl.DataFrame,
    config: SteerConfig,
    rules: Rules,
    advance: Callable[..., None] = lambda n, total: None,
) -> pl.DataFrame:
    """One row for each prompt and condition; columns are those of `COLUMNS`.

    Raises:
        UserError: a latent that cannot be steered with, or too few latents for the controls.
    """
    assert config.latent is not None
    sampling = Sampling(config.max_new_tokens, config.temperature, config.seed)
    questions = prompts["prompt"].to_list()
    steerer.check(Steering(config.latent, config.mode, 1.0))
    plan = _plan(steerer, config, config.latent)
    frames = [_frame(prompts, UNSTEERED, None, 0.0, steerer.answer(questions, None, sampling, config.model), rules)]
    advance(1, total=len(plan) + 1)
    for role, steering in plan:
        answered = steerer.answer(questions, steering, sampling)
        frames.append(_frame(prompts, role, steering.latent, steering.strength, answered, rules))
        advance(1, total=len(plan) + 1)
    return pl.concat(frames)


def _frame(
    prompts: pl.DataFrame, role: str, latent: int | None, strength: float, answered: Sequence[Answer], rules: Rules
) -> pl.DataFrame:
    columns: dict[str, Any] = {
        "answer": [answer.text for answer in answered],
        "n_tokens": [answer.n_tokens for answer in answered],
        "finished": [answer.finished for answer in answered],
        "shows": [list(rules.shown(answer.text)) for answer in answered],
        "degenerate": [is_degenerate(answer.text) for answer in answered],
    }
    constant = {"role": pl.lit(role), "latent": pl.lit(latent, dtype=pl.Int64), "strength": pl.lit(strength)}
    found = pl.DataFrame(columns, schema_overrides={"shows": pl.List(pl.String)})
    return pl.concat([prompts.with_columns(**constant), found], how="horizontal")


def rates(table: pl.DataFrame, rules: Rules, seed: int) -> pl.DataFrame:
    """Share of the answers that show each behaviour: one row for each condition, label of the prompts and behaviour.

    `rate` has a Wilson interval; `change` is the difference to the unsteered answers, with a bootstrap interval over the
    prompts, which are the same on both sides. `degenerate` and `finished` are shares of the same answers.
    """
    rows: list[dict[str, Any]] = []
    for _, of_label in table.group_by("label", maintain_order=True):
        plain = of_label.filter(pl.col("role") == UNSTEERED)
        for _, part in of_label.group_by("role", "latent", "strength", maintain_order=True):
            assert part["prompt"].equals(plain["prompt"])
            condition = part.row(0, named=True)
            same = {key: condition[key] for key in ("label", "role", "latent", "strength")}
            same |= {key: float(part[key].cast(pl.Float64).to_numpy().mean()) for key in ("degenerate", "finished")}
            for behaviour in rules.behaviours:
                before, after = (frame["shows"].list.contains(behaviour).to_numpy() for frame in (plain, part))
                rows.append(same | {"behaviour": behaviour, **_rate(before, after, seed)})
    return pl.DataFrame(rows, schema_overrides={"latent": pl.Int64})


def _rate(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_], seed: int) -> dict[str, int | float]:
    """The rate after, with its Wilson interval, and its change from before, with a bootstrap interval over the prompts."""
    n, difference = len(after), after.astype(float) - before
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) @ difference / n
    change = dict(zip(("change_low", "change_high"), np.quantile(drawn, [0.025, 0.975]).tolist(), strict=True))
    low, high = wilson(int(after.sum()), n)
    rate: dict[str, int | float] = {"n": n, "rate": float(after.mean()), "rate_low": low, "rate_high": high}
    return rate | {"change": float(difference.mean())} | change
