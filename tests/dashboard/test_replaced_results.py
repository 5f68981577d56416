"""Results that are replaced while the dashboard shows them: no page mixes them, and readers are told."""

from __future__ import annotations

import re
import shutil
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

pytest.importorskip("fastapi")

from showing import ADDRESS, BATCHTOPK, requests_to, write_run

from crossdiff.dashboard import site
from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.editions import BeingReplaced
from crossdiff.dashboard.kept import Kept
from crossdiff.dashboard.live import Live
from crossdiff.dashboard.live_actions import Done, Lost, keep, recall
from crossdiff.dashboard.live_form import Form
from crossdiff.dashboard.readings import Part
from crossdiff.dashboard.serve import serving
from crossdiff.errors import UserError
from crossdiff.files import read_json, write_json
from crossdiff.interp.explanation_table import FILE, SCHEMA
from crossdiff.run import Run, Stage
from report.synthetic_run import latent_table, write_crosscoder

LIVE, LATENT = f"{BATCHTOPK}/live", f"{BATCHTOPK}/latent/3"
NOTICE = re.compile(
    r"The results of this run were replaced at \d\d:\d\d on \d+ [A-Z][a-z]+ \d{4}\. This page shows the new ones\."
)


def write_results(folder: Path, edition: str) -> None:
    """Results of a crosscoder that all say which edition they are: an explanation, a dataset, and numbers of neighbours."""
    write_crosscoder(folder, latent_table(0))
    row = {"latent": 3, "explanation": f"said in {edition}", "explainer": "model", "crosscoder": folder.name}
    pl.DataFrame([row], schema=SCHEMA).write_parquet(folder / FILE)
    where = {"dataset": f"data-{edition}", "group": "plain", "role": None, "template_index": None, "token": None}
    counts = {"n_tokens": 100, "n_active": 10, "frequency": 0.1, "share": 1.0, "mean_activation": 1.0, "max_activation": 2.0}
    pl.DataFrame([{"latent": latent, **where, **counts} for latent in range(60)]).write_parquet(folder / "activity.parquet")


def replace(directory: Path, edition: str) -> None:
    """Results of another edition, swapped in as every stage does it. The old ones are deleted, as `crossdiff clean` does it."""
    run = Run.open(directory)
    try:
        with run.working(Stage("analyze/batchtopk", edition, ("batchtopk",))) as folder:
            write_results(folder / "batchtopk", edition)
            (folder / "batchtopk" / "model.safetensors").touch()
    finally:
        run.close()
    shutil.rmtree(directory / "old")


def editions_in(page: str) -> set[str]:
    return set(re.findall(r"(?:said in|data-)\W*(first|second|third)", page))


@pytest.fixture
def changing(tmp_path: Path) -> Path:
    directory = write_run(tmp_path)
    replace(directory, "first")
    return directory


