"""Another user of the machine holds a port of the range: what is sent to it, and which answers are trusted."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trustme
from django.core.management import CommandError
from django.test import Client
from prometheus_client import CollectorRegistry, Gauge
from pytest_django import Settings

import django_promports
from django_promports import probe, proof
from django_promports.conf import conf
from django_promports.loop import Loop
from django_promports.probe import Answer, Site, State
from django_promports.secret import NAME, make_secret, read_secret
from tests.commands import answering, call, endpoint
from tests.servers import SECONDS, get, running, wait_until
from tests.test_ports import needs_ipv6

TOKEN = "hunter2-is-the-token"
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
ABOUT = {"application": "django_promports", "site": "this"}


class Hostile:
    """A program at a port that records what it receives, and sends the given answer."""

    def __init__(self, port: int, answer: Callable[[bytes], bytes], tls: ssl.SSLContext | None = None) -> None:
        self.received: list[bytes] = []
        self._answer, self._tls = answer, tls
        self._listener = socket.create_server(("127.0.0.1", port))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                stack.enter_context(peer).settimeout(SECONDS)
                if self._tls:
                    peer = stack.enter_context(self._tls.wrap_socket(peer, server_side=True))
                request = peer.recv(65536)
                self.received.append(request)
                peer.sendall(self._answer(request))


@contextlib.contextmanager
def hostile(port: int, answer: Callable[[bytes], bytes], tls: ssl.SSLContext | None = None) -> Iterator[Hostile]:
    with contextlib.closing(Hostile(port, answer, tls)) as listener:
        yield listener


def pretend(request: bytes, site: str = "this") -> bytes:
    """Answer like an endpoint of the site, as far as possible without its keys."""
    about = json.dumps({**ABOUT, "site": site}).encode()
    return b"HTTP/1.1 200 OK\r\nServer: django_promports\r\n\r\n" + about


def echo(request: bytes) -> bytes:
    """Return the MACs of the probe as those of the answer."""
    macs = re.search(rb"Promports-Probe: (.*)\r\n", request)
    words = macs[1].split()[-1].split(b",") if macs else []
    head = b"".join(b"Promports-Answer: 1 %s\r\n" % mac for mac in words)
    return pretend(request).replace(b"\r\n\r\n", b"\r\n" + head + b"\r\n", 1)


def relay(port: int, tls: ssl.SSLContext | None = None) -> Callable[[bytes], bytes]:
    """Forward the request to a real worker, and its answer back."""

    def pass_on(request: bytes) -> bytes:
        with contextlib.ExitStack() as stack:
            sock: socket.socket = stack.enter_context(socket.create_connection(("127.0.0.1", port), SECONDS))
            if tls:
                sock = stack.enter_context(tls.wrap_socket(sock))
            sock.sendall(request)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    return pass_on


def ask(port: int, site: Site, path: str = "/", host: str = "127.0.0.1") -> Answer:
    with contextlib.closing(Loop()) as loop:
        return loop.complete(probe.ask(site, host, port, path))


@pytest.fixture(params=[False, True], ids=["http", "https"])
def guarded(
    request: pytest.FixtureRequest, settings: Settings, tmp_path: Path, free_ports: range
) -> ssl.SSLContext | None:
    """A site with a token, and the TLS context of a program without the site's certificate."""
    (tmp_path / "token").write_text(TOKEN)
    settings.PROMPORTS_BEARER_TOKEN_FILE = tmp_path / "token"
    settings.PROMPORTS_PORT_RANGE = free_ports[:4]
    if not request.param:
        return None
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    settings.PROMPORTS_TLS_CERTFILE = tmp_path / "both.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.mark.parametrize("answer", [pretend, echo, None], ids=["pretends", "echoes", "relays"])
def test_who_has_a_port_is_never_sent_the_token_and_never_live(
    answer: Callable[[bytes], bytes] | None,
    guarded: ssl.SSLContext | None,
    free_ports: range,
    client: Client,
    this_process: None,
    settings: Settings,
) -> None:
    worker, foreign = free_ports[:2]
    address = f"127.0.0.1:{worker}"
    answer = answer or relay(worker, _client_tls() if guarded else None)
    if answer is pretend:
        answer = lambda request: pretend(request, conf.PROMPORTS_SITE)  # noqa: E731
    assert django_promports.start() == worker
    with hostile(foreign, answer, guarded) as listener:
        table = json.loads(call("show_targets", "--json")[0])["targets"]
        live = json.loads(call("export_targets", "--live")[0])
        with pytest.raises(CommandError, match="1 of 4 ports cannot be scraped"):
            call("export_targets", "--check")
        told = client.get("/metrics/targets", headers={"Authorization": f"Bearer {TOKEN}"}).json()
        asked, token = len(listener.received), {"Authorization": f"Bearer {TOKEN}"}
        own = json.loads(_get(worker, "/targets", bool(guarded), token))
        page = _get(worker, "/", bool(guarded), token).decode()
        received = b"".join(listener.received)

    assert [row["state"] for row in table] == ["live", "other", "free", "free"]
    assert [group["targets"] for group in (*live, *told, *own)] == [[address]] * 3
    assert "1 live, 1 other, 2 of 4 ports free" in " ".join(page.split())
    assert asked >= 4
    assert len(listener.received) >= asked + 2
    assert TOKEN.encode() not in received
    assert b"authorization" not in received.lower()
    assert received.count(proof.PROBE.encode()) == len(listener.received)


