"""Processes that a worker forks before its first request: helpers keep no port, and take none from a worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.commands import run_python
from tests.minimal import serve_site, write_site
from tests.servers import Site, children, listening_ports, running, send_requests

pytestmark = pytest.mark.long

# A helper inherits the signal handlers of gunicorn's worker, and would not end when its pool terminates it.
END = "signal.signal, [signal.SIGTERM, signal.SIG_DFL]"
# The pools have started their processes when the module has been imported.
POOLS = {
    "Pool": f"import multiprocessing, signal\npool = multiprocessing.get_context('fork').Pool(2, {END})\n",
    "ProcessPoolExecutor": (
        "import concurrent.futures, multiprocessing\n"
        "pool = concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('fork'))\n"
        "pool.submit(abs, -1).result()\n"
    ),
    "Process": (
        "import multiprocessing, signal\n"
        "pool = [multiprocessing.get_context('fork').Process(target=signal.pause, daemon=True) for _ in range(2)]\n"
        "for process in pool:\n    process.start()\n"
    ),
    "billiard": f"import billiard, signal\npool = billiard.get_context('fork').Pool(2, {END})\n",
}
HANDLER = "from django.core.wsgi import get_wsgi_application\napplication = get_wsgi_application()\n"


def serve(
    tmp_path: Path, ports: range, wsgi: str, *options: str, range_: str = ""
) -> contextlib.AbstractContextManager[Site]:
    env = write_site(tmp_path, counted=True)
    (tmp_path / "minimal_wsgi.py").write_text(wsgi)
    env["MINIMAL_LEDGER_DIR"] = str(tmp_path / "ledgers")
    return serve_site(tmp_path, ports, *options, range_=range_, **env)


def wait_for_helpers(site: Site, parents: set[int], count: int = 2) -> set[int]:
    """Return the children of these processes once each has its helpers, and none of those holds a port of ours."""

    def find() -> set[int]:
        found = [children(parent) for parent in parents]
        helpers = {pid for pids in found for pid in pids}
        with contextlib.suppress(OSError):
            held = {port for pid in helpers for port in listening_ports(pid)}
            if all(len(pids) >= count for pids in found) and not held & set(site.ports):
                return helpers
        return set()

    return site.child.wait_until(find, "the helpers run, and hold no port")


@pytest.mark.parametrize(
    ("pool", "options"),
    [
        *(pytest.param(pool, [], marks=[pytest.mark.servers] if pool == "billiard" else []) for pool in POOLS),
        ("Process", ["-k", "gevent"]),
        ("Process", ["-k", "gthread", "--threads", "4"]),
    ],
    ids=str,
)
def test_a_worker_that_forks_a_pool_before_its_first_request_keeps_its_port(
    pool: str, options: list[str], free_ports: range, tmp_path: Path
) -> None:
    # As wide as the workers: a helper with a port would leave a worker without one.
    width = f"{free_ports[0]}-{free_ports[1]}"
    with serve(tmp_path, free_ports, HANDLER + POOLS[pool], *options, range_=width) as site:
        live = site.wait_for_workers(2)
        wait_for_helpers(site, set(live.values()))

        answered = send_requests(60, lambda _: site.request(), threads=4).count(200)

        assert answered == 60
        assert site.live() == live
        assert set(live.values()) == set(site.child.children())
        assert site.total() == 60
        assert "No free port" not in site.child.output()


def test_the_successor_of_a_killed_worker_has_its_port_while_the_helpers_live(
    free_ports: range, tmp_path: Path
) -> None:
    with serve(tmp_path, free_ports, HANDLER + POOLS["Process"]) as site:
        live = site.wait_for_workers(2)
        helpers = wait_for_helpers(site, set(live.values()))
        assert send_requests(40, lambda _: site.request(), threads=4).count(200) == 40

        for pid in live.values():
            os.kill(pid, signal.SIGKILL)

        after = site.wait_until_replaced(live.values(), 2)
        assert sorted(after) == list(free_ports[:2])
        assert site.total() == 40
        assert all(Path(f"/proc/{pid}").exists() for pid in helpers)


def test_a_master_that_forks_a_pool_gives_its_port_and_its_counts_to_its_workers(
    free_ports: range, tmp_path: Path
) -> None:
    counted = HANDLER + (
        "from prometheus_client import Counter\npieces = Counter('pieces', 'Work done.')\npieces.inc()\n"
        + POOLS["Process"]
        + "pieces.inc()\n"
    )
    with serve(tmp_path, free_ports, counted, "--preload") as site:
        live = site.wait_for_workers(2)

        answered = send_requests(60, lambda _: site.request(), threads=4).count(200)

        assert answered == 60
        assert sorted(live) == list(free_ports[:2])
        assert not listening_ports(site.child.pid) & set(site.ports)
        helpers = set(site.child.children()) - set(live.values())
        assert len(helpers) == 2
        assert not {port for pid in helpers for port in listening_ports(pid)} & set(site.ports)
        assert site.total() == 60
        assert site.total("pieces_total") == 2


# Nothing tells such a child from a worker that a server forks.
PLAIN = "import os, signal\nfor _ in range(2):\n    if os.fork() == 0:\n        signal.pause()\n        os._exit(0)\n"


def test_the_log_says_what_to_write_where_plain_forks_take_all_ports(free_ports: range, tmp_path: Path) -> None:
    with serve(tmp_path, free_ports, HANDLER + PLAIN, range_=f"{free_ports[0]}-{free_ports[1]}") as site:
        site.wait_for_workers(2)
        said = "call django_promports.start() before that fork"

        def is_said() -> bool:
            return site.request() == 200 and said in site.child.output()

        site.child.wait_until(is_said, "the log says what to write")


def test_a_worker_that_starts_before_plain_forks_keeps_its_port(free_ports: range, tmp_path: Path) -> None:
    wsgi = HANDLER + "import django_promports\ndjango_promports.start()\n" + PLAIN
    with serve(tmp_path, free_ports, wsgi, range_=f"{free_ports[0]}-{free_ports[1]}") as site:
        live = site.wait_for_workers(2)
        wait_for_helpers(site, set(live.values()))

        assert set(live.values()) == set(site.child.children())
        assert "No free port" not in site.child.output()


def test_a_master_that_multiprocessing_has_forked_is_a_master(free_ports: range) -> None:
    script = f"""
