"""Subcommands, and options from settings: every setting of a config is an option and a key of the YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

import yaml

from crossdiff.config import Config, DatasetConfig, merge
from crossdiff.errors import UserError
from crossdiff.yaml_files import parse_yaml, read_yaml

FLAGS = {"-h", "--help", "--force", "--debug"}
HELP_COLUMN = 40
"""Where the help texts start."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves room for the dotted keys of the settings."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_COLUMN)


class Parser(argparse.ArgumentParser):
    """A wrong option is a user error like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


class Commands:
    """The subcommands of a command line; each is a parser with the work that it leads to.

    Attributes:
        argv: the words after the command; some options depend on them.
    """

    def __init__(self, parser: Parser, argv: Sequence[str]) -> None:
        self.command, self.argv = argv[0] if argv else "", argv[1:]
        self.names: list[str] = []
        self.shared: list[str] = []
        self._subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", prog="crossdiff")
        self._common = Parser(add_help=False)
        self._common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add(
        self,
        name: str,
        summary: str,
        work: Callable[[argparse.Namespace], None],
        shared: bool = False,
        abbreviations: bool = True,
    ) -> Parser:
        """Add a command.

        Args:
            shared: every process that torchrun starts runs it; the others are run by the first process only.
            abbreviations: its options may be abbreviated.
        """
        self.names.append(name)
        if shared:
            self.shared.append(name)
        description = summary[0].upper() + summary[1:] + "."
        parser: Parser = self._subparsers.add_parser(
            name,
            help=summary,
            description=description,
            allow_abbrev=abbreviations,
            parents=[self._common],
            formatter_class=HelpFormatter,
        )
        parser.set_defaults(work=work)
        return parser


class _Setting(NamedTuple):
    """A setting under its dotted key, with its present value."""

    key: str
    description: str
    value: Any
    annotation: Any
    choices: tuple[str, ...]


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values that a setting can take, where they are listed."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _kinds(annotation: Any) -> tuple[str, ...]:
    """The kinds of a tagged union."""
    members = [member for member in get_args(annotation) if "kind" in getattr(member, "model_fields", {})]
    return tuple(kind for member in members for kind in _choices(member.model_fields["kind"].annotation))


def _settings(config: Config, prefix: str = "", kinds: tuple[str, ...] = ()) -> Iterator[_Setting]:
    """Every setting, down through sections and named crosscoders."""
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, Config):
            yield from _settings(value, f"{key}.", _kinds(field.annotation))
        elif _is_named(value):
            for entry, inner in value.items():
                yield from _settings(inner, f"{key}.{entry}.")
        else:
            choices = kinds if name == "kind" and kinds else _choices(field.annotation)
            text = field.description or (f"kind of {prefix.split('.')[-2]}" if name == "kind" else name.replace("_", " "))
            yield _Setting(key, text, value, field.annotation, choices)


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(inner, Config) for inner in value.values())


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(getattr(item, "path", item)) for item in value) or "none"
    return "unset" if value is None else str(value)


def add_settings(parser: Parser, config: Config, title: str = "settings (each is also a key of the YAML file)") -> None:
    """Add an option for every setting, with its present value in the help.

    The settings of named crosscoders are accepted under each name, and listed once.
    """
    parser.usage = f"{' '.join(parser.format_usage().split()).removeprefix('usage: ')} [--SETTING VALUE ...]"
    group = parser.add_argument_group(title)
    named = {name: value for name, value in config if _is_named(value)}
    for setting in _settings(config):
        section, _, rest = setting.key.partition(".")
        _add(group, setting, _show(setting.value), hidden=section in named and bool(rest))
    for section, entries in named.items():
        listed = parser.add_argument_group(f"settings of each crosscoder; <NAME> is one of {', '.join(entries)}")
        for setting, value in _by_name(section, entries):
            _add(listed, setting, value)


def _by_name(section: str, entries: dict[str, Config]) -> Iterator[tuple[_Setting, str]]:
    """Each setting once, with its value in every entry that has it."""
    found: dict[str, dict[str, _Setting]] = {}
    for name, entry in entries.items():
        for setting in _settings(entry):
            found.setdefault(setting.key, {})[name] = setting
    for key, by_name in found.items():
        values = {name: _show(setting.value) for name, setting in by_name.items()}
        is_same = len(by_name) == len(entries) and len(set(values.values())) == 1
        shown = next(iter(values.values())) if is_same else ", ".join(f"{name}: {value}" for name, value in values.items())
        yield next(iter(by_name.values()))._replace(key=f"{section}.<NAME>.{key}"), shown


def _add(group: Any, setting: _Setting, value: str, hidden: bool = False) -> None:
    many: dict[str, Any] = {"nargs": "+"} if _is_list(setting.annotation) else {}
    text = argparse.SUPPRESS if hidden else f"{setting.description} [{value}]".replace("%", "%%")
    metavar = f"{{{','.join(map(str, setting.choices))}}}" if setting.choices else "VALUE"
    group.add_argument(
        f"--{setting.key}",
        dest=f"{_reading(setting.annotation)}:{setting.key}",
        metavar=metavar,
        help=text,
        default=argparse.SUPPRESS,
        **many,
    )


def _is_list(annotation: Any) -> bool:
    """Whether a setting has several values, each a word of its own on the command line."""
    return get_origin(annotation) in (tuple, dict) or (
        get_origin(annotation) in (Union, UnionType) and any(map(_is_list, get_args(annotation)))
    )


def _reading(annotation: Any) -> str:
    """How values given as words become those of a setting: the name of a function of `READINGS`.

    Texts are taken as they are: read as YAML, a question with a colon would be a mapping.
    """
    members = [member for member in get_args(annotation) if member is not Ellipsis]
    if get_origin(annotation) is dict:
        return "named" if members[1] is str else "yaml"
    if get_origin(annotation) in (tuple, Annotated):
        return _reading(members[0])
    if get_origin(annotation) in (Union, UnionType):
        return "optional" if {_reading(member) for member in members if member is not NoneType} == {"text"} else "yaml"
    if isinstance(annotation, type) and issubclass(annotation, DatasetConfig):
        return "dataset"
    return "text" if annotation is str else "yaml"


def _parse_value(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"--{key}: {text!r} cannot be read as a value") from None


def _parse_named(key: str, text: str) -> dict[str, Any]:
    """A mapping as YAML, or one entry of it as NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not text.startswith("{") and name and equals and value:
        return {name: value}
    found = _parse_value(key, text)
    if not isinstance(found, dict):
        raise UserError(f"--{key}: {text!r} is not of the form NAME=VALUE")
    return found


