"""The command line. Options are generated from the settings in `config.py`; heavy imports wait for the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from crossdiff.cli import dashboard, hub, stages, tools
from crossdiff.errors import UserError
from crossdiff.memory import keep_freed_memory
from crossdiff.ranks import leads

EXIT_USER, EXIT_BUG, EXIT_INTERRUPTED = 2, 1, 130
TOOLS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "plan": (stages.plan, "estimate a harvest's tokens, disk, memory and time from a short measurement"),
    "steer": (tools.steer, "generate with a latent added or ablated, beside the unsteered text"),
    "interpret": (tools.interpret, "explain latents with a language model, and score the explanations"),
    "truth": (tools.truth, "plant known concepts and see which measure finds the chat model's own"),
    "null": (tools.null, "set a run's verdicts beside those of a null run: `crossdiff null RUN --null NULL_RUN`"),
    "seeds": (tools.seeds, "compare trainings from several seeds: `crossdiff seeds RUN NAME NAME ...`"),
    "store": (tools.store, "check an activation store: `crossdiff store verify PATH`"),
    "import": (tools.import_published, "read a crosscoder or SAE that others have published: `crossdiff import PATH FOLDER`"),
    "examples": (tools.examples, "carry example databases to and from the published layout"),
    "dashboard": (dashboard.dashboard, "explore runs in the browser: `crossdiff dashboard RUN [RUN ...]`"),
    "export": (dashboard.export, "write latents as one page: `crossdiff export RUN --latents 3 17 -o page.html`"),
    "push": (hub.push, "publish a run on the Hub with a model card: `crossdiff push RUN OWNER/NAME`"),
    "pull": (hub.pull, "fetch a published run: `crossdiff pull OWNER/NAME`"),
    "clean": (tools.clean, "delete replaced results and unfinished work"),
}


def _usage() -> str:
    lines = ["usage: crossdiff COMMAND [RUN_DIRECTORY] [--help] ...", "", "What did fine-tuning change inside this model?", ""]
    commands = stages.STAGES | {name: text for name, (_, text) in TOOLS.items()}
    lines += [f"  {name:<10}{text}" for name, text in commands.items()]
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
    if command in stages.STAGES:
        stages.stage(command, rest)
    elif command in TOOLS:
        if leads():  # the stages alone are shared
            TOOLS[command][0](rest)
    else:
        raise UserError(f"there is no command {command!r}; there are {', '.join([*stages.STAGES, *TOOLS])}")


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
