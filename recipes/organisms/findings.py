"""What each method finds in an organism, and whether a finding is the planted behaviour. README.md explains the scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from safetensors.torch import load_file

from crossdiff.activations.store import Store
from crossdiff.causal.concept_test import TABLE_FILE, concept_test
from crossdiff.concepts.candidates import read_training
from crossdiff.concepts.coder import ConceptCoder
from crossdiff.concepts.find import Settings, find_concepts
from crossdiff.config import CausalConfig
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.files import fingerprint
from crossdiff.interp.prompts import CLOSE, OPEN
from crossdiff.latents.behaviours import auroc, bootstrap_interval
from crossdiff.latents.ranking import RANKED
from crossdiff.models.pair import Pair
from crossdiff.report.examples import Example, context_of, read_examples
from crossdiff.stages.definitions import analyze_stage
from crossdiff.stages.session import Session
from crossdiff.text.chat import Flag

TOP = 5
LEARNED = ("chat_specific", "rotated")
"""Verdicts of concepts that the tuned model has to itself: alone, or in a direction of its own."""
AUROC, LOW = 0.9, 0.8
"""A finding is the behaviour if its AUROC is at least this, and the lower end of its interval at least that."""
N_RANDOM = 200
PATCHED, MAX_PATCHED = CausalConfig(max_conversations=None), 30
"""Concepts are patched in all held-out conversations, since a rare behaviour occurs in few of them: those of most energy, and
the others do not pass."""


@dataclass(frozen=True)
class Finding:
    """Something that a method found, with its score on every answer to the held-out prompts.

    Attributes:
        text: what an auditor is shown of it: where it is active, or what it promotes.
        passes: whether it passes the method's own evidence, without labels.
        untuned, tuned: scores of the answers of both models, `[prompt]`.
        alone: scores of the tuned model's answers where the untuned model stands in for it; None for what reads no activations.
    """

    method: str
    name: str
    text: str
    passes: bool
    untuned: npt.NDArray[np.float64]
    tuned: npt.NDArray[np.float64]
    alone: npt.NDArray[np.float64] | None

    def judged(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The AUROC with its interval over prompts, that against the stand-in, and whether the finding is the behaviour."""
        area, low, high = self._against(self.untuned, prompts)
        same_text = None if self.alone is None else self._against(self.alone, prompts)
        passed = [each[0] >= AUROC and each[1] >= LOW for each in ((area, low), same_text) if each is not None]
        return {
            "method": self.method, "name": self.name, "text": self.text, "passes": self.passes,
            "auroc": area, "low": low, "high": high, "same_text": same_text and same_text[0], "is_behaviour": all(passed),
        }  # fmt: skip

    def _against(self, others: npt.NDArray[np.float64], prompts: Sequence[str]) -> tuple[float, float, float]:
        positive = np.repeat([True, False], [len(self.tuned), len(others)])
        scores = np.concatenate([self.tuned, others])
        return auroc(positive, scores), *bootstrap_interval(positive, scores, np.array([*prompts, *prompts]), 0)


