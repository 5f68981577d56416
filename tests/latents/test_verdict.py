"""Verdicts by hand: each rule, its limits, and the words."""

from __future__ import annotations

import polars as pl
import pytest

from crossdiff.config import AnalyzeConfig
from crossdiff.latents.verdict import SETS, VERDICTS, counts, with_verdicts

NO_TWINS = pl.DataFrame(schema={"latent": pl.Int64, "twin": pl.Int64})
NAN = float("nan")


def nus(name: str, value: float, half: float = 0.05) -> dict[str, float]:
    return {f"nu_{name}": value, f"nu_{name}_low": value - half, f"nu_{name}_high": value + half}


def row(**changes: object) -> dict[str, object]:
    """A chat-specific latent, with changes; the intervals are 0.05 to either side."""
    base: dict[str, object] = {
        "latent": 0, "n_active": 500, "delta_norm": 0.95, "delta_norm_class": "chat_only", "decoder_cosine": 0.9,
        "share_template": 0.2, "norm_base": 0.1, "norm_chat": 1.0, "rank_sum_paper": 2.0,
        "undefined_reason": None, "undefined_reason_mirrored": None,
    }  # fmt: skip
    for name in ("error", "reconstruction_nobias", "error_mirrored", "reconstruction_nobias_mirrored"):
        base |= nus(name, 0.05)
    for name in ("reconstruction", "reconstruction_mirrored"):  # with bias: no verdict rests on them
        base |= nus(name, 0.45)
    return base | changes


UNDEFINED = {
    "undefined_reason": "beta_error_chat may be 0", "rank_sum_paper": NAN,
    "nu_error": NAN, "nu_error_low": NAN, "nu_error_high": NAN,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        (
            {}, "chat_specific",
            "nu_error 0.05 [0.00, 0.10] and nu_reconstruction (without bias) 0.05 [0.00, 0.10] are below 0.2 and 0.5",
        ),
        (nus("reconstruction", 9.0) | nus("reconstruction_mirrored", 9.0), "chat_specific", "delta_norm 0.95"),
        ({"delta_norm": 0.75}, "chat_specific", "delta_norm 0.75"),
        (
            nus("reconstruction_nobias", -3.0), "chat_specific",
            "nu_reconstruction (without bias) below 0: the base model has the chat direction with the opposite sign",
        ),
        (
            {"delta_norm": 0.1} | nus("error_mirrored", -0.4), "base_specific",
            "nu_error_mirrored below 0: the chat model has the base direction with the opposite sign",
        ),
        # The point value is under the limit, the interval's end is not.
        (nus("error", 0.16), "undecided", "the interval of nu_error 0.16 [0.11, 0.21] includes its limit 0.2"),
        (
            nus("reconstruction_nobias", 0.48), "undecided",
            "nu_reconstruction (without bias) 0.48 [0.43, 0.53] includes its limit 0.5",
        ),
        (nus("error", 0.6), "complete_shrinkage", "the concept is in the base model's error"),
        (nus("reconstruction_nobias", 0.8), "latent_decoupling", "no single twin carries it"),
        # More than half of it is carried by others: decoupling, also where the error holds some.
        (nus("reconstruction_nobias", 0.8) | nus("error", 0.3), "latent_decoupling", "nu_error 0.30"),
        # Norms that have not vanished hide nothing: plainly shared.
        ({"delta_norm": 0.8} | nus("error", 0.6), "shared", "nu_error 0.60 [0.55, 0.65] is above 0.2"),
        ({"delta_norm": 0.5} | nus("reconstruction_nobias", 0.9), "shared", "nu_reconstruction (without bias) 0.90"),
        ({"delta_norm": 0.5, "decoder_cosine": 0.1}, "rotated", "decoder cosine 0.10"),
        ({"delta_norm": 0.5, "decoder_cosine": 0.1} | nus("error", 0.16), "undecided", "includes its limit"),
        ({"delta_norm": 0.5}, "undecided", "suggest that both models have it"),
        # At the base model's end only the mirrored ratios count, even where the others are undefined.
        ({"delta_norm": 0.1} | nus("error", 0.9), "base_specific", "nu_error_mirrored 0.05"),
        ({"delta_norm": 0.0} | UNDEFINED, "base_specific", "delta_norm 0.00"),
        (
            {"delta_norm": 0.1} | nus("reconstruction_nobias_mirrored", 0.9), "shared",
            "nu_reconstruction_mirrored (without bias) 0.90",
        ),
        (UNDEFINED, "undecided", "beta_error_chat may be 0"),
        ({"n_active": 0} | UNDEFINED, "dead", "never active"),
        ({"delta_norm": NAN} | UNDEFINED, "undecided", "both of its decoder directions vanish"),
        (
            UNDEFINED | {"delta_norm": NAN, "norm_base": NAN, "undefined_reason": "the coder has one decoder"},
            "undecided",
            "the coder has one decoder",
        ),
    ],
)  # fmt: skip
def test_verdicts(changes: dict[str, object], verdict: str, words: str) -> None:
    found = with_verdicts(pl.DataFrame([row(**changes)]), NO_TWINS, AnalyzeConfig()).row(0, named=True)
    assert found["verdict"] == verdict, found["verdict_reason"]
    assert words in found["verdict_reason"]
    assert found["chat_specific"] == (verdict == "chat_specific")


