"""Addresses for other programs: JSON that fits its documented schema, vectors that give the activations, cards in frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

from safetensors import safe_open
from safetensors.torch import load
from showing import BATCHTOPK, CONCEPTS, DANGER, requests_to, write_run
from test_pages import Elements

import crossdiff
from crossdiff.cli import run_command
from crossdiff.dashboard.live_form import Form
from crossdiff.dashboard.live_records import LiveRequest
from crossdiff.dashboard.records import ConceptRecord, LatentRecord
from crossdiff.errors import UserError
from opened import write_run as write_opened

LATENT, CONCEPT = f"{BATCHTOPK}/latent/3", f"{CONCEPTS}/1"
EMBEDDED = {"latent": "/embed/a-b-1/batchtopk/latent/3", "concept": "/embed/a-b-1/concept/1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def client(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return requests_to(run, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Any:
    return crossdiff.open(write_opened(tmp_path_factory.mktemp("opened") / "demo", tiny_pair, tiny_texts))


def test_the_json_of_a_latent_is_what_its_page_shows(client: Any) -> None:
    found = client.get(f"{LATENT}.json").json()
    record = LatentRecord.model_validate(found)
    assert (record.run, record.crosscoder, record.latent, record.address) == ("a-b-1", "batchtopk", 3, LATENT)
    assert record.explanation == DANGER == record.label and record.verdict == "chat_specific"
    assert record.measures["delta_norm"] == pytest.approx(0.95, abs=0.1) and record.measures["latent"] == 3
    assert record.concept == 0 and record.predicts[0].startswith("identity, AUROC 0.91")
    assert len(record.examples) == 7
    example = record.examples[0]
    assert len(example.ids) == len(example.texts) == len(example.flags) == len(example.activations) == 24
    assert example.activations[example.position] == example.activation == max(example.activations) == 4.0
    twin = LatentRecord.model_validate(client.get(f"{BATCHTOPK}/latent/0.json").json())
    assert [each.latent for each in twin.twins] == [20] and [each.latent for each in twin.neighbours] == [9]


def test_what_is_undefined_is_null(client: Any) -> None:
    text = client.get(f"{BATCHTOPK}/latent/15.json").text  # it is never active
    assert "NaN" not in text and json.loads(text)["measures"]["nu_error"] is None


def test_the_json_of_a_concept_is_what_its_page_shows(client: Any) -> None:
    record = ConceptRecord.model_validate(client.get(f"{CONCEPT}.json").json())
    assert (record.concept, record.address, record.verdict) == (1, CONCEPT, "rotated")
    assert [member.training for member in record.members] == ["l1", "batchtopk", "batchtopk-seed1", "batchtopk-seed2"]
    assert [member.address for member in record.members][1:] == [f"{BATCHTOPK}/latent/4", None, None]
    assert len(record.evidence) == 6 and record.tokens == ["I", "."] and len(record.examples) == 7
    assert [each.direction for each in record.promoted] == [
        "base direction, base model", "chat direction, chat model", "chat minus base direction, chat model",
    ]  # fmt: skip
    assert len(record.trainings) == 4 and record.activity[0].share == 1.0


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        (f"{BATCHTOPK}/latent/999.json", 404, "There is no latent 999"),
        (f"{BATCHTOPK}/latent/x.json", 422, "latent is "),
        (f"{CONCEPTS}/9.json", 404, "There is no concept 9"),
        ("/run/none/batchtopk/latent/3.json", 404, "no such run"),
        ("/nothing.json", 404, "no such page"),
    ],
)
def test_an_error_is_json_as_well(client: Any, path: str, status: int, message: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status and list(answer.json()) == ["error"] and message in answer.json()["error"]


def test_the_description_names_every_address_and_its_own_page_shows_it(client: Any) -> None:
    schema = client.get("/openapi.json").json()
    root, concepts = "/run/{run}/{name}", "/run/{run}/concepts"
    assert {(method, path) for path, methods in schema["paths"].items() for method in methods} == {
        ("get", f"{root}/latent/{{latent}}.json"), ("get", f"{concepts}/{{concept}}.json"),
        ("get", f"{root}/latent/{{latent}}/directions.safetensors"), ("get", f"{concepts}/{{concept}}/directions.safetensors"),
        ("post", f"{root}/live"), ("get", f"{root}/live/{{key}}.json"), ("get", "/notes.json"), ("post", "/notes/import"),
        ("post", f"{root}/latent/{{latent}}/notes"), ("post", f"{concepts}/{{concept}}/notes"),
    }  # fmt: skip
    page = client.get("/api")
    assert page.status_code == 200 and "http://" not in page.text and "https://" not in page.text
    tags = [tag for tag, _ in Elements(page.text).found]
    assert "style" not in tags and all("src" in each for tag, each in Elements(page.text).found if tag == "script")
    links = {each["href"] for tag, each in Elements(page.text).found if tag == "a" and each.get("href", "").startswith("#")}
    anchors = {f"#{each['id']}" for _, each in Elements(page.text).found if each.get("id")}
    assert links <= anchors | {"#main"} and "#LatentRecord" in links
    for name in ("percentiles", "n_both", "answer_from"):
        assert f"<code>{name}</code>" in page.text


def test_the_documented_fields_of_a_live_request_are_those_of_the_form() -> None:
    assert set(LiveRequest.model_fields) - {"action"} <= set(Form().as_json())
    form = Form().as_json()
    for name, field in LiveRequest.model_fields.items():
        if name not in ("action", "turns"):
            assert form[name] == field.default, name


def test_the_vectors_of_a_latent_give_its_activation(opened: Any, tmp_path: Path) -> None:
    """An independent computation in the models' own space, against the crosscoder's."""
    client, coder = requests_to(opened.path, tmp_path), opened.crosscoder
    h = torch.randn(200, 2, coder.d_model, generator=torch.Generator().manual_seed(5)) * 0.1
    v = coder.v(coder.code(coder.normalise(h)))
    active = int(v.sum(0).argmax())
    for latent in (active, 7):
        content = client.get(f"/run/demo/batchtopk/latent/{latent}/directions.safetensors").content
        file = load(content)
        pre = file["encoder_bias"] + sum(h[:, s] @ file[f"encoder.{name}"] for s, name in enumerate(("base", "chat")))
        own = pre.relu() * file["norm_sum"]
        torch.testing.assert_close(torch.where(own > coder.threshold, own, 0), v[:, latent], rtol=1e-4, atol=1e-5)
    f = coder.code(coder.normalise(h)).values
    without = f.clone()
    without[:, active] = 0
    file = load(client.get(f"/run/demo/batchtopk/latent/{active}/directions.safetensors").content)
    added = torch.stack([f[:, active, None] * file[f"decoder.{name}"] for name in ("base", "chat")], 1)
    assert added.abs().max() > 0
    parts = ((f - without) @ coder.decoder).view(-1, 2, coder.d_model) / coder.scale
    torch.testing.assert_close(parts, added, rtol=1e-4, atol=1e-6)
    path = tmp_path / "latent.safetensors"
    path.write_bytes(client.get(f"/run/demo/batchtopk/latent/{active}/directions.safetensors").content)
    with safe_open(path, framework="pt") as opened_file:
        metadata = opened_file.metadata()
    assert json.loads(metadata["sources"]) == ["base", "chat"] and metadata["latent"] == str(active)
    assert json.loads(metadata["threshold"]) == pytest.approx(coder.threshold) and "encoder_bias" in metadata["reading"]


def test_the_vectors_of_a_concept(run: Path, client: Any) -> None:
    from safetensors.torch import save_file

    assert client.get(f"{CONCEPT}/directions.safetensors").status_code == 422  # this run has none
    directions = torch.randn(2, 5, 16)
    save_file({"directions": directions}, run / "concepts" / "directions.safetensors")
    answer = client.get(f"{CONCEPT}/directions.safetensors")
    file = load(answer.content)
    assert set(file) == {"contribution.base", "contribution.chat"} and "attachment" in answer.headers["content-disposition"]
    assert torch.equal(file["contribution.base"], directions[0, 1]) and torch.equal(file["contribution.chat"], directions[1, 1])


def test_weights_that_are_missing_are_named(client: Any) -> None:
    answer = client.get(f"{LATENT}/directions.safetensors")
    assert answer.status_code == 422 and "model.safetensors" in answer.text
    assert client.get(f"{BATCHTOPK}/latent/999/directions.safetensors").status_code == 404


@pytest.mark.parametrize("kind", ["latent", "concept"])
def test_an_embedded_card_has_no_script_and_only_its_own_page_may_frame_it(client: Any, kind: str) -> None:
    answer = client.get(EMBEDDED[kind])
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "frame-ancestors 'self';" in policy and "script-src" not in policy
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    tags = {tag for tag, _ in Elements(answer.text).found}
    assert not tags & {"script", "form", "style", "iframe"} and "article" in tags and DANGER not in answer.text
    for path in ("/", LATENT, "/notes", "/embedded"):
        assert "frame-ancestors 'none'" in client.get(path).headers["content-security-policy"]


def test_other_origins_may_frame_a_card_where_they_are_named(run: Path, tmp_path: Path) -> None:
    client = requests_to(run, tmp_path, embed_in=("https://wiki.example.org", "http://localhost:8000"))
    answer = client.get(EMBEDDED["latent"])
    policy = answer.headers["content-security-policy"]
    assert "frame-ancestors 'self' https://wiki.example.org http://localhost:8000;" in policy
    assert "frame-ancestors 'none'" in client.get(LATENT).headers["content-security-policy"]
    frame = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
    assert client.get(EMBEDDED["latent"], headers=frame).status_code == 200
    script = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors", "origin": "https://wiki.example.org"}
    assert client.get(f"{LATENT}.json", headers=script).status_code == 403


@pytest.mark.parametrize("origin", ["*", "https://a.example; script-src *", "wiki.example.org", "https://a.example/path", ""])
def test_what_is_not_an_origin_is_refused(run: Path, origin: str) -> None:
    with pytest.raises(UserError, match="--embed-in"):
        run_command(["dashboard", str(run), "--port", "0", "--embed-in", origin])


def test_a_card_that_is_not_there(client: Any) -> None:
    assert client.get("/embed/a-b-1/batchtopk/latent/999").status_code == 404
    assert client.get("/embed/a-b-1/concept/99").status_code == 404
    assert client.get(EMBEDDED["latent"], headers={"host": "evil.example"}).status_code == 421
