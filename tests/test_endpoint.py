"""The HTTP of the endpoint: its responses, and that no client can keep it from responding."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gzip
import http.client
import json
import logging
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import trustme
from prometheus_client import CollectorRegistry, Counter, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily

from django_promports import endpoint as endpoint_module
from django_promports import routes as routes_module
from django_promports import thread as thread_module
from django_promports.activity import Activity
from django_promports.binding import Binding
from django_promports.endpoint import MAX_CONNECTIONS, Endpoint
from django_promports.http import MAX_HEADER_BYTES, Request
from django_promports.loop import Loop, Steps
from django_promports.own import own_metrics
from django_promports.ports import claim
from django_promports.probe import count_samples
from django_promports.routes import Routes
from django_promports.scrape.exposition import Exposition
from tests.commands import run_python, survey_nothing
from tests.servers import SECONDS, wait_until
from tests.test_activity import count_requests

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"


class Served:
    """An endpoint in this process, with a client."""

    def __init__(self, endpoint: Endpoint, port: int, tls: ssl.SSLContext | None) -> None:
        self.endpoint, self.port, self.tls = endpoint, port, tls

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(
        self, path: str = "/metrics", method: str = "GET", seconds: float = 10, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = (
            http.client.HTTPSConnection("localhost", self.port, timeout=seconds, context=self.tls)
            if self.tls
            else http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        )
        with contextlib.closing(connection):
            connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            return response.status, response.headers, response.read()


def find_targets(loop: Loop) -> Steps[bytes]:
    return b"[]"
    yield


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=True)
    counter = Counter("apples", "Apples eaten.", ["kind"], registry=registry)
    counter.labels(kind='a"b\\\n').inc(3)
    Counter("pears", "Pears eaten.", registry=registry).inc(0.5)
    return registry


@pytest.fixture
def serve(free_ports: range, registry: CollectorRegistry) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def start(
            client_tls: ssl.SSLContext | None = None, tls: ssl.SSLContext | None = None, **options: Any
        ) -> Served:
            claimed = claim("127.0.0.1", free_ports)
            about = {"port": claimed.port, "pid": "<1>"}
            options = {"about": lambda: about, "find_targets": find_targets, "survey": survey_nothing} | options
            options.setdefault("exposition", Exposition(Binding(registry)))
            endpoint = Endpoint(claimed.listener, Routes(activity=Activity(registry), **options), tls=tls)
            endpoint.start()
            stack.callback(endpoint.stop)
            return Served(endpoint, claimed.port, client_tls)

        yield start


@pytest.mark.parametrize("accept", ["", "text/plain", "text/plain;version=1.0.0;escaping=values", OPENMETRICS])
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("query", ["", "?name[]=pears_total", "?name[]=nothing"])
def test_metrics_are_what_prometheus_client_serves(
    accept: str, encoding: str, query: str, serve: Callable[..., Served], registry: CollectorRegistry
) -> None:
    served = serve()
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/metrics",
        "QUERY_STRING": query[1:],
        "HTTP_ACCEPT": accept,
        "HTTP_ACCEPT_ENCODING": encoding,
    }
    expected_headers: dict[str, str] = {}
    expected = b"".join(make_wsgi_app(registry)(environ, lambda _, headers: expected_headers.update(headers)))

    status, headers, body = served.ask(f"/metrics{query}", Accept=accept, Accept_Encoding=encoding)

    assert status == 200
    assert headers["Content-Type"] == expected_headers["Content-Type"]
    assert headers.get("Content-Encoding") == expected_headers.get("Content-Encoding")
    assert _plain(headers, body) == _plain(expected_headers, expected)


def test_head_is_answered_like_get_without_the_body(serve: Callable[..., Served]) -> None:
    served = serve()
    _, got, body = served.ask()

    status, headers, nothing = served.ask(method="HEAD")

    assert status == 200
    assert headers["Content-Length"] == got["Content-Length"] == str(len(body))
    assert nothing == b""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/metrics", 405), ("DELETE", "/", 405), ("GET", "/nothing", 404), ("GET", "/metrics/x", 404)],
)
def test_what_is_not_served_is_said_so(method: str, path: str, status: int, serve: Callable[..., Served]) -> None:
    answered, headers, body = serve().ask(path, method)

    assert answered == status
    assert headers.get("Allow") == ("GET, HEAD" if status == 405 else None)
    assert b"GET" in body or b"/metrics" in body


def test_the_page_says_what_this_is_to_a_person_and_to_a_program(serve: Callable[..., Served]) -> None:
    served = serve()

    _, page_headers, page = served.ask("/")
    _, data_headers, data = served.ask("/", Accept="application/json")

    assert page_headers["Content-Type"] == "text/html; charset=utf-8"
    assert b'href="/metrics"' in page
    assert b'href="/targets"' in page
    assert b"&lt;1&gt;" in page
    assert data_headers["Content-Type"] == "application/json"
    assert json.loads(data) == {"port": served.port, "pid": "<1>", "scrapes": {"count": 0}}


def test_a_program_is_told_of_series_and_activity_where_it_asks_for_them(
    serve: Callable[..., Served], registry: CollectorRegistry
) -> None:
    requests, latency = count_requests(registry)
    served = serve()
    requests.inc(5)
    latency.observe(0.5)
    scrapes = own_metrics().served._value.get()

    told = json.loads(served.ask("/?activity", Accept="application/json")[2])

    assert told["activity"][-1][1:] == [5, 1, 0.5]
    assert told["series"] == count_samples(served.ask()[2])
    assert own_metrics().served._value.get() == scrapes + 1  # to count the series was none


def test_an_exposition_that_takes_long_does_not_hold_up_the_page(
    serve: Callable[..., Served], registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    class Long(Exposition):
        def render(self, *asked: Any) -> Any:
            while not released.is_set():
                yield
            return (yield from super().render(*asked))

    monkeypatch.setattr(routes_module, "COUNT_PATIENCE_SECONDS", 0.1)
    exposition = Long(Binding(registry))
    served = serve(exposition=exposition)

    told = json.loads(served.ask("/?activity", Accept="application/json")[2])

    assert told["series"] is None
    released.set()
    wait_until(lambda: exposition.series, "the series are counted after all")


def test_targets_are_found_once_for_all_who_ask_meanwhile(serve: Callable[..., Served]) -> None:
    found = []
    asked: list[int] = []

    def find(loop: Loop) -> Steps[bytes]:
        found.append(1)
        while len(asked) < 5:
            yield from loop.give_way()
        return b'[{"targets": []}]'

    # The token is read in the step in which a request joins the others.
    served = serve(find_targets=find, read_token=lambda: asked.append(1))
    answers: list[bytes] = []
    crowd = [threading.Thread(target=lambda: answers.append(served.ask("/targets")[2])) for _ in range(5)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()

    assert answers == [b'[{"targets": []}]'] * 5
    assert found == [1]


def test_targets_that_cannot_be_found_are_an_error_and_not_an_empty_list(serve: Callable[..., Served]) -> None:
    def find(loop: Loop) -> Steps[bytes]:
        raise RuntimeError("no")
        yield

    assert serve(find_targets=find).ask("/targets")[0] == 500


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /metrics HTTP/9.9\r\n\r\n", 505),
        (b"GET /metrics HTTP/x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello \r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_HEADER_BYTES + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000000, 405),
    ],
    ids=["empty", "one-word", "version", "no-version", "tls", "long-header", "many-headers", "body"],
)
def test_a_malformed_request_is_refused_and_the_next_scrape_served(
    sent: bytes, status: int, serve: Callable[..., Served]
) -> None:
    served = serve()
    refused = own_metrics().refused._value.get()

    with served.connect() as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
        with contextlib.closing(http.client.HTTPResponse(sock)) as answer:
            answer.begin()

    assert answer.status == status
    assert own_metrics().refused._value.get() == refused + 1
    assert served.ask()[0] == 200


ODD_PARAMETERS = [
    "boundary*=undefined'x'y",
    "boundary*=" + "9" * 5000 + "'x'y",
    f"boundary*{'9' * 5000}=x",
    "boundary*=a\0b'x'y",
    "boundary*0*=utf-7'x'+AAA-; boundary*1*=%ff",
    "boundary*=idna'x'%ff",
]


@pytest.mark.parametrize("parameter", ODD_PARAMETERS, ids=range(len(ODD_PARAMETERS)))
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_header_that_the_parser_cannot_read_is_answered_and_costs_nobody_else_anything(
    parameter: str,
    tls: bool,
    serve: Callable[..., Served],
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = serve(tls=certificates.server, client_tls=certificates.client) if tls else serve()

    statuses = [served.ask(Content_Type=f"multipart/x; {parameter}")[0] for _ in range(20)]

    assert set(statuses) <= {200, 400}
    assert served.ask()[0] == 200
    assert not caplog.records


CHARSETS = ["undefined", "idna", "utf-7", "punycode", "rot13", "us-ascii", "a\0b", "9" * 400, "=?utf-8?q?x?=", "", "x"]
PIECES = [
    "'",
    "''",
    '"',
    ";",
    ",",
    "\\",
    "%",
    "%ff",
    "%zz",
    "\0",
    "\t",
    "\xff",
    "(",
    ")",
    "x",
    "y",
    "9" * 4400,
    "=",
    "*",
]


def test_any_header_parameter_is_parsed_or_refused() -> None:
    chance = random.Random(9)
    outcomes = dict.fromkeys((200, 400), 0)

    def parameter() -> str:
        name = chance.choice(["boundary", "boundary", "charset", "q", "filename", "x"])
        name += "".join(chance.choices(["*", "*0", "*1", "*9" + "9" * 4400, ""], [4, 2, 1, 1, 2], k=2))
        begin = f"{chance.choice(CHARSETS)}'{chance.choice(['', 'en', '%'])}'" if chance.random() < 0.5 else ""
        return f"; {name}={begin}{''.join(chance.choices(PIECES, k=chance.randint(0, 4)))}"

    headers = ["Content-Type: multipart/x", "Content-Type: text/x", "Content-Disposition: form-data", "Accept: */*"]
    headers += ["Content-Transfer-Encoding: base64", "Connection: close", "Expect: 100-continue", "Content-Length: 1"]
    for _ in range(10_000):
        lines = [chance.choice(headers) + "".join(parameter() for _ in range(chance.randint(0, 3))) for _ in range(2)]
        head = "\r\n".join(["GET /metrics HTTP/1.1", *lines, "", ""]).encode("latin-1")
        request = Request(head[:MAX_HEADER_BYTES])
        outcomes[request.error.status if request.error else 200] += 1
        if request.error is None:
            assert isinstance(request.header("Accept"), str)

    assert min(outcomes.values()) > 100


# A process of its own sends faster than this one reads.
STREAM = """
import socket, ssl, sys
port, tls, begin = int(sys.argv[1]), sys.argv[2] == "True", sys.argv[3].encode().decode("unicode_escape").encode()
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
data = b"x" * (1 << 20)
while True:
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as sock:
            sock = context.wrap_socket(sock) if tls else sock
            sock.sendall(begin)
            print("streams", flush=True)
            while True:
                sock.sendall(data)
    except OSError:
        pass
