"""The commands that go through the stages of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from crossdiff.cli.options import Parser, add_settings, changes_of, starting_config
from crossdiff.config import RunConfig, merge, validate

STAGES = {
    "run": "go through all stages: harvest, train, analyze, report",
    "harvest": "collect the paired activations of both models",
    "train": "train the crosscoders (harvests first if needed)",
    "compare": "train the crosscoders on the same batches and put them side by side",
    "analyze": "make the latent tables and example databases (after what they need)",
    "causal": "patch the latents into the base model and measure what they do (after what they need)",
    "report": "write the page and print the summary (after what they need)",
}


def _directory(given: Path | None, config: RunConfig, layers: Sequence[int]) -> Path:
    if given is not None:
        return given
    if config.base.startswith("demo:"):
        return Path("runs/demo-layers" if layers else "runs/demo")
    layer = "middle" if config.layer is None else config.layer
    return Path("runs") / f"{Path(config.chat.rstrip('/')).name}-{'layers' if layers else f'layer-{layer}'}"


def _parse(command: str, argv: Sequence[str], text: str) -> tuple[argparse.Namespace, RunConfig, Path]:
    """The options of a command that takes settings, the settings, and the run directory."""
    start, origin = starting_config(argv)
    defaults = validate(RunConfig, start, origin)
    parser = Parser(prog=f"crossdiff {command}", description=text, allow_abbrev=False)
    parser.add_argument("directory", nargs="?", type=Path, help="run directory [runs/demo for the embedded pair]")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if command in STAGES:
        parser.add_argument("--force", action="store_true", help="harvest again although there is a store")
        parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="work on these crosscoders of the run alone")
    parser.set_defaults(layers=[])
    if command == "harvest":
        layers = "several layers in one pass, each into a run directory of its own: DIRECTORY/layer-L"
        parser.add_argument("--layers", nargs="+", type=int, metavar="LAYER", help=layers)
    add_settings(parser, defaults, "settings (each is also a key of the YAML file)")
    args = parser.parse_args(argv)
    changes = changes_of(args)
    config = validate(RunConfig, merge(start, changes), "the command line" if changes else origin)
    return args, config, _directory(args.directory, config, args.layers)


def stage(command: str, argv: Sequence[str]) -> None:
    """Run a command of `STAGES`."""
    args, config, directory = _parse(command, argv, STAGES[command])

    from rich.console import Console

    from crossdiff.causal_pipeline import CausalPipeline
    from crossdiff.files import explain_disk_error
    from crossdiff.pipeline import harvest_layers
    from crossdiff.ranks import current
    from crossdiff.run import Run

    settings = {directory / f"layer-{layer}": config.model_copy(update={"layer": layer}) for layer in args.layers}
    ranks = current()
    console = Console(quiet=not ranks.is_first)
    with ExitStack() as stack:
        pipelines = []
        for path, values in (settings or {directory: config}).items():
            run = Run.open(path, ranks)
            stack.callback(run.close)
            pipelines.append(CausalPipeline(run, values, console, args.force, tuple(args.only)))
        try:
            if settings:
                for pipeline in pipelines:
                    pipeline.begin()
                harvest_layers(pipelines)
            elif command == "causal":
                pipelines[0].causal_tests()
            else:
                pipelines[0].go("report" if command == "run" else command)
        except OSError as error:
            if (explained := explain_disk_error(error, directory)) is None:
                raise
            raise explained from error


def plan(argv: Sequence[str]) -> None:
    """Estimate a harvest before it is begun."""
    _, config, directory = _parse("plan", argv, "estimate a harvest's tokens, disk, memory and time")

    from rich.console import Console

    from crossdiff.corpus import print_plan

    print_plan(config, directory, Console())