def test_a_watch_never_sends_the_token(free_ports: range, tmp_path: Path) -> None:
    token, output = tmp_path / "token", tmp_path / "targets.json"
    token.write_text(TOKEN)
    command = ["manage.py", "export_targets", "--watch", "0.05", "--output", str(output)]
    env = {"DEMO_PORT_RANGE": f"{free_ports[0]}-{free_ports[1]}", "DEMO_TOKEN_FILE": str(token)}
    answer = lambda request: pretend(request, "demo_site.settings")  # noqa: E731
    with (
        hostile(free_ports[0], answer) as listener,
        running(sys.executable, *command, log=tmp_path / "log", **env) as child,
    ):
        child.wait_until(lambda: output.exists() and len(listener.received) > 3, "it looked a few times")

    assert json.loads(output.read_text()) == []
    assert TOKEN.encode() not in b"".join(listener.received)


def _client_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _get(port: int, path: str, tls: bool, headers: dict[str, str]) -> bytes:
    request = urllib.request.Request(f"http{'s' if tls else ''}://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=SECONDS, context=_client_tls() if tls else None) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize("answer", [pretend, echo], ids=["pretends", "echoes"])
@pytest.mark.parametrize("path", ["/", "/?activity", "/metrics"])
def test_without_a_token_too_nobody_else_is_live(
    path: str, answer: Callable[[bytes], bytes], free_ports: range
) -> None:
    with hostile(free_ports[0], answer):
        found = ask(free_ports[0], Site("this", keys=[KEY]), path)

    assert found.state == "other"
    assert found.reason == (proof.UNSIGNED if answer is pretend else proof.FORGED)
    assert not found.about


@pytest.mark.parametrize("path", ["/", "/metrics"])
def test_a_probe_that_is_relayed_to_a_worker_proves_nothing(path: str, free_ports: range) -> None:
    with endpoint(free_ports[1:], site="this", keys=[KEY]) as port, hostile(free_ports[0], relay(port)) as listener:
        found = ask(free_ports[0], Site("this", keys=[KEY]), path)
        honest = ask(port, Site("this", keys=[KEY]), path)

    assert (found.state, found.reason) == ("other", proof.REFUSALS["key"])
    assert honest.state == "live"
    assert listener.received


def test_an_answer_that_was_recorded_proves_nothing_later(free_ports: range) -> None:
    site, recorded = Site("this", keys=[KEY]), []
    with endpoint(free_ports[1:], site="this", keys=[KEY]) as port:
        with hostile(free_ports[0], lambda request: b"") as listener:
            ask(free_ports[0], site)
        # A recorded answer of a worker at the same port, to a probe signed with a key of the site.
        asked = proof.Asked("127.0.0.1", port, "/", f"127.0.0.1:{port}")
        probe = proof.make_probe([KEY], asked)
        request = f"GET / HTTP/1.1\r\nHost: {asked.host}\r\nAccept: application/json\r\n{proof.PROBE}: {probe.header}"
        recorded.append(relay(port)(f"{request}\r\n\r\n".encode()))
    assert b"\r\nPromports-Answer: 1 " in recorded[0]
    assert listener.received
    with hostile(port, lambda request: recorded[0]):
        assert ask(port, site).reason == proof.FORGED


def test_a_probe_that_who_had_the_port_before_recorded_opens_nothing(free_ports: range) -> None:
    port = free_ports[0]
    with hostile(port, lambda request: b"") as listener:
        ask(port, Site("this", keys=[KEY]), "/metrics")
    (recorded,) = listener.received

    with endpoint([port], token=TOKEN, keys=[KEY]):
        answer = relay(port)(recorded)
        live = ask(port, Site(conf.PROMPORTS_SITE, keys=[KEY]), "/metrics")

    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nPromports-Answer: refused time\r\n" in answer
    assert live.state == "live"


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({}, ""),
        ({"address": "::ffff:127.0.0.1"}, ""),
        ({"address": "127.0.0.2"}, "address"),
        ({"address": "10.0.0.7", "host": "web1:19100"}, ""),  # forwarded, as by docker, to who is known as web1
        ({"address": "10.0.0.7", "host": "WEB1:19100"}, ""),
        ({"address": "10.0.0.7", "host": "web2:19100"}, "address"),
        ({"address": "127.0.0.2", "host": "web1:19100"}, "address"),  # what another user has on loopback
        ({"address": "::1", "host": "web1:19100"}, "address"),
    ],
    ids=str,
)
def test_a_probe_is_good_for_one_address_or_for_the_name_of_the_target(changed: dict[str, Any], refusal: str) -> None:
    asked = proof.Asked("127.0.0.1", 19100, "/", "127.0.0.1:19100")._replace(**changed)
    probe = proof.make_probe([OTHER_KEY, KEY], asked)

    # What the endpoint knows of it by itself is the address at which it arrived.
    found = proof.check_probe(probe.header, [KEY], asked._replace(address="127.0.0.1"), host="web1", age=5)

    assert found == refusal or (not refusal and isinstance(found, proof.Proof) and found.key == KEY)