"""


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_peers_that_send_without_end_do_not_keep_scrapes_from_their_answers(
    tls: bool, serve: Callable[..., Served], certificates: Certificates
) -> None:
    served = serve(tls=certificates.server, client_tls=certificates.client) if tls else serve()
    begins = [r"GET /nothing HTTP/1.1\r\n\r\n", r"GET /metrics HTTP/1.1\r\n\r\n", r"GET / HTTP/1.1\r\nX: "]
    with contextlib.ExitStack() as stack:
        for begin in [*begins, begins[0]]:
            words = [sys.executable, "-c", STREAM, str(served.port), str(tls), begin]
            child = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
            stack.callback(child.kill)
            assert child.stdout is not None
            assert child.stdout.readline() == "streams\n"
        deadline = time.monotonic() + SECONDS

        # Each took seconds when a stream was read for as long as there was more of it.
        for _ in range(60):
            assert served.ask(seconds=5)[0] == 200

        assert time.monotonic() < deadline


def test_what_a_peer_sends_after_its_answer_is_read_up_to_a_limit(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "LINGER_SECONDS", 600.0)
    served = serve()
    with served.connect() as sock:
        sock.sendall(b"GET /nothing HTTP/1.1\r\n\r\n")
        sent = 0
        with contextlib.suppress(OSError):  # a reset, or a broken pipe
            while True:
                sent += sock.send(b"x" * 65536)

        assert sent >= endpoint_module.MAX_LINGER_BYTES


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_two_hundred_idle_connections_do_not_keep_a_scrape_from_its_answer(
    tls: bool, serve: Callable[..., Served], certificates: Certificates
) -> None:
    served = serve(tls=certificates.server, client_tls=certificates.client) if tls else serve()
    with contextlib.ExitStack() as stack:
        for count in (1, 199):
            for _ in range(count):
                stack.enter_context(served.connect())

            began = time.monotonic()
            status, _, _ = served.ask(seconds=5)

            assert status == 200
            assert time.monotonic() - began < 1
        assert len(os.listdir("/proc/self/task")) < 20


def test_a_header_that_trickles_in_is_dropped_in_time(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "HEADER_SECONDS", 0.5)
    served = serve()
    refused = own_metrics().refused._value.get()
    with served.connect() as sock:
        began = time.monotonic()

        def trickle() -> bool:
            try:
                sock.sendall(b"G")
            except OSError:
                return True
            return False

        wait_until(trickle, "the connection is dropped", 5)

        assert time.monotonic() - began >= 0.5
        assert own_metrics().refused._value.get() == refused + 1


def test_the_oldest_unfinished_connection_makes_room_for_a_newcomer(serve: Callable[..., Served]) -> None:
    served = serve()
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(served.connect()) for _ in range(MAX_CONNECTIONS)]
        assert served.ask()[0] == 200

        crowd[0].settimeout(5)

        assert crowd[0].recv(1) == b""
        crowd[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            crowd[1].recv(1)


def test_a_burst_beyond_the_limit_leaves_no_connection_behind(serve: Callable[..., Served]) -> None:
    served = serve()
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        served.endpoint.pause()  # so that all of them are there at once
        crowd = []
        for _ in range(3 * MAX_CONNECTIONS // 2):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", served.port))
            crowd.append(sock)
        served.endpoint.start()

        assert served.ask(seconds=5)[0] == 200
        assert len(os.listdir("/proc/self/fd")) <= before + len(crowd) + MAX_CONNECTIONS
        assert len(served.endpoint._connections) <= MAX_CONNECTIONS
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "all descriptors are closed", 5)


def test_a_peer_that_never_reads_its_answer_holds_up_nobody(
    serve: Callable[..., Served], registry: CollectorRegistry
) -> None:
    big = Counter("big", "Longer than any socket buffer.", ["x"], registry=registry)
    for i in range(20000):
        big.labels("x" * 100 + str(i)).inc()
    served = serve()
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(served.connect())
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")

        assert served.ask("/")[0] == 200


def test_a_peer_that_hangs_up_is_no_news(
    serve: Callable[..., Served], registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "django_promports")
    served = serve()
    for sent in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"):
        sock = served.connect()
        # A reset instead of a goodbye.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        sock.sendall(sent)
        sock.close()

    assert served.ask()[0] == 200
    assert not caplog.records


class Broken:
    """A collector that raises until it is repaired."""

    broken = True

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if self.broken:
            raise RuntimeError("the kettle is empty")
        yield GaugeMetricFamily("kettle", "Kettles.", 1)


def test_a_collector_that_raises_costs_its_own_metrics_and_is_logged_once(
    serve: Callable[..., Served], registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    registry.register(broken)
    served = serve()
    failures, answered = own_metrics().collector_failures._value.get(), own_metrics().served._value.get()

    bodies = [served.ask()[2] for _ in range(3)]

    assert all(b"pears_total 0.5" in body and b"kettle" not in body for body in bodies)
    assert own_metrics().collector_failures._value.get() == failures + 3
    assert own_metrics().served._value.get() == answered + 3
    assert [record.exc_info is not None for record in caplog.records] == [True]
    broken.broken = False
    assert b"kettle 1.0" in served.ask()[2]


def test_a_scrape_that_fails_is_counted_and_logged_once(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    def describe() -> dict[str, object]:
        raise RuntimeError("no")

    served = serve(about=describe)

    statuses = [served.ask("/")[0] for _ in range(3)]

    assert statuses == [500] * 3
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert served.ask()[0] == 200


def test_scrapes_share_a_render_if_they_ask_for_the_same(
    serve: Callable[..., Served], registry: CollectorRegistry
) -> None:
    collected = []
    all_asked = threading.Event()

    class Slow:
        def describe(self) -> list[Any]:
            return []

        def collect(self) -> list[GaugeMetricFamily]:
            collected.append(1)
            return [GaugeMetricFamily(f"slow_{i}", "Slow.", 1) for i in range(2000 if not all_asked.is_set() else 1)]

    registry.register(Slow())
    served = serve()
    answers: list[bytes] = []
    crowd = [threading.Thread(target=lambda: answers.append(served.ask()[2])) for _ in range(8)]
    served.endpoint.pause()
    for thread in crowd:
        thread.start()
    wait_until(lambda: sum(thread.is_alive() for thread in crowd) == 8, "all are on their way")
    served.endpoint.start()
    for thread in crowd:
        thread.join()

    assert len(answers) == 8
    assert len(collected) < 8
    assert len(set(answers)) == 1


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, MemoryError, KeyboardInterrupt])
def test_an_answer_that_raises_anything_costs_only_itself(
    error: type[BaseException], serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    def describe() -> dict[str, object]:
        raise error

    served = serve(about=describe)

    statuses = []
    for _ in range(20):
        try:
            statuses.append(served.ask("/")[0])
        except (OSError, http.client.HTTPException):
            statuses.append(0)

    assert set(statuses) == {0 if error is KeyboardInterrupt else 500}
    assert served.ask()[0] == 200
    assert len(caplog.records) == 1


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise an error asynchronously in the thread, as debuggers and time limits do."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error))


def endpoint_thread() -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == "promports-endpoint"), None)


def test_a_thread_that_anything_ends_is_replaced_and_it_is_said_once(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()
    for error in (SystemExit, RuntimeError, asyncio.CancelledError, MemoryError):
        thread = endpoint_thread()
        assert thread is not None

        def is_replaced(thread: threading.Thread = thread, error: type[BaseException] = error) -> bool:
            raise_in(thread, error)  # if it hits a conversation, it costs only that one
            with contextlib.suppress(OSError), served.connect():  # it comes with the next step
                pass
            return not thread.is_alive() and endpoint_thread() is not None

        wait_until(is_replaced, "another thread replaces it")
        assert served.ask()[0] == 200
    served.endpoint.pause()
    assert endpoint_thread() is None
    served.endpoint.start()
    assert served.ask()[0] == 200
    served.endpoint.stop()
    assert endpoint_thread() is None
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "promports-endpoint ended" in line] == said[:1]
    assert "ended (SystemExit); another one replaces it" in said[0]


def test_an_error_that_comes_at_any_moment_leaves_the_endpoint_answering(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_module, "MAX_BACKOFF_SECONDS", 0.0)
    served = serve()
    before = len(os.listdir("/proc/self/fd"))
    chance = random.Random(9)
    for _ in range(150):
        wait_until(lambda: _answers(served), "the endpoint answers")
        thread = endpoint_thread()
        assert thread is not None
        with contextlib.suppress(OSError), served.connect() as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            # Somewhere in the middle of that; where exactly is left to chance.
            for _ in range(chance.randrange(2000)):
                pass
            raise_in(thread, SystemExit)

    wait_until(lambda: _answers(served), "the endpoint answers")
    # An exception in the middle of Python's accept() leaks a descriptor that no code can close.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 15, "nearly all descriptors are closed", 5)
    assert len(caplog.records) < 10


def test_a_thread_that_cannot_live_does_not_spin(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    turns = []

    def turn(loop: Loop) -> None:
        turns.append(1)
        raise OSError("the kernel has no more of it")

    served = serve()
    # A selector that always fails is beyond what a test can bring about.
    monkeypatch.setattr(Loop, "turn", turn)
    served.connect().close()
    wait_until(lambda: len(turns) > 3, "it was tried a few times")
    spent = time.process_time()
    time.sleep(1)

    assert time.process_time() - spent < 0.5
    assert len(turns) < 20
    assert len(caplog.records) == 1
    monkeypatch.undo()
    wait_until(lambda: _answers(served), "it answers once that is over")


def _answers(served: Served) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return served.ask(seconds=1)[0] == 200
    return False


def test_a_greenlet_that_is_killed_is_replaced() -> None:
    script = """
