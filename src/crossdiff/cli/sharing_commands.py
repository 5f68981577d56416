"""The commands that show a run to others and exchange crosscoders with them: dashboard, pages, the Hub, published formats."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.cli.options import Commands
from crossdiff.errors import UserError
from crossdiff.published import LAYOUTS

if TYPE_CHECKING:
    from crossdiff.crosscoder.crosscoder import Crosscoder


def add(commands: Commands) -> None:
    parser = commands.add("dashboard", "explore finished runs in the browser", dashboard, abbreviations=False)
    parser.add_argument("directories", nargs="+", type=Path, metavar="RUN", help="run directories with an analysed crosscoder")
    parser.add_argument("--port", type=int, default=8321, help="port to listen on; 0 takes a free one [8321]")
    text = "address to listen on; readers of any but a loopback address need a token [127.0.0.1]"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--name", nargs="+", default=[], metavar="HOST", help="other host names of this machine")
    text = "addresses of other pages that may show cards in a frame, such as https://wiki.example.org [none but its own]"
    parser.add_argument("--embed-in", nargs="+", default=[], metavar="ORIGIN", help=text)
    parser.add_argument("--no-live", action="store_true", help="load no models: tables and examples only")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="write pictures of every page there instead of serving")

    summary = "write concepts or latents as one self-contained page, or with --format a crosscoder for others' tools"
    parser = commands.add("export", summary, export, abbreviations=False)
    parser.add_argument("directory", type=Path, metavar="RUN", help="run directory; a page needs an analysed crosscoder")
    text = "numbers, ranges such as 3-9, or verdicts such as chat_specific"
    which = f"{text}; also `replicated` [replicated, unless --latents is given]"
    parser.add_argument("--concepts", nargs="+", default=[], metavar="CONCEPT", help=which)
    parser.add_argument("--latents", nargs="+", default=[], metavar="LATENT", help=text)
    parser.add_argument("--crosscoder", help="which crosscoder of the run [the first BatchTopK one]")
    text = "write the crosscoder's weights for a library instead: dictionary_learning (the paper's fork) takes crosscoders and "
    text += "SAEs of the kinds l1 and batchtopk, saelens takes SAEs of every kind; an SAE reads one model"
    parser.add_argument("--format", choices=LAYOUTS, help=text)
    text = "the page to write, such as page.html; with --format, the folder"
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help=text)

    summary = "write your notes on latents and concepts (labels, stars, comments, lists) as JSON, or merge those of a file"
    parser = commands.add("notes", summary, notes, abbreviations=False)
    parser.add_argument("action", choices=["export", "import"])
    text = "export: the file to write; import: the file to merge, of whose values the newest count and the others are kept"
    parser.add_argument("file", type=Path, help=text)
    text = "export: only the notes on the present results of these runs [all notes]"
    parser.add_argument("--runs", nargs="+", type=Path, default=[], metavar="RUN", help=text)

    parser = commands.add("push", "publish a run on the Hugging Face Hub, with a generated model card", push)
    parser.add_argument("run", type=Path, help="run directory; it is only read")
    parser.add_argument("repository", help="owner/name; created if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and the card; needs no network")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--licence", default="", help="licence of the two models, such as mit [looked up]")

    parser = commands.add("pull", "fetch a published run, which `crossdiff.open` reads", pull)
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("directory", nargs="?", type=Path, help="where to put it [runs/name]")
    parser.add_argument("--revision", help="branch, tag or commit [main]")

    summary = "read a published crosscoder or SAE, print its architecture, and write it in crossdiff's format"
    parser = commands.add("import", summary, import_published)
    which = "the folder as it was published, its .pt, .npz or .safetensors file, or owner/name on the Hub"
    parser.add_argument("source", help=which)
    text = "the folder to write config.json and model.safetensors into; with a pair, the run directory to make"
    parser.add_argument("target", type=Path, help=text)
    for model, text in (("base", "the base model"), ("chat", "the model fine-tuned from it")):
        parser.add_argument(
            f"--{model}", help=f"{text}, a Hub name or folder: makes a run of the crosscoder and the two models"
        )
    parser.add_argument("--layer", type=int, help="of a run: the layer that the crosscoder reads [the one that its files name]")
    parser.add_argument("--dataset", nargs="+", default=[], help="of a run: texts, as for `crossdiff run`")
    parser.add_argument("--name", default="published", help="of a run: name of the crosscoder in it [published]")
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="names of the sources in the file's order [base chat]")
    text = "one number per source that the activations were multiplied by in training, where the file does not hold it"
    parser.add_argument("--input-scales", nargs="+", type=float, metavar="NUMBER", help=text)
    text = "a store of its models, or a run with one, to set the threshold from if a BatchTopK's training never set it"
    parser.add_argument("--estimate-threshold", type=Path, metavar="STORE", help=text)

    parser = commands.add(
        "examples", "convert an example database to the layout of the published examples.db, or from others' layouts", examples
    )
    parser.add_argument("action", choices=["export", "import"])
    parser.add_argument("source", type=Path, help="export: the examples.sqlite of a crosscoder; import: a published file")
    parser.add_argument("target", type=Path, help="the file to write")
    text = "import: examples.db, json ({latent: [[value, tokens, values], ...]}), notebook (the same as .pt) or toolkit"
    parser.add_argument("--layout", default="examples.db", metavar="NAME", help=f"{text} [examples.db]")
    parser.add_argument("--tokenizer", help="import: the model whose tokenizer made the tokens, a Hub name or folder")


def dashboard(args: Namespace) -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise UserError(f"the dashboard needs {' and '.join(missing)}: pip install 'crossdiff[dashboard]'")
    if args.screenshots is not None:
        from crossdiff.dashboard.screenshots import take

        for path in take(args.directories, args.screenshots, not args.no_live):
            print(path)
        return
    from crossdiff.dashboard.serve import serve

    serve(args.directories, args.host, args.port, tuple(args.name), not args.no_live, tuple(args.embed_in))


def export(args: Namespace) -> None:
    is_page = args.output.suffix.lower() in (".html", ".htm")
    if args.format is not None:
        if args.concepts or args.latents:
            raise UserError("--concepts and --latents choose the cards of a page; omit them, or --format")
        if is_page:
            raise UserError(f"--format writes a folder, but {args.output} names a page; name a folder, or omit --format")
        from crossdiff.published.writing import export_crosscoder

        name, reading = export_crosscoder(args.directory, args.crosscoder, args.format, args.output)
        print(f"{name} written to {args.output}; {args.format} reads it with {reading}")
        return
    if not is_page:
        raise UserError(
            f"the page {args.output} has no name that ends in .html; choose another one with -o, such as page.html, or write "
            "the crosscoder into a folder with --format"
        )
    from crossdiff.dashboard.export import export_page

    n_concepts, n_latents = export_page(args.directory, args.crosscoder, args.latents, args.concepts, args.output)
    parts = [f"{n} {what}" for n, what in ((n_concepts, "concepts"), (n_latents, "latents")) if n]
    print(f"{' and '.join(parts) or 'nothing'} written to {args.output}")


def notes(args: Namespace) -> None:
    from crossdiff.notes.exchange import export_notes, import_notes
    from crossdiff.notes.store import Notes

    mine = Notes()
    if args.action == "import":
        if args.runs:
            raise UserError("--runs chooses what is exported; an import merges all notes of the file, so omit it")
        try:
            text = args.file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {args.file}: {error.strerror}") from None
        merged = import_notes(mine, text, str(args.file))
        print(f"notes on {merged.n_subjects} latents and concepts, {merged.n_new} new values, merged into {mine.path}")
        return
    from crossdiff.diff import open as open_run
    from crossdiff.files import write_text

    coders = [open_run(run, name) for run in args.runs for name in open_run(run).names]
    found = export_notes(mine, {digest for coder in coders for digest in coder.notes.digests} if args.runs else None)
    write_text(args.file, found.model_dump_json(indent=1) + "\n")
    print(f"notes on {len(found.notes)} latents and concepts written to {args.file}")


def push(args: Namespace) -> None:
    from crossdiff.published.hub import push

    upload = push(args.run, args.repository, dry_run=args.dry_run, private=args.private, licence=args.licence)
    if args.dry_run:
        print(upload.card)
    print(f"{'would be sent' if args.dry_run else 'sent'} to {args.repository}:")
    for name, size in upload.sizes.items():
        print(f"  {size / 1e6:9.2f} MB  {name}")
    print(f"  {sum(upload.sizes.values()) / 1e6:9.2f} MB  in all")
    for remark in upload.remarks:
        print(f"note: {remark}")


def pull(args: Namespace) -> None:
    from crossdiff.published.hub import pull

    folder = pull(args.repository, args.directory, revision=args.revision)
    print(f"{args.repository} is in {folder}: open it with crossdiff.open({str(folder)!r})")


def import_published(args: Namespace) -> None:
    if args.target.is_file():
        raise UserError(f"{args.target} is a file; name the folder to write the crosscoder into")
    if taken := [name for name in ("model.safetensors", "config.json", "config.yaml") if (args.target / name).exists()]:
        raise UserError(f"{args.target} already holds a crosscoder, a model or a run (found {taken[0]}); choose another folder")
    pair = (args.base, args.chat)
    if any(pair) and not all(pair):
        raise UserError("a run needs both models of the pair: give --base and --chat; without both, only the file is converted")
    if not any(pair) and (args.dataset or args.layer is not None):
        raise UserError(
            "--layer and --dataset are for a run of the crosscoder and a pair of models: give --base and --chat too"
        )
    if any(pair) and args.estimate_threshold is not None:
        raise UserError(
            "--estimate-threshold is for converting: import the crosscoder into a folder with it, and then that folder with "
            "--base and --chat"
        )
    from crossdiff.activations.store import Store
    from crossdiff.models.loading import choose_device
    from crossdiff.published.formats import find_store, notes_on, read_published
    from crossdiff.published.hub import locate

    sources, scales = (tuple(given) if given else None for given in (args.sources, args.input_scales))
    store = Store(find_store(args.estimate_threshold)) if args.estimate_threshold is not None else None
    device = choose_device("cpu" if store is None else "auto")
    coder = read_published(locate(args.source), sources, scales, store, device)
    found = coder.origin.get("published") or {"format": "crossdiff", "architecture": coder.sparsity.kind}
    print(f"{found['format']}: {found['architecture']}, read as {coder.sparsity.kind}")
    for note in notes_on(found):
        print(f"note: {note}")
    if args.base:
        _make_run(args, coder)
    else:
        _convert(coder, args.target)


def _convert(coder: Crosscoder, target: Path) -> None:
    from crossdiff.crosscoder.checkpoint import save

    target.mkdir(parents=True, exist_ok=True)
    save(coder, target)
    if coder.origin["layer"] is None:
        print("note: its files do not name the layer; make sure that it reads the residual stream after the layer that you use")
    print(f"{coder.n_latents:,} latents, width {coder.d_model}, sources {', '.join(coder.sources)}; written to {target}")


def _make_run(args: Namespace, coder: Crosscoder) -> None:
    """Make a run that analyses a published crosscoder, once it is known to fit the pair."""
    from crossdiff.cli.options import READINGS
    from crossdiff.config import RunConfig, validate
    from crossdiff.corpus import check_texts
    from crossdiff.models.loading import stored_sizes
    from crossdiff.models.names import fetch_adapter, identify_all
    from crossdiff.published.hub import pinned
    from crossdiff.published.in_run import check_in_run, settings_of, texts_of
    from crossdiff.run import Run

    layer = coder.origin["layer"] if args.layer is None else args.layer
    if layer is None:
        raise UserError(f"the files of {args.source} do not name the layer that it reads: give it with --layer, counted from 0")
    read = {"sources": args.sources, "input_scales": args.input_scales}
    values = {
        "base": args.base,
        "chat": args.chat,
        "layer": layer,
        "dataset": texts_of([READINGS["dataset"]("dataset", each) for each in args.dataset]),
        "crosscoders": {args.name: settings_of(coder, pinned(args.source)) | {key: read[key] for key in read if read[key]}},
    }
    config = validate(RunConfig, values, "the command line")
    check_texts(config)
    for model in (args.base, args.chat):
        fetch_adapter(model)
    d_model, n_layers = stored_sizes(args.base)
    if not 0 <= layer < n_layers:
        raise UserError(f"layer {layer} does not exist: {args.base} has {n_layers} layers, 0 to {n_layers - 1}")
    pair = identify_all({"base": args.base, "chat": args.chat})
    check_in_run(args.name, coder, config.crosscoders[args.name], pair, d_model, layer)
    run = Run.open(args.target, create=True)
    run.write_config(config.model_dump(mode="json"))
    run.close()
    texts = ", ".join(
        f"{dataset.title} (at most {dataset.max_tokens:,} tokens)" for dataset in config.dataset if dataset.max_tokens
    )
    print(f"{coder.n_latents:,} latents, width {coder.d_model}, after layer {layer} of {args.base} and {args.chat}")
    print(f"texts: {texts}" if texts else "texts: as given")
    print(f"the run is in {args.target}; next: crossdiff plan {args.target}, then crossdiff run {args.target}")


def examples(args: Namespace) -> None:
    from crossdiff.models.loading import load_tokenizer
    from crossdiff.published.examples_db import export_examples, import_examples

    if args.action == "export":
        n_examples = export_examples(args.source, args.target)
    elif args.tokenizer is None:
        raise UserError("an import needs the tokens as text: name the model with --tokenizer")
    else:
        n_examples = import_examples(args.source, args.target, load_tokenizer(args.tokenizer), args.layout)
    print(f"{n_examples} examples written to {args.target}")
