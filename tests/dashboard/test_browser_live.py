"""Live prompts in a real browser: Back, reload, sharing, an answer that is stopped, steering, keyboard, phone, no scripts."""

from __future__ import annotations

import re
import shutil
import time
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
from crossdiff.dashboard import live as live_module
from crossdiff.dashboard.screenshots import find_chromium
from crossdiff.dashboard.serve import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="the browser tests need Chromium: install the package chromium"),
]
PATIENCE = 40_000
LIVE = "/run/run/batchtopk/live"
PHONE = {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, analysed_run: Path) -> Path:
    folder = shutil.copytree(analysed_run, tmp_path_factory.mktemp("browser") / "run")
    forget_digests(folder)
    write_links(folder / "batchtopk", latent=0, twin=1, neighbour=2)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def address(run: Path, cache: Path) -> Iterator[str]:
    with serving([run], cache) as found:
        yield found


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    with watched(browser, address, PATIENCE) as opened:
        yield opened


@pytest.fixture(scope="module")
def latents(run: Path) -> list[int]:
    """The two latents that are active most often."""
    table = pl.read_parquet(run / "batchtopk" / "latents.parquet")
    return [int(latent) for latent in table.sort("n_active")["latent"].to_list()[:-3:-1]]


def settled(page: Page) -> None:
    """Wait until the links and buttons of what was put into the page work."""
    busy = ".htmx-request, .htmx-swapping, .htmx-settling, .htmx-added, form.settling"
    expect(page.locator(busy)).to_have_count(0)


