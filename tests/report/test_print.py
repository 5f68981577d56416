"""The figures for print, drawn from a small synthetic run."""

import re
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import latent_table, write_activations, write_crosscoder

from crossdiff.report.figures import Axis, Figure, Series
from crossdiff.report.marks import Mark
from crossdiff.report.print_figures import FORMATS, draw, write_figures
from crossdiff.report.reading import read_run
from crossdiff.report.records import RunReport

NAMES = {
    f"{coder}-{kind}" for coder in ("l1", "batchtopk") for kind in ("delta-norm", "latent-scaling", "frequency", "behaviours")
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    folder = tmp_path_factory.mktemp("print") / "run"
    for seed, name in enumerate(("l1", "batchtopk")):
        write_crosscoder(folder / name, latent_table(seed))
    write_activations(folder)
    return read_run(folder)


def test_every_figure_is_written_twice_alike_with_a_caption_of_its_numbers(report: RunReport, tmp_path: Path) -> None:
    write_figures(report, tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"captions.md"} | {
        f"{n}.{e}" for n in NAMES for e in FORMATS
    }
    assert all((tmp_path / "one" / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in NAMES)
    write_figures(report, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    captions = (tmp_path / "one" / "captions.md").read_text()
    assert len(re.findall(r"^\*\*[\w-]+\.\*\*", captions, re.MULTILINE)) == len(NAMES)
    # The synthetic table: 7 specific, 4 rotated, 3 undecided and 3 dead of 60; health.json: FVE 0.9123 and 0.8876, L0 31.62.
    assert "43 shared, 7 chat-specific, 4 rotated" in captions and "limits 0.2 and 0.5" in captions
    assert (
        "(FVE) 0.912 [0.900, 0.920] base, 0.888 [0.880, 0.900] chat; active latents per token (L0) 31.6; 200,123 held-out"
        in captions
    )
    assert "identity (77 with, 140 without): specific pool 0.91 [0.83, 0.97]" in captions


def test_points_and_bars_are_drawn_where_they_are(report: RunReport, tmp_path: Path) -> None:
    """A bar over 2 to 4 of height 3 beside a point at (1, 2), on axes from 0 to 5 and 0 to 4, read back from the SVG."""
    figure = Figure(
        (
            Series("bars", [3], [3], [""], Mark("#112233", "square"), width=[2]),
            Series("points", [1], [2], [""], Mark("#445566", "square"), "p"),
        ),
        x=Axis("a < $b", (0, 5)),
        y=Axis(range=(0, 4)),
        height=300,
    )
    draw(figure, tmp_path / "figure")
    svg = (tmp_path / "figure.svg").read_text()
    assert "a &lt; $b" in svg  # the label's own sign, and no mathematics
    bar = re.search(r'd="([^"]*)"[^>]*style="fill: #112233"', svg)
    frame = re.search(r'id="patch_2">\s*<path d="([^"]*)"', svg)
    point = re.search(r'x="([\d.]+)" y="([\d.]+)" style="fill: #445566', svg)
    assert bar and frame and point
    (left, right), (top, bottom) = _extent(frame[1])
    (bar_left, bar_right), (bar_top, bar_bottom) = _extent(bar[1])
    assert (bar_left - left) / (right - left) == pytest.approx(2 / 5, abs=1e-3)
    assert (bar_right - left) / (right - left) == pytest.approx(4 / 5, abs=1e-3)
    assert (bottom - bar_top) / (bottom - top) == pytest.approx(3 / 4, abs=1e-3)
    assert bar_bottom == pytest.approx(bottom, abs=0.01)
    assert (float(point[1]) - left) / (right - left) == pytest.approx(1 / 5, abs=1e-3)
    assert (bottom - float(point[2])) / (bottom - top) == pytest.approx(2 / 4, abs=1e-3)


def _extent(path: str) -> tuple[tuple[float, float], tuple[float, float]]:
    numbers = np.array(re.findall(r"-?\d+(?:\.\d+)?", path), dtype=float).reshape(-1, 2)
    return (numbers[:, 0].min(), numbers[:, 0].max()), (numbers[:, 1].min(), numbers[:, 1].max())


def test_a_run_without_behaviours_has_no_figure_of_them(tmp_path: Path) -> None:
    write_crosscoder(tmp_path / "run" / "topk", latent_table(0), behaviours=False)
    write_figures(read_run(tmp_path / "run"), tmp_path / "figures")
    names = {"topk-delta-norm", "topk-latent-scaling", "topk-frequency"}
    assert {path.stem for path in (tmp_path / "figures").glob("*.pdf")} == names