@pytest.mark.parametrize(
    "changed", [{"port": 19101}, {"path": "/metrics"}, {"path": "/?x"}, {"host": "web1:19100"}], ids=str
)
def test_a_probe_is_good_for_what_was_asked_only(changed: dict[str, Any]) -> None:
    asked = proof.Asked("127.0.0.1", 19100, "/", "127.0.0.1:19100")
    probe = proof.make_probe([KEY], asked)

    assert proof.check_probe(probe.header, [KEY], asked._replace(**changed), host="", age=5) == "key"


@pytest.mark.parametrize(("seconds", "age", "good"), [(0, 5, True), (59, 100, True), (-59, 1, True), (61, 100, False)])
def test_a_probe_is_good_for_a_minute_and_not_from_before_the_claim(
    seconds: float, age: float, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = proof.Asked("127.0.0.1", 19100, "/", "127.0.0.1:19100")
    probe = proof.make_probe([KEY], asked)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)  # no machine has two clocks

    assert (proof.check_probe(probe.header, [KEY], asked, host="", age=age) != "time") == good
    monkeypatch.setattr(time, "time", lambda: now + 3)
    assert proof.check_probe(probe.header, [KEY], asked, host="", age=2.0) == "time"


@pytest.mark.parametrize(
    "header",
    [
        "1",
        "2 1.000000 " + "0" * 32 + " 127.0.0.1 " + "0" * 64,
        "1 nan " + "0" * 32 + " 127.0.0.1 " + "0" * 64,
        "1 " + "9" * 5000 + ".000000 " + "0" * 32 + " 127.0.0.1 " + "0" * 64,
        "1 1.000000 " + "0" * 32 + " ::::: ,,,,,,",
        "1 1.000000 " + "0" * 32 + " 127.0.0.1 " + ",".join(["0" * 64] * 200),
        "\xe9" * 100,
        "1 \u0661.000000 " + "0" * 32 + " 127.0.0.1 " + "0" * 64,
    ],
    ids=range(8),
)
def test_what_is_not_a_probe_is_refused(header: str) -> None:
    asked = proof.Asked("127.0.0.1", 19100, "/", "127.0.0.1:19100")

    assert proof.check_probe(header, [KEY], asked, host="", age=1e9) == "key"


