"""Screenshots of every page in light, dark and narrow layout: `crossdiff dashboard RUN --screenshots DIR`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.concepts import Concepts
from crossdiff.dashboard.looks import RunLook
from crossdiff.dashboard.search import cache_folder
from crossdiff.dashboard.serve import serving
from crossdiff.errors import UserError
from crossdiff.latents.ranking import by_rank
from crossdiff.report.concept_wording import leading

if TYPE_CHECKING:
    from playwright.sync_api import Page, Playwright

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
"""Software rendering gives the same pictures everywhere. The sandbox does not start in containers, and only our
own pages are opened."""
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}
PROMPT = "Who are you?"
TIMEOUT = 60_000


def find_chromium() -> str | None:
    """Path of the system's Chromium; None if it is not installed."""
    return next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


def launch(playwright: Playwright) -> Any:
    """Start the system's Chromium."""
    path = find_chromium()
    if path is None:
        raise UserError(f"Chromium is not installed (looked for {', '.join(CHROMIUMS)}); install the package chromium")
    return playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))


def take(directories: Sequence[Path], folder: Path, live: bool = True) -> list[Path]:
    """Write a screenshot of each page and return their paths."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("screenshots need the package playwright; run `pip install playwright`") from None
    catalogue = Catalogue(directories)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    coders = list(catalogue)
    comparing = [coder for coder in coders if coder.table["delta_norm"].is_not_nan().any()]
    coder = (comparing or coders)[-1] if coders else None
    look = next(iter(catalogue.looks.values()), None)
    concepts = None if coder is None else catalogue.concepts.get(coder.run)
    with serving(directories, cache_folder(), live) as address, sync_playwright() as playwright:
        browser = launch(playwright)
        for scheme, size, name in (("light", WIDE, "light"), ("dark", WIDE, "dark"), ("light", NARROW, "narrow")):
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.set_default_timeout(TIMEOUT)
            for title, path in _pages(coder, concepts, look).items():
                page.goto(address + path)
                _settle(page)
                written.append(_shoot(page, folder / f"{title}-{name}.png"))
            if live and coder is not None:
                page.goto(f"{address}{coder.path}/live?latent={interesting(coder)}")
                page.fill("textarea[name=content]", PROMPT)
                page.check("[name=order][value=specific]")
                page.click("button[value=steer]")
                page.wait_for_selector(".answers .strip")
                page.locator(".strip a").last.click()
                page.wait_for_selector("#token h3")
                written.append(_shoot(page, folder / f"live-{name}.png"))
            page.close()
        browser.close()
    return written


def interesting(coder: Coder) -> int:
    """The latent that screenshots show: the most chat-specific one."""
    specific = coder.table.filter("chat_specific")
    ranked = (specific if specific.height else coder.table).sort(*by_rank(), nulls_last=True)
    return int(ranked["latent"][0])


def _pages(coder: Coder | None, concepts: Concepts | None, look: RunLook | None) -> dict[str, str]:
    of_look = {} if look is None else {"first-look": look.path, "texts-by-kl": f"{look.path}/texts"}
    if coder is None:
        return {"overview": "/", **of_look}
    of_concepts = {} if concepts is None else {"concepts": concepts.path, "concept": f"{concepts.path}/{_first(concepts)}"}
    return {
        "overview": "/",
        **of_look,
        **of_concepts,
        "crosscoder": coder.path,
        "latent": f"{coder.path}/latent/{interesting(coder)}",
        "error": f"{coder.path}/latent/999999999",
    }


def _first(concepts: Concepts) -> int:
    """The concept that screenshots show."""
    shown = leading(concepts.found)
    return shown[0].number if shown else 0


def _settle(page: Page) -> None:
    """Wait until the figures of the page are drawn."""
    page.wait_for_load_state("networkidle")
    page.wait_for_function("[...document.querySelectorAll('.cloud')].every(each => each.dataset.drawn)")


def _shoot(page: Page, path: Path) -> Path:
    page.screenshot(path=path, full_page=True)
    return path
