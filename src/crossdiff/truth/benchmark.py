"""Train crosscoders on planted concepts, analyse them as any run is analysed, and compare with the truth.

The question is the one of the whole project: which latents are specific to the chat model? A latent's truth is the concept that
it stands for; a latent that stands for none has no truth, is left out of precision and AUROC, and is counted apart.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, CrosscoderConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.crosscoder.train import train
from crossdiff.files import write_json
from crossdiff.latents.activity import Activity, group_of
from crossdiff.latents.behaviours import auroc
from crossdiff.latents.decoder import CHAT_ONLY
from crossdiff.latents.latent_table import latent_table
from crossdiff.latents.scaling import ScalingAccumulator
from crossdiff.latents.stream import chunks
from crossdiff.latents.twins import CoActivation, candidates, twin_table
from crossdiff.latents.verdict import with_verdicts
from crossdiff.truth.matching import match
from crossdiff.truth.planted import KINDS, Concepts, draw, plant, write_store
from crossdiff.truth.truth_config import TruthConfig

WELL_WITHIN = 0.7
"""Part of the tolerance of L0 at which the search for mu ends."""
FLATTEST, LARGEST_STEP = -0.2, 1.5
"""Of the search: the smallest slope of log L0 on log mu, and the largest change of log mu."""
MATCHING_DOCUMENTS = 500
MATCHING_STREAM = 1
"""Latents are matched on documents of their own, neither trained on nor analysed."""
RANKINGS = {
    "delta_norm": "delta_norm >= 0.9",
    "nu_error": "nu_error under its limit",
    "nu_reconstruction": "nu_reconstruction under its limit",
    "nu_activation_nobias": "nu_activation_nobias under the limit of nu_reconstruction",
    "rank_sum": "as many as there are chat-only latents, lowest first",
    "verdict": "verdict chat_specific",
}


OF_ONE_DECODER = ("nu_activation_nobias",)
"""The rankings that a coder with one decoder has."""


@dataclass(frozen=True)
class Score:
    """How one ranking finds the latents of chat-only concepts.

    Attributes:
        n_called: matched latents that the rule calls specific; n_unmatched: unmatched ones that it calls so.
        precision: share of the called, matched latents that stand for a chat-only concept; NaN when none is called.
        recall: share of the chat-only concepts with a called latent.
        auroc: of the ranking over matched latents, one without a value last; for the verdict of yes against no.
        wrong: the false ones by the kind of their concept.
    """

    rule: str
    n_called: int
    n_unmatched: int
    precision: float
    recall: float
    auroc: float
    wrong: dict[str, int]


@dataclass(frozen=True)
class CoderResult:
    """What one crosscoder makes of the planted concepts.

    Attributes:
        mu: weight of the L1 penalty that was found, None without one; trials: trainings that it took.
        l0_matched: whether the held-out L0 is within the tolerance of the first crosscoder's; a coder with one decoder, which
            sees other concepts, is not asked.
        found: kind -> share of its concepts that a latent stands for.
        verdicts: kind (or `none`) -> verdict -> number of live latents.
    """

    architecture: str
    mu: float | None
    trials: int
    l0: float
    l0_matched: bool
    fve: dict[str, float]
    n_dead: int
    n_matched: int
    found: dict[str, float]
    verdicts: dict[str, dict[str, int]]
    scores: dict[str, Score]


def analysed(crosscoder: Crosscoder, store: Store, config: AnalyzeConfig) -> pl.DataFrame:
    """The latent table with verdicts, from the same accumulators as `latents.analyze`, without the examples."""
    groups, norms = group_of(store.column("flags")), crosscoder.norms().sum(1)
    scaled = ScalingAccumulator(crosscoder, config.blocks, means=store.normalisation.mean)
    activity = Activity.empty(crosscoder.n_latents)
    coactive = CoActivation(candidates(crosscoder, config.twin_cosine), crosscoder.n_latents)
    for chunk in chunks(crosscoder, store, config.blocks, config.batch_tokens):
        scaled.add(chunk)
        activity.add(chunk, groups[chunk.rows], norms)
        coactive.add(chunk)
    sums = scaled.finish()
    twins = twin_table(crosscoder, coactive, sums.n.sum(0)).filter(pl.col("n_both") > 0)
    return with_verdicts(latent_table(crosscoder, sums, activity, config), twins, config)


def _ranking(table: pl.DataFrame, name: str) -> npt.NDArray[np.float64]:
    """One number a latent, larger = more specific; a latent without a value is last."""
    if name == "verdict":
        return table["chat_specific"].cast(pl.Float64).to_numpy()
    sign = 1.0 if name == "delta_norm" else -1.0
    return np.nan_to_num(sign * table[name].to_numpy(), nan=-np.inf)


def _called(table: pl.DataFrame, name: str, n_positive: int, config: AnalyzeConfig) -> npt.NDArray[np.bool_]:
    """The latents that a ranking's rule calls specific to the chat model; see `RANKINGS`."""
    value = _ranking(table, name)
    called: npt.NDArray[np.bool_]
    if name == "rank_sum":
        called = np.zeros(len(value), dtype=bool)
        called[np.argsort(-value, kind="stable")[:n_positive]] = True
        return called & np.isfinite(value)
    limits = {
        "delta_norm": CHAT_ONLY[0],
        "nu_error": -config.nu_error,
        "nu_reconstruction": -config.nu_reconstruction,
        "nu_activation_nobias": -config.nu_reconstruction,
        "verdict": 1.0,
    }
    called = value >= limits[name]
    return called


