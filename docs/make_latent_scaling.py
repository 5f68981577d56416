"""Make the pictures and tables of docs/latent-scaling.md from finished runs.

    .venv/bin/crossdiff truth runs/truth && .venv/bin/python docs/make_latent_scaling.py --truth runs/truth
    .venv/bin/python docs/make_latent_scaling.py --run runs/wide

Without options it draws docs/verdicts.svg alone, which needs no run. `--truth` draws docs/ground-truth.svg and writes the
ground-truth tables, `--run` draws docs/pair-scaling.svg and writes the counts of that run, each between its markers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import polars as pl

from crossdiff.latents.ranking import RANKED, title

DOCS = Path(__file__).parent
PAGE = DOCS / "latent-scaling.md"
OWN, ERROR, OTHERS = "#0072b2", "#d55e00", "#009e73"
STYLE = "<style>text{font-family:system-ui,sans-serif;fill:#222}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
COLOURS = {
    "chat_only": "#d55e00", "weaker": "#e69f00", "decoupled": "#56b4e9", "rotated": "#cc79a7", "base_only": "#009e73",
    "shared": "#0072b2", "none": "#999999",
    "chat_specific": "#d55e00", "complete_shrinkage": "#e69f00", "latent_decoupling": "#56b4e9", "base_specific": "#009e73",
    "undecided": "#999999", "dead": "#cccccc",
}  # fmt: skip
# (verdict, [base: own, error, others], [chat], angle of the base direction, what the measures say)
PANELS = [
    ("chat_specific", (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), 0, "delta_norm high, both nu low"),
    ("complete_shrinkage", (0.0, 0.6, 0.0), (1.0, 0.0, 0.0), 0, "delta_norm high, nu_error high"),
    ("latent_decoupling", (0.0, 0.0, 0.9), (1.0, 0.0, 0.0), 0, "delta_norm high, nu_reconstruction high"),
    ("shared", (0.9, 0.0, 0.0), (1.0, 0.0, 0.0), 0, "delta_norm in the middle, both nu high"),
    ("rotated", (0.9, 0.0, 0.0), (1.0, 0.0, 0.0), 75, "delta_norm in the middle, both nu low"),
    ("base_specific", (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0, "delta_norm low, mirrored nu low"),
]


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "middle", weight: str = "normal") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'


def svg(width: int, height: int, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return f"{head}{STYLE}{''.join(parts)}</svg>\n"


def stack(x: float, floor: float, shares: tuple[float, ...], angle: float) -> list[str]:
    """A model's bar: what it has along the latent's direction, along the error, and through other latents; and the arrow of its
    own decoder direction."""
    parts, top, unit = [], floor, 80
    for share, colour in zip(shares, (OWN, ERROR, OTHERS), strict=True):
        if share:
            top -= share * unit
            parts.append(f'<rect x="{x:.0f}" y="{top:.1f}" width="40" height="{share * unit:.1f}" fill="{colour}"/>')
    if not any(shares):
        parts.append(f'<rect x="{x:.0f}" y="{floor - 3:.0f}" width="40" height="3" fill="none" stroke="#bbb"/>')
    if shares[0]:
        length, turn = 34 * shares[0], math.radians(angle)
        foot_x, foot_y = x + 56, floor - 2
        tip_x, tip_y = foot_x + length * math.sin(turn), foot_y - length * math.cos(turn)
        parts.append(f'<path d="M{foot_x:.1f} {foot_y:.1f}L{tip_x:.1f} {tip_y:.1f}" stroke="{OWN}" stroke-width="3"/>')
        parts.append(f'<circle cx="{tip_x:.1f}" cy="{tip_y:.1f}" r="4" fill="{OWN}"/>')
    return parts


def verdicts() -> str:
    """Six panels: where the base model has the concept of a latent, and what the measures say."""
    width, height, parts = 900, 430, []
    for index, (name, base, chat, angle, words) in enumerate(PANELS):
        left, floor = 300 * (index % 3), 130 + 195 * (index // 3)
        parts.append(text(left + 150, floor - 104, name, 14, weight="bold"))
        parts.append(f'<path d="M{left + 30} {floor}H{left + 270}" stroke="#888"/>')
        parts += stack(left + 50, floor, base, angle) + stack(left + 170, floor, chat, 0)
        parts += [text(left + 70, floor + 17, "base"), text(left + 190, floor + 17, "chat")]
        parts.append(text(left + 150, floor + 37, words))
    legend = ((OWN, "along its own direction (arrow)"), (ERROR, "left in the error"), (OTHERS, "carried by other latents"))
    for index, (colour, words) in enumerate(legend):
        x = 130 + 240 * index
        parts.append(
            f'<rect x="{x}" y="404" width="12" height="12" fill="{colour}"/>' + text(x + 18, 415, words, anchor="start")
        )
    return svg(width, height, parts)


def histogram(table: pl.DataFrame, group: str, groups: list[str], left: float, top: float, title: str) -> list[str]:
    """Stacked histogram of delta_norm by group."""
    width, height, bins = 360, 150, 25
    parts = [text(left + width / 2, top - 8, title, 13, weight="bold")]
    counts = [[0] * bins for _ in groups]
    for value, name in table.select("delta_norm", group).drop_nans().iter_rows():
        counts[groups.index(name)][min(bins - 1, int(value * bins))] += 1
    highest = max(1, *(sum(column) for column in zip(*counts, strict=True)))
    for bar in range(bins):
        y = top + height
        for name, column in zip(groups, counts, strict=True):
            h = height * column[bar] / highest
            y -= h
            if h:
                x = left + width * bar / bins
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width / bins - 1:.1f}" height="{h:.1f}" fill="{COLOURS[name]}"/>'
                )
    parts.append(f'<path d="M{left} {top + height}h{width}" stroke="#888"/>')
    parts += [text(left + width * at, top + height + 16, f"{at:g}") for at in (0, 0.1, 0.4, 0.6, 0.9, 1)]
    return [*parts, text(left + width / 2, top + height + 33, "delta_norm"), text(left - 6, top + 8, str(highest), 11, "end")]


def scatter(table: pl.DataFrame, group: str, groups: list[str], left: float, top: float) -> list[str]:
    """The two nus that rank, clipped to [-0.2, 1.5], with the default limits."""
    width, height, low, high = 360, 260, -0.2, 1.5
    rows = table.filter(pl.col("rank_sum").is_not_nan()).select(*RANKED, group).rows()
    random.Random(0).shuffle(rows)

    def place(error: float, reconstruction: float) -> tuple[float, float]:
        x, y = ((min(high, max(low, value)) - low) / (high - low) for value in (error, reconstruction))
        return left + width * x, top + height * (1 - y)

    corner_x, corner_y = place(0.2, 0.5)
    parts = [
        f'<rect x="{left}" y="{corner_y:.1f}" width="{corner_x - left:.1f}" height="{top + height - corner_y:.1f}" '
        f'fill="{COLOURS["chat_specific"]}" opacity="0.1"/>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#888"/>',
    ]
    for error, reconstruction, name in rows:
        x, y = place(error, reconstruction)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[name]}" opacity="0.75"/>')
    for at in (0, 0.5, 1, 1.5):
        x, y = place(at, at)
        parts += [text(x, top + height + 15, f"{at:g}"), text(left - 8, y + 4, f"{at:g}", anchor="end")]
    label = f'<g transform="rotate(-90 {left - 34} {top + height / 2})">'
    parts.append(f"{label}{text(left - 34, top + height / 2, title(RANKED[1]))}</g>")
    return [*parts, text(left + width / 2, top + height + 33, title(RANKED[0]))]


def comparing(folder: Path) -> list[str]:
    """The crosscoders of a directory; a coder with one decoder has no delta_norm and no nu to draw."""
    tables = {path.parent.name: pl.read_parquet(path, columns=["delta_norm"]) for path in folder.glob("*/latents.parquet")}
    return sorted((name for name, table in tables.items() if table["delta_norm"].is_not_nan().any()), reverse=True)


def pictures(folder: Path, names: list[str], group: str) -> str:
    """Histogram and scatter of each crosscoder, side by side, coloured by `group`."""
    tables = [pl.read_parquet(folder / name / "latents.parquet").filter(pl.col("n_active") > 0) for name in names]
    groups = [name for name in COLOURS if any((table[group] == name).any() for table in tables)]
    parts: list[str] = []
    for index, (name, table) in enumerate(zip(names, tables, strict=True)):
        left = 60 + 440 * index
        parts += histogram(table, group, groups, left, 40, name) + scatter(table, group, groups, left, 250)
    x = 60
    for name in groups:
        parts.append(f'<rect x="{x}" y="565" width="12" height="12" fill="{COLOURS[name]}"/>')
        parts.append(text(x + 17, 576, name.replace("_", " "), anchor="start"))
        x += 40 + 7 * len(name)  # a letter is at most about so wide
    return svg(40 + 440 * len(names), 590, parts)


def between(marker: str, content: str) -> None:
    """Replace what stands between two markers of the page."""
    page, start, end = PAGE.read_text(), f"<!-- {marker} -->", f"<!-- end of {marker} -->"
    head, rest = page.split(start)
    PAGE.write_text(f"{head}{start}\n{content.strip()}\n{end}{rest.split(end)[1]}")


def number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def truth_tables(folder: Path) -> str:
    """The rankings and the verdicts of a `truth.json` in Markdown."""
    record = json.loads((folder / "truth.json").read_text())
    planted, lines = record["settings"]["planted"], []
    lines += ["![The planted latents: delta_norm and nu, by the kind of their concept](ground-truth.svg)", ""]
    sizes = ", ".join(f"{planted[kind]} {kind.replace('_', '-')}" for kind in list(COLOURS)[:6])
    lines.append(
        f"{sizes} concepts in {planted['d_model']} dimensions, {planted['documents'] * planted['document_tokens']:,} tokens."
    )
    for name, result in record["crosscoders"].items():
        mu = "" if result["mu"] is None else f", mu {result['mu']:.3g} ({result['trials']} trainings)"
        fve = ", ".join(f"{value:.3f} {source}" for source, value in result["fve"].items())
        lines += [
            "",
            f"**{name}**: held-out L0 {result['l0']:.2f}{'' if result['l0_matched'] else ' (not matched)'}{mu}; FVE {fve}.",
        ]
        lines += ["", "| ranking | called | precision | recall | AUROC | wrong ones stand for |", "|---|---|---|---|---|---|"]
        for ranking, score in result["scores"].items():
            wrong = ", ".join(f"{n} {kind}" for kind, n in score["wrong"].items())
            numbers = " | ".join(number(score[key]) for key in ("precision", "recall", "auroc"))
            lines.append(f"| {ranking} | {score['n_called']} | {numbers} | {wrong} |")
        given = list(dict.fromkeys(verdict for row in result["verdicts"].values() for verdict in row))
        lines += ["", f"| latents of | found | {' | '.join(given)} |", "|---|---|" + "---|" * len(given)]
        for kind, row in result["verdicts"].items():
            found = result["found"].get(kind)
            cells = " | ".join(str(row.get(verdict, 0)) for verdict in given)
            lines.append(f"| {kind} | {'' if found is None else f'{found:.0%}'} | {cells} |")
    return "\n".join(lines)


def run_table(folder: Path, names: list[str]) -> str:
    """Counts and controls of a run in Markdown."""
    health = {name: json.loads((folder / name / "health.json").read_text()) for name in names}
    lines = ["![The run's latents](pair-scaling.svg)", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines.append("| held-out L0 | " + " | ".join(f"{health[name]['heldout']['l0']:.1f}" for name in names) + " |")
    for key in health[names[0]]["counts"]:
        lines.append(f"| {key} | " + " | ".join(f"{health[name]['counts'][key]:,}" for name in names) + " |")
    for key, value in health[names[0]]["controls"].items():
        if isinstance(value, float):
            lines.append(f"| {key} | " + " | ".join(f"{health[name]['controls'][key]:.3f}" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, help="a finished `crossdiff truth` directory")
    parser.add_argument("--run", type=Path, help="a finished run directory")
    args = parser.parse_args()
    (DOCS / "verdicts.svg").write_text(verdicts())
    for folder, picture, group, marker, table in (
        (args.truth, "ground-truth.svg", "kind", "ground truth", lambda folder, names: truth_tables(folder)),
        (args.run, "pair-scaling.svg", "verdict", "embedded pair", run_table),
    ):
        if folder is not None:
            names = comparing(folder)
            (DOCS / picture).write_text(pictures(folder, names, group))
            between(marker, table(folder, names))


if __name__ == "__main__":
    main()
