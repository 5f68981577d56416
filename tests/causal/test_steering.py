"""Steering: what is added where, the KV cache, ablation against the formula, seeds, and tables of rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
import torch
from setting import LAYER, D, make_crosscoder, make_pair, make_table

from conftest import forget_digests
from crossdiff.activations.counted import Counted
from crossdiff.activations.store import Store
from crossdiff.causal.answers import Rules
from crossdiff.causal.generation import Addition, Prompt, Sampling, ask, choose, continue_batch
from crossdiff.causal.steering import Steerer, Steering, matched_controls
from crossdiff.causal.steering_table import labelled_prompts, rates, steering_table
from crossdiff.config import L1Config, SingleConfig, SteerConfig
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.view import view_of
from crossdiff.errors import UserError
from crossdiff.models.access import edited_after, residuals_after
from crossdiff.sources import SOURCES
from stores import make_store

PROMPTS = [Prompt((1, 3, 70, 71, 72, 2, 4), (True, True, False, False, False, True, True)),
           Prompt((1, 3, 90, 91, 92, 2, 4), (True, True, False, False, False, True, True))]  # fmt: skip
ENDS = frozenset({2})
SAMPLING = Sampling(max_new_tokens=8)


def steerer(kind: str = "llama") -> Steerer:
    return Steerer(make_pair(kind, change=0.3), make_crosscoder(), LAYER, make_table(), Counted(1))


def without_cache(steer: Steerer, prompt: Prompt, steering: Steering, n: int) -> list[int]:
    """Greedy continuation in which every step reads all tokens again: the oracle of the cached generation."""
    ids = list(prompt.token_ids)
    coder, source = steer.crosscoder, 1 if steering.model == "chat" else 0
    model = getattr(steer.pair, steering.model)
    for _ in range(n):
        tokens = torch.tensor([ids])
        streams = [residuals_after(each, tokens, [LAYER])[0][0] for each in steer.pair.models]
        chosen = torch.ones(len(ids))
        if steering.tokens in ("prompt", "template"):
            chosen[len(prompt.token_ids) :] = 0
        if steering.tokens == "template":
            chosen[: len(prompt.token_ids)] = torch.tensor(prompt.template).float()
        if steering.tokens == "generated":
            chosen[: len(prompt.token_ids)] = 0
        chosen[0] = 0
        change = torch.zeros(len(ids), D)
        for latent, strength in ((steering.latent, steering.strength), *steering.others):
            direction = coder.decoder.view(-1, 2, D)[latent] / coder.scale
            norms = coder.decoder.view(-1, 2, D)[latent].norm(dim=1)
            if steering.mode == "add":
                change += strength * 5.0 / norms.sum() * direction[1] * chosen[:, None]  # mean_activation is 5
            else:
                x = ((torch.stack(streams, 1) - coder.mean) * coder.scale).flatten(1)
                f = (x @ coder.encoder[latent] + coder.encoder_bias[latent]).clamp(min=0)
                change -= strength * (f * chosen)[:, None] * direction[source]
        with torch.no_grad(), edited_after(model, LAYER, lambda h, change=change: h + change):
            following = int(model(input_ids=tokens).logits[0, -1].argmax())
        if following in ENDS:
            break
        ids.append(following)
    return ids[len(prompt.token_ids) :]


def generate(steer: Steerer, prompts: list[Prompt], steering: Steering, sampling: Sampling = SAMPLING) -> list[list[int]]:
    model = getattr(steer.pair, steering.model)
    edit = steer.make_edit(steering)
    return continue_batch(model, LAYER, prompts, edit, steering.tokens, 1, ENDS, sampling, steer.answerer.cached)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mamba2"])
@pytest.mark.parametrize(
    "steering",
    [
        Steering(3, "add", 2.0, "chat", "all"),
        Steering(3, "add", -2.0, "base", "template"),
        Steering(3, "add", 3.0, "chat", "generated"),
        Steering(3, "ablate", 3.0, "chat", "all"),
        Steering(5, "ablate", 3.0, "base", "prompt"),
        Steering(3, "add", 2.0, others=((7, -1.0), (5, 3.0))),
        Steering(3, "ablate", 3.0, others=((7, 2.0), (5, -1.0))),
    ],
)
def test_the_cached_generation_equals_reading_all_tokens_again(kind: str, steering: Steering) -> None:
    steer = steerer(kind)
    assert steer.answerer.cached == (kind != "mamba2"), "its state is not among past_key_values"
    expected = [without_cache(steer, prompt, steering, SAMPLING.max_new_tokens) for prompt in PROMPTS]
    assert generate(steer, PROMPTS, steering) == expected


def test_rows_that_finish_leave_the_batch_without_a_cache_too() -> None:
    steer = steerer("mamba2")
    steering = Steering(3, "ablate", 3.0)
    alone = [generate(steer, [prompt], steering)[0] for prompt in PROMPTS]
    ends = frozenset({alone[0][2]})  # ends the first answer after two tokens, and the second one elsewhere or never
    cut = [tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))] for tokens in alone]
    assert len(cut[0]) < len(cut[1])
    edit = steer.make_edit(steering)
    assert continue_batch(steer.pair.chat, LAYER, PROMPTS, edit, "all", 1, ends, SAMPLING, steer.answerer.cached) == cut


@pytest.mark.parametrize("model", ["base", "chat"])
def test_the_base_model_reads_its_stand_ins_while_steering(model: Literal["base", "chat"]) -> None:
    """Token 4 is read as 9 by the base model: the same as a base model whose embedding of 4 is that of 9."""
    steer = steerer()
    mapped = Steerer(replace(steer.pair, stand_ins={4: 9}), steer.crosscoder, LAYER, make_table(), Counted(1))
    steering = Steering(5, "ablate", 3.0, model)
    got = mapped.answer_prompts(PROMPTS, steering, SAMPLING)
    with torch.no_grad():
        weight = steer.pair.base.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        weight[4] = weight[9]
    assert got == steer.answer_prompts(PROMPTS, steering, SAMPLING)


def test_strength_0_changes_nothing_and_a_large_one_does() -> None:
    steer = steerer()
    plain = continue_batch(steer.pair.chat, LAYER, PROMPTS, None, "all", 1, ENDS, SAMPLING)
    assert generate(steer, PROMPTS, Steering(3, "add", 0.0)) == plain
    assert generate(steer, PROMPTS, Steering(3, "ablate", 0.0)) == plain
    assert generate(steer, PROMPTS, Steering(3, "add", 20.0)) != plain


def test_further_latents_have_their_own_strength() -> None:
    steer = steerer()
    for mode in ("add", "ablate"):
        alone = [generate(steer, PROMPTS, Steering(latent, mode, 3.0)) for latent in (3, 7)]
        assert generate(steer, PROMPTS, Steering(3, mode, 3.0, others=((7, 0.0),))) == alone[0]
        assert generate(steer, PROMPTS, Steering(3, mode, 0.0, others=((7, 3.0),))) == alone[1]
    parts = [steer.vector(Steering(latent, "add", strength)) for latent, strength in ((3, 2.0), (7, -1.0))]
    torch.testing.assert_close(steer.vector(Steering(3, "add", 2.0, others=((7, -1.0),))), sum(parts))


def test_whoever_watches_may_stop_the_answers() -> None:
    steer, seen = steerer(), []
    (whole,) = steer.answer_prompts(PROMPTS[:1], None, SAMPLING)

    def watch(outputs: Any) -> bool:
        seen.append(list(outputs[0]))
        return len(seen) < 3

    (cut,) = steer.answer_prompts(PROMPTS[:1], None, SAMPLING, watch=watch)
    assert seen == [list(whole.token_ids[: n + 1]) for n in range(3)]
    assert cut.token_ids == whole.token_ids[:3] and cut.n_tokens == 3 and not cut.finished


def test_ablation_takes_the_contribution_out_of_the_residual_stream() -> None:
    steer = steerer()
    ids = torch.tensor([PROMPTS[0].token_ids])
    for latent in range(40):
        base, chat = (residuals_after(model, ids, [LAYER])[0] for model in steer.pair.models)
        coder = steer.crosscoder
        code = coder.sparse_code(coder.normalise(torch.stack([base[0], chat[0]], 1)))
        f = torch.zeros(ids.shape[1])
        f[code.token[code.latent == latent]] = code.values[code.latent == latent]
        edit = steer.make_edit(Steering(latent, "ablate", 1.0))
        got = edit(chat, ids, torch.ones_like(ids, dtype=torch.bool))
        expected = chat[0] - f[:, None] * coder.directions()[1, latent] / coder.scale
        torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-5)
        if f.max() > 0:
            assert not torch.equal(got, chat)


def test_strength_1_is_the_mean_contribution_of_the_latent() -> None:
    # v = 5 on average; f = v / (sum of norms); in the models' space the contribution is f * ||d_chat|| / scale.
    steer = steerer()
    norms = steer.crosscoder.norms()[3]
    expected = 5.0 / float(norms.sum()) * float(norms[1]) / 1.7
    assert float(steer.vector(Steering(3, "add", 1.0)).norm()) == pytest.approx(expected, rel=1e-5)
    assert float(steer.vector(Steering(3, "add", 2.0, norm=0.7)).norm()) == pytest.approx(1.4, rel=1e-5)
    vector = steer.vector(Steering(3, "add", 1.0))
    assert float(torch.nn.functional.cosine_similarity(vector, steer.crosscoder.directions()[1, 3], dim=0)) > 0.9999


def test_left_out_positions_are_never_edited() -> None:
    seen = []

    class Watch(Addition):
        def __call__(self, hidden: Any, token_ids: Any, chosen: Any) -> Any:
            seen.append(chosen.clone())
            return super().__call__(hidden, token_ids, chosen)

    continue_batch(steerer().pair.chat, LAYER, PROMPTS, Watch(torch.ones(D)), "all", 3, ENDS, Sampling(max_new_tokens=2))
    assert seen[0].tolist() == [[False] * 3 + [True] * 4] * 2
    assert seen[1].tolist() == [[True]] * 2


def test_a_seed_decides_and_the_batch_does_not() -> None:
    steer, warm = steerer(), Sampling(max_new_tokens=8, temperature=1.0, seed=4)
    steering = Steering(3, "add", 0.5)
    together = generate(steer, PROMPTS, steering, warm)
    assert together == generate(steer, PROMPTS, steering, warm)
    assert together == [generate(steer, [prompt], steering, warm)[0] for prompt in PROMPTS]
    assert together != generate(steer, PROMPTS, steering, replace(warm, seed=5))


def test_rows_that_end_leave_the_others_as_they_are() -> None:
    steer, warm = steerer(), Sampling(max_new_tokens=8, temperature=1.0, seed=0)
    steering = Steering(3, "ablate", 3.0)
    alone = [generate(steer, [prompt], steering, warm)[0] for prompt in PROMPTS]
    # What the first prompt says third, and the second never says, becomes the end of an answer.
    ends = ENDS | {alone[0][2]}
    assert alone[0][2] not in (*alone[0][:2], *alone[1])
    got = continue_batch(steer.pair.chat, LAYER, PROMPTS, steer.make_edit(steering), "all", 1, ends, warm)
    assert got == [alone[0][:2], alone[1]]


def test_draws_have_the_models_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))
    drawn = torch.bincount(choose(logits, 0.5, uniform), minlength=4) / 20_000
    torch.testing.assert_close(drawn, (logits[0] / 0.5).softmax(0), rtol=0, atol=0.01)
    assert choose(logits[:2], 0.0, uniform[:2]).tolist() == [2, 2]


def test_a_question_is_rendered_with_the_header_of_the_answer() -> None:
    prompt = ask(steerer().pair.tokenizer, "hi")
    # <|bos|> <|user|> h i <|end|> <|assistant|>; the BOS is not a template token, but it is never edited anyway
    assert len(prompt.token_ids) == 6
    assert prompt.template[1:] == (True, False, False, True, True)


def test_latents_that_cannot_be_steered_with() -> None:
    steer = steerer()
    with pytest.raises(UserError, match="there is no latent 40: the crosscoder has 40, from 0 to 39"):
        steer.answer(["hi"], Steering(40, "add", 1.0), SAMPLING)
    steer.table = steer.table.with_columns(mean_activation=pl.lit(float("nan")))
    with pytest.raises(UserError, match="latent 3 was never active"):
        steer.answer(["hi"], Steering(3, "add", 1.0), SAMPLING)


@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_a_coder_of_one_model_steers_nothing(mode: Any) -> None:
    coder = new_crosscoder(
        8, torch.zeros(1, D), 1.0, L1Config(), 1.0, seed=0, view=view_of(SingleConfig(source="base"), SOURCES)
    )
    steerer = Steerer(make_pair("llama"), coder, LAYER, make_table(), Counted(1))
    with pytest.raises(UserError, match="this coder has one source, base, and no direction in the chat model"):
        steerer.check(Steering(3, mode, 1.0))


def test_controls_are_near_in_frequency_and_norm_and_shared() -> None:
    table = pl.DataFrame(
        {
            "latent": range(8),
            "frequency": [0.1, 0.1, 0.11, 0.001, 0.09, 0.1, 0.0, 0.12],
            "norm_chat": [1.0, 1.1, 1.0, 1.0, 0.9, 9.0, 1.0, 1.0],
            "verdict": ["chat_specific", "shared", "shared", "shared", "shared", "shared", "shared", "chat_specific"],
        }
    )
    assert set(matched_controls(table, 0, 1, seed=0)) <= {1, 2, 3, 4, 5}
    drawn = {latent for seed in range(40) for latent in matched_controls(table.head(5), 0, 1, seed)}
    assert drawn == {1, 2, 3, 4}
    with pytest.raises(UserError, match="there are only 5 shared latents for 6 controls"):
        matched_controls(table, 0, 6, seed=0)


RULES = Rules.model_validate({"behaviours": {"polite": {"pattern": "please"}, "loud": {"pattern": "!", "at_least": 2}}})


def test_rates_by_hand() -> None:
    def rows(role: str, latent: int | None, shows: list[list[str]]) -> list[dict[str, Any]]:
        return [
            {"prompt": str(n), "label": "a", "role": role, "latent": latent, "strength": 0.0 if latent is None else 1.0,
             "shows": each, "degenerate": n == 0, "finished": True}
            for n, each in enumerate(shows)
        ]  # fmt: skip

    table = pl.DataFrame(
        rows("unsteered", None, [["polite"], ["polite"], [], []]) + rows("latent", 3, [[], ["polite"], [], []])
    )
    found = rates(table, RULES, 0).filter(pl.col("behaviour") == "polite")
    plain, steered = found.row(0, named=True), found.row(1, named=True)
    assert (plain["rate"], plain["change"], plain["change_low"], plain["change_high"]) == (0.5, 0, 0, 0)
    assert (steered["rate"], steered["change"], steered["n"], steered["degenerate"]) == (0.25, -0.25, 4, 0.25)
    assert steered["change_low"] < -0.25 < steered["change_high"] <= 0
    assert steered["rate_low"] == pytest.approx(0.0456, abs=1e-3)  # Wilson, 1 of 4
    assert steered["rate_high"] == pytest.approx(0.6994, abs=1e-3)


def labelled_store(folder: Path) -> Store:
    make_store(folder, torch.randn(200, 2, 4), length=20, heldout=0.5)
    table = pl.read_parquet(folder / "documents.parquet").with_columns(
        n_messages=pl.lit(2, dtype=pl.Int32),
        label=pl.Series(["a", "b"] * 5),
        prompt=pl.Series(["p0", "p1", "p2", "p3", "p4", "p0", "p6", "p7", "p8", "p8"]),
    )
    table.write_parquet(folder / "documents.parquet")
    forget_digests(folder)
    return Store(folder)


def test_prompts_are_distinct_and_no_training_conversation_asks_them(tmp_path: Path) -> None:
    store = labelled_store(tmp_path)
    # Held out are documents 5 to 9; p0 is asked in training; p8 occurs twice.
    found = labelled_prompts(store, SteerConfig(latent=0))
    assert sorted(found["prompt"]) == ["p6", "p7", "p8"]
    assert labelled_prompts(store, SteerConfig(latent=0, labels=("b",), prompts_per_label=1))["prompt"].to_list() == ["p7"]
    with pytest.raises(UserError, match="no heldout prompt has the label 'c'; the labels are a, b"):
        labelled_prompts(store, SteerConfig(latent=0, labels=("c",)))


def test_the_table_has_every_prompt_in_every_condition() -> None:
    steer = steerer()
    steer.table = steer.table.with_columns(
        verdict=pl.when(pl.col("latent") == 3).then(pl.lit("chat_specific")).otherwise(pl.lit("shared"))
    )
    prompts = pl.DataFrame({"prompt": ["hi", "why", "go on"], "label": ["a", "b", "a"]})
    config = SteerConfig(latent=3, strength=(1.0, 4.0), controls=2, max_new_tokens=4)
    table = steering_table(steer, prompts, config, RULES)
    counts = table.group_by("role", "strength").len().sort("role", "strength").rows()
    assert counts == [("control", 1.0, 6), ("control", 4.0, 6), ("latent", 1.0, 3), ("latent", 4.0, 3), ("unsteered", 0.0, 3)]
    assert table["prompt"].to_list()[:3] == ["hi", "why", "go on"]
    assert set(rates(table, RULES, 0)["behaviour"]) == {"polite", "loud"}
