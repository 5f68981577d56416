"""Access control: checks of Host, Origin, token and size of every request, and a content policy on every response."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crossdiff.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 256 * 1024
"""Largest request body in bytes; prompts have a smaller limit of their own."""
TOO_LARGE = f"The request is larger than {MAX_BODY:,} bytes; shorten the text."
POLICY = "; ".join([
    "default-src 'none'",
    "script-src 'self'",
    # When Plotly starts it adds two style elements, an empty one and the rules of its maps; the hashes allow only these.
    "style-src 'self' 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' "
    "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='",
    "style-src-attr 'unsafe-inline'",  # the report's macros colour a glyph by attribute
    "img-src 'self' data: blob:",  # Plotly's buttons and downloaded pictures
    "connect-src 'self'",
    "form-action 'self'",
    "frame-ancestors 'none'",
    "base-uri 'none'",
])  # fmt: skip
EMBEDDED = "/embed/"
"""Beginning of the paths of cards that other pages may show in a frame."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with `no-referrer`, a form posted without JavaScript would have the Origin null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def embedded_headers(origins: tuple[str, ...]) -> dict[str, str]:
    """The headers of a card that pages of this server and of these origins may show in a frame. It has no scripts and no forms.

    Raises:
        UserError: an origin is not one.
    """
    for origin in origins:
        if not re.fullmatch(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?", origin):
            raise UserError(f"--embed-in {origin!r} is not the origin of a page; expected one like https://wiki.example.org")
    policy = [
        "default-src 'none'", "style-src 'self'", "style-src-attr 'unsafe-inline'", "img-src data:", "form-action 'none'",
        " ".join(["frame-ancestors 'self'", *origins]), "base-uri 'none'",
    ]  # fmt: skip
    shared = {"cross-origin-resource-policy": "cross-origin"} if origins else {}
    return HEADERS | {"content-security-policy": "; ".join(policy)} | shared


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` can only be reached from this machine."""
    return host in LOOPBACK


def host_of(header: str) -> str:
    """The name in a Host header, without the port and the brackets of IPv6; "" if it is malformed."""
    try:
        found = urlsplit(f"//{header}")
    except ValueError:
        return ""
    return (found.hostname or "") if found.netloc == header else ""


class Guard:
    """Middleware around the whole application.

    Args:
        bound: the address that the server listens on.
        token: secret that a reader must present once; None on loopback.
        names: further host names of the server.
        embed_in: origins whose pages may show cards in a frame.
    """

    def __init__(
        self, app: ASGIApp, bound: str, token: str | None, names: tuple[str, ...] = (), embed_in: tuple[str, ...] = ()
    ) -> None:
        self.app = app
        self.bound = bound
        self.token = token
        self.embedded = embedded_headers(embed_in)
        self.allowed = set(LOOPBACK) | {bound, *names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Pages use no web sockets, so only HTTP and the server's own start and stop pass.
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                own = self.embedded if scope["path"].startswith(EMBEDDED) else HEADERS
                for name, value in own.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        body = await _read(receive)
        if body is None:
            return  # the reader has gone
        app = self.app if len(body) <= MAX_BODY else _refused(413, TOO_LARGE)
        try:
            await app(scope, _after(body, receive), send_with_headers)
        except asyncio.CancelledError:  # the server stops, and has waited for this page
            await _refused(503, "The dashboard was stopped before this page was ready.")(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers, scope: Scope) -> ASGIApp | None:
        """The response to a request that is refused; None if it may pass."""
        host = headers.get("host", "")
        if not self._knows(host_of(host)):
            text = f"This server is not known as {host_of(host)!r}. Open the address it printed, or add the name with --name."
            return _refused(421, text)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return _refused(403, "Requests from other pages are refused.")
        if headers.get("sec-fetch-site", "none") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return _refused(403, "Requests from other pages are refused.")
        if scope["method"] not in ("GET", "HEAD") and origin is None:
            return _refused(403, "A request that changes something must have an Origin header.")
        if "transfer-encoding" in headers:
            return _refused(411, "A request with a body must have a Content-Length header, and no Transfer-Encoding.")
        return None if self.token is None else self._without_token(headers, scope)

    def _knows(self, name: str) -> bool:
        if name in self.allowed:
            return True
        # A server on all addresses accepts any address, but no unknown name, which may be an attack by DNS rebinding.
        return self.bound in ("0.0.0.0", "::") and _is_address(name)

    def _without_token(self, headers: Headers, scope: Scope) -> ASGIApp | None:
        """The response to a request without the cookie. A valid token in the address is moved into the cookie."""
        assert self.token is not None
        cookie = f"crossdiff-{scope['server'][1]}" if scope.get("server") else "crossdiff"
        if _same(_cookie(headers, cookie), self.token):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = next((value for key, value in query if key == "token"), "")
        if scope["method"] == "GET" and _same(given, self.token):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            # A path that begins with two slashes would lead to another host.
            path = "/" + quote(scope["path"].lstrip("/\\"))
            answer = RedirectResponse(path + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(cookie, self.token, httponly=True, samesite="strict", path="/")
            return answer
        return _refused(401, "This dashboard needs a token. Open the address that `crossdiff dashboard` printed.")


def _refused(status: int, text: str) -> ASGIApp:
    """A refusal. It ends the connection, because what is left of the request is not read."""
    return PlainTextResponse(text, status, {"connection": "close"})


async def _read(receive: Receive) -> bytes | None:
    """The body of a request, or just over `MAX_BODY` bytes of a larger one; None if the reader goes away before its end."""
    body, is_more = bytearray(), True
    while is_more and len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
    return bytes(body)


def _after(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the whole body at once, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return waiting.pop() if waiting else await receive()

    return received


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
