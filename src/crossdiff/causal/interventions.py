"""Interventions as data: what is added to the base model's activations, on which tokens, and which model continues.

    h = h^base + sum of the parts, on the chosen tokens; h^base elsewhere          (docs/method.md#causal-test)

Every part is a difference, chat minus base, so the parts add up:

- all latents + bias + error = activation, the full swap;
- all latents + bias = the chat reconstruction with the base error;
- error alone = the base reconstruction with the chat error.

A YAML file lists the interventions and the comparisons between them. `interventions.yaml` is the default list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import polars as pl
from pydantic import Field, model_validator

from crossdiff.causal.latent_sets import LatentSets, Selection, Unavailable, rankings_of, resolve
from crossdiff.config import Config, validate
from crossdiff.errors import UserError
from crossdiff.yaml_files import read_yaml

DEFAULT = Path(__file__).with_name("interventions.yaml")


class LatentsPart(Config):
    """sum_{j in T} f_j (d_j^chat - d_j^base)."""

    kind: Literal["latents"] = "latents"
    latents: Selection


class DifferencePart(Config):
    """The difference of the reconstructions' biases (`bias`), of the reconstruction errors, or of the activations."""

    kind: Literal["bias", "error", "activation"]


class MeanDifferencePart(Config):
    """The mean of h^chat - h^base over the training conversations: one vector, or one per group of tokens."""

    kind: Literal["mean_difference"]
    over: Literal["conversations", "token_group"] = "conversations"


Part = Annotated[LatentsPart | DifferencePart | MeanDifferencePart, Field(discriminator="kind")]
PatchedTokens = Literal["all", "template", "content"]


class Intervention(Config):
    """One entry of the list. It has one arm, or several if its latents are several sets (random seeds, single latents)."""

    name: str = Field(pattern=r"^[a-z0-9_.]+$")
    add: tuple[Part, ...] = Field((), description="differences added to the base activations")
    tokens: PatchedTokens = Field("all", description="tokens to edit; content means all but the template tokens")
    continues: Literal["chat", "base"] = Field("chat", description="model whose upper layers continue")

    @property
    def rankings(self) -> set[str]:
        """The rankings of latents that it needs."""
        return {ranking for part in self.add if isinstance(part, LatentsPart) for ranking in rankings_of(part.latents)}


class Comparison(Config):
    """KL(worse) - KL(better), paired over conversations; positive where `better` is nearer to the chat model."""

    name: str
    better: str
    worse: str


class Experiment(Config):
    """The content of the YAML file."""

    interventions: tuple[Intervention, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()

    @model_validator(mode="after")
    def _names_are_known_and_unique(self) -> Experiment:
        names = [intervention.name for intervention in self.interventions]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two interventions are called {name!r}")
        for comparison in self.comparisons:
            for name in (comparison.better, comparison.worse):
                if name not in names:
                    raise ValueError(f"the comparison {comparison.name!r} names {name!r}, which is not an intervention")
        for intervention in self.interventions:
            if sum(isinstance(part, LatentsPart) for part in intervention.add) > 1:
                raise ValueError(
                    f"{intervention.name!r} adds latents twice; put them into one part, or their contributions count twice"
                )
        return self


def read_experiment(path: Path) -> Experiment:
    """Read an experiment from a YAML file; a `UserError` names the wrong entry."""
    return validate(Experiment, read_yaml(path), str(path))


@dataclass(frozen=True)
class Arm:
    """One condition of the experiment, with its latents resolved.

    Attributes:
        latents: numbers of the latents that contribute; None for all, empty for none.
        latent: the latent that is measured alone, if the arm is one of single latents.
        others: kinds of the parts other than latents.
        outside: number of latents that the ranking left out because of their nu; None if it leaves none out.
    """

    name: str
    intervention: str
    latents: tuple[int, ...] | None
    latent: int | None
    others: tuple[str, ...]
    tokens: PatchedTokens
    continues: Literal["chat", "base"]
    outside: int | None = None


class Arms(NamedTuple):
    """The arms of an experiment on one crosscoder, and the reason per intervention without one."""

    arms: tuple[Arm, ...]
    left_out: dict[str, str]


def _kind(part: Part) -> str:
    return f"mean_difference_{part.over}" if isinstance(part, MeanDifferencePart) else part.kind


def make_arms(experiment: Experiment, table: pl.DataFrame, pool: int, seed: int) -> Arms:
    """Resolve the latents of each intervention on a latent table.

    Args:
        pool: number of latents that are ranked against each other (see `latent_sets.pool_of`).
    """
    arms: list[Arm] = []
    left_out = {}
    for intervention in experiment.interventions:
        selections = [part.latents for part in intervention.add if isinstance(part, LatentsPart)]
        others = tuple(_kind(part) for part in intervention.add if not isinstance(part, LatentsPart))
        try:
            sets = resolve(selections[0], table, pool, seed) if selections else LatentSets({"": ()})
        except UserError as error:
            raise UserError(f"intervention {intervention.name!r}: {error}") from None
        except Unavailable as reason:
            left_out[intervention.name] = str(reason)
            continue
        for suffix, latents in sets.sets.items():
            if selections and latents == ():
                left_out[intervention.name] = "no latent of this crosscoder is in the set"
                continue
            single = latents[0] if sets.single and latents else None
            name = f"{intervention.name}_{suffix}" if suffix else intervention.name
            arms.append(
                Arm(name, intervention.name, latents, single, others, intervention.tokens, intervention.continues, sets.outside)
            )
    return Arms(tuple(arms), left_out)
