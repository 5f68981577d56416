"""Steering over many prompts: answers at every strength, those of matched random latents, and the rates of behaviours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.activations.store import Store
from crossdiff.causal.answers import Rules, is_degenerate
from crossdiff.causal.generation import Answer, Sampling
from crossdiff.causal.steering import Steerer, Steering, matched_controls
from crossdiff.config import SteerConfig
from crossdiff.errors import UserError
from crossdiff.statistics import bootstrap, wilson

UNSTEERED, STEERED, CONTROL = "unsteered", "latent", "control"
RESAMPLES = 2000
COLUMNS = {
    "prompt, label": "the question, and its label in the dataset",
    "role": "unsteered, latent (the requested one) or control (a random latent of similar frequency and norm)",
    "latent, strength": "the latent added or ablated, and its strength; null and 0 in unsteered answers",
    "answer, n_tokens, finished": "the model's answer; finished: the model ended it before the token limit",
    "shows": "behaviours that the answer shows by the rules",
    "degenerate": "whether the answer is empty or repeats itself",
}
"""Columns of the table of answers."""


def labelled_prompts(store: Store, config: SteerConfig) -> pl.DataFrame:
    """Up to `prompts_per_label` distinct questions of each label, none from a training conversation: `prompt`, `label`."""
    is_single_exchange = (pl.col("n_messages") == 2) & pl.col("label").is_not_null()
    table = store.documents.filter(is_single_exchange & (pl.col("split") == config.split)).unique(
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
        raise UserError(f"the store has no labelled {config.split} prompts; pass some with --prompt, or set a label_column")
    digests = [hashlib.sha256(f"{config.seed}{prompt}".encode()).hexdigest() for prompt in table["prompt"]]
    chosen = table.with_columns(digest=pl.Series(digests)).sort("digest").group_by("label").head(config.prompts_per_label)
    return chosen.sort("label", "digest").select("prompt", "label")


def _conditions(steerer: Steerer, config: SteerConfig, latent: int) -> list[tuple[str, Steering]]:
    """The role and steering of each condition. The vectors that controls add have exactly the latent's norm."""
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
    """One row per prompt and condition, with the columns in `COLUMNS`."""
    assert config.latent is not None
    sampling = Sampling(config.max_new_tokens, config.temperature, config.seed)
    questions = prompts["prompt"].to_list()
    steerer.check(Steering(config.latent, config.mode, 1.0))
    conditions = _conditions(steerer, config, config.latent)
    answered = steerer.answer(questions, None, sampling, config.model)
    frames = [_frame(prompts, UNSTEERED, None, 0.0, answered, rules)]
    advance(1, total=len(conditions) + 1)
    for role, steering in conditions:
        answered = steerer.answer(questions, steering, sampling)
        frames.append(_frame(prompts, role, steering.latent, steering.strength, answered, rules))
        advance(1, total=len(conditions) + 1)
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
    measured = pl.DataFrame(columns, schema_overrides={"shows": pl.List(pl.String)})
    return pl.concat([prompts.with_columns(**constant), measured], how="horizontal")


def rates(table: pl.DataFrame, rules: Rules, seed: int) -> pl.DataFrame:
    """Share of the answers that show each behaviour: one row per condition, label of the prompts and behaviour.

    `rate` has a Wilson interval. `change` is the difference from the unsteered answers to the same prompts, with a bootstrap
    interval over the prompts. `degenerate` and `finished` are shares of the same answers.
    """
    rows: list[dict[str, Any]] = []
    for _, of_label in table.group_by("label", maintain_order=True):
        unsteered = of_label.filter(pl.col("role") == UNSTEERED)
        for _, part in of_label.group_by("role", "latent", "strength", maintain_order=True):
            assert part["prompt"].equals(unsteered["prompt"])
            condition = part.row(0, named=True)
            common = {key: condition[key] for key in ("label", "role", "latent", "strength")}
            common |= {key: float(part[key].cast(pl.Float64).to_numpy().mean()) for key in ("degenerate", "finished")}
            for behaviour in rules.behaviours:
                before, after = (frame["shows"].list.contains(behaviour).to_numpy() for frame in (unsteered, part))
                rows.append(common | {"behaviour": behaviour, **_rate(before, after, seed)})
    return pl.DataFrame(rows, schema_overrides={"latent": pl.Int64})


def _rate(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_], seed: int) -> dict[str, int | float]:
    n = len(after)
    rate = wilson(int(after.sum()), n)
    difference = after.astype(float) - before
    resamples = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) @ difference / n
    change = bootstrap(float(difference.mean()), resamples)
    return {
        "n": n, "rate": rate.value, "rate_low": rate.low, "rate_high": rate.high,
        "change": change.value, "change_low": change.low, "change_high": change.high,
    }  # fmt: skip
