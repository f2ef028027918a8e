"""The matrix of web servers: each with several workers, recycled, and with one of them killed. docs/servers.md shows it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.matrix import YES, Row, versions
from tests.servers import ROOT, Site, send_requests, serving

pytestmark = pytest.mark.servers

WSGI, ASGI = "demo_site.wsgi:application", "demo_site.asgi:application"
BIND = "127.0.0.1:{port}"
GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "demo_site/gunicorn.conf.py", "--no-control-socket", "-b", BIND]
OLD_GUNICORN = [word for word in GUNICORN if word != "--no-control-socket"]
UWSGI = ["uwsgi", "--http-socket", BIND, "--module", "demo_site.wsgi", "--processes", "4", "--die-on-term"]
MASTER = ["--master", "--enable-threads"]
RECYCLED = 25


def hang_up(site: Site) -> None:
    """Let the server replace its workers, and wait until it has."""
    before = set(site.live().values())
    os.kill(site.child.pid, signal.SIGHUP)
    site.child.wait_until(
        lambda: len(live := set(site.live().values())) == len(before) and not live & before, "all workers are new"
    )


def grow_and_shrink(site: Site) -> None:
    before = len(site.live())
    os.kill(site.child.pid, signal.SIGTTIN)
    site.wait_for_workers(before + 1)
    os.kill(site.child.pid, signal.SIGTTOU)
    site.wait_for_workers(before)


def outlive_requests(site: Site) -> None:
    """The workers were told to end after some requests: wait until all are there again."""
    site.wait_for_workers()


class Server(NamedTuple):
    """A server as its documentation says to start it, and what is done to it.

    recycle: what the table says of it, and what does it. kill: whether the server replaces a worker that was killed.
    """

    name: str
    packages: tuple[str, ...]
    mode: str
    words: list[str]
    workers: int = 4
    recycle: tuple[str, Callable[[Site], None]] | None = None
    kill: bool = True
    notes: str = ""
    env: dict[str, str] = {}


def gunicorn_servers() -> list[Server]:
    kinds = {
        "sync": ["-k", "sync"],
        "gthread": ["-k", "gthread", "--threads", "4"],
        "gevent": ["-k", "gevent"],
        "asgi": ["-k", "asgi", ASGI],
        "uvicorn_worker": ["-k", "uvicorn_worker.UvicornWorker", ASGI],
    }
    extra = {"gevent": ("gevent",), "uvicorn_worker": ("uvicorn-worker", "uvicorn")}
    servers = []
    for kind, options in kinds.items():
        packages = ("gunicorn", *extra.get(kind, ()))
        words = [*GUNICORN, "-w", "4", *options]
        hup = ("HUP", hang_up)
        servers.append(Server("gunicorn", packages, kind, words, recycle=hup))
        limit = ["--max-requests", str(RECYCLED)]
        servers.append(
            Server(
                "gunicorn", packages, f"{kind}, --max-requests", [*words, *limit], recycle=("each", outlive_requests)
            )
        )
        if kind == "gevent":
            words = [*words, "-c", "{patched}"]
        notes = "`monkey.patch_all()` at the top of gunicorn.conf.py, as Django needs it" if kind == "gevent" else ""
        servers.append(
            Server("gunicorn", packages, f"{kind}, --preload", [*words, "--preload"], recycle=hup, notes=notes)
        )
    return servers


SERVERS = [
    *gunicorn_servers(),
    Server(
        "gunicorn",
        ("gunicorn",),
        "sync, TTIN and TTOU",
        [*GUNICORN, "-w", "4"],
        recycle=("TTIN, TTOU", grow_and_shrink),
    ),
    Server("uWSGI", ("pyuwsgi",), "lazy-apps", [*UWSGI, *MASTER, "--lazy-apps"], recycle=("HUP", hang_up)),
    Server("uWSGI", ("pyuwsgi",), "preforking", [*UWSGI, *MASTER], recycle=("HUP", hang_up)),
    Server(
        "uWSGI",
        ("pyuwsgi",),
        "preforking, py-call-uwsgi-fork-hooks",
        [*UWSGI, *MASTER, "--py-call-uwsgi-fork-hooks"],
        recycle=("HUP", hang_up),
    ),
    Server(
        "uWSGI",
        ("pyuwsgi",),
        "preforking, py-call-osafterfork",
        [*UWSGI, *MASTER, "--py-call-osafterfork"],
        recycle=("HUP", hang_up),
    ),
    Server(
        "uWSGI",
        ("pyuwsgi",),
        "preforking, max-requests",
        [*UWSGI, *MASTER, "--max-requests", str(RECYCLED)],
        recycle=("each", outlive_requests),
    ),
    Server(
        "uvicorn",
        ("uvicorn", "uvloop"),
        "--workers",
        ["uvicorn", "--port", "{port}", "--workers", "4", "--loop", "uvloop", ASGI],
        recycle=("HUP", hang_up),
    ),
    Server(
        "uvicorn",
        ("uvicorn",),
        "--limit-max-requests",
        ["uvicorn", "--port", "{port}", "--workers", "4", "--limit-max-requests", str(RECYCLED), ASGI],
        recycle=("each", outlive_requests),
    ),
    Server("hypercorn", ("hypercorn",), "--workers", ["hypercorn", "-b", BIND, "-w", "4", ASGI]),
    Server("hypercorn", ("hypercorn",), "--reload", ["hypercorn", "-b", BIND, "-w", "4", "--reload", ASGI]),
    Server(
        "granian",
        ("granian",),
        "wsgi",
        ["granian", "--interface", "wsgi", "--port", "{port}", "--workers", "4", "--respawn-failed-workers", WSGI],
        recycle=("HUP", hang_up),
    ),
    Server(
        "granian",
        ("granian",),
        "asgi",
        ["granian", "--interface", "asgi", "--port", "{port}", "--workers", "4", "--respawn-failed-workers", ASGI],
        recycle=("HUP", hang_up),
    ),
    Server("daphne", ("daphne",), "one process", ["daphne", "-p", "{port}", ASGI], workers=1, kill=False),
    Server("waitress", ("waitress",), "one process", ["waitress-serve", "--listen", BIND, WSGI], workers=1, kill=False),
]


@pytest.mark.parametrize("server", SERVERS, ids=[f"{server.name} {server.mode}" for server in SERVERS])
def test_every_answered_request_is_counted_once(server: Server, free_ports: range, tmp_path: Path, row: Row) -> None:
    patched = tmp_path / "patched.py"
    config = ROOT / "demo_site/gunicorn.conf.py"
    patched.write_text(f"from gevent import monkey\nmonkey.patch_all()\nexec(open({str(config)!r}).read())\n")
    words = [word.replace("{patched}", str(patched)) for word in server.words]
    answered = 0
    row.update(server=server.name, version=versions(*server.packages), mode=server.mode, notes=server.notes)

    def send(count: int) -> None:
        nonlocal answered
        answered += send_requests(count, lambda _: site.request(), threads=4).count(200)

    def is_exact() -> bool:
        return site.total() == answered

    with serving(tmp_path, free_ports, *words, **server.env) as site:
        live = site.wait_for_workers(server.workers)
        site.child.wait_until(site.is_listening, "the site is there")
        send(200)
        if server.recycle:
            what, recycle = server.recycle
            recycle(site)
            row["recycle"] = f"{YES} {what}"
        else:
            assert answered == 200
        site.child.wait_until(is_exact, f"{answered} requests are counted")
        live = site.wait_for_workers(server.workers)
        assert sorted(live) == list(free_ports[: server.workers])
        row.update(ports=str(server.workers), exact=YES)

        if server.kill:
            victim = live[free_ports[0]]
            os.kill(victim, signal.SIGKILL)
            site.child.wait_until(
                lambda: len(now := site.live()) == server.workers and victim not in now.values(),
                "another worker is in the place of the one killed",
            )
            send(20)
            site.child.wait_until(is_exact, f"{answered} requests are counted")
            row["kill"] = YES
        site.child.process.terminate()
        site.child.process.wait(30)
        site.child.wait_until(lambda: not site.child.survivors(), "no process is left")
    assert not any(site.live())

    if not server.kill:
        with serving(tmp_path, free_ports, *words, **server.env) as site:
            live = site.wait_for_workers(server.workers)
            os.kill(live[free_ports[0]], signal.SIGKILL)
            site.child.process.wait(30)
        with serving(tmp_path, free_ports, *words, **server.env) as site:
            site.wait_for_workers(server.workers)
            assert is_exact()
        row["kill"] = f"{YES} started again"
        row["recycle"] = f"{YES} started again"
