"""Notes in a real browser: by keyboard, changed elsewhere, without scripts, in a narrow window; and cards in frames."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright", reason="the browser tests need the package playwright")

from playwright.sync_api import Page, expect
from showing import BATCHTOPK, CONCEPTS, DANGER, watched, write_run

from crossdiff.dashboard.screenshots import find_chromium
from crossdiff.dashboard.serve import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="the browser tests need Chromium: install the package chromium"),
]
PATIENCE = 30_000


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A page of another origin: its folder and address."""
    folder = tmp_path / "other"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def address(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: tuple[Path, str]) -> Iterator[str]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    with serving([run], tmp_path / "cache", live=False) as found:
        yield found


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    with watched(browser, "http://127.0.0.1:", PATIENCE, "status of 4") as opened:
        yield opened


def test_a_note_by_the_keyboard_alone(page: Page, address: str) -> None:
    page.goto(f"{address}{BATCHTOPK}/latent/3")
    page.keyboard.press("s")
    expect(page.locator("[data-star]")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("[data-star]")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#my-note summary").first).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("[name=label]")).to_be_focused()
    page.keyboard.type("says hello, s and j")
    page.keyboard.press("Tab")
    page.keyboard.type(f"one\n{DANGER}")
    page.keyboard.press("Tab")
    page.keyboard.type("to check")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".my-label")).to_have_text("says hello, s and j")
    expect(page.locator(".my-comment").first).to_have_text(f"one\n{DANGER}")
    expect(page.locator("#my-note .chip")).to_have_text("to check")
    page.reload()
    expect(page.locator(".my-label")).to_have_text("says hello, s and j")
    page.keyboard.press("s")
    expect(page.locator("[data-star]")).to_have_attribute("aria-pressed", "false")


def test_s_stars_the_current_row_and_the_list_has_it(page: Page, address: str) -> None:
    page.goto(f"{address}{BATCHTOPK}?sort=latent")
    page.keyboard.press("s")  # no row is current yet
    expect(page.locator(".latents .star")).to_have_count(0)
    for key in ("j", "j", "s"):
        page.keyboard.press(key)
    expect(page.locator("tr.current .star")).to_have_text("★")
    expect(page.locator("#state")).to_have_text("Starred.")
    page.keyboard.press("k")
    page.keyboard.press("s")
    expect(page.locator(".latents .star")).to_have_count(2)
    page.reload()
    expect(page.locator(".latents .star")).to_have_count(2)
    page.get_by_role("link", name="★ starred").click()
    expect(page.locator("#table .chips b")).to_have_text("2 latents")
    assert "noted=starred" in page.url
    for key in ("j", "s"):
        page.keyboard.press(key)
    expect(page.locator("tr.current .star")).to_have_count(0)
    page.goto(f"{address}{CONCEPTS}")
    for key in ("j", "s"):
        page.keyboard.press(key)
    expect(page.locator("tr.current .star")).to_have_text("★")


def test_a_comment_that_was_changed_elsewhere(page: Page, browser: Any, address: str) -> None:
    second = browser.new_page()
    for opened in (page, second):
        opened.goto(f"{address}{CONCEPTS}/1")
        opened.locator("#my-note summary").first.click()
    second.fill("[name=comment]", "what the other wrote")
    second.keyboard.press("Control+Enter")
    expect(second.locator(".my-comment").first).to_have_text("what the other wrote")
    page.fill("[name=comment]", "what I wrote")
    page.fill("[name=label]", "mine")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#my-note .problem")).to_contain_text("changed elsewhere")
    expect(page.locator(".theirs")).to_contain_text("what the other wrote")
    expect(page.locator("[name=comment]")).to_have_value("what I wrote")
    expect(page.locator("[name=comment]")).to_be_focused()
    expect(page.locator(".my-label")).to_have_text("mine")  # nobody else had changed it
    page.fill("[name=comment]", "what both wrote")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".my-comment").first).to_have_text("what both wrote")
    page.locator("#my-note summary").first.click()
    page.get_by_text("Earlier texts (1)").click()
    expect(page.locator(".earlier")).to_contain_text("what the other wrote")
    second.close()


def test_notes_without_scripts(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}{BATCHTOPK}/latent/3?sort=latent&dir=asc&list=1")
    page.locator("[data-star]").click()
    assert "sort=latent" in page.url and page.locator("[data-star]").get_attribute("aria-pressed") == "true"
    assert "4 of 60" in page.locator(".steps").inner_text()
    page.locator("#my-note summary").first.click()
    page.fill("[name=label]", "greets")
    page.fill("[name=new_list]", "to check")
    page.locator("#my-note button.main").click()
    assert page.locator(".my-label").inner_text() == "greets"
    page.goto(f"{address}/notes")
    exported = page.request.get(f"{address}/notes.json").text()
    page.fill("[name=notes]", exported)
    page.locator("form button.main").click()
    assert "0 new values were merged" in page.locator("main").inner_text()
    context.close()


def test_a_file_of_notes_is_read_into_the_form(page: Page, address: str, tmp_path: Path) -> None:
    page.goto(f"{address}/notes")
    entry = {
        "kind": "latent",
        "of": "a" * 32,
        "number": 1,
        "fields": {"label": [{"value": "x", "time": "2026-01-01T00:00:00Z"}]},
    }
    file = tmp_path / "notes.json"
    file.write_text(json.dumps({"format": "crossdiff notes 1", "notes": [entry]}))
    page.set_input_files("[type=file]", file)
    expect(page.locator("#exchange")).to_have_value(file.read_text())
    page.keyboard.press("Tab")
    page.locator("form button.main").click()
    expect(page.locator("main")).to_contain_text("1 new value was merged")
    expect(page.locator("main")).to_contain_text("1 more notes, about results that are not open here")


def test_a_narrow_window_does_not_scroll_sideways(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(f"{address}{BATCHTOPK}/latent/3")
    page.locator("#my-note summary").first.click()
    page.fill("[name=label]", "x" * 200)
    page.fill("[name=comment]", "y" * 500)
    page.fill("[name=new_list]", "z" * 60)
    page.locator("#my-note button.main").click()
    expect(page.locator(".my-label")).to_have_text("x" * 200)
    for path in (
        f"{BATCHTOPK}/latent/3",
        BATCHTOPK,
        f"{BATCHTOPK}?noted=any",
        "/notes",
        "/api",
        "/embed/a-b-1/batchtopk/latent/3",
    ):
        page.goto(address + path)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    page.close()


def framed(browser: Any, folder: Path, origin: str, address: str) -> tuple[str, list[str]]:
    """The text that a frame with the card shows in a page of another origin, and what the browser says."""
    (folder / "index.html").write_text(
        f'<iframe width="600" height="500" src="{address}/embed/a-b-1/batchtopk/latent/3"></iframe>'
    )
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"{origin}/index.html")
    page.wait_for_load_state("networkidle")
    text = page.frames[1].locator("body").inner_text(timeout=2000) if page.frames[1].url.startswith("http") else ""
    page.close()
    return text, said


def test_a_card_in_a_frame_of_another_origin(
    browser: Any, run: Path, other: tuple[Path, str], address: str, tmp_path: Path
) -> None:
    folder, origin = other
    text, said = framed(browser, folder, origin, address)
    assert "Latent 3" not in text and any("frame-ancestors" in line for line in said)
    with serving([run], tmp_path / "cache", live=False, embed_in=(origin,)) as open_address:
        text, said = framed(browser, folder, origin, open_address)
    assert "Latent 3" in text and not said
