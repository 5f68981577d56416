"""The commands that go through the stages of a run, and `plan`, which says what they will take."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.cli.options import Commands, add_settings, changes_of, starting_config
from crossdiff.config import CrosscoderConfig, PairedConfig, RunConfig, merge, validate
from crossdiff.sources import SOURCES

if TYPE_CHECKING:
    from rich.console import Console

    from crossdiff.crosscoder.cost import Size
    from crossdiff.models.pair import Pair

STAGES = {
    "run": "run every stage: look, harvest, train, analyze, concepts, report (creates the run directory)",
    "look": "compare the models before anything is trained: what they say differently, where, and after which layer",
    "harvest": "collect the paired activations of both models (creates the run directory)",
    "train": "train the crosscoders (runs earlier stages first)",
    "compare": "train the crosscoders on the same batches and compare them",
    "analyze": "write the latent tables and example databases (runs earlier stages first)",
    "concepts": "group the latents of all trainings into concepts and see which replicate (runs earlier stages first)",
    "causal": "patch latents into the base model and measure the effect (runs earlier stages first)",
    "report": "write the page and print the summary (runs earlier stages first)",
}
CREATING = ("run", "harvest", "look")
"""The commands that start a new run; the others refuse a directory that is not a run."""
LOOK_FACTOR = 1.3
"""Duration of a look over that of both models' forward passes (benchmarks/look.py)."""
TYPICAL_ACTIVE = 64
"""Active latents per token that `plan` assumes for a kind of sparsity without a k; L1 crosscoders end near it."""


def add(commands: Commands) -> None:
    for name, summary in STAGES.items():
        _add(commands, name, summary)
    _add(commands, "plan", "estimate the tokens, disk, memory and time of a harvest and its trainings from a short measurement")


def _add(commands: Commands, name: str, summary: str) -> None:
    parser = commands.add(name, summary, plan if name == "plan" else run_stages, shared=name != "plan", abbreviations=False)
    parser.add_argument(
        "directory", nargs="?", type=Path, help="run directory [runs/demo for the embedded pair, else runs/CHAT-layer-L]"
    )
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.set_defaults(command=name, layers=[])
    if name != "plan":
        force = "harvest again even if there is a store, and even if the conversations lack one side"
        parser.add_argument("--force", action="store_true", help=force)
        parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only process these crosscoders of the run")
    if name == "harvest":
        text = "harvest several layers in one pass, each into its own run directory DIRECTORY/layer-L"
        parser.add_argument("--layers", nargs="+", type=int, metavar="LAYER", help=text)
    if name == commands.command:
        start, origin = starting_config(commands.argv)
        add_settings(parser, validate(RunConfig, start, origin))
        parser.set_defaults(start=start, origin=origin)


def _config(args: Namespace) -> RunConfig:
    changes = changes_of(args)
    start = {key: value for key, value in args.start.items() if "models" not in changes or key not in (*SOURCES, "models")}
    return validate(RunConfig, merge(start, changes), "the command line" if changes else args.origin)


def _directory(given: Path | None, config: RunConfig, layers: Sequence[int]) -> Path:
    if given is not None:
        return given
    if config.base.startswith("demo:"):
        return Path("runs/demo-layers" if layers else "runs/demo")
    layer = "middle" if config.layer is None else config.layer
    return Path("runs") / f"{Path(config.chat.rstrip('/')).name}-{'layers' if layers else f'layer-{layer}'}"


def run_stages(args: Namespace) -> None:
    """Run a command of `STAGES`."""
    config = _config(args)
    directory = _directory(args.directory, config, args.layers)

    from rich.console import Console

    from crossdiff.ranks import current
    from crossdiff.run import Run
    from crossdiff.stages.pipeline import begin, run_until
    from crossdiff.stages.session import Session

    configs = {directory / f"layer-{layer}": config.model_copy(update={"layer": layer}) for layer in args.layers}
    ranks = current()
    console = Console(quiet=not ranks.is_first)
    with ExitStack() as stack:
        sessions = []
        for path, values in (configs or {directory: config}).items():
            run = Run.open(path, ranks, create=args.command in CREATING)
            stack.callback(run.close)
            sessions.append(Session(run, values, console, args.force, tuple(args.only)))
        if configs:
            begin(sessions)
        else:
            run_until(sessions[0], args.command)


