"""The commands beside the stages: checks, comparisons of runs, formats of others, ground truth, steering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.cli.options import Parser, add_settings, changes_of, scan
from crossdiff.config import RunConfig, SteerConfig, merge, read_yaml, validate
from crossdiff.errors import UserError

if TYPE_CHECKING:
    from crossdiff.run import Run


def truth(argv: Sequence[str]) -> None:
    from crossdiff.truth.truth_config import TruthConfig

    _, options = scan(argv)
    start, origin = (read_yaml(Path(options["config"])), options["config"]) if "config" in options else ({}, "the defaults")
    defaults = validate(TruthConfig, start, origin)
    description = "plant concepts whose place is known, train crosscoders on them, and compare what is found with the truth"
    parser = Parser(prog="crossdiff truth", description=description, allow_abbrev=False)
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/truth"), help="where it goes [runs/truth]")
    parser.add_argument("--config", type=Path, help="YAML file with settings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_settings(parser, defaults, "settings (each is also a key of the YAML file)")
    args = parser.parse_args(argv)
    changes = changes_of(args)
    values = merge(defaults.model_dump(), changes) if changes else start
    config = validate(TruthConfig, values, "the command line" if changes else origin)

    from rich.console import Console

    from crossdiff.run import Run
    from crossdiff.truth.terminal import run_truth

    run = Run.open(args.directory)
    try:
        run_truth(run, config, Console())
    finally:
        run.close()


def _run_directory(path: Path) -> Path:
    if not (path / "manifest.json").exists():
        raise UserError(f"{path} is no run directory: it has no manifest.json")
    return path


def null(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff null", description="compare a run's verdicts with those of a null run")
    parser.add_argument("directory", type=Path, help="run directory of the diff")
    parser.add_argument("--null", type=Path, required=True, help="run directory of the base model and a null model")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    from crossdiff.compare.null import compare, keep
    from crossdiff.compare.terminal import print_null

    directory, null = _run_directory(args.directory), _run_directory(args.null)
    compared = compare(directory, null)
    keep(directory, null, compared)
    print_null(compared)
    print(f"Kept with the run; `crossdiff report {args.directory}` prints the rates side by side and puts them on its page")


def seeds(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff seeds", description="compare trainings of one crosscoder from several seeds")
    parser.add_argument("directory", type=Path, help="run directory")
    parser.add_argument("names", nargs="+", metavar="NAME", help="crosscoders of the run, such as l1 l1-seed1 l1-seed2")
    parser.add_argument("--cosine", type=float, default=0.9, help="cosine above which two latents are the same [0.9]")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    from crossdiff.compare.seeds import compare_seeds, read_seeds
    from crossdiff.compare.terminal import print_seeds

    print_seeds(compare_seeds(read_seeds(_run_directory(args.directory), args.names), args.cosine))


def clean(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff clean", description="delete replaced results and unfinished work of a run")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--debug", action="store_true")
    directory = _run_directory(parser.parse_args(argv).directory)
    from crossdiff.run import Run

    run = Run.open(directory)
    try:
        print(f"{run.clean() / 1e6:.1f} MB freed")
    finally:
        run.close()


def store(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff store", description="check an activation store")
    parser.add_argument("action", choices=["verify"], help="verify: read everything and compare the checksums")
    parser.add_argument("path", help="the store: a folder such as runs/demo/activations, or a URL such as s3://bucket/folder")
    parser.add_argument("--debug", action="store_true")
    path = parser.parse_args(argv).path
    from crossdiff.activations.store import verify

    problems = verify(path)
    if problems:
        raise UserError(
            f"{path} is damaged:\n  " + "\n  ".join(problems) + "\nRestore these files, or harvest again with --force"
        )
    print(f"{path} is whole")


def import_published(argv: Sequence[str]) -> None:
    description = "read a published crosscoder or SAE, say which architecture it is, and write it as one of ours"
    parser = Parser(prog="crossdiff import", description=description)
    parser.add_argument("source", type=Path, help="the folder as it was published, or its .pt or .safetensors file")
    parser.add_argument("target", type=Path, help="the folder to write config.json and model.safetensors into")
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="names of the sources in the file's order [base chat]")
    help_scales = "where the coder was trained on activations times a number that its file does not hold: one a source"
    parser.add_argument("--input-scales", nargs="+", type=float, metavar="NUMBER", help=help_scales)
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    if (args.target / "model.safetensors").exists():
        raise UserError(f"{args.target} holds a crosscoder already; choose another folder")
    from crossdiff.crosscoder.checkpoint import save
    from crossdiff.published.formats import read_published

    sources, scales = (tuple(given) if given else None for given in (args.sources, args.input_scales))
    coder = read_published(args.source, sources, scales)
    args.target.mkdir(parents=True, exist_ok=True)
    save(coder, args.target)
    found = coder.origin.get("published") or {"format": "crossdiff", "architecture": coder.sparsity.kind}
    print(f"{found['format']}: {found['architecture']}, read as {coder.sparsity.kind}")
    print(f"{coder.n_latents:,} latents, width {coder.d_model}, sources {', '.join(coder.sources)}; written to {args.target}")


def examples(argv: Sequence[str]) -> None:
    description = "carry example databases to and from the layout of the published examples.db"
    parser = Parser(prog="crossdiff examples", description=description)
    parser.add_argument("action", choices=["export", "import"])
    parser.add_argument("source", type=Path, help="export: the examples.sqlite of a crosscoder; import: an examples.db")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--tokenizer", help="import: the model whose tokenizer made the tokens, a Hub name or folder")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    from crossdiff.models.pair import load_tokenizer
    from crossdiff.published.examples_db import export_examples, import_examples

    if args.action == "export":
        n_examples = export_examples(args.source, args.target)
    elif args.tokenizer is None:
        raise UserError("an import needs the tokens as text: name the model with --tokenizer")
    else:
        n_examples = import_examples(args.source, args.target, load_tokenizer(args.tokenizer))
    print(f"{n_examples} examples written to {args.target}")


def interpret(argv: Sequence[str]) -> None:
    from crossdiff.interp.interpret_config import InterpretConfig

    description = "explain latents with a language model and score the explanations; without a server, score them offline"
    parser = Parser(prog="crossdiff interpret", description=description, allow_abbrev=False)
    parser.add_argument("directory", type=Path, help="run directory with an analysed crosscoder")
    parser.add_argument("--dry-run", action="store_true", help="print calls, tokens and cost, and ask nobody")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_settings(parser, InterpretConfig(), "settings")
    args = parser.parse_args(argv)
    config = validate(InterpretConfig, changes_of(args), "the command line")
    from rich.console import Console

    from crossdiff.interp_pipeline import InterpretPipeline

    with _made_before(args.directory) as (run, settings):
        InterpretPipeline(run, settings, Console()).interpret(config, args.dry_run)


@contextmanager
def _made_before(directory: Path) -> Iterator[tuple[Run, RunConfig]]:
    """A finished run, held by this process, and the settings that it was made with."""
    from crossdiff.run import Run

    path = directory / "config.yaml"
    if not path.exists():
        raise UserError(f"{directory} is no finished run: it has no config.yaml; run `crossdiff analyze` first")
    settings = validate(RunConfig, read_yaml(path), str(path))
    run = Run.open(directory)
    try:
        yield run, settings
    finally:
        run.close()


def steer(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff steer", description="generate with a latent added or ablated", allow_abbrev=False)
    parser.add_argument("directory", type=Path, help="run directory with an analysed crosscoder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_settings(parser, SteerConfig(), "settings")
    args = parser.parse_args(argv)
    config = validate(SteerConfig, changes_of(args), "the command line")
    from rich.console import Console

    from crossdiff.causal_pipeline import CausalPipeline

    with _made_before(args.directory) as (run, settings):
        CausalPipeline(run, settings, Console()).steer(config)
