"""The commands on a finished run: steering, interpretation, null, seeds, checks; and the ground truth."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.cli.options import Commands, add_settings, changes_of, scan
from crossdiff.config import RunConfig, SteerConfig, merge, validate
from crossdiff.errors import UserError
from crossdiff.yaml_files import read_yaml

if TYPE_CHECKING:
    from crossdiff.stages.session import Session


def add(commands: Commands) -> None:
    parser = commands.add(
        "steer", "generate with a latent added or ablated, beside the unsteered text", steer, abbreviations=False
    )
    parser.add_argument("directory", type=Path, help="run directory with an analysed crosscoder")
    if commands.command == "steer":
        add_settings(parser, SteerConfig(), "settings")

    summary = "explain latents with a language model and score the explanations; without a server, score latents by embeddings"
    parser = commands.add("interpret", summary, interpret, abbreviations=False)
    parser.add_argument("directory", type=Path, help="run directory with an analysed crosscoder")
    parser.add_argument("--dry-run", action="store_true", help="print the calls, tokens and cost without asking the server")
    if commands.command == "interpret":
        from crossdiff.interp.interpret_config import InterpretConfig

        add_settings(parser, InterpretConfig(), "settings")

    parser = commands.add("null", "compare the verdicts of a run with those of a null run", null)
    parser.add_argument("directory", type=Path, help="run directory of the diff")
    parser.add_argument("--null", type=Path, required=True, help="run directory of the same base model and a null model")

    parser = commands.add("seeds", "compare trainings of one crosscoder from several seeds", seeds)
    parser.add_argument("directory", type=Path, help="run directory")
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="crosscoders of the run, such as l1 l1-seed1 l1-seed2 (crosscoders.l1.seeds makes them)",
    )
    parser.add_argument("--cosine", type=float, default=0.9, help="two latents are the same above this cosine [0.9]")

    summary = "plant known concepts, train on them, and check which measure recovers the chat-only ones (creates the directory)"
    parser = commands.add("truth", summary, truth, abbreviations=False)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/truth"), help="run directory [runs/truth]")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    if commands.command == "truth":
        from crossdiff.truth.truth_config import TruthConfig

        _, options = scan(commands.argv)
        given = options.get("config")
        start, origin = (read_yaml(Path(given)), given) if given is not None else ({}, "the defaults")
        defaults = validate(TruthConfig, start, origin)
        add_settings(parser, defaults)
        parser.set_defaults(start=start, origin=origin, defaults=defaults)

    parser = commands.add("store", "check an activation store", store)
    parser.add_argument("action", choices=["verify"], help="verify: read everything and compare the checksums")
    parser.add_argument("path", help="the store: a folder such as runs/demo/activations, or a URL such as s3://bucket/folder")

    parser = commands.add("verify", "check that the results of a run are what its stages wrote, by their SHA-256", verify)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/demo"), help="run directory [runs/demo]")

    parser = commands.add("clean", "list the replaced results and unfinished work of a run, and delete them", clean)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/demo"), help="run directory [runs/demo]")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    parser.add_argument("--unfinished-harvests", action="store_true", help="also delete harvests that were not finished")


def steer(args: Namespace) -> None:
    config = validate(SteerConfig, changes_of(args), "the command line")
    from crossdiff.stages.steer import steer

    with _finished_run(args.directory) as session:
        steer(session, config)


def interpret(args: Namespace) -> None:
    from crossdiff.interp.interpret_config import InterpretConfig

    config = validate(InterpretConfig, changes_of(args), "the command line")
    from crossdiff.stages.interpret import interpret

    with _finished_run(args.directory, config.crosscoders) as session:
        interpret(session, config, args.dry_run)


@contextmanager
def _finished_run(directory: Path, only: tuple[str, ...] = ()) -> Iterator[Session]:
    """A finished run, locked by this process, with the settings that it was made with."""
    from rich.console import Console

    from crossdiff.run import Run
    from crossdiff.stages.session import Session

    run = Run.open(directory)
    try:
        path = directory / "config.yaml"
        config = validate(RunConfig, read_yaml(path), str(path))
        yield Session(run, config, Console(), only=only)
    finally:
        run.close()


def _run_directory(path: Path) -> Path:
    if not (path / "manifest.json").exists():
        raise UserError(f"{path} is not a run directory: it has no manifest.json; give the path of a run")
    return path


def null(args: Namespace) -> None:
    from crossdiff.compare.null import compare, concept_counts, keep
    from crossdiff.compare.terminal import print_null

    directory, null = _run_directory(args.directory), _run_directory(args.null)
    compared = compare(directory, null)
    keep(directory, null, compared)
    print_null(compared, None, concept_counts(directory), concept_counts(null))
    print(f"Stored with the run. `crossdiff report {args.directory}` prints both rates and puts them on the page.")


def seeds(args: Namespace) -> None:
    from crossdiff.compare.seeds import compare_seeds, read_seeds
    from crossdiff.compare.terminal import print_seeds
    from crossdiff.models.loading import choose_device

    if not -1 <= args.cosine <= 1:
        raise UserError(f"--cosine is {args.cosine:g}; expected a number from -1 to 1")
    seeds = read_seeds(_run_directory(args.directory), args.names, choose_device("auto"))
    print_seeds(compare_seeds(seeds, args.cosine))


def truth(args: Namespace) -> None:
    changes = changes_of(args)
    values = merge(args.defaults.model_dump(), changes) if changes else args.start
    config = validate(type(args.defaults), values, "the command line" if changes else args.origin)

    from rich.console import Console

    from crossdiff.run import Run
    from crossdiff.stages.truth import run_truth

    run = Run.open(args.directory, create=True)
    try:
        run_truth(run, config, Console())
    finally:
        run.close()


def verify(args: Namespace) -> None:
    from rich.console import Console

    from crossdiff import integrity
    from crossdiff.progress import progress_bar

    console, directory = Console(stderr=True), _run_directory(args.directory)
    with progress_bar(console, "files, MB", sum(map(_megabytes, integrity.sizes(directory).values()))) as advance:
        found = integrity.verify(directory, lambda n_bytes: advance(_megabytes(n_bytes)))
    problems = list(found.problems)
    if (directory / "activations").is_dir() and not any(problem.startswith("activations/") for problem in problems):
        from crossdiff.activations.store import verify as verify_store

        problems += [f"activations/{problem}" for problem in verify_store(directory / "activations")]
    if problems:
        raise UserError(
            f"{directory} is damaged:\n  "
            + "\n  ".join(problems)
            + "\nRestore these files from a copy, or delete them and run "
            "the command that made them again"
        )
    print(f"{directory} is intact: {found.n_files} files and the activation store are what the stages wrote")
    if found.without_digests:
        stages = ", ".join(found.without_digests)
        print(f"not checked, since an earlier version of crossdiff wrote them without digests: {stages}")


def _megabytes(n_bytes: int) -> int:
    return -(-n_bytes // 10**6)


def store(args: Namespace) -> None:
    from crossdiff.activations.store import verify

    problems = verify(args.path)
    if problems:
        raise UserError(
            f"{args.path} is damaged:\n  " + "\n  ".join(problems) + "\nRestore these files, or harvest again with --force"
        )
    print(f"{args.path} is intact")


def clean(args: Namespace) -> None:
    from crossdiff.run import Run

    run = Run.open(args.directory)
    try:
        found = run.leftovers()
        wanted = [each for each in found if args.unfinished_harvests or not each.is_harvest]
        for each in found:
            what = "unfinished harvest" if each.is_harvest else "replaced result" if each.is_replaced else "unfinished work"
            kept = "" if each in wanted else "; kept: `crossdiff harvest` resumes it, and --unfinished-harvests deletes it"
            print(f"{each.n_bytes / 1e6:10.1f} MB  {each.path} ({what}{kept})")
        if not wanted:
            print(f"nothing to delete in {args.directory}")
        elif args.yes or _confirmed(f"Delete {len(wanted)} of these, {sum(each.n_bytes for each in wanted) / 1e6:.1f} MB?"):
            run.clean(wanted)
            print(f"{sum(each.n_bytes for each in wanted) / 1e6:.1f} MB freed")
        else:
            print("nothing was deleted")
    finally:
        run.close()


def _confirmed(question: str) -> bool:
    """Ask on the terminal. Raises `UserError` if nobody is there to answer."""
    if not sys.stdin.isatty():
        raise UserError("nothing was deleted, since there is no terminal to ask on; pass --yes to delete what is listed")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
