"""The latent table that the paper's authors publish (`feature_df.csv`, `latent_df.csv`), under our column names.

Their relative decoder norm is called `dec_norm_diff` and reversed: 0 is chat-only there, so delta_norm is 1 minus it. Their
`beta_ratio_*` is nu; the first unnamed column is the number of the latent. Their later repositories write `ft` for `chat` and
`beta_ratio_activation` for `beta_activation_ratio`; both spellings are read. Tables of an SAE have no relative norm: their
delta_norm is NaN.

Of the reconstruction, these tables have only the nu with the models' biases and means, and no intervals. So there is no
`nu_reconstruction_nobias`, no `rank_sum` and no verdict, which rest on it in our tables; what can be derived is the published
rank and the published rule, `rank_sum_paper` and `chat_specific_paper`.

Norms and betas of a published table are those of the crosscoder's normalised space. With one scale for both sources they are
ours; with a scale s per source, x_s = (h_s - mean_s) * s_s, they differ by the ratio of the scales:

    ours = published * s_chat / s_base     for beta_*_base and nu_*

The beta of the chat model stays. This is exact for the error and the activation without bias, and for the other targets where
no mean is subtracted; with a mean they are those of the activation or the reconstruction less that mean.
"""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl

from crossdiff.config import AnalyzeConfig
from crossdiff.errors import UserError
from crossdiff.latents.decoder import CHAT_ONLY, delta_norm_class
from crossdiff.latents.ranking import PUBLISHED

FILES = ("feature_df.csv", "latent_df.csv")
DIFFERENCE = "dec_norm_diff"
SAE_COLUMNS = ("dec_norm", "enc_norm")
"""What the table of an SAE has in place of the relative norm."""
INDEX = ("", "column_0", "Unnamed: 0", "index", "latent")
"""Spellings of the column that numbers the latents."""
NAMES: dict[str, tuple[str, ...]] = {
    "norm_base": ("dec_base_norm",),
    "norm_chat": ("dec_instruct_norm", "dec_chat_norm", "dec_ft_norm"),
    "decoder_cosine": ("dec_cos_sim",),
    "frequency": ("freq", "freq_val", "freq_validation"),
    "nu_error": ("beta_ratio_error",),
    "nu_reconstruction": ("beta_ratio_reconstruction",),
    "nu_activation": ("beta_activation_ratio", "beta_ratio_activation"),
    "nu_activation_nobias": ("beta_activation_no_bias_ratio", "beta_ratio_activation_no_bias"),
    **{
        f"beta_{target}_{source}": tuple(f"beta_{theirs}_{name}" for name in spellings)
        for target, theirs in (
            ("error", "error"), ("reconstruction", "reconstruction"), ("activation", "activation"),
            ("activation_nobias", "activation_no_bias"),
        )
        for source, spellings in (("base", ("base",)), ("chat", ("chat", "ft")))
    },
}  # fmt: skip
"""Our columns, and their names in the published tables."""
TABLE_COLUMNS = ("latent", "delta_norm", "delta_norm_class", *NAMES, "rank_sum_paper", "chat_specific_paper", "dead")


