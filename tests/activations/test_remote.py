"""Stores in a bucket: a real S3 client talks to a server that this module starts. Tests without a server use memory://."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

import crossdiff.activations.remote as remote
from conftest import tiny_config
from crossdiff.activations.folder import LocalFolder
from crossdiff.activations.harvest import harvest
from crossdiff.activations.live import open_store
from crossdiff.activations.loader import Batches
from crossdiff.activations.locations import leave_pointer, open_folder
from crossdiff.activations.plan import Plan
from crossdiff.activations.store import Store, verify
from crossdiff.cli import run_command
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.report.reading import read_run
from stores import make_store

SETTINGS = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=700, dtype="float32")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3FileSystem]:
    """Client of a server with the bucket `bucket`. Its address and credentials are in the environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        S3FileSystem.clear_instance_cache()
        system = S3FileSystem()
        system.mkdir("bucket")
        yield system
        S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def bucket(s3: S3FileSystem) -> Iterator[str]:
    """A folder of the bucket that no other test uses."""
    yield f"s3://bucket/{uuid.uuid4().hex}"
    S3FileSystem.clear_instance_cache()  # a test may have changed the environment


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pair: Pair, datasets: tuple[DatasetConfig, ...]) -> Store:
    folder = tmp_path_factory.mktemp("store")
    harvest({1: folder}, pair, datasets, SETTINGS)
    return Store(folder)


@pytest.fixture(scope="module")
def stored(s3: S3FileSystem, pair: Pair, datasets: tuple[DatasetConfig, ...]) -> str:
    """The URL of the same store in the bucket."""
    harvest({1: "s3://bucket/stored"}, pair, datasets, SETTINGS)
    return "s3://bucket/stored"


def content(where: str | Path) -> dict[str, bytes]:
    """Content of every file of a store except the manifest, which contains times."""
    system, root = fsspec.url_to_fs(str(where))
    return {name.rpartition("/")[2]: system.cat_file(name) for name in system.ls(root, detail=False) if "manifest" not in name}


def upload(folder: Path, url: str) -> None:
    system, root = fsspec.url_to_fs(url)
    for path in folder.iterdir():
        system.pipe_file(f"{root}/{path.name}", path.read_bytes())


def rewrite_manifest(url: str, **changes: Any) -> None:
    system, root = fsspec.url_to_fs(url)
    manifest = json.loads(system.cat_file(f"{root}/manifest.json"))
    system.pipe_file(f"{root}/manifest.json", json.dumps(manifest | changes).encode())


# --- the same bits ------------------------------------------------------------------------------------------------


def test_the_store_in_the_bucket_is_the_local_one_bit_for_bit(local: Store, stored: str) -> None:
    assert content(stored) == content(local.folder)
    store = Store(stored)
    assert store.folder == stored
    assert {**store.manifest, "seconds": 0} == {**local.manifest, "seconds": 0}
    assert verify(stored) == []
    assert store.documents.equals(local.documents)
    assert torch.equal(store.normalisation.gram, local.normalisation.gram)
    rows = np.random.default_rng(0).integers(0, store.n_tokens, 500)  # any order, some of them twice
    assert torch.equal(store.gather(rows), local.gather(rows))


@pytest.mark.parametrize("buffer_bytes", [60_000, 256_000_000])
def test_batches_are_those_of_the_local_store(local: Store, stored: str, buffer_bytes: int) -> None:
    """Buffers hold part of an epoch or the entire store. The test runs for a little more than two epochs."""
    far, near = (Batches(store, 64, 5, buffer_bytes) for store in (Store(stored), local))
    for step in range(2 * near.per_epoch + 3):
        assert torch.equal(far[step], near[step])
    far.close()
    near.close()


@pytest.mark.parametrize("changes", [{"dtype": "int8"}, {"dtype": "float16", "storage": "passes"}, {"storage": "live"}])
def test_every_kind_of_store(
    tmp_path: Path, memory: str, pair: Pair, datasets: tuple[DatasetConfig, ...], changes: dict[str, str]
) -> None:
    config = SETTINGS.model_copy(update=changes)
    harvest({1: memory}, pair, datasets, config)
    harvest({1: tmp_path}, pair, datasets, config)
    assert content(memory) == content(tmp_path)
    far, near = (open_store(where, lambda: pair) for where in (memory, tmp_path))
    rows = np.arange(near.n_tokens)[::3]
    assert torch.equal(far.gather(rows), near.gather(rows))


