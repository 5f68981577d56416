"""Parts of a latent's page that need models: the logit lens, and both models' view of an example."""

from __future__ import annotations

from dataclasses import replace

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse

from crossdiff.dashboard.site import ROOT, Site, is_partial
from crossdiff.report.cards import example_view


def add(app: FastAPI, site: Site) -> None:
    """Add the pages that need models."""

    @app.get(ROOT + "/latent/{latent}/lens")
    @site.waits
    def lens(request: Request, run: str, name: str, latent: int) -> HTMLResponse:
        coder = site.coder(run, name)
        site.row(coder, latent)
        template = "lens.html.j2" if is_partial(request) else "lens_page.html.j2"
        return site.page(template, coder=coder, latent=latent, directions=site.live.lens(coder, latent))

    @app.get(ROOT + "/latent/{latent}/sides/{number}")
    @site.waits
    def sides(request: Request, run: str, name: str, latent: int, number: int) -> HTMLResponse:
        coder = site.coder(run, name)
        record = coder.latent(site.row(coder, latent))
        if not 0 <= number < len(record.examples):
            raise HTTPException(404, f"Latent {latent} has no example {number}: it has {len(record.examples)}, counted from 0.")
        example = record.examples[number]
        found = site.live.sides(coder, latent, example.tokens.ids)
        at = example.position
        titles = coder.report.titles
        highest = float(max(1e-9, *(abs(parts).max() for parts in found.parts.values())))
        views = []
        for model, parts in found.parts.items():
            side = replace(example, tokens=example.tokens.with_activations(parts), activation=float(parts[at]))
            view = example_view(side, highest)
            views.append(view._replace(origin=f"{titles[model]} side: {parts[at]:+.2f} at the marked token"))
        template = "sides.html.j2" if is_partial(request) else "sides_page.html.j2"
        parts_at = [(titles[model], float(parts[at])) for model, parts in found.parts.items()]
        total = sum(part for _, part in parts_at) + found.bias
        return site.page(
            template,
            coder=coder,
            latent=latent,
            views=views,
            parts=parts_at,
            bias=found.bias,
            total=total,
            v=example.activation,
        )
