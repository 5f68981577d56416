"""One verdict per latent, with its reason in words (docs/method.md#latent-scaling; Minder, Dumas et al. 2025).

A verdict answers one question: which model has the concept? It rests on the ends of the 95% intervals, never on point values,
and a latent whose intervals do not decide is `undecided`. Latents whose decoder norm leans to the base model are judged along
their base direction (`nu_*_mirrored`), all others along their chat direction.

Where a latent fires is another question, so `template_only` is a set beside the verdicts rather than a verdict. It contains the
chat-specific latents that fire almost only on template tokens. Such a latent is no less specific to the chat model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import polars as pl

from crossdiff.config import AnalyzeConfig
from crossdiff.latents.decoder import CHAT_ONLY
from crossdiff.latents.ranking import PLAUSIBLE, PUBLISHED, RANKED, title

VERDICTS = {
    "chat_specific": "the base model has its chat direction neither in its error nor in its reconstruction, and its base "
    "decoder norm is small",
    "complete_shrinkage": "looks chat-only by its norms, but the base model's error holds its chat direction: the base model "
    "has the concept, and the sparsity penalty drove the base direction to 0",
    "latent_decoupling": "looks chat-only by its norms, but the base model's reconstruction holds its chat direction: there "
    "other latents carry the concept (its twins, where one alone does)",
    "rotated": "both models have it with comparable norms, in different directions",
    "shared": "the base model has its chat direction as well",
    "base_specific": "chat_specific mirrored, along the base direction",
    "dead": "never active on the analysed tokens",
    "undecided": "too few activations, or an interval that reaches over its limit",
}
"""What each verdict means. The explainer's prompts quote these texts, so a change invalidates its cached answers."""
SETS = {
    "chat_specific": "verdict chat_specific",
    "chat_specific_paper": "the published rule: point values of nu_error and of nu_reconstruction with bias under both limits, "
    "and delta_norm at least 0.9",
    "template_only": "chat_specific, and almost all of its active tokens are template tokens",
}


class Verdict(NamedTuple):
    """A key of `VERDICTS` and the reason for it."""

    name: str
    reason: str


class Nu(NamedTuple):
    """A ratio with its interval and its limit."""

    name: str
    value: float
    low: float
    high: float
    limit: float

    @property
    def below(self) -> bool:
        return self.high < self.limit

    @property
    def above(self) -> bool:
        return self.low > self.limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _nu(row: Mapping[str, Any], name: str, limit: float) -> Nu:
    return Nu(title(name), row[name], row[f"{name}_low"], row[f"{name}_high"], limit)


def judge(row: Mapping[str, Any], twins: tuple[int, ...], config: AnalyzeConfig) -> Verdict:
    """The verdict on one row of the latent table; `twins` are the latents that may carry it in the base model."""
    if row["n_active"] == 0:
        return Verdict("dead", "never active")
    if math.isnan(row["delta_norm"]):
        one_decoder = math.isnan(row["norm_base"]) or math.isnan(row["norm_chat"])
        return Verdict("undecided", row["undefined_reason"] if one_decoder else "both of its decoder directions vanish")
    suffix = "_mirrored" if row["delta_norm"] <= 1 - config.delta_norm else ""
    error = _nu(row, f"{RANKED[0]}{suffix}", config.nu_error)
    reconstruction = _nu(row, f"{RANKED[1]}{suffix}", config.nu_reconstruction)
    if math.isnan(error.value) or math.isnan(reconstruction.value):
        return Verdict("undecided", row[f"undefined_reason{suffix}"])
    if error.below and reconstruction.below:
        return _absent(row, error, reconstruction, config)
    if error.above or reconstruction.above:
        return _present(row, error, reconstruction, twins)
    open_nus = [nu for nu in (error, reconstruction) if not nu.below]
    return Verdict("undecided", " and ".join(f"the interval of {nu} includes its limit {nu.limit:g}" for nu in open_nus))


