"""Addresses for other programs: JSON, directions as safetensors, cards to embed, and the page that documents them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute

from crossdiff.dashboard.concept_pages import ROOT as CONCEPTS
from crossdiff.dashboard.concept_pages import concepts_with
from crossdiff.dashboard.records import ConceptRecord, ErrorRecord, LatentRecord, concept_record, latent_record
from crossdiff.dashboard.site import DATA, ROOT, Site
from crossdiff.files import to_json
from crossdiff.sources import SOURCES

ABOUT = (
    "What the dashboard shows, for other programs. Addresses under /run/RUN/CROSSCODER are those of the pages. A number that "
    "is not defined is null. A request that fails has a status of 4xx or 503, and the field error says why."
)
ERRORS: dict[int | str, dict[str, Any]] = {  # of every address
    404: {"model": ErrorRecord, "description": "There is no such run, crosscoder, latent or concept."},
    422: {"model": ErrorRecord, "description": "A value in the address or body is wrong."},
}
SAFETENSORS = "application/octet-stream"
BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}}, "description": "A safetensors file."}
}


def add(app: FastAPI, site: Site) -> None:
    """Add the addresses. They come before the pages, whose numbers would not read `3.json`."""

    @app.get(ROOT + "/latent/{latent}.json", tags=[DATA], response_model=LatentRecord, summary="A latent")
    @site.in_turn
    def latent_json(run: str, name: str, latent: int) -> Response:
        """Everything that the page of a latent shows: measures, verdict, your note, activity, twins, tokens and examples."""
        coder = site.coder(run, name)
        return _data(latent_record(coder, site.row(coder, latent)).model_dump())

    @app.get(CONCEPTS + "/{concept}.json", tags=[DATA], response_model=ConceptRecord, summary="A concept")
    @site.in_turn
    def concept_json(run: str, concept: int) -> Response:
        """Everything that the page of a concept shows: measures, evidence, your note, its latents, tokens and examples."""
        return _data(concept_record(concepts_with(site, run, concept), concept).model_dump())

    @app.get(
        ROOT + "/latent/{latent}/directions.safetensors",
        tags=[DATA], response_class=Response, responses=BINARY, summary="The directions of a latent",
    )  # fmt: skip
    @site.in_turn
    def latent_file(run: str, name: str, latent: int) -> Response:
        """Encoder and decoder direction per model, in the models' own space. The metadata says how to use them."""
        from crossdiff.latents.direction_file import latent_directions

        coder = site.coder(run, name)
        site.row(coder, latent)
        return _file(latent_directions(coder.folder, latent), f"{coder.run}-latent-{latent}.safetensors")

    @app.get(
        CONCEPTS + "/{concept}/directions.safetensors",
        tags=[DATA], response_class=Response, responses=BINARY, summary="The mean contribution of a concept",
    )  # fmt: skip
    @site.in_turn
    def concept_file(run: str, concept: int) -> Response:
        """What a concept adds to each model's residual stream on average, in the models' own space."""
        from crossdiff.latents.direction_file import concept_directions

        found = concepts_with(site, run, concept)
        content = concept_directions(found.found.folder, concept, SOURCES)
        return _file(content, f"{found.run}-concept-{concept}.safetensors")

    @app.get("/embed/{run}/{name}/latent/{latent}")
    @site.in_turn
    def embedded_latent(run: str, name: str, latent: int) -> HTMLResponse:
        coder = site.coder(run, name)
        row = site.row(coder, latent)
        return site.page(
            "embed.html.j2", latent=coder.card(coder.latent(row)), concept=None, note=coder.notes.note(latent),
            address=f"{coder.path}/latent/{latent}", title=f"Latent {latent}, {coder.title}",
        )  # fmt: skip

    @app.get("/embed/{run}/concept/{concept}")
    @site.in_turn
    def embedded_concept(run: str, concept: int) -> HTMLResponse:
        found = concepts_with(site, run, concept)
        return site.page(
            "embed.html.j2", latent=None, concept=found.card(concept), note=found.notes.note(concept),
            address=f"{found.path}/{concept}", title=f"Concept {concept}",
        )  # fmt: skip

    @app.get("/openapi.json")
    @site.in_turn
    def schema() -> Response:
        return JSONResponse(described(app))

    @app.get("/api")
    @site.in_turn
    def api() -> HTMLResponse:
        return site.page("api.html.j2", api=described(app))


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description of the addresses for programs."""
    routes = [route for route in app.routes if isinstance(route, APIRoute) and DATA in route.tags]
    return get_openapi(title="crossdiff dashboard", version="1", description=ABOUT, routes=routes)


def _data(values: dict[str, Any]) -> Response:
    return Response(to_json(values), media_type="application/json")


def _file(content: bytes, name: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=SAFETENSORS, headers=headers)
