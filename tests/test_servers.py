"""The matrix of web servers: each runs several workers, recycles them and has one killed. docs/servers.md shows it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from importlib.metadata import distributions, version
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.matrix import YES, Row, versions
from tests.servers import (
    ROOT,
    Site,
    children,
    database,
    describe,
    how_they_ended,
    runserver,
    scrape,
    send_requests,
    serving,
)

pytestmark = pytest.mark.servers

WSGI, ASGI = "demo_site.wsgi:application", "demo_site.asgi:application"
BIND = "127.0.0.1:{port}"
GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "demo_site/gunicorn.conf.py", "--no-control-socket", "-b", BIND]
# An installation of the oldest gunicorn that is still common, with command-line options that it supports.
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
# pyuwsgi reloads by executing the base interpreter of its virtual environment.
PACKAGES = {"PYTHONPATH": sysconfig.get_path("purelib")}
NOTE = "after `HUP` pyuwsgi runs outside its virtual environment: put its packages on `PYTHONPATH`"
RECYCLED = 25
# The interpreter may be in a folder that only root can read: a process that changes its user keeps the right to read.
CAPABILITIES = "-all,+setuid,+setgid,+kill,+chown,+dac_read_search"
MAY_READ = ["setpriv", "--securebits", "+no_setuid_fixup", "--bounding-set", CAPABILITIES]
PATCHED = "pages that use the database need `monkey.patch_all()` at the top of gunicorn.conf.py, because of Django"
RELOADER = "the supervisor loads the site too; it frees its port for the first worker"
HYPERCORN = "does not replace a killed worker: restart the service"


def hang_up(site: Site, number: int = signal.SIGHUP) -> None:
    """Make the server replace its workers, and wait until it has."""
    before = site.wait_until_settled(len(site.live()))
    os.kill(site.child.pid, number)
    site.wait_until_replaced(before.values(), len(before))


def kill(site: Site, port: int, workers: int) -> int:
    """Kill the worker that holds the port, once the workers are settled, and return its pid."""

    def killed() -> int:
        pid = site.wait_until_settled(workers)[port]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return pid
        return 0

    return site.child.wait_until(killed, f"the worker at port {port} is killed")


def wait_until_exact(site: Site, answered: int) -> None:
    """Wait until every answered request is counted, once."""
    counted = 0.0

    def is_exact() -> bool:
        nonlocal counted
        with contextlib.suppress(OSError, HTTPException):  # a worker has just gone
            counted = site.total()
        return counted == answered

    try:
        site.child.wait_until(is_exact, "every answered request is counted once", 15)
    except AssertionError as error:
        raise AssertionError(f"{counted} of {answered} requests are counted by {site.live()}") from error


def shrink_and_grow(site: Site) -> None:
    before = len(site.live())
    os.kill(site.child.pid, signal.SIGTTOU)
    site.wait_for_workers(before - 1)
    os.kill(site.child.pid, signal.SIGTTIN)
    site.wait_for_workers(before)


def outlive_requests(site: Site) -> None:
    """Wait until all workers are there again: each ends after some requests."""
    site.wait_for_workers()


# Longer than a new worker waits for the port of an old one.
ROLLING = "with `HUP` each old worker runs 3.5 s beside its successor, so that the new ones may need one port more"


class Server(NamedTuple):
    """A server, how its documentation says to start it, and how the test recycles it.

    recycle: the word for it in the table, and a function that does it. replaces: whether the server replaces a killed
    worker. spare: how many ports more than workers it may need after it was recycled.
    """

    name: str
    packages: tuple[str, ...]
    mode: str
    words: list[str]
    workers: int = 4
    recycle: tuple[str, Callable[[Site], None]] | None = None
    replaces: bool = True
    spare: int = 0
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
                notes=PATCHED if kind == "gevent" else "",
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
    servers = [
        Server("uWSGI", ("pyuwsgi",), mode, [*UWSGI, *MASTER, *options], recycle=recycle, notes=NOTE, env=PACKAGES)
        for mode, (options, recycle) in modes.items()
    ]
    servers[3] = servers[3]._replace(notes=f"up to Python 3.12: with 3.13 uWSGI itself ends its workers. {NOTE}")
    return servers if sys.version_info < (3, 13) else [*servers[:3], *servers[4:]]


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
    *(
        Server(
            "granian",
            ("granian",),
            kind,
            ["granian", "--interface", kind, "--port", "{port}", "--workers", "4", "--respawn-failed-workers", site],
            recycle=("HUP", hang_up),
            spare=1,
            notes=ROLLING,
        )
        for kind, site in (("wsgi", WSGI), ("asgi", ASGI))
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
        wait_until_exact(site, answered)
        live = site.wait_for_workers(server.workers)
        assert set(live) <= set(free_ports[: server.workers + server.spare])
        row.update(Row(ports=str(server.workers), exact=YES))

        victim = kill(site, min(live), server.workers)
        if server.replaces:
            site.wait_until_replaced({victim}, server.workers)
            send(20)
            wait_until_exact(site, answered)
            live = site.wait_for_workers(server.workers)
            row["kill"] = YES
        site.child.process.terminate()
        site.child.process.wait(30)
        site.child.wait_until(lambda: not site.child.survivors(), "no process is left")
    assert not any(describe(port) for port in free_ports)

    if not server.replaces:
        with serving(tmp_path, free_ports, *words, **server.env) as site:
            site.wait_for_workers(server.workers)
            wait_until_exact(site, answered)
        row["recycle"] = row["kill"] = f"{YES} started again"
    row["end"] = how_they_ended(tmp_path / "ledgers", live)


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
def test_gunicorn_of_roots_with_workers_of_another_user(
    preload: list[str], free_ports: range, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may change the user")
    mode = ", ".join(["sync, started as root with --user and --group", *preload])
    row.update(Row(server="gunicorn", version=versions("gunicorn"), mode=mode))
    options = ["--user", "nobody", "--group", "nogroup", "--max-requests", str(RECYCLED), *preload]
    # pytest's folders belong to root.
    with tempfile.TemporaryDirectory() as folder:
        tmp_path = Path(folder)
        tmp_path.chmod(0o777)
        database(tmp_path).chmod(0o666)
        monkeypatch.setenv("DEMO_LEDGER_DIR", str(tmp_path / "ledgers"))
        for start in range(2):  # at the second start the folder exists, and belongs to nobody
            with serving(tmp_path, free_ports, *MAY_READ, *GUNICORN, "-w", "4", *options) as site:
                site.wait_for_workers()
                answered = send_requests(200, lambda _: site.request(), threads=4).count(200)
                assert answered == 200
                wait_until_exact(site, 200 * (start + 1))
                site.wait_for_workers()
                assert "ERROR" not in site.child.output()
        row["end"] = how_they_ended(tmp_path / "ledgers", free_ports[:4])
        owners = {path.owner() for path in [tmp_path / "ledgers", *(tmp_path / "ledgers").iterdir()]}
    assert owners == {"nobody"}
    row.update(
        Row(ports="4", exact=YES, recycle=f"{YES} each", kill="as sync", notes="the ledgers belong to this user")
    )


def test_gunicorn_that_executes_a_new_master(free_ports: range, tmp_path: Path, row: Row) -> None:
    row.update(Row(server="gunicorn", version=versions("gunicorn"), mode="sync, USR2, then TERM to the old master"))
    pidfile = tmp_path / "pid"
    # Not `python -m gunicorn`: the new master would import gunicorn's package http instead of the standard library's.
    words = [str(Path(sys.executable).with_name("gunicorn")), *GUNICORN[3:], "-w", "4", "--pid", str(pidfile)]
    with serving(tmp_path, free_ports, *words) as site:
        site.wait_for_workers()
        answered = send_requests(200, lambda _: site.request(), threads=4).count(200)
        old = site.wait_until_settled(4)
        os.kill(site.child.pid, signal.SIGUSR2)
        second = Path(f"{pidfile}.2")
        new = int(site.child.wait_until(lambda: second.exists() and second.read_text(), "there is a new master"))
        site.child.wait_until(lambda: len(children(new)) == 4, "the new master has its workers")
        os.kill(site.child.pid, signal.SIGTERM)
        site.wait_until_replaced(old.values(), 4)
        answered += send_requests(100, lambda _: site.request(), threads=4).count(200)

        assert sorted(site.live()) == list(free_ports[:4])
        assert site.total() == answered == 300
        os.kill(new, signal.SIGTERM)
        site.child.wait_until(lambda: not site.child.survivors(), "no process is left")
    row["end"] = how_they_ended(tmp_path / "ledgers", free_ports[:4])
    notes = "while the old master runs, the new workers have higher ports"
    row.update(Row(ports="4", exact=YES, recycle=f"{YES} USR2", kill="as sync", notes=notes))


def test_mod_wsgi(free_ports: range, row: Row, program: Callable[[str], str]) -> None:
    program("mod_wsgi-express")
    if os.geteuid() != 0:
        pytest.skip("only root may change the user")
    row.update(Row(server="mod_wsgi", version=versions("mod_wsgi"), mode="mod_wsgi-express, daemon mode", ports="3"))
    *metric_ports, site_port = free_ports
    with tempfile.TemporaryDirectory() as folder:
        tmp_path = Path(folder)
        tmp_path.chmod(0o777)
        database(tmp_path).chmod(0o666)
        words = [*MAY_READ, "mod_wsgi-express", "start-server", "demo_site/wsgi.py", "--host", "127.0.0.1"]
        words += [
            "--port",
            str(site_port),
            "--processes",
            "3",
            "--threads",
            "2",
            "--user",
            "nobody",
            "--group",
            "nogroup",
        ]
        words += ["--working-directory", str(ROOT), "--server-root", f"{folder}/apache", "--log-to-terminal"]
        words += ["--python-path", str(ROOT)]
        with serving(tmp_path, free_ports, *words, DEMO_LEDGER_DIR=f"{folder}/ledgers") as site:
            victim = site.wait_for_workers(3)[metric_ports[0]]
            answered = send_requests(200, lambda _: site.request(), threads=4).count(200)
            os.kill(victim, signal.SIGKILL)
            site.wait_until_replaced({victim}, 3)
            hang_up(site, signal.SIGUSR1)  # apachectl graceful
            site.child.wait_until(site.is_listening, "the site is there")
            answered += send_requests(20, lambda _: site.request(), threads=4).count(200)

            assert sorted(site.live()) == metric_ports[:3]
            wait_until_exact(site, 220)
            assert answered == 220
            site.child.process.terminate()
            site.child.wait_until(lambda: not site.child.survivors(), "no process is left")
        row["end"] = how_they_ended(Path(folder, "ledgers"), metric_ports[:3])
    row.update(Row(exact=YES, recycle=f"{YES} graceful", kill=YES))


def test_uwsgi_without_threads_serves_the_site_and_says_once_what_to_set(
    free_ports: range, tmp_path: Path, row: Row
) -> None:
    with serving(tmp_path, free_ports, *UWSGI, "--master") as site:
        site.child.wait_until(lambda: site.request() == 200, "the site answers")
        send_requests(20, lambda _: site.request())

        assert not site.live()
        output = site.child.output()
        assert output.count("promports.E014") == output.count("ERROR django_promports") == 1
        assert "Set enable-threads = true" in output
        assert "Traceback" not in output
    notes = "set `enable-threads`: without it no Python thread runs; the log reports it (`promports.E014`)"
    row.update(Row(server="uWSGI", version=versions("pyuwsgi"), mode="without enable-threads", ports="0", notes=notes))
    row.update(Row(exact="no ports", recycle="no ports", kill="no ports", end="no ports"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_uwsgi_calls_the_sites_own_hook_and_what_the_master_counted_is_exported_once(
    when: str, free_ports: range, tmp_path: Path
) -> None:
    """when: whether the site sets its hook before or after it loads the app. After, it replaces the app's hook."""
    hook = "import uwsgi\nuwsgi.post_fork_hook = lambda: print('HOOK', uwsgi.worker_id(), flush=True)\n"
    parts = {
        "hook": hook,
        "application": "from demo_site.wsgi import application\n",
        "count": "from demo_site.metrics import ORDERS\nORDERS.labels('green').inc(7)\n",
    }
    order = ["hook", "application", "count"] if when == "before" else ["application", "hook", "count"]
    (tmp_path / "hooked_wsgi.py").write_text("".join(parts[part] for part in order))
    words = [word.replace("demo_site.wsgi", "hooked_wsgi") for word in UWSGI]
    with serving(tmp_path, free_ports, *words, *MASTER, PYTHONPATH=f"{tmp_path}:{ROOT}") as site:
        site.child.wait_until(site.is_listening, "the site is there")
        site.child.wait_until(
            lambda: send_requests(40, lambda _: site.request()) and len(site.live()) == 4, "each worker had a request"
        )
        assert site.child.output().count("HOOK") == 4
        before = site.live()
        os.kill(before[free_ports[0]], signal.SIGKILL)
        site.child.wait_until(
            lambda: send_requests(4, lambda _: site.request()) and len(now := site.live()) == 4 and now != before,
            "another worker is there",
        )
        assert site.total('shop_orders_total{tea="green"}') == 7


