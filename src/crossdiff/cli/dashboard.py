"""The commands that show a run: the dashboard, and single latents as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossdiff.cli.options import Parser
from crossdiff.errors import UserError


def dashboard(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff dashboard", description="explore finished runs in the browser", allow_abbrev=False)
    parser.add_argument("directories", nargs="+", type=Path, metavar="RUN", help="run directories with an analysed crosscoder")
    parser.add_argument("--port", type=int, default=8321, help="port to listen on; 0 takes a free one [8321]")
    text = "address to listen on; any but loopback asks readers for a token [127.0.0.1]"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--name", nargs="+", default=[], metavar="HOST", help="further names that this machine goes by")
    parser.add_argument("--no-live", action="store_true", help="load no models: tables and examples only")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="write pictures of every page there instead of serving")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    _need_packages()
    if args.screenshots is not None:
        from crossdiff.dashboard.screenshots import take

        for path in take(args.directories, args.screenshots, not args.no_live):
            print(path)
        return
    from crossdiff.dashboard.serve import serve

    serve(args.directories, args.host, args.port, tuple(args.name), not args.no_live)


def _need_packages() -> None:
    """Raises `UserError` when the packages of the extra are missing."""
    from importlib.util import find_spec

    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise UserError(f"the dashboard needs {' and '.join(missing)}: pip install 'crossdiff[dashboard]'")


def export(argv: Sequence[str]) -> None:
    parser = Parser(prog="crossdiff export", description="write latents as one self-contained page", allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="RUN", help="run directory with an analysed crosscoder")
    text = "numbers, ranges such as 3-9, or verdicts such as chat_specific"
    parser.add_argument("--latents", nargs="+", required=True, metavar="LATENT", help=text)
    parser.add_argument("--crosscoder", help="which crosscoder of the run [the first BatchTopK one]")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PAGE", help="the page to write, such as page.html")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    from crossdiff.dashboard.export import export_page

    n = export_page(args.directory, args.crosscoder, args.latents, args.output)
    print(f"{n} latents written to {args.output}")
