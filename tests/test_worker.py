"""Which processes hold a port: real servers, forks and kills."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

import django_promports
from django_promports.conf import conf
from django_promports.endpoint import Endpoint
from django_promports.ledger import Ledger
from tests.commands import run_python
from tests.servers import (
    ROOT,
    accepts,
    database,
    describe,
    get,
    gunicorn,
    listening_ports,
    manage,
    runserver,
    scrape,
    send_requests,
)

CONFIG = str(ROOT / "demo_site/gunicorn.conf.py")
KINDS = {
    "sync": ["-k", "sync"],
    "gthread": ["-k", "gthread", "--threads", "4"],
    "gevent": ["-k", "gevent"],
}


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_gunicorn_worker_serves_its_own_registry_on_the_lowest_free_ports(
    kind: str, preload: list[str], free_ports: range, tmp_path: Path
) -> None:
    options = [*KINDS[kind], *preload]
    if kind == "gevent" and preload:
        # Without this, each page that uses the database fails: see the next test.
        config = tmp_path / "patched.py"
        config.write_text(f"from gevent import monkey\nmonkey.patch_all()\nexec(open({CONFIG!r}).read())\n")
        options += ["-c", str(config)]
    with gunicorn(tmp_path, free_ports, *options) as site:
        live = site.wait_for_workers()

        statuses = send_requests(400, lambda _: site.request())

        assert statuses.count(200) == 400, site.child.output()
        assert sorted(live) == list(free_ports[:4]) == sorted(site.live())
        assert len(set(live.values())) == 4
        assert set(live.values()) == set(site.child.children())
        samples = {port: scrape(port) for port in live}
        assert sum(s["django_http_requests_before_middlewares_total"] for s in samples.values()) == 400
        assert {port: s["promports_port"] for port, s in samples.items()} == {port: port for port in live}
        for port, pid in live.items():
            assert samples[port]["process_start_time_seconds"] == pytest.approx(_start_time(pid), abs=0.02)
        # The master holds the site's socket only, and no thread of ours. Where gevent is patched in, a thread of ours
        # would be a greenlet, and the native threads are those of gevent's pool, as many as it needs.
        assert listening_ports(site.child.pid) == {free_ports[-1]}
        if "patched" not in " ".join(options):
            assert len(os.listdir(f"/proc/{site.child.pid}/task")) == 1
    assert not any(describe(port) for port in free_ports[:8])


def test_gevent_workers_that_are_patched_after_django_was_loaded_serve_their_own_registries(
    free_ports: range, tmp_path: Path
) -> None:
    # Pages that use no database. Django keeps its connections in a native thread-local, which all greenlets share after
    # late patching, and refuses to use one in another greenlet: such pages fail, with or without us.
    with gunicorn(tmp_path, free_ports, "-k", "gevent", "--preload") as site:
        live = site.wait_for_workers()

        statuses = send_requests(400, lambda _: site.request("/nowhere/"))

        assert statuses.count(404) == 400, site.child.output()
        assert sorted(live) == list(free_ports[:4]) == sorted(site.live())
        assert set(live.values()) == set(site.child.children())
        samples = {port: scrape(port) for port in live}
        assert sum(s["django_http_requests_before_middlewares_total"] for s in samples.values()) == 400
        for port, pid in live.items():
            assert samples[port]["promports_port"] == port
            assert samples[port]["process_start_time_seconds"] == pytest.approx(_start_time(pid), abs=0.02)
        assert listening_ports(site.child.pid) == {free_ports[-1]}
        assert len(os.listdir(f"/proc/{site.child.pid}/task")) == 1
    assert not any(describe(port) for port in free_ports[:8])


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
def test_reload_in_a_range_as_wide_as_the_workers_leaves_no_worker_without_port(
    preload: list[str], free_ports: range, tmp_path: Path
) -> None:
    width = f"{free_ports[0]}-{free_ports[3]}"
    with gunicorn(tmp_path, free_ports, *preload, range_=width) as site:
        before = site.wait_for_workers()

        for _ in range(2):
            os.kill(site.child.pid, signal.SIGHUP)
            before = site.wait_until_replaced(before.values())

        assert scrape(free_ports[0])["promports_waiting_processes"] == 0


def test_a_process_that_waits_for_a_port_is_seen_and_gets_the_first_that_comes_free(
    free_ports: range, tmp_path: Path
) -> None:
    width = f"{free_ports[0]}-{free_ports[1]}"
    with gunicorn(tmp_path, free_ports, range_=width) as site:
        live = site.wait_for_workers(2)
        site.child.wait_until(
            lambda: all(scrape(port)["promports_waiting_processes"] == 2 for port in live), "two are seen to wait"
        )
        shown = manage("show_targets", DEMO_PORT_RANGE=width)
        statuses = send_requests(100, lambda _: site.request())
        waiting = set(site.child.children()) - set(live.values())

        os.kill(live[free_ports[0]], signal.SIGKILL)

        site.child.wait_until(
            lambda: describe(free_ports[0]).get("pid", live[free_ports[0]]) != live[free_ports[0]],
            "somebody takes the port of the killed worker",
        )
        assert statuses.count(200) == 100
        assert len(waiting) == 2
        assert "2 processes wait for a port" in shown.stdout
        assert site.child.output().count("ERROR django_promports No free port") >= 2


def test_the_successor_of_a_killed_worker_has_the_lowest_free_port(free_ports: range, tmp_path: Path) -> None:
    with gunicorn(tmp_path, free_ports) as site:
        live = site.wait_for_workers()

        os.kill(live[free_ports[1]], signal.SIGKILL)

        after = site.child.wait_until(
            lambda: now if len(now := site.live()) == 4 and now != live else {}, "the successor answers"
        )
        assert sorted(after) == list(free_ports[:4])
        assert {p: pid for p, pid in after.items() if p != free_ports[1]} == {
            p: pid for p, pid in live.items() if p != free_ports[1]
        }


@pytest.mark.parametrize("kind", KINDS)
def test_a_port_is_free_before_python_tears_its_worker_down(kind: str, free_ports: range, tmp_path: Path) -> None:
    (tmp_path / "slow_wsgi.py").write_text(SLOW_WSGI)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with gunicorn(tmp_path, free_ports, *KINDS[kind], "slow_wsgi", workers=1, **env) as site:
        (port, worker), *_ = site.wait_for_workers(1).items()
        assert [site.request() for _ in range(3)] == [200] * 3
        os.kill(worker, signal.SIGTERM)
        site.child.wait_until((tmp_path / "ending").exists, "the worker is being torn down")

        assert _is_alive(worker)
        assert not accepts(port)
        successor = run_python(SUCCESSOR, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[5]}")
        assert _is_alive(worker)
        assert successor.stdout.split() == [str(port), "3.0"], successor.stderr
        (tmp_path / "end").touch()


def test_a_process_ends_in_time_while_a_collector_hangs(free_ports: range) -> None:
    script = """
