"""The report is made from a small synthetic run directory in the documented formats; no model takes part."""

import html
import io
import json
import math
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects
import polars as pl
import pytest
from rich.console import Console
from synthetic_run import (
    DANGER,
    N_LATENTS,
    N_SPECIFIC,
    health_record,
    latent_table,
    write_activations,
    write_crosscoder,
)

from crossdiff.errors import UserError
from crossdiff.report import wording
from crossdiff.report.examples import Example, Tokens, context_of, visible
from crossdiff.report.figures import delta_norm_histogram, scaling_scatter
from crossdiff.report.html import render_html, write_html
from crossdiff.report.plotly_figures import for_page, plotly_script
from crossdiff.report.reading import read_run
from crossdiff.report.records import RunReport
from crossdiff.report.terminal import print_summary
from crossdiff.statistics import Estimate


class Page(HTMLParser):
    """Elements with their attributes, the page's visible text, and which elements are left open."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.stack: list[str] = []
        self.feed(page.replace(plotly_script(), ""))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not set(self.stack) & {"script", "style"}:
            self.text += data

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an L1 and a BatchTopK crosscoder, for tests that only read."""
    directory = tmp_path_factory.mktemp("finished")
    write_crosscoder(directory / "l1", latent_table(1, n_specific=2))
    write_crosscoder(directory / "batchtopk", latent_table(0))
    write_activations(directory)
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def report(finished: Path) -> RunReport:
    return read_run(finished)


@pytest.fixture(scope="module")
def rendered(report: RunReport) -> str:
    return render_html(report)


@pytest.fixture(scope="module")
def page(rendered: str) -> Page:
    return Page(rendered)