from gevent import monkey; monkey.patch_all()
import gc, gevent, greenlet, threading, urllib.request
from prometheus_client import REGISTRY
from django_promports import ports
from django_promports.activity import Activity
from django_promports.endpoint import Endpoint
from django_promports.routes import Routes
from django_promports.scrape.exposition import Exposition
from django_promports.binding import Binding
claim = ports.claim("127.0.0.1", [int(__import__("sys").argv[1])])
exposition, activity = Exposition(Binding()), Activity(REGISTRY)
parts = {"exposition": exposition, "activity": activity}
endpoint = Endpoint(claim.listener, Routes(about=dict, find_targets=None, survey=None, **parts))
endpoint.start()
url = f"http://127.0.0.1:{claim.port}/metrics"
for _ in range(3):
    assert urllib.request.urlopen(url, timeout=10).status == 200
    (found,) = [t for t in threading.enumerate() if t.name == "promports-endpoint"]
    greenlets = [found for found in gc.get_objects() if isinstance(found, gevent.Greenlet) and not found.dead]
    gevent.killall([found for found in greenlets if found is not gevent.getcurrent()], timeout=10)
    gevent.sleep(0.5)
assert urllib.request.urlopen(url, timeout=10).status == 200
endpoint.stop()
print("DONE")
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = run_python(script, str(port), PYTHONWARNINGS="ignore")

    assert done.stdout.strip() == "DONE", done.stderr
    assert done.stderr.count("promports-endpoint ended (GreenletExit)") == 1