import threading, django, django_promports
from prometheus_client import REGISTRY, Counter
from tests.servers import scrape
django.setup()
hanging = threading.Event()

class Hanging:
    def describe(self):
        return []
    def collect(self):
        hanging.set()
        threading.Event().wait()

Counter("pieces", "Work done.").inc(7)
REGISTRY.register(Hanging())
threading.Thread(target=scrape, args=[django_promports.start(), 100], daemon=True).start()
assert hanging.wait(30)
"""
    width = f"{free_ports[0]}-{free_ports[5]}"
    done = run_python(script, DEMO_PORT_RANGE=width)
    successor = run_python(SUCCESSOR.replace(REQUESTS, "pieces_total"), DEMO_PORT_RANGE=width)

    assert done.returncode == 0, done.stderr
    assert successor.stdout.split() == [str(free_ports[0]), "7.0"], successor.stderr


def test_whoever_gets_a_port_that_was_freed_finds_its_ledger_free(
    free_ports: range, this_process: None, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:1]
    path = settings.PROMPORTS_LEDGER_DIR / f"{django_promports.start()}.ledger"
    close = Endpoint.abandon

    def open_ledger_and_close(endpoint: Endpoint) -> None:
        Ledger(path, conf.PROMPORTS_SITE).close()  # raises LedgerLocked
        close(endpoint)

    monkeypatch.setattr(Endpoint, "abandon", open_ledger_and_close)
    django_promports.stop()

    assert not accepts(free_ports[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_helper_forked_in_a_view_holds_no_port_when_its_worker_is_killed(
    kind: str, free_ports: range, tmp_path: Path
) -> None:
    (tmp_path / "helper_site.py").write_text(HELPER_SITE)
    (tmp_path / "helper_wsgi.py").write_text("from demo_site.wsgi import application")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "DJANGO_SETTINGS_MODULE": "helper_site"}
    with gunicorn(tmp_path, free_ports, *KINDS[kind], "helper_wsgi", workers=1, **env) as site:
        (port, worker), *_ = site.wait_for_workers(1).items()
        assert site.request("/") == 200
        helper = int(get(f"http://{site.address}/helper/"))
        with socket.create_connection(("127.0.0.1", port)):  # a scrape under way at the fork
            second = int(get(f"http://{site.address}/helper/"))

        site.child.wait_until(  # the view answers before the helper has run
            lambda: port not in listening_ports(helper) | listening_ports(second), "the helpers hold no port"
        )
        os.kill(worker, signal.SIGKILL)
        site.child.wait_until(
            lambda: (about := describe(port)) and about["pid"] not in (worker, helper, second),
            "the successor of the killed worker has its port",
        )
        assert _is_alive(helper)


def test_the_forked_children_of_a_worker_claim_nothing_but_may_start(free_ports: range, tmp_path: Path) -> None:
    script = """