def summary(report: RunReport, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_summary(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_reads_every_file(report: RunReport) -> None:
    assert (report.base, report.chat, report.layer, report.n_tokens) == ("demo/base", "demo/<chat>", 4, 412_000)
    assert [coder.title for coder in report.crosscoders] == ["L1", "BatchTopK"]
    coder = report.primary
    assert coder.name == "batchtopk" and coder.latents.height == N_LATENTS
    assert coder.health.heldout.fve_interval["chat"] == (0.88, 0.9)
    # Without a finite interval the value stands alone.
    assert (wording.fve(coder, "chat"), wording.fve(coder, "total")) == ("0.888 [0.880, 0.900]", "0.900")
    assert [(share.dataset, share.split, share.n_tokens) for share in report.datasets] == [
        ("conversations", "train", 30), ("prose", "heldout", 20), ("prose", "train", 100),
    ]  # fmt: skip
    first = coder.top.latents[0]
    # 4 top examples, then the quantiles 0.5, 0.375, 0.25 of ranks 4 to 6.
    assert [example.quantile for example in first.examples] == [None] * 4 + [0.5, 0.375, 0.25]
    assert first.examples[0].tokens[8].text == DANGER and first.examples[0].tokens[8].activation == 4
    assert math.isnan(report.crosscoders[0].latents["nu_error"][12])


def test_specific_latents_are_ranked_by_rank_sum(report: RunReport) -> None:
    top = report.primary.top
    assert [latent.latent for latent in top.latents] == list(range(N_SPECIFIC)) and top.n_specific == N_SPECIFIC


def test_few_specific_latents_are_filled_up_and_the_page_says_so(run: Path) -> None:
    table = latent_table(1, n_specific=2).with_columns(
        pl.when(pl.col("latent") == 40).then(0.61).otherwise("delta_norm").alias("delta_norm")
    )
    table.write_parquet(run / "batchtopk" / "latents.parquet")
    (run / "batchtopk" / "health.json").write_text(json.dumps(health_record("batchtopk", table)))
    report = read_run(run)
    # 2 specific; of the others only latent 40 has both nu defined and delta_norm >= 0.6.
    assert [latent.latent for latent in report.primary.top.latents] == [0, 1, 40]
    assert wording.selection(report.primary).startswith(
        "Only 2 latents are chat-specific. They are followed by the nearest candidates"
    )


def test_page_is_well_formed_and_asks_no_host(rendered: str, page: Page) -> None:
    library = plotly_script()
    assert page.stack == []
    assert rendered.count(library) == 1
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    assert not re.search(r"@import|url\(", rendered.replace(library, ""))
    policy = [meta["content"] or "" for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'") and "http" not in policy[0]
    anchors = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(anchors)) == len(anchors)
    assert {(a["href"] or "")[1:] for a in page.of("a")} <= set(anchors)


def test_danger_in_tokens_and_names_is_only_text(rendered: str, page: Page) -> None:
    scripts = page.of("script")
    # One JSON per figure (histogram, scatter, frequencies, behaviours; twice), the library, the page's own script.
    assert len(scripts) == 2 * 4 + 2
    assert DANGER not in rendered and html.escape(DANGER) in rendered
    assert "What demo/<chat> has that demo/base lacks" in page.text


def test_figures_json_survives_the_script_element(rendered: str) -> None:
    bodies = re.findall(r'<script type="application/json">(.*?)</script>', rendered, re.DOTALL)
    assert len(bodies) == 8
    for body in bodies:
        assert "<" not in body
        # Plotly's own validation: an unknown key or a value of the wrong kind raises.
        plotly.graph_objects.Figure(json.loads(body))


def test_tokens_show_turns_activations_and_whitespace(rendered: str, page: Page) -> None:
    peaks = page.with_class("peak")
    assert peaks and all(re.search(r"\ba\d\b", peak["class"] or "") for peak in peaks)
    assert (
        next(peak["title"] for peak in peaks if "a8" in (peak["class"] or "") and "title" in peak)
        == f"{DANGER}\nvalue 4.00 · token id 8 · position 8"
    )
    assert len(page.with_class("template")) > 10 and page.with_class("bos")
    assert len(page.with_class("speaker")) > 10
    # A content line break is a sign and a break; a template's is only a sign; escape codes are spelt out.
    assert re.search(r">↵</span><br>", rendered)
    assert re.search(r'class="t template[^"]*" title="[^"]*">↵</span><span', rendered)
    assert "[U+001B][31m" in page.text and "\x1b" not in rendered


def test_context_is_trimmed_around_the_maximum() -> None:
    vocabulary = {number: str(number) for number in range(200)}
    tokens = Tokens(np.arange(200, dtype=np.int32), np.zeros(200, np.uint8), np.zeros(200, np.float32), vocabulary)

    def around(position: int) -> tuple[str, str, int, bool, bool]:
        context = context_of(Example("top", None, "prose", None, 0, position, 1.0, tokens))
        assert len(context.tokens) == 41 and context.tokens[context.peak].text == str(position)
        return context.tokens[0].text, context.tokens[-1].text, context.peak, context.cut_before, context.cut_after

    # 26 before, 14 after; at an end the room goes to the other side.
    assert around(100) == ("74", "114", 26, True, True)
    assert around(3) == ("0", "40", 3, False, True)
    assert around(199) == ("159", "199", 40, True, False)


def test_invisible_text_becomes_visible() -> None:
    assert visible(" the") == " the" and visible("  ") == "␣␣" and visible("") == "∅"
    assert visible("a\r\nb\t") == "a↵b⇥" and visible("\u202eevil") == "[U+202E]evil" and visible("\ud800") == "[U+D800]"


def test_answer_counts(report: RunReport) -> None:
    answer = " ".join(wording.answer(report))
    assert "Of the 60 latents of the BatchTopK crosscoder, 7 are specific to the chat model by latent scaling" in answer
    assert "(delta_norm of 0.9 or above) would have named 7, of which 7 also pass latent scaling." in answer
    assert "In the L1 crosscoder, delta_norm alone names 2 of 60 latents and latent scaling 2." in answer
    # identity: 0.91 - 0.55; small talk only 0.06 above, refusal below.
    assert "For 1 of 3 labelled behaviours (identity), the best" in answer and "by at least 0.1 AUROC" in answer


def test_behaviours_are_worded_honestly(report: RunReport) -> None:
    by_name = {result.behaviour: wording.judgement(result) for result in report.primary.behaviours}
    assert by_name["identity"].startswith("Ahead of the shared pool by 0.36.")
    assert "The words of the prompt predict it at least as well (0.99)." in by_name["identity"]
    assert by_name["refusal"].startswith("Fails: the specific pool does not beat the shared pool (0.57 against 0.60).")
    assert "The interval includes chance (0.5)." in by_name["refusal"]
    assert by_name["small_talk"] == "No clear gain: 0.06 above the shared pool."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.0123"), (31.62, "31.6"), (12345.6, "12,300"), (9.999, "10.0"), (0.0, "0"),
        (-0.25, "\N{MINUS SIGN}0.250"), (2e-7, "2.00e\N{MINUS SIGN}7"), (math.nan, "undefined"), (None, "undefined"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert wording.number(value) == text


def test_intervals_and_shares() -> None:
    assert wording.interval(Estimate(0.8613, 0.7901, 0.9249)) == "0.86 [0.79, 0.92]"
    assert (
        wording.interval(Estimate(0.5, math.nan, math.nan)) == "0.50"
        and wording.interval(Estimate(math.nan, 0.0, 1.0)) == "undefined"
    )
    assert wording.interval(Estimate(-0.001, -0.1, 0.2)) == "0.00 [\N{MINUS SIGN}0.10, 0.20]"
    assert [wording.share(x) for x in (0.0, 0.00001, 0.00312, 0.0501, 0.42)] == [
        "0%",
        "< 0.01%",
        "0.31%",
        "5.0%",
        "42%",
    ]


def test_scatter_clips_and_says_what_it_leaves_out(report: RunReport) -> None:
    figure = scaling_scatter(report.primary)
    found = json.loads(for_page(figure).json)
    xs = [x for trace in found["data"] for x in trace["x"]]
    # 60 less 3 undecided and 3 dead, all without nu; latent 20's nu_error of 7.5 stands at the edge.
    assert len(xs) == 54 and max(xs) == 1.5
    assert "are drawn at the edge (1 latent)." in figure.note and "6 latents with an undefined nu" in figure.note
    hover = next(text for trace in found["data"] for text in trace["text"] if text.startswith("latent 20,"))
    assert "nu_error 7.50 [7.45, 7.55]" in hover
    # 1 is the shared latents' nu without bias; with bias it is 2 lower, and below -0.1 in all 54.
    nus = [
        re.search(rf"nu_reconstruction \({which} bias\) (\N{{MINUS SIGN}}?)([\d.]+) \[", hover) for which in ("without", "with")
    ]
    without, with_bias = (float(found[2]) * (-1 if found[1] else 1) for found in nus if found)
    assert without == pytest.approx(1, abs=0.15) and with_bias == pytest.approx(without - 2, abs=0.011)
    below = "below \N{MINUS SIGN}0.1 for 0 latents, nu_reconstruction (with bias) for 54: there the base model has the chat"
    assert f"nu_reconstruction (without bias) is {below} direction" in figure.note
    assert (figure.x.title, figure.y.title) == ("nu_error", "nu_reconstruction (without bias)")
    assert len({trace["marker"]["symbol"] for trace in found["data"]}) == len(found["data"]) == 3


def test_histogram_holds_every_latent_once(report: RunReport) -> None:
    coder = report.primary
    found = delta_norm_histogram(coder, 40)
    counts = {series.name: int(sum(series.y)) for series in found.series}
    assert counts == {"active": 57, "dead": 3}
    assert sorted(rule.at for rule in found.rules) == [0.1, 0.4, 0.6, 0.9]


def test_names_say_which_nu_they_mean() -> None:
    assert wording.words("best_half_nu_reconstruction_unfiltered") == "best half nu reconstruction (with bias) unfiltered"
    assert wording.words("median_nu_reconstruction_nobias") == "median nu reconstruction (without bias)"
    assert wording.words("base_reconstruction") == "base reconstruction"


def test_terminal_summary(report: RunReport) -> None:
    text = summary(report)
    measures = text[: text.index("FVE: fraction")].splitlines()[4:]
    rows = {line[:27].strip(): line[27:].split()[-1] for line in measures if line.strip()}
    expected = {
        "FVE base": "0.912",
        "FVE chat": "0.888",
        "L0": "31.6",
        "never active on held-out": "5.0%",
        "chat-specific": "7",
        "rotated": "4",
    }
    assert {name: rows[name] for name in expected} == expected
    assert re.search(r"identity +0\.91 .*\n +\[0\.83, 0\.97\]", text) and "\N{MINUS SIGN}0." in text
    # The most specific latents with the nu that ranks them, which is between 0 and 0.2; with bias it is below -1.7.
    shown = re.findall(r"^ *(\d+) +chat-specific +(\S+) +(\S+) ", text, re.MULTILINE)
    found = {int(latent): value.replace("\N{MINUS SIGN}", "-") for latent, _, value in shown}
    nus = dict(report.primary.latents.select("latent", "nu_reconstruction_nobias").iter_rows())
    assert len(found) == 5 and found == {latent: f"{nus[latent]:.2f}" for latent in found}
    assert re.search(r"struction.*\n.*without", text)
    # Nothing is cut off, however narrow the terminal.
    assert "\N{HORIZONTAL ELLIPSIS}" not in summary(report, width=80)
    assert "\x1b" not in text and "«" in text and text.rstrip().endswith("report.html")


@pytest.mark.parametrize("names", [("batchtopk",), ("l1", "batchtopk", "topk-wide")])
def test_one_or_three_crosscoders_without_behaviours(tmp_path: Path, names: tuple[str, ...]) -> None:
    for seed, name in enumerate(names):
        write_crosscoder(tmp_path / name, latent_table(seed), behaviours=False)
    report = read_run(tmp_path)
    page = Page(render_html(report))
    assert [coder.name for coder in report.crosscoders] == list(names)
    assert "was not compared with labelled behaviours" in page.text
    assert "#behaviours" not in {a["href"] for a in page.of("a")}
    assert "What the chat model has that its base lacks" in page.text
    assert "BatchTopK" in summary(report)


def test_no_specific_latent_and_a_dead_crosscoder(tmp_path: Path) -> None:
    write_crosscoder(tmp_path / "l1", latent_table(0, dead_only=True), behaviours=False)
    write_crosscoder(tmp_path / "batchtopk", latent_table(0, n_specific=0))
    report = read_run(tmp_path)
    text = Page(render_html(report)).text
    assert "none is specific to the chat model" in text and "(delta_norm of 0.9 or above) would have named none" in text
    assert report.crosscoders[0].top.latents == () and "so none is shown" in text
    assert "100% of the L1 latents are never active on the held-out tokens." in text
    assert "so none is shown" in summary(read_run(tmp_path, ["l1"]))
    assert "Every latent is dead" in Page(render_html(read_run(tmp_path, ["l1"]))).text


def test_answers_beyond_max_length_are_a_caveat(run: Path) -> None:
    path = run / "activations" / "manifest.json"
    manifest = json.loads(path.read_text())
    for lost, is_said in ((52, False), (53, True)):  # of 1,000 + lost: 4.9% and 5.03%
        manifest["texts"] = [{"name": "talks", "n_assistant": 1000, "assistant_lost": lost}, {"name": "prose"}]
        path.write_text(json.dumps(manifest))
        text = Page(render_html(read_run(run))).text
        assert ("5.0% of the assistant's tokens of talks were beyond harvest.max_length" in text) == is_said
        assert "tokens of prose were beyond" not in text


def test_old_results_are_left_out_and_the_page_is_replaced_whole(run: Path) -> None:
    shutil.copytree(run / "l1", run / "old" / "l1")
    (run / "topk").mkdir()
    (run / "topk" / "model.safetensors").write_bytes(b"")
    report, path = read_run(run), run / "report.html"
    assert [coder.name for coder in report.crosscoders] == ["l1", "batchtopk"] and report.not_analysed == ("topk",)
    path.write_text("old")
    write_html(report, path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "topk is trained but not analysed" in text
    assert not list(run.glob("*.partial"))


def _shorten_flags(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "examples.sqlite")) as database:
        database.execute("UPDATE sequences SET flags = x'00'")
        database.commit()


def _drop_column(folder: Path) -> None:
    pl.read_parquet(folder / "latents.parquet").drop("nu_error").write_parquet(folder / "latents.parquet")


def _drop_paper_rank(folder: Path) -> None:
    """A table of an earlier version, whose verdicts rest on the nu with bias."""
    pl.read_parquet(folder / "latents.parquet").drop("rank_sum_paper").write_parquet(folder / "latents.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "health.json").write_text("{"), "health.json is damaged"),
        (lambda folder: (folder / "health.json").write_text('{"n_latents": 3}'), "d_model: Field required"),
        (lambda folder: (folder / "health.json").unlink(), "health.json: No such file"),
        (lambda folder: (folder / "examples.sqlite").write_bytes(b"not a database" * 100), "cannot be read"),
        (lambda folder: (folder / "examples.sqlite").unlink(), "examples.sqlite is missing"),
        (lambda folder: (folder / "latents.parquet").write_bytes(b"PAR1"), "cannot be read as Parquet"),
        (_shorten_flags, "24 tokens, 1 flags"),
        (_drop_column, "lacks the columns nu_error"),
        (_drop_paper_rank, "lacks the columns rank_sum_paper; run `crossdiff analyze` again with this version"),
    ],
)
def test_damage_is_named(run: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(run / "batchtopk")
    with pytest.raises(UserError, match=re.escape(message)):
        read_run(run)


def test_missing_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory at .*nowhere; run `crossdiff run` first"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no crosscoder folder with a latents"):
        read_run(tmp_path)


def test_torch_stays_out() -> None:
    modules = ", ".join(f"crossdiff.report.{name}" for name in ("html", "terminal", "print_figures"))
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
