"""`crossdiff truth`: the benchmark on planted concepts, as the only stage of a run directory of its own."""

from __future__ import annotations

import shutil

from rich.console import Console

from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.integrity import intact
from crossdiff.models.loading import choose_device
from crossdiff.run import Run
from crossdiff.stages.definitions import truth_stage
from crossdiff.truth.benchmark import benchmark
from crossdiff.truth.terminal import print_truth
from crossdiff.truth.truth_config import TruthConfig


def run_truth(run: Run, config: TruthConfig, console: Console) -> None:
    """Run the benchmark unless it is done with these settings, and print its tables."""
    if run.record("harvest") is not None or (run.path / "config.yaml").exists():
        raise UserError(f"{run.path} holds a diff, not a benchmark; choose another directory")
    stage = truth_stage(config)
    if not run.is_done(stage):
        with run.working(stage) as folder:
            for left in folder.iterdir():  # by a run that was killed: the benchmark starts over
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            benchmark(folder, config, console.print, choose_device(config.device))
    print_truth(read_json(intact(run.path / "truth.json"))["crosscoders"], console)
