"""What each stage depends on and what it leaves: a stage whose fingerprint has not changed is not run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdiff.config import RunConfig, SingleConfig, SteerConfig
from crossdiff.corpus import identify_dataset
from crossdiff.files import fingerprint, read_json, sha256
from crossdiff.run import Run, Stage
from crossdiff.sources import SOURCES

if TYPE_CHECKING:
    from crossdiff.causal.answers import Rules
    from crossdiff.interp.interpret_config import InterpretConfig
    from crossdiff.truth.truth_config import TruthConfig

CODE_FORMAT = 5
"""Raised when the results of the harvest, the comparison or steering change although the settings do not."""
TRAINING_FORMAT, ANALYSIS_FORMAT, CAUSAL_FORMAT, INTERPRETATION_FORMAT = 7, 8, 2, 1
TRUTH_FORMAT, CONCEPTS_FORMAT, LOOK_FORMAT, OVERLAP_FORMAT, PROMOTED_FORMAT = 5, 2, 2, 1, 1
"""The same for the other stages, each of its own, so that nothing is harvested again for them."""
ANALYSIS = (
    "latents.parquet", "twins.parquet", "neighbours.parquet", "activity.parquet", "examples.sqlite", "health.json",
    "behaviours.parquet", "scaling.safetensors",
)  # fmt: skip
OF_CHAIN = ("chain.parquet",)
"""Further files of the analysis of a crosscoder on more than two models."""
WITHOUT_EFFECT = {
    "crosscoders", "key_variable", "concurrency", "timeout", "attempts", "input_price", "output_price", "batch_tokens",
    "answer_limit",
}  # fmt: skip
"""Settings of the interpretation that change no result."""


UNSET = "unset"


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """What differs between two settings as plain data, as `layer: 5 -> 99`, down through mappings and lists."""
    if old == new:
        return []
    sides = [dict(enumerate(side)) if isinstance(side, list) else side for side in (old, new)]
    if not all(isinstance(side, dict) for side in sides):
        shown = (UNSET if side is None else side for side in (old, new))
        return [f"{key}: {' -> '.join(map(str, shown))}"]
    prefix = f"{key}." if key else ""
    keys = dict.fromkeys((*sides[0], *sides[1]))
    return [line for name in keys for line in differences(sides[0].get(name), sides[1].get(name), f"{prefix}{name}")]


def base_sae(config: RunConfig, name: str) -> str | None:
    """The run's SAE on the base model, if it has one: its latents are compared with a crosscoder's on the behaviours."""
    if config.trainings[name].inputs.kind != "paired":
        return None
    saes = (other for other, coder in config.crosscoders.items() if coder.inputs == SingleConfig(source="base"))
    return next(saes, None)


def harvest_stage(config: RunConfig) -> Stage:
    """Depends on the models' weights, the texts and the harvest settings."""
    from crossdiff.models.names import identify_all

    models = identify_all(config.model_of)
    texts = [identify_dataset(dataset) for dataset in config.dataset]
    value = {
        "code": CODE_FORMAT, **models, "layer": config.layer, "texts": texts,
        "settings": config.harvest.model_dump(exclude={"store"}),
        **config.model_dump(include={"model_dtype"}),
    }  # fmt: skip
    included = {*SOURCES, "models", "layer", "model_dtype", "dataset", "harvest"}
    settings = config.model_dump(mode="json", include=included, exclude={"harvest": {"store"}})
    contents = {source: model.get("digest") for source, model in models.items()}
    contents |= {dataset.title: found.get("sha256") for dataset, found in zip(config.dataset, texts, strict=True)}
    return Stage("harvest", fingerprint(value), ("activations",), settings | {"content": contents})


def look_stage(config: RunConfig) -> Stage:
    """Depends on the models' weights, the texts, how they are read, and the settings of the look."""
    value = {
        "code": LOOK_FORMAT, "harvest": harvest_stage(config).fingerprint,
        "settings": config.look.model_dump(exclude={"batch_tokens"}),
    }  # fmt: skip
    return Stage("look", fingerprint(value), ("look",))