def score(table: pl.DataFrame, kinds: npt.NDArray[Any], n_concepts: int, name: str, config: AnalyzeConfig) -> Score:
    """Score one ranking of a latent table with the columns of the match.

    Args:
        kinds: kind of each latent's concept, "none" where it has none.
        n_concepts: number of chat-only concepts that were planted.
    """
    matched, positive = kinds != "none", kinds == "chat_only"
    called = _called(table, name, int(positive.sum()), config)
    right = called & positive
    found = len(set(table["concept"].to_numpy()[right].tolist()))
    n_called = int((called & matched).sum())
    wrong = {kind: int((called & (kinds == kind)).sum()) for kind in KINDS if kind != "chat_only"}
    return Score(
        rule=RANKINGS[name],
        n_called=n_called,
        n_unmatched=int((called & ~matched).sum()),
        precision=float(right.sum()) / n_called if n_called else math.nan,
        recall=found / n_concepts,
        auroc=auroc(positive[matched], _ranking(table, name)[matched].clip(-1e300, 1e300)),
        wrong={kind: n for kind, n in wrong.items() if n},
    )


def judge_coder(
    folder: Path, crosscoder: Crosscoder, store: Store, concepts: Concepts, config: TruthConfig
) -> tuple[pl.DataFrame, npt.NDArray[Any]]:
    """The latent table with `concept`, `match_cosine` and `match_correlation` (written as latents.parquet), and the kinds."""
    planted = config.planted
    fresh = draw(concepts, planted.model_copy(update={"documents": MATCHING_DOCUMENTS}), MATCHING_STREAM)
    matches = match(crosscoder, concepts, fresh, config.match_cosine, config.match_correlation)
    table = analysed(crosscoder, store, config.analyze)
    kinds = np.array([*KINDS, "none"])[torch.where(matches.concept >= 0, concepts.kind[matches.concept], -1).numpy()]
    table = table.with_columns(
        concept=pl.Series(matches.concept.numpy()),
        kind=pl.Series(kinds),
        match_cosine=pl.Series(matches.cosine.double().numpy()),
        match_correlation=pl.Series(matches.correlation.numpy()),
    )
    table.write_parquet(folder / "latents.parquet")
    return table, kinds


