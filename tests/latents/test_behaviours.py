"""Behaviour tables on scores whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from crossdiff.latents.behaviours import Conversations, Pool, auroc, before_answer, behaviour_table, bootstrap_interval
from crossdiff.text.chat import Flag


def conversations() -> Conversations:
    generator = np.random.default_rng(0)
    labels = np.array(["refusal", "list_format"] * 60)
    prompts = np.array([f"{'how to rob' if label == 'refusal' else 'how to bake'} {i // 4}" for i, label in enumerate(labels)])
    heldout = np.arange(120) >= 60
    good = (labels == "refusal") + 0.4 * generator.standard_normal(120)
    noise = generator.standard_normal((120, 3))
    scores = np.column_stack([noise[:, 0], good, noise[:, 1], noise[:, 2]]).astype(np.float32)
    return Conversations(labels, prompts, heldout, {"before_answer": scores, "whole_conversation": scores})


def pools() -> dict[str, Pool]:
    every = conversations()
    parts = {"chat_specific": ([7, 8], [0, 1]), "shared": ([9, 11], [2, 3]), "base_sae": ([1, 0], [1, 0]), "none": ([], [])}
    return {
        name: Pool(latents, replace(every, scores={key: values[:, columns] for key, values in every.scores.items()}))
        for name, (latents, columns) in parts.items()
    }


def test_the_latent_that_knows_is_picked_on_the_training_half() -> None:
    table = behaviour_table(pools(), seed=0)
    refusal = {row["pool"]: row for row in table.filter(behaviour="refusal", question="before_answer").iter_rows(named=True)}
    assert refusal["chat_specific"]["latent"] == 8
    assert refusal["chat_specific"]["auroc"] > 0.9
    assert refusal["shared"]["auroc"] < 0.75
    assert (refusal["base_sae"]["latent"], refusal["base_sae"]["auroc"]) == (1, refusal["chat_specific"]["auroc"])
    assert "none" not in refusal
    assert refusal["bag_of_words"]["auroc"] == 1.0  # "rob" and "bake" give it away
    assert refusal["chat_specific"]["n_positive"] == 30
    low, high = refusal["chat_specific"]["auroc_low"], refusal["chat_specific"]["auroc_high"]
    assert low < refusal["chat_specific"]["auroc"] < high


def test_no_conversations_give_an_empty_table() -> None:
    assert behaviour_table({}, 0).height == 0


def test_auroc_by_hand() -> None:
    # Pairs (positive, negative): (3,1) (3,2) (2,1) right, (2,2) a tie: 3.5 of 4.
    assert auroc(np.array([True, True, False, False]), np.array([3.0, 2.0, 1.0, 2.0])) == pytest.approx(3.5 / 4)
    assert np.isnan(auroc(np.array([True, True]), np.array([1.0, 2.0])))


def test_the_bootstrap_draws_groups_not_rows() -> None:
    # One prompt a side, many copies: the interval has no width, for there is nothing to resample.
    positive = np.array([True] * 10 + [False] * 10)
    score = np.concatenate([np.linspace(0, 1, 10), np.linspace(0, 0.9, 10)])
    groups = np.array(["a"] * 10 + ["b"] * 10)
    low, high = bootstrap_interval(positive, score, groups, 0)
    assert low == high


def test_the_bootstrap_agrees_with_a_slow_one() -> None:
    generator = np.random.default_rng(1)
    positive = generator.random(80) < 0.4
    score = np.round(generator.standard_normal(80) + positive, 1)  # with ties
    groups = np.array([f"{'p' if side else 'n'}{i % 7}" for i, side in enumerate(positive)])
    slow = []
    for _ in range(1000):
        rows = [
            np.flatnonzero(groups == key)
            for side in "pn"
            for key in generator.choice(np.unique(groups[np.char.startswith(groups, side)]), 7)
        ]
        picked = np.concatenate(rows)
        slow.append(auroc(positive[picked], score[picked]))
    assert bootstrap_interval(positive, score, groups, 0) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.02)


def test_only_tokens_before_the_assistants_first_count() -> None:
    user, template, said = Flag.USER.value, Flag.TEMPLATE.value, Flag.ASSISTANT.value
    flags = np.array([template, user, template, said, said | template, template, user, template, said], dtype=np.uint8)
    sequence = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert before_answer(flags, sequence).tolist() == [True, True, True, False, False, True, True, True, False]
