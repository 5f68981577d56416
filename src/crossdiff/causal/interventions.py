"""Interventions as data: what is added to the base model's activations, on which tokens, and which model continues.

    h = h^base + sum of the parts, on the chosen tokens; h^base elsewhere          (docs/method.md#causal-test)

Every part is a difference, chat minus base, so the parts add up:

- all latents + bias + error = activation, the full swap;
- all latents + bias = the chat reconstruction with the base error;
- error alone = the base reconstruction with the chat error.

An intervention that starts from the chat model takes the parts away, so that base and chat change places. One may also start
from a reconstruction, without its error.

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


Use = Literal["difference", "chat", "projection", "complement"]


class LatentsPart(Config):
    """What a set T of latents contributes.

    use: `difference`, sum_{j in T} f_j (d_j^chat - d_j^base); `chat`, sum_{j in T} f_j d_j^chat, without taking the base part
    out; `projection`, the models' difference projected onto the span of the d_j^chat; `complement`, the rest of the difference.
    """

    kind: Literal["latents"] = "latents"
    latents: Selection
    use: Use = "difference"


class DifferencePart(Config):
    """The difference of the reconstructions' biases (`bias`), of the reconstruction errors, or of the activations."""

    kind: Literal["bias", "error", "activation"]


class MeanDifferencePart(Config):
    """The mean of h^chat - h^base over the training conversations: one vector, or one per group of tokens."""

    kind: Literal["mean_difference"]
    over: Literal["conversations", "token_group"] = "conversations"


class PrincipalPart(Config):
    """The models' difference projected onto some of its principal directions over the training conversations, or the rest."""

    kind: Literal["principal"]
    components: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="numbers; 0 has the largest variance")
    complement: bool = Field(False, description="add the rest of the difference instead")


OtherPart = DifferencePart | MeanDifferencePart | PrincipalPart
Part = Annotated[LatentsPart | OtherPart, Field(discriminator="kind")]


class FirstTokens(Config):
    """The first k content tokens of each of the assistant's messages."""

    kind: Literal["first"]
    k: int = Field(ge=1)
    template: bool = Field(False, description="the template tokens as well")


PatchedTokens = Literal["all", "template", "content"] | FirstTokens
Start = Literal["base", "chat", "base_reconstruction", "chat_reconstruction"]
Measure = Literal["nll", "kl_base", "cross_entropy"]
ONE_DECODER = "a coder of the difference has no directions and no reconstructions of the two models"


class Intervention(Config):
    """One entry of the list. It has one arm, or several if its latents are several sets (random seeds, single latents)."""

    name: str = Field(pattern=r"^[a-z0-9_.]+$")
    start: Start = Field("base", description="what is edited; from the chat side, the differences are taken away")
    add: tuple[Part, ...] = Field((), description="differences added to the base activations")
    tokens: PatchedTokens = Field("all", description="tokens to edit; content means all but the template tokens")
    continues: Literal["chat", "base"] = Field("chat", description="model whose upper layers continue")

    @property
    def rankings(self) -> set[str]:
        """The rankings of latents that it needs."""
        return {ranking for part in self.add if isinstance(part, LatentsPart) for ranking in rankings_of(part.latents)}

    @property
    def needs_both_models(self) -> bool:
        """Whether it needs each model's directions or reconstruction, which a coder of the difference does not have."""
        uses = {part.use for part in self.add if isinstance(part, LatentsPart)}
        return self.start.endswith("reconstruction") or bool(uses - {"difference"})


class Comparison(Config):
    """KL(worse) - KL(better), paired over conversations; positive where `better` is nearer to the chat model."""

    name: str
    better: str
    worse: str


class Experiment(Config):
    """The content of the YAML file."""

    interventions: tuple[Intervention, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()
    measures: tuple[Measure, ...] = Field(
        (),
        description="measures beside kl: the answer's nll, kl_base (KL from the base model's distributions), and cross_entropy "
        "to the chat model's likeliest token",
    )

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
        others: the parts other than latents.
        outside: number of latents that the ranking left out because of their nu; None if it leaves none out.
    """

    name: str
    intervention: str
    latents: tuple[int, ...] | None
    latent: int | None
    others: tuple[OtherPart, ...]
    tokens: PatchedTokens
    continues: Literal["chat", "base"]
    outside: int | None = None
    use: Use = "difference"
    start: Start = "base"


class Arms(NamedTuple):
    """The arms of an experiment on one crosscoder, and the reason per intervention without one."""

    arms: tuple[Arm, ...]
    left_out: dict[str, str]


def make_arms(experiment: Experiment, table: pl.DataFrame, pool: int, seed: int, n_decoders: int = 2) -> Arms:
    """Resolve the latents of each intervention on a latent table.

    Args:
        pool: number of latents that are ranked against each other (see `latent_sets.pool_of`).
        n_decoders: 1 for a coder of the difference.
    """
    arms: list[Arm] = []
    left_out = {}
    for intervention in experiment.interventions:
        if n_decoders == 1 and intervention.needs_both_models:
            left_out[intervention.name] = ONE_DECODER
            continue
        selections = [part.latents for part in intervention.add if isinstance(part, LatentsPart)]
        others = tuple(part for part in intervention.add if not isinstance(part, LatentsPart))
        uses = [part.use for part in intervention.add if isinstance(part, LatentsPart)]
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
                Arm(
                    name, intervention.name, latents, single, others, intervention.tokens, intervention.continues,
                    sets.outside, next(iter(uses), "difference"), intervention.start,
                )
            )  # fmt: skip
    return Arms(tuple(arms), left_out)
