"""gevent that patches a process which already holds a port: gunicorn --preload -k gevent, and everything like it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trustme

from tests.commands import run_python
from tests.minimal import serve_site, write_site
from tests.servers import ROOT, Site, accepts, parse, running, scrape, send_requests

pytestmark = pytest.mark.long

# Where a site may patch, or have its server patch, after our app has claimed a port.
LATE_WSGI = """
from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
from gevent import monkey
monkey.patch_all()
"""
POST_FORK = """
def post_fork(server, worker):
    from gevent import monkey
    monkey.patch_all()
"""
PLACES = {
    "worker": ["--preload"],
    "wsgi": [],
    "wsgi, preload": ["--preload"],
    "post_fork": ["--preload"],
}


@pytest.fixture
def spawn(free_ports: range, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Start a process of the demo site that runs this code; it ends when the test has made the file `end`."""
    with contextlib.ExitStack() as stack:

        def start(code: str, modules: str, range_: str = "", settings: str = "demo_site.settings") -> Site:
            env = {
                "DEMO_PORT_RANGE": range_ or f"{free_ports[0]}-{free_ports[5]}",
                "DJANGO_SETTINGS_MODULE": settings,
                "PYTHONPATH": f"{tmp_path}:{ROOT}",
            }
            words = [sys.executable, "-c", code, modules, str(tmp_path / "end")]
            child = stack.enter_context(running(*words, log=tmp_path / "process.log", **env))
            return Site(child, "", free_ports[:6])

        yield start


def serve(
    tmp_path: Path, ports: range, *options: str, where: str = "worker", range_: str = "", wrapper: Sequence[str] = ()
) -> contextlib.AbstractContextManager[Site]:
    env = write_site(tmp_path, counted=True)
    if where.startswith("wsgi"):
        (tmp_path / "minimal_wsgi.py").write_text(LATE_WSGI)
    if where == "post_fork":
        (tmp_path / "late.conf.py").write_text(POST_FORK)
        options = ("-c", str(tmp_path / "late.conf.py"), *options)
    env["MINIMAL_LEDGER_DIR"] = str(tmp_path / "ledgers")
    return serve_site(tmp_path, ports, "-k", "gevent", *options, wrapper=wrapper, range_=range_, **env)


def ask(site: Site, count: int) -> int:
    """Send requests; return how many were answered with 200."""
    return send_requests(count, lambda _: site.request(), threads=4).count(200)


def wait_until_exact(site: Site, answered: int) -> None:
    site.child.wait_until(lambda: count(site) == answered, f"{answered} requests are counted, once each")


def count(site: Site) -> float:
    try:
        return site.total()
    except OSError:  # a worker has just ended
        return -1


# A forked child that is root claims later, because it may change its user: other users claim before gevent patches.
# This interpreter may be in a folder that only root can read.
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
MAY_READ = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the user; other users run the other tests")
@pytest.mark.parametrize("where", PLACES)
def test_workers_that_claim_at_the_fork_are_scraped_and_exact(where: str, free_ports: range) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's folders belong to root
        tmp_path = Path(folder)
        tmp_path.chmod(0o777)
        with serve(tmp_path, free_ports, *PLACES[where], where=where, wrapper=[*NOBODY, *MAY_READ]) as site:
            check_exactness(site)


@pytest.mark.parametrize("where", PLACES)
def test_workers_that_gevent_patches_after_they_claimed_are_scraped_and_exact(
    where: str, free_ports: range, tmp_path: Path
) -> None:
    with serve(tmp_path, free_ports, *PLACES[where], where=where) as site:
        check_exactness(site)


def check_exactness(site: Site) -> None:
    live = site.wait_for_workers(2)
    answered = ask(site, 100)
    assert answered == 100, site.child.output()
    assert set(live.values()) == set(site.child.children())
    wait_until_exact(site, answered)
    assert sorted(site.live()) == list(site.ports[:2])
    assert "ERROR" not in site.child.output()


