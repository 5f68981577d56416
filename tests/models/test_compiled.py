"""Compiled decoder layers share their code, can be read and edited as before, and are refused where they go wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from conftest import make_model
from crossdiff.activations.harvest import harvest
from crossdiff.activations.live import LiveStore, open_store
from crossdiff.activations.store import Store
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.access import decoder_layers, edited_after, residuals_after, starting_after
from crossdiff.models.compiled import compile_layers
from crossdiff.models.pair import load_pair


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What is compiled in a test does not stay for the next one."""
    yield
    torch._dynamo.reset()


def with_backend(patch: pytest.MonkeyPatch, backend: Callable[..., Any]) -> None:
    """Compile with another backend than inductor, which takes many seconds."""
    patch.setattr(torch, "compile", partial(torch.compile, backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_layers_share_their_code_and_are_read_and_edited_as_before(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, counter = make_model(kind, n_layers=4), CompileCounter()
    batches = [torch.arange(n * length).reshape(n, length) for n, length in ((3, 9), (5, 33), (8, 8))]
    expected = [residuals_after(model, ids, [1, 3]) for ids in batches]
    edit = partial(torch.add, other=1.0)
    with torch.no_grad(), edited_after(model, 1, edit):
        edited = model(batches[0]).logits
    with_backend(monkeypatch, counter)
    compile_layers(model, "the model")
    for ids, want in zip(batches, expected, strict=True):
        torch.testing.assert_close(residuals_after(model, ids, [1, 3]), want, rtol=0, atol=1e-5)
    assert counter.frame_count == 1
    with torch.no_grad(), edited_after(model, 1, edit):
        torch.testing.assert_close(model(batches[0]).logits, edited, rtol=0, atol=1e-5)
    with torch.no_grad(), starting_after(model, 1, expected[0][0] + 1.0):
        torch.testing.assert_close(model(batches[0]).logits, edited, rtol=0, atol=1e-5)
    assert all("forward" in layer.__dict__ for layer in decoder_layers(model)), "the compiled code is there again"


def test_layers_that_cannot_be_compiled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler was found")

    def off_by_one(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return lambda *values: [output + 1.0 for output in graph(*values)]

    for backend, message in (
        (without_compiler, r"the decoder layers of a/b cannot be compiled here: .*set harvest.compile to false"),
        (off_by_one, r"the compiled decoder layers of a/b give activations that differ by up to 3\.?\d* .*harvest.compile"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=message):
            with_backend(patch, backend)
            compile_layers(make_model(), "a/b")


def test_a_harvest_without_it_keeps_its_fingerprint() -> None:
    assert "compile" not in HarvestConfig().model_dump()
    assert HarvestConfig(compile=True).model_dump()["compile"] is True


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_harvest_with_compiled_layers(
    tmp_path: Path, tiny_pair: tuple[Path, Path], datasets: tuple[DatasetConfig, ...]
) -> None:
    """On disk and live, the activations are those of the plain models up to rounding."""
    settings = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=700, dtype="float32", storage="passes")
    for name, changes in {"plain": {}, "compiled": {"compile": True}, "live": {"compile": True, "storage": "live"}}.items():
        (tmp_path / name).mkdir()
        pair = load_pair(*map(str, tiny_pair), torch.device("cpu"))
        harvest({1: tmp_path / name}, pair, datasets, settings.model_copy(update=changes))
    plain, compiled = Store(tmp_path / "plain"), Store(tmp_path / "compiled")
    assert "compile" not in plain.manifest
    assert compiled.settings["compile"] is True
    rows = np.arange(plain.n_tokens)
    torch.testing.assert_close(compiled.gather(rows), plain.gather(rows), rtol=0, atol=1e-5)
    opened = load_pair(*map(str, tiny_pair), torch.device("cpu"))
    live = open_store(tmp_path / "live", lambda: opened)
    assert isinstance(live, LiveStore)
    torch.testing.assert_close(live.gather(rows), plain.gather(rows), rtol=0, atol=1e-5)
    assert hasattr(decoder_layers(opened.chat)[0].forward, "_torchdynamo_orig_callable"), "the live store compiled them"