def read_published_table(path: Path, scales: tuple[float, float] | None = None) -> pl.DataFrame:
    """Read a published latent table; `TABLE_COLUMNS` lists the columns, NaN where the file has no value.

    Args:
        scales: the crosscoder's scales of base and chat, to convert from its normalised space to that of the models.
    """
    try:
        table = pl.read_csv(path, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot read {path} as CSV: {error}; expected a published feature_df.csv") from None
    columns = {"latent": _latents(table, path), "delta_norm": _delta_norm(table, path)}
    for ours, spellings in NAMES.items():
        found = next((name for name in spellings if name in table.columns), None)
        columns[ours] = _numbers(table, found, path) if found else pl.repeat(float("nan"), table.height, eager=True)
    columns["dead"] = _dead(table)
    return _derived(pl.DataFrame(columns)) if scales is None else to_models_space(pl.DataFrame(columns), scales)


def to_models_space(table: pl.DataFrame, scales: tuple[float, float]) -> pl.DataFrame:
    """A table of a crosscoder's normalised space in that of the models, given the scales of base and chat."""
    base, chat = scales
    if not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise UserError(f"scales {scales} must be two positive numbers, of base and of chat")
    ratio = pl.when(pl.col("delta_norm") >= 0.5).then(2 - 2 * pl.col("delta_norm")).otherwise(1.0) / base
    other = pl.when(pl.col("delta_norm") >= 0.5).then(1.0).otherwise(2 * pl.col("delta_norm")) / chat
    scaled = [name for name in table.columns if name.startswith("nu_") or (name.startswith("beta_") and name.endswith("_base"))]
    return _derived(
        table.with_columns(
            pl.when(pl.col("delta_norm").is_nan()).then(float("nan"))
            .otherwise(((other - ratio) / pl.max_horizontal(other, ratio) + 1) / 2).alias("delta_norm"),
            pl.col("norm_base") / base,
            pl.col("norm_chat") / chat,
            *(pl.col(name) * (chat / base) for name in scaled),
        )
    )  # fmt: skip


def to_normalised_space(table: pl.DataFrame, scales: tuple[float, float]) -> pl.DataFrame:
    """The way back: a table of the models' space in the published convention."""
    return to_models_space(table, (1 / scales[0], 1 / scales[1]))


def _derived(table: pl.DataFrame) -> pl.DataFrame:
    """Add what follows from the numbers: classes, ranks and the set of the published rule."""
    classes = pl.Series("delta_norm_class", [delta_norm_class(value) for value in table["delta_norm"]], dtype=pl.String)
    return table.with_columns(classes, **_paper_rule(AnalyzeConfig())).select(TABLE_COLUMNS).sort("latent")


def _delta_norm(table: pl.DataFrame, path: Path) -> pl.Series:
    """delta_norm from the published difference; NaN in the table of an SAE."""
    if DIFFERENCE not in table.columns and any(name in table.columns for name in SAE_COLUMNS):
        return pl.repeat(float("nan"), table.height, eager=True)
    if DIFFERENCE not in table.columns:
        raise UserError(f"{path} lacks the column {DIFFERENCE}; it has {', '.join(table.columns[:20])}")
    difference = _numbers(table, DIFFERENCE, path)
    outside = difference.filter((difference < 0) | (difference > 1) & difference.is_not_nan())
    if len(outside):
        raise UserError(f"{path}: {DIFFERENCE} must lie in [0, 1] (0 = chat-only), found {outside[0]}; download it again")
    return 1 - difference


def _numbers(table: pl.DataFrame, column: str, path: Path) -> pl.Series:
    """A column as float64, NaN where it is empty."""
    try:
        return table[column].cast(pl.Float64).fill_null(float("nan"))
    except pl.exceptions.InvalidOperationError as error:
        raise UserError(f"{path}: column {column!r} has values that are not numbers: {error}; download it again") from None


def _latents(table: pl.DataFrame, path: Path) -> pl.Series:
    """The latents' numbers: the index column, or the order of the rows if there is none."""
    name = next((column for column in table.columns if column in INDEX), None)
    if name is None:
        return pl.Series("latent", range(table.height), dtype=pl.Int64)
    numbers = table[name].cast(pl.Int64, strict=False)
    if numbers.null_count() or numbers.n_unique() != len(numbers) or (len(numbers) and numbers.min() < 0):  # type: ignore[operator]
        raise UserError(
            f"{path}: column {name!r} must number the latents, each once, from 0; found {numbers.head(5).to_list()}"
        )
    return numbers.alias("latent")


def _dead(table: pl.DataFrame) -> pl.Series:
    """Their `dead` column, which is text or true/false; null if the file has none."""
    if "dead" not in table.columns:
        return pl.repeat(None, table.height, dtype=pl.Boolean, eager=True)
    return table["dead"].cast(pl.String).str.to_lowercase().is_in(["true", "1", "1.0"])


def _paper_rule(config: AnalyzeConfig) -> dict[str, pl.Expr]:
    """The sum of the two ranks among the latents with both nus, and the set of the published rule."""
    error, reconstruction = map(pl.col, PUBLISHED)
    both = error.is_finite() & reconstruction.is_finite()
    ranks = [pl.when(both).then(nu).rank("ordinal") for nu in (error, reconstruction)]
    below = (error < config.nu_error) & (reconstruction < config.nu_reconstruction)
    return {
        "rank_sum_paper": pl.when(both).then((ranks[0] + ranks[1]).cast(pl.Float64)).otherwise(float("nan")),
        "chat_specific_paper": both & below & pl.col("delta_norm").is_not_nan() & (pl.col("delta_norm") >= CHAT_ONLY[0]),
    }