def test_every_request_that_late_patched_workers_answer_is_counted_through_reloads_and_kills(
    free_ports: range, tmp_path: Path
) -> None:
    width = f"{free_ports[0]}-{free_ports[1]}"  # the new workers of the reload wait for the ports of the old ones
    with serve(tmp_path, free_ports, "--preload", range_=width) as site:
        live = site.wait_for_workers(2)
        answered = ask(site, 60)
        os.kill(site.child.pid, signal.SIGHUP)
        live = site.wait_until_replaced(live.values(), 2)
        answered += ask(site, 60)
        for victim in live.values():
            os.kill(victim, signal.SIGKILL)
        site.wait_until_replaced(live.values(), 2)
        answered += ask(site, 60)

        wait_until_exact(site, answered)
        assert answered >= 120  # gunicorn drops connections that a worker has accepted when it ends


def test_every_request_that_late_patched_workers_answer_is_counted_as_they_are_recycled(
    free_ports: range, tmp_path: Path
) -> None:
    with serve(tmp_path, free_ports, "--preload", "--max-requests", "20") as site:
        site.wait_for_workers(2)
        answered = 0
        for _ in range(8):
            answered += ask(site, 25)
            site.wait_for_workers(2)

        wait_until_exact(site, answered)
        assert answered > 100


# A process of the demo site. Where patch() is called, gevent patches the modules that the first argument names.
PROCESS = """
import sys, warnings
warnings.simplefilter("ignore")
import django, django_promports
from gevent import monkey
django.setup()
from prometheus_client import Counter
pieces = Counter("pieces", "Work done.")
pieces.inc()

def patch():
    for name in sys.argv[1].split(","):
        getattr(monkey, f"patch_{name}")()
"""
CLAIM = "django_promports.start()\npieces.inc()\n"
# The main greenlet counts its turns while the test scrapes: a blocked hub gives it none.
SERVE = """
import os, threading
import gevent
print("READY", flush=True)
turns = 0
while not os.path.exists(sys.argv[2]):
    gevent.sleep(0.01)
    turns += 1
print("TURNS", turns, flush=True)
"""
MODULES = ["all", "thread", "socket", "select,selectors", "time,os", "thread,socket", "socket,thread,select,selectors"]


def wait_for_turns(site: Site) -> int:
    """Return how often the main greenlet has had its turn, when the process ends."""
    found = site.child.wait_until(lambda: re.search(r"TURNS (\d+)\n", site.child.output()), "the hub runs")
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("order", ["early", "late"])
@pytest.mark.parametrize("modules", MODULES)
def test_a_process_is_scraped_whatever_gevent_patches_in_it(
    modules: str, order: str, free_ports: range, tmp_path: Path, spawn: Callable[..., Site]
) -> None:
    code = "patch()\n" + CLAIM if order == "early" else CLAIM + "patch()\n"
    site = spawn(PROCESS + code + SERVE, modules)
    site.child.wait_until(lambda: "READY" in site.child.output(), "it is patched")

    for _ in range(3):
        samples = scrape(free_ports[0])
    fds = len(os.listdir(f"/proc/{site.child.pid}/fd"))
    for _ in range(20):
        scrape(free_ports[0])

    assert samples["pieces_total"] == 2
    assert len(os.listdir(f"/proc/{site.child.pid}/fd")) <= fds + 2
    (tmp_path / "end").touch()
    assert wait_for_turns(site) > 3


def test_an_endpoint_with_tls_is_scraped_after_gevent_has_patched_ssl(
    free_ports: range, tmp_path: Path, spawn: Callable[..., Site]
) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "pair.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    (tmp_path / "tls_site.py").write_text(
        f"from demo_site.settings import *\nPROMPORTS_TLS_CERTFILE = {str(tmp_path / 'pair.pem')!r}\n"
    )
    site = spawn(PROCESS + CLAIM + "patch()\n" + SERVE, "all", settings="tls_site")
    site.child.wait_until(lambda: "READY" in site.child.output(), "it is patched")

    with urllib.request.urlopen(f"https://127.0.0.1:{free_ports[0]}/metrics", timeout=10, context=context) as response:
        assert parse(response.read().decode())["pieces_total"] == 2

    (tmp_path / "end").touch()
    wait_for_turns(site)