def test_a_part_of_an_answer_that_was_changed_is_noticed() -> None:
    asked = proof.Asked("127.0.0.1", 19100, "/", "127.0.0.1:19100")
    probe = proof.make_probe([OTHER_KEY, KEY], asked)
    found = proof.check_probe(probe.header, [KEY], asked, host="", age=5)
    assert isinstance(found, proof.Proof)
    header = proof.sign_answer(found, 200, sha256(b"body").digest())

    assert proof.check_answer(probe, header, 200, b"body") == ""
    assert proof.check_answer(probe, header, 200, b"bodY") == proof.FORGED
    assert proof.check_answer(probe, header, 404, b"body") == proof.FORGED
    for other in (
        proof.make_probe([OTHER_KEY, KEY], asked),
        probe._replace(asked=asked._replace(port=19101)),
        probe._replace(asked=asked._replace(path="/metrics")),
        probe._replace(keys=[OTHER_KEY]),
    ):
        assert proof.check_answer(other, header, 200, b"body") == proof.FORGED
    for odd in ("1 \xe9", "1", "", "refused", "refused nothing", "3 x"):
        assert proof.check_answer(probe, odd, 200, b"body") in (proof.FORGED, proof.UNSIGNED)


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_worker_of_another_site_says_that_it_does_not_know_us(token: str | None, free_ports: range) -> None:
    with endpoint(free_ports, site="this", token=token, keys=[OTHER_KEY]) as port:
        found = ask(port, Site("this", keys=[KEY]))

    assert found.state == "other"
    assert found.reason.endswith(proof.REFUSALS["key"])


def test_a_probe_opens_what_the_token_opens_and_a_wrong_one_does_not(free_ports: range) -> None:
    with endpoint(free_ports, site="this", token=TOKEN, keys=[KEY]) as port:
        states = {path: ask(port, Site("this", keys=[KEY]), path).state for path in ("/", "/?activity", "/metrics")}
        wrong = ask(port, Site("this", keys=[OTHER_KEY]), "/metrics")

    assert states == {"/": "live", "/?activity": "live", "/metrics": "live"}
    assert wrong.reason.startswith("the endpoint answers '401 Unauthorized'")
    assert wrong.body == b""


def test_an_answer_that_is_an_error_is_signed_as_well(free_ports: range) -> None:
    with endpoint(free_ports, site="this", keys=[KEY]) as port:
        found = ask(port, Site("this", keys=[KEY]), "/missing")

    assert found == Answer(State.OTHER, seconds=found.seconds, reason="the endpoint answers '404 Not Found'")


