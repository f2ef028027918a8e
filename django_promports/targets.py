"""Targets: the groups that Prometheus reads, asking ports whether they answer, and writing the file.

Formats: https://prometheus.io/docs/prometheus/latest/configuration/configuration/#file_sd_config
and https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import re
import socket
import ssl
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from django_promports import proof
from django_promports.loop import WRITE, Loop, Steps, attempt, receive, send_all
from django_promports.ports import resolve

APPLICATION = "django_promports"
# Seconds for one port to answer: a worker's endpoint takes milliseconds, seconds where the machine is overloaded.
ASK_SECONDS = 3.0
MAX_ANSWER_BYTES = 256 * 1024 * 1024
# What a worker says of itself is a few kB; more is another program's.
MAX_ABOUT_BYTES = 1024 * 1024
# Targets of a document that are in memory together: so many that it goes fast.
TARGETS_AT_ONCE = 1000
# Of a list of hosts that is wrong in every line a person wants to see some.
LINES_TOLD = 20

_quote = json.encoder.encode_basestring


class TargetGroup(TypedDict):
    targets: Iterable[str]
    labels: dict[str, str]


class Answer(NamedTuple):
    """What a port said. state is one of live, free, silent, other; reason says why it is one of the last two."""

    state: str
    about: Mapping[str, Any] = {}
    body: bytes = b""
    seconds: float = 0.0
    reason: str = ""


class Seen(NamedTuple):
    """What a look at a target found. scrape is None where no worker is live; its `about` has the number of series."""

    host: str
    port: int
    answer: Answer
    scrape: Answer | None

    @property
    def problem(self) -> str:
        """Why Prometheus would not have this target's metrics; empty where it would, and where no process is."""
        if self.scrape is not None and self.scrape.state != "live":
            return f"/metrics: {self.scrape.reason}"
        return self.answer.reason


class Site(NamedTuple):
    """How the endpoints of one site are reached and known. Without keys any endpoint that says so is believed."""

    project: str
    tls: ssl.SSLContext | None = None
    keys: Sequence[bytes] = ()


def check_host(host: str) -> str:
    """Return the host without brackets. Raises ValueError if it is no host name or IP address."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if _is_ipv6(bare):
        return bare
    if re.fullmatch(r".*:\d+", bare):
        raise ValueError(f"{host!r} has a port in it; the ports come from PROMPORTS_PORT_RANGE")
    if not re.fullmatch(r"(?=.{1,253}\.?$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", bare):
        raise ValueError(f"{host!r} is no host name and no IP address")
    return bare


def parse_hosts(lines: Iterable[str]) -> list[str]:
    """Return the hosts of a list with one on each line; blank lines and what follows a # are left out.

    Raises ValueError, which names every line that is wrong.
    """
    places: dict[str, int] = {}
    hosts, wrong = [], []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            host = check_host(text)
            if (place := places.setdefault(host.lower().rstrip("."), number)) != number:
                raise ValueError(f"{text!r} is in line {place} already")
            hosts.append(host)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = [f"and {len(wrong) - LINES_TOLD} more"] if len(wrong) > LINES_TOLD else []
        raise ValueError("\n".join([*wrong[:LINES_TOLD], *more]))
    if not hosts:
        raise ValueError("it names no host")
    return hosts


def check_label(name: object, value: object) -> None:
    """Raise ValueError if Prometheus would refuse the label, or drop it."""
    # https://prometheus.io/docs/concepts/data_model/#metric-names-and-labels
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name):
        raise ValueError(f"{name!r} is no label name; use letters, digits and underscores, no digit first")
    if name.startswith("__"):
        raise ValueError(f"{name!r} begins with two underscores, which are Prometheus' own")
    if not isinstance(value, str):
        raise ValueError(f"the value of {name!r} is {value!r}, no string")
    if not value.isprintable():
        raise ValueError(f"the value of {name!r} is {value!r}, which no person can read")


def format_target(host: str, port: int) -> str:
    """Return host:port, with the brackets that an IPv6 address needs."""
    return f"{_format_host(host)}:{port}"


def target_groups(
    targets: Mapping[str, Sequence[int]],
    *,
    labels: Mapping[str, str],
    ports: Sequence[int] = (),
    scheme: str = "http",
) -> Iterator[TargetGroup]:
    """Yield the target groups of hosts with their ports: one, or one per port with a `worker` label if `ports` is set.

    `worker` is the place of the port in `ports`, counted from 0. The targets of a group are made while they are read.
    """
    common = dict(labels)
    if scheme != "http":
        common["__scheme__"] = scheme
    hosts = {_format_host(host): numbers for host, numbers in targets.items() if numbers}
    if not ports and hosts:
        yield {"targets": (f"{host}:{port}" for host, numbers in hosts.items() for port in numbers), "labels": common}
    for worker, port in enumerate(ports):
        members = [host for host, numbers in hosts.items() if port in numbers]
        if members:
            yield {"targets": map(f"{{}}:{port}".format, members), "labels": {**common, "worker": str(worker)}}


def dump_json(groups: Iterable[TargetGroup]) -> Iterator[bytes]:
    """Yield what json.dumps(indent=2) returns, piece by piece."""
    opening = "[\n"
    for group in groups:
        separator = f'{opening}  {{\n    "targets": [\n      '
        for some in _batches(group["targets"]):
            yield (separator + ",\n      ".join(map(_quote, some))).encode()
            separator = ",\n      "
        labels = json.dumps(group["labels"], indent=2, ensure_ascii=False).replace("\n", "\n    ")
        yield f'\n    ],\n    "labels": {labels}\n  }}'.encode()
        opening = ",\n"
    yield b"[]\n" if opening == "[\n" else b"\n]\n"


def dump_yaml(groups: Iterable[TargetGroup]) -> Iterator[bytes]:
    """Yield a YAML document. A JSON string is a YAML string too: https://yaml.org/spec/1.2.2/#json-compatibility."""
    empty = True
    for group in groups:
        empty = False
        yield b"- targets:\n"
        for some in _batches(group["targets"]):
            yield "".join(f"    - {_quote(target)}\n" for target in some).encode()
        if group["labels"]:
            lines = (f"    {_quote(name)}: {_quote(value)}\n" for name, value in group["labels"].items())
            yield "".join(["  labels:\n", *lines]).encode()
    if empty:
        yield b"[]\n"


