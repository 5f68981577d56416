"""Capturing and editing the residual stream, on several architectures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_model, make_tokenizer, save_pair
from crossdiff.activations.passes import paired_residuals
from crossdiff.errors import UserError
from crossdiff.models.access import UpperHalf, decoder_layers, edited_after, residuals_after
from crossdiff.models.loading import choose_device, load_tokenizer
from crossdiff.models.names import identify
from crossdiff.models.pair import load_pair
from crossdiff.models.positions import check_length, positions
from crossdiff.models.probe import probe

KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "olmo", "olmo2"]
SLIDING = {"mistral", "gemma2", "gemma3_text", "phi3"}


@pytest.mark.parametrize("kind", KINDS)
def test_captures_without_a_mask_equal_masked_hidden_states(kind: str) -> None:
    # A window of 4 is shorter than the sequences, so that layers with and without one differ.
    model = make_model(kind, **({"sliding_window": 4} if kind in SLIDING else {}))
    ids = torch.randint(5, 261, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 1:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    kept = mask.bool()
    captured = residuals_after(model, ids, [2, 0, 1])  # in one pass, in the order asked for
    for layer, got in zip((0, 1), captured[1:], strict=True):
        torch.testing.assert_close(got[kept], expected[layer + 1][kept], rtol=0, atol=1e-5)
    # The last entry of hidden_states is after the final norm.
    trunk = model.base_model
    norm = next(getattr(trunk, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(trunk, name))
    torch.testing.assert_close(norm(captured[0])[kept], expected[3][kept], rtol=0, atol=1e-5)
    with torch.no_grad():
        again = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert torch.equal(again[-1], expected[-1]), "the capture leaves the model as it was"


def test_the_forward_stops_after_the_last_layer() -> None:
    model, calls = make_model(), []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    residuals_after(model, torch.arange(5, 12).unsqueeze(0), [0, 1])
    assert calls == [0, 1]


def test_a_model_that_looks_ahead_is_refused() -> None:
    probe(make_model("gemma3_text"), "causal")
    with pytest.raises(UserError, match="both-ways: a token's residual stream depends on later tokens"):
        probe(make_model("gemma3_text", use_bidirectional_attention=True), "both-ways")


def test_a_model_that_cannot_be_run_is_named() -> None:
    model = make_model()
    decoder_layers(model)[2].mlp.register_forward_hook(lambda module, inputs, output: output @ torch.zeros(3, 3))
    with pytest.raises(UserError, match=r"broken cannot be run on cpu: RuntimeError: .*; check that its files are complete"):
        probe(model, "broken")


def test_several_residual_streams_per_token_are_refused() -> None:
    model = make_model(
        "gemma3n_text", n_layers=4, intermediate_size=[32] * 4, vocab_size_per_layer_input=272, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, altup_num_inputs=4, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"3n: a layer of Gemma3nForCausalLM gives \[\[4, 1, 8, 16\]\] for 8 tokens, expected \[1, 8, 16"
    ):
        probe(model, "3n")


def test_positions_that_a_model_can_read_and_that_it_was_trained_on() -> None:
    for kind in ("gpt2", "opt"):
        table = positions(make_model(kind))
        assert table == (128, True)
        assert check_length("small", table, 128, "harvest.max_length 128", "lower it") is None
        with pytest.raises(
            UserError, match=r"harvest.max_length 129 is more than the 128 positions that small can read; lower it"
        ):
            check_length("small", table, 129, "harvest.max_length 129", "lower it")
    rotary = positions(make_model("llama"))
    assert rotary == (128, False)
    remark = check_length("small", rotary, 129, "harvest.max_length 129", "lower it")
    assert remark is not None and remark.startswith(
        "harvest.max_length 129 is more than the 128 positions that small was trained"
    )
    assert positions(make_model("mamba2")) is None and check_length("small", None, 10**6, "x", "y") is None


def test_a_sequence_beyond_the_positions_is_refused_before_the_models_run(tmp_path: Path) -> None:
    base, chat = save_pair(tmp_path, "gpt2")
    pair = load_pair(str(base), str(chat), torch.device("cpu"))
    with pytest.raises(UserError, match=r"a sequence of 129 tokens is more than the 128 positions that .*base can read"):
        paired_residuals(pair, [np.zeros(129, np.int32)], [1])
    assert paired_residuals(pair, [np.zeros(128, np.int32)], [1])[0][0].shape == (128, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_moves_the_logits_and_an_identity_does_not(kind: str) -> None:
    model = make_model(kind)
    ids = torch.arange(5, 12).unsqueeze(0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with edited_after(model, 1, lambda hidden: hidden):
            assert torch.equal(model(input_ids=ids).logits, plain)
        with edited_after(model, 1, lambda hidden: hidden * torch.linspace(-2, 2, hidden.shape[-1])):
            assert not torch.allclose(model(input_ids=ids).logits, plain, atol=1e-4)
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_a_pair_is_loaded_and_its_layer_checked(tiny_pair: tuple[Path, Path]) -> None:
    pair = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))
    assert (pair.n_layers, pair.d_model) == (3, 16)
    assert pair.check_layer(None) == 1
    with pytest.raises(UserError, match="layer 3 does not exist: the models have 3 layers, 0 to 2"):
        pair.check_layer(3)


def test_a_base_model_without_the_chat_tokens(tmp_path: Path) -> None:
    """The chat model's embeddings were resized for a token of its own; the base model reads another one in its place."""
    base, chat = save_pair(tmp_path)
    tokenizer, model = make_tokenizer(), make_model(vocabulary=280)
    tokenizer.add_tokens([f"<|new-{index}|>" for index in range(12)])  # ids 261 to 272; the base model has 272 embeddings
    tokenizer.save_pretrained(chat)
    model.save_pretrained(chat)
    stand_ins = {f"<|new-{index}|>": "<|end|>" for index in range(12)}
    pair = load_pair(str(base), str(chat), torch.device("cpu"), stand_ins)
    ids = torch.tensor([[5, 272, 7, 261]])
    assert pair.base_ids(ids).tolist() == [[5, 2, 7, 2]]
    assert ids.tolist() == [[5, 272, 7, 261]]
    make_model(vocabulary=272).save_pretrained(chat)
    with pytest.raises(UserError, match="has 272 embeddings, but its tokenizer's ids go up to 272"):
        load_pair(str(base), str(chat), torch.device("cpu"), stand_ins)


