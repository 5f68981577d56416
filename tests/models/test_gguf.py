"""Models in GGUF files: what is loaded is what was written, and what cannot be read is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import crossdiff.models.names as module
from conftest import CHAT_TEMPLATE, make_model, make_tokenizer
from crossdiff.errors import UserError
from crossdiff.models.loading import load_model, load_tokenizer
from crossdiff.models.names import identify
from crossdiff.models.pair import load_pair

N_HEADS, N_KEY_HEADS = 2, 1


def turned(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in GGUF's order, which interleaves the two halves that a rotation mixes."""
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any) -> None:
    """A tiny Llama with the tests' tokenizer, in float32."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KEY_HEADS)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {*tokenizer.all_special_tokens, "<|endoftext|>"}
    vocabulary += ["th", "an", "<|endoftext|>"]  # the reader wants two merges or more, and adds the last where it is missing
    padding = [f"<|unused_{i}|>" for i in range(config.vocab_size - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*vocabulary, *padding])
    writer.add_token_types([3 if token in special else 1 for token in vocabulary] + [3] * len(padding))
    writer.add_token_merges(["t h", "a n"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tops = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, weight in model.state_dict().items():
        if name in tops:
            target = tops[name]
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{layer}.{names[part]}.weight"
            if part.endswith(("q_proj", "k_proj")):
                weight = turned(weight, N_HEADS if part.endswith("q_proj") else N_KEY_HEADS)
        writer.add_tensor(target, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_pair_of_gguf_files_has_the_weights_that_were_written(tmp_path: Path) -> None:
    models = {name: make_model("llama", seed) for seed, name in enumerate(("base", "chat"))}
    for name, model in models.items():
        write_gguf(tmp_path / f"{name}.gguf", model)
    pair = load_pair(str(tmp_path / "base.gguf"), str(tmp_path / "chat.gguf"), torch.device("cpu"))
    ids = torch.arange(10).unsqueeze(0)
    for loaded, model in zip(pair.models, models.values(), strict=True):
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert pair.tokenizer.chat_template == CHAT_TEMPLATE
    assert pair.identity["base"]["digest"] != pair.identity["chat"]["digest"]


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    for load in (load_tokenizer, lambda name: load_model(name, torch.device("cpu"))):
        with pytest.raises(UserError, match=r"cannot load '.*broken\.gguf': .*; expected a GGUF file, or a folder"):
            load(str(path))
    before = identify(str(path))
    path.write_bytes(b"GGUF" + b"\1" * 100)
    assert identify(str(path)) != before


def test_the_packages_are_named_where_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.gguf is a GGUF file, and reading it needs accelerate and gguf: pip install"):
        load_tokenizer(str(path))
