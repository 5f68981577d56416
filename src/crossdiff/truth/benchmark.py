"""Train crosscoders on planted concepts, analyse them like any run, and compare the results with the truth.

The question is the one of the whole project: which latents are specific to the chat model? A latent's truth is the concept it
stands for. A latent that stands for no concept has no truth; it does not enter precision and AUROC and is counted separately.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU
from crossdiff.concepts.candidates import training_of
from crossdiff.config import DEFAULT_SEEDS, AnalyzeConfig, CrosscoderConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.crosscoder.train import train
from crossdiff.files import write_json
from crossdiff.latents.activity import Activity
from crossdiff.latents.behaviours import auroc
from crossdiff.latents.decoder import CHAT_ONLY
from crossdiff.latents.groups import cells_of
from crossdiff.latents.latent_table import latent_table
from crossdiff.latents.ranking import RANKS, plausible
from crossdiff.latents.scaling import ScalingAccumulator, Sums
from crossdiff.latents.stream import accumulate
from crossdiff.latents.twins import CoActivation, twin_candidates, twin_table
from crossdiff.latents.verdict import with_verdicts
from crossdiff.truth.concept_score import ConceptScore, concept_score
from crossdiff.truth.matching import match
from crossdiff.truth.planted import KINDS, Concepts, draw, plant, write_store
from crossdiff.truth.truth_config import TruthConfig

WELL_WITHIN = 0.7
"""The search for mu ends when L0 is within this part of its tolerance."""
FLATTEST, LARGEST_STEP = -0.2, 1.5
"""Bounds of the search: the smallest slope of log L0 over log mu, and the largest change of log mu."""
MATCHING_DOCUMENTS = 500
MATCHING_STREAM = 1
"""Latents are matched on separate documents, which are neither trained on nor analysed."""
RANKINGS = {
    "delta_norm": "delta_norm >= 0.9",
    "nu_error": "nu_error below its limit",
    "nu_reconstruction": "nu_reconstruction (with bias) below the limit of nu_reconstruction",
    "nu_reconstruction_nobias": "nu_reconstruction (without bias) below the limit of nu_reconstruction",
    "nu_activation_nobias": "nu_activation_nobias below the limit of nu_reconstruction",
    **dict.fromkeys(RANKS, "the same number of latents as there are chat-only ones, lowest first, none with a nu out of range"),
    "verdict": "verdict chat_specific",
}
RANKINGS_OF_ONE_DECODER = ("nu_activation_nobias",)


@dataclass(frozen=True)
class RankingScore:
    """How well one ranking finds the latents of chat-only concepts.

    Attributes:
        n_called: matched latents that the rule calls specific; n_unmatched: unmatched latents that it calls specific.
        precision: share of the called, matched latents that stand for a chat-only concept; NaN when none is called.
        recall: share of the chat-only concepts with a called latent.
        auroc: of the ranking over matched latents, those without a value last; for the verdict, of yes against no.
        wrong: number of wrongly called latents by the kind of their concept.
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
    """The result for one crosscoder.

    Attributes:
        mu: the L1 weight that was found, None for kinds without one; trials: number of trainings it took.
        l0_matched: whether the held-out L0 is within the tolerance of the first crosscoder's; always true for a coder with one
            decoder, which sees other concepts.
        found: kind -> share of its concepts that a latent stands for.
        verdicts: kind (or `none`) -> verdict -> number of live latents.
        concepts: how well the concepts of several trainings do; None with one training, or one decoder.
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
    scores: dict[str, RankingScore]
    concepts: ConceptScore | None


class Trained(NamedTuple):
    """A trained crosscoder with its held-out quality; `trials` is the number of trainings so far."""

    config: CrosscoderConfig
    crosscoder: Crosscoder
    l0: float
    fve: dict[str, float]
    trials: int

    @property
    def mu(self) -> float | None:
        """Weight of the sparsity penalty, None for kinds without one."""
        mu: float | None = getattr(self.config.sparsity, "mu", None)
        return mu


class Analysed(NamedTuple):
    """The latent table with verdicts, and the sums of latent scaling."""

    table: pl.DataFrame
    sums: Sums


def analysed(crosscoder: Crosscoder, store: Store, config: AnalyzeConfig) -> Analysed:
    """Run the pass and accumulators of `latents.analyze` without examples and quality."""
    device = crosscoder.encoder.device
    scaled = ScalingAccumulator(crosscoder, config.blocks, means=store.normalisation.mean)
    activity = Activity.empty(cells_of(store, tokenizer=None), crosscoder.n_latents, device)  # no template tokens to name
    coactive = CoActivation(twin_candidates(crosscoder, config.twin_cosine), crosscoder.n_latents, device)
    accumulate([(crosscoder, [scaled, activity, coactive])], store, config.blocks, config.batch_tokens)
    on_host = crosscoder.to(CPU)
    twins = twin_table(on_host, coactive, scaled.sums.n.sum(0)).filter(pl.col("n_both") > 0)
    return Analysed(with_verdicts(latent_table(on_host, scaled.sums, activity, config), twins, config), scaled.sums)


def _ranking(table: pl.DataFrame, name: str) -> npt.NDArray[np.float64]:
    """One number per latent, larger = more specific. Latents without a value, or that no list ranks by it, come last."""
    if name == "verdict":
        return table["chat_specific"].cast(pl.Float64).to_numpy()
    if name in RANKS:
        table = table.with_columns(pl.when(plausible(RANKS[name])).then(name))
    sign = 1.0 if name == "delta_norm" else -1.0
    return np.nan_to_num(sign * table[name].to_numpy(), nan=-np.inf)


def _called(table: pl.DataFrame, name: str, n_positive: int, config: AnalyzeConfig) -> npt.NDArray[np.bool_]:
    """The latents that a ranking's rule calls specific to the chat model; see `RANKINGS`."""
    value = _ranking(table, name)
    if name in RANKS:
        called = np.zeros(len(value), dtype=bool)
        called[np.argsort(-value, kind="stable")[:n_positive]] = True
        return called & np.isfinite(value)
    limits = {
        "delta_norm": CHAT_ONLY[0],
        "nu_error": -config.nu_error,
        "nu_reconstruction": -config.nu_reconstruction,
        "nu_reconstruction_nobias": -config.nu_reconstruction,
        "nu_activation_nobias": -config.nu_reconstruction,
        "verdict": 1.0,
    }
    reaches: npt.NDArray[np.bool_] = value >= limits[name]
    return reaches


