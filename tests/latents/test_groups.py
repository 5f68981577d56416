"""Token groups against a plain loop over tokens, and the roles of template tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crossdiff.activations.store import Store
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.activity import COLUMNS, Activity, activity_table
from crossdiff.latents.groups import GROUPS, Cells, cells_of, group_of
from crossdiff.latents.stream import Chunk
from crossdiff.text.chat import Flag
from stores import make_store

BOS, TEMPLATE, USER, SAID = Flag.BOS.value, Flag.TEMPLATE.value, Flag.USER.value, Flag.ASSISTANT.value
# Two sequences: a conversation (turns 0 of the user, 1 of the assistant, 2 cut after its header), then plain text.
FLAGS = [BOS, TEMPLATE, TEMPLATE, TEMPLATE, USER, USER, TEMPLATE, TEMPLATE, TEMPLATE | SAID, SAID, SAID | TEMPLATE, TEMPLATE]
TURNS = [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
INDEX = [-1, 0, 0, 1, -1, -1, 2, 0, 1, -1, 2, 0]
N, LATENTS = 24, 5


class Decoder:
    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store(tmp_path / "store", torch.randn(N, 2, 4), length=12)
    (shard,) = store.shards
    shard["flags"] = torch.tensor(FLAGS + [0] * 12, dtype=torch.uint8)
    shard["turn"] = torch.tensor(TURNS + [-1] * 12, dtype=torch.int8)
    shard["template_index"] = torch.tensor(INDEX + [-1] * 12, dtype=torch.int8)
    shard["dataset"] = torch.tensor([1] * 12 + [0] * 12, dtype=torch.uint8)
    shard["token_id"] = torch.arange(N, dtype=torch.int32)
    store.manifest["datasets"] = ["prose", "talk"]
    return store


def name(cells: Cells, row: int) -> tuple[object, ...]:
    return cells.table.select("dataset", "group", "role", "template_index").row(int(cells.of_row[row]))


def test_every_token_has_its_cell(store: Store) -> None:
    cells = cells_of(store, Decoder())
    expected = [
        ("talk", "bos", None, None), ("talk", "template", "before", 0), ("talk", "template", "user", 0),
        ("talk", "template", "user", 1), ("talk", "user", None, None), ("talk", "user", None, None),
        ("talk", "template", "user", 2), ("talk", "template", "assistant", 0), ("talk", "template", "assistant", 1),
        ("talk", "assistant", None, None), ("talk", "template", "assistant", 2), ("talk", "template", "other", 0),
    ]  # fmt: skip
    assert [name(cells, row) for row in range(12)] == expected
    assert {name(cells, row) for row in range(12, N)} == {("prose", "plain", None, None)}
    tokens = dict(zip(range(len(cells.table)), cells.table["token"], strict=True))
    assert tokens[int(cells.of_row[3])] == "<3>" and tokens[int(cells.of_row[4])] is None


def test_the_most_frequent_token_names_a_cell(store: Store) -> None:
    (shard,) = store.shards
    shard["flags"][:] = TEMPLATE
    shard["turn"][:], shard["template_index"][:], shard["dataset"][:] = 0, 3, 0
    shard["token_id"][:] = torch.tensor([7, 8, 8, 9] * 6)
    table = cells_of(store, Decoder()).table
    assert table.select("group", "role", "template_index", "token").rows() == [("template", "other", 3, "<8>")]


def chunk_of(v: torch.Tensor, rows: np.ndarray) -> Chunk:  # type: ignore[type-arg]
    token, latent = v.nonzero(as_tuple=True)
    code = SparseCode(token, latent, torch.ones(len(token)), *v.shape)
    empty = torch.zeros(len(v), 8)
    return Chunk(
        block=0, rows=rows, sequence=torch.zeros(len(v), dtype=torch.int64), numbers=np.array([0]), x=empty, code=code,
        v=v[token, latent], reconstruction=empty, error=empty, h=empty.unsqueeze(1),
    )  # fmt: skip


def test_statistics_against_a_loop(store: Store) -> None:
    cells, generator = cells_of(store, Decoder()), torch.Generator().manual_seed(0)
    activations = torch.rand(N, LATENTS, generator=generator)
    activations[activations < 0.4] = 0
    activations[:, 3] = 0  # dead
    activity = Activity.empty(cells, LATENTS)
    for rows in (np.arange(1, 10), np.arange(10, N)):  # the BOS is left out
        activity.add(chunk_of(activations[rows], rows))
    table = activity_table(activity)
    assert table.columns == list(COLUMNS)
    v, seen = activations.numpy(), set()
    for row in table.iter_rows(named=True):
        key = (row["dataset"], row["group"], row["role"], row["template_index"])
        members = [i for i in range(1, N) if name(cells, i) == key]
        values = v[members, row["latent"]]
        active = values[values > 0]
        assert (row["n_tokens"], row["n_active"]) == (len(members), len(active))
        assert row["frequency"] == pytest.approx(len(active) / len(members))
        assert row["share"] == pytest.approx(len(active) / (v[1:, row["latent"]] > 0).sum())
        assert row["mean_activation"] == pytest.approx(active.mean()) and row["max_activation"] == pytest.approx(active.max())
        seen.add((row["latent"], *key))
    active_cells = {(j, *name(cells, i)) for i in range(1, N) for j in range(LATENTS) if v[i, j] > 0}
    assert seen == active_cells
    tokens, counts = activity.by_group()
    group = group_of(store.column("flags"))[1:]
    assert tokens.tolist() == [int((group == g).sum()) for g in range(len(GROUPS))]
    assert counts.tolist() == [(v[1:][group == g] > 0).sum(0).tolist() for g in range(len(GROUPS))]
