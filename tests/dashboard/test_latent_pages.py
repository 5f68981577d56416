"""What the pages of latents say about strength, correlated latents and pairs, with and without them in the analysis."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("fastapi")

from showing import BATCHTOPK, CONCEPTS, add_strengths, requests_to, write_run

OLD = "This analysis has no histograms and no correlated latents"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """L1 is from an older analysis, BatchTopK from a new one."""
    run = write_run(tmp_path_factory.mktemp("runs"))
    add_strengths(run / "batchtopk")
    return requests_to(run, tmp_path_factory.mktemp("cache"))


def test_a_histogram_with_its_numbers(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}/latent/3").text
    assert page.count("<rect") == 3 and "1,051 tokens with v above 0" in page and "<td>3.00 to 4.00</td><td>1</td>" in page
    assert "over 131,072 tokens" in page and re.search(r'latent/9">9</a> correlation 0.750, both active on 41 \(', page)
    assert "No histogram is stored for it." in client.get(f"{BATCHTOPK}/latent/4").text


def test_an_older_analysis_says_that_it_has_none(client: Any) -> None:
    page = client.get(f"{BATCHTOPK.replace('batchtopk', 'l1')}/latent/3").text
    assert OLD in page and "<rect" not in page
    assert "found before crossdiff kept them" in client.get(f"{CONCEPTS}/0").text


def test_a_character_of_two_tokens_is_one_piece(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}/latent/3?context=whole").text
    assert re.search(r'title="café is 2 tokens\ncaf&lt;0xC3&gt;\n[^"]*\n&lt;0xA9&gt;\n[^"]*position 13">café</span>', page)
    assert "\N{REPLACEMENT CHARACTER}" not in page


def test_the_tint_is_switched_by_a_link(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}/latent/3?whitespace=raw").text.partition('id="examples"')[2]
    link = re.search(r'href="([^"]*)#examples"[^>]*>Tint per example<', page)
    assert link and "whitespace=raw" in link[1]
    other = client.get(link[1].replace("&amp;", "&")).text.partition('id="examples"')[2]
    assert "the largest activation of the same example" in other and "Tint over all examples" in other
    # Each example's own maximum has the strongest tint: there are as many as examples.
    assert len(re.findall(r'class="t [^"]*a8[^"]*peak"', other)) == other.count('class="example"') > 1
    assert len(re.findall(r'class="t [^"]*a8[^"]*peak"', page)) < page.count('class="example"')


def test_two_latents_side_by_side(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}/latent/9/with/3").text
    assert page.count('<header class="latent">') == 2 and "correlation of activations 0.750 over 131,072 tokens" in page
    assert page.count("<rect") == 3  # only latent 3 has a histogram
    across = client.get(f"{BATCHTOPK}/latent/3/with/3?of=l1").text
    assert "BatchTopK</small>" in across and "L1</small>" in across and "correlation of activations" not in across
    chosen = client.get(f"{BATCHTOPK}/latent/3/with?number=9")
    assert (chosen.status_code, chosen.headers["location"]) == (303, f"{BATCHTOPK}/latent/3/with/9")
    assert client.get(f"{BATCHTOPK}/latent/3/with?number=99").status_code == 404
    assert client.get(f"{BATCHTOPK}/latent/3/with/5?of=nothing").status_code == 404
    assert client.get(f"{BATCHTOPK}/latent/3/with?number=x").status_code == 422


def test_matches_need_the_weights(client: Any) -> None:
    assert "/matches" not in client.get(f"{BATCHTOPK}/latent/3").text  # the synthetic run has none
    found = client.get(f"{BATCHTOPK}/latent/3/matches")
    assert found.status_code == 422 and "cannot read the decoder of" in found.text


def test_the_popover_is_served_with_the_policy(client: Any) -> None:
    script = client.get("/popover.js")
    assert script.headers["content-type"].startswith("text/javascript") and "aria-describedby" in script.text
    assert '<script src="/popover.js" defer></script>' in client.get("/").text