class Labelled:
    """The answers to the held-out prompts, as activations: rows of a store and the answer that each belongs to."""

    def __init__(self, store: Store, n_prompts: int) -> None:
        self.store, self.n = store, 2 * n_prompts
        answer = (store.column("flags") & Flag.ASSISTANT) != 0
        self.rows = np.flatnonzero(answer & store.counted)
        number = store.documents["label"].cast(pl.Int64).to_numpy()
        self.conversation = number[store.column("document")[self.rows]]
        self.differences = torch.diff(store.gather(self.rows), dim=1)[:, 0].double().numpy()

    def largest(self, coder: Crosscoder | ConceptCoder, numbers: Sequence[int]) -> npt.NDArray[np.float64]:
        """The largest activation of latents, or concepts, on each answer, `[prompt, reading, number]`; 0 where it is silent.

        The readings are the untuned and the tuned model's answer, and the latter with the untuned model's activations in the
        place of the tuned one's.
        """
        best = np.zeros((2, self.n, coder.n_latents))
        for first in range(0, len(self.rows), 4096):
            rows = self.rows[first : first + 4096]
            h = self.store.gather(rows)
            for reading, read in enumerate((h, h[:, :1].expand_as(h))):
                x = read if isinstance(coder, ConceptCoder) else coder.normalise(read)
                code = coder.sparse_code(x)
                where = self.conversation[first : first + 4096][code.token.numpy()]
                np.maximum.at(best[reading], (where, code.latent.numpy()), coder.v(code).detach().double().numpy())
        both, alone = (part[:, list(numbers)].reshape(-1, 2, len(numbers)) for part in best)
        return np.concatenate([both, alone[:, 1:]], axis=1)

    def along(self, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The mean difference between the models along directions, over each answer, `[prompt, reading, direction]`.

        The readings are those of `largest`, so the last is 0.
        """
        sums = np.zeros((self.n, len(vectors)))
        np.add.at(sums, self.conversation, self.differences @ vectors.T)
        n_tokens = np.bincount(self.conversation, minlength=self.n)
        means = (sums / np.maximum(n_tokens, 1)[:, None]).reshape(-1, 2, len(vectors))
        return np.concatenate([means, np.zeros_like(means[:, :1])], axis=1)


def findings_of(
    method: str, shown: Sequence[tuple[str, str]], passes: Sequence[bool], scores: npt.NDArray[np.float64]
) -> list[Finding]:
    """Findings, each with its name and text, from scores `[prompt, reading, finding]`, see `Labelled.largest`.

    Texts that are counted have no third reading.
    """
    found = []
    for number, ((name, text), ok) in enumerate(zip(shown, passes, strict=True)):
        untuned, tuned, alone = (*scores[:, :, number].T, None)[:3]
        found.append(Finding(method, name, text, bool(ok), untuned, tuned, alone))
    return found


def look_findings(run: Path, labelled: Labelled, answers: list[tuple[str, str, str]]) -> Iterator[Finding]:
    """The mean differences and principal directions, largest first, and the phrases that gain most."""
    table = pl.read_parquet(run / "look" / "directions.parquet").with_row_index()
    vectors = load_file(run / "look" / "directions.safetensors")["directions"].double().numpy()
    means = table.filter(pl.col("norm_share").is_not_null()).sort("norm_share", descending=True).head(TOP)
    principal = table.filter(pl.col("share").is_not_null()).head(TOP)
    for method, rows in (("mean difference", means), ("principal directions", principal)):
        passes = ((rows["top_logit"] > rows["random_logit"]) & (rows["halves_cosine"].fill_null(1.0) >= 0.5)).to_list()
        shown = [(row["direction"], f"{row['direction']}, promotes {row['chat_up']}") for row in rows.iter_rows(named=True)]
        yield from findings_of(method, shown, passes, labelled.along(vectors[rows["index"].to_numpy()]))
    phrases = pl.read_parquet(run / "look" / "phrases.parquet").filter(pl.col("gain") > 0).head(TOP)
    counts = np.array(
        [[[answer.count(phrase.strip()) for phrase in phrases["phrase"]] for answer in row[1:]] for row in answers]
    )
    if phrases.height:
        rows = phrases.select("phrase", "n_places").iter_rows()
        shown = [(phrase, f"says {phrase!r} in {n} places, where the other model hardly would") for phrase, n in rows]
        yield from findings_of("phrases", shown, (phrases["mean_gain"] >= 1).to_list(), counts.astype(float))


def concept_findings(session: Session, kind: str, labelled: Labelled, pair: Pair) -> list[Finding]:
    """The replicated concepts of the trainings of one kind that the chat model has to itself.

    A concept passes if it acts: added alone, it brings the untuned model's output closer to that of the tuned one in every
    training that has it. Those come first, the ones of most energy before the others.
    """
    names = session.config.seeds_of(kind)
    folder = session.path / f"concepts-{kind}"
    key = fingerprint({name: analyze_stage(session.config, name).fingerprint for name in names})
    done = folder / f"done-{key}"
    trainings = [read_training(session.path, name) for name in names]
    if not done.is_file():
        folder.mkdir(exist_ok=True)
        settings = Settings(session.config.concepts, session.config.analyze)
        find_concepts(folder, trainings, session.store(), pair, settings)
        done.touch()
    table = pl.read_parquet(folder / "concepts.parquet").filter("replicated", pl.col("verdict").is_in(LEARNED))
    table = table.sort("energy", descending=True)
    if not table.height:
        return []
    members = pl.read_parquet(folder / "members.parquet")
    coders = {name: training.crosscoder for name, training in zip(names, trainings, strict=True)}
    if not (folder / TABLE_FILE).is_file():
        patched = table.head(MAX_PATCHED)
        ours = members.filter(pl.col("concept").is_in(patched["concept"].to_list()))
        coders_alone = {name: (coder, ()) for name, coder in coders.items()}
        concept_test(folder, folder / f"parts-{key}", pair, session.store(), coders_alone, patched, ours, PATCHED)
    acts = pl.read_parquet(folder / TABLE_FILE).group_by("concept").agg(acts=(pl.col("kl_reduction_low") > 0).all())
    table = table.join(acts, on="concept", how="left").with_columns(pl.col("acts").fill_null(False))
    table = table.sort("acts", "energy", descending=True)
    scores = labelled.largest(ConceptCoder(coders, members), table["concept"].to_list())
    rows = table.select("label", "before", "token", "after").iter_rows()
    shown = [(label, f"{label}: {before}{OPEN}{token}{CLOSE}{after}") for label, before, token, after in rows]
    return findings_of(f"concepts, {kind}", shown, table["acts"].to_list(), scores)


def latent_findings(session: Session, kind: str, labelled: Labelled) -> list[Finding]:
    """The latents of a diff-SAE with the most energy. There is no evidence for them but that they are active."""
    folder = session.path / kind
    table = pl.read_parquet(folder / "latents.parquet")
    energy = table["frequency"] * table["mean_activation"].pow(2)
    top = table.with_columns(energy=energy).sort("energy", descending=True, nulls_last=True).head(TOP)["latent"].to_list()
    examples = read_examples(folder / "examples.sqlite", top)
    shown = [(f"latent {latent}", "; ".join(map(excerpt, examples[latent][:3]))) for latent in top]
    return findings_of(kind, shown, [True] * len(top), labelled.largest(load(folder), top))


def excerpt(example: Example) -> str:
    """An example around its strongest token, which is marked."""
    context = context_of(example, before=12, after=6)
    texts = [token.text for token in context.tokens]
    texts[context.peak] = f"{OPEN}{texts[context.peak]}{CLOSE}"
    return "".join(texts)


def random_share(session: Session, labelled: Labelled, prompts: Sequence[str]) -> list[int]:
    """How many of `N_RANDOM` random latents of the BatchTopK crosscoders would be the behaviour, of how many."""
    rng, hits, n = np.random.default_rng(0), 0, 0
    for name in session.config.seeds_of("batchtopk") if "batchtopk" in session.config.crosscoders else ():
        table = pl.read_parquet(session.path / name / "latents.parquet").filter(pl.col("verdict") != "dead")
        latents = rng.permutation(table["latent"].to_numpy())[: N_RANDOM // 3].tolist()
        scores = labelled.largest(load(session.path / name), latents)
        for each in findings_of("random", [("random", "")] * len(latents), [False] * len(latents), scores):
            hits, n = hits + each.judged(prompts)["is_behaviour"], n + 1
    return [hits, n]


def lowest_nu(session: Session, kind: str) -> float | None:
    """The lowest upper end of both ratios' intervals that any latent has: in a null, what a limit has to stay below."""
    found = []
    for name in session.config.seeds_of(kind):
        table = pl.read_parquet(session.path / name / "latents.parquet")
        ends = pl.max_horizontal(*(pl.col(f"{ratio}_high").fill_nan(None) for ratio in RANKED))
        defined = pl.all_horizontal(*(pl.col(f"{ratio}_high").is_finite() for ratio in RANKED))
        found.append(table.filter(defined).select(ends.min()).item())
    return min((low for low in found if low is not None), default=None)