def test_replaced_results_are_shown_with_a_notice(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    before = client.get(LATENT).text
    assert editions_in(before) == {"first"} and not NOTICE.search(before)
    replace(changing, "second")
    for path in (LATENT, BATCHTOPK, "/", "/nothing"):
        assert NOTICE.search(client.get(path).text), path
    assert editions_in(client.get(LATENT).text) == {"second"}


def test_a_notice_ends_after_an_hour_without_scripts(changing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = requests_to(changing, tmp_path / "cache")
    replace(changing, "second")
    assert '<noscript><p class="problem">' in client.get(LATENT).text
    monkeypatch.setattr(site, "NOTICE_HOURS", 0)
    later = client.get(LATENT).text
    assert '<noscript><p class="problem">' not in later and re.search(r"<p [^>]*hidden data-notice=", later)


def test_a_report_replaces_no_results(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    manifest = read_json(changing / "manifest.json")
    manifest["stages"]["report"] = {"fingerprint": "x"}
    write_json(changing / "manifest.json", manifest)
    assert not NOTICE.search(client.get("/").text)


def test_a_page_under_way_keeps_its_results(changing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page stops between the latent's row and its examples and activity, and the results are replaced and deleted."""
    client = requests_to(changing, tmp_path / "cache")
    arrived, go_on, real = threading.Event(), threading.Event(), Coder.latent

    def waiting(*arguments: Any, **options: Any) -> Any:
        arrived.set()
        assert go_on.wait(20)
        return real(*arguments, **options)

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patched:
        patched.setattr(Coder, "latent", waiting)
        page = pool.submit(client.get, LATENT)
        try:
            assert arrived.wait(20)
            replace(changing, "second")
        finally:
            go_on.set()
        answer = page.result()
    assert answer.status_code == 200 and editions_in(answer.text) == {"first"} and "data-first" in answer.text
    assert "No examples are stored" not in answer.text
    assert editions_in(client.get(LATENT).text) == {"second"}


def test_no_page_mixes_results_while_they_are_replaced(changing: Path, tmp_path: Path) -> None:
    with serving([changing], tmp_path / "cache", live=False) as address, ThreadPoolExecutor(4) as pool:
        stop = threading.Event()

        def read() -> list[set[str]]:
            found = []
            while not stop.is_set():
                with urllib.request.urlopen(address + LATENT, timeout=30) as answer:
                    found.append(editions_in(answer.read().decode()))
            return found

        readers = [pool.submit(read) for _ in range(3)]
        try:
            for edition in ("second", "third", "first", "second", "third"):
                replace(changing, edition)
                time.sleep(0.1)
        finally:
            stop.set()
        pages = [page for reader in readers for page in reader.result()]
    assert {len(page) for page in pages} == {1} and len(pages) > 5


def test_a_swap_that_was_killed_leaves_the_old_results_on_show(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    manifest = read_json(changing / "manifest.json")
    manifest["stages"]["analyze/batchtopk"]["fingerprint"] = "second"
    write_json(changing / "manifest.json", manifest | {"swap": [["work/new/batchtopk", "batchtopk"]]})
    (changing / "batchtopk").rename(changing / "gone")
    page = client.get(LATENT)
    assert page.status_code == 200 and editions_in(page.text) == {"first"} and "data-first" in page.text
    assert client.get(f"{BATCHTOPK}?q=data").status_code in (200, 422) and not NOTICE.search(page.text)
    with pytest.raises(BeingReplaced, match="are being replaced; try again in a moment"):
        Catalogue([changing])


def test_results_that_are_gone_are_named(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    manifest = read_json(changing / "manifest.json")
    del manifest["stages"]["analyze/batchtopk"]
    write_json(changing / "manifest.json", manifest)
    (changing / "batchtopk" / "latents.parquet").unlink()
    answer = client.get(LATENT)
    assert answer.status_code == 404 and f"{changing.name[0]}" in answer.text
    assert "batchtopk has been trained, but has no results yet. Run `crossdiff analyze" in answer.text
    assert client.get("/run/a-b-1/l1").status_code == 200
    del manifest["stages"]["train/l1"]
    write_json(changing / "manifest.json", manifest)
    (changing / "l1" / "latents.parquet").unlink()
    answer = client.get("/")
    assert answer.status_code == 422 and "run `crossdiff analyze` first" in answer.text
    shutil.rmtree(changing)
    answer = client.get(LATENT)
    assert answer.status_code == 422 and "there is no run directory" in answer.text
    assert client.get("/static/dashboard.js").status_code == 200


def test_a_part_for_a_page_of_replaced_results_is_refused(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    told = re.search(r"""<body hx-headers='{"crossdiff-edition": "([^"]+)"}'>""", client.get(BATCHTOPK).text)
    assert told is not None
    own = {"crossdiff-edition": told[1], "hx-request": "true", "origin": ADDRESS}
    assert client.get(BATCHTOPK, headers=own).status_code == 200
    replace(changing, "second")
    for path in (BATCHTOPK, f"{BATCHTOPK}/points.json"):
        answer = client.get(path, headers=own)
        assert answer.status_code == 409 and "Reload the page" in answer.text and "<html" not in answer.text
    answer = client.post(LIVE, data={"action": "add"}, headers=own)
    assert (answer.status_code, answer.headers["hx-retarget"]) == (409, "#problem")
    assert client.get(BATCHTOPK, headers={"hx-request": "true"}).status_code == 200


def test_models_read_with_the_crosscoder_of_the_page(tmp_path: Path, analysed_run: Path) -> None:
    directory = shutil.copytree(analysed_run, tmp_path / "run")
    old, live = Catalogue([directory]).coders["run", "batchtopk"], Live()
    reading = live.read(old, "hi the sea is cold")
    kept = Kept(tmp_path / "kept")
    key = keep(kept, old, Done(Form(kind="text", text="hi the sea is cold"), "read", (Part(reading),)))
    assert recall(kept, old, key).parts[0].reading.texts == reading.texts
    manifest = read_json(directory / "manifest.json")
    manifest["stages"]["analyze/batchtopk"]["fingerprint"] = "another"
    write_json(directory / "manifest.json", manifest)
    assert (live.read(old, "hi the sea is cold").v == reading.v).all()  # it is held
    with pytest.raises(UserError, match="were replaced after this page was opened; load it again"):
        Live().read(old, "hi the sea is cold")
    new = Catalogue([directory]).coders["run", "batchtopk"]
    assert recall(kept, old, key).form.text == "hi the sea is cold"
    with pytest.raises(Lost, match="were replaced since this text was read") as lost:
        recall(kept, new, key)
    assert (lost.value.form.text, lost.value.status) == ("hi the sea is cold", 409)
    pair = live._diff(old).pair
    assert live.read(new, "hi the sea is cold").texts == reading.texts
    assert live._diff(new).pair is pair  # only the crosscoder was loaded again
    with pytest.raises(UserError, match="load it again"):
        live.read(old, "hi the sea is cold")