def edit_until_reloaded(site: Site, edited: Path, pid: int) -> None:
    """Edit a file until runserver's child ends; it misses edits made before it first reads the file's times."""

    def ends() -> bool:
        stamp = edited.stat().st_mtime + 10
        os.utime(edited, (stamp, stamp))
        return pid not in children(site.child.pid)

    site.child.wait_until(ends, f"child {pid} ends")


def test_runserver_through_ten_reloads(free_ports: range, tmp_path: Path, row: Row) -> None:
    edited = tmp_path / "edited_site.py"
    edited.write_text("from demo_site.settings import *\nDEBUG = True\n")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "DJANGO_SETTINGS_MODULE": "edited_site"}
    answered = 0
    with runserver(tmp_path, free_ports, **env) as site:
        pids = set()
        for reload in range(11):
            site.child.wait_until(lambda: site.request() == 200, f"runserver answers after {reload} reloads")
            answered += 1 + send_requests(9, lambda _: site.request(), threads=1).count(200)
            (about,) = filter(None, map(describe, site.ports))
            assert about["port"] == free_ports[0]
            pids.add(about["pid"])
            if reload < 10:
                edit_until_reloaded(site, edited, about["pid"])

        assert len(pids) == 11
        assert answered == 110
        wait_until_exact(site, answered)
        os.killpg(site.child.pid, signal.SIGINT)  # Ctrl-C
        site.child.wait_until(lambda: not site.child.survivors(), "no process is left")
        assert "Traceback" not in site.child.output()
    row["end"] = how_they_ended(tmp_path / "ledgers", free_ports[:1])
    row.update(Row(server="runserver", version=versions("django"), mode="with its reloader", ports="1", exact=YES))
    row.update(Row(recycle=f"{YES} ten reloads", kill="one process", notes="the parent of the reloader claims no port"))