def dump_kubernetes(
    name: str, ports: Sequence[int], *, labels: Mapping[str, str], worker: bool, scheme: str, secret: bool
) -> Iterator[bytes]:
    """Yield the named ports of the container, and a PodMonitor that scrapes each of them in every pod of this name.

    labels: of every target. worker: label each with its place in the range. secret: send the token that is in a secret.
    https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.PodMonitor
    """

    def lines() -> Iterator[str]:
        yield "# Into the container, in the template of the pods:\nports:\n"
        yield from (f"  - {{name: metrics-{port}, containerPort: {port}}}\n" for port in ports)
        yield "---\n# Beside it; the selector is that of your pods.\n"
        yield "apiVersion: monitoring.coreos.com/v1\nkind: PodMonitor\n"
        yield f"metadata:\n  name: {_quote(name)}\nspec:\n"
        yield f"  selector:\n    matchLabels:\n      app.kubernetes.io/name: {_quote(name)}\n  podMetricsEndpoints:\n"
        for place, port in enumerate(ports):
            yield f"    - port: metrics-{port}\n      path: /metrics\n      scheme: {scheme}\n"
            if secret:
                yield f"      authorization:\n        credentials: {{name: {name}-metrics, key: token}}\n"
            if targeted := {**labels, **({"worker": str(place)} if worker else {})}:
                yield "      relabelings:\n"
            for label, value in targeted.items():
                replacement = _quote(value.replace("$", "$$"))  # a single one begins a reference
                yield f"        - {{targetLabel: {_quote(label)}, replacement: {replacement}}}\n"

    return (line.encode() for line in lines())


def write_file(path: Path, content: Callable[[], Iterable[bytes]]) -> bool:
    """Put the content in the file, so that a reader sees the old one or the new one; False if it was there already.

    Prometheus watches the folder, so an unchanged file is left untouched, and the temporary one has a name that
    no file_sd pattern matches. The content is made twice, once to compare. Raises OSError, and leaves the old file as
    it was; a symbolic link is an error too, because Prometheus would not notice what changes behind it.
    """
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            is_folder, is_link = stat.S_ISDIR(mode), stat.S_ISLNK(mode)
            what = "a directory" if is_folder else "a symbolic link" if is_link else "no regular file"
            raise OSError(errno.EISDIR if is_folder else errno.EINVAL, f"Is {what}")
        with path.open("rb") as old:
            if all(old.read(len(piece)) == piece for piece in content()) and not old.read(1):
                return False
    except FileNotFoundError:
        pass
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            if sys.platform != "win32":  # which has no such modes
                os.fchmod(file.fileno(), 0o644)  # Prometheus runs as another user
            file.writelines(content())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return True


def ask_all(loop: Loop, site: Site, targets: Iterable[tuple[str, int]], path: str = "/") -> Steps[list[Answer]]:
    """Ask each (host, port) for a path and return the answers in order."""
    answers = yield from loop.gather((ask(site, host, port, path) for host, port in targets), ASK_SECONDS)
    return [answer or _silent() for answer in answers]