def ask(page: Page, address: str, action: str, text: str = "hi the sea is cold", length: int = 8) -> None:
    """Ask, and wait until the result is under its own address."""
    if not page.url.startswith(address + LIVE):
        page.goto(address + LIVE)
    page.locator("textarea[name=content]").last.fill(text)
    page.check("[name=order][value=active]")
    page.fill("[name=length]", str(length))
    before = page.url
    page.locator(f"button[value={action}]").last.click()
    page.wait_for_url(lambda url: "/live/" in url and url != before)
    expect(page.locator(".strip a").first).to_be_visible()
    settled(page)


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that take a tenth of a second per token, so that a reader can stop them."""
    real = live_module.Live.answer

    def answer(self: Any, coder: Any, text: Any, wanted: Any, n: int, hear: Any = lambda number, name, text: True) -> Any:
        def slow(number: int, name: str, words: str) -> bool:
            time.sleep(0.1)
            return bool(hear(number, name, words))

        return real(self, coder, text, wanted, n, slow)

    monkeypatch.setattr(live_module.Live, "answer", answer)


def test_back_and_reload_show_the_text_again(page: Page, address: str) -> None:
    ask(page, address, "read")
    first, strip = page.url, page.locator(".strip").inner_text()
    page.get_by_role("link", name="Latent", exact=False).locator("visible=true").last.click()
    page.wait_for_selector("#examples")
    page.go_back()
    expect(page.locator(".strip")).to_have_text(strip, use_inner_text=True)
    assert page.url == first and page.input_value("textarea[name=content]") == "hi the sea is cold"
    page.reload()
    expect(page.locator(".strip")).to_have_text(strip, use_inner_text=True)
    ask(page, address, "read", "go on")
    assert page.url != first
    page.go_back()
    expect(page.locator(".strip")).to_have_text(strip, use_inner_text=True)


def test_a_shared_address_works_in_another_browser_and_after_a_restart(
    page: Page, browser: Any, address: str, run: Path, cache: Path
) -> None:
    ask(page, address, "answer-both")
    path = page.url.removeprefix(address)
    answers = page.locator(".answer-text").all_inner_texts()
    assert len(answers) == 2
    with serving([run], cache, live=False) as later:  # has no models
        other = browser.new_context(java_script_enabled=False).new_page()
        other.goto(later + path)
        assert other.locator(".answer-text").all_inner_texts() == answers
        other.locator(".answer-text a").first.click()
        assert other.locator("#token tbody tr").count() > 0
        other.get_by_role("link", name="Back to the text").click()
        assert other.url == later + path
        other.context.close()


@pytest.mark.usefixtures("slowly")
def test_an_answer_is_stopped_and_read(page: Page, address: str) -> None:
    page.goto(address + LIVE)
    page.fill("textarea[name=content]", "hi the sea is cold")
    page.fill("[name=length]", "100")
    page.click("button[value=answer-both]")
    written = page.locator(".being-written").first
    expect(written).not_to_be_empty()
    expect(page.get_by_role("button", name="Compare both")).to_be_disabled()
    expect(page.locator("#result h3")).to_have_text("base model")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_url(lambda url: "/live/" in url)
    expect(page.locator("#result article", has_text="Stopped by you")).to_have_count(1)
    assert 0 < page.locator(".answer-text a").count() < 100
    expect(page.get_by_role("button", name="Compare both")).to_be_enabled()


def test_several_turns(page: Page, address: str) -> None:
    ask(page, address, "answer-chat")
    assert page.locator("textarea[name=content]").count() == 3
    ask(page, address, "answer-chat", "go on")
    assert page.locator("textarea[name=content]").count() == 5
    assert page.locator("[name=role]").evaluate_all("all => all.map(each => each.value)") == [
        "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    page.go_back()
    expect(page.locator("textarea[name=content]")).to_have_count(3)


def test_one_question_goes_to_every_model_and_a_problem_wipes_nothing(page: Page, address: str, latents: list[int]) -> None:
    ask(page, address, "answer-chat")
    before = page.url
    page.click("button[value=answer-base]")
    page.wait_for_url(lambda url: url != before)
    expect(page.locator(".answers h3")).to_have_text("base model")
    assert page.locator("textarea[name=content]").count() == 3
    page.fill("[name=steer]", "9999")
    page.click("button[value=steer]")
    expect(page.get_by_role("alert")).to_contain_text("there is no latent 9999")
    assert page.locator(".answers h3").all_inner_texts() == ["base model"] and page.locator(".strip a").count() > 0
    page.fill("[name=steer]", str(latents[0]))
    page.locator("textarea[name=content]").first.fill("x" * 9000)
    page.click("button.main")
    expect(page.get_by_role("alert")).to_contain_text("the text has")
    assert page.locator(".answers h3").all_inner_texts() == ["base model"]


def test_the_focus_moves_to_the_next_message(page: Page, address: str) -> None:
    page.goto(address + LIVE)
    page.fill("textarea[name=content]", "hi")
    page.fill("[name=length]", "3")

    def press(action: str) -> None:
        before = page.url
        page.locator(f"button[value={action}]").last.click()
        page.wait_for_url(lambda url: url != before)
        expect(page.locator(".answer-text").first).to_be_visible()
        settled(page)
        expect(page.locator("textarea[name=content]").last).to_be_focused()

    press("answer-chat")
    assert page.locator("textarea[name=content]").count() == 3
    page.keyboard.type("go")
    press("answer-base")
    assert page.locator("textarea[name=content]").count() == 5
    page.keyboard.type("on")
    page.locator("textarea[name=content]").nth(2).focus()
    before = page.url
    page.keyboard.press("Control+Enter")
    page.wait_for_url(lambda url: url != before)
    expect(page.locator("textarea[name=content]").nth(2)).to_be_focused()


def test_the_second_click_of_a_double_click_does_nothing(page: Page, address: str) -> None:
    page.goto(address + LIVE)
    page.fill("textarea[name=content]", "hi the sea is cold")
    page.fill("[name=length]", "8")
    page.evaluate("""document.addEventListener("htmx:afterSettle", event => {
        const button = event.target.querySelector("button[value=remove]"), box = button?.getBoundingClientRect();
        if (button) document.documentElement.dataset.hit = document.elementFromPoint(box.x + 5, box.y + 5) === button;
    })""")
    page.locator("button[value=answer-chat]").last.click()
    expect(page.locator("textarea[name=content]")).to_have_count(3)
    expect(page.locator("html")).to_have_attribute("data-hit", "false")  # no button takes a click at first
    expect(page.locator("form.settling")).to_have_count(0)
    page.locator("button[value=remove]").last.click()
    expect(page.locator("textarea[name=content]")).to_have_count(1)


def test_continuing_with_an_answer_leads_to_the_new_message(page: Page, address: str) -> None:
    ask(page, address, "answer-both")
    page.get_by_role("link", name="Continue with this answer").first.click()
    expect(page.locator("textarea[name=content]").nth(2)).to_be_focused()


def test_steering_with_several_latents_and_the_slider(page: Page, address: str, latents: list[int]) -> None:
    page.goto(address + LIVE)
    page.fill("[name=steer]", f"{latents[0]}, {latents[1]}:0.5")
    slider = page.get_by_role("slider", name="Strength")
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.input_value("[name=strength]") == "3"
    page.fill("[name=strength]", "20")
    assert slider.input_value() == "20"
    ask(page, address, "steer")
    plain, steered = page.locator(".answer-text").all_inner_texts()
    assert plain != steered
    named = f"chat model, added: latents {latents[0]} at strength 20, {latents[1]} at strength 10"
    expect(page.locator(".answers h3").last).to_have_text(named)
    page.locator(".answers article").last.locator(".strip a").first.click()
    expect(page.locator("#token h3")).to_contain_text("written by the chat model, added")
    expect(page.locator("#token tbody tr .sign").first).to_be_visible()


def test_tokens_by_keyboard(page: Page, address: str) -> None:
    ask(page, address, "read")
    page.locator(".strip a").nth(2).focus()
    expect(page.locator("#token-tip")).to_contain_text(re.compile("latents? active"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#token h3")).to_contain_text("Token 3")
    expect(page.locator(".strip a[aria-current]")).to_have_count(1)
    page.get_by_role("link", name="next token").press("Enter")
    expect(page.locator("#token h3")).to_contain_text("Token 4")
    expect(page.locator(".strip a[aria-current]")).to_have_attribute("href", re.compile("/token/4$"))


def test_a_phone_shows_everything_without_scrolling_sideways(page: Page, address: str, latents: list[int]) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.goto(address + LIVE)
    page.fill("[name=steer]", f"{latents[0]}, {latents[1]}:0.5")
    ask(page, address, "steer", length=40)
    page.locator(".answer-text a").nth(1).click()
    expect(page.locator("#token h3")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_problems_leave_what_was_typed(page: Page, address: str, latents: list[int]) -> None:
    page.goto(address + LIVE)
    page.fill("textarea[name=content]", "hi <b>there</b>")
    page.fill("[name=steer]", "9999")
    page.click("button[value=steer]")
    expect(page.get_by_role("alert")).to_contain_text("there is no latent 9999")
    assert page.input_value("textarea[name=content]") == "hi <b>there</b>"
    page.fill("[name=steer]", str(latents[0]))
    page.fill("[name=strength]", "20")
    ask(page, address, "steer", "hi <b>there</b>")
    assert page.locator("#result b", has_text="there").count() == 0


def test_without_scripts_an_answer_comes_at_once(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    ask(page, address, "answer-chat")
    here = page.url
    assert page.locator(".answer-text a").count() > 0
    assert not page.get_by_role("slider").is_visible()
    page.reload()
    assert page.url == here and page.locator(".answer-text a").count() > 0
    context.close()


def test_a_server_that_goes_away_leaves_what_was_typed(browser: Any, run: Path, tmp_path: Path) -> None:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    with serving([run], tmp_path) as found:
        page.goto(found + LIVE)
        page.fill("textarea[name=content]", "hi there")
    page.click("button[value=answer-chat]")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    assert page.input_value("textarea[name=content]") == "hi there"
    expect(page.locator("button[value=answer-chat]")).to_be_enabled()
    page.close()
