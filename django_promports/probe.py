"""Probing: asking ports over HTTP whether a worker of this site is there, and what it does.

An answer is not trusted: any program may hold the port. Only an endpoint that proves that it belongs to this site is
live, and of its answer only plausible values are kept.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from django_promports import proof
from django_promports.activity import KEPT_SECONDS, SAMPLE_SECONDS, Sample
from django_promports.loop import WRITE, Loop, Steps, attempt, receive, send_all
from django_promports.ports import resolve
from django_promports.targets import format_target

APPLICATION = "django_promports"
# Seconds for one port to answer: a worker's endpoint takes milliseconds, or seconds on an overloaded machine.
ASK_SECONDS = 3.0
MAX_ANSWER_BYTES = 256 * 1024 * 1024
# A worker describes itself in a few kB; more comes from another program.
MAX_ABOUT_BYTES = 1024 * 1024
# Limits on what is kept or shown of an answer, which may come from another program.
MAX_SAMPLES = 4 * int(KEPT_SECONDS / SAMPLE_SECONDS)
MAX_TEXT = 200
MAX_NUMBER = 1e15


class State(str, Enum):
    """What a port does: a worker of this site answers, nothing listens, no answer comes in time, or something else."""

    LIVE = "live"
    FREE = "free"
    SILENT = "silent"
    OTHER = "other"

    # Formatted as its value in every version of Python: https://docs.python.org/3/library/enum.html#enum.StrEnum
    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]


class Role(str, Enum):
    """What a live process does at a port: count its own work there, or export the last counts of one that has ended."""

    WORKER = "worker"
    HEIR = "heir"

    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]


class Rival(NamedTuple):
    """Another site that has a port of the range, as it describes itself. What it does not tell is empty."""

    site: str = ""
    project: str = ""
    place: str = ""


class Answer(NamedTuple):
    """What a port answered. about: the JSON of /. seconds: how long it took. reason: why it is silent or other.

    rival: the endpoint of another site, if it is one. It is not authenticated.
    """

    state: State
    about: Mapping[str, Any] = {}
    body: bytes = b""
    seconds: float = 0.0
    reason: str = ""
    rival: Rival | None = None


class Scraped(NamedTuple):
    """The complete scrapes of a port: their number, who made the last one, how long ago, and how long after the former.

    What is not known is None or empty.
    """

    total: int
    by: str = ""
    seconds_ago: float | None = None
    interval_seconds: float | None = None


class Seen(NamedTuple):
    """What was found at a target. A value without a credible answer is None or empty.

    reason: why a scrape by Prometheus would fail; empty if it would not, or if nothing listens. series, scrape_seconds:
    of a scrape of /metrics. samples: its activity, as activity.Activity keeps it. role: of a live process; an heir
    serves the port for a worker that has ended. place: the folder of its code. ledger_folder: see folders.identify().
    rival: see Answer.
    """

    host: str
    port: int
    state: State
    reason: str = ""
    pid: int | None = None
    command: str = ""
    uptime: float | None = None
    series: int | None = None
    scrape_seconds: float | None = None
    samples: Sequence[Sample] = ()
    role: Role | None = None
    scraped: Scraped | None = None
    place: str = ""
    ledger_folder: str = ""
    rival: Rival | None = None

    @property
    def is_worker(self) -> bool:
        return self.state == State.LIVE and self.role != Role.HEIR

    @property
    def is_never_scraped(self) -> bool:
        return self.scraped is not None and not self.scraped.total


class Site(NamedTuple):
    """How the endpoints of one site are reached and recognised. Without keys, any endpoint of that name is believed."""

    name: str
    tls: ssl.SSLContext | None = None
    keys: Sequence[bytes] = ()


def ask_all(loop: Loop, site: Site, targets: Iterable[tuple[str, int]], path: str = "/") -> Steps[list[Answer]]:
    """Ask each (host, port) for a path and return the answers in order."""
    answers = yield from loop.gather((ask(site, host, port, path) for host, port in targets), ASK_SECONDS)
    return [answer or _silent() for answer in answers]


def survey(loop: Loop, site: Site, address: str, ports: Sequence[int]) -> Steps[list[Seen]]:
    """Ask each port of this machine for its state and its recent activity, without a scrape."""
    return (yield from look(loop, site, address, ports, "/?activity"))


def look(loop: Loop, site: Site, address: str, ports: Sequence[int], path: str = "/") -> Steps[list[Seen]]:
    """Ask each port of this machine what it is, without a scrape and without its activity."""
    answers = yield from ask_all(loop, site, [(address, port) for port in ports], path)
    return [read(address, port, answer) for port, answer in zip(ports, answers, strict=True)]


def inspect(loop: Loop, site: Site, targets: Mapping[str, Sequence[int]]) -> Steps[list[Seen]]:
    """Ask each port of each host for its state, and scrape those that are live."""

    def visit(host: str, port: int) -> Steps[Seen]:
        try:
            return read(host, port, (yield from ask(site, host, port)))
        except ValueError as error:
            return Seen(host, port, State.OTHER, str(error))

    def scrape(seen: Seen) -> Steps[Seen]:
        answer = yield from ask(site, seen.host, seen.port, "/metrics")
        if answer.state != State.LIVE:
            return seen._replace(reason=f"/metrics: {answer.reason}")
        # The body is not kept: many thousand expositions would not fit into memory.
        return seen._replace(series=count_samples(answer.body), scrape_seconds=round(answer.seconds, 4))

    asked = [(host, port) for host, numbers in targets.items() for port in numbers]
    visited = yield from loop.gather((visit(*target) for target in asked), ASK_SECONDS)
    found = [seen or read(*target, _silent()) for target, seen in zip(asked, visited, strict=True)]
    live = [seen for seen in found if seen.state == State.LIVE]
    scraped = yield from loop.gather(map(scrape, live), ASK_SECONDS)
    late = f"/metrics: {_silent().reason}"
    results = iter([after or before._replace(reason=late) for before, after in zip(live, scraped, strict=True)])
    return [next(results) if seen.state == State.LIVE else seen for seen in found]


def read(host: str, port: int, answer: Answer) -> Seen:
    """Return the plausible values of an answer."""
    about = answer.about
    return Seen(
        host,
        port,
        answer.state,
        answer.reason[:MAX_TEXT],
        _whole(about.get("pid")),
        _text(about.get("command")),
        _number(about.get("uptime_seconds")),
        _whole(about.get("series")),
        samples=_read_samples(about.get("activity")),
        role=_read_role(answer),
        scraped=read_scraped(about.get("scrapes")),
        place=_text(about.get("place")),
        ledger_folder=_text(about.get("ledger_folder")),
        rival=answer.rival,
    )


def find_live(
    loop: Loop, site: Site, targets: Mapping[str, Sequence[int]], known: Mapping[str, Sequence[int]] = {}
) -> Steps[dict[str, list[int]]]:
    """Ask each port of each host, and return the ports at which a worker of this site answers, by host.

    known: where workers were live before. One that is silent now still counts: it is overloaded or hangs, and
    Prometheus must see that. Raises ValueError if a host has no address.
    """
    asked = [(host, port) for host, numbers in targets.items() for port in numbers]
    answers = yield from ask_all(loop, site, asked)
    live: dict[str, list[int]] = {host: [] for host in targets}
    for (host, port), answer in zip(asked, answers, strict=True):
        if answer.state == State.LIVE or (answer.state == State.SILENT and port in known.get(host, ())):
            live[host].append(port)
    return live


def ask(site: Site, host: str, port: int, path: str = "/") -> Steps[Answer]:
    """Ask a port for a path; only an endpoint that proves that it belongs to this site is `live`.

    Raises ValueError if the host has no address.
    """
    began = time.monotonic()
    is_about = path.partition("?")[0] == "/"
    try:
        probe, head, body = yield from _fetch(site, host, port, path, MAX_ABOUT_BYTES if is_about else MAX_ANSWER_BYTES)
    except socket.gaierror:
        raise ValueError(f"{host!r} has no address") from None
    except ConnectionRefusedError:
        return Answer(State.FREE)
    except (OSError, ValueError) as error:
        return Answer(State.OTHER, reason=str(error))
    seconds = time.monotonic() - began

    def other(reason: str, rival: Rival | None = None) -> Answer:
        return Answer(State.OTHER, seconds=seconds, reason=reason, rival=rival)

    lines = head.decode("latin-1").split("\r\n")
    status = re.match(r"HTTP/1\.[01] (\d{3}) ", lines[0])
    if not status or f"Server: {APPLICATION}" not in lines:
        return other("another program has the port")
    header = next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{proof.ANSWER}:")), "")
    doubt = proof.check_answer(probe, header, int(status[1]), body)
    if status[1] != "200":
        rival = Rival() if doubt == proof.REFUSALS["key"] else None
        return other(f"the endpoint answers {lines[0][9:89]!r}" + (f": {doubt}" if doubt else ""), rival)
    about: Mapping[str, Any] = {}
    if is_about:
        try:
            about = json.loads(body)
            application, name = about["application"], about.get("site")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return other("its answer is malformed")
        if name is None:  # before version 0.2, endpoints had neither a site nor a signature
            return other(doubt or proof.UNSIGNED)
        if application != APPLICATION or name != site.name:
            rival = Rival(*(_text(about.get(key)) for key in ("site", "project", "place")))
            return other(f"it is the endpoint of another site, {name!r:.80}", rival)
    return other(doubt) if doubt else Answer(State.LIVE, about, body, seconds)


def count_samples(exposition: bytes) -> int:
    """Return how many samples an exposition holds."""
    return sum(1 for line in exposition.splitlines() if line and not line.startswith(b"#"))


def _fetch(site: Site, host: str, port: int, path: str, limit: int) -> Steps[tuple[proof.Probe, bytes, bytes]]:
    """Return the probe that was sent, and head and body of the answer."""
    sock = yield from _connect(host, port)
    try:
        target = format_target(host, port)
        probe = proof.make_probe(site.keys, proof.Asked(sock.getpeername()[0], port, path, target))
        if site.tls:
            sock = tls = site.tls.wrap_socket(sock, do_handshake_on_connect=False)
            yield from attempt(tls, tls.do_handshake, WRITE)
        # Without the token: any program may hold the port, and nothing is known of it before it has answered.
        lines = [f"GET {path} HTTP/1.1", f"Host: {target}", "Accept: application/json"]
        if site.keys:
            lines.append(f"{proof.PROBE}: {probe.header}")
        yield from send_all(sock, "\r\n".join([*lines, "Connection: close", "", ""]).encode())
        received = bytearray()
        while chunk := (yield from receive(sock)):
            received += chunk
            if len(received) > limit:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    finally:
        sock.close()
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return probe, head, body


def _connect(host: str, port: int) -> Steps[socket.socket]:
    """Connect to the first address of the host that accepts."""
    try:
        addresses = [resolve(host, port)]
    except ValueError:  # a name: commands may ask by name, endpoints never do
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [(family, address) for family, _, _, _, address in infos]
    error = 0
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        connected = False
        try:
            sock.setblocking(False)
            error = sock.connect_ex(address)
            if error in (errno.EINPROGRESS, errno.EWOULDBLOCK):  # the second on Windows
                yield sock, WRITE
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            connected = error == 0
        finally:
            if not connected:
                sock.close()
        if connected:
            return sock
    raise OSError(error, os.strerror(error))


def _silent() -> Answer:
    return Answer(State.SILENT, reason=f"no answer in {ASK_SECONDS:g} s")


def _text(value: Any) -> str:
    """Return a text of another process so that it can be shown."""
    text = value[:MAX_TEXT] if isinstance(value, str) else ""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _number(value: Any) -> float | None:
    # The comparison is false for NaN, and for integers that are too large for a float.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER:
        return float(value)
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and _number(value) is not None else None


def _read_role(answer: Answer) -> Role | None:
    """Return the role of a live process. One that names none is a worker with an older version."""
    if answer.state != State.LIVE:
        return None
    return Role.HEIR if answer.about.get("role") == Role.HEIR.value else Role.WORKER


def read_scraped(value: Any) -> Scraped | None:
    """Return what an answer tells of scrapes; None if it is malformed."""
    if not isinstance(value, dict) or (count := _whole(value.get("total"))) is None:
        return None
    by, ago, interval = value.get("by"), _number(value.get("seconds_ago")), _number(value.get("interval_seconds"))
    if not count or not isinstance(by, str) or not re.fullmatch(r"[0-9a-zA-Z.:%_-]{1,64}", by) or ago is None:
        return Scraped(0) if count == 0 else None
    return Scraped(count, by, ago, interval or None)


def _read_samples(value: Any) -> list[Sample]:
    """Return the samples of an answer; none of them if one is malformed."""
    if not isinstance(value, list) or len(value) > MAX_SAMPLES:
        return []
    samples: list[Sample] = []
    for row in value:
        numbers = [number for number in map(_number, row) if number is not None] if isinstance(row, list) else []
        if len(numbers) != 4 or len(row) != 4 or (samples and numbers[0] > samples[-1].ago):
            return []
        samples.append(Sample(*numbers))
    return samples
