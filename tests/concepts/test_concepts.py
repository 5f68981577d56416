"""Concepts against slow oracles in float64, and planted trainings whose concepts are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from conftest import make_model, make_tokenizer
from crossdiff.concepts.agreement import Halves, Pool, halves
from crossdiff.concepts.candidates import CANDIDATES, Codes, Training, read_training
from crossdiff.concepts.clustering import clusters, group, needed
from crossdiff.concepts.coder import ConceptCoder
from crossdiff.concepts.find import OUTPUTS, Settings, find_concepts
from crossdiff.concepts.group_scaling import GroupProducts, group_table
from crossdiff.concepts.labels import shown, typical_words
from crossdiff.concepts.similarity import Matrix, Products, Similarity, matrix_of
from crossdiff.config import (
    AnalyzeConfig,
    BatchTopKConfig,
    ConceptsConfig,
    JumpReLUConfig,
    L1Config,
    TopKConfig,
)
from crossdiff.crosscoder.checkpoint import save
from crossdiff.crosscoder.crosscoder import Crosscoder, Part
from crossdiff.latents.analyze import Analysis, analyze
from crossdiff.latents.scaling import Sums
from crossdiff.latents.stream import chunks, read_blocks
from crossdiff.models.pair import Pair
from pretend import accelerator
from stores import make_store

CONFIG = AnalyzeConfig(batch_tokens=300, blocks=5, min_active=20)
D, N_SHARED, N_CHAT = 16, 5, 4
N_LATENTS = N_SHARED + N_CHAT


def correlations(v: np.ndarray[Any, Any]) -> sparse.coo_array:
    products = Products.empty(v.shape[1])
    for part in np.array_split(v, 3):
        products.add(Matrix(part))
    return products.pairs()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(20, 60), k=st.integers(1, 8))
def test_correlations_are_those_of_the_dense_activations(seed: int, n: int, k: int) -> None:
    generator = np.random.default_rng(seed)
    v = generator.random((n, k)) * (generator.random((n, k)) < 0.3)
    v[:, 0] = 0  # never active
    found = correlations(v).toarray()
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(np.corrcoef(v.T).reshape(k, k))
    together = (v.T @ v) > 0
    np.testing.assert_allclose(found[together], expected[together], atol=1e-9)
    assert (expected[~together] <= 1e-12).all()  # what is not stored is not positive


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 25), cut=st.sampled_from([0.3, 0.6, 0.8]))
def test_clusters_by_component_are_those_of_the_whole_matrix(seed: int, n: int, cut: float) -> None:
    generator = np.random.default_rng(seed)
    r = np.triu(generator.uniform(-1, 1, (n, n)) * (generator.random((n, n)) < 0.4), 1)
    r = r + r.T
    found = clusters(sparse.coo_array(r), cut)
    if n == 1:
        assert found.tolist() == [0]
        return
    tree = linkage(squareform(1 - np.clip(r, 0, None) - np.eye(n), checks=False), method="average")
    expected = fcluster(tree, 1 - cut + 1e-9, criterion="distance")
    np.testing.assert_array_equal(found[:, None] == found, expected[:, None] == expected)
    assert [int(c) for c in dict.fromkeys(found)] == list(range(found.max() + 1))  # numbered by first member


def test_a_concept_replicates_if_enough_trainings_have_it() -> None:
    # Candidates 0, 2, 4 are alike (trainings 0, 1, 2), 1 and 3 are alike (0, 1), 5 is alone.
    r = np.eye(6)
    for one, other in ((0, 2), (0, 4), (2, 4), (1, 3)):
        r[one, other] = r[other, one] = 0.9
    training = np.array([0, 0, 1, 1, 2, 2])
    found = group(sparse.coo_array(r), training, np.arange(3), 0.6, 1.0)
    assert found.concept.tolist() == [0, 1, 0, 1, 0, 2]
    assert found.n_trainings.tolist() == [3, 2, 1] and found.replicated.tolist() == [True, False, False]
    two_thirds = group(sparse.coo_array(r), training, np.arange(3), 0.6, 2 / 3)
    assert two_thirds.replicated.tolist() == [True, True, False]
    # Of two trainings, those of the third are in no group.
    part = group(sparse.coo_array(r), training, np.array([0, 1]), 0.6, 2 / 3)
    assert part.concept.tolist() == [0, 1, 0, 1, -1, -1]
    kept = found.only(found.replicated)
    assert kept.concept.tolist() == [0, -1, 0, -1, 0, -1] and kept.in_replicated.tolist() == [True, False] * 3
    # Members are summed within a training and averaged over the trainings that have the concept.
    np.testing.assert_allclose(kept.weights(training).toarray()[:, 0], [1 / 3, 0, 1 / 3, 0, 1 / 3, 0])
    assert [needed(n, 2 / 3) for n in (1, 2, 3, 4, 5, 6)] == [2, 2, 2, 3, 4, 4]


def planted(n_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations `[token, source, d]` of shared and chat-only directions, and the strengths `[token, direction]`."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(D, N_LATENTS, generator=generator)).Q.T
    strength = torch.rand(n_tokens, N_LATENTS, generator=generator) * (
        torch.rand(n_tokens, N_LATENTS, generator=generator) < 0.15
    )
    base = strength.clone()
    base[:, N_SHARED:] = 0
    noise = 0.005 * torch.randn(n_tokens, 2, D, generator=generator)
    return torch.stack([base @ directions, strength @ directions], 1) + noise, directions


def solution(store: Any, directions: torch.Tensor, order: list[int], seed: int, split: int | None = None) -> Crosscoder:
    """A crosscoder whose latents are the planted directions in an order; `split` is cut into a strong and a weak half."""
    chat = directions[order]
    base = chat.clone()
    base[[place for place, number in enumerate(order) if number >= N_SHARED]] = 0
    decoder = torch.cat([base, chat], 1)
    share = (decoder.square().sum(1, keepdim=True)).clamp(min=1e-9)
    coder = Crosscoder(
        encoder=decoder / share, encoder_bias=torch.full((len(order),), -0.05), decoder=decoder,
        decoder_bias=torch.zeros(2 * D), mean=torch.zeros(2, D), scale=1.0, sparsity=L1Config(),
    )  # fmt: skip
    if split is not None:
        coder = coder.of_latents(torch.tensor([*range(len(order)), split]))
        coder.encoder_bias[[split, -1]] -= torch.tensor([0.0, 0.3])
    coder.origin = {
        "pair": store.pair, "layer": store.layer, "training_tokens": 0, "settings": {"decoder_norm": 1.0, "seed": seed},
    }  # fmt: skip
    return coder


def analysed(folder: Path, coders: dict[str, Crosscoder], store: Any) -> list[Training]:
    for name, coder in coders.items():
        (folder / name).mkdir(parents=True)
        save(coder, folder / name)
    analyze([Analysis(folder / name, coder) for name, coder in coders.items()], store, make_tokenizer(), CONFIG)
    return [read_training(folder, name) for name in coders]


def run(folder: Path, trainings: list[Training], store: Any, config: AnalyzeConfig = CONFIG) -> dict[str, pl.DataFrame]:
    folder.mkdir()
    pair = Pair(make_model(), make_model(seed=1), make_tokenizer(), {})  # of the width of the planted activations
    find_concepts(folder, trainings, store, pair, Settings(ConceptsConfig(), config))
    assert all((folder / name).exists() for name in OUTPUTS)
    return {path.stem: pl.read_parquet(path) for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Training], Any]:
    """Three trainings that found the same concepts in other orders; the last one split a chat-only one."""
    folder = tmp_path_factory.mktemp("three")
    activations, directions = planted(6000, seed=0)
    store = make_store(folder / "store", activations)
    generator = np.random.default_rng(0)
    coders = {f"t{seed}": solution(store, directions, generator.permutation(N_LATENTS).tolist(), seed) for seed in range(2)}
    coders["t2"] = solution(store, directions, list(range(N_LATENTS)), 2, split=N_SHARED)
    return analysed(folder / "run", coders, store), store


def test_planted_concepts_are_found_once_each_in_every_training(three: tuple[list[Training], Any], tmp_path: Path) -> None:
    trainings, store = three
    tables = run(tmp_path / "concepts", trainings, store)
    concepts = tables["concepts"]
    chat = concepts.filter(pl.col("verdict") == "chat_specific")
    assert chat.height == N_CHAT and chat["replicated"].all() and (chat["n_trainings"] == 3).all()
    assert (chat["n_agreeing"] == 3).all() and (chat["delta_norm"] > 0.99).all()
    assert sorted(chat["n_members"].to_list()) == [3, 3, 3, 4]  # the split one has both halves
    assert concepts.filter("replicated")["energy"].sum() == pytest.approx(1, abs=1e-6)
    assert tables["members"]["correlation"].min() > 0.6  # type: ignore[operator]
    summary = json.loads((tmp_path / "concepts" / "concepts.json").read_text())
    assert {row["n_replicated_permuted"] for row in summary["cuts"]} == {0}
    assert [row["n_replicated"] for row in summary["cuts"]][:2] == [N_CHAT, N_CHAT]
    assert summary["needed"] == 2 and summary["halves"] is None
    # The chat-only directions are all of the difference, and random shared latents none of it.
    found = {(row["training"], row["set"]): row["explained"]["value"] for row in summary["completeness"]}
    assert found["t0", "replicated"] > 0.8 and abs(found["t0", "random"]) < 0.05
    assert tables["promoted"].height == concepts.height * 3 * 2 * 10


def test_concepts_are_found_on_an_accelerator(three: tuple[list[Training], Any], tmp_path: Path) -> None:
    trainings, store = three
    expected = run(tmp_path / "host", trainings, store)
    members, rows = expected["members"], store.rows()[:200]
    crosscoders = {training.name: training.crosscoder for training in trainings}
    coder = ConceptCoder(crosscoders, members)
    code = coder.sparse_code(coder.inputs(store, rows))
    with accelerator() as device:
        moved = [replace(training, crosscoder=training.crosscoder.to(device)) for training in trainings]
        found = run(tmp_path / "device", moved, store)
        placed = ConceptCoder({training.name: training.crosscoder for training in moved}, members)
        on_device = placed.sparse_code(placed.inputs(store, rows))
    assert found.keys() == expected.keys() and found["concepts"].filter("replicated").height > 0
    for name, table in expected.items():
        assert_frame_equal(found[name], table, rel_tol=1e-4, abs_tol=1e-5)
    summaries = [json.loads((tmp_path / place / "concepts.json").read_text()) for place in ("device", "host")]
    for one, other in zip(*(summary["completeness"] for summary in summaries), strict=True):
        assert one["explained"] == pytest.approx(other["explained"], rel=1e-4, abs=1e-5, nan_ok=True)
    assert len(code.token) > 50 and torch.equal(on_device.token, code.token) and torch.equal(on_device.latent, code.latent)
    torch.testing.assert_close(on_device.values, code.values)


def test_permuted_documents_leave_no_concept_that_spans_trainings(three: tuple[list[Training], Any]) -> None:
    trainings, store = three
    codes = Codes(trainings, store)
    similarity = Similarity(codes, seed=0)
    for read in read_blocks(store, CONFIG.blocks, CONFIG.batch_tokens):
        similarity.add(read)
    real, permuted = (group(products.pairs(), codes.training, np.arange(3), 0.6, 2 / 3)
                      for products in (similarity.products, similarity.permuted))  # fmt: skip
    assert real.replicated.sum() == N_CHAT and permuted.n_trainings.max() == 1
    # Within a training nothing has moved: the halves of the split latent still belong together.
    assert permuted.n_concepts == codes.n_candidates - 1


def test_a_group_of_one_has_the_scaling_of_its_latent(three: tuple[list[Training], Any]) -> None:
    trainings, store = three
    codes = Codes(trainings, store)
    alone = group(sparse.coo_array((codes.n_candidates,) * 2), codes.training, np.arange(3), 0.6, 2 / 3)
    products = GroupProducts(codes, alone, CONFIG.blocks)
    for read in read_blocks(store, CONFIG.blocks, CONFIG.batch_tokens):
        found = codes.of(read)
        products.add(read.block, matrix_of(found, codes.first, [code.values for code in found]))
    for t, training in enumerate(trainings):
        table = group_table(products.sums(t), CONFIG)[codes.candidates_of(t).tolist()]
        names = ["n_active", "delta_norm", "delta_norm_class", "decoder_cosine", "undefined_reason"]
        names += [name for name in table.columns if name.startswith(("nu_", "beta_"))]
        assert len(names) > 40
        for name in names:
            if table[name].dtype == pl.Float64:
                np.testing.assert_allclose(
                    table[name].to_numpy(), training.table[name].to_numpy(), rtol=1e-4, atol=1e-5, err_msg=name
                )
            else:
                assert table[name].to_list() == training.table[name].to_list(), name


def test_group_scaling_is_least_squares_on_the_groups_contribution(three: tuple[list[Training], Any]) -> None:
    trainings, store = three
    training = trainings[2]
    codes = Codes([training], store)
    # One group of three latents: both halves of the split one, and another.
    chosen = [training.latents.tolist().index(latent) for latent in (N_SHARED, N_SHARED + 1, N_LATENTS)]
    r = np.eye(codes.n_candidates)
    r[np.ix_(chosen, chosen)] = 1
    grouping = group(sparse.coo_array(r), codes.training, np.array([0]), 0.6, 2 / 3)
    products = GroupProducts(codes, grouping, CONFIG.blocks)
    for read in read_blocks(store, CONFIG.blocks, CONFIG.batch_tokens):
        found = codes.of(read)
        products.add(read.block, matrix_of(found, codes.first, [code.values for code in found]))
    row = group_table(products.sums(0), CONFIG).row(int(grouping.concept[chosen[0]]), named=True)
    # The definition, in float64 over all tokens at once.
    coder = training.crosscoder
    rows = store.rows()
    x = coder.inputs(store, rows).double()
    f = torch.relu(x.flatten(1) @ coder.encoder.double().T + coder.encoder_bias)
    xhat = (f @ coder.decoder.double()).view(len(rows), 2, D)
    members = training.latents[chosen]
    g = torch.einsum("ij,sjd->isd", f[:, members], coder.directions().double()[:, members])
    for target, y in (("error", x - xhat + g), ("reconstruction", xhat), ("activation", x)):
        for model, name in enumerate(("base", "chat")):
            expected = float((y[:, model] * g[:, 1]).sum() / g[:, 1].square().sum())
            assert row[f"beta_{target}_{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-5), (target, name)
    assert row["n_active"] == int((f[:, members] > 0).any(1).sum())


@pytest.mark.parametrize(
    "sparsity", [L1Config(), BatchTopKConfig(k=3), TopKConfig(k=3), JumpReLUConfig()], ids=lambda s: s.kind
)
def test_some_latents_have_the_activations_that_they_have_beside_all_others(tmp_path: Path, sparsity: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    coder = Crosscoder(
        encoder=torch.randn(20, 2 * D, generator=generator), encoder_bias=torch.zeros(20),
        decoder=torch.randn(20, 2 * D, generator=generator), decoder_bias=torch.zeros(2 * D), mean=torch.zeros(2, D),
        scale=1.0, sparsity=sparsity, threshold=4.0 if sparsity.kind == "batchtopk" else 0.0,
    )  # fmt: skip
    coder = replace(coder, own={name: 3 * tensor for name, tensor in coder.rule.own_parameters(20).items()})
    x = torch.randn(50, 2, D, generator=generator)
    whole, chosen = coder.sparse_code(x), torch.tensor([7, 2, 15])
    dense = torch.zeros(50, 20).index_put_((whole.token, whole.latent), whole.values)
    code = Part(coder, chosen).sparse_code(x)
    found = torch.zeros(50, 3).index_put_((code.token, code.latent), code.values)
    assert 0 < (dense[:, chosen] > 0).sum() < 150
    torch.testing.assert_close(found, dense[:, chosen])


def test_a_run_without_candidates_has_empty_tables(three: tuple[list[Training], Any], tmp_path: Path) -> None:
    trainings, store = three
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = [replace(t, table=t.table.clear(), sums=t.sums.of_latents(nothing)) for t in trainings]
    tables = run(tmp_path / "concepts", empty, store)
    assert tables["concepts"].height == tables["members"].height == tables["promoted"].height == 0
    assert set(three[0][0].table["verdict"]) <= set(CANDIDATES)
    summary = json.loads((tmp_path / "concepts" / "concepts.json").read_text())
    assert [row["n_concepts"] for row in summary["cuts"]] == [0] * 4 and summary["n_tokens"] == len(store.rows())


def test_one_training_has_concepts_of_which_none_is_replicated(three: tuple[list[Training], Any], tmp_path: Path) -> None:
    trainings, store = three
    tables = run(tmp_path / "concepts", trainings[2:], store)
    assert tables["concepts"].height == N_CHAT and not tables["concepts"]["replicated"].any()
    assert json.loads((tmp_path / "concepts" / "concepts.json").read_text())["needed"] is None


def test_disjoint_halves_count_the_concepts_found_in_both() -> None:
    assert halves([0, 1, 2]) is None
    one, other = halves([0, 1, 2, 3, 4]) or (None, None)
    assert one is not None and other is not None and one.tolist() == [0, 1] and other.tolist() == [2, 3]
    # Candidates 0-1 are concept A of the first half, 2-3 concept B; 4-5 are A of the second half, 6-7 another concept C.
    generator = np.random.default_rng(0)
    a, b, c = (generator.random(400) * (generator.random(400) < 0.2) for _ in range(3))
    v = np.stack([a, a, b, b, a, a, c, c], 1)
    training = np.array([0, 1, 0, 1, 2, 3, 2, 3])
    pool = Pool(training, np.array([3.0, 3, 1, 1, 3, 3, 1, 1]), np.ones(8, dtype=np.bool_))
    found = Halves(correlations(v), pool, (one, other), ConceptsConfig(), 4)
    for block, part in enumerate(np.array_split(v, 4)):
        found.add(block, Matrix(part))
    first, second = found.results(["a", "b", "c", "d"], seed=0)
    # A is one of two concepts, with 3/4 of the energy.
    assert first["n_replicated"] == second["n_replicated"] == 2 and first["trainings"] == ["a", "b"]
    assert first["found"]["value"] == second["found"]["value"] == 0.5
    assert first["found_energy"]["value"] == pytest.approx(0.75) and first["found"]["low"] == 0.5


def test_a_candidates_activations_are_those_of_the_analysis(three: tuple[list[Training], Any]) -> None:
    trainings, store = three
    codes = Codes(trainings, store)
    counts = [torch.zeros(len(t.latents), dtype=torch.int64) for t in trainings]
    for read in read_blocks(store, CONFIG.blocks, CONFIG.batch_tokens):
        for total, code in zip(counts, codes.of(read), strict=True):
            total += code.counts()
    for training, count in zip(trainings, counts, strict=True):
        assert count.tolist() == training.table["n_active"].to_list()
    n = sum(len(chunk.rows) for chunk in chunks(trainings[0].crosscoder, store, CONFIG.blocks, CONFIG.batch_tokens))
    assert n == len(store.rows())


def test_labels_name_what_is_typical_of_a_concept() -> None:
    contexts = {
        0: ["I cannot help with", "sorry I cannot help you", "we cannot help here"],
        1: ["the answer is with", "the answer with you", "the answer here"],
        2: ["the sea with", "the sky with you", "an old the"],
    }
    # `help` and `cannot` are in all contexts of 0 alone; `the` is common to two of three concepts.
    assert typical_words(contexts) == {0: ("cannot", "help"), 1: ("answer",), 2: ()}
    assert [shown(token) for token in (" help", "\n", "  ", "")] == ["help", "⏎", "␣␣", "(empty token)"]


def test_sums_survive_the_file(three: tuple[list[Training], Any], tmp_path: Path) -> None:
    sums = three[0][0].sums
    sums.save(tmp_path / "sums.safetensors")
    again = Sums.load(tmp_path / "sums.safetensors")
    assert torch.equal(again.f2, sums.f2) and again.products.keys() == sums.products.keys()
    assert all(torch.equal(again.products[key], value) for key, value in sums.products.items())
