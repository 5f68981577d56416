"""The commands that show a run to others and exchange crosscoders with them: dashboard, pages, the Hub, published formats."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from crossdiff.cli.options import Commands
from crossdiff.errors import UserError


def add(commands: Commands) -> None:
    parser = commands.add("dashboard", "explore finished runs in the browser", dashboard, abbreviations=False)
    parser.add_argument("directories", nargs="+", type=Path, metavar="RUN", help="run directories with an analysed crosscoder")
    parser.add_argument("--port", type=int, default=8321, help="port to listen on; 0 takes a free one [8321]")
    text = "address to listen on; readers of any but a loopback address need a token [127.0.0.1]"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--name", nargs="+", default=[], metavar="HOST", help="other host names of this machine")
    parser.add_argument("--no-live", action="store_true", help="load no models: tables and examples only")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="write pictures of every page there instead of serving")

    parser = commands.add("export", "write concepts or latents as one self-contained page", export, abbreviations=False)
    parser.add_argument("directory", type=Path, metavar="RUN", help="run directory with an analysed crosscoder")
    text = "numbers, ranges such as 3-9, or verdicts such as chat_specific"
    which = f"{text}; also `replicated` [replicated, unless --latents is given]"
    parser.add_argument("--concepts", nargs="+", default=[], metavar="CONCEPT", help=which)
    parser.add_argument("--latents", nargs="+", default=[], metavar="LATENT", help=text)
    parser.add_argument("--crosscoder", help="which crosscoder of the run [the first BatchTopK one]")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PAGE", help="the page to write, such as page.html")

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
    parser.add_argument("source", type=Path, help="the folder as it was published, or its .pt, .npz or .safetensors file")
    parser.add_argument("target", type=Path, help="the folder to write config.json and model.safetensors into")
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

    serve(args.directories, args.host, args.port, tuple(args.name), not args.no_live)


def export(args: Namespace) -> None:
    from crossdiff.dashboard.export import export_page

    if args.output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the page {args.output} has no name that ends in .html; choose another one with -o, such as page.html")
    n_concepts, n_latents = export_page(args.directory, args.crosscoder, args.latents, args.concepts, args.output)
    parts = [f"{n} {what}" for n, what in ((n_concepts, "concepts"), (n_latents, "latents")) if n]
    print(f"{' and '.join(parts) or 'nothing'} written to {args.output}")


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
    from crossdiff.activations.store import Store
    from crossdiff.crosscoder.checkpoint import save
    from crossdiff.published.formats import find_store, notes_on, read_published

    sources, scales = (tuple(given) if given else None for given in (args.sources, args.input_scales))
    store = Store(find_store(args.estimate_threshold)) if args.estimate_threshold is not None else None
    coder = read_published(args.source, sources, scales, store)
    args.target.mkdir(parents=True, exist_ok=True)
    save(coder, args.target)
    found = coder.origin.get("published") or {"format": "crossdiff", "architecture": coder.sparsity.kind}
    print(f"{found['format']}: {found['architecture']}, read as {coder.sparsity.kind}")
    for note in notes_on(found):
        print(f"note: {note}")
    if coder.origin["layer"] is None:
        print("note: its files do not name the layer; make sure that it reads the residual stream after the layer that you use")
    print(f"{coder.n_latents:,} latents, width {coder.d_model}, sources {', '.join(coder.sources)}; written to {args.target}")


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