def test_a_run_with_its_store_in_the_bucket(
    tmp_path: Path, bucket: str, analysed_run: Path, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Harvest, training, analysis and the data of the report are compared with the same run on the local disk."""
    values = tiny_config(tiny_pair, tiny_texts)
    values["crosscoders"] = {"batchtopk": values["crosscoders"]["batchtopk"]}
    values["harvest"]["store"] = bucket
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    for stage in ("harvest", "analyze"):
        run_command([stage, str(run), "--config", str(tmp_path / "settings.yaml")])
    url = json.loads((run / "activations" / "store.json").read_text())["url"]
    assert url.startswith(f"{bucket}/activations-")
    assert url in capsys.readouterr().out
    assert {path.name for path in (run / "activations").iterdir()} == {"store.json", "manifest.json", "documents.parquet"}
    assert content(url) == content(analysed_run / "activations")
    name = "batchtopk/model.safetensors"
    assert (run / name).read_bytes() == (analysed_run / name).read_bytes()
    tables = [pl.read_parquet(path / "batchtopk" / "latents.parquet") for path in (run, analysed_run)]
    assert tables[0].equals(tables[1])
    report, expected = read_run(run), read_run(analysed_run)
    assert (report.n_tokens, report.datasets) == (expected.n_tokens, expected.datasets)
    run_command(["store", "verify", str(run / "activations")])
    run_command(["store", "verify", url])
    assert capsys.readouterr().out.endswith(f"{url} is intact\n")
    # Moving the store changes no later stage, and another run with the same settings reuses it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crossdiff.activations.harvest.ForwardPass", None)
        run_command(["harvest", str(run), "--harvest.store", "null"])
        run_command(["harvest", str(tmp_path / "other"), "--config", str(tmp_path / "settings.yaml")])
    pointer = Path("activations/store.json")
    assert (tmp_path / "other" / pointer).read_bytes() == (run / pointer).read_bytes()


# --- interruptions ------------------------------------------------------------------------------------------------


KILL = """
import os, signal, sys, torch
from crossdiff.activations.harvest import harvest
from crossdiff.activations.shards import ProgressLog
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.models.pair import load_pair

base, chat, plain, chats, url = sys.argv[1:]
append = ProgressLog.append

def dying(log, entry):
    if len(log.entries()) == 2:  # the third shard is uploaded, its log line is not
        os.kill(os.getpid(), signal.SIGKILL)
    append(log, entry)

ProgressLog.append = dying
datasets = DatasetConfig(path=plain, heldout_share=0.3), DatasetConfig(path=chats, label_column="kind", heldout_share=0.3)
settings = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=700, dtype="float32")
harvest({1: url}, load_pair(base, chat, torch.device("cpu")), datasets, settings)
"""


@pytest.mark.slow
def test_a_killed_harvest_resumes(
    tmp_path: Path, bucket: str, local: Store, pair: Pair, datasets: tuple[DatasetConfig, ...],
    tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path],
) -> None:  # fmt: skip
    command = [sys.executable, "-c", KILL, *map(str, (*tiny_pair, *tiny_texts)), bucket]
    result = subprocess.run(command, capture_output=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = content(bucket)
    assert sorted(left) == ["progress-0.jsonl", *(f"shard-0000{n}.safetensors" for n in range(3))]
    assert len(left["progress-0.jsonl"].splitlines()) == 3  # the settings and two shards
    with pytest.raises(UserError, match=r"is not an activation store: it has no manifest\.json"):
        Store(bucket)
    with pytest.raises(UserError, match=f"{bucket} has an unfinished harvest with other settings"):
        harvest({1: bucket}, pair, datasets, SETTINGS.model_copy(update={"leave_out": 2}))
    harvest({1: bucket}, pair, datasets, SETTINGS)
    assert content(bucket) == content(local.folder)


def test_an_upload_that_breaks_off_leaves_no_file(
    bucket: str, s3: S3FileSystem, local: Store, pair: Pair, datasets: tuple[DatasetConfig, ...]
) -> None:
    """The second of three parts of a file is refused, and so is the third shard."""
    folder = open_folder(bucket)
    with pytest.MonkeyPatch.context() as patch:
        send, n_parts = S3FileSystem._call_s3, 0

        async def failing(self: S3FileSystem, method: str, *arguments: Any, **more: Any) -> Any:
            nonlocal n_parts
            n_parts += method == "upload_part"
            if n_parts == 2:
                raise ConnectionResetError("the line is cut")
            return await send(self, method, *arguments, **more)

        patch.setattr(S3FileSystem, "_call_s3", failing)
        with (
            pytest.raises(UserError, match="ConnectionResetError: the line is cut"),
            folder.writing("large") as path,
            path.open("wb") as file,
        ):
            file.truncate(101 << 20)  # files larger than twice 50 MB are uploaded in parts
    assert folder.sizes() == {}
    original, calls = remote.RemoteFolder.writing, 0

    def third(self: remote.RemoteFolder, name: str) -> Any:
        nonlocal calls
        calls += name.startswith("shard")
        if calls == 3:
            raise UserError("the line is cut")
        return original(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote.RemoteFolder, "writing", third)
        with pytest.raises(UserError, match="the line is cut"):
            harvest({1: bucket}, pair, datasets, SETTINGS)
    assert sorted(content(bucket)) == ["progress-0.jsonl", "shard-00000.safetensors", "shard-00001.safetensors"]
    harvest({1: bucket}, pair, datasets, SETTINGS)
    assert content(bucket) == content(local.folder)


def test_nothing_is_left_on_the_local_disk(tmp_path: Path, memory: str, local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    upload(Path(local.folder), memory)
    store = Store(memory)
    store.gather(np.arange(store.n_tokens))
    (scratch,) = tmp_path.iterdir()
    header = scratch / "shard-00000.safetensors"
    assert header.stat().st_size == store.manifest["shards"][0]["bytes"]
    with open_folder(memory).writing("new") as path:
        path.write_bytes(b"new")
        assert path.is_relative_to(tmp_path)
    del store
    assert list(tmp_path.iterdir()) == []


# --- damage and hostility -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "documents"])
def test_verify_names_the_damaged_file(bucket: str, s3: S3FileSystem, local: Store, damage: str) -> None:
    upload(Path(local.folder), bucket)
    name = "documents.parquet" if damage == "documents" else "shard-00002.safetensors"
    whole = bytearray(s3.cat_file(f"{bucket}/{name}"))
    whole[-5] ^= 1
    if damage == "remove":
        s3.rm_file(f"{bucket}/{name}")
    else:
        s3.pipe_file(f"{bucket}/{name}", bytes(whole[:-100] if damage == "truncate" else whole))
    assert [problem.partition(":")[0] for problem in verify(bucket)] == [name]
    with pytest.raises(UserError, match=rf"{bucket} is damaged:\n  {name}: "):
        run_command(["store", "verify", bucket])
    if damage in {"truncate", "remove"}:
        with pytest.raises(UserError, match=rf"shard {bucket}/shard-00002\.safetensors (is missing|has \d+ bytes instead of)"):
            Store(bucket)


def test_a_shard_that_is_cut_off_after_it_was_opened_is_named(memory: str, local: Store) -> None:
    upload(Path(local.folder), memory)
    store = Store(memory)
    store.gather(np.arange(10))
    system, root = fsspec.url_to_fs(memory)
    system.pipe_file(f"{root}/shard-00001.safetensors", system.cat_file(f"{root}/shard-00001.safetensors")[:5000])
    with pytest.raises(UserError, match=rf"{memory}/shard-00001\.safetensors ends at byte 5000"):
        store.gather(np.arange(store.offsets[1], store.offsets[2]))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "s3://other/secret", "a/b", "..", ".", "", 7, "%2e%2e", "a\\b", "shard-*", ".hidden"]
)
def test_a_manifest_cannot_point_outside(memory: str, local: Store, name: str | int) -> None:
    upload(Path(local.folder), memory)
    rewrite_manifest(memory, shards=[{**local.manifest["shards"][0], "file": name}])
    for read in (verify, Store):
        with pytest.raises(UserError, match="expected a plain file name in the store"):
            read(memory)
    rewrite_manifest(memory, shards=[], files={str(name): "0"})
    if isinstance(name, str):
        with pytest.raises(UserError, match="expected a plain file name in the store"):
            verify(memory)


def test_links_of_a_remote_machine_are_not_files(memory: str, local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFTP lists links with their type."""
    upload(Path(local.folder), memory)
    store = Store(memory)
    listed = store._folder._system.ls  # type: ignore[attr-defined]

    def with_link(path: str, detail: bool) -> list[dict[str, Any]]:
        return [entry | ({"type": "link"} if entry["name"].endswith("1.safetensors") else {}) for entry in listed(path, detail)]

    monkeypatch.setattr(store._folder._system, "ls", with_link)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is missing"):
        Store(memory)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"activations": {"data_offsets": [0]}}', b'{"activations": {"data_offsets": [0, 1000000000]}}',
     b'{"activations": {"data_offsets": [-900, 10]}}', b'{"activations": {"data_offsets": [10, 0]}}'],
)  # fmt: skip
def test_a_hostile_header_is_damage(memory: str, local: Store, header: bytes) -> None:
    upload(Path(local.folder), memory)
    system, root = fsspec.url_to_fs(memory)
    whole = system.cat_file(f"{root}/shard-00000.safetensors")
    content = len(header).to_bytes(8, "little") + header
    system.pipe_file(f"{root}/shard-00000.safetensors", content + whole[len(content) :])
    with pytest.raises(UserError, match=rf"shard {memory}/shard-00000\.safetensors is damaged"):
        Store(memory).rows()


