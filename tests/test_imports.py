"""Imports point one way, and the command line starts without the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import crossdiff

SOURCE = Path(crossdiff.__file__).parent
# What a package may import of ours. Data flows the other way: pair -> store -> crosscoder -> latents -> causal -> report.
FOUNDATION = {"config", "errors", "files", "integrity", "shapes", "ranks", "run", "run_manifest", "sources", "statistics"}
FOUNDATION |= {"yaml_files"}
ALLOWED = {
    "errors": set(),
    "sources": set(),
    "files": {"errors"},
    "yaml_files": {"errors"},
    "config": {"errors", "files", "sources"},
    "run_manifest": {"errors", "files"},
    "integrity": {"errors", "files", "run_manifest"},
    "shapes": set(),
    "statistics": {"shapes"},
    "memory": set(),
    "ranks": {"errors", "shapes"},
    "run": {"errors", "files", "integrity", "ranks", "run_manifest"},
    "pairs": {"errors"},
    "models": FOUNDATION | {"pairs", "text"},
    "text": FOUNDATION,
    "activations": FOUNDATION | {"models", "text"},
    "crosscoder": FOUNDATION | {"models", "text", "activations"},
    "latents": FOUNDATION | {"text", "activations", "crosscoder"},
    "look": FOUNDATION | {"models", "text", "activations", "crosscoder", "latents", "causal"},
    "concepts": FOUNDATION | {"models", "text", "activations", "crosscoder", "latents"},
    "compare": FOUNDATION | {"models", "text", "activations", "crosscoder", "latents"},
    "truth": FOUNDATION | {"activations", "crosscoder", "latents", "concepts"},
    "causal": FOUNDATION | {"models", "text", "activations", "crosscoder", "latents"},
    "interp": FOUNDATION | {"activations", "crosscoder", "latents"},
    "notes": FOUNDATION,
    "report": FOUNDATION | {"text", "latents", "look", "interp", "notes"},
    "progress": set(),
    "corpus": {"config", "errors", "files", "pairs"},
    "text_activations": FOUNDATION | {"models", "text", "activations", "crosscoder", "report"},
    "notebook": {"errors", "report", "text_activations"},
    "diff": FOUNDATION | {"models", "activations", "crosscoder", "latents", "notes", "report", "text_activations", "notebook"},
    "published": FOUNDATION | {"text", "activations", "crosscoder", "latents", "report", "diff"},
    "dashboard": FOUNDATION
    | {"models", "text", "activations", "latents", "look", "causal", "notes", "report"}
    | {"text_activations", "diff"},
    "stages": FOUNDATION
    | {"corpus", "progress", "pairs", "models", "text", "activations", "crosscoder", "latents", "concepts", "compare", "truth"}
    | {"causal", "interp", "look", "report", "published"},
    "cli": FOUNDATION
    | {
        "memory",
        "pairs",
        "progress",
        "models",
        "activations",
        "crosscoder",
        "latents",
        "compare",
        "truth",
        "interp",
        "published",
        "notes",
        "diff",
        "corpus",
    }
    | {"corpus", "stages", "dashboard"},
}


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name and name.startswith("crossdiff.")}
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_point_one_way(part: str) -> None:
    files = [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").exists() else sorted((SOURCE / part).rglob("*.py"))
    assert files
    for file in files:
        wrong = imported_parts(file) - ALLOWED[part] - {part}
        assert not wrong, f"{file.relative_to(SOURCE)} imports {wrong}"


def test_every_part_has_a_rule() -> None:
    parts = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} == set(ALLOWED)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["truth", "--help"]])
def test_help_leaves_the_heavy_libraries_out(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom crossdiff.cli import run_command\n"
        f"try:\n    run_command({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'polars', 'sklearn', 'plotly', 'fastapi', 'uvicorn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_is_quick_and_brings_nothing() -> None:
    code = (
        "import sys, time\nbefore = set(sys.modules)\nstarted = time.process_time()\nimport crossdiff\n"
        "print(time.process_time() - started)\n"
        "heavy = {'torch', 'transformers', 'polars', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.150  # seconds of this process, whatever else the machine does
