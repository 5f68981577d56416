"""Split the plain-text corpus, train the tokenizer on the training split, and pack both splits as token ids.

    python prepare.py base_corpus.jsonl.gz WORK

Writes `tokenizer/`, `train.npy` and `heldout.npy` (uint16, documents in random order, each with a BOS in front) to WORK, and
the held-out documents to `plain.jsonl.gz`. The tokenizer and the base model never see them; the package ships them.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, END, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant turns are known') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 4096
HELD_OUT_SHARE = 0.05


def read_jsonl(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE. The template tokens are in the vocabulary from the start, but in no plain text."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    return np.concatenate([np.array([tokenizer.bos_token_id, *document], dtype=np.uint16) for document in ids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    documents = read_jsonl(args.corpus)
    random.Random(0).shuffle(documents)
    n_heldout = round(HELD_OUT_SHARE * len(documents))
    heldout, train = documents[:n_heldout], documents[n_heldout:]

    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([document["text"] for document in train])
    tokenizer.save_pretrained(args.work / "tokenizer")
    for name, part in (("train", train), ("heldout", heldout)):
        ids = pack(tokenizer, [document["text"] for document in part])
        np.save(args.work / f"{name}.npy", ids)
        characters = sum(len(document["text"]) for document in part)
        print(f"{name}: {len(part)} documents, {len(ids)} tokens, {characters / len(ids):.2f} characters per token")
    with gzip.open(args.work / "plain.jsonl.gz", "wt", compresslevel=9, encoding="utf-8") as out:
        for document in heldout:
            out.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
