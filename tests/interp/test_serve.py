"""The plumbing against a real OpenAI-compatible server: `transformers serve` with a tiny model. A random model explains
nothing, so every latent has to end marked with the reason, and the run has to end well."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from crossdiff.cli import run_command

SECONDS_TO_START = 120


@pytest.fixture
def served(tiny_pair: tuple[Path, Path], tmp_path: Path) -> Iterator[str]:
    """URL of a server that has the tiny pair's chat model."""
    for module in ("fastapi", "uvicorn", "openai"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'transformers[serving]' 'crossdiff[interp]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "hub").mkdir()
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(tiny_pair[1]), "--port", str(port)]
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--device", "cpu"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while not _answers(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    log_end = (tmp_path / "serve.log").read_text()[-300:]
                    pytest.skip(f"transformers serve did not start within {SECONDS_TO_START} s: {log_end}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(20)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
def test_a_real_server_is_asked_and_its_nonsense_is_marked(
    served: str,
    tiny_pair: tuple[Path, Path],
    analysed_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(analysed_run, tmp_path / "run")
    table = pl.read_parquet(run / "batchtopk" / "latents.parquet").filter(pl.col("frequency").is_between(0.01, 0.06))
    latents = [str(latent) for latent in table["latent"].head(2)]
    options = ["--tokens", "2000", "--before", "5", "--after", "2", "--contexts", "5", "--embedding", "none"]
    asked = ["--server", served, "--model", str(tiny_pair[1]), "--attempts", "2", "--answer_tokens", "16"]
    capsys.readouterr()
    run_command(["interpret", str(run), "--latents", *latents, *options, *asked])
    assert "4 calls made, " in capsys.readouterr().out
    rows = pl.read_parquet(run / "batchtopk" / "interpretation.parquet")
    assert rows["latent"].to_list() == sorted(map(int, latents))
    assert rows["interpretation_reason"].str.contains("explanation: .*after 2 attempts").all()
    assert rows["explanation"].is_null().all() and rows["bag_of_words"].is_not_nan().all()
