"""The matrix of web servers: each with several workers, recycled, with one killed. docs/servers.md shows it."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path
from typing import NamedTuple

import pytest

from django_promports.worker import SETTLED_SECONDS
from tests.matrix import YES, Row, versions
from tests.servers import ROOT, Site, children, database, describe, send_requests, serving

pytestmark = pytest.mark.servers

WSGI, ASGI = "demo_site.wsgi:application", "demo_site.asgi:application"
BIND = "127.0.0.1:{port}"
GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "demo_site/gunicorn.conf.py", "--no-control-socket", "-b", BIND]
# An installation of the oldest gunicorn that is still common, with a command line that it knows.
OLD_GUNICORN = os.environ.get("OLD_GUNICORN", "")
OLD_WORDS = [word for word in GUNICORN if word != "--no-control-socket"]
UWSGI = [
    "uwsgi",
    "--http-socket",
    BIND,
    "--module",
    "demo_site.wsgi",
    "--processes",
    "4",
    "--die-on-term",
    "--disable-logging",
]
MASTER = ["--master", "--enable-threads"]
# pyuwsgi reloads by executing the interpreter that its virtual environment is made from.
PACKAGES = {"PYTHONPATH": sysconfig.get_path("purelib")}
NOTE = "`HUP` makes pyuwsgi lose its virtual environment: have its packages in `PYTHONPATH`"
RECYCLED = 25
PATCHED = "`monkey.patch_all()` at the top of gunicorn.conf.py, as Django needs it"
RELOADER = "the supervisor loads the site, and frees its port for the first worker"
HYPERCORN = "it starts no other worker for a killed one: have the service restarted"


def settle(site: Site) -> None:
    """Wait until what follows is no part of the start: granian takes a killed worker for one that cannot start."""
    site.child.wait_until(
        lambda: all(describe(port)["uptime_seconds"] > SETTLED_SECONDS for port in site.live()), "the workers settle"
    )


def hang_up(site: Site) -> None:
    """Let the server replace its workers, and wait until it has."""
    settle(site)
    before = set(site.live().values())
    os.kill(site.child.pid, signal.SIGHUP)
    site.child.wait_until(
        lambda: len(live := set(site.live().values())) == len(before) and not live & before, "all workers are new"
    )


def shrink_and_grow(site: Site) -> None:
    before = len(site.live())
    os.kill(site.child.pid, signal.SIGTTOU)
    site.wait_for_workers(before - 1)
    os.kill(site.child.pid, signal.SIGTTIN)
    site.wait_for_workers(before)


def outlive_requests(site: Site) -> None:
    """The workers were told to end after some requests: wait until all are there again."""
    site.wait_for_workers()


class Server(NamedTuple):
    """A server as its documentation says to start it, and what is done to it.

    recycle: what the table says of it, and what does it. replaces: whether it starts another worker for a killed one.
    """

    name: str
    packages: tuple[str, ...]
    mode: str
    words: list[str]
    workers: int = 4
    recycle: tuple[str, Callable[[Site], None]] | None = None
    replaces: bool = True
    notes: str = ""
    env: dict[str, str] = {}


def gunicorn_servers(words: list[str], env: dict[str, str]) -> list[Server]:
    kinds = {
        "sync": ["-k", "sync"],
        "gthread": ["-k", "gthread", "--threads", "4"],
        "gevent": ["-k", "gevent"],
        "uvicorn_worker": ["-k", "uvicorn_worker.UvicornWorker", ASGI],
    }
    if not env:
        kinds["asgi"] = ["-k", "asgi", ASGI]
    extra = {"gevent": ("gevent",), "uvicorn_worker": ("uvicorn-worker", "uvicorn")}
    servers = []
    for kind, options in kinds.items():
        usual = Server("gunicorn", ("gunicorn", *extra.get(kind, ())), kind, [*words, "-w", "4", *options], env=env)
        limit = ["--max-requests", str(RECYCLED)]
        preload = ["--preload"] if kind != "gevent" else ["--preload", "-c", "{patched}"]
        servers += [
            usual._replace(recycle=("HUP", hang_up)),
            usual._replace(
                mode=f"{kind}, --max-requests", words=[*usual.words, *limit], recycle=("each", outlive_requests)
            ),
            usual._replace(
                mode=f"{kind}, --preload",
                words=[*usual.words, *preload],
                recycle=("HUP", hang_up),
                notes="`monkey.patch_all()` at the top of gunicorn.conf.py, as Django needs it"
                if kind == "gevent"
                else "",
            ),
        ]
    return servers


def uwsgi_servers() -> list[Server]:
    hup = ("HUP", hang_up)
    modes = {
        "lazy-apps": (["--lazy-apps"], hup),
        "preforking": ([], hup),
        "preforking, py-call-uwsgi-fork-hooks": (["--py-call-uwsgi-fork-hooks"], hup),
        "preforking, py-call-osafterfork": (["--py-call-osafterfork"], hup),
        "preforking, max-requests": (["--max-requests", str(RECYCLED)], ("each", outlive_requests)),
    }
    return [
        Server("uWSGI", ("pyuwsgi",), mode, [*UWSGI, *MASTER, *options], recycle=recycle, notes=NOTE, env=PACKAGES)
        for mode, (options, recycle) in modes.items()
    ]


SERVERS = [
    *gunicorn_servers(GUNICORN, {}),
    *gunicorn_servers(OLD_WORDS, {"PYTHONPATH": OLD_GUNICORN}),
    Server(
        "gunicorn",
        ("gunicorn",),
        "sync, TTOU and TTIN",
        [*GUNICORN, "-w", "4"],
        recycle=("TTOU, TTIN", shrink_and_grow),
    ),
    *uwsgi_servers(),
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
    Server(
        "hypercorn",
        ("hypercorn",),
        "--workers",
        ["hypercorn", "-b", BIND, "-w", "4", ASGI],
        replaces=False,
        notes=HYPERCORN,
    ),
    Server(
        "hypercorn",
        ("hypercorn",),
        "--reload",
        ["hypercorn", "-b", BIND, "-w", "4", "--reload", ASGI],
        replaces=False,
        notes=RELOADER,
    ),
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
    Server("daphne", ("daphne",), "one process", ["daphne", "-p", "{port}", ASGI], workers=1, replaces=False),
    Server(
        "waitress", ("waitress",), "one process", ["waitress-serve", "--listen", BIND, WSGI], workers=1, replaces=False
    ),
]


def name(server: Server) -> str:
    return f"{'old ' if 'PYTHONPATH' in server.env and server.name == 'gunicorn' else ''}{server.name} {server.mode}"


def find_versions(server: Server) -> str:
    if not name(server).startswith("old"):
        return versions(*server.packages)
    if not OLD_GUNICORN:
        missing = "OLD_GUNICORN names no folder with an installation of gunicorn 22"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    (old,) = distributions(name="gunicorn", path=[OLD_GUNICORN])
    return ", ".join([old.version, *(f"{other} {version(other)}" for other in server.packages[1:])])


@pytest.mark.parametrize("server", SERVERS, ids=map(name, SERVERS))
def test_every_answered_request_is_counted_once(server: Server, free_ports: range, tmp_path: Path, row: Row) -> None:
    row.update(Row(server=server.name, version=find_versions(server), mode=server.mode, notes=server.notes))
    patched = tmp_path / "patched.py"
    config = ROOT / "demo_site/gunicorn.conf.py"
    patched.write_text(f"from gevent import monkey\nmonkey.patch_all()\nexec(open({str(config)!r}).read())\n")
    words = [word.replace("{patched}", str(patched)) for word in server.words]
    answered = 0

    def send(count: int) -> None:
        nonlocal answered
        answered += send_requests(count, lambda _: site.request(), threads=4).count(200)

    def wait_until_exact() -> None:
        counted = 0.0

        def is_exact() -> bool:
            nonlocal counted
            counted = site.total()
            return counted == answered

        try:
            site.child.wait_until(is_exact, "every answered request is counted once", 15)
        except AssertionError as error:
            raise AssertionError(f"{counted} of {answered} requests are counted by {site.live()}") from error

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
        wait_until_exact()
        live = site.wait_for_workers(server.workers)
        assert sorted(live) == list(free_ports[: server.workers])
        row.update(Row(ports=str(server.workers), exact=YES))

        settle(site)
        victim = live[free_ports[0]]
        os.kill(victim, signal.SIGKILL)
        if server.replaces:
            site.child.wait_until(
                lambda: len(now := site.live()) == server.workers and victim not in now.values(),
                "another worker is in the place of the one killed",
            )
            send(20)
            wait_until_exact()
            row["kill"] = YES
        site.child.process.terminate()
        site.child.process.wait(30)
        site.child.wait_until(lambda: not site.child.survivors(), "no process is left")
    assert not any(describe(port) for port in free_ports)

    if not server.replaces:
        with serving(tmp_path, free_ports, *words, **server.env) as site:
            site.wait_for_workers(server.workers)
            wait_until_exact()
        row["kill"] = f"{YES} started again"
        if server.workers == 1:
            row["recycle"] = row["kill"]


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
def test_gunicorn_of_roots_with_workers_of_another_user(
    preload: list[str], free_ports: range, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may change the user")
    mode = ", ".join(["sync, started as root with --user and --group", *preload])
    row.update(Row(server="gunicorn", version=versions("gunicorn"), mode=mode))
    options = ["--user", "nobody", "--group", "nogroup", "--max-requests", str(RECYCLED), *preload]
    # The interpreter may lie in root's own folder, and the worker keeps only the right to read there.
    capabilities = "-all,+setuid,+setgid,+kill,+chown,+dac_read_search"
    may_read = ["setpriv", "--securebits", "+no_setuid_fixup", "--bounding-set", capabilities]
    # pytest's folders are root's as well.
    with tempfile.TemporaryDirectory() as folder:
        tmp_path = Path(folder)
        tmp_path.chmod(0o777)
        database(tmp_path).chmod(0o666)
        monkeypatch.setenv("DEMO_LEDGER_DIR", str(tmp_path / "ledgers"))
        for start in range(2):  # at the second one the folder is there, and not root's
            with serving(tmp_path, free_ports, *may_read, *GUNICORN, "-w", "4", *options) as site:
                site.wait_for_workers()
                answered = send_requests(200, lambda _: site.request(), threads=4).count(200)
                assert answered == 200
                site.child.wait_until(lambda: site.total() == 200 * (start + 1), "every request is counted once")  # noqa: B023
                site.wait_for_workers()
                assert "ERROR" not in site.child.output()
        owners = {path.owner() for path in [tmp_path / "ledgers", *(tmp_path / "ledgers").iterdir()]}
    assert owners == {"nobody"}
    row.update(Row(ports="4", exact=YES, recycle=f"{YES} each", notes="the ledgers are the user's"))


def test_gunicorn_that_executes_a_new_master(free_ports: range, tmp_path: Path, row: Row) -> None:
    row.update(Row(server="gunicorn", version=versions("gunicorn"), mode="sync, USR2, then TERM to the old master"))
    pidfile = tmp_path / "pid"
    # Not by `python -m`: executed again, it would find gunicorn's own package http in the place of the library's.
    words = [str(Path(sys.executable).with_name("gunicorn")), *GUNICORN[3:], "-w", "4", "--pid", str(pidfile)]
    with serving(tmp_path, free_ports, *words) as site:
        site.wait_for_workers()
        answered = send_requests(200, lambda _: site.request(), threads=4).count(200)
        settle(site)
        old = set(site.live().values())
        os.kill(site.child.pid, signal.SIGUSR2)
        second = Path(f"{pidfile}.2")
        new = int(site.child.wait_until(lambda: second.exists() and second.read_text(), "there is a new master"))
        site.child.wait_until(lambda: len(children(new)) == 4, "the new master has its workers")
        os.kill(site.child.pid, signal.SIGTERM)
        site.child.wait_until(
            lambda: len(live := set(site.live().values())) == 4 and not live & old, "the new workers have ports"
        )
        answered += send_requests(100, lambda _: site.request(), threads=4).count(200)

        assert sorted(site.live()) == list(free_ports[:4])
        assert site.total() == answered == 300
        os.kill(new, signal.SIGTERM)
        site.child.wait_until(lambda: not site.child.survivors(), "no process is left")
    notes = "end the old master within 5 s, or have no more ports than workers: last counts stay with a port"
    row.update(Row(ports="4", exact=YES, recycle=f"{YES} USR2", notes=notes))
