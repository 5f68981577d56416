"""Stores return what was written, in order, and report damage by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdiff.activations.store import Store, consecutive, verify
from crossdiff.errors import UserError
from stores import make_store


@pytest.fixture
def activations() -> torch.Tensor:
    return torch.randn(2000, 2, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5


def test_gather_returns_the_rows_in_the_given_order(tmp_path: Path, activations: torch.Tensor) -> None:
    store = make_store(tmp_path, activations, shard=300)
    assert len(store.shards) == 7  # 2,000 tokens in shards of 300
    rows = np.array([1999, 0, 299, 300, 301, 7, 1500])
    assert torch.equal(store.gather(rows), activations[torch.from_numpy(rows)])


def test_rows_leave_out_first_positions_and_the_other_split(tmp_path: Path, activations: torch.Tensor) -> None:
    store = make_store(tmp_path, activations)
    assert len(store.rows()) == 1900  # 100 sequences of 20, one position of each omitted
    assert len(store.rows("train")) == 80 * 19
    assert len(store.rows("heldout")) == 20 * 19
    with pytest.raises(UserError, match="no tokens in the split 'test'"):
        store.rows("test")


@pytest.mark.parametrize("matrix", [[[1, 0], [0, 1]], [[1, 0]], [[0, 1]], [[-1, 1]], [[0.5, 0.5], [-2, 1], [3, 0]]])
def test_the_scale_of_a_view_follows_from_the_moments_of_the_sources(tmp_path: Path, matrix: list[list[float]]) -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2000, 1, 4, generator=generator)
    store = make_store(tmp_path, common + 0.3 * torch.randn(2000, 2, 4, generator=generator) + 5)
    h = store.gather(store.rows("train")).double()
    view = torch.tensor(matrix, dtype=torch.float64)
    y = torch.einsum("vs,nsd->nvd", view, h)
    x = (y - y.mean(0)) * store.normalisation.scale_of(view)
    assert float(x.square().sum(2).mean()) == pytest.approx(4, rel=1e-9)  # d_model
    torch.testing.assert_close(store.normalisation.mean, h.mean(0))


def test_a_view_that_does_not_vary_has_no_scale(tmp_path: Path) -> None:
    one = torch.randn(400, 1, 4, generator=torch.Generator().manual_seed(0))
    store = make_store(tmp_path, one.expand(-1, 2, -1).contiguous())
    assert store.normalisation.scale > 0
    with pytest.raises(UserError, match="the two models have the same activations on every token"):
        store.normalisation.scale_of(torch.tensor([[-1.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "documents"])
def test_verify_names_the_damaged_file(tmp_path: Path, activations: torch.Tensor, damage: str) -> None:
    make_store(tmp_path, activations, shard=500)
    assert verify(tmp_path) == []
    path = tmp_path / ("documents.parquet" if damage == "documents" else "shard-00002.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if damage == "truncate" else content)
    problems = verify(tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(path.name)
    if damage in {"truncate", "remove"}:
        with pytest.raises(UserError, match=r"shard-00002\.safetensors (is missing|has \d+ bytes instead of)"):
            Store(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_activations_are_reported_when_read(tmp_path: Path, activations: torch.Tensor, value: float) -> None:
    activations[[700, 1500], 1, 2] = value  # row 100 of shard 2, row 0 of shard 5
    store = make_store(tmp_path, activations, shard=300)
    store.gather(np.arange(700))
    with pytest.raises(UserError, match=r"2 of 2000 tokens .* the first in row 100 of shard-00002\.safetensors \(row 700 "):
        store.gather(np.arange(1999, -1, -1))


def test_a_store_whose_parts_disagree_is_refused(tmp_path: Path, activations: torch.Tensor) -> None:
    make_store(tmp_path, activations, shard=500)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"].pop()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shards of .* hold 1500 tokens, but the manifest says 2000"):
        Store(tmp_path)
    manifest["n_tokens"] = 1500 - 1
    manifest["shards"][0]["n_tokens"] -= 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard-00000\.safetensors has 500 entries of token_id, but the manifest says 499"):
        Store(tmp_path).rows()
    (tmp_path / "documents.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"documents\.parquet is damaged"):
        _ = Store(tmp_path).documents


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", 7, "link.safetensors"])
def test_a_manifest_cannot_point_outside(tmp_path: Path, activations: torch.Tensor, name: str | int) -> None:
    folder = tmp_path / "store"
    make_store(folder, activations)
    (tmp_path / "secret").write_text("secret")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret")
    whole = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(whole | {"shards": [{**whole["shards"][0], "file": name}]}))
    for read in (verify, Store):
        with pytest.raises(UserError, match="expected a plain file name in the store"):
            read(folder)
    if isinstance(name, str):
        (folder / "manifest.json").write_text(json.dumps(whole | {"files": {name: "0"}}))
        with pytest.raises(UserError, match="expected a plain file name in the store"):
            verify(folder)


def test_a_shard_of_another_shape_is_refused(tmp_path: Path, activations: torch.Tensor) -> None:
    store = make_store(tmp_path, activations, shard=500)
    store.manifest["d_model"] = 5
    with pytest.raises(UserError, match=r"shard-00000.* of shape \(500, 2, 4\), but the manifest says \(500, 2, 5\)"):
        store.gather(np.arange(3))


def test_a_shard_cut_off_after_it_was_opened_is_named(tmp_path: Path, activations: torch.Tensor) -> None:
    store = make_store(tmp_path, activations, shard=500)
    assert len(store.rows()) == 1900
    os.truncate(tmp_path / "shard-00001.safetensors", 5000)  # of 27,000
    with pytest.raises(UserError, match=r"shard-00001\.safetensors ends at byte \d+, within its activations"):
        store.gather(np.arange(499, 999))


def test_reading_keeps_nothing_in_memory(tmp_path: Path) -> None:
    """Reading a store of 64 MB in slices increases resident memory by less than a quarter of its size."""
    store = make_store(tmp_path, torch.randn(8000, 2, 1000), shard=2000)
    store.gather(np.arange(10))
    before = resident()
    for first in range(0, 8000, 250):
        store.gather(np.arange(first, first + 250))
    assert resident() - before < 16e6


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_a_store_of_other_models_is_refused_with_both_sides(tmp_path: Path, activations: torch.Tensor) -> None:
    store = make_store(tmp_path, activations)
    store.check_models({"base": {"name": "a"}, "chat": {"name": "b"}}, 1)
    store.check_models({"base": {"name": "a"}, "chat": {"name": "b"}}, None)
    with pytest.raises(UserError, match=r"harvested from .*'a'.* at layer 1, but .*'c'.* at layer 1"):
        store.check_models({"base": {"name": "c"}, "chat": {"name": "b"}}, 1)
    with pytest.raises(UserError, match=r"at layer 1, but .* at layer 0"):
        store.check_models({"base": {"name": "a"}, "chat": {"name": "b"}}, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60))
def test_consecutive_ranges_cover_all_sequences_in_order(lengths: list[int], limit: int) -> None:
    bounds = np.cumsum([0, *lengths])
    ranges = list(consecutive(bounds, limit))
    assert [first for first, _ in ranges] == [0, *[last for _, last in ranges[:-1]]]
    assert ranges[-1][1] == len(lengths)
    for first, last in ranges:
        assert last - first == 1 or bounds[last] - bounds[first] <= limit
