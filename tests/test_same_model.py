"""Base and chat are one model: every stage and every page says so, no number in a JSON file is NaN, and no library warns."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml

from conftest import tiny_config
from crossdiff.activations.normalisation import Moments
from crossdiff.config import DifferenceConfig
from crossdiff.crosscoder.view import view_of
from crossdiff.errors import UserError
from crossdiff.files import number, read_json, to_json, write_json
from crossdiff.report.concept_wording import lead
from crossdiff.report.overview import caveats
from crossdiff.report.reading import read_run
from crossdiff.report.wording import SAME_MODEL, answer

SAME = "have the same activations on every token: they are one model, so there is nothing to compare"


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]
) -> tuple[Path, str]:
    """A run of a model and a copy of it whose config has another digest, with everything that the commands printed."""
    folder = tmp_path_factory.mktemp("same")
    shutil.copytree(tiny_pair[0], folder / "copy")
    config = folder / "copy" / "config.json"
    config.write_text(config.read_text() + "\n")
    settings = tiny_config((tiny_pair[0], folder / "copy"), tiny_texts, causal={"max_conversations": 6, "resamples": 100})
    settings["crosscoders"] = {"batchtopk": settings["crosscoders"]["batchtopk"]}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    text = ""
    for arguments in (["run", str(folder / "run"), "--config", str(folder / "settings.yaml")], ["causal", str(folder / "run")]):
        result = subprocess.run([sys.executable, "-m", "crossdiff", *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        text += result.stdout + result.stderr
    return folder / "run", text


def test_the_terminal_says_it_and_shows_no_warning(run: tuple[Path, str]) -> None:
    text = one_line(run[1])
    assert text.count(SAME) == 2, "once per command"
    assert SAME_MODEL in text
    assert "Warning" not in text and "nan" not in text
    assert "undefined" in text, "the closed share of no gap"


def test_the_pages_say_it_first(run: tuple[Path, str]) -> None:
    report = read_run(run[0])
    assert report.same_model and answer(report)[0] == SAME_MODEL and caveats(report)[0] == SAME_MODEL
    assert lead(report) == SAME_MODEL
    assert report.concepts is not None and report.concepts.table.height == 0, "no latent says that the models differ"
    assert all(math.isnan(value) for value in report.concepts.summary.explained("replicated")), "there is nothing to explain"
    assert one_line((run[0] / "report.html").read_text()).count(SAME_MODEL) >= 1


def test_no_json_has_a_nan(run: tuple[Path, str]) -> None:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    files = [*run[0].rglob("*.json"), *run[0].rglob("*.jsonl")]
    assert {"health.json", "causal.json", "concepts.json", "train.jsonl"} < {file.name for file in files}
    for file in files:
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)
    halves = read_json(run[0] / "batchtopk" / "health.json")["controls"]["split_halves"]["nu_error"]
    assert halves["rank_correlation"] is None and halves["reason"] in ("all latents have the same nu", "fewer than 3 latents")
    closed = [
        result for result in read_json(run[0] / "batchtopk" / "causal.json")["results"] if result["closed"]["value"] is None
    ]
    assert closed and all(result["reason"] == "the KL of none is 0, so there is no gap to close" for result in closed)


def test_null_stands_for_what_is_undefined(tmp_path: Path) -> None:
    values: dict[str, Any] = {"a": float("nan"), "b": [1.5, (float("inf"), {"c": -float("inf")})], "d": "nan", "e": None}
    assert to_json(values) == '{"a": null, "b": [1.5, [null, {"c": null}]], "d": "nan", "e": null}'
    write_json(tmp_path / "values.json", values)
    assert number(read_json(tmp_path / "values.json")["a"]) != number(1.5) == 1.5


def test_equal_sources_are_seen_to_the_last_bit() -> None:
    h = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    moments = Moments.zero(2, 6)
    for part in h.split(20):
        moments.add([part, part.clone()])
    found = moments.finish()
    assert found.sources_equal
    difference = view_of(DifferenceConfig(), ("base", "chat")).matrix.double()
    with pytest.raises(
        UserError, match="the two models have the same activations on every token, so there is no difference to tr"
    ):
        found.scale_of(difference)
    constant = Moments.zero(2, 6)
    constant.add([torch.ones(50, 6), torch.full((50, 6), 2.0)])
    with pytest.raises(UserError, match="the activations do not vary over the training tokens"):
        constant.finish().scale_of(difference)
    other = h.clone()
    other[7, 3] += 1e-3
    moments = Moments.zero(2, 6)
    moments.add([h, other])
    assert not moments.finish().sources_equal