def test_a_process_that_waits_for_a_port_claims_it_after_gevent_has_patched(
    free_ports: range, tmp_path: Path, spawn: Callable[..., Site]
) -> None:
    with socket.create_server(("127.0.0.1", free_ports[0])):
        site = spawn(PROCESS + CLAIM + "patch()\n" + SERVE, "all", range_=f"{free_ports[0]}-{free_ports[0]}")
        site.child.wait_until(lambda: "READY" in site.child.output(), "it is patched")
        assert not site.live()

    site.wait_for_workers(1)
    assert scrape(free_ports[0])["pieces_total"] == 2
    assert site.child.output().count("No free port") == 1
    (tmp_path / "end").touch()
    wait_for_turns(site)


def test_a_process_without_a_port_claims_one_after_gevent_has_patched(
    free_ports: range, tmp_path: Path, spawn: Callable[..., Site]
) -> None:
    site = spawn(PROCESS + "patch()\nassert django_promports.port() is None\n" + CLAIM + SERVE, "all")
    site.wait_for_workers(1)

    assert scrape(free_ports[0])["pieces_total"] == 2
    (tmp_path / "end").touch()
    wait_for_turns(site)


@pytest.mark.parametrize("before", ["", CLAIM], ids=["unclaimed", "claimed"])
def test_locks_made_before_gevent_patched_do_not_block_the_hub(before: str, free_ports: range) -> None:
    code = """
patch()
import gevent

def claim_and_free():
    for _ in range(10):
        django_promports.start()
        gevent.sleep(0)
        django_promports.stop()
        gevent.sleep(0)

greenlets = [gevent.spawn(claim_and_free) for _ in range(8)]
done = gevent.joinall(greenlets, timeout=60)
assert len(done) == 8 and all(greenlet.successful() for greenlet in greenlets), greenlets
django_promports.start()
from tests.servers import listening_ports
import os
print("PORTS", *listening_ports(os.getpid()))
"""
    done = run_python(PROCESS + before + code, "all", DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[-1]}", seconds=120)

    assert done.stdout.split() == ["PORTS", str(free_ports[0])], done.stdout + done.stderr


def test_a_collector_that_shares_a_lock_with_greenlets_blocks_none_of_them(
    free_ports: range, tmp_path: Path, spawn: Callable[..., Site]
) -> None:
    code = """
patch()
import gevent, threading, time
from prometheus_client import REGISTRY
lock = threading.Lock()

class Sharing:
    def describe(self):
        return []
    def collect(self):
        with lock:
            time.sleep(0.005)
            assert threading.get_native_id() == threading.main_thread().native_id
        return []

def work():
    for _ in range(100):
        with lock:
            time.sleep(0.001)

REGISTRY.register(Sharing())
print("READY", flush=True)
greenlets = [gevent.spawn(work) for _ in range(8)]
gevent.joinall(greenlets)
print("JOINED", all(greenlet.successful() for greenlet in greenlets), flush=True)
"""
    site = spawn(PROCESS + CLAIM + code + SERVE, "all")
    site.child.wait_until(lambda: "READY" in site.child.output(), "it is patched")
    failures = 0.0

    def is_joined() -> bool:
        nonlocal failures
        failures = scrape(free_ports[0])["promports_collector_failures_total"]
        return "JOINED True" in site.child.output()

    site.child.wait_until(is_joined, "all greenlets have done their work")

    assert failures == 0
    (tmp_path / "end").touch()
    wait_for_turns(site)


def test_a_late_patched_process_frees_its_port_at_its_end(free_ports: range) -> None:
    done = run_python(
        PROCESS + CLAIM + "patch()\nprint(django_promports.port())\n", "all", DEMO_PORT_RANGE=str(free_ports[0])
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(free_ports[0])]
    assert not accepts(free_ports[0])
    successor = run_python(
        PROCESS + "django_promports.start()\nfrom tests.servers import scrape\n"
        "print(scrape(django_promports.port())['pieces_total'])",
        DEMO_PORT_RANGE=str(free_ports[0]),
    )
    assert successor.stdout.split() == ["3.0"], successor.stderr