def test_the_pointer_of_a_run_says_which_store_it_is(tmp_path: Path, memory: str, local: Store) -> None:
    upload(Path(local.folder), memory)
    leave_pointer(tmp_path, memory)
    assert Store(tmp_path).folder == memory
    assert verify(tmp_path) == []
    rewrite_manifest(memory, layer=2)
    for read in (Store, verify):
        with pytest.raises(UserError, match=rf"the store {memory} is not the one that {tmp_path} was made with"):
            read(tmp_path)
    (tmp_path / "store.json").write_text('{"url": "../elsewhere", "sha256": ""}')
    with pytest.raises(UserError, match=r"store\.json is damaged: expected the url of a store"):
        Store(tmp_path)


# --- errors that come before long work ----------------------------------------------------------------------------


@contextmanager
def nobody_is_known() -> Iterator[None]:
    """Make the server check credentials, and accept none."""
    address = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"

    def let_in(n_requests: bytes) -> None:
        request = urllib.request.Request(address, n_requests, {"Content-Type": "text/plain"}, method="POST")
        urllib.request.urlopen(request).close()

    let_in(b"0")
    try:
        yield
    finally:
        let_in(b"inf")


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        ("foo://bucket/stores", "Protocol not known: foo"),
        ("gs://bucket/stores", r"needs a package that is not installed \(Please install gcsfs.*crossdiff\[remote\]"),
        ("s3://nowhere/stores", r"NoSuchBucket|The specified bucket does not exist"),
        ("bucket/stores", r"harvest\.store: .*'bucket/stores' is not the URL of a folder; expected something like s3:"),
        ("simplecache::s3://bucket/stores", "is not the URL of a folder"),
        ("sftp://me:secret@host/stores", "a URL must not contain a password"),
        ("unreachable", "EndpointConnectionError: Could not connect to the endpoint URL"),
        ("anonymous", "NoCredentialsError: Unable to locate credentials"),
        ("forbidden", "PermissionError: "),
    ],
)
def test_a_location_that_cannot_be_used_is_named_before_long_work(
    tmp_path: Path, bucket: str, s3: S3FileSystem, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    store: str, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("crossdiff.models.pair.load_pair", None)  # no model is loaded
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    if store == "unreachable":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    elif store == "anonymous":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    tiny_settings["harvest"]["store"] = store if "/" in store else bucket
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tiny_settings))
    with nobody_is_known() if store == "forbidden" else nullcontext():
        for command in ("harvest", "plan"):
            with pytest.raises(UserError, match=reason) as raised:
                run_command([command, str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")])
            assert "\n" not in str(raised.value).partition("wrong settings:\n")[2]


def test_reading_a_missing_store(s3: S3FileSystem, capsys: pytest.CaptureFixture[str]) -> None:
    for url, reason in (("s3://nowhere/store", "The specified bucket does not exist"), ("s3://bucket/none", "")):
        with pytest.raises(UserError, match=rf"{url} is not an activation store: it has no manifest\.json \({reason}"):
            Store(url)
        with pytest.raises(UserError, match="is not an activation store"):
            run_command(["store", "verify", url])


def test_plan_checks_the_disk_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 tokens of 1,000 bytes. A remote store needs a shard of 200 + 100 tokens and 20 bytes per token, 320 kB in all."""
    found = Plan(1000, 1_000_000, 0, 1.0, 1000.0)
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return shutil._ntuple_diskusage(0, 0, free)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sizes = {"shard_tokens": 200, "batch_tokens": 100}
    free = 320_000
    assert found.check_disk(tmp_path / "run", HarvestConfig(**sizes, store="memory://x")) == free
    free -= 1
    with pytest.raises(UserError, match=r"needs 0\.00 GB for temporary files \(one shard and the columns\).*set TMPDIR"):
        found.check_disk(tmp_path / "run", HarvestConfig(**sizes, store="memory://x"))
    (tmp_path / "disk").mkdir()
    with pytest.raises(UserError, match="the store needs"):
        found.check_disk(tmp_path / "run", HarvestConfig(**sizes, store=f"file://{tmp_path}/disk/stores"))
    assert asked == [tmp_path, tmp_path, tmp_path / "disk"]


# --- few requests -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 99)), max_size=30), st.integers(1, 200), st.integers(0, 100))
def test_pieces_are_read_in_few_requests_of_a_bounded_size(ranges: list[tuple[int, int]], largest: int, gap: int) -> None:
    folder = open_folder("memory://pieces")
    assert isinstance(folder, remote.RemoteFolder)
    whole = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    folder._system.pipe_file(f"{folder._root}/file", whole)
    pieces = [(start, memoryview(bytearray(size))) for start, size in sorted(ranges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "REQUEST", largest)
        patch.setattr(remote, "GAP", gap)
        asked = list(remote.requests(pieces))
        folder.read("file", pieces)
    assert all(bytes(content) == whole[start : start + len(content)] for start, content in pieces)
    assert all(0 < request.stop - request.start <= largest for request in asked)
    if ranges and largest == 200 and gap == 100:
        assert len(asked) <= 1 + 1000 // (largest - 99)


def test_an_analysis_reads_a_shard_in_one_request(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 tokens in 4 shards, one position in 20 omitted. The bytes between the runs are read too."""
    make_store(tmp_path, torch.randn(4000, 2, 8), shard=1000)
    upload(tmp_path, memory)
    store = Store(memory)
    rows = store.rows()
    _ = store.activations
    system = store._folder._system  # type: ignore[attr-defined]
    original, asked = system.cat_file, []

    def counted(path: str, start: int | None = None, end: int | None = None) -> bytes:
        asked.append(path)
        return original(path, start=start, end=end)

    monkeypatch.setattr(system, "cat_file", counted)
    assert torch.equal(store.gather(rows), Store(tmp_path).gather(rows))
    assert len(asked) == 4
    monkeypatch.setattr(remote, "GAP", 0)
    asked.clear()
    store.gather(rows)
    assert len(asked) == len(rows) // 19


def test_a_file_url_is_the_local_folder(tmp_path: Path, local: Store) -> None:
    folder = open_folder(f"file://{local.folder}")
    assert isinstance(folder, LocalFolder)
    assert Store(f"file://{local.folder}").folder == local.folder
    leave_pointer(tmp_path, f"file://{local.folder}")
    assert Store(tmp_path).folder == local.folder
