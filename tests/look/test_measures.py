"""The measures of the first look against float64 and against counts by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from crossdiff.look.depth import LayerPair, blockwise, recommended
from crossdiff.look.directions import MEAN_GROUPS, MeanDifferences
from crossdiff.look.phrases import phrase_table, token_table
from crossdiff.look.predictions import LARGE_SHIFT, Shifts, compare
from crossdiff.look.probes import conversation_means, probe_table
from crossdiff.text.chat import Flag


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


class Letters:
    """A tokenizer whose token n is the n-th letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_predictions_are_those_of_float64(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdiff.look.predictions.CHUNK_BYTES", chunk_bytes)
    base, chat, following = random(7, 11), random(7, 11, seed=1), torch.tensor([0, 3, 10, 5, 2, 1, -1])
    shifts = Shifts(11, base.device)
    found = compare(base, chat, following, following, shifts)
    log_base, log_chat = (logits.double().log_softmax(1) for logits in (base, chat))
    expected = (log_chat.exp() * (log_chat - log_base)).sum(1)
    torch.testing.assert_close(found.kl.double(), expected, rtol=1e-5, atol=1e-6)
    rows = torch.arange(6)
    torch.testing.assert_close(found.log_base[:6].double(), log_base[rows, following[:6]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_chat[:6].double(), log_chat[rows, following[:6]], rtol=1e-5, atol=1e-5)
    assert found.log_base[6].isnan() and found.log_chat[6].isnan()
    assert torch.equal(found.top_base, base.argmax(1)) and torch.equal(found.top_chat, chat.argmax(1))
    change = log_chat.exp() - log_base.exp()
    collected = shifts.tensors()
    torch.testing.assert_close(collected["rise"], change.sum(0), rtol=1e-5, atol=1e-6)
    large = change.abs() > LARGE_SHIFT
    position, token, amount = (collected[f"large_{name}"] for name in ("position", "token", "change"))
    assert torch.equal(torch.stack([position, token], dim=1), large.nonzero())
    torch.testing.assert_close(amount.double(), change[large], rtol=1e-4, atol=1e-5)


def test_a_model_beside_itself_predicts_the_same() -> None:
    logits = random(5, 9)
    shifts = Shifts(9, logits.device)
    found = compare(logits, logits, torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), shifts)
    assert found.kl.tolist() == [0.0] * 5
    assert not any(len(tensor.nonzero()) for tensor in shifts.tensors().values())


def test_tokens_that_the_base_model_lacks_are_left_out_and_counted() -> None:
    """The chat model has two more ids. p_chat over the three common ones is (.2, .2, .4) / .8, p_base is uniform."""
    chat = torch.tensor([[0.2, 0.2, 0.4, 0.15, 0.05]]).log()
    base = torch.zeros(1, 3)
    found = compare(base, chat, torch.tensor([-1]), torch.tensor([4]), Shifts(3, base.device))
    expected = 2 * 0.25 * np.log(0.25 * 3) + 0.5 * np.log(0.5 * 3)
    assert float(found.kl) == pytest.approx(expected, rel=1e-5)
    assert float(found.outside) == pytest.approx(0.2)
    assert found.log_chat.isnan().all() and found.log_base.isnan().all()
    assert (
        float(compare(base, chat[:, :2], torch.tensor([2]), torch.tensor([0])).log_base) != 0.0
    )  # fewer ids in the chat model
    assert compare(base, chat[:, :2], torch.tensor([2]), torch.tensor([0])).log_base.isnan().all()


def test_tokens_that_rise_and_fall() -> None:
    """Two documents of two positions; token 0 rises by .6, .6, 0, 0 at the cost of token 1."""
    base = torch.tensor([[0.1, 0.8, 0.1]] * 4)
    chat = torch.tensor([[0.7, 0.2, 0.1]] * 2 + [[0.1, 0.8, 0.1]] * 2)
    shifts = Shifts(3, base.device)
    shifts.add(base[:3], chat[:3])
    shifts.add(base[3:], chat[3:])
    table = token_table(shifts.tensors(), np.array([0, 1, 1, 1]), Letters(), 1)
    assert table["token"].to_list() == ["a", "b"]
    assert table["rise"].to_list() == pytest.approx([1.2, -1.2])
    assert table["per_thousand"].to_list() == pytest.approx([300, -300])
    assert table.select("n_up", "n_down", "n_documents").rows() == [(2, 0, 2), (0, 2, 2)]


def sequence(text: str, number: int, gains: dict[str, float], template: str = "") -> pl.DataFrame:
    """A document whose letters have these gains, as the positions that predict them; some belong to a template."""
    ids = [ord(letter) - ord("a") for letter in text]
    return pl.DataFrame({
        "sequence": number, "document": number, "next_id": [*ids, -1],
        "group": ["bos", *("template" if letter in template else "user" for letter in text)],
        "log_base": [*([-3.0] * len(ids)), float("nan")],
        "log_chat": [*(-3.0 + gains.get(letter, 0.0) for letter in text), float("nan")],
    })  # fmt: skip


def test_phrases_by_hand() -> None:
    """`abc` stands in 6 documents, with gains 1, 2 and 3. Its parts are not listed beside it; `x` loses 1 at 12 places."""
    gains = {"a": 1.0, "b": 2.0, "c": 3.0, "x": -1.0}
    tokens = pl.concat([sequence("xabcx", number, gains) for number in range(6)])
    table = phrase_table(tokens, Letters(), longest=3, n=10)
    best = table.row(0, named=True)
    assert (best["phrase"], best["n_places"], best["n_documents"]) == ("abc", 6, 6)
    assert best["gain"] == pytest.approx(36) and best["mean_gain"] == pytest.approx(6)
    rising = table.filter(pl.col("gain") > 0)["phrase"].to_list()
    assert rising == ["abc", "bcx", "xab"]  # 6, 4 and 2 per place: the parts of `abc` are not listed beside it
    worst = table.row(-1, named=True)
    assert (worst["phrase"], worst["gain"], worst["n_places"]) == ("x", -12.0, 12)


def test_phrases_with_tokens_of_the_template_are_left_out() -> None:
    tokens = pl.concat([sequence("abxcd", number, dict.fromkeys("abcd", 1.0) | {"x": 9.0}, "x") for number in range(6)])
    assert set(phrase_table(tokens, Letters(), 4, 10)["phrase"]) == {"ab", "cd"}


def test_phrases_do_not_cross_texts_and_rare_ones_are_not_listed() -> None:
    tokens = pl.concat([sequence("ab", number, {"a": 1.0, "b": 1.0}) for number in range(5)])
    assert set(phrase_table(tokens, Letters(), 4, 10)["phrase"]) == {"ab"}
    assert not phrase_table(pl.concat([sequence("ab", n, {"a": 1.0}) for n in range(4)]), Letters(), 4, 10).height
    one = pl.concat([sequence("aaaaaaaa", 0, {"a": 1.0})])
    assert not phrase_table(one, Letters(), 4, 10).height  # many places, in one document


def test_measures_of_a_layer_by_hand() -> None:
    """The difference is a constant plus orthogonal directions of variances 4, 1 and 0."""
    base = torch.zeros(4, 3, dtype=torch.float64)
    base[:, 2] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    difference = torch.cat([signs * torch.tensor([2.0, 1.0]), torch.full((4, 1), 3.0)], dim=1)
    layer = LayerPair(base, base + difference)
    values, vectors = layer.components()
    torch.testing.assert_close(values, torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(vectors[:2].abs(), torch.eye(3, dtype=torch.float64)[:2])
    assert layer.effective_rank == pytest.approx(np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.2)))
    assert layer.relative_norm == pytest.approx((14 / 1) ** 0.5)
    same = LayerPair(base, base)
    assert (same.relative_norm, same.centred_cosine, same.effective_rank) == (0.0, pytest.approx(1.0), 0.0)