def score(table: pl.DataFrame, n_concepts: int, name: str, config: AnalyzeConfig) -> RankingScore:
    """Score one ranking of a matched latent table, given the number of planted chat-only concepts."""
    kinds = table["kind"].to_numpy()
    matched = kinds != "none"
    positive = kinds == "chat_only"
    called = _called(table, name, int(positive.sum()), config)
    right = called & positive
    n_called = int((called & matched).sum())
    wrong = {kind: int((called & (kinds == kind)).sum()) for kind in KINDS if kind != "chat_only"}
    return RankingScore(
        rule=RANKINGS[name],
        n_called=n_called,
        n_unmatched=int((called & ~matched).sum()),
        precision=float(right.sum()) / n_called if n_called else math.nan,
        recall=table.filter(pl.Series(right))["concept"].n_unique() / n_concepts,
        auroc=auroc(positive[matched], _ranking(table, name)[matched].clip(-1e300, 1e300)),
        wrong={kind: n for kind, n in wrong.items() if n},
    )


def _matched(crosscoder: Crosscoder, store: Store, concepts: Concepts, config: TruthConfig) -> Analysed:
    """The analysis; its table also has `concept` (-1 for none), `kind` ("none" for none) and the two measures of the match."""
    planted = config.planted.model_copy(update={"documents": MATCHING_DOCUMENTS})
    fresh = draw(concepts, planted, MATCHING_STREAM)
    matches = match(crosscoder.to(CPU), concepts, fresh, config.match_cosine, config.match_correlation)
    kinds = torch.where(matches.concept >= 0, concepts.kind[matches.concept], -1)
    found = analysed(crosscoder, store, config.analyze)
    table = found.table.with_columns(
        concept=pl.Series(matches.concept.numpy()),
        kind=pl.Series(np.array([*KINDS, "none"])[kinds.numpy()]),
        match_cosine=pl.Series(matches.cosine.double().numpy()),
        match_correlation=pl.Series(matches.correlation.numpy()),
    )
    return Analysed(table, found.sums)


def _result(
    folder: Path, trained: Trained, store: Store, concepts: Concepts, config: TruthConfig, target: float | None
) -> CoderResult:
    """Analyse and score a trained crosscoder and its repetitions; writes latents.parquet."""
    own = _matched(trained.crosscoder, store, concepts, config)
    table = own.table
    table.write_parquet(folder / "latents.parquet")
    live = table.filter(pl.col("n_active") > 0)
    n_planted = dict(zip(KINDS, torch.bincount(concepts.kind, minlength=len(KINDS)).tolist(), strict=True))
    found = {kind: live.filter(kind=kind)["concept"].n_unique() / n for kind, n in n_planted.items() if n}
    verdicts = {kind: dict(live.filter(kind=kind)["verdict"].value_counts(sort=True).iter_rows()) for kind in (*KINDS, "none")}
    compares = trained.crosscoder.n_sources > 1
    rankings = RANKINGS if compares else RANKINGS_OF_ONE_DECODER
    scores = {name: score(table, config.planted.chat_only, name, config.analyze) for name in rankings}
    return CoderResult(
        architecture=trained.config.sparsity.kind,
        mu=trained.mu,
        trials=trained.trials,
        l0=trained.l0,
        l0_matched=target is None or not compares or abs(trained.l0 / target - 1) <= config.l0_tolerance,
        fve=trained.fve,
        n_dead=table.height - live.height,
        n_matched=table.filter(pl.col("kind") != "none").height,
        found=found,
        verdicts=verdicts,
        scores=scores,
        concepts=_concepts(folder, trained, own, store, concepts, config) if compares else None,
    )


