"""A local server that speaks the few endpoints of the Hub that are used; the real client talks to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import yaml

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"
LARGE = 10_000
"""Files of at least so many bytes go through LFS."""


class HubServer:
    """Repositories in memory. `log` has every request as (method, path); `fail` may name requests that are answered with an
    error: a function of method and path that returns a status or None."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.cards: dict[str, dict[str, Any]] = {}
        self.log: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.fail: Any = lambda method, path: None
        self.cut_after: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        monkeypatch.setenv("HF_ENDPOINT", self.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, name: str, kind: str = "model") -> None:
        self.repositories[_key(kind, name)] = {}

    def add_folder(self, name: str, folder: Path, kind: str = "model") -> None:
        for file in folder.rglob("*"):
            if file.is_file() and "activations" not in file.parts:
                self.repositories[_key(kind, name)][str(file.relative_to(folder))] = file.read_bytes()


def _key(kind: str, name: str) -> str:
    return f"{kind.removesuffix('s')}s/{name}"


def _sha(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + hashlib.sha1(files[name]).digest())
    return digest.hexdigest()


def _blob(content: bytes) -> str:
    """The object id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
    return entry


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
            body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if not isinstance(value, bytes):
                self.send_header("Content-Type", "application/json")
            for name, text in headers.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def error(self, status: int, code: str = "", message: str = "") -> None:
            self.answer({"error": message}, status, **({"X-Error-Code": code} if code else {}), X_Error_Message=message or code)

        def handle_any(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.log.append((self.command, path))
            if status := hub.fail(self.command, path):
                # What a careless proxy might do: quote the request's secrets.
                self.error(status, message=f"refused {self.headers.get('Authorization')}")
                return
            for method, pattern, function in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    function(self, body, **found.groupdict())
                    return
            self.error(404, "EntryNotFound", f"the test server does not know {path}")

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def files(self, kind: str, name: str) -> dict[str, bytes] | None:
            """The repository's files; answers 401 as the Hub does for what is missing or hidden."""
            found = hub.repositories.get(_key(kind, name))
            if found is None or (name in hub.private and "Authorization" not in self.headers):
                self.error(401, "RepoNotFound", "Repository not found")
                return None
            return found

        def create(self, body: bytes) -> None:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.error(401, message=f"Invalid credentials {self.headers.get('Authorization')}")
                return
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            status = 409 if _key("model", name) in hub.repositories else 200
            hub.repositories.setdefault(_key("model", name), {})
            if wanted.get("private") or wanted.get("visibility") == "private":
                hub.private.add(name)
            self.answer({"url": f"{hub.url}/{name}", "id": name}, status)

        def validate(self, body: bytes) -> None:
            """The front matter of a card must be YAML with a licence."""
            head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            wrong = [] if isinstance(head.get("license"), str) else [{"message": "license must be a string"}]
            self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)

        def preupload(self, body: bytes, name: str) -> None:
            if (files := self.files("model", name)) is not None:
                modes = [
                    {
                        "path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                        "shouldIgnore": False, "oid": _blob(files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(body)["files"]
                ]  # fmt: skip
                self.answer({"files": modes})

        def batch(self, body: bytes, name: str) -> None:
            objects = []
            for wanted in json.loads(body)["objects"]:
                upload = {"actions": {"upload": {"href": f"{hub.url}/objects/{wanted['oid']}", "header": {}}}}
                objects.append(wanted | ({} if wanted["oid"] in hub.objects else upload))
            self.answer({"transfer": "basic", "objects": objects})

        def put(self, body: bytes, oid: str) -> None:
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            self.answer({})

        def commit(self, body: bytes, name: str) -> None:
            if (files := self.files("model", name)) is not None:
                for line in body.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        files[value["path"]] = hub.objects[value["oid"]]
                self.answer({"commitUrl": f"{hub.url}/{name}/commit/x", "commitOid": _sha(files), "success": True})

        def information(self, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
            if (files := self.files(kind, name)) is not None:
                siblings = [{"rfilename": file} for file in sorted(files)]
                card = hub.cards.get(name)
                self.answer({"id": name, "sha": _sha(files), "siblings": siblings, "tags": [], "cardData": card})

        def tree(self, body: bytes, kind: str, name: str, revision: str) -> None:
            if (files := self.files(kind, name)) is not None:
                self.answer([_entry(path, content) for path, content in sorted(files.items())])

        def resolve(self, body: bytes, name: str, file: str, revision: str, kind: str = "model") -> None:
            if (files := self.files(kind, name)) is None:
                return
            if file not in files:
                self.error(404, "EntryNotFound", "Entry not found")
                return
            content = files[file]
            large = len(content) >= LARGE
            tag = hashlib.sha256(content).hexdigest() if large else _blob(content)
            headers = {"ETag": f'"{tag}"', "X_Repo_Commit": _sha(files), "Accept_Ranges": "bytes"}
            start, status = 0, 200
            if asked := self.headers.get("Range"):
                hub.ranges.append(asked)
                start, status = int(re.match(r"bytes=(\d+)-", asked)[1]), 206  # type: ignore[index]
                headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if self.command == "GET" and hub.cut_after is not None and large:
                cut, hub.cut_after = hub.cut_after, None
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content[:cut])
                self.close_connection = True
                return
            self.answer(content[start:], status, **headers)

        def dataset_file(self, body: bytes, name: str, file: str, revision: str) -> None:
            self.resolve(body, name, file, revision, kind="dataset")

    name, kind = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<kind>models|datasets)"
    revision = r"(?P<revision>\w+)"
    ROUTES = [
        ("POST", "/api/repos/create", Handler.create),
        ("POST", "/api/validate-yaml", Handler.validate),
        ("POST", f"/api/models/{name}/preupload/main", Handler.preupload),
        ("POST", f"/{name}.git/info/lfs/objects/batch", Handler.batch),
        ("PUT", r"/objects/(?P<oid>\w+)", Handler.put),
        ("POST", f"/api/models/{name}/commit/main", Handler.commit),
        ("GET", f"/api/{kind}/{name}(/revision/{revision})?", Handler.information),
        ("GET", f"/api/{kind}/{name}/tree/{revision}", Handler.tree),
        *((method, f"/{name}/resolve/{revision}/(?P<file>.+)", Handler.resolve) for method in ("GET", "HEAD")),
        *((m, f"/datasets/{name}/resolve/{revision}/(?P<file>.+)", Handler.dataset_file) for m in ("GET", "HEAD")),
    ]
    return Handler
