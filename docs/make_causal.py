"""Do the causal test and the steering experiment on a run, draw docs/causal.svg and write the numbers into docs/causal.md.

    .venv/bin/python docs/make_causal.py [runs/wide]

A run without a coder of the difference (a diff-SAE) gets one, with the settings of its BatchTopK crosscoder. The steered latent
is chosen on training prompts alone: of the chat-specific pool, the latent whose ablation costs most of the log-probability of
how the chat model's refusals begin. Held-out prompts are asked once, at the end. Killed and started again, it goes on after
the last finished stage.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
import yaml
from torch.nn.utils.rnn import pad_sequence

from crossdiff.activations.store import Store
from crossdiff.causal.answers import Rules, read_rules
from crossdiff.causal.generation import Sampling, ask
from crossdiff.causal.steering import Steerer
from crossdiff.causal.steering_table import labelled_prompts
from crossdiff.cli import run_command
from crossdiff.config import DifferenceConfig, RunConfig, SteerConfig, validate
from crossdiff.crosscoder.checkpoint import load
from crossdiff.latents.latent_table import pools
from crossdiff.models.access import UpperHalf, residuals_after
from crossdiff.models.loading import choose_device
from crossdiff.models.pair import load_pair
from crossdiff.pairs import RULES
from crossdiff.yaml_files import read_yaml

DOCS = Path(__file__).parent
BEHAVIOUR, HARMLESS = "refusal", ("list_format",)
CANDIDATES = 4
ADD, ABLATE, CONTROLS = (1.0, 2.0), (1.0, 3.0), 2
CONVERSATIONS, PROMPTS, MAX_NEW_TOKENS, BEGINNING = 128, 60, 30, 8
SHOWN = (
    "none", "mean_difference", "mean_difference_by_group", "template_tokens", "content_tokens", "all_latents",
    "chat_reconstruction_base_error", "base_reconstruction_chat_error", "pool", "random_half", "best_half_delta_norm",
    "worst_half_delta_norm", "best_half_nu_error", "worst_half_nu_error", "best_half_nu_reconstruction_nobias",
    "worst_half_nu_reconstruction_nobias", "best_half_rank_sum", "worst_half_rank_sum", "largest_contributions",
    "verdict_chat_specific", "verdict_complete_shrinkage", "verdict_latent_decoupling", "verdict_rotated",
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


def refused(coder: Analysed, rules: Rules) -> list[tuple[list[int], int]]:
    """Token ids of training prompts that the chat model refuses, with how its answer begins, and where that is."""
    asked = labelled_prompts(coder.store, SteerConfig(labels=(BEHAVIOUR,), split="train", prompts_per_label=PROMPTS))
    questions, steerer = asked["prompt"].to_list(), coder.steerer
    found = []
    for question, answer in zip(questions, steerer.answer(questions, None, Sampling(MAX_NEW_TOKENS)), strict=True):
        if BEHAVIOUR in rules.shown(answer.text):
            prompt = list(ask(steerer.pair.tokenizer, question).token_ids)
            begins = steerer.pair.tokenizer(answer.text, add_special_tokens=False)["input_ids"][:BEGINNING]
            found.append((prompt + begins, len(prompt)))
    return found


@torch.no_grad()
def candidates(coder: Analysed, config: RunConfig, refusals: list[tuple[list[int], int]]) -> dict[int, float]:
    """The latents of the chat-specific pool whose ablation costs most of the log-probability of how the refusals begin.

    The refusals are the chat model's own, on training prompts; the other latents and all tokens stay as they are. Where a
    latent is active (its AUROC) says less: many become active because the refusal has begun.
    """
    crosscoder, pair, layer = coder.steerer.crosscoder, coder.steerer.pair, coder.steerer.layer
    upper, direction = UpperHalf(pair.chat, layer), crosscoder.directions()[1] / crosscoder.scale
    lengths = torch.tensor([len(ids) for ids, _ in refusals]).unsqueeze(1)
    ids = pad_sequence([torch.tensor(ids) for ids, _ in refusals], batch_first=True)
    begins = torch.tensor([start for _, start in refusals]).unsqueeze(1)
    position = torch.arange(ids.shape[1]).expand_as(ids)
    mask = (position < lengths).long()
    predicts = (position >= begins - 1) & (position < lengths - 1)
    base, chat = (residuals_after(model, ids, [layer])[0] for model in pair.models)
    code = crosscoder.sparse_code(crosscoder.normalise(torch.stack([base.flatten(0, 1), chat.flatten(0, 1)], 1)))
    edited = (position >= coder.steerer.rule.leave_out).flatten()

    def log_probability(latent: int | None) -> float:
        hidden = chat.flatten(0, 1).clone()
        if latent is not None:
            at = (code.latent == latent) & edited[code.token]
            hidden[code.token[at]] -= code.values[at].unsqueeze(1) * direction[latent]
        log_p = upper.logits(hidden.view_as(chat), ids, mask, predicts).log_softmax(1)
        target = ids.roll(-1, 1)[predicts].unsqueeze(1)
        return float(log_p.gather(1, target).sum() / len(refusals))

    plain = log_probability(None)
    pool = sorted(pools(coder.table, config.analyze.pool_size, config.analyze.seed)["chat_specific"])
    cost = {latent: plain - log_probability(latent) for latent in pool}
    return {latent: cost[latent] for latent in sorted(pool, key=lambda latent: -cost[latent])[:CANDIDATES]}


def steer(run: Path, coder: Analysed, latent: int) -> pl.DataFrame:
    """The rates of the behaviour on held-out prompts, with the latent ablated and added."""
    found = []
    for mode, strengths, labels in (("ablate", ABLATE, (BEHAVIOUR,)), ("add", ADD, HARMLESS)):
        options = {
            "--crosscoder": [coder.name], "--latent": [latent], "--mode": [mode], "--strength": strengths, "--labels": labels,
            "--prompts_per_label": [PROMPTS], "--max_new_tokens": [MAX_NEW_TOKENS], "--controls": [CONTROLS],
        }  # fmt: skip
        run_command(["steer", str(run), *(str(word) for key, values in options.items() for word in (key, *values))])
        table = pl.read_parquet(run / "steering" / f"{coder.name}-{latent}-{mode}-chat-rates.parquet")
        found.append(table.filter(pl.col("behaviour") == BEHAVIOUR).with_columns(mode=pl.lit(mode)))
    return pl.concat(found)


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


def steering_lines(coder: Analysed, costs: dict[int, float], found: pl.DataFrame) -> list[str]:
    """Markdown: the rate of the behaviour in every condition."""
    tried = ", ".join(f"{number} ({-cost:+.3f})" for number, cost in costs.items())
    latent = next(iter(costs))
    row, norm = coder.table.row(latent, named=True), coder.steerer.typical_norm(latent)
    lines = [f"### Steering {BEHAVIOUR} with latent {latent} of {coder.name}", ""]
    lines += [
        f"Change of the log-probability of the first {BEGINNING} tokens of refusals on training prompts when ablated, the "
        f"largest of the pool: {tried}. The first is taken: verdict {row['verdict']}, delta_norm {row['delta_norm']:.2f}, "
        f"active on {row['frequency']:.1%} of tokens, where it adds a norm of {norm:.0f} on average. Answers are cut at "
        f"{MAX_NEW_TOKENS} tokens.", "",
    ]  # fmt: skip
    lines += ["| prompts | condition | latent | n | rate | change | degenerate |", "|---|---|---|---|---|---|---|"]
    for row in found.iter_rows(named=True):
        condition = "unsteered" if row["role"] == "unsteered" else f"{row['mode']} {row['strength']:g}, {row['role']}"
        rate = f"{row['rate']:.2f} [{row['rate_low']:.2f}, {row['rate_high']:.2f}]"
        change = f"{row['change']:+.2f} [{row['change_low']:+.2f}, {row['change_high']:+.2f}]"
        number = "" if row["latent"] is None else row["latent"]
        cells = [row["label"], condition, number, row["n"], rate, change, f"{row['degenerate']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def with_difference(config: RunConfig) -> RunConfig:
    """The settings with a coder of the difference, for the `diff-SAE` of the causal test."""
    if any(coder.inputs.kind == "difference" for coder in config.crosscoders.values()):
        return config
    like = config.crosscoders["batchtopk"].model_copy(update={"inputs": DifferenceConfig()})
    return config.model_copy(update={"crosscoders": {**config.crosscoders, "diff_sae": like}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/wide"))
    run = parser.parse_args().run
    config = with_difference(validate(RunConfig, read_yaml(run / "config.yaml"), str(run)))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config.model_dump(mode="json"), file, sort_keys=False)
        file.flush()
        run_command(["causal", str(run), "--config", file.name, "--causal.max_conversations", str(CONVERSATIONS)])
    found = [name for name, coder in config.crosscoders.items() if coder.inputs.kind != "single"]
    reports = {name: json.loads((run / name / "causal.json").read_text()) for name in found}
    (DOCS / "causal.svg").write_text(figure(reports), encoding="utf-8")
    lines = ["![KL to the chat model for each intervention](causal.svg)", "", *patching_tables(reports)]

    store, rules = Store(run / "activations"), read_rules(RULES)
    pair = load_pair(config.base, config.chat, choose_device(config.device))
    for name in (name for name in found if config.crosscoders[name].inputs.kind == "paired"):
        table = pl.read_parquet(run / name / "latents.parquet")
        coder = Analysed(name, Steerer(pair, load(run / name), store.layer, table, store.rule), table, store)
        costs = candidates(coder, config, refused(coder, rules))
        lines += steering_lines(coder, costs, steer(run, coder, next(iter(costs))))
    page = DOCS / "causal.md"
    made = "<!-- numbers: made by docs/make_causal.py -->\n\n" + "\n".join(lines) + "\n<!-- end of numbers -->"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"<!-- numbers.*<!-- end of numbers -->", lambda _: made, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
