"""Times the dashboard: `python benchmarks/dashboard.py FOLDER [--latents 73728] [--examples 100] [--live runs/demo]`.

The synthetic run has the same number of latents as the paper's crosscoders and a database of about 2 GB. It is written once,
which takes a few minutes, and then reused. The server runs in a process of its own, as for users, and requests go over HTTP.
`--live` names a run with models, which are then timed on prompts of 210 words.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import polars as pl

from crossdiff.latents.activity import ROW_GROUP
from crossdiff.latents.example_schema import SCHEMA
from crossdiff.latents.ranking import RANKS, RECONSTRUCTIONS
from crossdiff.latents.verdict import counts

N_SEQUENCES, LENGTH, VOCABULARY, ACTIVE = 40_000, 256, 32_000, 24
READERS, PER_READER = 20, 15
NUS = ("nu_error", *RECONSTRUCTIONS, "nu_activation")


def latent_table(n: int) -> pl.DataFrame:
    """A table shaped like latents.parquet, with plausible values."""
    rng = np.random.default_rng(0)
    delta = np.clip(rng.normal(0.5, 0.15, n), 0, 1)
    nus = {name: np.clip(rng.normal(0.9, 0.3, n), -0.5, 3) for name in NUS}
    specific = (nus["nu_error"] < 0.2) & (delta > 0.6)
    verdict = np.where(specific, "chat_specific", np.where(delta < 0.2, "base_specific", "shared"))
    shares = rng.dirichlet([1, 0.1, 1, 1, 2], n)
    columns: dict[str, Any] = {
        "latent": np.arange(n), "n_active": rng.integers(100, 10_000, n), "frequency": rng.random(n) / 100,
        "mean_activation": rng.random(n) * 3, "max_activation": 4 + rng.random(n) * 10, "norm_base": 1 - delta + 0.1,
        "norm_chat": delta + 0.1, "delta_norm": delta, "delta_norm_class": np.where(delta > 0.9, "chat_only", "other"),
        "decoder_cosine": rng.random(n),
    }  # fmt: skip
    for name, values in nus.items():
        columns |= {name: values, f"{name}_low": values - 0.05, f"{name}_high": values + 0.05}
    # The real table has about forty more measures.
    for number in range(40):
        columns[f"measure_{number}"] = rng.random(n)
    columns |= {
        **{name: rng.permutation(n).astype(float) for name in RANKS},
        "verdict": verdict,
        "verdict_reason": ["nu_error 0.94 over 0.2"] * n,
    }
    columns |= {name: specific for name in ("chat_specific", "chat_specific_paper", "template_only")}
    for at, group in enumerate(("plain", "bos", "template", "user", "assistant")):
        columns |= {f"share_{group}": shares[:, at], f"frequency_{group}": shares[:, at] / 100}
    return pl.DataFrame(columns)


def write_examples(path: Path, n_latents: int, n_examples: int) -> None:
    """A database in the shape of examples.sqlite: half of the examples are top ones, half are from quantiles."""
    rng = np.random.default_rng(1)
    words = ["the", "sea", "boat", "cold", "stone", "wall", "bird", "light", "answer", "question"]
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.executescript(SCHEMA)
        flags = np.repeat(np.array([1, 2, 4, 2, 8], np.uint8), [1, 3, 60, 3, LENGTH - 67]).tobytes()
        ids = rng.integers(0, VOCABULARY, (N_SEQUENCES, LENGTH)).astype("<i4")
        rows = ((at, at, "chat" if at % 2 else "web", None, ids[at].tobytes(), flags) for at in range(N_SEQUENCES))
        database.executemany("INSERT INTO sequences VALUES (?, ?, ?, ?, ?, ?)", rows)
        tokens = ((at, f" {words[at % 10]}{at // 10 if at > 999 else ''}") for at in range(VOCABULARY))
        database.executemany("INSERT INTO vocabulary VALUES (?, ?)", tokens)
        metadata = {"format": "2", "n_latents": str(n_latents), "activation": "v"}
        database.executemany("INSERT INTO metadata VALUES (?, ?)", metadata.items())
        insert = "INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        for first in range(0, n_latents, 1024):
            database.executemany(insert, _examples(rng, range(first, min(n_latents, first + 1024)), n_examples))
        database.commit()


def _examples(rng: np.random.Generator, latents: range, n_examples: int) -> Iterator[tuple[Any, ...]]:
    quantiles = (1.0, 0.95, 0.75, 0.5, 0.25)
    for latent in latents:
        sequences = rng.integers(0, N_SEQUENCES, n_examples).tolist()
        where = np.sort(rng.random((n_examples, LENGTH)).argpartition(ACTIVE)[:, :ACTIVE], axis=1).astype("<i4")
        values = (rng.random((n_examples, ACTIVE)) * 4).astype("<f4")
        for at, sequence in enumerate(sequences):
            top, peak = at < n_examples // 2, int(values[at].argmax())
            kind, quantile = ("top", None) if top else ("quantile", quantiles[at % 5])
            arrays = where[at].tobytes(), values[at].tobytes()
            yield latent, kind, quantile, at, sequence, int(where[at, peak]), float(values[at, peak]), *arrays


def write_run(folder: Path, n_latents: int, n_examples: int) -> Path:
    """Write the synthetic run unless it exists."""
    run = folder / f"synthetic-{n_latents}-{n_examples}"
    coder = run / "batchtopk"
    if (coder / "health.json").exists():
        return run
    coder.mkdir(parents=True, exist_ok=True)
    table = latent_table(n_latents)
    table.write_parquet(coder / "latents.parquet")
    rng, latents = np.random.default_rng(2), np.repeat(np.arange(n_latents), 5)
    near = {"latent": latents, "rank": np.tile(np.arange(5), n_latents), "neighbour": rng.integers(0, n_latents, len(latents))}
    pl.DataFrame(near).with_columns(cosine=0.5).write_parquet(coder / "neighbours.parquet")
    pl.DataFrame({
        "latent": np.repeat(np.arange(n_latents), 8), "dataset": ["web", "chat"] * (4 * n_latents), "group": "user",
        "role": None, "template_index": None, "token": None, "n_tokens": 100_000, "n_active": 500, "frequency": 0.005,
        "share": 0.125, "mean_activation": 2.0, "max_activation": 6.0,
    }, strict=False).write_parquet(coder / "activity.parquet", row_group_size=ROW_GROUP)  # fmt: skip
    (coder / "examples.sqlite").unlink(missing_ok=True)
    write_examples(coder / "examples.sqlite", n_latents, n_examples)
    heldout = {
        "n_tokens": 1_000_000, "fve": {"base": 0.87, "chat": 0.88, "total": 0.875}, "fve_interval": {}, "l0": 100.0,
        "n_dead": 0, "dead_share": 0.0, "massive": {"n_tokens": 0},
    }  # fmt: skip
    health = {
        "n_latents": n_latents, "d_model": 2304, "layer": 13, "architecture": "batchtopk", "k": 100, "heldout": heldout,
        "sources": ["base", "chat"], "training_tokens": 10_000_000, "analysed_tokens": 10_000_000, "counts": counts(table),
        "frequency_histogram": {"log10_edges": [-3.0, -2.0], "counts": [n_latents]}, "decoder_norm_movement": {},
        "controls": {},
    }  # fmt: skip
    (coder / "health.json").write_text(json.dumps(health))
    return run


@contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Run the dashboard in a process of its own; yields its port and process number."""
    command = [sys.executable, "-m", "crossdiff", "dashboard", str(run), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r":(\d+)/", process.stdout.readline())
        assert found is not None, "the server did not start"
        port = int(found[1])
        for _ in range(600):
            try:
                get(port, "/static/dashboard.css")
                break
            except OSError:
                time.sleep(0.1)
        try:
            yield port, process.pid
        finally:
            process.terminate()


