"""HTTP of the endpoint: parsing a request header and refusing a bad one, the bearer token, and encoding a response.

Each connection carries one request and is closed after the response.
"""

from __future__ import annotations

import hmac
import re
import socket
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from typing import NamedTuple

from django_promports.loop import Steps, receive

MAX_HEADER_BYTES = 16384
HEADER_END = re.compile(rb"\r?\n\r?\n")
NO_REQUEST = re.compile(rb"[^A-Za-z\r\n]")


class Response(NamedTuple):
    """A response. delivered: called with the peer's address once the peer has received the whole body."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    delivered: Callable[[str], object] | None = None

    def encode(self, *, with_body: bool) -> bytes:
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            "Server: django_promports",
            f"Date: {formatdate(usegmt=True)}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "X-Content-Type-Options: nosniff",
            *(f"{name}: {value}" for name, value in self.headers),
            "Connection: close",
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + (self.body if with_body else b"")


class Request(BaseHTTPRequestHandler):
    """A request header, parsed by the standard library. `error` is the response if it cannot be served."""

    def __init__(self, head: bytes) -> None:
        self.error: Response | None = None
        self.command = self.path = ""
        self.rfile = BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        if len(head) > MAX_HEADER_BYTES:
            self.send_error(431)
        elif not self._parse() and self.error is None:
            self.error = plain(400, "This is not an HTTP request.")
        if self.error is None and self.command not in ("GET", "HEAD"):
            self.error = plain(405, f"{self.command} is not served here; use GET or HEAD.", ("Allow", "GET, HEAD"))
        self.route, _, self.query = self.path.partition("?")

    def _parse(self) -> bool:
        try:
            return self.parse_request()
        except Exception:  # it is the parser of mail headers, and raises all kinds of errors for odd parameters
            return False

    def header(self, name: str) -> str:
        return str(self.headers.get(name, ""))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.error = plain(code, message or HTTPStatus(code).description)

    def handle_expect_100(self) -> bool:
        return True


def plain(status: int, text: str, *headers: tuple[str, str]) -> Response:
    """Return a response of one line of text."""
    return Response(status, "text/plain; charset=utf-8", f"{text}\n".encode(), headers)


def receive_head(sock: socket.socket) -> Steps[bytes]:
    """Return what the peer sent up to the empty line, or until past the limit; empty if it closed the connection."""
    head = bytearray()
    while not (end := HEADER_END.search(head)) and len(head) <= MAX_HEADER_BYTES:
        chunk = yield from receive(sock)
        if not chunk:
            return b""
        head += chunk
        if NO_REQUEST.match(head):  # not HTTP, but TLS for example: an empty line may never come
            break
    return bytes(head[: end.end()] if end else head)


def is_authorized(header: str, token: str) -> bool:
    """Return whether an Authorization header carries the bearer token, compared in constant time."""
    scheme, _, given = header.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
