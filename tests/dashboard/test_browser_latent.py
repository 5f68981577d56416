"""The values of tokens at the keyboard, by touch and by mouse, in the dashboard, the report and an export; pairs on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright", reason="the browser tests need the package playwright")

from playwright.sync_api import Page, expect
from showing import BATCHTOPK, CONCEPTS, add_strengths, write_run

from crossdiff.cli import run_command
from crossdiff.dashboard.screenshots import find_chromium
from crossdiff.dashboard.serve import serving
from crossdiff.report.html import render_html
from crossdiff.report.reading import read_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="the browser tests need Chromium: install the package chromium"),
]
LATENT = f"{BATCHTOPK}/latent/3?context=whole"
TIP = "#token-tip"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_run(tmp_path_factory.mktemp("runs"))
    add_strengths(directory / "batchtopk")
    (directory / "config.yaml").write_text("base: demo/base\nchat: demo/<chat>\n")
    return directory


@pytest.fixture(scope="module")
def address(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving([run], tmp_path_factory.mktemp("cache")) as found:
        yield found


def opened(browser: Any, url: str, **options: Any) -> Page:
    page: Page = browser.new_page(**options)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector(f"{TIP}", state="attached")
    assert not problems
    return page


def walk_the_first_text(page: Page) -> None:
    """Tab to the first example, and along its tokens."""
    text = page.locator(".example .context").first
    assert text.locator(".t[tabindex='0']").count() == 1, "a text is one stop of the Tab key"
    text.locator(".t.peak").focus()
    expect(page.locator(TIP)).to_contain_text("value 4.00 · token id 8 · position 8")
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "token-tip"
    page.keyboard.press("ArrowRight")
    expect(page.locator(TIP)).to_contain_text("<|end|>")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator(TIP)).to_contain_text("café is 2 tokens")
    expect(page.locator(TIP)).to_contain_text("<0xA9>")
    page.keyboard.press("End")
    expect(page.locator(TIP)).to_contain_text("position 23")
    page.keyboard.press("ArrowRight")  # nothing follows
    expect(page.locator(TIP)).to_contain_text("position 23")
    page.keyboard.press("ArrowUp")
    expect(page.locator(TIP)).not_to_contain_text("position 23")
    page.keyboard.press("Home")
    expect(page.locator(TIP)).to_contain_text("<|bos|>")
    page.keyboard.press("Escape")
    expect(page.locator(TIP)).to_be_hidden()
    assert page.locator("[aria-describedby=token-tip]").count() == 0
    page.keyboard.press("ArrowRight")
    expect(page.locator(TIP)).to_be_visible()
    # The next Tab leaves the text, and coming back finds the token that was left.
    page.keyboard.press("Tab")
    assert not page.evaluate("document.querySelector('.example .context').contains(document.activeElement)")
    page.keyboard.press("Shift+Tab")
    expect(page.locator(TIP)).to_contain_text("position 1")


def test_the_keyboard_in_the_dashboard(browser: Any, address: str) -> None:
    page = opened(browser, address + LATENT)
    walk_the_first_text(page)
    page.close()


def test_the_keyboard_in_an_export(browser: Any, run: Path, tmp_path: Path) -> None:
    (run / "batchtopk" / "model.safetensors").touch()
    try:
        run_command(["export", str(run), "--crosscoder", "batchtopk", "--latents", "3", "-o", str(tmp_path / "page.html")])
    finally:
        (run / "batchtopk" / "model.safetensors").unlink()
    page = opened(browser, (tmp_path / "page.html").as_uri())
    walk_the_first_text(page)
    page.close()


def test_the_keyboard_in_the_report(browser: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(render_html(read_run(run)), encoding="utf-8")
    page = opened(browser, (tmp_path / "report.html").as_uri())
    page.locator("#batchtopk-3").evaluate(
        "card => { for (let n = card; n; n = n.parentElement) if (n.open === false) n.open = true; }"
    )
    page.locator("#batchtopk-3 .t.peak").first.focus()
    expect(page.locator(TIP)).to_contain_text("value 4.00 · token id 8 · position 8")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(TIP)).to_contain_text("position 7")
    page.close()


def test_the_mouse_shows_one_value_at_a_time(browser: Any, address: str) -> None:
    page = opened(browser, address + LATENT)
    tokens = page.locator(".example .context").first.locator(".t")
    tokens.nth(8).hover()
    expect(page.locator(TIP)).to_contain_text("token id 8 ")
    assert tokens.nth(8).get_attribute("title") is None, "the browser would show its own as well"
    tokens.nth(3).hover()
    expect(page.locator(TIP)).to_contain_text("Who")
    page.locator(TIP).hover()  # can be pointed at
    expect(page.locator(TIP)).to_be_visible()
    page.mouse.move(2, 2)
    expect(page.locator(TIP)).to_be_hidden()
    page.close()


def test_a_tap_opens_and_a_tap_elsewhere_closes(browser: Any, address: str) -> None:
    page = opened(browser, address + LATENT, viewport={"width": 390, "height": 800}, has_touch=True)
    token = page.locator(".example .context").first.locator(".t").nth(8)
    token.tap()
    expect(page.locator(TIP)).to_contain_text("value 4.00")
    box = page.locator(TIP).bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
    page.locator("#examples h2").tap()
    expect(page.locator(TIP)).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_measures_and_promoted_tokens_say_more_at_the_keyboard_and_by_touch(browser: Any, address: str) -> None:
    page = opened(browser, address + LATENT, viewport={"width": 390, "height": 800}, has_touch=True)
    measures = page.locator("dl [title], dl [data-tip]")
    measures.first.focus()
    expect(page.locator(TIP)).to_contain_text("share in what the crosscoder misses")
    page.keyboard.press("End")
    expect(page.locator(TIP)).to_contain_text("divided between the two reconstructions")
    page.goto(f"{address}{CONCEPTS}/0")
    token = page.locator(".promoted code").first
    token.tap()
    expect(page.locator(TIP)).to_contain_text("logit ")
    assert page.locator(".promoted code[tabindex='0']").count() == page.locator(".promoted [data-tips]").count() > 1
    page.close()


def test_a_change_of_the_examples_changes_the_links_around_them(browser: Any, address: str) -> None:
    page = opened(browser, f"{address}{BATCHTOPK}?sort=latent&dir=asc")
    page.locator("#table tbody a").nth(3).click()
    page.get_by_role("link", name="Tint per example").click()
    page.wait_for_url("**tint=each**")
    page.keyboard.press("j")
    page.wait_for_url("**/latent/4?**")
    expect(page.locator(".steps span")).to_contain_text("5 of ")
    expect(page.get_by_role("link", name="Tint over all examples")).to_be_visible()
    page.close()


def test_examples_that_are_swapped_in_are_one_stop_each(browser: Any, address: str) -> None:
    page = opened(browser, address + LATENT)
    page.get_by_role("link", name="Tint per example").click()
    page.wait_for_url("**tint=each**")
    texts = page.locator("#examples .context")
    expect(texts.first.locator(".t[tabindex='0']")).to_have_count(1)
    assert page.locator("#examples .t[tabindex='0']").count() == texts.count() > 1
    page.close()


def test_two_latents_are_beside_each_other_or_one_under_the_other(browser: Any, address: str) -> None:
    for width, beside in ((1280, True), (390, False)):
        page = opened(browser, f"{address}{BATCHTOPK}/latent/3/with/9", viewport={"width": width, "height": 800})
        first, second = (each.bounding_box() for each in page.locator(".beside > section").all())
        assert first is not None and second is not None
        assert (second["x"] > first["x"] + first["width"] / 2) is beside and (second["y"] > first["y"] + 100) is not beside
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()


def test_without_scripts_the_title_stays(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address + LATENT)
    assert "value 4.00" in (page.locator(".example .t.peak").first.get_attribute("title") or "")
    page.get_by_role("link", name="Tint per example").click()
    assert page.get_by_role("link", name="Tint over all examples").count() == 1
    context.close()