def get(port: int, path: str) -> tuple[float, int]:
    """Seconds until the whole response has arrived, and its size."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == 200, (path, answer.status, body[:300])
    return time.perf_counter() - start, len(body)


def memory(pid: int) -> tuple[float, float]:
    """MB of the process's own memory now, without mapped files, and the largest resident size so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    sizes = {
        key: int(value.split()[0]) / 1024
        for key, _, value in (line.partition(":") for line in status.splitlines())
        if "kB" in value
    }
    return sizes["RssAnon"], sizes["VmHWM"]


def timed(port: int, paths: list[str]) -> str:
    times = [get(port, path)[0] * 1000 for path in paths]
    return f"median {statistics.median(times):7.1f} ms, largest {max(times):7.1f} ms ({len(paths)} requests)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latents", type=int, default=73_728)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--live", type=Path, metavar="RUN")
    args = parser.parse_args()
    start = time.perf_counter()
    run = write_run(args.folder, args.latents, args.examples)
    size = (run / "batchtopk" / "examples.sqlite").stat().st_size / 1e9
    print(
        f"{args.latents:,} latents x {args.examples} examples, database {size:.2f} GB ({time.perf_counter() - start:.0f} s)",
        flush=True,
    )
    start, coder = time.perf_counter(), f"/run/{run.name}/batchtopk"
    drawn = random.Random(0)
    with serving(run, "--no-live") as (port, pid):
        print(f"start                  {time.perf_counter() - start:.1f} s")
        print(f"first page, cold       {get(port, '/')[0] * 1000:7.1f} ms")
        print(f"crosscoder, cold       {get(port, coder)[0] * 1000:7.1f} ms")
        print(f"points.json, cold      {get(port, coder + '/points.json')[0] * 1000:7.1f} ms")
        start = time.perf_counter()
        while b"index is being built" in _body(port, coder):
            time.sleep(1)
        print(f"search index           {time.perf_counter() - start:.0f} s more", flush=True)
        print("first page            ", timed(port, ["/"] * 20))
        print("crosscoder            ", timed(port, [coder] * 20))
        print("latent                ", timed(port, [f"{coder}/latent/{drawn.randrange(args.latents)}" for _ in range(60)]))
        print("table, filtered       ", timed(port, [f"{coder}?f=delta_norm:0.{n}:&sort=nu_error" for n in range(20, 60, 2)]))
        print("search                ", timed(port, [f"{coder}?q=boat{n}" for n in range(100, 120)]))
        beginnings = ("b", "c", "s", "th", "wa", "bo", "sea", "li")
        print("search, a beginning   ", timed(port, [f"{coder}?q={text}" for text in beginnings]))
        listed = [f"{coder}/latent/{drawn.randrange(args.latents)}?sort=nu_error&dir=desc&list=1" for _ in range(20)]
        print("latent of a list      ", timed(port, listed))
        paths = [[f"{coder}/latent/{drawn.randrange(args.latents)}" for _ in range(PER_READER)] for _ in range(READERS)]
        with ThreadPoolExecutor(READERS + 1) as pool:
            found = pool.map(lambda mine: [get(port, path)[0] for path in mine], paths)
            file = pool.submit(get, port, "/static/vendor/plotly-strict.min.js")
            times = sorted(seconds for each in found for seconds in each)
        middle, late = times[len(times) // 2] * 1000, times[int(0.95 * len(times))] * 1000
        print(f"{READERS} readers of latents  median {middle:7.1f} ms, 95th percentile {late:7.1f} ms ({len(times)} requests)")
        print(f"beside them            plotly's file of {file.result()[1] / 1e6:.1f} MB in {file.result()[0] * 1000:.0f} ms")
        anonymous, highest = memory(pid)
        print(f"memory                 {anonymous:.0f} MB of its own now, {highest:.0f} MB resident at most")
    if args.live:
        time_live(args.live)


def time_live(run: Path) -> None:
    """Time different prompts of 210 words, after a first one that loads the models."""
    words = ["the", "boat", "was", "on", "cold", "sea", "and", "bird", "sat", "its", "mast", "when", "light", "went", "out"]
    with serving(run) as (port, _):
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/")
            found = re.findall(r'href="(/run/[^"/]+/[^"/]+)"', connection.getresponse().read().decode())
        times, n_tokens = [], 0
        for number in range(8):
            text = " ".join(random.Random(number).choices(words, k=210))
            start = time.perf_counter()
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
                form = urlencode({"kind": "text", "text": text, "order": "active", "action": "read"})
                headers = {"content-type": "application/x-www-form-urlencoded", "origin": f"http://127.0.0.1:{port}"}
                connection.request("POST", f"{found[0]}/live", form, headers)
                answer = connection.getresponse()
                body = answer.read().decode()
            assert answer.status == 200, body[:300]
            times.append(time.perf_counter() - start)
            n_tokens = len(set(re.findall(r"/token/(\d+)", body)))
        print(f"live, {n_tokens} tokens       first {times[0]:.2f} s including the loading of the models, then median "
              f"{statistics.median(times[1:]):.2f} s, largest {max(times[1:]):.2f} s")  # fmt: skip


def _body(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body


if __name__ == "__main__":
    main()