def look(loop: Loop, site: Site, targets: Mapping[str, Sequence[int]]) -> Steps[list[Seen]]:
    """Look at hosts at their ports: who is there, and whether a live worker's metrics can be scraped."""

    def visit(host: str, port: int) -> Steps[Answer]:
        try:
            return (yield from ask(site, host, port))
        except ValueError as error:
            return Answer("other", reason=str(error))

    def scrape(host: str, port: int) -> Steps[Answer]:
        answer = yield from ask(site, host, port, "/metrics")
        # Of many thousand targets nobody wants all expositions in memory.
        return answer._replace(about={"series": count_samples(answer.body)}, body=b"")

    asked = [(host, port) for host, numbers in targets.items() for port in numbers]
    answers = yield from loop.gather((visit(*target) for target in asked), ASK_SECONDS)
    live = [target for target, answer in zip(asked, answers, strict=True) if answer and answer.state == "live"]
    scrapes = yield from loop.gather((scrape(*target) for target in live), ASK_SECONDS)
    scraped = {target: answer or _silent() for target, answer in zip(live, scrapes, strict=True)}
    return [
        Seen(*target, answer or _silent(), scraped.get(target)) for target, answer in zip(asked, answers, strict=True)
    ]


def find_live(
    loop: Loop, site: Site, targets: Mapping[str, Sequence[int]], known: Mapping[str, Sequence[int]] = {}
) -> Steps[dict[str, list[int]]]:
    """Ask hosts at their ports and return the ports at which a worker of this site answers, by host.

    known: where workers were live before. One that is silent now counts: it is overloaded or hangs, which Prometheus
    shall see. Raises ValueError if a host has no address.
    """
    asked = [(host, port) for host, numbers in targets.items() for port in numbers]
    answers = yield from ask_all(loop, site, asked)
    live: dict[str, list[int]] = {host: [] for host in targets}
    for (host, port), answer in zip(asked, answers, strict=True):
        if answer.state == "live" or (answer.state == "silent" and port in known.get(host, ())):
            live[host].append(port)
    return live


def ask(site: Site, host: str, port: int, path: str = "/") -> Steps[Answer]:
    """Ask a port for a path; only an endpoint that proves to be of this site is `live`.

    Raises ValueError if the host has no address.
    """
    began = time.monotonic()
    is_about = path.partition("?")[0] == "/"
    try:
        probe, head, body = yield from _fetch(site, host, port, path, MAX_ABOUT_BYTES if is_about else MAX_ANSWER_BYTES)
    except socket.gaierror:
        raise ValueError(f"{host!r} has no address") from None
    except ConnectionRefusedError:
        return Answer("free")
    except (OSError, ValueError) as error:
        return Answer("other", reason=str(error))
    seconds = time.monotonic() - began

    def other(reason: str) -> Answer:
        return Answer("other", seconds=seconds, reason=reason)

    lines = head.decode("latin-1").split("\r\n")
    status = re.match(r"HTTP/1\.[01] (\d{3}) ", lines[0])
    if not status or f"Server: {APPLICATION}" not in lines:
        return other("another program has the port")
    header = next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{proof.ANSWER}:")), "")
    doubt = proof.check_answer(probe, header, int(status[1]), body)
    if status[1] != "200":
        return other(f"the endpoint answers {lines[0][9:89]!r}" + (f": {doubt}" if doubt else ""))
    about: Mapping[str, Any] = {}
    if is_about:
        try:
            about = json.loads(body)
            application, project = about["application"], about["project"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return other("it answers garbage")
        if application != APPLICATION or project != site.project:
            return other(f"it is the endpoint of another site, {project!r:.80}")
    return other(doubt) if doubt else Answer("live", about, body, seconds)


def count_samples(exposition: bytes) -> int:
    """Return how many samples an exposition holds."""
    return sum(1 for line in exposition.splitlines() if line and not line.startswith(b"#"))


def client_tls(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """Return a context for asking this site's endpoints, with the site's own certificate for those that want one.

    The endpoints' certificate is not verified: it names the host for Prometheus, and this asks on this machine.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(certfile, keyfile, password="")  # never a prompt
    return context


def _fetch(site: Site, host: str, port: int, path: str, limit: int) -> Steps[tuple[proof.Probe, bytes, bytes]]:
    """Return the probe that was sent, and head and body of the answer."""
    sock = yield from _connect(host, port)
    try:
        target = format_target(host, port)
        probe = proof.make_probe(site.keys, proof.Asked(sock.getpeername()[0], port, path, target))
        if site.tls:
            sock = tls = site.tls.wrap_socket(sock, do_handshake_on_connect=False)
            yield from attempt(tls, tls.do_handshake, WRITE)
        # No token: any program may have the port, and nothing is known of it before it has answered.
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


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _silent() -> Answer:
    return Answer("silent", reason=f"no answer in {ASK_SECONDS:g} s")


def _format_host(host: str) -> str:
    return f"[{host}]" if _is_ipv6(host) else host


def _batches(targets: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(targets)
    while batch := list(islice(remaining, TARGETS_AT_ONCE)):
        yield batch
