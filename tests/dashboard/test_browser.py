"""The dashboard in a real browser: overview, brush, row, latent, twin, live prompt, steering; and reading without scripts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright", reason="the browser tests need the package playwright")

from playwright.sync_api import Page, expect
from showing import watched, write_links

from conftest import forget_digests
from crossdiff.cli import run_command
from crossdiff.dashboard.screenshots import find_chromium
from crossdiff.dashboard.serve import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="the browser tests need Chromium: install the package chromium"),
]
PATIENCE = 90_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, analysed_run: Path) -> Path:
    folder = shutil.copytree(analysed_run, tmp_path_factory.mktemp("browser") / "run")
    forget_digests(folder)
    run_command(["look", str(folder), "--look.max_tokens", "100000"])
    write_links(folder / "batchtopk", latent=0, twin=1, neighbour=2)
    pair = pl.read_parquet(folder / "batchtopk" / "twins.parquet")
    numbers = [{"latent": number, "twin": (number + 1) % 64} for number in range(64)]
    twins = pl.concat([pair.with_columns(**{name: pl.lit(n, pl.Int64) for name, n in each.items()}) for each in numbers])
    twins.write_parquet(folder / "batchtopk" / "twins.parquet")
    return folder


@pytest.fixture(scope="module")
def address(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving([run], tmp_path_factory.mktemp("cache")) as found:
        yield found


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    with watched(browser, address, PATIENCE, "status of 4") as opened:
        yield opened


def n_latents(page: Page) -> int:
    return int(page.locator("#table .chips b").inner_text().split()[0].replace(",", ""))


def latent_of(page: Page) -> int:
    """The latent of the page's address."""
    return int(page.url.partition("?")[0].rpartition("/")[2])


def drag(page: Page, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag over a figure, from and to shares of its plotting area."""
    box = page.locator(f"{selector} .nsewdrag").first.bounding_box()
    assert box is not None
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=8)
    page.mouse.up()


def test_from_the_overview_to_a_steered_answer(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_role("link", name="Explore BatchTopK").click()
    page.wait_for_selector(".cloud[data-drawn]")
    everything = n_latents(page)

    drag(page, ".brush", (0.45, 0.5), (0.55, 0.6))
    page.wait_for_selector(".chip.on")
    assert "f=delta_norm%3A0.4" in page.url
    brushed = n_latents(page)
    assert 0 < brushed < everything
    shown = [float(text) for text in page.locator("#table td[data-label=delta_norm]").all_inner_texts()]
    assert all(0.44 <= value <= 0.56 for value in shown)
    drag(page, ".cloud", (0.01, 0.01), (0.99, 0.99))
    expect(page.locator(".chip.on")).to_have_count(1)  # to the edges is no filter; the other one stays

    page.locator("#table tbody tr").first.locator("td").nth(2).click()
    page.wait_for_selector("#examples .example")
    latent = latent_of(page)
    page.locator(".twins a").first.click()
    page.wait_for_selector("#examples")
    assert latent_of(page) in ((latent + 1) % 64, (latent - 1) % 64)
    page.go_back()
    page.wait_for_selector(f"h1:has-text('Latent {latent}')")

    page.get_by_role("link", name="Try it on a prompt").click()
    page.fill("textarea[name=content]", "hi the sea <b>is</b> cold")
    page.check("[name=order][value=active]")
    page.click("button.main")
    page.wait_for_selector(".strip a")
    page.locator(".strip a").nth(3).click()
    page.wait_for_selector("#token h3")
    page.fill("[name=strength]", "20")
    page.fill("[name=length]", "8")
    page.click("button[value=steer]")
    page.wait_for_selector(".answers .answer-text")
    plain, steered = page.locator(".answers .answer-text").all_inner_texts()
    assert plain != steered
    assert page.locator(".strip b").count() == 0


def test_keys(page: Page, address: str) -> None:
    page.goto(f"{address}/run/run/batchtopk")
    page.wait_for_selector(".cloud[data-drawn]")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.locator("h1").click()
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(page.locator("#table tbody tr").nth(1)).to_have_class("current")
    third = int(page.locator("#table tbody a").nth(2).inner_text())
    page.keyboard.press("Enter")
    page.wait_for_selector("#examples")
    page.wait_for_load_state()  # its script listens to keys from then on
    here = page.url
    page.keyboard.press("j")
    page.wait_for_url(lambda url: url != here)
    assert latent_of(page) == third


def test_sorting_and_going_back(page: Page, address: str) -> None:
    page.goto(f"{address}/run/run/batchtopk")
    page.locator("th a", has_text="frequency").click()
    expect(page.locator("th[aria-sort=ascending]")).to_contain_text("frequency")
    assert "sort=frequency" in page.url
    page.go_back()
    expect(page.locator("th[aria-sort=ascending]")).to_contain_text("rank_sum")


def test_tables_and_latents_without_scripts(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/run/run/batchtopk")
    page.select_option("[name=column]", "delta_norm")
    page.fill("[name=max]", "0.5")
    page.get_by_role("button", name="Apply").click()
    assert all(float(text) <= 0.5 for text in page.locator("#table td[data-label=delta_norm]").all_inner_texts())
    page.locator("#table tbody a").first.click()
    assert page.locator("#examples .example").count() > 0
    page.get_by_role("link", name="Whole sequences").click()
    assert page.locator("#examples .example").count() > 0
    context.close()


def test_a_narrow_window_does_not_scroll_sideways(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 380, "height": 800})
    for path in ("/", "/run/run/batchtopk", "/run/run/batchtopk/latent/3", "/run/run/batchtopk/live"):
        page.goto(address + path)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 380, path
    page.close()


def test_a_tap_on_a_token_shows_what_both_models_expect(page: Page, address: str) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{address}/run/run/look")
    expect(page.locator(".chart .main-svg").first).to_be_visible()
    page.get_by_role("link", name="Try a prompt").last.click()
    page.fill("textarea[name=content]", "the sea")
    page.click("button.main")
    token = page.locator("#result .context .t").nth(2)
    token.click()
    shown = page.locator("#token-tip").inner_text()
    assert shown.startswith("After “t”, KL ") and "chat model expects" in shown
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