def _result(
    folder: Path, trained: _Trained, store: Store, concepts: Concepts, config: TruthConfig, target: float | None
) -> CoderResult:
    table, kinds = judge_coder(folder, trained.crosscoder, store, concepts, config)
    alive = table["n_active"].to_numpy() > 0
    concept_kind = np.array(KINDS)[concepts.kind.numpy()]
    found = {
        kind: len(set(table["concept"].to_numpy()[alive & (kinds == kind)].tolist())) / int((concept_kind == kind).sum())
        for kind in KINDS
        if (concept_kind == kind).any()
    }
    verdicts = {
        kind: dict(table.filter(pl.Series(alive & (kinds == kind)))["verdict"].value_counts(sort=True).iter_rows())
        for kind in (*KINDS, "none")
    }
    compares = trained.crosscoder.n_sources > 1
    rankings = RANKINGS if compares else OF_ONE_DECODER
    scores = {name: score(table, kinds, config.planted.chat_only, name, config.analyze) for name in rankings}
    return CoderResult(
        architecture=trained.config.sparsity.kind,
        mu=_mu(trained.config),
        trials=trained.trials,
        l0=trained.l0,
        l0_matched=target is None or not compares or abs(trained.l0 / target - 1) <= config.l0_tolerance,
        fve=trained.fve,
        n_dead=int((~alive).sum()),
        n_matched=int((kinds != "none").sum()),
        found=found,
        verdicts=verdicts,
        scores=scores,
    )


@dataclass(frozen=True)
class _Trained:
    config: CrosscoderConfig
    crosscoder: Crosscoder
    l0: float
    fve: dict[str, float]
    trials: int


def _mu(config: CrosscoderConfig) -> float | None:
    """The weight of the sparsity penalty, for the kinds of crosscoder that have one."""
    mu: float | None = getattr(config.sparsity, "mu", None)
    return mu


def _train(folder: Path, store: Store, config: CrosscoderConfig, batch_tokens: int, trials: int) -> _Trained:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    crosscoder = train(folder, store, config)
    report = health(crosscoder, heldout_sums(crosscoder, store, "heldout", batch_tokens))
    return _Trained(config, crosscoder, report["l0"], report["fve"], trials)


def _train_at(
    folder: Path,
    store: Store,
    config: CrosscoderConfig,
    target: float | None,
    settings: TruthConfig,
    say: Callable[[str], None],
) -> _Trained:
    """Train; a crosscoder with a mu again with another one, until its held-out L0 is well within the tolerance of the target.

    The search is a secant in log mu and log L0, which starts with the slope -1.
    """
    slope, before = -1.0, (0.0, 0.0)
    for trial in range(1, settings.l0_trials + 1):
        trained, mu = _train(folder, store, config, settings.analyze.batch_tokens, trial), _mu(config)
        say(f"{folder.name}: L0 {trained.l0:.2f}" + ("" if mu is None else f" at mu {mu:.4g}"))
        if target is None or mu is None:
            break
        here, off = math.log(mu), math.log(max(trained.l0, 1e-3) / target)
        if abs(off) < WELL_WITHIN * settings.l0_tolerance:
            break
        if trial > 1:
            slope = min(FLATTEST, (off - before[1]) / (here - before[0]))
        before = (here, off)
        step = max(-LARGEST_STEP, min(LARGEST_STEP, off / slope))
        sparsity = config.sparsity.model_copy(update={"mu": math.exp(here - step)})
        config = config.model_copy(update={"sparsity": sparsity})
    return trained


def benchmark(folder: Path, config: TruthConfig, say: Callable[[str], None] = lambda line: None) -> dict[str, CoderResult]:
    """Plant, train, analyse, score; writes `activations/`, a folder per crosscoder and `truth.json` into `folder`.

    Args:
        say: called with a line of progress.
    """
    concepts = plant(config.planted)
    store = write_store(folder / "activations", concepts, config.planted)
    say(f"{config.planted.n_concepts} concepts in {config.planted.d_model} dimensions, {store.n_tokens:,} tokens")
    results: dict[str, CoderResult] = {}
    target: float | None = None
    for name, settings in config.crosscoders.items():
        trained = _train_at(folder / name, store, settings, target, config, say)
        results[name] = _result(folder / name, trained, store, concepts, config, target)
        target = trained.l0 if target is None else target
    record = {name: asdict(result) for name, result in results.items()}
    write_json(folder / "truth.json", {"settings": config.model_dump(mode="json"), "crosscoders": record})
    return results