BLOCKED_ASGI = """
import pathlib, time
from demo_site.asgi import application as site

async def application(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/block/":
        pathlib.Path(__file__).with_name("blocked").touch()
        time.sleep(2)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
    else:
        await site(scope, receive, send)
"""
BLOCKED_WSGI = """
import pathlib
from gevent.monkey import get_original
from demo_site.wsgi import application as site

def application(environ, start_response):
    if environ["PATH_INFO"] == "/block/":
        pathlib.Path(__file__).with_name("blocked").touch()
        get_original("time", "sleep")(2)
        start_response("200 OK", [])
        return [b""]
    return site(environ, start_response)
"""


@pytest.mark.parametrize(
    ("kind", "words", "answers"),
    [
        ("asyncio", ["uvicorn", "--port", "{port}", "--loop", "asyncio", "blocked:application"], True),
        ("uvloop", ["uvicorn", "--port", "{port}", "--loop", "uvloop", "blocked:application"], True),
        ("gevent", [*GUNICORN, "-w", "1", "-k", "gevent", "blocked:application"], False),
    ],
    ids=["asyncio", "uvloop", "gevent"],
)
def test_scrape_while_the_event_loop_is_blocked(
    kind: str, words: list[str], answers: bool, free_ports: range, tmp_path: Path
) -> None:
    """The endpoint is a thread, not a task of the site's loop; under gevent it is a greenlet and waits for the hub."""
    (tmp_path / "blocked.py").write_text(BLOCKED_WSGI if kind == "gevent" else BLOCKED_ASGI)
    with serving(tmp_path, free_ports, *words, PYTHONPATH=f"{tmp_path}:{ROOT}") as site:
        site.wait_for_workers(1)
        site.child.wait_until(site.is_listening, "the site is there")
        site.request()  # what Django imports at its first request must not be measured
        ended = 0.0

        def ask() -> None:
            nonlocal ended
            site.request("/block/")
            ended = time.monotonic()

        client = threading.Thread(target=ask)
        began = time.monotonic()
        client.start()
        site.child.wait_until((tmp_path / "blocked").exists, "the loop is blocked")
        scrape(free_ports[0])
        scraped = time.monotonic()
        client.join()

        assert ended - began >= 2
        assert (scraped < ended) == answers
