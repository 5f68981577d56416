"""Options from settings: every setting of `config.py` is an option and a key of the YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from crossdiff.config import Config, merge, read_yaml
from crossdiff.errors import UserError

FLAGS = {"-h", "--help", "--force", "--debug"}


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
        elif isinstance(value, dict) and value and all(isinstance(inner, Config) for inner in value.values()):
            for entry, inner in value.items():
                yield from _settings(inner, f"{key}.{entry}.")
        else:
            yield _Setting(key, field.description or name.replace("_", " "), value, field.annotation)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(getattr(item, "path", item)) for item in value) or "none"
    return str(value)


def add_settings(parser: argparse.ArgumentParser, config: Config, title: str) -> None:
    """An option for every setting, with its present value in the help."""
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


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
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


class Parser(argparse.ArgumentParser):
    """A wrong option is an error of the user like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def scan(argv: Sequence[str]) -> tuple[str | None, dict[str, str]]:
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


def starting_config(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Settings before the command line's own: --config, else the run's, else those of the embedded pair."""
    directory, options = scan(argv)
    if "config" in options:
        return read_yaml(Path(options["config"])), options["config"]
    if directory is not None and (Path(directory) / "config.yaml").exists():
        path = Path(directory) / "config.yaml"
        return read_yaml(path), str(path)
    if not options.get("base", "demo:").startswith("demo:"):
        return {}, "the command line"
    from crossdiff.pairs import CONFIG

    return read_yaml(CONFIG), "the embedded pair's run.yaml"