import multiprocessing, os

def master():
    import django_promports
    {"; ".join(HANDLER.splitlines())}
    before = django_promports.port()
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    print(before, django_promports.port(), flush=True)

process = multiprocessing.get_context("fork").Process(target=master)
process.start()
process.join()
"""
    done = run_python(script, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[5]}")

    assert done.stdout.split() == [str(free_ports[0]), "None"], done.stderr


def test_a_helper_may_start_and_its_own_helpers_claim_nothing(free_ports: range, tmp_path: Path) -> None:
    script = f"""
import multiprocessing, os
from tests.servers import scrape
import django_promports
{HANDLER}
from prometheus_client import Counter
pieces = Counter("pieces", "Work done.")
pieces.inc(3)
ports = [django_promports.port()]

def work():
    pieces.inc(10)
    ports.append(django_promports.port())
    ports.append(django_promports.start())
    ports.append(scrape(ports[-1])["pieces_total"])
    if os.fork() == 0:
        print(*ports, django_promports.port(), flush=True)
        os._exit(0)
    os.wait()

helper = multiprocessing.get_context("fork").Process(target=work)
helper.start()
helper.join()
print(django_promports.port(), scrape(django_promports.port())["pieces_total"])
"""
    done = run_python(script, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[5]}")

    first, second = free_ports[:2]
    assert done.stdout.splitlines() == [f"{first} None {second} 10.0 None", f"{first} 3.0"], done.stderr


# A server of a user: the handler is built in the parent, and the children that serve are forked by multiprocessing.
SERVER = """
import multiprocessing, os, signal, socket, sys
from wsgiref.simple_server import WSGIServer, WSGIRequestHandler
import django_promports
{HANDLER}
from prometheus_client import Counter
pieces = Counter("pieces", "Work done.")
pieces.inc(3)

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))

def serve():
    server = WSGIServer(listener.getsockname(), WSGIRequestHandler, bind_and_activate=False)
    server.socket = listener
    server.server_name, server.server_port = "localhost", listener.getsockname()[1]
    server.setup_environ()
    server.set_app(application)
    server.serve_forever()

processes = [multiprocessing.get_context("fork").Process(target=serve, daemon=True) for _ in range(2)]
for process in processes:
    process.start()
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
if sys.argv[2] == "parent too":
    serve()
while True:
    signal.pause()
""".replace("{HANDLER}", HANDLER)


@pytest.mark.parametrize("who", ["children", "parent too"])
def test_processes_of_a_script_that_serve_have_the_lowest_ports_and_all_counts(
    who: str, free_ports: range, tmp_path: Path
) -> None:
    *metric_ports, site_port = free_ports
    env = write_site(tmp_path, counted=True)
    env |= {
        "DEMO_PORT_RANGE": f"{metric_ports[0]}-{metric_ports[-1]}",
        "MINIMAL_LEDGER_DIR": str(tmp_path / "ledgers"),
    }
    with running(sys.executable, "-c", SERVER, str(site_port), who, log=tmp_path / "server.log", **env) as child:
        site = Site(child, f"127.0.0.1:{site_port}", metric_ports)
        child.wait_until(site.is_listening, "it serves")
        answered = 0

        def all_serve() -> bool:
            nonlocal answered
            answered += send_requests(4, lambda _: site.request(), threads=4).count(200)
            servers = {*child.children(), child.pid} if who == "parent too" else {*child.children()}
            return set(site.live().values()) == servers

        child.wait_until(all_serve, "each process has served a request and has a port")

        live = site.live()
        assert sorted(live) == metric_ports[: len(live)]
        assert site.total() == answered
        assert site.total("pieces_total") == 3