def test_models_of_different_width_are_refused(tmp_path: Path) -> None:
    base, chat = save_pair(tmp_path)
    make_model(hidden_size=24).save_pretrained(chat)
    with pytest.raises(UserError, match=r"has 16 residual dimensions, .* has 24; all models need the same number"):
        load_pair(str(base), str(chat), torch.device("cpu"))


@pytest.mark.parametrize("damage", ["weights", "config", "empty"])
def test_an_unreadable_folder_says_what_was_expected(tmp_path: Path, damage: str) -> None:
    base, _ = save_pair(tmp_path)
    if damage == "weights":
        path = base / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "config":
        (base / "config.json").write_text("{")
    else:
        for path in base.iterdir():
            path.unlink()
    expected = r"cannot load '.*base': .*; expected a GGUF file, or a folder that transformers can load"
    with pytest.raises(UserError, match=expected):
        load_pair(str(base), str(base), torch.device("cpu"))


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load 'nobody/nothing': .*without a network, run `hf download NAME"):
        load_tokenizer("nobody/nothing")


def test_models_of_different_depth_are_refused(tmp_path: Path) -> None:
    base, chat = save_pair(tmp_path)
    make_model(n_layers=2).save_pretrained(chat)
    with pytest.raises(UserError, match=r"has 3 decoder layers, .* has 2"):
        load_pair(str(base), str(chat), torch.device("cpu"))


def test_identity_follows_the_weights(tiny_pair: tuple[Path, Path]) -> None:
    base, chat = identify(str(tiny_pair[0])), identify(str(tiny_pair[1]))
    assert base["digest"] != chat["digest"]
    assert identify(str(tiny_pair[0])) == base


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(UserError, match="device 'quantum' cannot be used"):
        choose_device("quantum")


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "phi3", "olmo2", "gemma3_text"])
def test_an_unedited_upper_half_gives_the_logits_of_the_model(kind: str, layer: int) -> None:
    model = make_model(kind)
    ids = torch.randint(5, 261, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    kept = mask.bool() & (torch.arange(9) % 2 == 0)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    upper = UpperHalf(model, layer)
    assert upper.skips_lower
    got = upper.logits(residuals_after(model, ids, [layer])[0], ids, mask, kept)
    torch.testing.assert_close(got, expected[kept], rtol=0, atol=1e-4)
    with torch.no_grad():
        again = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(again, expected), "the model is left as it was"


def test_the_upper_half_computes_no_layer_below_and_one_head_row_a_position() -> None:
    model, rows = make_model(), []
    upper = UpperHalf(model, 1)
    ids = torch.arange(5, 12).unsqueeze(0)
    hidden = residuals_after(model, ids, [1])[0]
    for layer in decoder_layers(model)[:2]:
        layer.mlp.register_forward_hook(lambda *_: pytest.fail("a lower layer ran"))
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    kept = torch.zeros(1, 7, dtype=torch.bool)
    kept[0, [2, 5]] = True
    upper.logits(hidden, ids, torch.ones_like(ids), kept)
    assert rows == [2]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_replaying_the_whole_model_agrees_with_skipping(kind: str) -> None:
    model = make_model(kind)
    ids = torch.arange(5, 12).unsqueeze(0)
    mask = torch.ones_like(ids)
    hidden = residuals_after(model, ids, [1])[0] * 1.5 + 0.1
    upper = UpperHalf(model, 1)
    skipped = upper.logits(hidden, ids, mask, mask.bool())
    upper.skips_lower = False
    torch.testing.assert_close(upper.logits(hidden, ids, mask, mask.bool()), skipped, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(skipped, model(input_ids=ids).logits[0], atol=1e-4)


def test_a_model_that_cannot_be_replayed_is_refused_by_name() -> None:
    model, passes = make_model(), [0.0]
    decoder_layers(model)[2].register_forward_hook(lambda module, inputs, output: output + passes[0])
    model.register_forward_pre_hook(lambda module, inputs: passes.__setitem__(0, passes[0] + 1))  # no two passes are alike
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM does not give its own logits when its residual stream after layer 1 is"
    ):
        UpperHalf(model, 1)


def test_a_model_whose_upper_layers_need_the_lower_ones_is_replayed() -> None:
    model, shared = make_model(), {}
    layers = decoder_layers(model)
    layers[0].mlp.register_forward_hook(lambda module, inputs, output: shared.update(lower=output))
    layers[2].mlp.register_forward_hook(lambda module, inputs, output: output + 2 * shared.pop("lower", torch.zeros(())))
    model.register_forward_pre_hook(lambda module, inputs: shared.clear())  # what a pass shares ends with it
    ids = torch.arange(5, 12).unsqueeze(0)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    upper = UpperHalf(model, 1)
    assert not upper.skips_lower
    got = upper.logits(residuals_after(model, ids, [1])[0], ids, mask, mask.bool())
    torch.testing.assert_close(got, expected[0], rtol=0, atol=1e-5)
