"""The command line. Options are generated from the settings in `config.py`; heavy imports wait for the command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import yaml

from crossdiff.config import Config, RunConfig, UserError, merge, read_yaml, validate
from crossdiff.memory import keep_freed_memory

FLAGS = {"-h", "--help", "--force", "--debug"}
EXIT_USER, EXIT_BUG, EXIT_INTERRUPTED = 2, 1, 130
STAGE_HELP = {
    "run": "go through all stages: harvest, train, analyze, report",
    "harvest": "collect the paired activations of both models",
    "train": "train the crosscoders (harvests first if needed)",
    "compare": "train the crosscoders on the same batches and put them side by side",
    "analyze": "make the latent tables and example databases (after what they need)",
    "report": "write the page and print the summary (after what they need)",
}


def _settings(config: Config, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every setting as (dotted key, description, present value), down through sections and named crosscoders."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        key = f"{prefix}{name}"
        if isinstance(value, Config):
            yield from _settings(value, f"{key}.")
        elif isinstance(value, dict) and value and all(isinstance(inner, Config) for inner in value.values()):
            for entry, inner in value.items():
                yield from _settings(inner, f"{key}.{entry}.")
        else:
            yield key, field.description or name.replace("_", " "), value


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(getattr(item, "path", item)) for item in value) or "none"
    return str(value)


def _add_settings(parser: argparse.ArgumentParser, config: Config) -> None:
    group = parser.add_argument_group("settings (each is also a key of the YAML file)")
    for key, description, value in _settings(config):
        many: dict[str, Any] = {"nargs": "+"} if isinstance(value, tuple) else {}
        text = f"{description} [{_show(value)}]".replace("%", "%%")
        group.add_argument(f"--{key}", dest=f"set:{key}", metavar="VALUE", help=text, default=argparse.SUPPRESS, **many)


def _parse_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--{key}: {text!r} cannot be read as a value") from None


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, as a nested mapping."""
    changes: dict[str, Any] = {}
    for name, value in vars(args).items():
        if not name.startswith("set:"):
            continue
        key = name.removeprefix("set:")
        parsed = [_parse_value(key, item) for item in value] if isinstance(value, list) else _parse_value(key, value)
        *sections, last = key.split(".")
        nested: dict[str, Any] = {last: parsed}
        for section in reversed(sections):
            nested = {section: nested}
        changes = merge(changes, nested)
    return changes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _scan(argv: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The run directory and the options' first values, read before it is known which settings there are."""
    directory, options = None, {}
    words = iter(argv)
    for word in words:
        name, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("-"):
            directory = directory or word
        elif word not in FLAGS:
            options[name] = value if given else next(words, "")
    return directory, options


def _starting_config(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Settings before the command line's own: --config, else the run's, else those of the embedded pair."""
    directory, options = _scan(argv)
    if "config" in options:
        return read_yaml(Path(options["config"])), options["config"]
    if directory is not None and (Path(directory) / "config.yaml").exists():
        path = Path(directory) / "config.yaml"
        return read_yaml(path), str(path)
    if not options.get("base", "demo:").startswith("demo:"):
        return {}, "the command line"
    from crossdiff.pairs import CONFIG

    return read_yaml(CONFIG), "the embedded pair's run.yaml"


def _directory(given: Path | None, config: RunConfig, layers: Sequence[int]) -> Path:
    if given is not None:
        return given
    if config.base.startswith("demo:"):
        return Path("runs/demo-layers" if layers else "runs/demo")
    layer = "middle" if config.layer is None else config.layer
    return Path("runs") / f"{Path(config.chat.rstrip('/')).name}-{'layers' if layers else f'layer-{layer}'}"


def _parse(command: str, argv: Sequence[str], text: str) -> tuple[argparse.Namespace, RunConfig, Path]:
    """The options of a command that takes settings, the settings, and the run directory."""
    start, origin = _starting_config(argv)
    defaults = validate(RunConfig, start, origin)
    parser = _Parser(prog=f"crossdiff {command}", description=text, allow_abbrev=False)
    parser.add_argument("directory", nargs="?", type=Path, help="run directory [runs/demo for the embedded pair]")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if command in STAGE_HELP:
        parser.add_argument("--force", action="store_true", help="harvest again although there is a store")
        parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="work on these crosscoders of the run alone")
    parser.set_defaults(layers=[])
    if command == "harvest":
        layers = "several layers in one pass, each into a run directory of its own: DIRECTORY/layer-L"
        parser.add_argument("--layers", nargs="+", type=int, metavar="LAYER", help=layers)
    _add_settings(parser, defaults)
    args = parser.parse_args(argv)
    config = validate(RunConfig, merge(start, _changes(args)), "the command line" if _changes(args) else origin)
    return args, config, _directory(args.directory, config, args.layers)


def _stage(command: str, argv: Sequence[str]) -> None:
    args, config, directory = _parse(command, argv, STAGE_HELP[command])

    from rich.console import Console

    from crossdiff.pipeline import Pipeline, explain_disk_error, harvest_layers
    from crossdiff.run import Run

    settings = {directory / f"layer-{layer}": config.model_copy(update={"layer": layer}) for layer in args.layers}
    with ExitStack() as stack:
        pipelines = []
        for path, values in (settings or {directory: config}).items():
            run = Run.open(path)
            stack.callback(run.close)
            pipelines.append(Pipeline(run, values, Console(), args.force, tuple(args.only)))
        try:
            if settings:
                for pipeline in pipelines:
                    pipeline.begin()
                harvest_layers(pipelines)
            else:
                pipelines[0].go("report" if command == "run" else command)
        except OSError as error:
            if (explained := explain_disk_error(error, directory)) is None:
                raise
            raise explained from error


def _plan(argv: Sequence[str]) -> None:
    _, config, directory = _parse("plan", argv, OTHERS["plan"][1])

    from rich.console import Console

    from crossdiff.pipeline import print_plan

    print_plan(config, directory, Console())


def _truth(argv: Sequence[str]) -> None:
    from crossdiff.truth.settings import TruthConfig

    _, options = _scan(argv)
    start, origin = (read_yaml(Path(options["config"])), options["config"]) if "config" in options else ({}, "the defaults")
    defaults = validate(TruthConfig, start, origin)
    description = "plant concepts whose place is known, train crosscoders on them, and compare what is found with the truth"
    parser = _Parser(prog="crossdiff truth", description=description, allow_abbrev=False)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/truth"), help="where it goes [runs/truth]")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_settings(parser, defaults)
    args = parser.parse_args(argv)
    changes = _changes(args)
    values = merge(defaults.model_dump(), changes) if changes else start
    config = validate(TruthConfig, values, "the command line" if changes else origin)

    from rich.console import Console

    from crossdiff.run import Run
    from crossdiff.truth.report import run_truth

    run = Run.open(args.directory)
    try:
        run_truth(run, config, Console())
    finally:
        run.close()


def _run_directory(path: Path) -> Path:
    if not (path / "manifest.json").exists():
        raise UserError(f"{path} is no run directory: it has no manifest.json")
    return path


def _null(argv: Sequence[str]) -> None:
    parser = _Parser(prog="crossdiff null", description="compare a run's verdicts with those of a null run")
    parser.add_argument("directory", type=Path, help="run directory of the diff")
    parser.add_argument("--null", type=Path, required=True, help="run directory of the base model and a null model")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    from crossdiff.latents.null import compare
    from crossdiff.latents.printing import print_null

    print_null(compare(_run_directory(args.directory), _run_directory(args.null)))


def _seeds(argv: Sequence[str]) -> None:
    parser = _Parser(prog="crossdiff seeds", description="compare trainings of one crosscoder from several seeds")
    parser.add_argument("directory", type=Path, help="run directory")
    parser.add_argument("names", nargs="+", metavar="NAME", help="crosscoders of the run, such as l1 l1-seed1 l1-seed2")
    parser.add_argument("--cosine", type=float, default=0.9, help="cosine above which two latents are the same [0.9]")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    from crossdiff.latents.printing import print_seeds
    from crossdiff.latents.seeds import compare_seeds, read_seeds

    print_seeds(compare_seeds(read_seeds(_run_directory(args.directory), args.names), args.cosine))


def _clean(argv: Sequence[str]) -> None:
    parser = _Parser(prog="crossdiff clean", description="delete replaced results and unfinished work of a run")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--debug", action="store_true")
    directory = _run_directory(parser.parse_args(argv).directory)
    from crossdiff.run import Run

    run = Run.open(directory)
    try:
        print(f"{run.clean() / 1e6:.1f} MB freed")
    finally:
        run.close()


def _store(argv: Sequence[str]) -> None:
    parser = _Parser(prog="crossdiff store", description="check an activation store")
    parser.add_argument("action", choices=["verify"], help="verify: read everything and compare the checksums")
    parser.add_argument("path", type=Path, help="the store, such as runs/demo/activations")
    parser.add_argument("--debug", action="store_true")
    path = parser.parse_args(argv).path
    if not (path / "manifest.json").exists():
        raise UserError(f"{path} is no activation store: it has no manifest.json")
    from crossdiff.activations.store import verify

    problems = verify(path)
    if problems:
        raise UserError(
            f"{path} is damaged:\n  " + "\n  ".join(problems) + "\nRestore these files, or harvest again with --force"
        )
    print(f"{path} is whole")


def _examples(argv: Sequence[str]) -> None:
    description = "carry example databases to and from the layout of the published examples.db"
    parser = _Parser(prog="crossdiff examples", description=description)
    parser.add_argument("action", choices=["export", "import"])
    parser.add_argument("source", type=Path, help="export: the examples.sqlite of a crosscoder; import: an examples.db")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--tokenizer", help="import: the model whose tokenizer made the tokens, a Hub name or folder")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    from crossdiff.latents.published_examples import export_examples, import_examples
    from crossdiff.models.pair import load_tokenizer

    if args.action == "export":
        n_examples = export_examples(args.source, args.target)
    elif args.tokenizer is None:
        raise UserError("an import needs the tokens as text: name the model with --tokenizer")
    else:
        n_examples = import_examples(args.source, args.target, load_tokenizer(args.tokenizer))
    print(f"{n_examples} examples written to {args.target}")


OTHERS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "plan": (_plan, "estimate a harvest's tokens, disk, memory and time from a short measurement"),
    "clean": (_clean, "delete replaced results and unfinished work"),
    "truth": (_truth, "plant known concepts and see which measure finds the chat model's own"),
    "null": (_null, "set a run's verdicts beside those of a null run: `crossdiff null RUN --null NULL_RUN`"),
    "seeds": (_seeds, "compare trainings from several seeds: `crossdiff seeds RUN NAME NAME ...`"),
    "store": (_store, "check an activation store: `crossdiff store verify PATH`"),
    "examples": (_examples, "carry example databases to and from the published layout"),
}


def _usage() -> str:
    lines = ["usage: crossdiff COMMAND [RUN_DIRECTORY] [--help] ...", "", "What did fine-tuning change inside this model?", ""]
    commands = STAGE_HELP | {name: text for name, (_, text) in OTHERS.items()}
    lines += [f"  {name:<9}{text}" for name, text in commands.items()]
    lines += ["", "Without options, `crossdiff run` diffs the embedded pair into runs/demo. Your own models:"]
    lines += ["  crossdiff run --base ORG/MODEL --chat ORG/MODEL --layer L --dataset docs.jsonl chats.jsonl"]
    return "\n".join(lines)


def run_command(argv: Sequence[str]) -> None:
    """Run one command line.

    Raises:
        UserError: anything that the user has to change.
    """
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(_usage())
        return
    if argv[0] == "--version":
        from crossdiff import __version__

        print(__version__)
        return
    command, rest = argv[0], argv[1:]
    if command in STAGE_HELP:
        _stage(command, rest)
    elif command in OTHERS:
        OTHERS[command][0](rest)
    else:
        raise UserError(f"there is no command {command!r}; there are {', '.join([*STAGE_HELP, *OTHERS])}")


def main() -> None:
    """Entry point: one line for an error of the user, no traceback unless `--debug`."""
    argv = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    try:
        run_command(argv)
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"crossdiff: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)
    except KeyboardInterrupt:
        if "--debug" in argv:
            raise
        print("\ncrossdiff: interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            raise
        print(f"crossdiff: unexpected {type(error).__name__}: {error}; run again with --debug for details", file=sys.stderr)
        sys.exit(EXIT_BUG)
