"""The commands that publish a run and fetch one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossdiff.cli.options import Parser


def push(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff push", description="publish a run on the Hugging Face Hub, with a generated model card")
    parser.add_argument("run", type=Path, help="run directory; it is only read")
    parser.add_argument("repository", help="owner/name; made if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and show the card; needs no network")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--licence", default="", help="licence of the two models, such as mit [looked up]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
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


def pull(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff pull", description="fetch a published run; `crossdiff.open` reads it")
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("directory", nargs="?", type=Path, help="where to [runs/name]")
    parser.add_argument("--revision", help="branch, tag or commit [main]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    from crossdiff.published.hub import pull

    folder = pull(args.repository, args.directory, revision=args.revision)
    print(f"{args.repository} is in {folder}: open it with crossdiff.open({str(folder)!r})")