def _concepts(
    folder: Path, trained: Trained, own: Analysed, store: Store, concepts: Concepts, config: TruthConfig
) -> ConceptScore | None:
    """Train the repetitions of a crosscoder with other seeds and score the concepts of all; None without repetitions."""
    matched, trainings = [own], [training_of(folder.name, trained.crosscoder, own.table, own.sums)]
    for number in range(1, trained.config.seeds or DEFAULT_SEEDS):
        again = trained.config.model_copy(
            update={"seed": trained.config.seed + number, "batch_seed": trained.config.order_seed}
        )
        device = trained.crosscoder.encoder.device
        crosscoder = _train(folder / f"seed{number}", store, again, config.analyze.batch_tokens, 1, device).crosscoder
        matched.append(_matched(crosscoder, store, concepts, config))
        trainings.append(training_of(f"seed{number}", crosscoder, matched[-1].table, matched[-1].sums))
    if len(trainings) == 1:
        return None
    tables = [each.table for each in matched]
    return concept_score(trainings, tables, config.planted.chat_only, store, config.analyze, config.concepts)


def _train(
    folder: Path, store: Store, config: CrosscoderConfig, batch_tokens: int, trials: int, device: torch.device
) -> Trained:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    crosscoder = train(folder, store, config, device).to(device)
    report = health(crosscoder, heldout_sums(crosscoder, store, "heldout", batch_tokens))
    return Trained(config, crosscoder, report["l0"], report["fve"], trials)


def _train_at(
    folder: Path,
    store: Store,
    config: CrosscoderConfig,
    target: float | None,
    settings: TruthConfig,
    say: Callable[[str], None],
    device: torch.device,
) -> Trained:
    """Train a crosscoder; one with a mu is trained with other mus until its held-out L0 is well within the target's tolerance.

    The search is a secant method in log mu and log L0 that starts with the slope -1.
    """
    slope, before = -1.0, (0.0, 0.0)
    for trial in range(1, settings.l0_trials + 1):
        trained = _train(folder, store, config, settings.analyze.batch_tokens, trial, device)
        mu = trained.mu
        say(f"{folder.name}: L0 {trained.l0:.2f}" + ("" if mu is None else f" at mu {mu:.4g}"))
        if target is None or mu is None:
            break
        here = math.log(mu)
        off = math.log(max(trained.l0, 1e-3) / target)
        if abs(off) < WELL_WITHIN * settings.l0_tolerance:
            break
        if trial > 1:
            slope = min(FLATTEST, (off - before[1]) / (here - before[0]))
        before = (here, off)
        step = max(-LARGEST_STEP, min(LARGEST_STEP, off / slope))
        sparsity = config.sparsity.model_copy(update={"mu": math.exp(here - step)})
        config = config.model_copy(update={"sparsity": sparsity})
    return trained


def benchmark(
    folder: Path, config: TruthConfig, say: Callable[[str], None] = lambda line: None, device: torch.device = CPU
) -> dict[str, CoderResult]:
    """Plant concepts, train on them, analyse and score; `say` gets lines of progress. Crosscoders are on `device`.

    Writes `activations/`, a folder per crosscoder and `truth.json` into `folder`.
    """
    concepts = plant(config.planted)
    store = write_store(folder / "activations", concepts, config.planted)
    say(f"{config.planted.n_concepts} concepts in {config.planted.d_model} dimensions, {store.n_tokens:,} tokens")
    results: dict[str, CoderResult] = {}
    target: float | None = None
    for name, settings in config.crosscoders.items():
        trained = _train_at(folder / name, store, settings, target, config, say, device)
        results[name] = _result(folder / name, trained, store, concepts, config, target)
        target = trained.l0 if target is None else target
    record = {name: asdict(result) for name, result in results.items()}
    write_json(folder / "truth.json", {"settings": config.model_dump(mode="json"), "crosscoders": record})
    return results
