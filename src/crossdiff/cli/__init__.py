"""The command line. Heavy imports wait until a command is known."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from crossdiff.cli import analysis_commands, run_commands, sharing_commands
from crossdiff.cli.options import Commands, HelpFormatter, Parser
from crossdiff.errors import UserError
from crossdiff.files import explaining_disk_errors
from crossdiff.memory import keep_freed_memory
from crossdiff.ranks import leads, leave

EXIT_USER, EXIT_BUG, EXIT_INTERRUPTED = 2, 1, 130
EPILOG = """\
Without options, `crossdiff run` diffs the embedded pair into runs/demo. Your own models:
  crossdiff run --base ORG/MODEL --chat ORG/MODEL --layer L --dataset docs.jsonl chats.jsonl
"""


def command_line(argv: Sequence[str]) -> tuple[Parser, Commands]:
    """The parser of a command line, and its commands."""
    parser = Parser(
        prog="crossdiff", description="What did fine-tuning change inside this model?", epilog=EPILOG,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    commands = Commands(parser, argv)
    for room in (run_commands, analysis_commands, sharing_commands):
        room.add(commands)
    return parser, commands


def run_command(argv: Sequence[str]) -> None:
    """Run one command line."""
    if argv and argv[0] == "--version":
        from crossdiff import __version__

        print(__version__)
        return
    parser, commands = command_line(argv)
    if not argv or argv[0] == "help":
        parser.print_help()
    elif not argv[0].startswith("-") and argv[0] not in commands.names:
        raise UserError(f"there is no command {argv[0]!r}; there are {', '.join(commands.names)}")
    elif argv[0] in commands.shared or leads():
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `crossdiff {argv[0]} --help`")
        with explaining_disk_errors(_folder_of(args)):
            args.work(args)


def _folder_of(args: Namespace) -> Path:
    """The folder that a command works in, for messages about its disk."""
    found = next((value for key in ("output", "target", "directory", "run") if (value := getattr(args, key, None))), ".")
    return Path(found)


def main() -> None:
    """Entry point: one line for a user error, no traceback unless `--debug`."""
    argv = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks is no reason to stop
    if "--debug" not in argv:
        _silence_libraries()
    try:
        run_command(argv)
    except (UserError, KeyboardInterrupt, Exception) as error:
        if "--debug" in argv:
            raise
        message, status = _explained(error)
        print(message, file=sys.stderr)
        sys.exit(status)
    leave()


def _silence_libraries() -> None:
    """Keep the warnings of libraries off the terminal: what matters in them is read and said in our words. Ours are shown."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"crossdiff\.")


def _explained(error: BaseException) -> tuple[str, int]:
    """What is printed about an error, and the exit status."""
    if isinstance(error, UserError):
        return f"crossdiff: {error}", EXIT_USER
    if isinstance(error, KeyboardInterrupt):
        return "\ncrossdiff: interrupted; finished work is kept, and the same command resumes from there", EXIT_INTERRUPTED
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by its name, since the command line starts without torch
        found = ". ".join(str(error).split(". ")[:2])
        return (
            f"crossdiff: {found}. The device has too little memory for this: lower the batch_tokens of the stage, or the "
            "batch_size or n_latents of the training, take fewer crosscoders at a time with --only, or give --device cpu"
        ), EXIT_USER
    return f"crossdiff: unexpected {type(error).__name__}: {error}; run again with --debug for details", EXIT_BUG