def _absent(row: Mapping[str, Any], error: Nu, reconstruction: Nu, config: AnalyzeConfig) -> Verdict:
    """The direction is in one model alone. By the norms it is specific, or each model has its own direction."""
    delta, cosine = row["delta_norm"], row["decoder_cosine"]
    found = f"{error} and {reconstruction} are below {error.limit:g} and {reconstruction.limit:g}"
    opposite = " and ".join(nu.name for nu in (error, reconstruction) if nu.value < PLAUSIBLE[0])
    own, other = ("base", "chat") if delta <= 1 - config.delta_norm else ("chat", "base")
    sign = f"; {opposite} below 0: the {other} model has the {own} direction with the opposite sign" if opposite else ""
    if delta >= config.delta_norm:
        share = row["share_template"]
        where = f"; {share:.0%} of its active tokens are template tokens" if share >= config.template_share else ""
        return Verdict("chat_specific", f"{found}, delta_norm {delta:.2f}{sign}{where}")
    if delta <= 1 - config.delta_norm:
        return Verdict("base_specific", f"{found}, delta_norm {delta:.2f}{sign}")
    found = f"{found}, but delta_norm {delta:.2f} and decoder cosine {cosine:.2f}"
    if cosine < config.rotated_cosine:
        return Verdict("rotated", f"{found} show a different direction in each model")
    return Verdict("undecided", f"{found} suggest that both models have it")


def _present(row: Mapping[str, Any], error: Nu, reconstruction: Nu, twins: tuple[int, ...]) -> Verdict:
    """Both models have the direction; a latent whose base norm has almost vanished hides that.

    At delta_norm >= 0.9 the base direction is at most 0.2 of the chat direction, so whatever nu has beyond that is in the error
    or comes from other latents. More than half of it in the reconstruction (the limit of nu_reconstruction) makes decoupling
    the main fact, even where an L1 penalty leaves some of it in the error.
    """
    found = " and ".join(f"{nu} is above {nu.limit:g}" for nu in (error, reconstruction) if nu.above)
    if row["delta_norm"] < CHAT_ONLY[0]:
        return Verdict("shared", found)
    looks = f"delta_norm {row['delta_norm']:.2f} looks chat-only, but {found}"
    if not reconstruction.above:
        return Verdict("complete_shrinkage", f"{looks}: the concept is in the base model's error")
    carried = f"carried by twins {', '.join(map(str, twins))}" if twins else "no single twin carries it"
    return Verdict("latent_decoupling", f"{looks}: {carried}")


def with_verdicts(table: pl.DataFrame, twins: pl.DataFrame, config: AnalyzeConfig) -> pl.DataFrame:
    """Add `verdict`, `verdict_reason` and the sets of `SETS` to a latent table.

    Args:
        twins: rows `(latent, twin)`, the best twin first; see `crossdiff.latents.twins`.
    """
    carriers: dict[int, tuple[int, ...]] = {
        latent: tuple(members) for latent, members in twins.group_by("latent").agg("twin").iter_rows()
    }
    columns = [name for name in table.columns if not name.startswith(("beta_", "frequency_"))]

    def verdicts() -> Iterator[Verdict]:
        for row in table.select(columns).iter_rows(named=True):
            yield judge(row, carriers.get(row["latent"], ()), config)

    judged = pl.DataFrame(list(verdicts()), schema={"verdict": pl.String, "verdict_reason": pl.String}, orient="row")
    specific = pl.col("verdict") == "chat_specific"
    below = (pl.col(PUBLISHED[0]) < config.nu_error) & (pl.col(PUBLISHED[1]) < config.nu_reconstruction)
    return table.hstack(judged).with_columns(
        chat_specific=specific,
        chat_specific_paper=below & pl.col("rank_sum_paper").is_not_nan() & (pl.col("delta_norm") >= CHAT_ONLY[0]),
        template_only=specific & (pl.col("share_template") >= config.template_share),
    )


def counts(table: pl.DataFrame) -> dict[str, int]:
    """Number of latents in each delta_norm class, set and verdict.

    The verdict `shared` is counted as `verdict_shared`, since `shared` is also a class.
    """
    classes = ("chat_only", "base_only", "shared", "other")
    found = {name: table.filter(pl.col("delta_norm_class") == name).height for name in classes}
    found |= {name: table.filter(pl.col(name)).height for name in SETS}
    for name in VERDICTS:
        if name not in SETS:
            found["verdict_shared" if name == "shared" else name] = table.filter(pl.col("verdict") == name).height
    return found