import os, django_promports, django
django.setup()
ports = [django_promports.start()]
if os.fork() == 0:
    ports.append(django_promports.port())
    ports.append(django_promports.start())
    if os.fork() == 0:
        ports.append(django_promports.port())
        print(*ports, flush=True)
        os._exit(0)
    os.wait()
    os._exit(0)
os.wait()
"""
    done = run_python(script, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[5]}")

    assert done.stdout.split() == [str(free_ports[0]), "None", str(free_ports[1]), "None"], done.stderr


def test_what_a_parent_without_a_port_counted_is_not_counted_again_by_its_children(free_ports: range) -> None:
    script = """
import os, django, django_promports
from prometheus_client import Counter
django.setup()
counter = Counter("pieces", "Work done, by whom.", ["who"])
counter.labels("parent").inc()
for _ in range(3):
    if os.fork() == 0:
        port = django_promports.start()
        counter.labels("child").inc()
        from tests.servers import scrape
        samples = scrape(port)
        print(samples['pieces_total{who="parent"}'], samples['pieces_total{who="child"}'], flush=True)
        os._exit(0)
    os.wait()
"""
    done = run_python(script, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[5]}")

    assert done.stdout.splitlines() == ["0.0 1.0", "0.0 2.0", "0.0 3.0"], done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_process_of_roots_that_counts_in_memory_says_so_once_it_is_a_worker(
    free_ports: range, tmp_path: Path
) -> None:
    folder = tmp_path / "others"
    folder.mkdir(0o700)
    os.chown(folder, 65534, 65534)
    script = """
