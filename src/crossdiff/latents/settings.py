"""The settings that a crosscoder was analysed with, from the record that the analysis left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossdiff.config import AnalyzeConfig, validate
from crossdiff.files import read_json
from crossdiff.integrity import intact
from crossdiff.latents.ranking import PUBLISHED
from crossdiff.yaml_files import read_yaml

FILE, KEY, NUS = "health.json", "settings", "nus"
WITHOUT_EFFECT = {"batch_tokens", "examples", "examples_per_quantile", "pool_size", "seed"}
"""Settings of the analysis that change no verdict."""


def analysis_settings(folder: Path) -> AnalyzeConfig:
    """The settings that the crosscoder in `folder` was analysed with.

    Analyses of earlier versions hold no record of them; for those, the settings of the run are the nearest to it, or the
    defaults if it has none.

    Raises:
        UserError: the record is damaged.
    """
    path, run = folder / FILE, folder.parent / "config.yaml"
    found = read_json(intact(path)) if path.is_file() else {}
    if KEY in found:
        return validate(AnalyzeConfig, found[KEY], str(path))
    return validate(AnalyzeConfig, (read_yaml(run).get("analyze") if run.is_file() else None) or {}, str(run))


def verdict_settings(folder: Path) -> dict[str, Any]:
    """What the verdicts of the crosscoder in `folder` depend on, as JSON: settings, and the nus that are judged.

    Analyses of earlier versions hold no record of the nus; they judge by the published ones. Raises as `analysis_settings`.
    """
    path = folder / FILE
    nus = read_json(intact(path)).get(NUS, PUBLISHED) if path.is_file() else PUBLISHED
    return analysis_settings(folder).model_dump(mode="json", exclude=WITHOUT_EFFECT) | {NUS: list(nus)}
