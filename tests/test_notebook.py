"""notebooks/demo.ipynb: its code runs on a small run here; `make notebook` executes it on the demo and keeps the outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crossdiff.report.print_figures import write_figures
from crossdiff.report.reading import read_run
from opened import write_run

NOTEBOOK = json.loads((Path(__file__).parent.parent / "notebooks" / "demo.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_its_code_runs(
    tmp_path: Path, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "runs" / "demo", tiny_pair, tiny_texts, max_length=128)  # every byte is a token
    write_figures(read_run(run), run / "figures")
    monkeypatch.chdir(tmp_path)
    shown: list[Any] = []
    names: dict[str, Any] = {}
    for cell in CODE:
        source = "".join(cell["source"]).replace("from IPython.display import SVG, display", "")
        names |= {"SVG": lambda filename: Path(filename).read_text(), "display": shown.append}
        exec(compile(source, cell["id"], "exec"), names)
    assert shown[0].columns == ["verdict", "batchtopk", "l1"]
    assert names["identity"] == 3  # the specific latent that predicts identity best in the synthetic table


def test_its_outputs_are_kept_without_errors() -> None:
    assert all(cell["outputs"] for cell in CODE)
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds <= {"execute_result", "display_data"}  # no errors, no noise of libraries
    pages = ["".join(output["data"].get("text/html", "")) for cell in CODE for output in cell["outputs"]]
    cards = [page for page in pages if 'class="crossdiff"' in page]
    assert len(cards) >= 5 and all("@scope" in page and "<script" not in page for page in cards)
