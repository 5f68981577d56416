"""Patching against a slow oracle, and the identities and invariances that hold whatever the models are."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from setting import LAYER, D, arm, make_crosscoder, make_difference_coder, make_pair, make_sequences

from crossdiff.activations.counted import Counted
from crossdiff.causal.conversations import SPANS, span_of
from crossdiff.causal.interventions import Arm, FirstTokens, PrincipalPart
from crossdiff.causal.patching import Divergences, Patcher, Reference
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.models.access import edited_after
from crossdiff.models.pair import Pair
from crossdiff.text.chat import Flag
from crossdiff.text.sequences import TokenSequence

MEANS = torch.randn(len(GROUPS) + 1, D, generator=torch.Generator().manual_seed(3))
SOME = (1, 4, 7, 20, 33)
PRINCIPAL = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(4))).Q.T.contiguous()
MEASURES = ("kl", "nll", "kl_base", "cross_entropy")


def principal(*components: int, complement: bool = False) -> PrincipalPart:
    return PrincipalPart(kind="principal", components=components, complement=complement)


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
    arm("chat_part", SOME, use="chat"),
    arm("projection", SOME, use="projection"),
    arm("complement", SOME, use="complement"),
    arm("principal", (), (principal(0, 2),)),
    arm("principal_complement", (), (principal(0, 2, complement=True),)),
    arm("first", (), ("activation",), tokens=FirstTokens(kind="first", k=2)),
    arm("template_and_first", (), ("activation",), tokens=FirstTokens(kind="first", k=2, template=True)),
    arm("base_reconstruction", start="base_reconstruction"),
    arm("chat_reconstruction_alone", start="chat_reconstruction"),
    arm("chat_to_base", start="chat", continues="base"),
    arm("chat_without_some", SOME, start="chat"),
    arm("chat_error_with_bias", (), ("error", "bias")),
    arm("template_of_base", (), ("activation",), start="chat", tokens="template", continues="base"),
    arm("chat_reconstruction_without_some", SOME, start="chat_reconstruction"),
)


@cache
def pair_of(kind: str) -> Pair:
    return make_pair(kind)


def patcher(kind: str = "llama", arms: tuple[Arm, ...] = ARMS, leave_out: int = 1) -> Patcher:
    return Patcher(pair_of(kind), make_crosscoder(), LAYER, arms, MEANS, Counted(leave_out), PRINCIPAL, MEASURES)


def mean_kl(divergences: Divergences) -> torch.Tensor:
    """[arm, conversation]."""
    return divergences.total[0].sum(2) / divergences.n.sum(1)


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

    def projected(basis: torch.Tensor) -> torch.Tensor:
        """The difference's part in the span of orthonormal vectors, one at a time."""
        return sum(((chat - base) @ vector).unsqueeze(1) * vector for vector in basis)  # type: ignore[return-value]

    first = torch.zeros(len(flags), 1, dtype=torch.bool)
    n_in_message = 0
    for at, (token, is_template) in enumerate(zip(flags, template.squeeze(1).tolist(), strict=True)):
        n_in_message = n_in_message + 1 if token & Flag.ASSISTANT else 0
        first[at] = 1 <= n_in_message <= 2 and not is_template
    chat_directions = torch.linalg.qr(directions[list(SOME), 1].T).Q.T
    two = PRINCIPAL.double()[[0, 2]]
    taken = add(SOME) - base
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
        "chat_part": base + sum(f[:, j, None] * directions[j, 1] for j in SOME),
        "projection": base + projected(chat_directions),
        "complement": chat - projected(chat_directions),
        "principal": base + projected(two),
        "principal_complement": chat - projected(two),
        "first": torch.where(first, chat, base),
        "template_and_first": torch.where(first | template, chat, base),
        "base_reconstruction": reconstruction[:, 0],
        "chat_reconstruction_alone": reconstruction[:, 1],
        "chat_to_base": chat,
        "chat_without_some": chat - taken,
        # As published: the chat activation with the latents' differences taken away, so that its bias stays.
        "chat_error_with_bias": chat - (add(tuple(range(len(directions)))) - base),
        "template_of_base": torch.where(template, base, chat),
        "chat_reconstruction_without_some": reconstruction[:, 1] - taken,
    }[name]


