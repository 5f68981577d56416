"""The benchmark of a harvest on a device runs, here with tiny models on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import crossdiff.models.pair
from recipe_scripts import ROOT, script

FILE = ROOT / "benchmarks" / "harvest.py"


@pytest.fixture
def benchmark() -> Any:
    return script(FILE)


@pytest.mark.slow
def test_measures_random_pairs_as_they_are_and_compiled(
    tmp_path: Path, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(crossdiff.models.pair, "compile_layers", lambda model, name: compiled.append(name))
    sizes = benchmark.Sizes(32, 2, 64, 2, 1, 16, 8192)
    cpu, sized = (
        torch.device("cpu"),
        {"batch_tokens": 256, "n_batches": 5, "max_length": 64, "sizes": sizes, "folder": tmp_path},
    )
    found = benchmark.measure_on_device(cpu, 1000.0, **sized)
    assert list(found) == ["gemma2", "gemma2 compiled", "llama", "llama compiled"]
    assert compiled == ["random gemma2", "random gemma2", "random llama", "random llama"]
    for numbers in found.values():
        assert 9 * 256 <= numbers["tokens"] < 12 * 256
        assert numbers["ratio"] == pytest.approx(numbers["harvest_seconds"] / numbers["forward_seconds"])
        assert numbers["tokens_per_second"] == pytest.approx(numbers["tokens"] / numbers["harvest_seconds"])
    # Of each Llama and token: q and o 32 x 32, k and v 32 x 16, three of 32 x 64 and two norms; 2 x 64 keys of 32 dimensions.
    parameters = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
    flops = 2 * (2 * parameters + 2 * 2 * 32 * 64)
    llama = found["llama"]
    assert llama["forward_flops_per_second"] == pytest.approx(flops * llama["tokens"] / llama["forward_seconds"])
    assert list(tmp_path.iterdir()) == []
    assert benchmark.measure_on_device(cpu, 0.0, **sized) == {}