import sys, django_promports
from django.core.wsgi import get_wsgi_application
get_wsgi_application()
print("READY", file=sys.stderr)
django_promports.start()
django_promports.start()
"""
    done = run_python(script, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[5]}", DEMO_LEDGER_DIR=str(folder))

    before, _, after = done.stderr.partition("READY")
    assert "Counting in memory" not in before
    assert after.count("Counting in memory") == 1, done.stderr


def test_start_is_idempotent_and_stop_frees_the_port(free_ports: range, this_process: None, settings: Any) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports

    first = django_promports.start()
    second = django_promports.start()
    held = django_promports.port()
    about = describe(free_ports[0])
    django_promports.stop()

    assert first == second == held == free_ports[0]
    assert about["pid"] == os.getpid()
    assert django_promports.port() is None
    assert not describe(free_ports[0])
    assert django_promports.start() == free_ports[0]


def test_who_stopped_waiting_may_start_again(free_ports: range, this_process: None, settings: Any) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:1]
    with socket.create_server(("127.0.0.1", free_ports[0])):
        assert django_promports.start() is None
        django_promports.stop()

    assert django_promports.start() == free_ports[0]


def test_disabled_claims_nothing(free_ports: range, this_process: None, settings: Any) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    settings.PROMPORTS_ENABLED = False

    assert django_promports.start() is None


def test_pytest_holds_no_port(client: Client, free_ports: range, settings: Any) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports

    client.get("/nowhere/")

    assert django_promports.port() is None
    assert not listening_ports(os.getpid()) & set(free_ports)


@pytest.mark.parametrize("options", [["--noreload"], []], ids=["noreload", "reload"])
def test_runserver_serves_metrics_from_the_process_that_answers_requests(
    options: list[str], free_ports: range, tmp_path: Path
) -> None:
    with runserver(tmp_path, free_ports, *options) as site:
        site.child.wait_until(lambda: site.request() == 200, "runserver answers")

        about = site.child.wait_until(lambda: describe(site.ports[0]), "the endpoint answers")

        server = site.child.children()[0] if not options else site.child.pid
        assert about["pid"] == server
        assert about["command"] == f"manage.py runserver {site.address}"
        if server != site.child.pid:
            assert not listening_ports(site.child.pid)
        assert not describe(site.ports[1])


def test_run_main_in_the_environment_harms_nothing(free_ports: range, tmp_path: Path) -> None:
    with gunicorn(tmp_path, free_ports, workers=1, RUN_MAIN="true") as site:
        site.wait_for_workers(1)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"DEMO_PORT_RANGE": ""}, "PROMPORTS_PORT_RANGE is ''"),
        ({"DEMO_PORT_RANGE": "19131-19100"}, "it is reversed"),
        ({"DEMO_PORT_RANGE": "80-90"}, "promports.E010"),
        ({"DEMO_ADDRESS": "192.0.2.1"}, "this machine cannot bind it"),
        ({"PROMETHEUS_MULTIPROC_DIR": "/nonexistent"}, "promports.E003"),
    ],
    ids=["empty", "reversed", "privileged", "address", "multiprocess"],
)
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
def test_with_a_wrong_setting_the_site_is_served_and_the_log_says_what_to_do(
    preload: list[str], setting: dict[str, str], said: str, free_ports: range, tmp_path: Path
) -> None:
    if "PROMETHEUS_MULTIPROC_DIR" in setting:
        setting = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    data = str(database(tmp_path))
    with gunicorn(tmp_path, free_ports, *preload, workers=1, DEMO_DATABASE=data, **setting) as site:
        site.child.wait_until(lambda: site.request() == 200, "the site answers")

        output = site.child.output()
        assert output.count("ERROR django_promports") == 1, output
        assert said in output
        assert "Traceback" not in output
    check = manage("check", DEMO_DATABASE=data, **setting)
    assert check.returncode == 1
    assert said in check.stderr


# Its last object takes as long to delete as the test wants. (Under gevent nothing can sleep any more at that time.)
SLOW_WSGI = """
import os
import pathlib
import time
from demo_site.wsgi import application

class Slow:
    folder = pathlib.Path(__file__).parent
    monotonic, give_way = time.monotonic, os.sched_yield

    def __del__(self):
        (self.folder / "ending").touch()
        deadline = self.monotonic() + 60
        while not (self.folder / "end").exists() and self.monotonic() < deadline:
            self.give_way()

slow = Slow()
"""

REQUESTS = "django_http_requests_before_middlewares_total"
SUCCESSOR = f"""
import django, django_promports
from tests.servers import scrape
django.setup()
port = django_promports.start()
print(port, scrape(port)["{REQUESTS}"])
"""

HELPER_SITE = """
import multiprocessing, signal
from demo_site.settings import *
ROOT_URLCONF = "helper_site"
from django.http import HttpResponse
from django.urls import path

def helper(request):
    # Not time.sleep(): under gevent it would let the worker's own greenlets run on in the helper.
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    child.start()
    return HttpResponse(str(child.pid))

urlpatterns = [path("", lambda request: HttpResponse()), path("helper/", helper)]
"""


def _start_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
