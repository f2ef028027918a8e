"""Management commands, and the endpoints and programs that they query."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from hashlib import sha256
from io import StringIO

from django.core.management import call_command
from prometheus_client import CollectorRegistry

from demo_site.settings import SECRET_KEY
from django_promports import ports, proof
from django_promports.activity import Activity
from django_promports.binding import Binding
from django_promports.conf import conf
from django_promports.endpoint import Endpoint
from django_promports.loop import Loop, Steps
from django_promports.page.overview import Overview
from django_promports.routes import Routes
from django_promports.scrape.exposition import Exposition
from django_promports.secret import derive_key
from tests.servers import ROOT

# The demo site in other processes. In this one, pytest hides the name of the settings module.
DEMO = f"demo_site.settings-{derive_key(SECRET_KEY.encode(), 'site').hex()[:8]}"
# Root can write to read-only folders and bind privileged ports.
BECOME_NOBODY = "import os\nif os.getuid() == 0: os.setuid(65534)\n"


def call(*arguments: str) -> tuple[str, str]:
    """Call a command in this process; return what it printed to standard output and to standard error."""
    out, err = StringIO(), StringIO()
    call_command(*arguments, stdout=out, stderr=err, no_color=True)
    return out.getvalue(), err.getvalue()


def run_python(code: str, *arguments: str, seconds: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process in which the project can be imported."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "demo_site.settings", **env},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@contextlib.contextmanager
def endpoint(
    range_: Sequence[int],
    *,
    site: str | None = None,
    tls: ssl.SSLContext | None = None,
    token: str | None = None,
    keys: Sequence[bytes] | None = None,
    registry: CollectorRegistry | None = None,
    **about: object,
) -> Iterator[int]:
    """Serve an endpoint on the lowest free port: of this site, unless another site or other keys are given."""
    claim = ports.claim("127.0.0.1", range_)
    names = {"project": site or conf.project, "site": site or conf.PROMPORTS_SITE}
    described = {"application": "django_promports", **names, **about}
    routes = Routes(
        about=lambda: described,
        find_targets=_find_none,
        survey=survey_nothing,
        exposition=Exposition(Binding(registry or CollectorRegistry())),
        activity=Activity(registry or CollectorRegistry()),
        read_token=lambda: token,
        read_keys=conf.read_keys if keys is None else lambda: keys,
    )
    served = Endpoint(claim.listener, routes, tls=tls)
    served.start()
    try:
        yield claim.port
    finally:
        served.stop()


def _find_none(loop: Loop) -> Steps[bytes]:
    yield from ()
    return b"[]"


def survey_nothing(loop: Loop) -> Steps[Overview]:
    yield from ()
    return Overview(conf.project, (), [], 0, "http://127.0.0.1")


def sign(request: bytes, body: bytes) -> bytes:
    """Return the signed answer of an endpoint of this site to a probe, for tests that play an endpoint."""
    lines = request.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    host = headers["Host"]
    asked = proof.Asked("127.0.0.1", int(host.rpartition(":")[2]), lines[0].split()[1], host)
    probe = proof.check_probe(headers[proof.PROBE], conf.read_keys(), asked, host="", age=60)
    assert isinstance(probe, proof.Proof), probe
    mac = proof.sign_answer(probe, 200, sha256(body).digest())
    return f"HTTP/1.1 200 OK\r\nServer: django_promports\r\n{proof.ANSWER}: {mac}\r\n\r\n".encode() + body


@contextlib.contextmanager
def answering(port: int, answer: bytes) -> Iterator[None]:
    """Answer each connection to the port with these bytes, then close it."""

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:  # shut down
                return
            with peer:
                peer.recv(65536)
                peer.sendall(answer)

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