def test_without_the_token_nothing_is_served(serve: Callable[..., Served]) -> None:
    served = serve(read_token=lambda: "s3cret")

    for path in ("/metrics", "/targets", "/", "/nothing"):
        assert served.ask(path)[0] == 401
        assert served.ask(path, Authorization="Bearer wrong")[0] == 401
        assert served.ask(path, Authorization="Basic s3cret")[0] == 401
    assert served.ask()[1]["WWW-Authenticate"] == "Bearer"
    assert served.ask(Authorization="Bearer s3cret")[0] == 200
    assert served.ask(Authorization="bearer s3cr\u00e9t".encode().decode("latin-1"))[0] == 401


class Certificates:
    def __init__(self) -> None:
        authority = trustme.CA()
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(self.server)
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)
        self.mutual = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(self.mutual)
        authority.configure_trust(self.mutual)
        self.mutual.verify_mode = ssl.CERT_REQUIRED
        self.known_client = ssl.create_default_context()
        authority.configure_trust(self.known_client)
        authority.issue_cert("prometheus").configure_cert(self.known_client)


@pytest.fixture(scope="session")
def certificates() -> Certificates:
    return Certificates()


def test_https_is_served_and_http_refused(serve: Callable[..., Served], certificates: Certificates) -> None:
    served = serve(tls=certificates.server, client_tls=certificates.client)

    assert served.ask()[0] == 200
    served.tls = None
    with pytest.raises((OSError, http.client.HTTPException)):
        served.ask()
    served.tls = certificates.client
    assert served.ask()[0] == 200