def test_means_over_groups_and_halves() -> None:
    """Documents 0 and 1: half 0 has the difference 1 on two user tokens, half 1 has 3 on one; plain text has 10."""
    means = MeanDifferences.empty(n_layers=2, d_model=1)
    zero = torch.zeros(5, 1)
    chat = torch.tensor([[1.0], [1.0], [3.0], [10.0], [10.0]])
    flags = np.array([Flag.USER, Flag.USER, Flag.USER, 0, 0], dtype=np.uint8)
    means.add([zero, zero], [chat, 2 * chat], flags, np.array([0, 1, 0, 2, 40]), np.array([0, 0, 1, 1, 1]))
    assert means.mean("user", 0).item() == pytest.approx(5 / 3)
    assert [means.mean("user", 1, half).item() for half in (0, 1)] == [2.0, 6.0]
    assert means.mean("plain_beginning", 0).item() == 10.0  # the token at position 2, and not the one at 40
    assert means.n[:, MEAN_GROUPS.index("plain_beginning")].tolist() == [0, 1]
    assert means.mean("all", 0).item() == pytest.approx(5.0)
    assert means.mean("assistant", 0).isnan().all()


def test_blockwise_mean_and_interval() -> None:
    """Blocks with means 1, 2 and 3, and equally many values: the jackknife is the usual standard error of three numbers."""
    values = np.array([0.0, 2.0, 1.0, 3.0, 2.0, 4.0])
    value, low, high = blockwise(values, np.array([0, 0, 4, 4, 7, 7]))
    half = 4.302653 * 1.0 / 3**0.5
    assert (value, low, high) == (pytest.approx(2.0), pytest.approx(2 - half), pytest.approx(2 + half))
    assert np.isnan(blockwise(values, np.zeros(6, dtype=np.int64))[1:]).all()