def test_a_token_that_cannot_be_read_shows_in_what_the_commands_see(
    free_ports: range, settings: Settings, tmp_path: Path, this_process: None
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    token = tmp_path / "token"
    token.write_text(TOKEN)
    settings.PROMPORTS_BEARER_TOKEN_FILE = token
    port, site = django_promports.start(), conf.site
    assert port is not None
    token.unlink()

    found = ask(port, site, "/metrics")

    assert (found.state, found.reason) == ("other", "the endpoint answers '500 Internal Server Error'")


@needs_ipv6
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_worker_on_every_interface_is_live_at_each(
    token: str | None, host: str, free_ports: range, settings: Settings, this_process: None, tmp_path: Path
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    settings.PROMPORTS_ADDRESS = "::"
    (tmp_path / "token").write_text(TOKEN)
    settings.PROMPORTS_BEARER_TOKEN_FILE = tmp_path / "token" if token else None
    port = django_promports.start()
    assert port is not None

    assert ask(port, conf.site, "/", host).state == "live"


def test_a_long_answer_is_signed_whole(free_ports: range) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("cups", "Cups.", ["x"], registry=registry)
    for number in range(20_000):
        gauge.labels("x" * 100 + str(number))
    with endpoint(free_ports, site="this", keys=[KEY], registry=registry) as port:
        found = ask(port, Site("this", keys=[KEY]), "/metrics")

    assert found.state == "live"
    assert probe.count_samples(found.body) == 20_000


def test_where_there_is_no_key_an_endpoint_is_believed_as_it_says(free_ports: range) -> None:
    with hostile(free_ports[0], pretend) as listener:
        assert ask(free_ports[0], Site("this")).state == "live"

    assert proof.PROBE.encode() not in listener.received[0]


# The keys of the site.


def test_the_best_key_is_the_secret_then_the_token_and_without_one_the_secret_key(
    settings: Settings, tmp_path: Path
) -> None:
    def keys() -> Sequence[bytes]:
        return tuple(conf.read_keys())

    folder = settings.PROMPORTS_LEDGER_DIR
    (by_secret_key,) = keys()
    (tmp_path / "token").write_text(TOKEN)
    settings.PROMPORTS_BEARER_TOKEN_FILE = tmp_path / "token"
    (by_token,) = keys()
    folder.mkdir(0o700)
    secret = make_secret(folder)
    assert keys() == (secret, by_token)
    settings.PROMPORTS_BEARER_TOKEN_FILE = None
    assert keys() == (secret, by_secret_key)
    settings.PROMPORTS_LEDGER_DIR = None
    assert keys() == (by_secret_key,)
    settings.SECRET_KEY = b"bytes are right too"
    assert keys() not in ((), (by_secret_key,))
    settings.SECRET_KEY = ""
    assert keys() == ()
    assert conf.site.keys == ()
    assert len({secret, by_token, by_secret_key}) == 3
    assert TOKEN.encode() not in by_token


def test_a_worker_makes_the_secret_and_reads_it_again_at_each_probe(
    free_ports: range, settings: Settings, this_process: None
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    folder = settings.PROMPORTS_LEDGER_DIR
    port = django_promports.start()
    assert port == free_ports[0]
    first = read_secret(folder)
    assert first is not None
    assert conf.site.keys[0] == first
    (folder / NAME).unlink()  # a program that cleans the temporary folder did it
    make_secret(folder)

    found = ask(port, Site(conf.PROMPORTS_SITE, keys=[read_secret(folder) or b""]))

    assert found.state == "live"
    assert ask(port, Site(conf.PROMPORTS_SITE, keys=[first])).state == "other"


def test_a_secret_that_cannot_be_made_is_said_once_and_the_ledger_is_used(
    free_ports: range, settings: Settings, this_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    folder = settings.PROMPORTS_LEDGER_DIR
    (folder / NAME).mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)

    port = django_promports.start()

    assert [record.getMessage() for record in caplog.records if "site secret" in record.getMessage()] != []
    assert (folder / f"{port}.ledger").exists()
    assert ask(free_ports[0], conf.site).state == "live"


def test_other_programs_are_still_other_programs(free_ports: range) -> None:
    with answering(free_ports[0], b"220 mail ESMTP\r\n"):
        found = ask(free_ports[0], Site("this", keys=[KEY]))

    assert found.reason == "another program has the port"


def test_a_peer_that_answers_without_end_ends_no_command(free_ports: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ASK_SECONDS", 0.5)
    monkeypatch.setattr(probe, "MAX_ABOUT_BYTES", 1 << 40)
    over = threading.Event()

    def stream() -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            while not over.is_set():
                peer.send(b"x" * 65536)

    with socket.create_server(("127.0.0.1", free_ports[1])) as listener:
        thread = threading.Thread(target=stream)
        thread.start()
        with contextlib.closing(Loop()) as loop, endpoint(free_ports[2:], site="this", keys=[KEY]) as port:
            asked = [("127.0.0.1", number) for number in (free_ports[1], port)]
            answers = loop.complete(probe.ask_all(loop, Site("this", keys=[KEY]), asked))
        over.set()
        thread.join()

    assert [answer.state for answer in answers] == ["silent", "live"]


def test_the_recorder_records() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with hostile(port, pretend) as listener:
        get(f"http://127.0.0.1:{port}/", Authorization=f"Bearer {TOKEN}")
        wait_until(lambda: listener.received, "it is recorded")

    assert TOKEN.encode() in listener.received[0]
