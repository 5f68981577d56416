"""Do the causal test and the steering experiment on a run, draw docs/causal.svg and write the numbers into docs/causal.md.

    .venv/bin/python docs/make_causal.py [runs/demo]

Goes on where it was when killed. The steered latent is chosen on training conversations alone: of the chat-specific pool, the
`CANDIDATES` latents that best predict the behaviour there, and of these the one whose ablation lowers its rate most on
training prompts. Held-out prompts are asked once, at the end.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from crossdiff.activations.store import Store
from crossdiff.causal.answers import Rules, read_rules
from crossdiff.causal.steering import Steerer
from crossdiff.causal.steering_table import labelled_prompts, rates, steering_table
from crossdiff.cli import run_command
from crossdiff.config import RunConfig, SteerConfig, read_yaml, validate
from crossdiff.crosscoder.checkpoint import load
from crossdiff.latents.behaviours import CONTRASTS, QUESTIONS, auroc, conversation_scores
from crossdiff.latents.table import pools
from crossdiff.models.pair import choose_device, load_pair
from crossdiff.pairs import RULES

DOCS = Path(__file__).parent
BEHAVIOUR, HARMLESS = "refusal", ("list_format", "helpful")
CANDIDATES = 8
ADD = (0.5, 1.0, 2.0)
ABLATE = (1.0, 2.0)
SHOWN = (
    "none", "mean_difference", "mean_difference_by_group", "template_tokens", "content_tokens", "all_latents",
    "chat_reconstruction_base_error", "base_reconstruction_chat_error", "pool", "random_half", "best_half_delta_norm",
    "worst_half_delta_norm", "best_half_nu_error", "worst_half_nu_error", "best_half_nu_reconstruction",
    "worst_half_nu_reconstruction", "best_half_rank_sum", "worst_half_rank_sum", "verdict_chat_specific",
)  # fmt: skip
PANELS = {"response": "whole response", "first": "first content token"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
LEFT, PANEL, GAP, ROW, TOP = 235, 300, 30, 22, 60


@dataclass(frozen=True)
class Analysed:
    """What the experiment needs of one crosscoder."""

    name: str
    steerer: Steerer
    table: pl.DataFrame
    store: Store


# --- choosing a latent on training data ---------------------------------------------------------------------------------


def candidates(coder: Analysed, config: RunConfig) -> list[int]:
    """Latents of the chat-specific pool that best predict the behaviour in training conversations, on either question."""
    pool = pools(coder.table, config.analyze.pool_size, config.analyze.seed)["chat_specific"]
    found = conversation_scores(coder.steerer.crosscoder, coder.store, sorted(pool), config.analyze.batch_tokens)
    assert found is not None
    train = ~found.heldout & np.isin(found.labels, (BEHAVIOUR, *CONTRASTS[BEHAVIOUR]))
    positive = found.labels[train] == BEHAVIOUR
    best = {
        latent: max(auroc(positive, found.scores[question][train][:, index]) for question in QUESTIONS)
        for index, latent in enumerate(sorted(pool))
    }
    return sorted(best, key=lambda latent: -best[latent])[:CANDIDATES]


def effect(coder: Analysed, latent: int, rules: Rules) -> float:
    """How much ablating the latent changes the rate of the behaviour on training prompts."""
    config = SteerConfig(latent=latent, mode="ablate", labels=(BEHAVIOUR,), split="train", prompts_per_label=60, controls=0)
    prompts = labelled_prompts(coder.store, config)
    found = rates(steering_table(coder.steerer, prompts, config, rules), rules, 0)
    return float(found.filter((pl.col("behaviour") == BEHAVIOUR) & (pl.col("role") == "latent"))["change"][0])


def steer(coder: Analysed, config: RunConfig, rules: Rules) -> tuple[int, dict[int, float], pl.DataFrame]:
    """The chosen latent, the effects it was chosen by, and the rates on held-out prompts."""
    effects = {latent: effect(coder, latent, rules) for latent in candidates(coder, config)}
    latent = min(effects, key=lambda number: effects[number])
    found = []
    for mode, strengths, labels in (("ablate", ABLATE, (BEHAVIOUR,)), ("add", ADD, HARMLESS)):
        wanted = SteerConfig(latent=latent, mode=mode, strength=strengths, labels=labels)
        table = steering_table(coder.steerer, labelled_prompts(coder.store, wanted), wanted, rules)
        found.append(rates(table, rules, 0).filter(pl.col("behaviour") == BEHAVIOUR).with_columns(mode=pl.lit(mode)))
    return latent, effects, pl.concat(found)


# --- the figure -----------------------------------------------------------------------------------------------------------


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def figure(reports: dict[str, Any]) -> str:
    """Dots with intervals: one row for each intervention, one panel for each span, one colour for each crosscoder."""
    found = {
        name: {(row["intervention"], row["span"]): row["kl"] for row in report["results"]} for name, report in reports.items()
    }
    shown = [name for name in SHOWN if any((name, "response") in rows for rows in found.values())]
    bottom = TOP + ROW * len(shown)
    parts = []
    for number, (span, title) in enumerate(PANELS.items()):
        left = LEFT + number * (PANEL + GAP)
        every = [rows[name, span] for rows in found.values() for name in shown if (name, span) in rows]
        largest = max(estimate["high"] for estimate in every)
        parts.append(_text(left, 22, f"KL to the chat model, {title} (nats)", size=13))
        for tick in range(5):
            x = left + PANEL * tick / 4
            parts.append(f'<line x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{bottom}" stroke="#8884"/>')
            parts.append(_text(x, TOP - 14, f"{largest * tick / 4:.1f}", "middle", 11))
        for colour, (index, rows) in zip(COLOURS, enumerate(found.values()), strict=False):
            for line, name in enumerate(shown):
                if (name, span) not in rows:
                    continue
                y = TOP + ROW * line + 7 + 7 * index
                value, low, high = (left + PANEL * rows[name, span][key] / largest for key in ("value", "low", "high"))
                parts.append(f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
                parts.append(f'<circle cx="{value:.1f}" cy="{y}" r="3.2" fill="{colour}"/>')
    parts += [_text(LEFT - 10, TOP + ROW * line + 15, name.replace("_", " "), "end") for line, name in enumerate(shown)]
    for colour, (index, name) in zip(COLOURS, enumerate(found), strict=False):
        parts.append(f'<circle cx="{LEFT + 110 * index}" cy="{bottom + 20}" r="4" fill="{colour}"/>')
        parts.append(_text(LEFT + 110 * index + 10, bottom + 24, name))
    style = "<style>text{font-family:system-ui,sans-serif;fill:#222}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
    width = LEFT + len(PANELS) * (PANEL + GAP) + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 40}" role="img">'
    return f"{head}{style}{''.join(parts)}</svg>\n"


# --- the numbers ----------------------------------------------------------------------------------------------------------


def _estimate(entry: dict[str, float]) -> str:
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def patching_tables(reports: dict[str, Any]) -> list[str]:
    """Markdown: share of the gap closed on each span, and the comparisons."""
    lines = []
    for name, report in reports.items():
        found = {(row["intervention"], row["span"]): row for row in report["results"]}
        spans = ("response", "first", "2_to_10", "from_11")
        lines += [f"### {name}: {report['n_conversations']} conversations, pool of {report['pool']} latents", ""]
        lines += ["| intervention | latents | " + " | ".join(f"KL {span}" for span in spans) + " | closed |"]
        lines += ["|---|---|" + "---|" * (len(spans) + 1)]
        for intervention in dict.fromkeys(row["intervention"] for row in report["results"]):
            row = found[intervention, "response"]
            cells = [_estimate(found[intervention, span]["kl"]) for span in spans]
            closed = "{value:.0%} [{low:.0%}, {high:.0%}]".format(**row["closed"])
            latents = "all" if row["n_latents"] is None else row["n_latents"]
            lines.append(f"| {intervention} | {latents} | {' | '.join(cells)} | {closed} |")
        lines += ["", "| KL(worse) - KL(better) | better | worse | response | first |", "|---|---|---|---|---|"]
        pairs = {(entry["comparison"], entry["span"]): entry for entry in report["comparisons"]}
        for entry in (entry for entry in report["comparisons"] if entry["span"] == "response"):
            cells = [_estimate(pairs[entry["comparison"], span]["difference"]) for span in ("response", "first")]
            lines.append(f"| {entry['comparison']} | {entry['better']} | {entry['worse']} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def steering_lines(name: str, latent: int, effects: dict[int, float], found: pl.DataFrame) -> list[str]:
    """Markdown: the rate of the behaviour in every condition."""
    tried = ", ".join(f"{number} ({change:+.2f})" for number, change in effects.items())
    lines = [f"### Steering {BEHAVIOUR} with latent {latent} of {name}", ""]
    lines += [f"Candidates, with the change of the rate on training prompts when ablated: {tried}.", ""]
    lines += ["| prompts | condition | latent | n | rate | change | degenerate |", "|---|---|---|---|---|---|---|"]
    for row in found.iter_rows(named=True):
        condition = "unsteered" if row["role"] == "unsteered" else f"{row['mode']} {row['strength']:g}, {row['role']}"
        rate = f"{row['rate']:.2f} [{row['rate_low']:.2f}, {row['rate_high']:.2f}]"
        change = f"{row['change']:+.2f} [{row['change_low']:+.2f}, {row['change_high']:+.2f}]"
        number = "" if row["latent"] is None else row["latent"]
        cells = [row["label"], condition, number, row["n"], rate, change, f"{row['degenerate']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    run = parser.parse_args().run
    run_command(["causal", str(run)])
    config = validate(RunConfig, read_yaml(run / "config.yaml"), str(run))
    reports = {name: json.loads((run / name / "causal.json").read_text()) for name in config.crosscoders}
    (DOCS / "causal.svg").write_text(figure(reports), encoding="utf-8")
    lines = ["![KL to the chat model for each intervention](causal.svg)", "", *patching_tables(reports)]

    store, rules = Store(run / "activations"), read_rules(RULES)
    pair = load_pair(config.base, config.chat, choose_device(config.device))
    for name in config.crosscoders:
        table = pl.read_parquet(run / name / "latents.parquet")
        coder = Analysed(name, Steerer(pair, load(run / name), store.layer, table, store.leave_out), table, store)
        lines += steering_lines(name, *steer(coder, config, rules))
    page = DOCS / "causal.md"
    made = "<!-- numbers: made by docs/make_causal.py -->\n\n" + "\n".join(lines) + "\n<!-- end of numbers -->"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"<!-- numbers.*<!-- end of numbers -->", lambda _: made, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
