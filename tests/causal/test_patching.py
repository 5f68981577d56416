"""Patching against a slow oracle, and the identities and invariances that hold whatever the models are."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from setting import LAYER, D, arm, make_crosscoder, make_difference_coder, make_pair, make_sequences

from crossdiff.activations.counted import Counted
from crossdiff.causal.conversations import SPANS, span_of
from crossdiff.causal.interventions import Arm
from crossdiff.causal.patching import Divergences, Patcher, Reference
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.models.access import edited_after
from crossdiff.models.pair import Pair
from crossdiff.text.sequences import TokenSequence

MEANS = torch.randn(len(GROUPS) + 1, D, generator=torch.Generator().manual_seed(3))
SOME = (1, 4, 7, 20, 33)
ARMS = (
    arm("none"),
    arm("base_model", continues="base"),
    arm("all", None),
    arm("some", SOME),
    arm("one", (7,)),
    arm("chat_reconstruction", None, ("bias",)),
    arm("chat_error", (), ("error",)),
    arm("template", (), ("activation",), tokens="template"),
    arm("content", SOME, (), tokens="content"),
    arm("mean", (), ("mean_difference_conversations",)),
    arm("mean_by_group", (), ("mean_difference_token_group",)),
    arm("full", (), ("activation",)),
    arm("parts", None, ("error", "bias")),
)


@cache
def pair_of(kind: str) -> Pair:
    return make_pair(kind)


def patcher(kind: str = "llama", arms: tuple[Arm, ...] = ARMS, leave_out: int = 1) -> Patcher:
    return Patcher(pair_of(kind), make_crosscoder(), LAYER, arms, MEANS, Counted(leave_out))


def mean_kl(divergences: Divergences) -> torch.Tensor:
    """[arm, conversation]."""
    return divergences.total.sum(2) / divergences.n.sum(1)


def residual(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    kept = []
    with torch.no_grad(), edited_after(model, LAYER, lambda hidden: kept.append(hidden) or hidden):
        model(input_ids=ids)
    return kept[0][0]


def oracle_edit(name: str, base: torch.Tensor, chat: torch.Tensor, flags: np.ndarray) -> torch.Tensor:
    """The edited activations [token, d] from the formulas: explicit reconstructions, a loop over latents, float64."""
    coder = make_crosscoder()
    x = (torch.stack([base, chat], 1) - coder.mean.double()) * coder.scale
    f = (x.flatten(1) @ coder.encoder.double().T + coder.encoder_bias.double()).clamp(min=0)
    directions = coder.decoder.double().view(-1, 2, D) / coder.scale
    bias = coder.mean.double() + coder.decoder_bias.double().view(2, D) / coder.scale
    reconstruction = torch.einsum("tj,jsd->tsd", f, directions) + bias
    error = torch.stack([base, chat], 1) - reconstruction
    template = torch.from_numpy(group_of(flags) == GROUPS.index("template")).unsqueeze(1)

    def add(latents: tuple[int, ...]) -> torch.Tensor:
        out = base.clone()
        for j in latents:
            out += f[:, j, None] * (directions[j, 1] - directions[j, 0])
        return out

    by_group = MEANS.double()[torch.from_numpy(group_of(flags))]
    return {
        "none": base,
        "base_model": base,
        "all": add(tuple(range(len(directions)))),
        "some": add(SOME),
        "one": add((7,)),
        "chat_reconstruction": reconstruction[:, 1] + error[:, 0],
        "chat_error": reconstruction[:, 0] + error[:, 1],
        "template": torch.where(template, chat, base),
        "content": torch.where(template, base, add(SOME)),
        "mean": base + MEANS[-1].double(),
        "mean_by_group": base + by_group,
        "full": chat,
        "parts": chat,
    }[name]


def oracle(kind: str, arms: tuple[Arm, ...], sequence: TokenSequence, leave_out: int = 1) -> torch.Tensor:
    """KL sums [arm, span] of one conversation: whole models, one at a time, in float64."""
    pair = make_pair(kind)
    base_model, chat_model = pair.base.double(), pair.chat.double()
    ids = torch.from_numpy(sequence.token_ids.astype(np.int64)).unsqueeze(0)
    base, chat = residual(base_model, ids), residual(chat_model, ids)
    with torch.no_grad():
        log_p = chat_model(input_ids=ids).logits[0].log_softmax(1)
    out = torch.zeros(len(arms), len(SPANS), dtype=torch.float64)
    for row, entry in enumerate(arms):
        edited = oracle_edit(entry.name, base, chat, sequence.flags)
        edited[:leave_out] = chat[:leave_out]
        model = base_model if entry.continues == "base" else chat_model
        with torch.no_grad(), edited_after(model, LAYER, lambda hidden, edited=edited: edited.unsqueeze(0)):
            log_q = model(input_ids=ids).logits[0].log_softmax(1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        for position, span in enumerate(span_of(sequence.flags)):
            if span >= 0:
                out[row, span] += kl[position]
    return out


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_every_arm_against_the_oracle(kind: str) -> None:
    sequences = make_sequences(pair_of(kind).tokenizer, 2)
    got = patcher(kind).measure(sequences)
    expected = torch.stack([oracle(kind, ARMS, sequence) for sequence in sequences], dim=1)
    assert float(expected[0].sum(1).min()) > 1e-3, "the models differ enough for the test to mean something"
    torch.testing.assert_close(got.total, expected, rtol=1e-4, atol=2e-4)


def test_more_positions_left_out_are_the_chat_models_in_every_arm() -> None:
    arms, sequences = ARMS[:4], make_sequences(pair_of("llama").tokenizer, 2)
    got = patcher(arms=arms, leave_out=6).measure(sequences)
    expected = torch.stack([oracle("llama", arms, sequence, leave_out=6) for sequence in sequences], dim=1)
    torch.testing.assert_close(got.total, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_identities(kind: str) -> None:
    arms = {entry.name: index for index, entry in enumerate(ARMS)}
    kl = mean_kl(patcher(kind).measure(make_sequences(pair_of(kind).tokenizer)))
    assert float(kl[arms["full"]].abs().max()) < 1e-5  # full swap: the chat model itself
    assert float(kl[arms["parts"]].abs().max()) < 1e-5  # all latents + error + bias = full swap
    assert float(kl[arms["none"]].min()) > 1e-3


def test_chat_reconstruction_with_base_error_is_all_latents_with_the_bias_difference() -> None:
    # The arm is written as [all latents, bias]; here it is made from the reconstructions themselves.
    patch, coder = patcher(), make_crosscoder()
    generator = torch.Generator().manual_seed(5)
    base, chat = torch.randn(2, 9, D, generator=generator).unbind(0)
    differences = patch.differences(base, chat, torch.zeros(9, dtype=torch.long))
    reconstruction = coder.reconstruct(torch.stack([base, chat], 1))
    error = torch.stack([base, chat], 1) - reconstruction
    named = {entry.name: entry for entry in ARMS}
    got = base + differences.added_by(named["chat_reconstruction"])
    torch.testing.assert_close(got, reconstruction[:, 1] + error[:, 0], rtol=0, atol=1e-5)
    got = base + differences.added_by(named["chat_error"])
    torch.testing.assert_close(got, reconstruction[:, 0] + error[:, 1], rtol=0, atol=1e-5)


def test_a_coder_of_the_difference_against_its_formula() -> None:
    # x = (h_chat - h_base - mean) * scale; the difference it explains is sum_j f_j d_j / scale + mean + b / scale.
    coder = make_difference_coder()
    arms = (arm("none"), arm("all", None), arm("one", (7,)), arm("with_bias", None, ("bias",)), arm("error", (), ("error",)),
            arm("full", (), ("activation",)), arm("parts", None, ("error", "bias")))  # fmt: skip
    patch = Patcher(pair_of("llama"), coder, LAYER, arms, MEANS, Counted(1))
    base, chat = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(5)).unbind(0)
    differences = patch.differences(base, chat, torch.zeros(9, dtype=torch.long))
    x = (chat - base - coder.mean) * coder.scale
    f = (x @ coder.encoder.T + coder.encoder_bias).clamp(min=0)
    assert float(f[:, 7].max()) > 0
    bias = coder.mean[0] + coder.decoder_bias / coder.scale
    explained = f @ coder.decoder / coder.scale
    expected = {
        "none": torch.zeros_like(base), "all": explained, "one": f[:, 7:8] * coder.decoder[7] / coder.scale,
        "with_bias": explained + bias, "error": chat - base - explained - bias, "full": chat - base, "parts": chat - base,
    }  # fmt: skip
    for entry in arms:
        torch.testing.assert_close(differences.added_by(entry), expected[entry.name], rtol=0, atol=2e-5)
    kl = mean_kl(patch.measure(make_sequences(pair_of("llama").tokenizer)))
    assert float(kl[-2:].max()) < 1e-5
    assert float(kl[0].min()) > 1e-3


def test_permuting_conversations_and_the_batch_size_change_nothing() -> None:
    sequences = make_sequences(pair_of("llama").tokenizer)
    patch = patcher()
    together = patch.measure(sequences)
    alone = [patch.measure([sequence]) for sequence in sequences]
    backwards = patch.measure(sequences[::-1])
    torch.testing.assert_close(torch.cat([each.total for each in alone], 1), together.total, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(backwards.total.flip(1), together.total, rtol=1e-5, atol=5e-5)
    assert torch.equal(torch.cat([each.n for each in alone]), together.n)
    # What is behind a sequence in its row is padding in one case and nothing in the other.
    short = min(range(8), key=lambda index: len(sequences[index].token_ids))
    assert len(sequences[short].token_ids) < max(len(sequence.token_ids) for sequence in sequences)


def test_a_sequence_that_an_arm_leaves_alone_is_not_computed_again() -> None:
    coder = make_crosscoder()
    coder.encoder_bias[7] = -1e6  # never active
    patch = Patcher(pair_of("llama"), coder, LAYER, (arm("none"), arm("silent", (7,)), arm("one", (4,))), MEANS, Counted(1))
    calls: list[int] = []
    logits = patch.upper["chat"].logits
    patch.upper["chat"].logits = lambda hidden, *rest: calls.append(len(hidden)) or logits(hidden, *rest)  # type: ignore
    got = patch.measure(make_sequences(pair_of("llama").tokenizer))
    assert torch.equal(got.total[0], got.total[1])
    assert not torch.equal(got.total[0], got.total[2])
    assert len(calls) == 3  # the reference, `none`, and the latent that fires


def test_kl_without_log_probabilities_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 6, 50, generator=generator).unbind(0)
    rows = torch.tensor([True, False, True, True, False, True])
    log_p, log_q = left.double().log_softmax(1)[rows], right.double().log_softmax(1)[rows]
    expected = (log_p.exp() * (log_p - log_q)).sum(1)
    torch.testing.assert_close(Reference(left).kl(right[rows], rows).double(), expected, rtol=0, atol=1e-5)


def test_the_kl_of_equal_distributions_is_0_however_large_the_logits() -> None:
    logits = 300 + 30 * torch.randn(5, 4000, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(5, dtype=torch.bool)
    assert float(Reference(logits).kl(logits, everything).max()) == 0
    assert float(Reference(logits).kl(logits + 0.01, everything).max()) < 1e-4  # the same shift for all
