"""The latent table that the paper's authors publish (`feature_df.csv`), under our column names.

Their relative decoder norm is called `dec_norm_diff` and reversed: 0 is chat-only there, so delta_norm is 1 minus it. Their
`beta_ratio_*` is nu; the first unnamed column is the number of the latent. Their later repositories write `ft` for `chat` and
`beta_ratio_activation` for `beta_activation_ratio`; both spellings are read. The tables have no intervals, so the only verdict
that can be derived is the published rule's: `chat_specific_paper`.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from crossdiff.config import AnalyzeConfig
from crossdiff.errors import UserError
from crossdiff.latents.decoder import CHAT_ONLY, delta_norm_class

DIFFERENCE = "dec_norm_diff"
INDEX = ("", "column_0", "Unnamed: 0", "index", "latent")
"""Spellings of the column that numbers the latents."""
NAMES: dict[str, tuple[str, ...]] = {
    "norm_base": ("dec_base_norm",),
    "norm_chat": ("dec_instruct_norm", "dec_chat_norm", "dec_ft_norm"),
    "decoder_cosine": ("dec_cos_sim",),
    "frequency": ("freq",),
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
TABLE_COLUMNS = ("latent", "delta_norm", "delta_norm_class", *NAMES, "rank_sum", "chat_specific_paper", "dead")


def read_published_table(path: Path) -> pl.DataFrame:
    """Read a published latent table; `TABLE_COLUMNS` lists the columns, NaN where the file has no value."""
    try:
        table = pl.read_csv(path, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot read {path} as CSV: {error}; expected a published feature_df.csv") from None
    if DIFFERENCE not in table.columns:
        raise UserError(f"{path} lacks the column {DIFFERENCE}; it has {', '.join(table.columns[:20])}")
    difference = _numbers(table, DIFFERENCE, path)
    outside = difference.filter((difference < 0) | (difference > 1) & difference.is_not_nan())
    if len(outside):
        raise UserError(f"{path}: {DIFFERENCE} must lie in [0, 1] (0 = chat-only), found {outside[0]}; download it again")
    delta = 1 - difference
    columns = {"latent": _latents(table, path), "delta_norm": delta}
    columns["delta_norm_class"] = pl.Series([delta_norm_class(value) for value in delta.to_list()], dtype=pl.String)
    for ours, spellings in NAMES.items():
        found = next((name for name in spellings if name in table.columns), None)
        columns[ours] = _numbers(table, found, path) if found else pl.repeat(float("nan"), table.height, eager=True)
    columns["dead"] = _dead(table)
    return pl.DataFrame(columns).with_columns(**_paper_rule(AnalyzeConfig())).select(TABLE_COLUMNS).sort("latent")


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
    both = pl.col("nu_error").is_finite() & pl.col("nu_reconstruction").is_finite()
    ranks = [pl.when(both).then(pl.col(name)).rank("ordinal") for name in ("nu_error", "nu_reconstruction")]
    below = (pl.col("nu_error") < config.nu_error) & (pl.col("nu_reconstruction") < config.nu_reconstruction)
    return {
        "rank_sum": pl.when(both).then((ranks[0] + ranks[1]).cast(pl.Float64)).otherwise(float("nan")),
        "chat_specific_paper": both & below & (pl.col("delta_norm") >= CHAT_ONLY[0]),
    }
