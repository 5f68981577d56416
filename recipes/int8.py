"""Measures what int8 activations cost a crosscoder: trains on a float32 and an int8 store of the embedded pair.

    python recipes/int8.py [RUNS] [--documents 400] [--epochs 4] [--latents 2048]

The two runs, RUNS/float32 and RUNS/int8, are harvested and trained with the same settings and seed. Prints a Markdown table of
the fraction of variance explained (FVE) on the held-out tokens of the float32 store, and how much int8 loses (goal: at most
0.005).
"""

import argparse
from pathlib import Path

from rich.console import Console

from crossdiff.config import BatchTopKConfig, CrosscoderConfig, DatasetConfig, HarvestConfig, RunConfig
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.run import Run
from crossdiff.stages.pipeline import run_until
from crossdiff.stages.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/int8"))
    parser.add_argument(
        "--documents", type=int, default=400, help="number of plain texts; twice as many conversations are used"
    )
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--latents", type=int, default=2048)
    args = parser.parse_args()
    texts = (
        DatasetConfig(path="demo:plain", max_documents=args.documents, heldout_share=0.2),
        DatasetConfig(path="demo:chat_train", max_documents=2 * args.documents, heldout_share=0.2),
    )
    coder = CrosscoderConfig(sparsity=BatchTopKConfig(k=32), n_latents=args.latents, epochs=args.epochs)
    sessions = {}
    for dtype in ("float32", "int8"):
        harvest = HarvestConfig(dtype=dtype, batch_tokens=1024)
        config = RunConfig(layer=5, dataset=texts, harvest=harvest, crosscoders={"batchtopk": coder})
        sessions[dtype] = Session(Run.open(args.runs / dtype, create=True), config, Console())
        run_until(sessions[dtype], "train")
    exact = sessions["float32"].store()
    print("| store | bytes | " + " | ".join(f"FVE {source}" for source in exact.sources) + " | FVE total | L0 |")
    print("|---|---|" + "---|" * (len(exact.sources) + 2))
    total = {}
    for dtype, session in sessions.items():
        crosscoder = session.crosscoder("batchtopk")
        found = health(crosscoder, heldout_sums(crosscoder, exact, "heldout", 4096))
        size = sum(shard["bytes"] for shard in session.store().manifest["shards"])
        fves = [found["fve"][source] for source in (*exact.sources, "total")]
        print(f"| {dtype} | {size:,} | " + " | ".join(f"{fve:.4f}" for fve in fves) + f" | {found['l0']:.2f} |")
        total[dtype] = found["fve"]["total"]
        session.run_directory.close()
    print(f"\nint8 loses {total['float32'] - total['int8']:.4f} FVE ({exact.rows('train').size:,} training tokens)")


if __name__ == "__main__":
    main()
