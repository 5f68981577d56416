"""Finds the layer to diff the embedded pair at: compares crosscoders of all layers on the training conversations.

    python recipes/layer_sweep.py [RUNS] [--epochs 2]

Harvests all layers at once into RUNS/layer-L, then trains and analyses a BatchTopK crosscoder for each. Prints a Markdown table
and writes it to RUNS/sweep.md. For each layer and behaviour, the table has two AUROCs on the training conversations (tokens
before the answer): that of the best chat-specific latent, and that of the best latent in an equally large pool of shared
latents. Held-out conversations are not used. Run it again after an interruption to resume.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import polars as pl

from crossdiff.cli import run_command

CODER = "batchtopk"


def measure(folder: Path, layers: list[int]) -> pl.DataFrame:
    """Read a table with one row per layer and behaviour from the finished runs."""
    rows = []
    for layer in layers:
        run = folder / f"layer-{layer}" / CODER
        health = json.loads((run / "health.json").read_text())
        table = pl.read_parquet(run / "behaviours.parquet").filter(pl.col("question") == "before_answer")
        common = {"layer": layer, "specific": health["counts"]["chat_specific"], "rotated": health["counts"]["rotated"]}
        common |= {f"fve_{name}": health["heldout"]["fve"][name] for name in ("base", "chat")}
        for behaviour in table["behaviour"].unique().sort():
            scores = dict(table.filter(pl.col("behaviour") == behaviour).select("pool", "auroc_train").iter_rows())
            pools = {"best_specific": scores.get("chat_specific"), "best_shared": scores.get("shared")}
            rows.append(common | {"behaviour": behaviour} | pools)
    return pl.DataFrame(rows)


def markdown(table: pl.DataFrame) -> str:
    """Format the table with one row per layer. The cells of a behaviour are specific / shared."""
    behaviours = table["behaviour"].unique().sort().to_list()
    lines = ["| layer | FVE base / chat | chat_specific | rotated | " + " | ".join(behaviours) + " | mean |"]
    lines.append("|" + "---|" * (len(behaviours) + 5))
    for (layer,), rows in table.sort("layer").group_by("layer", maintain_order=True):
        first = rows.row(0, named=True)
        cells = [str(layer), f"{first['fve_base']:.3f} / {first['fve_chat']:.3f}"]
        cells += [str(first["specific"]), str(first["rotated"])]
        for behaviour in behaviours:
            scores = rows.filter(pl.col("behaviour") == behaviour).select("best_specific", "best_shared").row(0)
            cells.append(" / ".join("-" if score is None else f"{score:.2f}" for score in scores))
        means = rows.select(pl.mean("best_specific"), pl.mean("best_shared")).row(0)
        cells.append(" / ".join(f"{mean:.2f}" for mean in means))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/layers"))
    parser.add_argument("--layers", nargs="+", type=int, default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=float, default=2.0, help="number of training epochs of each crosscoder")
    args = parser.parse_args()
    run_command(["harvest", str(args.runs), "--layers", *map(str, args.layers)])
    for layer in args.layers:
        run = str(args.runs / f"layer-{layer}")
        run_command(["analyze", run, "--only", CODER, f"--crosscoders.{CODER}.epochs", str(args.epochs)])
    text = markdown(measure(args.runs, args.layers))
    (args.runs / "sweep.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
