"""A finished run, opened for reading."""

from __future__ import annotations

import doctest
import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import crossdiff
from crossdiff.errors import UserError
from crossdiff.models.loading import load_model, load_tokenizer
from hub_server import HubServer
from opened import LAYER, write_run


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("opened") / "runs" / "demo", tiny_pair, tiny_texts)


@pytest.mark.parametrize("name", sorted(set(crossdiff.__all__) - {"__version__"}))
def test_the_example_of_every_public_name(name: str, run_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run_path)
    monkeypatch.chdir(tmp_path)
    tests = doctest.DocTestFinder(recurse=True).find(
        getattr(crossdiff, name), name, globs={"crossdiff": crossdiff, "torch": torch}
    )
    assert sum(len(test.examples) for test in tests) > 0, f"{name} has no example"
    with HubServer(monkeypatch, tmp_path / "hub") as hub:
        hub.create("me/my-diff")
        hub.add_folder("me/my-diff", run_path)
        runner = doctest.DocTestRunner()
        for test in tests:
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_every_public_name_is_there_and_is_listed() -> None:
    assert all(getattr(crossdiff, name) is not None for name in crossdiff.__all__)
    assert dir(crossdiff) == sorted(crossdiff.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", crossdiff.__version__)
    with pytest.raises(AttributeError, match="no attribute 'closed'"):
        crossdiff.closed  # noqa: B018


def test_opening_and_reading_writes_nothing_and_takes_no_lock(run_path: Path) -> None:
    from crossdiff.run import Run

    before = {path: path.stat().st_mtime_ns for path in run_path.rglob("*")}
    held = crossdiff.open(run_path)
    held.latent(3), held.scaling(), held.crosscoder, held.examples(3)
    assert {path: path.stat().st_mtime_ns for path in run_path.rglob("*")} == before
    assert not (run_path / ".lock").exists()
    locked = Run.open(run_path)  # another process may work on it meanwhile
    try:
        assert crossdiff.open(run_path).latents.height == 60
    finally:
        locked.close()
        (run_path / ".lock").unlink()


def test_the_default_crosscoder_and_a_wrong_name(run_path: Path) -> None:
    assert crossdiff.open(run_path).name == "batchtopk"
    assert "also: l1" in repr(crossdiff.open(run_path))
    with pytest.raises(UserError, match=r"no crosscoder 'l2' in .*; there are l1, batchtopk"):
        crossdiff.open(run_path, crosscoder="l2")


def test_what_is_no_run_or_not_ready_is_said(tmp_path: Path, run_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run at .*; make a run with `crossdiff run`"):
        crossdiff.open(tmp_path)
    (tmp_path / "config.yaml").write_text((run_path / "config.yaml").read_text())
    with pytest.raises(UserError, match=r"no trained crosscoder yet; run `crossdiff train"):
        crossdiff.open(tmp_path)
    for manifest, message in (({"format": 0}, "found 0"), ({"format": 1, "swap": [["a", "old/x/a"]]}, "being replaced")):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=message):
            crossdiff.open(tmp_path)
    with pytest.raises(UserError, match=r"batchtopk in .* has no causal test; run `crossdiff causal"):
        crossdiff.open(run_path).causal()
    with pytest.raises(UserError, match="no latent 60: batchtopk has 60, from 0 to 59"):
        crossdiff.open(run_path).latent(60)


def test_scaling_is_sorted_with_flagged_latents_and_then_the_undefined_last(run_path: Path) -> None:
    """20 has a nu_error of 7.5; three undecided and three dead latents have no nu. rank_sum is 2 * latent + 2."""
    table = crossdiff.open(run_path).scaling()
    latents = table["latent"].to_list()
    assert latents == [*range(11), *range(17, 20), *range(21, 60), 20, *range(11, 17)]
    assert table["nu_outside"].to_list().index(True) == 53
    assert {"nu_error_low", "beta_error_base_se"} < set(table.columns)


def test_causal_results_are_a_table(run_path: Path, tmp_path: Path) -> None:
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    result = {
        "intervention": "best_half", "span": "first", "n_latents": 7, "n_outside": 3, "n_conversations": 20, "kl": estimate,
        "closed": {"value": 0.25, "low": float("nan"), "high": 0.3}, "n_arms": 1, "spread": [0.5, 0.5],
        "measures": {"nll": {"value": 2.5, "low": 2.0, "high": 3.0}},
    }  # fmt: skip
    everything = result | {"n_latents": None, "n_outside": None}
    (run_path / "l1" / "causal.json").write_text(json.dumps({"results": [result, everything]}))
    table = crossdiff.open(run_path, crosscoder="l1").causal()
    assert table["kl_high"].to_list() == [0.6, 0.6] and table["closed"].to_list() == [0.25, 0.25]
    assert table["n_latents"].to_list() == [7, None] and table["closed_low"].is_nan().all()
    assert table["n_outside"].to_list() == [3, None]
    assert table.select("nll", "nll_low", "nll_high").rows() == [(2.5, 2.0, 3.0)] * 2


def test_a_causal_test_of_an_earlier_version_has_kl_alone(run_path: Path, tmp_path: Path) -> None:
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    names = ("intervention", "span", "n_latents", "n_conversations", "n_arms")
    result = dict.fromkeys(names) | {"kl": estimate, "closed": estimate}
    for name in ("config.yaml", "l1"):
        copy = shutil.copytree if (run_path / name).is_dir() else shutil.copy
        copy(run_path / name, tmp_path / name)
    (tmp_path / "l1" / "causal.json").write_text(json.dumps({"results": [result]}))
    table = crossdiff.open(tmp_path).causal()
    assert table["n_outside"].to_list() == [None] and "nll" not in table.columns and table["kl_low"].to_list() == [0.4]


def test_concepts_are_a_table_and_each_a_card(run_path: Path, tmp_path: Path) -> None:
    run = crossdiff.open(run_path)
    assert run.concepts["n_trainings"].to_list() == [3, 4, 4, 1, 1] and run.concepts["explanation"].is_null().all()
    view = run.concept(0)
    page = view._repr_html_()
    assert view.record.verdict == "chat_specific" and "replicated in 3 of 4 trainings" in page
    assert "<script>alert(1)</script>" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<div") == page.count("</div>") and "\n\n" not in page and "@scope (.crossdiff)" in page
    text = repr(view)
    assert text.startswith("concept 0: ") and "«" in text and "replicates" in text and "not measured" in text
    for number in (5, -1):
        with pytest.raises(UserError, match=f"no concept {number}: there are 5, from 0 to 4"):
            run.concept(number)
    shutil.copy(run_path / "config.yaml", tmp_path / "config.yaml")
    shutil.copytree(run_path / "l1", tmp_path / "l1")
    without = crossdiff.open(tmp_path)
    for read in (lambda: without.concepts, lambda: without.concept(0)):
        with pytest.raises(UserError, match=r"has no concepts; run `crossdiff concepts .*` first"):
            read()


def test_a_latents_card_shows_its_measures_and_escapes_the_text(run_path: Path) -> None:
    view = crossdiff.open(run_path).latent(3)
    page = view._repr_html_()
    assert "Latent 3" in page and "by the rule of chat_specific" in page and "best for identity" in page
    assert "<script>alert(1)</script>" not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<div") == page.count("</div>") and "\n\n" not in page
    # The page's own rules for the root and the body would restyle the notebook.
    sheet = page[page.index("<style>") : page.index("</style>")]
    assert "@scope (.crossdiff)" in sheet and ":root" not in sheet and "\nbody" not in sheet
    lines = {line[:36].strip(): line[36:] for line in repr(view).splitlines()[1:]}
    nu = crossdiff.open(run_path).latents["nu_reconstruction_nobias"][3]
    assert "chat-specific" in repr(view) and "nu_error" in lines
    assert lines["nu_reconstruction (without bias)"].startswith(f"{nu:.2f} [".replace("-", "\N{MINUS SIGN}"))
    assert lines["nu_reconstruction (with bias)"].startswith(f"{nu - 2:.2f} [".replace("-", "\N{MINUS SIGN}"))
    assert lines["rank sum"] == "8" and "rank by nu_error plus rank by nu_reconstruction (without bias)" in page
    examples = crossdiff.open(run_path).examples(3)
    assert len(examples) == 7 and repr(examples).startswith("<7 examples of latent 3, maxima 4, 3.75")
    assert examples._repr_html_().count('class="example"') == 7


def test_activations_are_those_of_a_slow_computation(run_path: Path, tiny_pair: tuple[Path, Path]) -> None:
    """v_j = ReLU(sum_s (h_s - mean_s) * scale . e_j^s + b_j) * sum_s ||d_j^s|| if above the threshold."""
    run = crossdiff.open(run_path)
    found = run.activations("the sea is cold", latents=[5, 40, 0])
    tokenizer = load_tokenizer(str(tiny_pair[1]))
    ids = [tokenizer.bos_token_id, *tokenizer("the sea is cold", add_special_tokens=False)["input_ids"]]
    assert found.tokens == tuple(tokenizer.decode([token]) for token in ids)
    assert found.roles == ("bos", *("plain" for _ in ids[1:]))
    streams = []
    for path in tiny_pair:
        model = load_model(str(path), torch.device("cpu"))
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        streams.append(hidden.double())
    crosscoder = run.crosscoder
    for column, latent in enumerate(found.latents):
        encoder, decoder = (w[latent].view(2, -1).double() for w in (crosscoder.encoder, crosscoder.decoder))
        pre = sum((streams[s] - 0.01) * 20 @ encoder[s] for s in range(2)) + crosscoder.encoder_bias[latent].double()
        v = torch.relu(pre) * decoder.norm(dim=1).sum()
        v[v <= crosscoder.threshold] = 0
        v[0] = 0  # the BOS is left out
        np.testing.assert_allclose(found.values[:, column], v.numpy(), rtol=1e-4, atol=1e-5)
    assert (found.values > 0).any()


def test_without_latents_the_strongest_come_first_and_are_drawn(run_path: Path) -> None:
    run = crossdiff.open(run_path)
    every = run.activations("a small boat", latents=range(60)).values.max(0)
    found = run.activations("a small boat")
    assert list(found.latents) == np.argsort(-every, kind="stable")[:5].tolist()
    page = found._repr_html_()
    assert page.count('class="example"') == 5 and f"latent {found.latents[0]}" in page
    assert found.table.height == len(found.tokens) and found.table["token"][1] == "a"
    assert str(found.latents[0]) in repr(found)


def test_a_question_gets_the_header_of_the_answer(run_path: Path) -> None:
    run = crossdiff.open(run_path)
    asked = run.activations([{"role": "user", "content": "hi"}])
    assert asked.tokens == ("<|bos|>", "<|user|>", "h", "i", "<|end|>", "<|assistant|>")
    assert asked.roles == ("bos", "template", "user", "user", "template", "template")
    answered = run.activations([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    assert answered.roles[-3:] == ("assistant", "assistant", "template")


@pytest.mark.parametrize(
    ("text", "latents", "message"),
    [
        ("", None, "the text is empty"),
        ([], None, "the conversation is empty"),
        ("x" * 60, None, r"has 61 tokens; the sequences of this run had at most 48"),
        ("sea", [60], "no latent 60: the crosscoder has 60"),
        ([{"role": "user"}], None, "message 0 has no 'content'"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(run_path: Path, text: object, latents: list[int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        crossdiff.open(run_path).activations(text, latents)  # type: ignore[arg-type]


def test_models_other_than_those_of_the_run_are_refused(run_path: Path, tmp_path: Path, tiny_pair: tuple[Path, Path]) -> None:
    run = crossdiff.open(run_path)
    run.crosscoder.origin["pair"] = {"chat": {"name": "x", "digest": "0123"}}
    with pytest.raises(UserError, match="is not the chat model that the crosscoder was trained on"):
        run.activations("sea")


def test_a_pulled_folder_without_manifest_is_read_like_a_run(run_path: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "batchtopk"):
        (shutil.copytree if (run_path / name).is_dir() else shutil.copy)(run_path / name, tmp_path / name)
    run = crossdiff.open(tmp_path)
    assert run.names == ("batchtopk",) and isinstance(run.latents, pl.DataFrame)
