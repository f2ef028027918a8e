"""Routes: what one port answers: /metrics, /targets and /, with authorization and the proof to probes.

A request for all metrics that is answered completely is a scrape: `scrapes` notes it once the peer has received it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from time import monotonic, perf_counter
from urllib.parse import parse_qs

from django_promports import proof
from django_promports.activity import Activity
from django_promports.http import Request, Response, is_authorized, plain
from django_promports.logs import LimitedLog
from django_promports.loop import NEXT_TURN, Loop, Steps
from django_promports.own import own_metrics
from django_promports.page import html
from django_promports.page.overview import Overview, make_origin
from django_promports.scrape.exposition import Exposition
from django_promports.scrape.pace import SLICE_SECONDS
from django_promports.scrapes import Scrapes
from django_promports.targets import check_host

# The page shows how many series a process has. After COUNT_SECONDS without a scrape they are counted again by rendering
# the metrics; the response waits for that at most COUNT_PATIENCE_SECONDS.
COUNT_SECONDS = 15.0
COUNT_PATIENCE_SECONDS = 1.0
# The headers of Prometheus, so that this render and a scrape share the cached text.
ACCEPT, ACCEPT_ENCODING = "application/openmetrics-text;version=1.0.0", "gzip"
# Bytes of a response to a probe that are hashed in one step.
HASH_BYTES = 512 * 1024


class Routes:
    """Answers the requests to one port.

    exposition: what /metrics shows. about: returns what / shows of this process, by name. find_targets, survey:
    conversations that return the http_sd document of /targets, and what / shows of all processes. activity: the recent
    request counts of this process. read_token: returns the bearer token to require, if any. read_keys: returns the keys
    of the site, with which its own processes authenticate instead. host: the host under which Prometheus reaches this
    port. claimed_at: when (time.monotonic) the port was claimed. scrapes: notes the scrapes of this process.
    note_scrape: called with the time (time.time) when the render began that a scraper has received completely.
    """

    def __init__(
        self,
        *,
        about: Callable[[], Mapping[str, object]],
        find_targets: Callable[[Loop], Steps[bytes]],
        survey: Callable[[Loop], Steps[Overview]],
        exposition: Exposition,
        activity: Activity | None = None,
        read_token: Callable[[], str | None] = lambda: None,
        read_keys: Callable[[], Iterable[bytes]] = tuple,
        host: str = "",
        claimed_at: float | None = None,
        scrapes: Scrapes | None = None,
        note_scrape: Callable[[float], object] = lambda began: None,
    ) -> None:
        self._about = about
        self._find_targets = find_targets
        self._survey = survey
        self._exposition = exposition
        self._activity = activity
        self._own = own_metrics()
        self._rendered_at = -COUNT_SECONDS
        self._is_rendering = False
        self._read_token = read_token
        self._read_keys = read_keys
        self._host = host
        self._claimed_at = monotonic() if claimed_at is None else claimed_at
        self._scrapes = scrapes or Scrapes()
        self._note_scrape = note_scrape
        self._log = LimitedLog()

    def begin(self, loop: Loop) -> None:
        """Run what these routes need in a new loop. What ran in the former one has ended, anywhere."""
        self._is_rendering = False
        if self._activity is not None:
            loop.spawn(self._activity.keep(loop))

    def answer(self, loop: Loop, request: Request, sock: socket.socket) -> Steps[Response]:
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
                response = yield from self._route(loop, request)
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

    def _route(self, loop: Loop, request: Request) -> Steps[Response]:
        if request.route == "/metrics":
            return (yield from self._scrape(loop, request))
        if request.route == "/targets":
            find = partial(self._find_targets, loop)  # asks every port of the range
            return Response(200, "application/json", (yield from loop.share("/targets", find)))
        if request.route == "/":
            return (yield from self._page(loop, request))
        return plain(404, "Nothing is served here; try /metrics, /targets or /.")

    def _scrape(self, loop: Loop, request: Request) -> Steps[Response]:
        names = tuple(parse_qs(request.query).get("name[]", ()))
        rendering = self._render(loop, request.header("Accept"), request.header("Accept-Encoding"), names)
        began, response = yield from rendering
        self._own.served.inc()
        return response if names else response._replace(delivered=partial(self._note_delivery, request, began))

    def _note_delivery(self, request: Request, began: float, peer: str) -> None:
        if self._scrapes.note(request, peer, began):
            self._note_scrape(began)

    def _render(
        self, loop: Loop, accept: str, encoding: str, names: tuple[str, ...] = ()
    ) -> Steps[tuple[float, Response]]:
        """Render the metrics, one render at a time, and return when it began (time.time) and the response.

        Concurrent requests for the same share one render.
        """

        def render() -> Steps[tuple[float, Response]]:
            while self._is_rendering:
                yield from loop.give_way()
            self._is_rendering = True
            began, failures = time.time(), self._exposition.failures
            try:
                steps = self._exposition.render(accept, encoding, names)
                while True:
                    try:
                        next(steps)
                    except StopIteration as end:
                        headers, body = end.value
                        break
                    yield from loop.give_way()
            finally:
                self._is_rendering = False
                self._own.collector_failures.inc(self._exposition.failures - failures)
            if not names:
                self._rendered_at = monotonic()
            (_, content_type), *more = headers
            return began, Response(200, content_type, body, tuple(more))

        return (yield from loop.share((self, accept, encoding, names), render))

    def _page(self, loop: Loop, request: Request) -> Steps[Response]:
        about = {**self._about(), "scrapes": self._scrapes.describe()}
        if "application/json" in request.header("Accept"):
            if request.query == "activity":
                if monotonic() - self._rendered_at > COUNT_SECONDS:
                    with suppress(Exception):  # a scrape reports what is wrong
                        rendering = self._render(loop, ACCEPT, ACCEPT_ENCODING)
                        yield from loop.gather([rendering], COUNT_PATIENCE_SECONDS)
                activity = self._activity.samples() if self._activity else []
                about.update(series=self._exposition.series, activity=activity)
            return Response(200, "application/json", json.dumps(about).encode())
        found = yield from loop.share("/", partial(self._survey, loop))  # asks every port of the range
        if found.origin is not None:
            found = found._replace(origin=_find_origin(request.header("Host"), found.origin))
        pieces, rested = [], perf_counter()
        for piece in html.draw(found, about):
            pieces.append(piece)
            if perf_counter() - rested > SLICE_SECONDS:
                yield from loop.give_way()
                rested = perf_counter()
        return Response(200, "text/html; charset=utf-8", html.encode(pieces), html.HEADERS)


def _find_origin(host: str, known: str) -> str:
    """Return the scheme and the host that the browser used, so that links reach the other ports by the same host."""
    try:
        name = re.sub(r":\d*$", "", host) if not host.endswith("]") else host
        return make_origin(known.partition(":")[0], check_host(name))
    except ValueError:
        return known