def test_the_recommended_layer_is_the_first_with_half_of_the_kl() -> None:
    table = pl.DataFrame({"layer": [0, 1, 2, 3], "kl": [0.1, 0.4, 0.6, 1.0]})
    assert recommended(table)[0] == 2
    assert recommended(table.with_columns(kl=pl.lit(0.0)))[0] is None


def test_probes_find_a_direction_and_not_what_is_not_there() -> None:
    """The label is in the chat model's activations alone, so it is in the difference as well."""
    generator = np.random.default_rng(0)
    n = 120
    labels = np.array(["yes", "no"] * (n // 2))
    found = []
    for document in range(n):
        base = torch.from_numpy(generator.normal(size=(3, 8))).float()
        chat = base.clone()
        chat[:, 2] += 2.0 * (labels[document] == "yes")
        flags = np.array([Flag.USER, Flag.USER, Flag.ASSISTANT], dtype=np.uint8)
        chat[2] += 100 * (labels[document] == "no")  # an answer's token, which no reading may see
        found.append(conversation_means(base, chat, flags, np.zeros(3, dtype=np.int64), np.full(3, document)))
    documents = pl.DataFrame({
        "document": range(n), "label": labels, "n_messages": 2, "n_tokens": 3, "prompt": [f"prompt {i}" for i in range(n)],
        "split": ["heldout" if i % 4 < 2 else "train" for i in range(n)],
    })  # fmt: skip
    means = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    table = probe_table(means, documents, seed=0)
    assert set(table["behaviour"]) == {"yes", "no"}
    of_yes = table.filter(behaviour="yes")
    scores = {(row["reading"], row["activations"]): row["auroc"] for row in of_yes.iter_rows(named=True)}
    assert scores["diffmean", "difference"] == 1.0 and scores["probe", "chat"] > 0.9
    assert 0.25 < scores["diffmean", "base"] < 0.75
    assert of_yes["n_positive"].unique().to_list() == [30]
    assert not probe_table(means, documents.with_columns(label=pl.lit(None, pl.String)), seed=0).height