def train_stage(config: RunConfig, name: str) -> Stage:
    """Depends on the store and on this crosscoder's settings; for a published one, on the content of its files."""
    coder = config.trainings[name]
    value = {"code": TRAINING_FORMAT, "harvest": harvest_stage(config).fingerprint}
    files: tuple[str, ...] = ("config.json", "model.safetensors")
    if coder.published is None:
        value["settings"] = coder.model_dump(exclude={"checkpoint_seconds", "seeds"})
        files = (*files, "train.jsonl")
    else:
        from crossdiff.published.in_run import identify

        value |= {"settings": coder.model_dump(exclude={"published"}), "published": identify(coder)}
    return _stage("train", name, value, files, ("harvest",))


def analyze_stage(config: RunConfig, name: str) -> Stage:
    """Depends on the crosscoder, on the SAE on the base model, and on the analysis settings."""
    reference = base_sae(config, name)
    value = {
        "code": ANALYSIS_FORMAT, "train": train_stage(config, name).fingerprint, "settings": config.analyze.model_dump(),
        "reference": None if reference is None else train_stage(config, reference).fingerprint,
    }  # fmt: skip
    trainings = (name,) if reference is None else (name, reference)
    coder = config.trainings[name]
    files = ANALYSIS + (OF_CHAIN if config.steps and coder.inputs.kind == "paired" and coder.published is None else ())
    return _stage("analyze", name, value, files, tuple(f"train/{training}" for training in trainings))


def promoted_stage(config: RunConfig, name: str) -> Stage:
    """Depends on the latent table, which says of which latents the promoted tokens are stored."""
    value = {"code": PROMOTED_FORMAT, "analyze": analyze_stage(config, name).fingerprint}
    return _stage("promoted", name, value, ("promoted.parquet",), (f"analyze/{name}",))


def concepts_stage(config: RunConfig, names: tuple[str, ...]) -> Stage:
    """Depends on the analyses of the trainings that take part and on the settings of the grouping."""
    analysed = {name: analyze_stage(config, name).fingerprint for name in names}
    value = {"code": CONCEPTS_FORMAT, "analyzed": analysed, "settings": config.concepts.model_dump()}
    return Stage("concepts", fingerprint(value), ("concepts",), needs=tuple(f"analyze/{name}" for name in names))


def overlap_stage(config: RunConfig, name: str, made_from: Stage) -> Stage:
    """Depends on the look and on what is compared with it: a crosscoder, or the concepts."""
    from crossdiff.look.reading import OVERLAP_FILE

    value = {"code": OVERLAP_FORMAT, "look": look_stage(config).fingerprint, "made_from": made_from.fingerprint}
    return _stage("overlap", name, value, (OVERLAP_FILE,), ("look", made_from.name))


def compare_stage(config: RunConfig, names: tuple[str, ...]) -> Stage:
    """Depends on the crosscoders and on the settings of the comparison."""
    trained = {name: train_stage(config, name).fingerprint for name in names}
    value = {"code": CODE_FORMAT, "train": trained, "settings": config.compare.model_dump()}
    return Stage("compare", fingerprint(value), ("comparison.json",), needs=tuple(f"train/{name}" for name in names))


def causal_stage(config: RunConfig, name: str) -> Stage:
    """Depends on the latent table (on the coder, where it has none), on the settings and on the list of interventions."""
    from crossdiff.causal.causal_test import OUTPUTS, load_experiment

    settings = config.causal
    is_paired = config.trainings[name].inputs.kind == "paired"
    needed = analyze_stage(config, name) if is_paired else train_stage(config, name)
    value = {
        "code": CAUSAL_FORMAT, "needed": needed.fingerprint, "settings": settings.model_dump(exclude={"interventions"}),
        "experiment": load_experiment(settings).model_dump(mode="json"),
    }  # fmt: skip
    return _stage("causal", name, value, OUTPUTS, (needed.name,))


