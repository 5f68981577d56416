"""Measure how far tuning moved the residual stream: centred cosine of base and chat after each layer.

    python drift.py BASE_DIR CHAT_DIR --work WORK --test CHAT/chat_test.jsonl.gz [--out drift.json]

There are two kinds of text: documents held out from pretraining (WORK/heldout.npy), and the conversations of the test split in
the chat template. For each kind and layer, the mean activation over the tokens is subtracted from each model's activations.
Then the cosine of the two models' activations is computed per token and averaged. The BOS is omitted, because its norm is
massive and the same in both models. Intervals: 95%, bootstrap over documents, with fixed means.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, LlamaForCausalLM

from conversations import read_rows
from pretrain import CONTEXT

N_RESAMPLES = 1000


def plain_documents(packed: np.ndarray, bos: int, n: int) -> list[list[int]]:
    """The first `n` documents of a packed token stream, each cut to one context."""
    starts = np.flatnonzero(packed == bos)
    documents = np.split(packed, starts[1 : n + 1])[:n]
    return [document[:CONTEXT].tolist() for document in documents]


def residual_streams(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """Residual streams after each layer, `[layer, token, d_model]`, without the BOS."""
    captured: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output: captured.append(output)) for layer in model.model.layers
    ]
    try:
        with torch.inference_mode():
            model.model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([(stream[0] if isinstance(stream, tuple) else stream)[0, 1:] for stream in captured])


def paired_streams(models: list[LlamaForCausalLM], documents: list[list[int]]) -> Iterator[Tensor]:
    """Yield the residual streams of each document, `[model, layer, token, d_model]`."""
    for ids in documents:
        yield torch.stack([residual_streams(model, ids) for model in models])


def centred_cosines(models: list[LlamaForCausalLM], documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Sum of the tokens' cosines `[document, layer]` and number of tokens `[document]`, from two passes over the text."""
    sums, n_tokens = [], []
    total, count = torch.zeros(()), 0
    for streams in paired_streams(models, documents):
        total, count = total + streams.double().sum(dim=2), count + streams.shape[2]
    means = (total / count).unsqueeze(2)
    for streams in paired_streams(models, documents):
        base, chat = streams.double() - means
        sums.append(cosine_similarity(base, chat, dim=-1).sum(dim=-1))
        n_tokens.append(streams.shape[2])
    return torch.stack(sums), torch.tensor(n_tokens)


def summary(sums: Tensor, n_tokens: Tensor) -> list[dict[str, float]]:
    """Mean over tokens for each layer, with its bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    n_documents = len(n_tokens)
    drawn = torch.randint(n_documents, (N_RESAMPLES, n_documents), generator=generator)
    resampled = sums[drawn].sum(dim=1) / n_tokens[drawn].sum(dim=1, keepdim=True)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype), dim=0)
    means = sums.sum(dim=0) / n_tokens.sum()
    return [
        {"layer": layer, "cosine": round(mean, 4), "low": round(lowest, 4), "high": round(highest, 4)}
        for layer, (mean, lowest, highest) in enumerate(zip(means.tolist(), low.tolist(), high.tolist(), strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("chat", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder with heldout.npy")
    parser.add_argument("--test", type=Path, required=True, help="the file chat_test.jsonl.gz")
    parser.add_argument("--documents", type=int, default=200, help="largest number of documents of each kind of text")
    parser.add_argument("--out", type=Path, help="file to write [drift.json in the parent folder of CHAT_DIR]")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    models = [LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (args.base, args.chat)]

    conversations = [row["messages"] for row in read_rows(args.test)[: args.documents]]
    texts = {
        "plain": plain_documents(np.load(args.work / "heldout.npy"), tokenizer.bos_token_id, args.documents),
        "conversations": tokenizer.apply_chat_template(conversations)["input_ids"],
    }
    report = {"base": args.base.name, "chat": args.chat.name}
    for name, documents in texts.items():
        sums, n_tokens = centred_cosines(models, documents)
        layers = summary(sums, n_tokens)
        report[name] = {"documents": len(documents), "tokens": int(n_tokens.sum()), "layers": layers}
        for layer in layers:
            interval = f"{layer['low']:.4f} to {layer['high']:.4f}"
            print(f"{name:14} after layer {layer['layer']}: {layer['cosine']:.4f} ({interval})")
    out = args.out or args.chat.parent / "drift.json"
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
