"""Pages that compare latents: two side by side, and the matches of a latent in the other trainings of its run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from crossdiff.dashboard import pages
from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.editions import one_edition
from crossdiff.dashboard.site import ROOT, Site, is_partial
from crossdiff.errors import UserError
from crossdiff.latents.matches import cosine_between, matches
from crossdiff.report.wording import number
from crossdiff.sources import SOURCES

LATENT = ROOT + "/latent/{latent}"


class Matched(NamedTuple):
    """A latent of another training; `path` is its page and `beside` the page of both, if the dashboard shows the training."""

    training: str
    latent: int
    cosine: float
    path: str | None
    beside: str | None


def add(app: FastAPI, site: Site) -> None:
    """Add the pages to the application."""

    @app.get(LATENT + "/with")
    @site.in_turn
    def choose(run: str, name: str, latent: int, number: int, of: str = "") -> Response:
        coder, other = site.coder(run, name), site.coder(run, of or name)
        site.row(coder, latent)
        site.row(other, number)
        return RedirectResponse(_beside(coder, latent, other, number), 303)

    @app.get(LATENT + "/with/{other}")
    @site.in_turn
    def beside(run: str, name: str, latent: int, other: int, of: str = "") -> HTMLResponse:
        coder, second = site.coder(run, name), site.coder(run, of or name)
        rows = site.row(coder, latent), site.row(second, other)
        both = [pages.beside_page(each, row) for each, row in zip((coder, second), rows, strict=True)]
        return site.page("two_latents.html.j2", coder=coder, both=both, relation=_relation(coder, latent, second, other))

    @app.get(LATENT + "/matches")
    @site.in_turn
    def matched(request: Request, run: str, name: str, latent: int) -> HTMLResponse:
        coder = site.coder(run, name)
        site.row(coder, latent)
        template = "matches.html.j2" if is_partial(request) else "matches_page.html.j2"
        return site.page(template, coder=coder, latent=latent, found=_matches(site, coder, latent))


def _beside(coder: Coder, latent: int, other: Coder, number: int) -> str:
    """The address of two latents side by side."""
    address = f"{coder.path}/latent/{latent}/with/{number}"
    return address if other is coder else f"{address}?of={other.path.rpartition('/')[2]}"


def _matches(site: Site, coder: Coder, latent: int) -> list[Matched]:
    with _weights(coder):
        folders = sorted(path.parent for path in coder.directory.glob("*/model.safetensors"))
        found = matches(coder.folder, latent, [folder for folder in folders if folder != coder.folder])
    shown = site.catalogue.coders
    result = []
    for each in found:
        other = shown.get((coder.run, each.training))
        path = None if other is None else f"{other.path}/latent/{each.latent}"
        beside = None if other is None else _beside(coder, latent, other, each.latent)
        result.append(Matched(each.training, each.latent, each.cosine, path, beside))
    return result


@contextmanager
def _weights(coder: Coder) -> Iterator[Path]:
    """The crosscoders on disk, which must be those that the page shows."""
    with one_edition([coder.directory]) as found:
        if found != (coder.edition,):
            raise UserError(f"the results of {coder.run} were replaced after this page was opened; load it again")
        yield coder.folder


def _relation(coder: Coder, latent: int, second: Coder, other: int) -> list[str]:
    """What the run knows of two latents together, in words."""
    found = []
    if coder.has_weights and second.has_weights:
        with _weights(coder):
            for source in SOURCES:
                value = cosine_between(coder.folder, latent, second.folder, other, source)
                if value is not None:
                    found.append(f"cosine of the {source} directions {number(value)}")
    if coder is second:
        found += _correlation(coder, latent, other)
    return found


def _correlation(coder: Coder, latent: int, other: int) -> list[str]:
    database = coder.database
    for mine, theirs in ((latent, other), (other, latent)):
        for each in database.correlated(mine):
            if each.other == theirs:
                return [f"correlation of activations {number(each.correlation)} over {database.n_sampled:,} tokens"]
    return []
