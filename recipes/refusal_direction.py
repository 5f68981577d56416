"""Locates the layer at which the embedded pair's chat model decides to refuse: a baseline without a crosscoder.

    python recipes/refusal_direction.py [RUN]

RUN is a finished run of the embedded pair (runs/demo). For each layer, d is the mean of the chat model's activations at the
last token before the answer over 60 harmful training prompts, minus the same mean over 60 harmless how-tos. Held-out prompts of
both kinds are edited along d. The table has the share of answers that then begin with the most common first token of refusals.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crossdiff.activations.store import Store
from crossdiff.causal.generation import ask
from crossdiff.causal.steering_table import labelled_prompts
from crossdiff.config import SteerConfig
from crossdiff.models.access import UpperHalf, residuals_after
from crossdiff.models.pair import Pair, load_pair

N_TRAIN, N_HELDOUT = 60, 80
SPLITS = {"train": N_TRAIN, "heldout": N_HELDOUT}


@dataclass(frozen=True)
class Prompts:
    """Padded prompts of one kind.

    Attributes:
        ids: token ids.
        tokens: which positions are not padding.
        edited: which positions may be edited (all tokens but the BOS).
        last: the last token of each prompt.
    """

    ids: Tensor
    tokens: Tensor
    edited: Tensor
    last: Tensor


def read(store: Store, pair: Pair, label: str, split: str) -> Prompts:
    settings = SteerConfig(latent=0, labels=(label,), split=split, prompts_per_label=SPLITS[split])
    prompts = [ask(pair.tokenizer, question).token_ids for question in labelled_prompts(store, settings)["prompt"]]
    lengths = torch.tensor([len(ids) for ids in prompts])
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, tokens in enumerate(prompts):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    position = torch.arange(ids.shape[1])
    is_token = position < lengths[:, None]
    return Prompts(ids, is_token, is_token & (position > 0), position == lengths[:, None] - 1)


def first_tokens(upper: UpperHalf, h: Tensor, of: Prompts) -> Tensor:
    """Most likely first token of each answer when the model continues from `h`, `[prompt]`."""
    return upper.logits(h, of.ids, of.tokens, of.last).argmax(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"))
    store = Store(parser.parse_args().run / "activations")
    pair = load_pair("demo:base", "demo:chat", torch.device("cpu"))
    layers, kinds = list(range(pair.n_layers)), ("refusal", "list_format")
    prompts = {(kind, split): read(store, pair, kind, split) for kind in kinds for split in SPLITS}
    streams = {key: residuals_after(pair.chat, found.ids, layers) for key, found in prompts.items()}
    refusals, how_tos = prompts["refusal", "heldout"], prompts["list_format", "heldout"]
    whole = UpperHalf(pair.chat, layers[-1])
    unedited = {kind: first_tokens(whole, streams[kind, "heldout"][-1], prompts[kind, "heldout"]) for kind in kinds}
    first = int(unedited["refusal"].mode().values)
    shares = ", ".join(
        f"{float((found == first).float().mean()):.0%} of {len(found)} {kind}" for kind, found in unedited.items()
    )
    print(f"Unedited, {pair.tokenizer.decode([first])!r} is the first token of {shares}.\n")
    heads = [
        "after layer",
        "refusals, component along d of the last token set to the how-tos' mean",
        "refusals, d projected out of all tokens",
    ]
    heads += ["how-tos, d added to all tokens, x0.5 / x1", "random vector of the same norm"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for layer in layers:
        upper = UpperHalf(pair.chat, layer)
        means = {kind: streams[kind, "train"][layer][prompts[kind, "train"].last].mean(0) for kind in kinds}
        d = means["refusal"] - means["list_format"]
        unit, noise = d / d.norm(), torch.randn(len(d), generator=torch.Generator().manual_seed(layer))
        h, other = streams["refusal", "heldout"][layer], streams["list_format", "heldout"][layer]
        along = (h @ unit).unsqueeze(2) * unit
        edited = [
            (h - refusals.last.unsqueeze(2) * (along - (means["list_format"] @ unit) * unit), refusals),
            (h - refusals.edited.unsqueeze(2) * along, refusals),
            *((other + how_tos.edited.unsqueeze(2) * v, how_tos) for v in (0.5 * d, d, d.norm() * noise / noise.norm())),
        ]
        found = [f"{float((first_tokens(upper, *each) == first).float().mean()):.0%}" for each in edited]
        print(f"| {layer} | {found[0]} | {found[1]} | {found[2]} / {found[3]} | {found[4]} |")


if __name__ == "__main__":
    main()
