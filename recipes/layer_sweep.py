"""Which layer to diff the embedded pair at: a crosscoder for every layer, compared on the training half of the conversations.

    python recipes/layer_sweep.py [RUNS] [--epochs 2]

One harvest of all layers into RUNS/layer-L, then a BatchTopK crosscoder and its analysis for each. Prints a Markdown table and
writes it to RUNS/sweep.md: by layer, and for each behaviour, the AUROC on the training conversations (tokens before the
answer) of the best latent of the chat-specific pool and of the best of an equally large pool of shared latents. The
held-out conversations are not looked at. Killed and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import polars as pl

from crossdiff.cli import run_command

CODER = "batchtopk"


def measure(folder: Path, layers: list[int]) -> pl.DataFrame:
    """One row a layer and behaviour, read from the finished runs."""
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
    """A row a layer; the cells of a behaviour are specific / shared."""
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
    parser.add_argument("--epochs", type=float, default=2.0, help="of each crosscoder")
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
