"""An OpenAI-compatible server that follows a script: it answers, or fails in the ways that real servers do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """A reply to one call: `text` as the model's answer, unless one of the other fields is set.

    Attributes:
        status, headers: status and headers of the response.
        body: sent unchanged, instead of the model's answer.
        seconds: delay before the response.
        cut: the connection ends in the middle of the body.
    """

    text: str | None = None
    refusal: str | None = None
    finish: str = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    seconds: float = 0.0
    cut: bool = False

    def payload(self) -> bytes:
        if self.body is not None:
            return self.body.encode()
        message = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        return json.dumps({
            "id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }).encode()  # fmt: skip


@dataclass
class Scripted:
    """A running server: its URL, the calls that it received as (headers, body), and the most at a time."""

    url: str
    calls: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    busiest: int = 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have hung up."""


@contextmanager
def scripted(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Scripted]:
    """Serve calls by `answer(body, number of the call)`."""
    server = _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    state, lock, closing = Scripted(f"http://127.0.0.1:{server.server_port}/v1"), threading.Lock(), threading.Event()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number, running = len(state.calls), running + 1
                state.calls.append((dict(self.headers), body))
                state.busiest = max(state.busiest, running)
            try:
                self.send(answer(body, number))
            finally:
                with lock:
                    running -= 1

        def send(self, reply: Reply) -> None:
            closing.wait(reply.seconds)
            payload = reply.payload()
            self.send_response(reply.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(payload)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload[: len(payload) // 2] if reply.cut else payload)

    server.RequestHandlerClass = Handler
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        closing.set()
        server.shutdown()
        server.server_close()


def unused_url() -> str:
    """The URL of a port without a server."""
    with scripted(lambda body, number: Reply()) as server:
        time.sleep(0)
    return server.url
