"""The report in a real browser: what the first screen says, a phone's width, and figures for pointer, finger and keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="the browser tests need the package playwright")

from playwright.sync_api import Page, expect
from synthetic_run import latent_table, write_activations, write_concepts, write_crosscoder, write_look

from crossdiff.dashboard.screenshots import find_chromium
from crossdiff.report.html import write_html
from crossdiff.report.reading import read_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="the browser tests need Chromium: install the package chromium"),
]
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
FIGURE = "#scaling .canvas"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("report")
    for seed, name in enumerate(("batchtopk", "l1")):
        write_crosscoder(run / name, latent_table(seed))
    write_activations(run)
    write_concepts(run)
    write_look(run)
    path: Path = run / "report.html"
    write_html(read_run(run), path)
    return path.as_uri()


def opened(browser: Any, address: str, **settings: Any) -> Page:
    page: Page = browser.new_page(reduced_motion="reduce", **settings)
    page.goto(address)
    expect(page.locator(f"{FIGURE} .main-svg").first).to_be_visible(timeout=60_000)
    return page


@pytest.mark.parametrize("viewport", [WIDE, PHONE])
def test_the_first_screen_has_the_answer_and_a_concept(browser: Any, address: str, viewport: Any) -> None:
    page = opened(browser, address, viewport=viewport)
    first = page.locator("#concepts .fold summary").first
    box = first.bounding_box()
    assert box is not None and box["y"] + box["height"] <= viewport["height"]
    card = page.locator("#concepts .fold .card").first
    expect(card).not_to_be_visible()
    first.click()
    expect(card).to_be_visible()
    expect(card).to_contain_text("replicates")
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    page.close()


def test_nothing_is_wider_than_a_phone_even_when_all_is_unfolded(browser: Any, address: str) -> None:
    page = opened(browser, address, viewport=PHONE)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_a_link_to_a_folded_card_unfolds_it(browser: Any, address: str) -> None:
    page = opened(browser, f"{address}#concept-0", viewport=WIDE)
    expect(page.locator("#concept-0")).to_be_in_viewport()
    page.close()


def test_a_figure_says_its_marks_to_the_keyboard(browser: Any, address: str) -> None:
    page = opened(browser, address, viewport=WIDE)
    figure, tip = page.locator(FIGURE).first, page.locator(f"{FIGURE} + .token-tip").first
    figure.focus()
    page.keyboard.press("ArrowRight")
    expect(tip).to_be_visible()
    expect(tip).to_contain_text("latent ")
    first = tip.inner_text()
    assert "<br>" not in first and "nu_error" in first
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() != first
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text() == first
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().split(", ")[1] != first.split(", ")[1]  # a mark of another verdict
    page.keyboard.press("Escape")
    expect(tip).not_to_be_visible()
    page.close()


def test_a_tap_on_a_mark_says_its_values_within_the_phones_screen(browser: Any, address: str) -> None:
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True, reduced_motion="reduce")
    page = context.new_page()
    page.goto(address)
    mark = page.locator(f"{FIGURE} .point").last
    mark.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    box = mark.bounding_box()
    assert box is not None
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shown = page.locator(".canvas + .token-tip:not([hidden])")
    expect(shown).to_contain_text("latent ")
    place = shown.bounding_box()
    assert place is not None and place["x"] >= 0 and place["x"] + place["width"] <= 390
    context.close()


def test_the_meaning_of_a_measure_is_shown_to_the_keyboard(browser: Any, address: str) -> None:
    page = opened(browser, address, viewport=WIDE)
    page.locator("#health th.meaning").nth(1).focus()
    expect(page.locator("#token-tip")).to_contain_text("fraction of variance explained")
    page.keyboard.press("Escape")
    expect(page.locator("#token-tip")).not_to_be_visible()
    page.close()


def test_points_stand_out_in_the_dark(browser: Any, address: str) -> None:
    page = opened(browser, address, viewport=WIDE, color_scheme="dark")
    found = page.locator(f"{FIGURE} .scatterlayer path.point")
    assert set(found.evaluate_all("points => points.map(point => getComputedStyle(point).opacity)")) == {"0.85"}
    page.close()
