"""Choose the demo's layer: a short diff at every layer, compared on the training conversations only.

    python sweep.py WORK [--epochs 2] [--layers 0 1 2 3 4 5]

Each layer gets a run directory WORK/layer-L and, in WORK/sweep.json and on the screen, its quality and, for each behaviour,
the AUROC of the best latent of the chat-specific pool and of the shared pool, before the answer, on the training half.
The held-out half takes no part in the choice.
"""

import argparse
import json
from pathlib import Path

import polars as pl

from crossdiff.cli import run_command
from crossdiff.pairs import CONFIG


def summary(run: Path) -> dict:
    folder = run / "batchtopk"
    health = json.loads((folder / "health.json").read_text())
    table = pl.read_parquet(folder / "behaviours.parquet").filter(question="before_answer")
    scores = {
        pool: dict(table.filter(pool=pool).select("behaviour", "auroc_train").iter_rows())
        for pool in ("chat_specific", "shared")
    }
    counts = {key: health["counts"][key] for key in ("chat_only", "chat_specific", "chat_specific_paper", "rotated")}
    return {
        "fve": health["heldout"]["fve"],
        "dead_share": health["heldout"]["dead_share"],
        "counts": counts,
        "auroc_train": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(6)))
    args = parser.parse_args()
    results = {}
    for layer in args.layers:
        run = args.work / f"layer-{layer}"
        options = ["--layer", str(layer), "--crosscoders.batchtopk.epochs", str(args.epochs)]
        run_command(["train", str(run), "--config", str(CONFIG), "--only", "batchtopk", *options])
        run_command(["analyze", str(run), "--config", str(CONFIG), "--only", "batchtopk", *options])
        results[layer] = summary(run)
        (args.work / "sweep.json").write_text(json.dumps(results, indent=1) + "\n")
    for layer, result in results.items():
        specific, shared = result["auroc_train"]["chat_specific"], result["auroc_train"]["shared"]
        words = ", ".join(f"{name} {specific[name]:.2f} against {shared.get(name, float('nan')):.2f}" for name in specific)
        print(f"layer {layer}: FVE {result['fve']['base']:.3f} / {result['fve']['chat']:.3f}; {result['counts']}; {words}")


if __name__ == "__main__":
    main()