READINGS: dict[str, Callable[[str, str], Any]] = {
    "text": lambda key, text: text,
    "optional": lambda key, text: None if text == "null" else text,
    "dataset": lambda key, text: _parse_value(key, text) if text.startswith("{") and text.endswith("}") else text,
    "named": _parse_named,
    "yaml": _parse_value,
}
"""Functions from a setting's key and a word of the command line to the value."""


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, as a nested mapping."""
    changes: dict[str, Any] = {}
    for name, value in vars(args).items():
        kind, _, key = name.partition(":")
        if not key:
            continue
        if "<NAME>" in key:
            raise UserError(f"--{key}: put the name of a crosscoder in place of <NAME>")
        read = READINGS[kind]
        parsed = [read(key, item) for item in value] if isinstance(value, list) else read(key, value)
        if kind == "named":
            parsed = _joined(key, parsed)
        *sections, last = key.split(".")
        nested: dict[str, Any] = {last: parsed}
        for section in reversed(sections):
            nested = {section: nested}
        changes = merge(changes, nested)
    return changes


def _joined(key: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One mapping from those of several words, in their order."""
    names = [name for part in parts for name in part]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--{key}: {twice[0]!r} is given twice")
    return {name: value for part in parts for name, value in part.items()}


def scan(argv: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The run directory and the first value of each option, read before it is known which settings there are."""
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
    """Settings before those of the command line: --config, else the run's own, else those of the embedded pair."""
    directory, options = scan(argv)
    if "config" in options:
        return read_yaml(Path(options["config"])), options["config"]
    if directory is not None and (Path(directory) / "config.yaml").exists():
        path = Path(directory) / "config.yaml"
        return read_yaml(path), str(path)
    first = options["models"].partition("=")[2] if "models" in options else options.get("base", "demo:")
    if not first.startswith("demo:"):
        return {}, "the command line"
    from crossdiff.pairs import CONFIG

    return read_yaml(CONFIG), "the embedded pair's run.yaml"
