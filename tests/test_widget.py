"""The widget of a run, and the view of a run: in Python, in a notebook's kernel, and in a real browser without Jupyter."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crossdiff
from crossdiff.dashboard.screenshots import find_chromium, launch
from crossdiff.errors import UserError
from crossdiff.report.templating import scoped_style
from crossdiff.text_activations import Known
from opened import write_run

TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("widget") / "run", tiny_pair, tiny_texts)


@pytest.fixture(scope="module")
def run(run_path: Path) -> crossdiff.Diff:
    return crossdiff.open(run_path)


@pytest.fixture(scope="module")
def explorer(run: crossdiff.Diff) -> Any:
    pytest.importorskip("anywidget")
    return run.widget("hi", measure=lambda activations: activations.values.max(1) - 1)


def test_a_run_shows_its_answer_its_health_and_what_to_call_next(run: crossdiff.Diff) -> None:
    page = run._repr_html_()
    for part in ("The chat model has 2 concepts", "FVE, chat", "L0, active latents", "run.concept(0)", "run.widget()"):
        assert part in page
    assert page.count('class="fold"') == 2  # the two concepts that only the chat model has
    assert 'class="example"' not in page  # they would be most of the notebook's size
    assert "run.look" not in page and "<script>alert(1)</script>" not in page and "\n\n" not in page
    assert page.count("<div") == page.count("</div>")


def test_a_run_that_is_not_analysed_says_what_is_missing(run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "l1").mkdir()
    shutil.copy(run_path / "config.yaml", tmp_path)
    shutil.copy(run_path / "l1" / "model.safetensors", tmp_path / "l1")
    shutil.copy(run_path / "l1" / "config.json", tmp_path / "l1")
    page = crossdiff.open(tmp_path)._repr_html_()
    assert "Not known yet" in page and "crossdiff analyze" in page


def test_views_follow_the_notebooks_theme_before_the_systems() -> None:
    style = scoped_style()
    assert ":root" not in style
    system = style.index("@media (prefers-color-scheme: dark) { :scope {")
    assert system < style.index('[data-jp-theme-light="true"]') < style.index('[data-jp-theme-light="false"]')
    for name, page in (("light", "#fcfcfb"), ("dark", "#16181b")):
        (line,) = (line for line in style.split("}") if f".vscode-{name}," in line)
        assert f"--page: {page}" in line and f"color-scheme: {name}" in line


def test_activations_say_how_strong_they_are_and_what_the_latents_are(run: crossdiff.Diff) -> None:
    found = run.activations(TALK, latents=[3, 40])
    assert found.verdicts[0] == "chat_specific"
    page = found._repr_html_()
    assert "latent 3 · chat-specific" in page and "of the decoder norms" in page
    known = Known(largest=8.0)
    assert known.strength(2.0) == "strongest here 2.00, 25% of its largest on the analysed text"
    assert known.strength(8.001) == "strongest here 8.00, as strong as on the analysed text"
    assert known.strength(9.0) == "strongest here 9.00, above the 8.00 of the analysed text"
    assert Known().strength(2.0) == "strongest here 2.00"


def test_the_widget_has_what_activations_has(run: crossdiff.Diff, explorer: Any) -> None:
    reading = explorer.reading
    expected = run.activations(TALK, latents=range(60))
    values = np.zeros_like(expected.values)
    values[reading["token"], reading["latent"]] = reading["v"]
    np.testing.assert_allclose(values, expected.values, atol=1e-4)
    assert reading["texts"][2:4] == ["h", "i"] and len(reading["pieces"]) == len(reading["ids"]) == len(expected.tokens)
    assert reading["measure"] == pytest.approx((expected.values.max(1) - 1).tolist())
    assert explorer.prompt == "hi" and explorer.error == ""
    by_token: dict[int, list[float]] = {}
    for token, v in zip(reading["token"], reading["v"], strict=True):
        by_token.setdefault(token, []).append(v)
    assert all(of == sorted(of, reverse=True) for of in by_token.values())


def test_concepts_are_offered_with_their_latents(run: crossdiff.Diff, explorer: Any) -> None:
    own = run._concepts.of_latents(run.name)
    assert {latent: each["number"] for each in explorer.choices for latent in each["members"]} == own
    assert explorer.choices[0]["verdict"] == "chat-specific" and explorer.choices[0]["name"]


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (
            lambda activations: activations.values[:, :2],
            r"array of shape \(6, 2\); expected one finite number per token, an array",
        ),
        (lambda activations: [0.0, 0.0, float("nan"), 0.0, 0.0, 0.0], r"the measure is nan on token 2, 'h'; expected"),
        (lambda activations: ["a"] * 6, r"the measure returned \['a'"),
        (lambda activations: 1 / 0, "the measure raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_measure_that_is_not_one_number_per_token_is_refused(run: crossdiff.Diff, measure: Any, message: str) -> None:
    pytest.importorskip("anywidget")
    with pytest.raises(UserError, match=message):
        run.widget("hi", measure=measure)


def test_a_bad_prompt_is_said_in_the_widget_each_time(run: crossdiff.Diff) -> None:
    pytest.importorskip("anywidget")
    widget, changes = run.widget(), list[str]()
    widget.observe(lambda change: changes.append(change["new"]), "error")
    for _ in range(2):
        widget._asked(widget, {"prompt": "", "asks": False}, [])
    assert len([each for each in changes if "the text is empty" in each]) == 2 and widget.reading == {}
    widget._asked(widget, {"prompt": "sea", "asks": False}, [])
    assert widget.error == "" and widget.reading["texts"][1:] == ["s", "e", "a"]


def test_without_anywidget_the_message_says_what_to_install(run: crossdiff.Diff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "crossdiff.notebook.widget", raising=False)
    with pytest.raises(UserError, match=r"needs the package anywidget; run `pip install 'crossdiff\[notebook\]'`"):
        run.widget()


@pytest.mark.slow
def test_a_notebook_executes_the_views_and_the_widget(run_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("anywidget")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = (
        f"import crossdiff\nrun = crossdiff.open({str(run_path)!r})\nrun",
        "run.widget('hi', measure=lambda a: a.values.sum(1))",
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    first, second = (cell.outputs[-1]["data"] for cell in notebook.cells)
    assert "run.widget()" in first["text/html"] and first["text/plain"].startswith("<Diff of ")
    assert second["application/vnd.jupyter.widget-view+json"]["model_id"]
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    (state,) = (each["state"] for each in states if "reading" in each["state"])
    assert len(state["reading"]["measure"]) == 6 and "function render" in state["_esm"]


HARNESS = """<!doctype html><meta charset="utf-8"><style>%s</style><body data-jp-theme-light="%s"><div id="here"></div>
<script type="module">
import widget from "./widget.js";
const state = %s, listeners = {};
window.sent = [];
window.change = (key, value) => { state[key] = value; for (const each of listeners[`change:${key}`] || []) each(); };
const model = {
  get: key => state[key], send: message => window.sent.push(message),
  on: (name, each) => (listeners[name] ||= []).push(each), off: () => {},
};
widget.render({ model, el: document.getElementById("here") });
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, explorer: Any) -> Iterator[Any]:
    """The widget's page with a model that stands in for Jupyter's; the system is light and the notebook dark."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
    if find_chromium() is None:
        pytest.skip("the browser tests need Chromium: install the package chromium")
    folder = tmp_path_factory.mktemp("harness")
    names = ("prompt", "asks", "choices", "levels", "n_latents", "reading", "error")
    state = json.dumps({name: getattr(explorer, name) for name in names}).replace("<", "\\u003c")
    (folder / "index.html").write_text(HARNESS % (explorer._css, "false", state))
    shutil.copy(Path(crossdiff.__file__).parent / "notebook" / "widget.js", folder)
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        opened = browser.new_page(viewport={"width": 900, "height": 800}, color_scheme="light")
        problems: list[str] = []
        opened.on("pageerror", lambda error: problems.append(str(error)))

        def answer(route: Any) -> None:  # modules are not loaded from files
            name = route.request.url.rsplit("/", 1)[-1] or "index.html"
            kind = "text/javascript" if name.endswith(".js") else "text/html"
            route.fulfill(body=(folder / name).read_text(), content_type=kind)

        opened.route("http://widget.test/*", answer)
        opened.goto("http://widget.test/index.html")
        opened.wait_for_selector(".context .t")
        yield opened
        assert not problems
        browser.close()


@pytest.mark.slow
def test_in_a_browser_tokens_list_their_latents(page: Any, explorer: Any) -> None:
    reading = explorer.reading
    place = reading["token"][0]
    own = [i for i, token in enumerate(reading["token"]) if token == place]
    page.locator(f'.context .t[data-first="{place}"]').click()
    rows = page.locator(".latents tbody tr")
    assert rows.count() == len(own)
    latent = reading["latent"][own[0]]
    first = rows.first.inner_text()
    assert first.startswith(f"latent {latent}") and reading["latents"][str(latent)]["verdict"] in first
    rows.first.get_by_role("button").click()
    assert page.locator("select").input_value() == f"latent {latent}"
    assert page.locator(".context .peak").count() >= 1


@pytest.mark.slow
def test_in_a_browser_the_measure_and_a_concept_can_be_chosen(page: Any, explorer: Any) -> None:
    page.locator("select").select_option("measure")
    values = explorer.reading["measure"]
    peak = max(range(len(values)), key=lambda at: abs(values[at]))
    assert page.locator(".context .peak").first.get_attribute("data-first") == str(values.index(values[peak]))
    number = explorer.choices[0]["number"]
    page.locator("select").select_option(f"concept {number}")
    assert "the sum of its latents here" in page.locator("#here > .note").nth(1).inner_text()


@pytest.mark.slow
def test_in_a_browser_the_keyboard_moves_and_asks(page: Any) -> None:
    page.locator(".context .t").nth(1).click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator(".context .chosen").get_attribute("data-first") == "2"
    assert "«h»" in page.locator(".latents .note").inner_text()
    page.locator("textarea").fill("sea")
    page.locator("textarea").press("Control+Enter")
    assert page.evaluate("window.sent") == [{"prompt": "sea", "asks": True}]
    assert page.get_by_role("button", name="Read").is_disabled()
    page.evaluate("window.change('error', 'the text has 61 tokens <b>')")
    assert page.get_by_role("alert").inner_text() == "the text has 61 tokens <b>"
    assert page.get_by_role("button", name="Read").is_enabled()


@pytest.mark.slow
def test_in_a_browser_the_widget_has_the_theme_of_the_notebook(page: Any) -> None:
    colour = "getComputedStyle(document.getElementById('here')).backgroundColor"
    assert page.evaluate(colour) == "rgb(22, 24, 27)"  # the system is light
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")
    assert page.evaluate(colour) == "rgb(252, 252, 251)"
    page.evaluate("delete document.body.dataset.jpThemeLight; document.body.className = 'vscode-dark'")
    assert page.evaluate(colour) == "rgb(22, 24, 27)"
    page.emulate_media(color_scheme="dark")
    page.evaluate("document.body.className = 'vscode-light'")
    assert page.evaluate(colour) == "rgb(252, 252, 251)"
    page.evaluate("document.body.className = ''")
    assert page.evaluate(colour) == "rgb(22, 24, 27)"  # nothing is known, so the system counts
