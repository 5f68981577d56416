"""Trains the crosscoders of a finished run again with other seeds, analyses them, and reports what changes.

    .venv/bin/python recipes/seeds.py runs/demo --seeds 1 2

The new crosscoders are written to the same run directory, as `NAME-seed1` and so on, and share its activations. Afterwards,
`crossdiff seeds runs/demo l1 l1-seed1 l1-seed2` prints the comparison again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from crossdiff.compare.seeds import compare_seeds, read_seeds
from crossdiff.compare.terminal import print_seeds
from crossdiff.config import RunConfig, read_yaml, validate
from crossdiff.errors import UserError
from crossdiff.run import Run
from crossdiff.stages.pipeline import run_until
from crossdiff.stages.session import Session


def with_seeds(config: RunConfig, names: list[str], seeds: list[int]) -> tuple[RunConfig, dict[str, list[str]]]:
    """Settings with a copy of each named crosscoder per seed, and the names of the copies of each crosscoder."""
    crosscoders, families = dict(config.crosscoders), {}
    for name in names:
        if name not in crosscoders:
            raise UserError(f"there is no crosscoder {name!r} in this run; there are {', '.join(config.crosscoders)}")
        copies = {f"{name}-seed{seed}": crosscoders[name].model_copy(update={"seed": seed}) for seed in seeds}
        crosscoders |= copies
        families[name] = [name, *copies]
    return config.model_copy(update={"crosscoders": crosscoders}), families


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with trained crosscoders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", help="crosscoders to repeat [all that are not repetitions themselves]")
    args = parser.parse_args()
    settings = validate(RunConfig, read_yaml(args.run / "config.yaml"), str(args.run / "config.yaml"))
    paired = [name for name, coder in settings.crosscoders.items() if coder.inputs.kind == "paired"]
    names = args.only or [name for name in paired if "-seed" not in name]
    config, families = with_seeds(settings, names, args.seeds)
    console, run = Console(), Run.open(args.run)
    try:
        wanted = tuple(name for family in families.values() for name in family)
        run_until(Session(run, config, console, only=wanted), "analyze")
    finally:
        run.close()
    for family in families.values():
        print_seeds(compare_seeds(read_seeds(args.run, family)), console)


if __name__ == "__main__":
    main()
