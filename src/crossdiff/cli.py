"""The command line. Options are generated from the settings in `config.py`; heavy imports wait for the command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from crossdiff.config import Config, RunConfig, SteerConfig, UserError, merge, read_yaml, validate

FLAGS = {"-h", "--help", "--force", "--debug"}
EXIT_USER, EXIT_BUG, EXIT_INTERRUPTED = 2, 1, 130
STAGE_HELP = {
    "run": "go through all stages: harvest, train, analyze, report",
    "harvest": "collect the paired activations of both models",
    "train": "train the crosscoders (harvests first if needed)",
    "analyze": "make the latent tables and example databases (after what they need)",
    "report": "write the page and print the summary (after what they need)",
    "causal": "patch the latents into the base model and measure what they do (after what they need)",
}


class _Setting(NamedTuple):
    """A setting under its dotted key, as it stands."""

    key: str
    description: str
    value: Any
    annotation: Any


def _settings(config: Config, prefix: str = "") -> Iterator[_Setting]:
    """Every setting, down through sections and named crosscoders."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        key = f"{prefix}{name}"
        if isinstance(value, Config):
            yield from _settings(value, f"{key}.")
        elif isinstance(value, dict):
            for entry, inner in value.items():
                yield from _settings(inner, f"{key}.{entry}.")
        else:
            yield _Setting(key, field.description or name.replace("_", " "), value, field.annotation)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(getattr(item, "path", item)) for item in value) or "none"
    return str(value)


def _add_settings(parser: argparse.ArgumentParser, config: Config, title: str) -> None:
    group = parser.add_argument_group(title)
    for key, description, value, annotation in _settings(config):
        many: dict[str, Any] = {"nargs": "+"} if isinstance(value, tuple) else {}
        text = f"{description} [{_show(value)}]".replace("%", "%%")
        # A list of texts is taken as it is: read as YAML, a question with a colon would be a mapping.
        prefix = "text:" if annotation == tuple[str, ...] else "set:"
        group.add_argument(f"--{key}", dest=prefix + key, metavar="VALUE", help=text, default=argparse.SUPPRESS, **many)


def _parse_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--{key}: {text!r} cannot be read as a value") from None


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, as a nested mapping."""
    changes: dict[str, Any] = {}
    for name, value in vars(args).items():
        kind, _, key = name.partition(":")
        if not key:
            continue
        if kind == "text":
            parsed = value
        else:
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


def _directory(given: Path | None, config: RunConfig) -> Path:
    if given is not None:
        return given
    if config.base.startswith("demo:"):
        return Path("runs/demo")
    layer = "middle" if config.layer is None else config.layer
    return Path("runs") / f"{Path(config.chat.rstrip('/')).name}-layer-{layer}"


def _stage(command: str, argv: Sequence[str]) -> None:
    start, origin = _starting_config(argv)
    defaults = validate(RunConfig, start, origin)
    parser = _Parser(prog=f"crossdiff {command}", description=STAGE_HELP[command], allow_abbrev=False)
    parser.add_argument("directory", nargs="?", type=Path, help="run directory [runs/demo for the embedded pair]")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument("--force", action="store_true", help="harvest again although there is a store")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="work on these crosscoders of the run alone")
    _add_settings(parser, defaults, "settings (each is also a key of the YAML file)")
    args = parser.parse_args(argv)
    config = validate(RunConfig, merge(start, _changes(args)), "the command line" if _changes(args) else origin)
    directory = _directory(args.directory, config)

    from rich.console import Console

    from crossdiff.causal_pipeline import CausalPipeline
    from crossdiff.pipeline import explain_disk_error
    from crossdiff.run import Run

    run = Run.open(directory)
    try:
        pipeline = CausalPipeline(run, config, Console(), args.force, tuple(args.only))
        if command == "causal":
            pipeline.causal_tests()
        else:
            pipeline.go("report" if command == "run" else command)
    except OSError as error:
        if (explained := explain_disk_error(error, directory)) is None:
            raise
        raise explained from error
    finally:
        run.close()


def _steer(argv: Sequence[str]) -> None:
    parser = _Parser(prog="crossdiff steer", description=OTHERS["steer"][1], allow_abbrev=False)
    parser.add_argument("directory", type=Path, help="run directory with an analysed crosscoder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_settings(parser, SteerConfig(), "settings")
    args = parser.parse_args(argv)
    config = validate(SteerConfig, _changes(args), "the command line")
    path = args.directory / "config.yaml"
    if not path.exists():
        raise UserError(f"{args.directory} is no finished run: it has no config.yaml; run `crossdiff analyze` first")
    settings = validate(RunConfig, read_yaml(path), str(path))

    from rich.console import Console

    from crossdiff.causal_pipeline import CausalPipeline
    from crossdiff.run import Run

    run = Run.open(args.directory)
    try:
        CausalPipeline(run, settings, Console()).steer(config)
    finally:
        run.close()


def _clean(argv: Sequence[str]) -> None:
    parser = _Parser(prog="crossdiff clean", description="delete replaced results and unfinished work of a run")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--debug", action="store_true")
    directory = parser.parse_args(argv).directory
    if not (directory / "manifest.json").exists():
        raise UserError(f"{directory} is no run directory: it has no manifest.json")
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


OTHERS = {
    "steer": (_steer, "generate with a latent added or ablated, beside the unsteered text"),
    "clean": (_clean, "delete replaced results and unfinished work"),
    "store": (_store, "check an activation store: `crossdiff store verify PATH`"),
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