def oracle(kind: str, arms: tuple[Arm, ...], sequence: TokenSequence, leave_out: int = 1) -> torch.Tensor:
    """Sums [measure, arm, span] of one conversation: whole models, one at a time, in float64."""
    pair = make_pair(kind)
    base_model, chat_model = pair.base.double(), pair.chat.double()
    ids = torch.from_numpy(sequence.token_ids.astype(np.int64)).unsqueeze(0)
    base, chat = residual(base_model, ids), residual(chat_model, ids)
    with torch.no_grad():
        log_p, log_base = (model(input_ids=ids).logits[0].log_softmax(1) for model in (chat_model, base_model))
    out = torch.zeros(len(MEASURES), len(arms), len(SPANS), dtype=torch.float64)
    for row, entry in enumerate(arms):
        edited = oracle_edit(entry.name, base, chat, sequence.flags).clone()
        model, own = (base_model, base) if entry.continues == "base" else (chat_model, chat)
        edited[:leave_out] = own[:leave_out]
        with torch.no_grad(), edited_after(model, LAYER, lambda hidden, edited=edited: edited.unsqueeze(0)):
            log_q = model(input_ids=ids).logits[0].log_softmax(1)
        kl, kl_base = ((log.exp() * (log - log_q)).sum(1) for log in (log_p, log_base))
        for position, span in enumerate(span_of(sequence.flags)):
            if span >= 0:
                nll = -log_q[position, ids[0, position + 1]]
                cross_entropy = -log_q[position, log_p[position].argmax()]
                out[:, row, span] += torch.stack([kl[position], nll, kl_base[position], cross_entropy])
    return out


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_every_arm_against_the_oracle(kind: str) -> None:
    sequences = make_sequences(pair_of(kind).tokenizer, 2)
    got = patcher(kind).measure(sequences)
    expected = torch.stack([oracle(kind, ARMS, sequence) for sequence in sequences], dim=2)
    assert float(expected[0, 0].sum(1).min()) > 1e-3, "the models differ enough for the test to mean something"
    torch.testing.assert_close(got.total, expected, rtol=1e-4, atol=2e-4)


def test_more_positions_left_out_are_those_of_the_model_that_continues() -> None:
    named = ("chat_to_base", "template_of_base", "base_reconstruction")
    arms = ARMS[:4] + tuple(entry for entry in ARMS if entry.name in named)
    sequences = make_sequences(pair_of("llama").tokenizer, 2)
    got = patcher(arms=arms, leave_out=6).measure(sequences)
    expected = torch.stack([oracle("llama", arms, sequence, leave_out=6) for sequence in sequences], dim=2)
    torch.testing.assert_close(got.total, expected, rtol=1e-4, atol=2e-4)
    # `base_model` is the base model: no edit, no activation of the other model.
    kl_base = got.total[MEASURES.index("kl_base"), 1]
    assert float(kl_base.abs().max()) < 1e-5


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
    differences = patch.differences((base, chat), *torch.zeros(2, 9, dtype=torch.long))
    reconstruction = coder.reconstruct(torch.stack([base, chat], 1))
    error = torch.stack([base, chat], 1) - reconstruction
    named = {entry.name: entry for entry in ARMS}
    got = base + differences.change(named["chat_reconstruction"])
    torch.testing.assert_close(got, reconstruction[:, 1] + error[:, 0], rtol=0, atol=1e-5)
    got = base + differences.change(named["chat_error"])
    torch.testing.assert_close(got, reconstruction[:, 0] + error[:, 1], rtol=0, atol=1e-5)


def test_a_coder_of_the_difference_against_its_formula() -> None:
    # x = (h_chat - h_base - mean) * scale; the difference it explains is sum_j f_j d_j / scale + mean + b / scale.
    coder = make_difference_coder()
    arms = (arm("none"), arm("all", None), arm("one", (7,)), arm("with_bias", None, ("bias",)), arm("error", (), ("error",)),
            arm("full", (), ("activation",)), arm("parts", None, ("error", "bias")))  # fmt: skip
    patch = Patcher(pair_of("llama"), coder, LAYER, arms, MEANS, Counted(1))
    base, chat = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(5)).unbind(0)
    differences = patch.differences((base, chat), *torch.zeros(2, 9, dtype=torch.long))
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
        torch.testing.assert_close(differences.change(entry), expected[entry.name], rtol=0, atol=2e-5)
    kl = mean_kl(patch.measure(make_sequences(pair_of("llama").tokenizer)))
    assert float(kl[-2:].max()) < 1e-5
    assert float(kl[0].min()) > 1e-3


def test_permuting_conversations_and_the_batch_size_change_nothing() -> None:
    sequences = make_sequences(pair_of("llama").tokenizer)
    patch = patcher()
    together = patch.measure(sequences)
    alone = [patch.measure([sequence]) for sequence in sequences]
    backwards = patch.measure(sequences[::-1])
    torch.testing.assert_close(torch.cat([each.total for each in alone], 2), together.total, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(backwards.total.flip(2), together.total, rtol=1e-5, atol=5e-5)
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
    assert torch.equal(got.total[0, 0], got.total[0, 1])
    assert not torch.equal(got.total[0, 0], got.total[0, 2])
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


def test_projections_split_the_difference_and_more_directions_than_dimensions_are_all_of_it() -> None:
    patch = patcher()
    generator = torch.Generator().manual_seed(6)
    base, chat = torch.randn(2, 9, D, generator=generator).unbind(0)
    differences = patch.differences((base, chat), *torch.zeros(2, 9, dtype=torch.long))
    named = {entry.name: entry for entry in ARMS}
    for left, right in (("projection", "complement"), ("principal", "principal_complement")):
        both = differences.change(named[left]) + differences.change(named[right])
        torch.testing.assert_close(both, chat - base, rtol=0, atol=1e-5)
    everything = differences.change(arm("all_directions", None, use="projection"))  # 40 directions in 16 dimensions
    torch.testing.assert_close(everything, chat - base, rtol=0, atol=1e-5)
    twice = differences.change(arm("twice", (7, 7), use="projection"))  # a rank below the number of vectors
    torch.testing.assert_close(twice, differences.change(arm("one", (7,), use="projection")), rtol=0, atol=1e-5)
