"""A tiny random pair, texts for it, and shapes checked at run time."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jaxtyping import install_import_hook

install_import_hook("crossdiff", "beartype.beartype")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the GPU's kernels run on the CPU; read when Triton is imported

WORDS = [
    "the",
    "sea",
    "is",
    "cold",
    "and",
    "a",
    "small",
    "boat",
    "sails",
    "far",
    "from",
    "land",
    "while",
    "birds",
    "cry",
    "over",
    "grey",
    "stones",
    "near",
    "old",
    "walls",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>"
    "{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def own_notes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The notes that tests write, or would read, are not those of the user."""
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))


def make_tokenizer() -> Any:
    """Byte-level, no merges: every byte a token, and five special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(kind: str = "llama", seed: int = 0, n_layers: int = 3, vocabulary: int = 272, **more: Any) -> Any:
    """A tiny random causal language model of an architecture; `more` goes into its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 2,
    }
    if kind == "gpt2":
        sizes = {"vocab_size": vocabulary, "n_embd": 16, "n_layer": n_layers, "n_head": 2, "n_positions": 128}
    elif kind == "mamba2":
        sizes |= {"head_dim": 8, "num_heads": 4, "state_size": 8, "n_groups": 1, "pad_token_id": 0}
    elif kind == "opt":
        sizes |= {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 128}
    elif kind == "gpt_neox":
        sizes |= {"intermediate_size": 32, "max_position_embeddings": 128}
    else:
        sizes |= {"intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": 8}
        sizes["pad_token_id"] = 0  # some architectures place theirs outside of a small vocabulary
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | more))).eval()


def save_pair(folder: Path, kind: str = "llama") -> tuple[Path, Path]:
    """A base model and a slightly changed copy of it, each in a folder with the tokenizer."""
    base, chat = folder / "base", folder / "chat"
    model = make_model(kind)
    model.save_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(chat)
    for path in (base, chat):
        make_tokenizer().save_pretrained(path)
    return base, chat


def forget_digests(*folders: Path) -> None:
    """Remove the digests from the manifests of runs or stores, whose files a test is about to change."""
    for folder in folders:
        for path in (folder / "manifest.json", folder / "activations" / "manifest.json"):
            if path.is_file():
                manifest = json.loads(path.read_text())
                for record in (manifest, *manifest.get("stages", {}).values()):
                    record.pop("files", None)
                path.write_text(json.dumps(manifest | ({"files": {}} if "shards" in manifest else {})))


def write_texts(folder: Path, n_plain: int = 60, n_chat: int = 90) -> tuple[Path, Path]:
    """Plain documents, and conversations of three labelled kinds."""
    generator = random.Random(0)
    plain, chat = folder / "plain.jsonl", folder / "chat.jsonl"
    with plain.open("w") as file:
        for _ in range(n_plain):
            file.write(json.dumps({"text": " ".join(generator.choices(WORDS, k=12))}) + "\n")
    with chat.open("w") as file:
        for index in range(n_chat):
            kind = ("greeting", "question", "order")[index % 3]
            opening = {"greeting": "hi", "question": "why", "order": "go"}[kind]
            messages = [
                {"role": "user", "content": f"{opening} {' '.join(generator.choices(WORDS, k=3))}"},
                {"role": "assistant", "content": " ".join(generator.choices(WORDS, k=4))},
            ]
            file.write(json.dumps({"messages": messages, "kind": kind}) + "\n")
    return plain, chat


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny Llama pair."""
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Paths of plain text and of labelled conversations."""
    return write_texts(tmp_path_factory.mktemp("texts"))


def tiny_config(pair: tuple[Path, Path], texts: tuple[Path, Path], **changes: Any) -> dict[str, Any]:
    """Settings under which the whole pipeline takes seconds."""
    training = {"expansion": 4, "batch_size": 64, "epochs": 3, "warmup_steps": 5}
    return {
        "base": str(pair[0]),
        "chat": str(pair[1]),
        "layer": 1,
        "device": "cpu",
        "look": {"max_tokens": 0},
        "dataset": [
            {"path": str(texts[0]), "heldout_share": 0.3},
            {"path": str(texts[1]), "label_column": "kind", "heldout_share": 0.4},
        ],
        "harvest": {"max_length": 48, "batch_tokens": 512, "shard_tokens": 2000, "dtype": "float32"},
        "crosscoders": {
            "l1": {"sparsity": {"kind": "l1", "mu": 0.5}, "decoder_norm": 0.1, **training},
            "batchtopk": {"sparsity": {"kind": "batchtopk", "k": 4}, "seeds": 1, **training},
        },
        "analyze": {
            "blocks": 5,
            "batch_tokens": 512,
            "min_active": 20,
            "examples": 3,
            "examples_per_quantile": 1,
            "pool_size": 5,
        },
        **changes,
    }


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[Path, Path]) -> Any:
    """The tiny pair, loaded."""
    from crossdiff.models.pair import load_pair

    return load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))


@pytest.fixture(scope="module")
def datasets(tiny_texts: tuple[Path, Path]) -> Any:
    """The tiny texts as the datasets of a harvest."""
    from crossdiff.config import DatasetConfig

    return (
        DatasetConfig(path=str(tiny_texts[0]), heldout_share=0.3),
        DatasetConfig(path=str(tiny_texts[1]), label_column="kind", heldout_share=0.3),
    )


@pytest.fixture
def tiny_settings(tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> dict[str, Any]:
    """Settings of a tiny run on the tiny pair."""
    return tiny_config(tiny_pair, tiny_texts)


@pytest.fixture(scope="session")
def analysed_run(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Path:
    """A run of the tiny pair with one analysed crosscoder, `batchtopk`. Whoever changes it takes a copy."""
    from crossdiff.cli import run_command

    folder = tmp_path_factory.mktemp("analysed")
    settings = tiny_config(tiny_pair, tiny_texts)
    settings["crosscoders"] = {"batchtopk": settings["crosscoders"]["batchtopk"]}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    for stage in ("harvest", "analyze"):
        run_command([stage, str(folder / "run"), "--config", str(folder / "settings.yaml")])
    return folder / "run"


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Path:
    """A run of the tiny pair with a first look and nothing else."""
    from crossdiff.cli import run_command

    folder = tmp_path_factory.mktemp("looked")
    (folder / "settings.yaml").write_text(yaml.safe_dump(tiny_config(tiny_pair, tiny_texts, look={"depth_tokens": 500})))
    run_command(["look", str(folder / "run"), "--config", str(folder / "settings.yaml")])
    return folder / "run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, for the tests that need a real browser."""
    from playwright.sync_api import sync_playwright

    from crossdiff.dashboard.screenshots import launch

    with sync_playwright() as playwright:
        started = launch(playwright)
        yield started
        started.close()