def plan(args: Namespace) -> None:
    """Print what the harvest and the trainings of these settings will take."""
    config = _config(args)

    from rich.console import Console
    from rich.markup import escape

    from crossdiff.activations.locations import open_folder
    from crossdiff.activations.plan import plan
    from crossdiff.corpus import check_texts, resolve
    from crossdiff.models.loading import choose_device
    from crossdiff.models.pair import load_pair

    console = Console(highlight=False)
    check_texts(config)
    if config.harvest.store is not None:
        open_folder(config.harvest.store).prepare()
    device, harvest = choose_device(config.device), config.harvest
    reading = (harvest.base_tokens, harvest.template_date)
    pair = load_pair(config.base, config.chat, device, *reading, config.model_dtype, config.steps)
    layer = pair.check_layer(config.layer)
    for remark in (*pair.remarks, *pair.check_max_length(config.harvest.max_length)):
        console.print(f"[yellow]{escape(remark)}[/yellow]")
    for name, coder in config.published.items():
        from crossdiff.published.in_run import read_in_run

        read_in_run(name, coder, pair.identity, pair.d_model, layer)
    found = plan(pair, layer, tuple(resolve(dataset) for dataset in config.dataset), config.harvest)
    if n_looked := min(config.look.max_tokens, found.n_tokens):
        # The harvest's rate is that of the layers up to this one.
        seconds = LOOK_FACTOR * n_looked / found.tokens_per_second * pair.n_layers / (layer + 1)
        console.print(f"first look: about {n_looked:,.0f} tokens, {seconds / 60:.1f} min")
    kept = "tokens only" if config.harvest.storage == "live" else config.harvest.dtype
    rate = f"{found.tokens_per_second:,.0f} tokens/s"
    console.print(f"harvest of layer {layer}: about {found.n_tokens:,} tokens")
    console.print(f"  disk    {found.store_bytes / 1e9:.2f} GB as {kept}")
    console.print(f"  memory  {found.memory_bytes / 1e9:.2f} GB")
    console.print(f"  time    {found.seconds / 60:.1f} min at {rate} on {pair.device}")
    for remark in found.remarks:
        console.print(f"[yellow]{escape(remark)}[/yellow]", soft_wrap=True)
    for name, crosscoder in config.trainings.items():
        if crosscoder.published is None:
            _print_training(name, crosscoder, found.n_tokens, pair, console)
        else:
            _print_analysis(name, crosscoder, found.n_tokens, config.analyze.min_active, pair, console)
    free = found.check_disk(_directory(args.directory, config, ()), config.harvest)
    console.print(f"There is room for it: {free / 1e9:.2f} GB are free")


def _print_analysis(name: str, config: CrosscoderConfig, n_tokens: int, min_active: int, pair: Pair, console: Console) -> None:
    """What the analysis of a published crosscoder, which is not trained, needs and takes."""
    from crossdiff.latents.duration import PER_ENCODING, encoding_seconds

    size = _size(config, pair, 1)
    needed = math.ceil(min_active * size.n_latents / size.active)
    console.print(f"analysis of {name}, which is published and not trained: uses all {n_tokens:,} tokens")
    console.print(
        f"  tokens  a verdict needs {min_active:,} on which the latent is active (analyze.min_active). The average latent, "
        f"active on 1 in {size.n_latents / size.active:,.0f}, needs {needed:,}; these texts are enough for latents active on 1 "
        f"in {n_tokens / min_active:,.0f}",
        soft_wrap=True,
    )
    console.print(f"  memory  {size.weight_bytes / 1e9:.2f} GB for the weights")
    minutes = encoding_seconds(size, n_tokens, pair.device) / 60
    if pair.device.type == "cpu":
        console.print(f"  time    {PER_ENCODING * minutes:.1f} min on cpu")
    else:
        console.print(f"  time    more than {minutes:.1f} min on {pair.device}: the encoding alone takes as long")


def _size(config: CrosscoderConfig, pair: Pair, batch: int) -> Size:
    from crossdiff.crosscoder.cost import Size

    n_sources = len(pair.models) if isinstance(config.inputs, PairedConfig) else 1
    return Size(pair.d_model, config.latents_for(pair.d_model), getattr(config.sparsity, "k", TYPICAL_ACTIVE), batch, n_sources)


def _print_training(name: str, config: CrosscoderConfig, n_tokens: int, pair: Pair, console: Console) -> None:
    from crossdiff.crosscoder.cost import calibrate

    size = _size(config, pair, config.batch_size)
    n_steps = round(config.epochs * n_tokens / config.batch_size)
    seconds = calibrate(size, pair.device).seconds(size)
    console.print(f"training of {name}: {n_steps:,} steps of {config.batch_size:,} tokens, {size.n_latents:,} latents")
    console.print(f"  memory  {size.memory_bytes() / 1e9:.2f} GB")
    console.print(f"  time    {n_steps * seconds / 60:.1f} min, {seconds * 1e3:.0f} ms per step on {pair.device}")
