"""Lists in a real browser: going through one, the keys, what a point is about, marked fields, states, and a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright", reason="the browser tests need the package playwright")

from playwright.sync_api import Page, expect
from showing import watched

from conftest import forget_digests
from crossdiff.dashboard.screenshots import find_chromium
from crossdiff.dashboard.serve import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="the browser tests need Chromium: install the package chromium"),
]
PATIENCE = 90_000
CODER = "/run/run/batchtopk"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, analysed_run: Path) -> Path:
    folder = shutil.copytree(analysed_run, tmp_path_factory.mktemp("browser") / "run")
    forget_digests(folder)
    (folder / "batchtopk" / "promoted.parquet").unlink()  # as in runs of earlier versions: the models read the directions
    return folder


@pytest.fixture(scope="module")
def address(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving([run], tmp_path_factory.mktemp("cache")) as found:
        yield found


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    with watched(browser, address, PATIENCE, "status of 4") as opened:
        yield opened


def shown(page: Page) -> list[int]:
    """The latents of the table in their order."""
    links = page.locator("#table tbody tr[data-href] td:first-child a").all_inner_texts()
    return [int(text) for text in links]


def latent(page: Page) -> int:
    found = re.search(r"/latent/(\d+)", page.url)
    assert found is not None
    return int(found[1])


def test_through_a_sorted_list_with_the_keyboard_alone(page: Page, address: str) -> None:
    page.goto(f"{address}{CODER}?sort=max_activation&dir=desc")
    page.wait_for_load_state("networkidle")
    order = shown(page)
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("#examples")
    page.wait_for_load_state("networkidle")
    assert latent(page) == order[1] and order[2] != order[1] + 1
    page.keyboard.press("j")
    page.wait_for_url(f"**/latent/{order[2]}?*")
    page.wait_for_load_state("networkidle")
    expect(page.locator(".steps")).to_contain_text(f"3 of {64} in this list")
    page.keyboard.press("k")
    page.wait_for_url(f"**/latent/{order[1]}?*")
    page.wait_for_load_state("networkidle")
    page.keyboard.press("u")
    page.wait_for_url(lambda url: "/latent/" not in url)
    page.wait_for_load_state("networkidle")
    assert shown(page) == order
    page.keyboard.press("h")
    page.wait_for_url(f"{address}/")


def test_escape_closes_one_thing_after_the_other(page: Page, address: str) -> None:
    page.goto(f"{address}{CODER}")
    page.wait_for_load_state("networkidle")
    page.locator("details.columns summary").click()
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    expect(page.locator("details.columns")).to_have_attribute("open", "")
    page.keyboard.press("Escape")
    expect(page.locator("details.columns")).not_to_have_attribute("open", "")
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") != "search"


def test_control_and_enter_submit_the_form_of_the_field(page: Page, address: str) -> None:
    page.goto(f"{address}{CODER}/live")
    page.wait_for_load_state("networkidle")
    page.fill("textarea[name=content]", "the sea")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".strip")


def test_a_field_that_is_no_number_is_marked_and_the_table_stays(page: Page, address: str) -> None:
    page.goto(f"{address}{CODER}")
    page.wait_for_load_state("networkidle")
    before = shown(page)
    page.select_option("[name=column]", "delta_norm")
    page.fill("[name=min]", "a half")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("[aria-invalid=true]")).to_have_attribute("name", "min")
    expect(page.get_by_role("alert")).to_contain_text("'a half' is not a finite number")
    assert shown(page) == before and page.evaluate("document.activeElement.name") == "min"
    assert "a+half" not in page.url
    page.keyboard.press("Control+a")
    page.keyboard.type("0.5")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chip.on")
    expect(page.locator("[aria-invalid=true]")).to_have_count(0)


def test_a_point_says_what_it_is_about(page: Page, address: str) -> None:
    page.goto(f"{address}{CODER}")
    page.wait_for_selector(".cloud[data-drawn]")
    # The event that plotly sends when the pointer comes to rest on a point.
    page.evaluate(
        "document.querySelector('.cloud').emit('plotly_hover',"
        " { points: [{ customdata: 3 }], event: { clientX: 300, clientY: 300 } })"
    )
    box = page.locator(".brief-box")
    expect(box).to_be_visible()
    expect(box).to_contain_text("Latent 3")
    expect(box.locator(".peak")).to_have_count(1)
    page.evaluate("document.querySelector('.cloud').emit('plotly_unhover', {})")
    expect(box).to_be_hidden()


def test_a_slow_action_says_what_it_does(page: Page, address: str) -> None:
    page.goto(f"{address}{CODER}/latent/3")
    page.wait_for_load_state("networkidle")
    waiting: list[Any] = []
    page.route("**/lens", lambda route: waiting.append(route))
    page.get_by_role("link", name="Show the tokens that its directions promote").click()
    expect(page.locator("#state")).to_contain_text("The models read the latent's directions")
    expect(page.locator("#state")).to_contain_text("1 s")
    waiting[0].continue_()
    expect(page.locator("table.lens")).to_be_visible()
    expect(page.locator("#state")).to_have_text("")


def test_a_phone_gets_short_cards_and_pages_by_number(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800}, has_touch=True)
    page.goto(address + CODER)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.documentElement.scrollHeight") < 9000
    expect(page.locator("#table td.minor").first).to_be_hidden()
    first = shown(page)
    page.locator(".pages").get_by_label("Page 2").tap()
    expect(page.locator(".pages [aria-current=page]")).to_have_text("2")
    assert len(shown(page)) == 25 and not set(shown(page)) & set(first) and "page=2" in page.url
    page.close()


def test_a_list_without_scripts(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}{CODER}?sort=max_activation&dir=desc")
    order = shown(page)
    page.locator("#table tbody a").first.click()
    page.locator("a[rel=next]").click()
    assert latent(page) == order[1] and "2 of 64 in this list" in page.locator(".steps").inner_text()
    page.goto(f"{address}{CODER}?column=delta_norm&min=x")
    assert page.locator("[aria-invalid=true]").count() == 1 and len(shown(page)) == 25
    context.close()
