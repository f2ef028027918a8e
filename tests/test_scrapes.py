"""What a complete scrape is: the requests after which the counts of a process are known to be in Prometheus."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trustme
from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily

from django_promports import probe
from django_promports.binding import Binding
from django_promports.endpoint import Endpoint
from django_promports.http import Request
from django_promports.loop import Loop, Steps
from django_promports.own import own_metrics
from django_promports.ports import claim
from django_promports.probe import APPLICATION, State
from django_promports.routes import Routes
from django_promports.scrape.exposition import Exposition
from django_promports.scrapes import MAX_SCRAPERS, PROMETHEUS_HEADER, Scrapes
from tests.commands import survey_nothing
from tests.servers import wait_until

KEY = b"the key of the site"
PROMETHEUS = {PROMETHEUS_HEADER: "10"}
# Far more than the buffers of both sockets hold.
LARGE = 24 * 1024 * 1024


class Large:
    """A collector whose metric has LARGE bytes."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        metric = GaugeMetricFamily("large", "Large.", labels=["text"])
        for number in range(24):
            metric.add_metric([f"{number}" + "x" * (LARGE // 24)], 1)
        yield metric


class Served:
    """An endpoint in this process that notes its complete scrapes."""

    def __init__(self, free_ports: range, tls: ssl.SSLContext | None, client_tls: ssl.SSLContext | None) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        Counter("apples", "Apples.", registry=self.registry).inc()
        self.scrapes, self.noted, self.token, self.client_tls = Scrapes(), list[float](), "", client_tls
        claimed = claim("127.0.0.1", free_ports)
        self.port, self._answered = claimed.port, 0.0
        routes = Routes(
            about=lambda: {"application": APPLICATION, "project": "shop", "site": "shop"},
            find_targets=_find_none,
            survey=survey_nothing,
            exposition=Exposition(Binding(self.registry)),
            read_token=lambda: self.token or None,
            read_keys=lambda: [KEY],
            scrapes=self.scrapes,
            note_scrape=self.noted.append,
        )
        self.endpoint = Endpoint(claimed.listener, routes, tls=tls)
        self.endpoint.start()

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", self.port))
        return self.client_tls.wrap_socket(sock, server_hostname="localhost") if self.client_tls else sock

    def ask(self, path: str = "/metrics", method: str = "GET", **headers: str) -> int:
        """Make a request as any client does, and return the status once the endpoint has closed the connection."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.sock = self.connect()
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            response.read()
        self.settle()
        return response.status

    def send(self, sock: socket.socket) -> None:
        """Send a scrape as Prometheus does."""
        self._answered = own_metrics().served._value.get()
        sock.sendall(f"GET /metrics HTTP/1.1\r\nHost: a\r\n{PROMETHEUS_HEADER}: 10\r\n\r\n".encode())

    def settle(self, *, answered: bool = False) -> None:
        """Wait until the endpoint has dealt with all connections. answered: with what send() sent, at least."""
        if answered:
            wait_until(lambda: own_metrics().served._value.get() > self._answered, "the metrics were rendered")
        wait_until(lambda: not self.endpoint._connections, "the endpoint has closed its connections", 90)


def _find_none(loop: Loop) -> Steps[bytes]:
    yield from ()
    return b"[]"


@pytest.fixture
def serve(free_ports: range) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def start(*, over_tls: bool = False) -> Served:
            tls = client_tls = None
            if over_tls:
                authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                authority.issue_cert("localhost").configure_cert(tls)
                client_tls = ssl.create_default_context()
                authority.configure_trust(client_tls)
            served = Served(free_ports, tls, client_tls)
            stack.callback(served.endpoint.stop)
            return served

        yield start


def read_until_closed(sock: socket.socket, pause: Callable[[], object] = lambda: None) -> bytes:
    received = bytearray()
    while chunk := sock.recv(65536):
        received += chunk
        pause()
    return bytes(received)


@pytest.mark.parametrize("over_tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("headers", [{}, PROMETHEUS, {"Accept-Encoding": "gzip"}], ids=["curl", "Prometheus", "gzip"])
def test_a_get_that_is_answered_and_received_is_a_complete_scrape(
    headers: dict[str, str], over_tls: bool, serve: Callable[..., Served]
) -> None:
    served, began = serve(over_tls=over_tls), time.time()

    assert served.ask(**headers) == 200

    assert len(served.noted) == 1
    assert began <= served.noted[0] <= time.time()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"method": "HEAD"}, 200),
        ({"path": "/metrics?name[]=apples_total"}, 200),
        ({"path": "/metrics?name[]=apples_total&name[]=pears_total", **PROMETHEUS}, 200),
        ({"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}, 200),
        ({"path": "/"}, 200),
        ({"path": "/?activity", "Accept": "application/json"}, 200),  # it renders the metrics
        ({"path": "/targets"}, 200),
        ({"path": "/metrics/"}, 404),
        ({"method": "POST"}, 405),
        ({"Promports-Probe": "1 a forged one"}, 200),
    ],
    ids=str,
)
def test_another_request_is_not_a_complete_scrape(
    request_: dict[str, str], status: int, serve: Callable[..., Served]
) -> None:
    served = serve()

    assert served.ask(**request_) == status

    assert served.noted == []
    assert served.scrapes.describe(served.port) == {"total": 0}


def test_our_own_probes_are_not_complete_scrapes(serve: Callable[..., Served]) -> None:
    served, site = serve(), probe.Site("shop", keys=[KEY])

    with contextlib.closing(Loop()) as loop:
        (seen,) = loop.complete(probe.inspect(loop, site, {"127.0.0.1": [served.port]}))
    served.settle()

    assert (seen.state, seen.series) == (State.LIVE, 2)
    assert served.noted == []


def test_a_refused_and_a_failed_request_are_not_complete_scrapes(serve: Callable[..., Served]) -> None:
    served = serve()
    served.token = "secret"

    assert served.ask(**PROMETHEUS) == 401
    served.token = "secret\ud83d"  # the header cannot be compared with it
    assert served.ask(Authorization="Bearer secret", **PROMETHEUS) == 500
    assert served.noted == []

    served.token = "secret"
    assert served.ask(Authorization="Bearer secret", **PROMETHEUS) == 200
    assert len(served.noted) == 1


@pytest.mark.parametrize("over_tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close, then close"])
def test_a_client_that_hangs_up_before_the_end_has_not_scraped(
    how: str, over_tls: bool, serve: Callable[..., Served]
) -> None:
    served = serve(over_tls=over_tls)
    served.registry.register(Large())

    with served.connect(receive_buffer=65536) as sock:
        served.send(sock)
        if how.startswith("half-close") and not over_tls:
            sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1000)
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    served.settle(answered=True)

    assert served.noted == []


def test_a_client_that_closes_without_reading_a_short_response_has_not_scraped(serve: Callable[..., Served]) -> None:
    served = serve()

    with served.connect() as sock:
        served.send(sock)
        assert sock.recv(1, socket.MSG_PEEK)  # the kernel has the response, and nobody read it
    served.settle(answered=True)

    assert served.noted == []


@pytest.mark.parametrize("over_tls", [False, True], ids=["http", "https"])
def test_a_slow_reader_that_finishes_has_scraped(over_tls: bool, serve: Callable[..., Served]) -> None:
    served = serve(over_tls=over_tls)
    served.registry.register(Large())
    others = iter(range(20))

    def let_others_ask() -> None:
        if next(others, None) is not None:
            assert ask_for_the_page(served) == 200

    with served.connect(receive_buffer=65536) as sock:
        served.send(sock)
        received = read_until_closed(sock, let_others_ask)
    served.settle()

    assert len(received) > LARGE
    assert len(served.noted) == 1


def ask_for_the_page(served: Served) -> int:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)) as connection:
        connection.sock = served.connect()
        connection.request("GET", "/", headers={"Accept": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status


def test_a_client_that_reads_a_response_long_after_it_has_arrived_has_scraped(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the kernel has received is no longer unsent, and the endpoint drops idle connections after this time.
    monkeypatch.setattr("django_promports.endpoint.LINGER_SECONDS", 0.0)
    served = serve()

    with served.connect() as sock:
        served.send(sock)
        wait_until(lambda: own_metrics().served._value.get() > served._answered, "the metrics were rendered")
        assert ask_for_the_page(served) == 200  # a few turns later
        assert b"apples_total 1.0" in read_until_closed(sock)
    served.settle()

    assert len(served.noted) == 1


@pytest.mark.parametrize("is_large", [False, True], ids=["short", "large"])
def test_a_client_that_closes_its_direction_first_and_reads_everything_has_scraped(
    is_large: bool, serve: Callable[..., Served]
) -> None:
    served = serve()
    if is_large:
        served.registry.register(Large())

    with served.connect(receive_buffer=65536) as sock:
        served.send(sock)
        sock.shutdown(socket.SHUT_WR)
        received = read_until_closed(sock)
    served.settle(answered=True)

    assert len(received) > (LARGE if is_large else 0)
    assert len(served.noted) == 1


def test_once_prometheus_was_seen_only_its_requests_count(serve: Callable[..., Served]) -> None:
    served = serve()
    served.ask()
    assert len(served.noted) == 1

    with served.connect() as sock:  # one that Prometheus gave up is enough
        served.send(sock)
    served.settle(answered=True)
    served.ask()
    assert len(served.noted) == 1

    served.ask(**PROMETHEUS)
    assert len(served.noted) == 2


def gauges(name: str) -> dict[str, float]:
    """Return the values of one of our gauges in this process, by scraper."""
    return {
        sample.labels["scraper"]: sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == name
    }


def test_two_scrapers_behind_one_address_have_intervals_of_their_own(serve: Callable[..., Served]) -> None:
    served = serve()
    slow, fast = {PROMETHEUS_HEADER: "7"}, {PROMETHEUS_HEADER: "1"}
    served.ask(**slow)
    began = time.monotonic()
    for _ in range(10):
        served.ask(**fast)
    passed = time.monotonic() - began

    assert served.scrapes.longest_interval < passed  # of the fast one
    assert gauges("promports_longest_scrape_interval_seconds") == {"127.0.0.1": served.scrapes.longest_interval}
    served.ask(**slow)
    assert served.scrapes.longest_interval >= passed
    assert gauges("promports_longest_scrape_interval_seconds") == {"127.0.0.1": served.scrapes.longest_interval}
    assert gauges("promports_last_scrape_timestamp_seconds") == {"127.0.0.1": served.noted[-1]}

    shown: Any = served.scrapes.describe(served.port)
    assert shown["total"] == 12
    assert shown["by"] == "127.0.0.1"
    assert shown["interval_seconds"] >= passed - 0.001


def test_ports_of_one_process_do_not_share_their_intervals() -> None:
    request, scrapes = _parse_scrape("10"), Scrapes()

    for port in range(3 * MAX_SCRAPERS):
        scrapes.note(request, "10.0.0.7", port, time.time())

    assert scrapes.longest_interval == 0
    for port in range(3 * MAX_SCRAPERS):
        scrapes.note(request, "10.0.0.7", port, time.time())
    assert scrapes.longest_interval > 0
    assert scrapes.describe(0)["total"] == 2
    assert scrapes.describe(9999) == {"total": 0}


def test_the_scrapers_that_are_remembered_are_limited() -> None:
    request, scrapes = _parse_scrape("10"), Scrapes()

    for number in range(100):
        scrapes.note(request, f"10.0.0.{number}", 19100, float(number))

    addresses = {f"10.0.0.{number}" for number in range(100 - MAX_SCRAPERS, 100)}
    assert set(gauges("promports_last_scrape_timestamp_seconds")) == addresses
    assert set(gauges("promports_longest_scrape_interval_seconds")) == addresses
    assert scrapes.count == 100

    Scrapes()  # of a process that a scraped one has forked
    assert gauges("promports_last_scrape_timestamp_seconds") == {}


def _parse_scrape(timeout: str) -> Request:
    return Request(f"GET /metrics HTTP/1.1\r\n{PROMETHEUS_HEADER}: {timeout}\r\n\r\n".encode())