def test_twins_stand_in_the_reason() -> None:
    carried = nus("reconstruction_nobias", 0.8)
    table = pl.DataFrame([row(latent=3, **carried), row(latent=4, **carried)])
    twins = pl.DataFrame({"latent": [3, 3], "twin": [17, 9]})
    reasons = with_verdicts(table, twins, AnalyzeConfig())["verdict_reason"].to_list()
    assert reasons[0].endswith("carried by twins 17, 9")
    assert reasons[1].endswith("no single twin carries it")


@pytest.mark.parametrize(
    ("changes", "paper", "template"),
    [
        ({}, True, False),
        ({"delta_norm": 0.8}, False, False),  # the paper's set wants 0.9
        (nus("error", 0.16), True, False),  # and point values
        (nus("reconstruction", 0.48), True, False),  # of the ratio with bias
        (nus("reconstruction", 0.52), False, False),
        (nus("reconstruction_nobias", 0.8), True, False),
        ({"rank_sum_paper": NAN}, False, False),
        (UNDEFINED, False, False),
        ({"share_template": 0.95}, True, True),
        ({"share_template": 0.95} | nus("error", 0.6), False, False),  # a part of the chat-specific ones
    ],
)
def test_sets(changes: dict[str, object], paper: bool, template: bool) -> None:
    found = with_verdicts(pl.DataFrame([row(**changes)]), NO_TWINS, AnalyzeConfig()).row(0, named=True)
    assert (found["chat_specific_paper"], found["template_only"]) == (paper, template)
    assert ("95% of its active tokens are template tokens" in found["verdict_reason"]) == template


def test_limits_come_from_the_settings() -> None:
    config = AnalyzeConfig(nu_error=0.7, nu_reconstruction=0.9, delta_norm=0.6, rotated_cosine=0.95, template_share=0.1)
    rows = [row(**nus("error", 0.6)), row(delta_norm=0.62), row(delta_norm=0.5)]
    table = with_verdicts(pl.DataFrame(rows), NO_TWINS, config)
    assert table["verdict"].to_list() == ["chat_specific", "chat_specific", "rotated"]
    assert table["template_only"].to_list() == [True, True, False]


def test_counts_add_up() -> None:
    rows = [
        row(),
        row(**nus("error", 0.6)),
        row(delta_norm=0.5, delta_norm_class="shared", **nus("error", 0.6)),
        row(n_active=0),
    ]
    table = with_verdicts(pl.DataFrame(rows), NO_TWINS, AnalyzeConfig())
    found = counts(table)
    assert found["chat_only"] == 3 and found["shared"] == 1 and found["verdict_shared"] == 1
    names = ["verdict_shared" if name == "shared" else name for name in VERDICTS]
    assert sum(found[name] for name in names) == len(rows)
    assert set(SETS) < set(found)
