"""Running the models on reconstructions: what a perfect and an empty coder must give, and a slow computation beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crossdiff.activations.harvest import harvest
from crossdiff.activations.store import Store
from crossdiff.compare.coders import compare_coders
from crossdiff.compare.recovered import AS_IT_IS, BLOCKS, MEAN, heldout_sequences, run_on_reconstructions
from crossdiff.compare.terminal import comparison_table
from crossdiff.config import (
    BatchTopKConfig,
    CompareConfig,
    DatasetConfig,
    DifferenceConfig,
    HarvestConfig,
    Inputs,
    L1Config,
    PairedConfig,
    SingleConfig,
)
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.crosscoder.train import normalisation_of
from crossdiff.crosscoder.view import view_of
from crossdiff.models.access import decoder_layers
from crossdiff.models.pair import Pair, load_pair
from crossdiff.text.chat import Flag


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[Path, Path]) -> Pair:
    return load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pair: Pair, tiny_texts: tuple[Path, Path]) -> Store:
    folder = tmp_path_factory.mktemp("store")
    datasets = (
        DatasetConfig(path=str(tiny_texts[0]), heldout_share=0.5),
        DatasetConfig(path=str(tiny_texts[1]), heldout_share=0.5),
    )
    harvest({1: folder}, pair, datasets, HarvestConfig(max_length=32, batch_tokens=256, dtype="float32"))
    return Store(folder)


def perfect(store: Store, inputs: Inputs) -> Crosscoder:
    """f = relu(+-x), so that every input is reconstructed."""
    view = view_of(inputs, store.sources)
    mean, scale = normalisation_of(view, store)
    coder = new_crosscoder(2 * mean.numel(), mean, scale, L1Config(), 1.0, 0, view)
    eye = torch.eye(mean.numel())
    coder.encoder = coder.decoder = torch.cat([eye, -eye])
    coder.origin = {"settings": {"inputs": {"kind": inputs.kind}, "structure": {"kind": "free"}, "sparsity": {"kind": "l1"}}}
    return coder


def empty(store: Store) -> Crosscoder:
    """Reconstructs the mean."""
    coder = perfect(store, PairedConfig())
    coder.decoder = torch.zeros_like(coder.decoder)
    return coder


def test_a_perfect_coder_loses_nothing_and_an_empty_one_is_the_mean(store: Store, pair: Pair) -> None:
    coders = {
        "perfect": perfect(store, PairedConfig()), "empty": empty(store),
        "difference": perfect(store, DifferenceConfig()), "chat": perfect(store, SingleConfig(source="chat")),
    }  # fmt: skip
    runs = run_on_reconstructions(coders, store, pair, 10**6, 300)
    assert runs["base"].arms == (AS_IT_IS, MEAN, "perfect", "empty")
    assert runs["chat"].arms == (AS_IT_IS, MEAN, "perfect", "empty", "difference", "chat")
    for source, sums in runs.items():
        for arm in set(sums.arms) & {"perfect", "difference", "chat"}:
            assert sums.recovered(arm).value == pytest.approx(1, abs=1e-3), (source, arm)
            assert sums.mean_answer_kl(arm).value == pytest.approx(0, abs=1e-6)
        assert sums.recovered("empty").value == pytest.approx(0, abs=1e-6)
        assert sums.mean_answer_kl("empty").value == pytest.approx(sums.mean_answer_kl(MEAN).value)
        assert sums.mean_answer_kl(MEAN).value > 1e-6


def test_sums_against_one_sequence_at_a_time(store: Store, pair: Pair) -> None:
    coder = new_crosscoder(24, store.normalisation.mean, store.normalisation.scale, BatchTopKConfig(k=3), 1.0, 5)
    coder.threshold = 0.5
    sums = run_on_reconstructions({"coder": coder}, store, pair, 10**6, 300)["chat"]
    bounds, ids, flags = store.sequences(), store.column("token_id"), store.column("flags")
    expected = torch.zeros(2, BLOCKS, dtype=torch.float64)
    layer = decoder_layers(pair.chat)[store.layer]
    for number in heldout_sequences(store, 10**6):
        rows = np.arange(bounds[number], bounds[number + 1])
        replacement = coder.reconstruct(store.gather(rows))[:, 1]
        replacement[0] = store.gather(rows)[0, 1]  # the left-out position
        sequence = torch.from_numpy(ids[rows].astype(np.int64)).unsqueeze(0)
        clean = torch.log_softmax(pair.chat(input_ids=sequence).logits[0].double(), 1)
        hook = layer.register_forward_hook(
            lambda m, i, o, r=replacement: (r[None], *o[1:]) if isinstance(o, tuple) else r[None]
        )
        edited = torch.log_softmax(pair.chat(input_ids=sequence).logits[0].double(), 1)
        hook.remove()
        block = int(store.column("document")[rows[0]]) % BLOCKS
        for position in range(1, len(rows)):
            expected[0, block] -= edited[position - 1, ids[rows[position]]]
            if flags[rows[position]] & Flag.ASSISTANT:
                p, q = clean[position - 1], edited[position - 1]
                expected[1, block] += float((p.exp() * (p - q)).sum())
    torch.testing.assert_close(sums.cross_entropy[2], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.answer_kl[2], expected[1], rtol=1e-3, atol=1e-6)


def test_the_comparison_has_an_interval_for_everything(store: Store, pair: Pair) -> None:
    coders = {"perfect": perfect(store, PairedConfig()), "difference": perfect(store, DifferenceConfig())}
    result = compare_coders(coders, store, pair, CompareConfig(max_tokens=1000, batch_tokens=300))
    row = result["crosscoders"]["perfect"]
    assert row["recovered"]["base"]["low"] <= row["recovered"]["base"]["value"] <= row["recovered"]["base"]["high"]
    assert set(result["crosscoders"]["difference"]["recovered"]) == {"chat"}
    table = comparison_table(result)
    assert [column.header for column in table.columns] == ["", "perfect", "difference"]
    titles, _, difference = (list(column.cells) for column in table.columns)
    shown = dict(zip(titles, difference, strict=True))
    assert shown["reads"] == "difference"
    assert shown["CE recovered,\nbase"] == "-", "a difference says nothing of the base model"
    recovered = result["crosscoders"]["difference"]["recovered"]["chat"]
    assert str(shown["CE recovered,\nchat"]).startswith(f"{recovered['value']:.3f}\n")


def test_sequences_are_spread_over_the_store(store: Store) -> None:
    every, some = heldout_sequences(store, 10**6), heldout_sequences(store, 500)
    assert set(some) < set(every)
    assert some[0] == every[0] and some[-1] == every[-1]
    held = set(store.documents.filter(store.documents["split"] == "heldout")["document"].to_list())
    document, bounds = store.column("document"), store.sequences()
    assert {int(document[bounds[n]]) for n in every} == held