def concept_causal_stage(config: RunConfig, names: tuple[str, ...]) -> Stage:
    """Depends on the concepts and on the settings of the causal test."""
    value = {
        "code": CAUSAL_FORMAT, "concepts": concepts_stage(config, names).fingerprint,
        "settings": config.causal.model_dump(exclude={"interventions", "pool"}),
    }  # fmt: skip
    files = ("concepts/causal.parquet", "concepts/causal.json")
    return Stage("causal/concepts", fingerprint(value), files, needs=("concepts",))


def report_stage(config: RunConfig, names: tuple[str, ...], run: Run) -> Stage:
    """Depends on every analysis, on the interpretations, causal tests and null diff of the run, and on the page's code."""
    from crossdiff.compare.null import FILE

    value = {
        "page": _identify_page(),
        "analysed": {name: analyze_stage(config, name).fingerprint for name in names},
        "others": {
            key: _made(run, key) for name in names for key in (f"interpret/{name}", f"causal/{name}", f"overlap/{name}")
        },
        "concepts": {key: _made(run, key) for key in ("concepts", "causal/concepts", "interpret/concepts", "overlap/concepts")},
        "look": _made(run, "look"),
        "null": read_json(run.path / FILE) if (run.path / FILE).is_file() else None,
    }
    return Stage("report", fingerprint(value), ("report.html", "figures"))


def _made(run: Run, name: str) -> tuple[str, str] | None:
    """What tells one result of a stage from another, with the same settings too."""
    record = run.record(name)
    return None if record is None else (record.fingerprint, record.finished)


def interpret_stage(config: RunConfig, name: str, settings: InterpretConfig) -> Stage:
    """Depends on the latent table, or on the concepts, and on the settings of the interpretation."""
    from crossdiff.interp.explanation_table import CONCEPTS, CONTEXTS_FILE, FILE, SUMMARY_FILE

    others = {"latents"} if name == CONCEPTS else {"concepts"}
    paired = tuple(key for key, coder in config.trainings.items() if coder.inputs.kind == "paired")
    needed = concepts_stage(config, paired) if name == CONCEPTS else analyze_stage(config, name)
    value = {
        "code": INTERPRETATION_FORMAT, "analyze": needed.fingerprint,
        "settings": settings.model_dump(exclude=WITHOUT_EFFECT | others),
    }  # fmt: skip
    # Explanations of latents stay valid when only the analysis changes.
    made_from = "concepts" if name == CONCEPTS else f"train/{name}"
    return _stage("interpret", name, value, (FILE, CONTEXTS_FILE, SUMMARY_FILE), (made_from,))


def steer_stage(config: RunConfig, name: str, settings: SteerConfig, rules: Rules) -> Stage:
    """Depends on the latent table, on the settings of the steering, and on the rules that find a behaviour in an answer."""
    title = f"{name}-{settings.latent}-{settings.mode}-{settings.model}"
    value = {
        "code": CODE_FORMAT, "analyze": analyze_stage(config, name).fingerprint,
        "settings": settings.model_dump(exclude={"rules"}), "rules": rules.model_dump(),
    }  # fmt: skip
    files = (f"steering/{title}.parquet", f"steering/{title}-rates.parquet")
    return Stage(f"steer/{title}", fingerprint(value), files, needs=(f"analyze/{name}",))


def truth_stage(config: TruthConfig) -> Stage:
    """Depends on the settings of the benchmark."""
    value = {"code": TRUTH_FORMAT, "settings": config.model_dump(mode="json", exclude={"device"})}
    return Stage("truth", fingerprint(value), ("activations", *config.crosscoders, "truth.json"))


def _stage(kind: str, name: str, value: dict[str, Any], files: tuple[str, ...], needs: tuple[str, ...]) -> Stage:
    return Stage(f"{kind}/{name}", fingerprint(value), tuple(f"{name}/{file}" for file in files), needs=needs)


def _identify_page() -> dict[str, str]:
    """A digest of every file that the report is made of."""
    folder = Path(__file__).parent.parent / "report"
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(folder)): sha256(file) for file in files}