def test_a_large_answer_arrives_whole_over_https(
    serve: Callable[..., Served], certificates: Certificates, registry: CollectorRegistry
) -> None:
    big = Counter("big", "Longer than any socket buffer.", ["x"], registry=registry)
    for i in range(20000):
        big.labels("x" * 100 + str(i)).inc()
    served = serve(tls=certificates.server, client_tls=certificates.client)

    _, headers, body = served.ask()

    assert len(body) == int(headers["Content-Length"]) > 4_000_000


def test_a_client_without_certificate_is_refused_where_one_is_required(
    serve: Callable[..., Served], certificates: Certificates
) -> None:
    served = serve(tls=certificates.mutual, client_tls=certificates.client)

    with pytest.raises(OSError):  # noqa: PT011  the alert may arrive as ssl.SSLError or a reset
        served.ask()
    served.tls = certificates.known_client
    assert served.ask()[0] == 200


def test_stop_frees_the_port_and_ends_the_thread(serve: Callable[..., Served], free_ports: range) -> None:
    served = serve()
    with served.connect():
        assert "promports-endpoint" in [thread.name for thread in threading.enumerate()]

        served.endpoint.stop()

        assert "promports-endpoint" not in [thread.name for thread in threading.enumerate()]
    again = claim("127.0.0.1", free_ports)
    again.listener.close()
    assert again.port == served.port


