"""Compares two runs that should be alike, such as the same trainings with one process and with two.

    crossdiff harvest runs/one && cp -r runs/one runs/two
    crossdiff concepts runs/one --only batchtopk --crosscoders.batchtopk.seeds 2
    torchrun --nproc-per-node 2 -m crossdiff concepts runs/two --only batchtopk --crosscoders.batchtopk.seeds 2
    python benchmarks/same_training.py runs/one runs/two

Prints, for each training of both runs, how far the encoders are apart, how many latents keep their directions, the held-out FVE
and the number of latents of each verdict; the same latents compared with those of the next seed; and how many of the replicated
concepts of each run the other one has too. Latents and concepts are the same if the cosine of their directions, those of both
models in a row, is above `SAME`.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import polars as pl
import torch
from safetensors.torch import load_file

from crossdiff.crosscoder.checkpoint import load
from crossdiff.files import read_json
from crossdiff.shapes import Float, Tensor

SAME = 0.9


def in_a_row(directions: Float[Tensor, "source latent d_model"]) -> Float[Tensor, "latent d_all"]:
    """Unit vectors of the directions of all sources."""
    return torch.nn.functional.normalize(directions.float().transpose(0, 1).flatten(1), dim=1)


def found_again(mine: Float[Tensor, "latent d_all"], others: Float[Tensor, "other d_all"]) -> int:
    return int(((mine @ others.T).amax(1) > SAME).sum())


def compare_training(one: Path, two: Path, name: str) -> None:
    coders = [load(path / name) for path in (one, two)]
    directions = [in_a_row(coder.directions()) for coder in coders]
    first, second = (coder.encoder for coder in coders)
    apart = float((first - second).norm() / first.norm())
    kept = found_again(*directions) / len(directions[0])
    print(f"{name}: the encoders are {apart:.0%} apart, {kept:.0%} of the latents keep their directions")
    for path in (one, two):
        table = pl.read_parquet(path / name / "latents.parquet")
        counts = ", ".join(f"{n} {verdict}" for verdict, n in table["verdict"].value_counts().sort("verdict").iter_rows())
        fve = read_json(path / name / "health.json")["heldout"]["fve"]["total"]
        print(f"  {path}: held-out FVE {fve:.4f}; {counts}")


def compare_concepts(one: Path, two: Path) -> None:
    rows = []
    for path in (one, two):
        table = pl.read_parquet(path / "concepts" / "concepts.parquet").with_row_index()
        directions = in_a_row(load_file(path / "concepts" / "directions.safetensors")["directions"])
        rows.append((path, table.filter("replicated"), directions))
    for (path, table, directions), (_, _, others) in (rows, rows[::-1]):
        for verdict in ("any verdict", "chat_specific"):
            chosen = table if verdict == "any verdict" else table.filter(verdict=verdict)
            again = found_again(directions[chosen["index"].to_list()], others)
            print(f"{path}: {chosen.height} replicated concepts of {verdict}, {again} of them among the other run's concepts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("two", type=Path)
    args = parser.parse_args()
    names = sorted(path.parent.name for path in args.one.glob("*/latents.parquet") if (args.two / path.parent.name).is_dir())
    names = [name for name in names if load(args.one / name).n_sources > 1]
    for name in names:
        compare_training(args.one, args.two, name)
    for name, other in pairwise(names):
        mine, others = (in_a_row(load(args.one / each).directions()) for each in (name, other))
        print(
            f"two seeds, {name} and {other}: {found_again(mine, others) / len(mine):.0%} of the latents have equal directions"
        )
    compare_concepts(args.one, args.two)


if __name__ == "__main__":
    main()
