"""Interventions from YAML, and the latents that they select."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest
import yaml
from pydantic import TypeAdapter
from setting import make_table

from crossdiff.causal.causal_test import LISTS
from crossdiff.causal.interventions import (
    DEFAULT,
    ONE_DECODER,
    Arms,
    DifferencePart,
    Experiment,
    make_arms,
    read_experiment,
)
from crossdiff.causal.latent_sets import Selection, Verdict, pool_of, resolve
from crossdiff.errors import UserError
from crossdiff.latents.verdict import VERDICTS


def table() -> pl.DataFrame:
    """Six latents; the last has no rank, so that it is in no pool."""
    return pl.DataFrame(
        {
            "latent": range(6),
            "delta_norm": [0.5, 0.9, 0.8, 0.7, 0.95, 1.0],
            "nu_error": [0.9, 0.1, 0.5, 0.3, 0.2, float("nan")],
            "nu_reconstruction": [0.9, 0.6, 0.2, 0.1, 0.4, 0.1],
            "nu_reconstruction_nobias": [0.9, 0.5, 0.3, 0.2, 0.6, 0.1],
            "nu_activation": [-0.5, 0.2, -0.05, 3.0, 0.1, 0.1],
            "rank_sum": [10.0, 5.0, 6.0, 4.0, 4.0, float("nan")],
            "rank_sum_paper": [10.0, 6.0, 6.0, 3.0, 5.0, 1.0],
            "verdict": ["shared", "rotated", "chat_specific", "shared", "chat_specific", "undecided"],
            "n_active": [9, 9, 9, 9, 9, 0],
            "contribution": [7.0, 1.0, 2.0, 9.0, 8.0, 0.0],
        }
    )


def latents(selection: dict[str, Any], pool: int = 4) -> dict[str, tuple[int, ...] | None]:
    return resolve(TypeAdapter(Selection).validate_python(selection), table(), pool, seed=0).sets


def test_the_pool_is_those_of_the_largest_delta_norm_that_are_ranked() -> None:
    assert pool_of(table(), 4)["latent"].to_list() == [4, 1, 2, 3]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"kind": "all"}, None),
        ({"kind": "list", "latents": [5, 0, 5]}, (0, 5)),
        # The pool is 1, 2, 3, 4.
        ({"kind": "ranked", "ranking": "delta_norm"}, (1, 4)),
        ({"kind": "ranked", "ranking": "delta_norm", "part": "worst"}, (2, 3)),
        ({"kind": "ranked", "ranking": "nu_error"}, (1, 4)),  # 0.1, 0.2 | 0.3, 0.5
        ({"kind": "ranked", "ranking": "nu_reconstruction", "part": "worst"}, (1, 4)),  # 0.4, 0.6
        ({"kind": "ranked", "ranking": "rank_sum", "size": 1}, (3,)),  # 3 and 4 tie: the lower number
        ({"kind": "ranked", "ranking": "rank_sum", "share": 1.0}, (1, 2, 3, 4)),
        ({"kind": "threshold", "ranking": "nu_error", "at": 0.3}, (1, 4)),  # below, not at
        ({"kind": "threshold", "ranking": "delta_norm", "at": 0.9}, (1, 4)),  # at least
        ({"kind": "threshold", "ranking": "delta_norm", "at": 0.9, "among": "all"}, (1, 4, 5)),
        ({"kind": "verdict", "verdicts": ["chat_specific", "rotated"]}, (1, 2, 4)),
        ({"kind": "verdict", "verdicts": ["shared"]}, (0, 3)),
        ({"kind": "verdict", "verdicts": ["shared"], "among": "pool"}, (3,)),
        # As many as half the pool, from all latents: contributions 9 and 8; the last of all are 0 and 1.
        ({"kind": "ranked", "ranking": "contribution", "among": "all"}, (3, 4)),
        ({"kind": "ranked", "ranking": "contribution", "among": "all", "part": "worst"}, (1, 5)),
        ({"kind": "ranked", "ranking": "contribution"}, (3, 4)),
        ({"kind": "ranked", "ranking": "contribution", "among": "all", "size": 3}, (0, 3, 4)),
        ({"kind": "threshold", "ranking": "contribution", "at": 7, "among": "all"}, (0, 3, 4)),
        ({"kind": "ranked", "ranking": "nu_error", "among": "all", "size": 5}, (0, 1, 2, 3, 4)),  # 5 has no nu
    ],
)
def test_sets_by_hand(selection: dict[str, Any], expected: tuple[int, ...] | None) -> None:
    assert latents(selection) == {"": expected}


NEGATIVE = pl.col("latent").is_in([1, 3])


@pytest.mark.parametrize(
    ("selection", "expected", "outside"),
    [
        # Of the pool 1, 2, 3, 4, the latents 1 and 3 have a nu_reconstruction of -1, without bias.
        ({"kind": "ranked", "ranking": "rank_sum"}, (3, 4), None),
        ({"kind": "ranked", "ranking": "rank_sum", "within": [-0.1, 2]}, (4,), 2),
        ({"kind": "ranked", "ranking": "delta_norm", "within": [-0.1, 2], "part": "worst"}, (2,), 2),
        ({"kind": "ranked", "ranking": "nu_error", "within": [-0.1, 2], "share": 1.0}, (2, 4), 2),
        ({"kind": "ranked", "ranking": "nu_reconstruction_nobias", "within": [-2, 2], "share": 0.5}, (1, 3), 0),
        # With bias they are as good as others: it is that variant that counts for the rankings that rest on it.
        ({"kind": "ranked", "ranking": "nu_reconstruction", "within": [-0.1, 2]}, (2, 3), 0),
        ({"kind": "ranked", "ranking": "rank_sum_paper", "within": [-0.1, 2]}, (3, 4), 0),
        ({"kind": "ranked", "ranking": "delta_norm", "within": [-0.1, 2], "nus": ["nu_error", "nu_reconstruction"]}, (1, 4), 0),
        ({"kind": "ranked", "ranking": "delta_norm", "within": [0.15, 2], "nus": ["nu_error"], "size": 3}, (2, 3, 4), 1),
        ({"kind": "threshold", "ranking": "nu_error", "at": 0.4, "within": [-0.1, 2]}, (4,), 2),
        # |nu_activation| below 0.3, as published: the threshold and the range are about the same number.
        ({"kind": "threshold", "ranking": "nu_activation", "at": 0.3, "within": [-0.3, 0.3], "among": "all"}, (1, 2, 4, 5), 2),
        ({"kind": "random", "like": {"kind": "list", "latents": [0, 1]}, "seeds": 1, "within": [-0.1, 2]}, (2, 4), 2),
    ],
)
def test_latents_with_a_nu_out_of_range_are_left_out_of_a_ranking(
    selection: dict[str, Any], expected: tuple[int, ...], outside: int | None
) -> None:
    negative = pl.when(NEGATIVE).then(-1.0).otherwise("nu_reconstruction_nobias")
    changed = table().with_columns(nu_reconstruction_nobias=negative)
    found = resolve(TypeAdapter(Selection).validate_python(selection), changed, 4, seed=0)
    assert list(found.sets.values()) == [expected]
    assert found.outside == outside


def test_a_range_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"within \[2.0, -0.1\] holds no nu"):
        TypeAdapter(Selection).validate_python({"kind": "ranked", "ranking": "rank_sum", "within": [2, -0.1]})
    with pytest.raises(ValueError, match=r"nus \['nu_error'\] say what `within` looks at, but there is no `within`"):
        TypeAdapter(Selection).validate_python({"kind": "ranked", "ranking": "rank_sum", "nus": ["nu_error"]})


def test_halves_of_an_odd_pool_share_no_latent() -> None:
    for ranking in ("delta_norm", "nu_error", "nu_reconstruction", "rank_sum"):
        best, worst = (latents({"kind": "ranked", "ranking": ranking, "part": part}, 3)[""] for part in ("best", "worst"))
        assert best is not None and worst is not None
        assert len(best) == len(worst) == 1
        assert set(best).isdisjoint(worst)


def test_random_sets_are_as_large_as_their_model_and_differ_between_seeds() -> None:
    like = {"kind": "verdict", "verdicts": ["chat_specific"]}
    drawn = latents({"kind": "random", "like": like, "seeds": 30})
    assert list(drawn) == [str(seed) for seed in range(30)]
    assert {len(set(found)) for found in drawn.values() if found is not None} == {2}
    assert {latent for found in drawn.values() for latent in found or ()} == {1, 2, 3, 4}  # of the pool, all of it
    assert drawn == latents({"kind": "random", "like": like, "seeds": 30})
    anywhere = latents({"kind": "random", "like": like, "seeds": 30, "among": "all"})
    assert {latent for found in anywhere.values() for latent in found or ()} == {0, 1, 2, 3, 4}  # 5 is dead


def test_each_latent_of_a_set_alone_in_the_order_of_the_ranking() -> None:
    of = {"kind": "ranked", "ranking": "rank_sum", "size": 3}
    assert latents({"kind": "each", "of": of}) == {"3": (3,), "4": (4,), "1": (1,)}


def test_arms_of_a_list() -> None:
    experiment = Experiment.model_validate(
        {
            "interventions": [
                {"name": "none"},
                {"name": "empty", "add": [{"kind": "latents", "latents": {"kind": "verdict", "verdicts": ["base_specific"]}}]},
                {
                    "name": "one",
                    "add": [{"kind": "latents", "latents": {"kind": "each", "of": {"kind": "list", "latents": [2]}}}],
                },
                {
                    "name": "sum",
                    "add": [{"kind": "latents", "latents": {"kind": "all"}}, {"kind": "bias"}],
                    "tokens": "content",
                },
            ]
        }
    )
    arms = make_arms(experiment, table(), 4, 0)
    assert [(arm.name, arm.latents, arm.latent, arm.others) for arm in arms.arms] == [
        ("none", (), None, ()), ("one_2", (2,), 2, ()), ("sum", None, None, (DifferencePart(kind="bias"),)),
    ]  # fmt: skip
    assert arms.left_out == {"empty": "no latent of this crosscoder is in the set"}
    assert arms.arms[-1].tokens == "content"


def test_a_coder_without_a_latent_table_has_the_arms_that_need_none() -> None:
    size = table().select("latent", "n_active", "contribution")
    arms = make_arms(read_experiment(DEFAULT), size, 4, 0)
    names = {arm.intervention for arm in arms.arms}
    assert {"none", "all_latents", "largest_contributions", "largest_contributions_half", "single_largest"} <= names
    assert arms.left_out["best_half_nu_error"] == "the latents of this coder have no rank_sum"
    assert arms.left_out["verdict_chat_specific"] == "the latents of this coder have no verdict"
    assert set(arms.left_out).isdisjoint(names)


def test_a_coder_of_the_difference_lacks_the_arms_that_need_both_models() -> None:
    size = table().select("latent", "n_active", "contribution")
    arms = make_arms(read_experiment(LISTS["published"]), size, 4, 0, n_decoders=1)
    names = {arm.intervention for arm in arms.arms}
    assert {"none", "all_latents", "chat_to_base", "first_9", "principal_first_3"} <= names
    for name in ("chat_reconstruction", "best_half_rank_sum_paper_chat", "projection_best_half_rank_sum_paper"):
        assert arms.left_out[name] == ONE_DECODER


def test_the_published_list_selects_what_it_says() -> None:
    arms = make_arms(read_experiment(LISTS["published"]), table(), 4, 0)
    assert not arms.left_out.keys() - {"nu_activation_within_0.1_chat"}
    named = {arm.name: arm for arm in arms.arms}
    assert (named["chat_to_base"].start, named["chat_to_base"].continues) == ("chat", "base")
    assert named["nu_activation_within_0.3_chat"].latents == (1, 2, 4, 5)  # |nu_activation| below 0.3, whatever its sign
    assert named["nu_activation_within_0.3_chat"].use == "chat"
    assert named["delta_norm_at_least_0.7_chat"].latents == (1, 2, 3, 4, 5)
    assert named["chat_without_best_half_rank_sum_paper"].latents == named["best_half_rank_sum_paper"].latents == (3, 4)


def test_the_published_list_ranks_and_leaves_out_by_the_published_nus() -> None:
    """Latents 1 and 3 of the pool 1, 2, 3, 4 are out of range without bias, and 4 with bias."""
    without = pl.when(NEGATIVE).then(-1.0).otherwise("nu_reconstruction_nobias")
    with_bias = pl.when(pl.col("latent") == 4).then(-1.0).otherwise("nu_reconstruction")
    changed = table().with_columns(nu_reconstruction_nobias=without, nu_reconstruction=with_bias)
    for arm in make_arms(read_experiment(LISTS["published"]), changed, 4, 0).arms:
        if "half" in arm.name:
            # By delta_norm 1, 2, 3 remain, best first; by rank_sum_paper 3, 1, 2. Half of three is one.
            best, worst = ((1,), (3,)) if "delta_norm" in arm.name else ((3,), (2,))
            assert (arm.outside, arm.latents) == (1, best if "best" in arm.name else worst), arm.name


def test_every_verdict_of_the_latent_table_can_be_asked_for() -> None:
    assert set(get_args(Verdict)) == set(VERDICTS)


def test_the_list_of_the_package_covers_what_it_promises() -> None:
    table = make_table().with_columns(contribution=pl.col("latent") * 1.0)
    arms = make_arms(read_experiment(DEFAULT), table, 20, 0)
    names = [arm.name for arm in arms.arms]
    assert len(names) == len(set(names))
    nus = ("nu_error", "nu_reconstruction", "nu_reconstruction_nobias")
    for ranking in ("delta_norm", *nus, "rank_sum", "rank_sum_paper"):
        assert {f"best_half_{ranking}_unfiltered", f"worst_half_{ranking}_unfiltered"} <= set(names)
        assert {f"best_half_{ranking}", f"worst_half_{ranking}"} <= set(names)
    assert {"none", "full_swap", "all_latents", "template_tokens", "mean_difference", "random_half_4"} <= set(names)
    assert sum(arm.intervention == "single" for arm in arms.arms) == 20
    assert [arm.latent for arm in arms.arms if arm.intervention == "single_largest"] == list(range(39, 27, -1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interventions": [{"name": "a", "add": [{"kind": "neurons"}]}]}, r"interventions.0.add.0: .*'neurons'"),
        ({"interventions": [{"name": "a"}, {"name": "a"}]}, "two interventions are called 'a'"),
        (
            {"comparisons": [{"name": "c", "better": "none", "worse": "nothing"}]},
            "names 'nothing', which is not an intervention",
        ),
        ({"interventions": [{"name": "none", "tokens": "verbs"}]}, "'all', 'template' or 'content'"),
        ({"interventions": []}, "at least 1 item"),
        (
            {
                "interventions": [
                    {
                        "name": "a",
                        "add": [
                            {"kind": "latents", "latents": {"kind": "threshold", "ranking": "nu_error", "at": float("nan")}}
                        ],
                    }
                ]
            },
            r"at: .*finite.*nan",
        ),
    ],
)
def test_a_wrong_list_names_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump({"interventions": [{"name": "none"}], **changes}))
    with pytest.raises(UserError, match=message):
        read_experiment(path)


def arms_of(selection: dict[str, Any]) -> Arms:
    intervention = {"name": "mine", "add": [{"kind": "latents", "latents": selection}]}
    return make_arms(Experiment.model_validate({"interventions": [intervention]}), table(), 4, 0)


def test_latents_that_do_not_exist_and_sets_that_cannot_be_drawn() -> None:
    with pytest.raises(UserError, match="intervention 'mine': there is no latent 6: the crosscoder has 6, from 0 to 5"):
        arms_of({"kind": "list", "latents": [2, 6]})
    # It depends on the data, not on the list, so the other interventions are still measured.
    too_many = arms_of({"kind": "random", "like": {"kind": "list", "latents": [0, 1, 2, 3, 4]}})
    assert not too_many.arms
    assert too_many.left_out == {"mine": "5 random latents are more than the 4 to draw from; `among: all` has more"}
    with pytest.raises(UserError, match="'all' is not a single set of known size"):
        arms_of({"kind": "each", "of": {"kind": "all"}})