def test_the_endpoint_survives_a_process_without_file_descriptors() -> None:
    script = """
import os, resource, socket, urllib.request
from prometheus_client import REGISTRY
from django_promports.activity import Activity
from django_promports.endpoint import Endpoint
from django_promports.routes import Routes
from django_promports.scrape.exposition import Exposition
from django_promports.binding import Binding
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
listener.setblocking(False)
exposition, activity = Exposition(Binding()), Activity(REGISTRY)
parts = {"exposition": exposition, "activity": activity}
Endpoint(listener, Routes(about=dict, find_targets=None, survey=None, **parts)).start()
url = f"http://127.0.0.1:{port}/metrics"
client = socket.create_connection(("127.0.0.1", port))
urllib.request.urlopen(url, timeout=10).close()    # so client was accepted
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
os.close(held.pop())
late = socket.create_connection(("127.0.0.1", port), timeout=10)   # takes the last descriptor: accept() has none
client.settimeout(10)
client.recv(1)    # the oldest connection was dropped for the newcomer, or its deadline passed
for descriptor in held:
    os.close(descriptor)
print(urllib.request.urlopen(url, timeout=10).status)
"""
    done = run_python(script, PYTHONWARNINGS="ignore")

    assert done.stdout.strip() == "200", done.stderr


def _plain(headers: Mapping[str, str] | http.client.HTTPMessage, body: bytes) -> bytes:
    return gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body
