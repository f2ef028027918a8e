"""The endpoint: the HTTP server of one process on its claimed port, with its routes, limits and authorization.

Each connection is a conversation of one loop in one thread, so that a slow, idle or hostile peer costs a file
descriptor and delays no other. One render of the metrics runs at a time, and each connection carries one request.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import IntEnum
from functools import partial
from hashlib import sha256
from time import monotonic, perf_counter
from urllib.parse import parse_qs

from django_promports import proof
from django_promports.activity import Activity
from django_promports.http import Request, Response, is_authorized, plain, receive_head
from django_promports.logs import LimitedLog
from django_promports.loop import NEXT_TURN, READ, Conversation, Loop, Steps, attempt, receive, send_all
from django_promports.own import own_metrics
from django_promports.page import html
from django_promports.page.overview import Overview, make_origin
from django_promports.scrape.exposition import Exposition
from django_promports.scrape.pace import SLICE_SECONDS
from django_promports.targets import check_host
from django_promports.thread import PAUSE_SECONDS, LoopThread

logger = logging.getLogger("django_promports")

# Seconds for TLS handshake and request header together. Prometheus sends both at once; its scrape timeout is 10 s.
HEADER_SECONDS = 5.0
# Seconds for the peer to receive the response. Megabytes over a slow link take that long, and delay no other peer.
ANSWER_SECONDS = 60.0
# If a connection is closed while input of the peer is unread, the kernel resets it, and the peer may miss the end of
# the response. So the endpoint keeps reading after a response, for so many seconds and bytes at most.
LINGER_SECONDS = 1.0
MAX_LINGER_BYTES = 4 * 1024 * 1024
# A Prometheus server holds one connection for a moment. This leaves ample room for two servers and a few browsers.
MAX_CONNECTIONS = 64
# Seconds to wait when the process has no file descriptor left for a connection.
EXHAUSTED_SECONDS = 0.1
# The page shows how many series a process has. After COUNT_SECONDS without a scrape they are counted again by rendering
# the metrics; the response waits for that at most COUNT_PATIENCE_SECONDS.
COUNT_SECONDS = 15.0
COUNT_PATIENCE_SECONDS = 1.0
# The headers of Prometheus, so that this render and a scrape share the cached text.
ACCEPT, ACCEPT_ENCODING = "application/openmetrics-text;version=1.0.0", "gzip"
# Bytes of a response to a probe that are hashed in one step.
HASH_BYTES = 512 * 1024


class Stage(IntEnum):
    """What a connection is doing. At the limit, the oldest connection of the lowest stage is dropped."""

    ENDING = 0
    ASKING = 1
    ANSWERED = 2


class Endpoint:
    """Serves /metrics, /targets and / on a listening socket, from a thread, until stop().

    exposition: what /metrics shows. about: returns what / shows of this process, by name. find_targets, survey:
    conversations that return the http_sd document of /targets, and what / shows of all processes. activity: the recent
    request counts of this process. tls: serve HTTPS with this context. read_token: returns the bearer token to require,
    if any. read_keys: returns the keys of the site, with which its own processes authenticate instead. host: the host
    under which Prometheus reaches this endpoint. claimed_at: when (time.monotonic) the port was claimed. watch: a
    conversation that looks at the other ports.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        about: Callable[[], Mapping[str, object]],
        find_targets: Callable[[Loop], Steps[bytes]],
        survey: Callable[[Loop], Steps[Overview]],
        exposition: Exposition,
        activity: Activity,
        tls: ssl.SSLContext | None = None,
        read_token: Callable[[], str | None] = lambda: None,
        read_keys: Callable[[], Iterable[bytes]] = tuple,
        host: str = "",
        claimed_at: float | None = None,
        watch: Callable[[Loop], Steps[None]] | None = None,
    ) -> None:
        self._listener = listener
        self._about = about
        self._find_targets = find_targets
        self._survey = survey
        self._exposition = exposition
        self._activity = activity
        self._own = own_metrics()
        self._rendered_at = -COUNT_SECONDS
        self._tls = tls
        self._read_token = read_token
        self._read_keys = read_keys
        self._host = host
        self._claimed_at = monotonic() if claimed_at is None else claimed_at
        self._watch = watch
        self._log = LimitedLog()
        self._connections: dict[Conversation, Stage] = {}  # oldest first
        self._held: list[tuple[Callable[[], Steps[None]], socket.socket]] = []
        self._stopping = False
        self._thread = LoopThread("promports-endpoint", self._begin, self._log)

    @property
    def _loop(self) -> Loop:
        return self._thread.loop

    def _begin(self, loop: Loop) -> Conversation:
        self._rendering = False
        self._connections.clear()
        loop.spawn(self._activity.keep(loop))
        if self._watch is not None:
            loop.spawn(self._watch(loop))
        for begin, _ in self._held:
            loop.spawn(begin())
        return loop.spawn(self._accept())

    def hold(self, begin: Callable[[], Steps[None]], sock: socket.socket) -> None:
        """Run another conversation too, on a socket that is closed with the endpoint. Call it before start()."""
        self._held.append((begin, sock))
        self._loop.spawn(begin())

    def start(self) -> None:
        """Start the thread, or start it again after pause()."""
        self._thread.start()

    def pause(self, seconds: float = PAUSE_SECONDS) -> None:
        """Stop the thread between two steps until start(), and wait up to `seconds` for it. The port stays claimed."""
        self._thread.pause(seconds)

    def stop(self) -> None:
        """Stop the thread and free the port."""
        self._stopping = True
        self.pause()
        self.abandon()

    def abandon(self) -> None:
        """Close all descriptors: in stop(), or in a forked child whose parent keeps serving."""
        self._stopping = True
        self._thread.close()  # first: gevent delays closing a socket that a selector watches
        for _, sock in self._held:
            sock.close()
        self._listener.close()

    def _accept(self) -> Steps[None]:
        while True:
            try:
                yield self._listener, READ
                for _ in range(MAX_CONNECTIONS):  # then the open connections have a turn
                    try:
                        sock, _ = self._listener.accept()
                    except BlockingIOError:
                        break
                    except ConnectionError:  # the peer closed it while it was queued
                        continue
                    if len(self._connections) >= MAX_CONNECTIONS:
                        self._drop_one()
                    connection = self._loop.spawn(self._serve(sock), HEADER_SECONDS, sock)
                    self._connections[connection] = Stage.ASKING
            except OSError:  # no file descriptor left, or the selector cannot take the listener
                if not self._drop_one():
                    yield from self._loop.sleep(EXHAUSTED_SECONDS)

    def _drop_one(self) -> bool:
        if not self._connections:
            return False
        connection = min(self._connections, key=self._connections.__getitem__)
        self._loop.drop(connection)
        self._connections.pop(connection, None)
        return True

    def _serve(self, sock: socket.socket) -> Steps[None]:
        connection = self._loop.current()
        try:
            sock.setblocking(False)
            if self._tls:
                sock = tls = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                yield from attempt(tls, tls.do_handshake, READ)
            head = yield from receive_head(sock)
            if head:
                self._connections[connection] = Stage.ANSWERED
                connection.set_deadline(ANSWER_SECONDS)
                request = Request(head)
                response = request.error or (yield from self._answer(request, sock))
                if response.status in (400, 401, 405, 408, 431, 505):
                    self._own.refused.inc()
                yield from send_all(sock, response.encode(with_body=request.command != "HEAD"))
                # Closing at once would reset the connection if the peer sent more than was read.
                self._connections[connection] = Stage.ENDING
                connection.set_deadline(LINGER_SECONDS)
                sock.shutdown(socket.SHUT_WR)
                rest = MAX_LINGER_BYTES
                while rest > 0 and (chunk := (yield from receive(sock))):
                    rest -= len(chunk)
        except OSError:  # the peer is gone or does not speak TLS; no reply is possible
            logger.debug("A connection to the metrics endpoint broke.", exc_info=True)
        except GeneratorExit:
            if self._connections.get(connection) == Stage.ASKING and not self._stopping:
                self._own.refused.inc()
            raise
        finally:
            self._connections.pop(connection, None)
            sock.close()

    def _answer(self, request: Request, sock: socket.socket) -> Steps[Response]:
        """Answer a request that has the token, or a probe from this site, and sign the response to a probe."""
        probe = None
        try:
            if header := request.header(proof.PROBE):
                address, port = sock.getsockname()[:2]
                asked = proof.Asked(address, port, request.path, request.header("Host"))
                age = monotonic() - self._claimed_at
                probe = proof.check_probe(header, self._read_keys(), asked, host=self._host, age=age)
            token = self._read_token()  # for a probe too: if the token is unreadable, no scrape succeeds
            authorized = isinstance(probe, proof.Proof) or (
                token is None or is_authorized(request.header("Authorization"), token)
            )
            if authorized:
                response = yield from self._route(request)
            else:
                response = plain(401, "This endpoint requires its bearer token.", ("WWW-Authenticate", "Bearer"))
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # gevent.Timeout and SystemExit too
            if request.route == "/metrics":
                self._own.failed.inc()
            self._log.error(request.route, "Answering %s failed.", request.route, exc_info=error)
            response = plain(500, f"{type(error).__name__}; see the log of pid {os.getpid()}.")
        if probe is None:
            return response
        if isinstance(probe, str):
            word = f"refused {probe}"
        else:
            digest = sha256()
            for begin in range(0, len(response.body), HASH_BYTES):
                digest.update(response.body[begin : begin + HASH_BYTES])
                yield NEXT_TURN
            word = proof.sign_answer(probe, response.status, digest.digest())
        return response._replace(headers=(*response.headers, (proof.ANSWER, word)))

    def _route(self, request: Request) -> Steps[Response]:
        if request.route == "/metrics":
            return (yield from self._scrape(request))
        if request.route == "/targets":
            find = partial(self._find_targets, self._loop)  # asks every port of the range
            return Response(200, "application/json", (yield from self._loop.share("/targets", find)))
        if request.route == "/":
            return (yield from self._page(request))
        return plain(404, "Nothing is served here; try /metrics, /targets or /.")

    def _scrape(self, request: Request) -> Steps[Response]:
        names = tuple(parse_qs(request.query).get("name[]", ()))
        response = yield from self._render(request.header("Accept"), request.header("Accept-Encoding"), names)
        self._own.served.inc()
        return response

    def _render(self, accept: str, encoding: str, names: tuple[str, ...] = ()) -> Steps[Response]:
        """Render the metrics, one render at a time. Concurrent requests for the same share one render."""

        def render() -> Steps[Response]:
            while self._rendering:
                yield from self._loop.give_way()
            self._rendering = True
            failures = self._exposition.failures
            try:
                steps = self._exposition.render(accept, encoding, names)
                while True:
                    try:
                        next(steps)
                    except StopIteration as end:
                        headers, body = end.value
                        break
                    yield from self._loop.give_way()
            finally:
                self._rendering = False
                self._own.collector_failures.inc(self._exposition.failures - failures)
            if not names:
                self._rendered_at = monotonic()
            (_, content_type), *more = headers
            return Response(200, content_type, body, tuple(more))

        return (yield from self._loop.share((accept, encoding, names), render))

    def _page(self, request: Request) -> Steps[Response]:
        about = dict(self._about())
        if "application/json" in request.header("Accept"):
            if request.query == "activity":
                if monotonic() - self._rendered_at > COUNT_SECONDS:
                    with suppress(Exception):  # a scrape reports what is wrong
                        yield from self._loop.gather([self._render(ACCEPT, ACCEPT_ENCODING)], COUNT_PATIENCE_SECONDS)
                about.update(series=self._exposition.series, activity=self._activity.samples())
            return Response(200, "application/json", json.dumps(about).encode())
        found = yield from self._loop.share("/", partial(self._survey, self._loop))  # asks every port of the range
        if found.origin is not None:
            found = found._replace(origin=_find_origin(request.header("Host"), found.origin))
        pieces, rested = [], perf_counter()
        for piece in html.draw(found, about):
            pieces.append(piece)
            if perf_counter() - rested > SLICE_SECONDS:
                yield from self._loop.give_way()
                rested = perf_counter()
        return Response(200, "text/html; charset=utf-8", html.encode(pieces), html.HEADERS)


def _find_origin(host: str, known: str) -> str:
    """Return the scheme and the host that the browser used, so that links reach the other ports by the same host."""
    try:
        name = re.sub(r":\d*$", "", host) if not host.endswith("]") else host
        return make_origin(known.partition(":")[0], check_host(name))
    except ValueError:
        return known
