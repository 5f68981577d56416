"""Several processes do what one does: the same gradients, weights, stores and tables, also after a rank has died."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal
from torch.distributed import TCPStore

from crossdiff.activations.store import Store
from crossdiff.cli import run_command
from crossdiff.crosscoder.checkpoint import load
from crossdiff.errors import UserError
from crossdiff.ranks import current
from planted import planted_activations
from stores import make_store

HERE = Path(__file__).parent
WORKER = str(HERE / "worker.py")


def torchrun(n: int, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start `n` ranks on this machine; options are torchrun's."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *flags, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def done(process: subprocess.Popen[str]) -> str:
    try:
        output = process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # and with it the ranks
        output = process.communicate()[0]
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"), planted_activations(6000)[0])


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_share_a_step(tmp_path: Path, n: int) -> None:
    out = tmp_path / "errors.json"
    done(torchrun(n, WORKER, "gradients", str(out)))
    found = json.loads(out.read_text())
    assert len(found) == 24 * (2 if n == 2 else 3)
    for title, errors in found.items():
        # With equal values everywhere another choice among them is as good, and the gradients are those of that choice.
        free = {
            "decoder",
            "encoder",
            "encoder_bias",
            "decoder_bias",
            "since_fired",
            "loss",
            "reconstruction",
            "aux",
            "aux_loss",
        }
        ignored = free if " equal " in title and "topk" in title else {"aux_loss"}
        assert {key: error for key, error in errors.items() if key not in ignored and error > 1e-5} == {}, title
        if "topk" in title and " equal " not in title:
            assert errors["aux_loss"] > 0, title


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done(torchrun(1, WORKER, "training", str(folder), str(store.folder), "1"))
    return folder


def close(one: Path, other: Path, tolerance: float) -> None:
    for name in ("l1", "batchtopk", "partitioned"):
        ours, theirs = load(one / name), load(other / name)
        assert ours.threshold == pytest.approx(theirs.threshold, rel=1e-3)
        for key, parameter in ours.parameters().items():
            error = float((parameter - theirs.parameters()[key]).norm() / parameter.norm())
            assert error <= tolerance, (name, key, error)
        records = [json.loads(line) for line in (one / name / "train.jsonl").read_text().splitlines()]
        others = [json.loads(line) for line in (other / name / "train.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [record["step"] for record in others]
        assert records[-1]["loss"] == pytest.approx(others[-1]["loss"], rel=1e-3)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    """Two ranks that split the latents."""
    folder = tmp_path_factory.mktemp("together")
    done(torchrun(2, WORKER, "training", str(folder), str(store.folder), "2"))
    return folder


def test_ranks_share_a_training(tmp_path: Path, store: Store, alone: Path, together: Path) -> None:
    close(alone, together, 2e-3)
    done(torchrun(2, WORKER, "training", str(tmp_path), str(store.folder), "1"))  # and two that split the batch
    close(alone, tmp_path, 2e-3)


def test_a_training_goes_on_when_a_rank_dies(tmp_path: Path, store: Store, together: Path) -> None:
    output = done(torchrun(2, WORKER, "training", str(tmp_path / "cut"), str(store.folder), "2", "60", max_restarts=1))
    assert (tmp_path / "cut" / "died").exists(), output
    steps = [int(line) for line in (tmp_path / "cut" / "steps").read_text().split()]
    assert steps.count(1) == 1, "it went on from a checkpoint"
    close(together, tmp_path / "cut", 0.0)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on(tmp_path: Path, store: Store, alone: Path, before: int, after: int) -> None:
    process = torchrun(before, WORKER, "training", str(tmp_path), str(store.folder), str(before))
    while not (tmp_path / "steps").exists() or len((tmp_path / "steps").read_text().split()) < 40:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert not (tmp_path / "l1" / "model.safetensors").exists()
    n_before = len((tmp_path / "steps").read_text().split())
    done(torchrun(after, WORKER, "training", str(tmp_path), str(store.folder), str(after)))
    steps = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert steps[n_before] == n_before + 1, "the signal wrote a checkpoint, which the others read"
    close(alone, tmp_path, 2e-3)


def test_ranks_share_a_harvest_which_one_goes_on_with(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    path, one, shared = tmp_path / "settings.yaml", tmp_path / "one", tmp_path / "shared"
    tiny_settings["harvest"]["shard_tokens"] = 600
    path.write_text(yaml.safe_dump(tiny_settings))
    run_command(["harvest", str(one), "--config", str(path)])
    expected = Store(one / "activations").manifest["shards"]
    assert len(expected) > 6
    process = torchrun(2, "-m", "crossdiff", "harvest", str(shared), "--config", str(path))
    while process.poll() is None and len(list(shared.glob("work/*/activations/shard-*.safetensors"))) < 2:
        time.sleep(0.002)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.communicate(timeout=120)
    assert not (shared / "activations").exists(), "it was killed in time"
    run_command(["harvest", str(shared), "--config", str(path)])
    assert Store(shared / "activations").manifest["shards"] == expected, "bit for bit, whoever made them"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ranks_share_an_analysis_and_a_whole_run(tmp_path: Path, analysed_run: Path) -> None:
    shared, coder = tmp_path / "run", tmp_path / "run" / "batchtopk"
    shutil.copytree(analysed_run, shared)
    (coder / "health.json").unlink()  # so that it is analysed again
    done(torchrun(2, "-m", "crossdiff", "run", str(shared)))
    for name in ("latents", "twins", "neighbours", "activity", "behaviours"):
        ours, theirs = (pl.read_parquet(run / "batchtopk" / f"{name}.parquet") for run in (analysed_run, shared))
        assert_frame_equal(ours, theirs, rel_tol=1e-9, abs_tol=1e-9)
    assert rows_of(analysed_run / "batchtopk" / "examples.sqlite") == rows_of(coder / "examples.sqlite")
    healths = [json.loads((run / "batchtopk" / "health.json").read_text()) for run in (analysed_run, shared)]
    assert healths[0]["heldout"]["fve"] == pytest.approx(healths[1]["heldout"]["fve"], rel=1e-9)
    assert "<html" in (shared / "report.html").read_text()
    assert not (shared / "work").exists()


def rows_of(path: Path) -> list[Any]:
    with sqlite3.connect(path) as database:
        return database.execute("SELECT * FROM examples ORDER BY latent, kind, quantile, rank").fetchall()


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces with an address each: (namespace, interface, address)."""
    name = f"crossdiff{os.getpid()}"
    ends = [(f"{name}{i}", f"veth{os.getpid()}{i}", f"10.199.77.{i + 1}") for i in range(2)]
    ip = shutil.which("ip")
    if ip is None or os.geteuid() or subprocess.run([ip, "netns", "add", ends[0][0]], capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        commands = [f"netns add {ends[1][0]}", f"link add {ends[0][1]} type veth peer name {ends[1][1]}"]
        for space, interface, address in ends:
            commands += [f"link set {interface} netns {space}", f"-n {space} addr add {address}/24 dev {interface}"]
            commands += [f"-n {space} link set {interface} up", f"-n {space} link set lo up"]
        for command in commands:
            subprocess.run([ip, *command.split()], check=True)
        yield ends
    finally:
        for space, _, _ in ends:
            subprocess.run([ip, "netns", "delete", space], check=False, capture_output=True)


def test_ranks_on_two_hosts(tmp_path: Path, store: Store, alone: Path, hosts: list[tuple[str, str, str]]) -> None:
    processes = []
    for number, (space, interface, address) in enumerate(hosts):
        flags = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}", f"--local-addr={address}"]
        flags += [f"--master-addr={hosts[0][2]}", "--master-port=29777"]
        command = ["ip", "netns", "exec", space, sys.executable, "-m", "torch.distributed.run", *flags]
        processes.append(
            subprocess.Popen(
                [*command, WORKER, "training", str(tmp_path), str(store.folder), "2"],
                env={**os.environ, "GLOO_SOCKET_IFNAME": interface}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )
        )  # fmt: skip
    for process in processes:
        done(process)
    close(alone, tmp_path, 2e-3)


def test_machines_that_share_a_store_cannot_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "GROUP_WORLD_SIZE": "2"}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "0"}
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (told | {"MASTER_PORT": str(server.port)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        current()
