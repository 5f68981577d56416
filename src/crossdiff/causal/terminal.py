"""Terminal output of the causal test and of steering."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crossdiff.causal.conversations import RESPONSE, SPANS
from crossdiff.causal.generation import Sampling
from crossdiff.causal.steering import Steerer, Steering
from crossdiff.config import SteerConfig
from crossdiff.files import number, read_json
from crossdiff.integrity import intact, read_parquet

SHOWN = (RESPONSE, *SPANS)


def _estimate(entry: dict[str, float | None], percent: bool = False) -> str:
    value, low, high = (number(entry[key]) * (100 if percent else 1) for key in ("value", "low", "high"))
    if math.isnan(value):
        return "undefined"
    return f"{value:.0f}% [{low:.0f}, {high:.0f}]" if percent else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def print_causal(report: dict[str, Any], name: str, console: Console) -> None:
    """Print KL and the share of the gap closed for every intervention, then the comparisons."""
    skipped = f" ({report['n_without_assistant']} without an assistant's turn skipped)" if report["n_without_assistant"] else ""
    table = Table(
        title=f"{name}: KL to the chat model in nats, {report['n_conversations']} {report['split']} conversations{skipped}",
        caption="closed: share of the gap between `none` and the chat model; [95% bootstrap interval over conversations]; "
        "left out: latents that the ranking leaves out because of their nu (`within`); with bias: nu_reconstruction and "
        "rank_sum_paper, without: nu_reconstruction_nobias and rank_sum",
    )
    for column in ("intervention", "latents", "left out", *(f"KL {span}" for span in SHOWN), f"closed, {RESPONSE}"):
        table.add_column(column, justify="left" if column == "intervention" else "right")
    results = {(result["intervention"], result["span"]): result for result in report["results"]}
    for intervention in dict.fromkeys(intervention for intervention, _ in results):
        row = results[intervention, RESPONSE]
        title = intervention if row["n_arms"] == 1 else f"{intervention} (mean of {row['n_arms']})"
        latents = "all" if row["n_latents"] is None else str(row["n_latents"] or "")
        cells = [_estimate(results[intervention, span]["kl"]) for span in SHOWN]
        outside = "" if row["n_outside"] is None else str(row["n_outside"])
        table.add_row(title, latents, outside, *cells, _estimate(row["closed"], percent=True))
    console.print(table)
    if report["measures"]:
        console.print(_other_measures(report, name))
    for intervention, reason in report["left_out"].items():
        console.print(f"[dim]{intervention}: skipped, {reason}[/dim]")
    differences = Table(title=f"{name}: KL(worse) - KL(better) in nats, paired over conversations")
    for column in ("comparison", "better", "worse", *SHOWN):
        differences.add_column(column)
    comparisons = {(entry["comparison"], entry["span"]): entry["difference"] for entry in report["comparisons"]}
    for entry in report["comparisons"]:
        if entry["span"] == RESPONSE:
            cells = [_estimate(comparisons[entry["comparison"], span]) for span in SHOWN]
            differences.add_row(entry["comparison"], entry["better"], entry["worse"], *cells)
    console.print(differences)


def _other_measures(report: dict[str, Any], name: str) -> Table:
    """The measures beside KL to the chat model, over the response."""
    table = Table(
        title=f"{name}: other measures, {RESPONSE}, in nats",
        caption="nll: of the answer's tokens; kl_base: KL from the base model's distributions; cross_entropy: to the chat "
        "model's likeliest token; [95% bootstrap interval over conversations]",
    )
    for column in ("intervention", *report["measures"]):
        table.add_column(column, justify="left" if column == "intervention" else "right")
    for result in report["results"]:
        if result["span"] == RESPONSE:
            table.add_row(result["intervention"], *(_estimate(result["measures"][key]) for key in report["measures"]))
    return table


def print_side_by_side(steerer: Steerer, name: str, config: SteerConfig, console: Console) -> None:
    """Print the answers to each prompt, unsteered and at each strength; `name` is that of the crosscoder."""
    assert config.latent is not None
    sampling = Sampling(config.max_new_tokens, config.temperature, config.seed)
    answered = {"unsteered": steerer.answer(config.prompt, None, sampling, config.model)}
    for strength in config.strength:
        steering = Steering(config.latent, config.mode, strength, config.model, config.tokens)
        answered[f"{config.mode} {strength:g}"] = steerer.answer(config.prompt, steering, sampling)
    table = Table(title=f"{name}: latent {config.latent}, {config.model} model, {config.tokens} tokens", show_lines=True)
    table.add_column("prompt")
    for name in answered:
        table.add_column(name)
    for index, prompt in enumerate(config.prompt):
        texts = (each[index].text + ("" if each[index].finished else " ...") for each in answered.values())
        table.add_row(escape(prompt), *map(escape, texts))
    console.print(table)


def print_rates(path: Path, title: str, console: Console) -> None:
    """Print the rates of the behaviours that at least one answer shows."""
    rates = read_parquet(path)
    shown = rates.filter(pl.col("rate").max().over("label", "behaviour") > 0)
    table = Table(
        title=f"steering {title}",
        caption="rate [95% Wilson interval]; change from the unsteered answers [95% paired bootstrap interval over prompts]",
    )
    for column in ("prompts", "behaviour", "condition", "latent", "n", "rate", "change", "degenerate"):
        table.add_column(column)
    for row in shown.iter_rows(named=True):
        latent = "" if row["latent"] is None else str(row["latent"])
        table.add_row(
            row["label"], row["behaviour"], f"{row['role']} {row['strength']:g}", latent, str(row["n"]),
            f"{row['rate']:.2f} [{row['rate_low']:.2f}, {row['rate_high']:.2f}]",
            f"{row['change']:+.2f} [{row['change_low']:+.2f}, {row['change_high']:+.2f}]", f"{row['degenerate']:.2f}",
        )  # fmt: skip
    console.print(table)


def print_concept_causal(folder: Path, console: Console) -> None:
    """Print what the replicated concepts close together, and which close most alone; `folder` is the run's `concepts`."""
    report = read_json(intact(folder / "causal.json"))
    table = Table(
        title=f"Concepts together: share of the gap closed, {report['n_conversations']} {report['split']} conversations",
        caption="the gap is KL to the chat model without any change; [95% bootstrap interval over conversations]",
    )
    for column in ("training", "set", "latents", "KL in nats", "closed"):
        table.add_column(column, justify="left" if column in ("training", "set") else "right")
    for result in report["results"]:
        latents = "all" if result["n_latents"] is None else str(result["n_latents"] or "")
        name = result["intervention"] if result["n_arms"] == 1 else f"{result['intervention']} (mean of {result['n_arms']})"
        row = (result["training"], name, latents, _estimate(result["kl"]), _estimate(result["closed"], percent=True))
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    labels = dict(zip(*read_parquet(folder / "concepts.parquet").select("concept", "label"), strict=True))
    measured = read_parquet(folder / "causal.parquet").filter(pl.col("closed").is_not_nan())
    alone = measured.group_by("concept").agg(
        pl.col("closed").mean(), least=pl.col("closed").min(), most=pl.col("closed").max(), n=pl.len()
    )  # fmt: skip
    strongest = Table(title="Concepts that close most of the gap alone: mean over trainings [least, most]")
    for column in ("concept", "strongest tokens", "trainings", "closed"):
        strongest.add_column(column, justify="left" if column == "strongest tokens" else "right")
    for found in alone.sort("closed", descending=True).head(10).iter_rows(named=True):
        closed = f"{found['closed']:.1%} [{found['least']:.1%}, {found['most']:.1%}]"
        strongest.add_row(str(found["concept"]), escape(labels[found["concept"]] or ""), str(found["n"]), escape(closed))
    if alone.height:
        console.print(strongest)
