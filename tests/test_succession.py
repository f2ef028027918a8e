"""No count is stranded: a real Prometheus sees each answered request once, however workers follow each other.

The moments are random, and no test waits for a constant of the software. The seed is in the name of each test.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from django_promports.reading import read_status
from tests.commands import run_python
from tests.counted import COUNTED, check, watched
from tests.servers import (
    ROOT,
    Site,
    describe,
    export_targets,
    get,
    gunicorn,
    prometheus,
    scrape,
    send_requests,
    wait_until,
)
from tests.traffic import Traffic

pytestmark = pytest.mark.succession
WIDTH = 12
# A site with a view that takes its time, and workers that start and end slowly if they are told to.
SITE = """
import atexit, os, time
from demo_site.wsgi import application
from django.http import HttpResponse
from django.urls import path
from demo_site import urls

def slow(request, seconds):
    time.sleep(seconds)
    return HttpResponse("at last")

def fork(request, seconds):
    if os.fork() == 0:
        time.sleep(seconds)
        os._exit(0)
    return HttpResponse(str(os.getpid()))

urls.urlpatterns.append(path("slow/<int:seconds>/", slow, name="slow"))
urls.urlpatterns.append(path("fork/<int:seconds>/", fork, name="fork"))
atexit.register(time.sleep, float(os.environ.get("TEARDOWN_SECONDS", 0)))
"""


@contextlib.contextmanager
def site_under_traffic(
    program: Callable[[str], str],
    free_ports: range,
    tmp_path: Path,
    *options: str,
    workers: int = 4,
    left: int | None = None,
    **env: str,
) -> Iterator[tuple[Site, Traffic]]:
    """Run the site under traffic and Prometheus; afterwards everything that was answered has been counted there.

    left: how many workers there are at the end.
    """
    (tmp_path / "slowsite.py").write_text(SITE)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", **env}
    with (
        watched(program, free_ports, tmp_path, WIDTH) as (server, site_ports),
        gunicorn(tmp_path, site_ports, *options, "slowsite", workers=workers, **env) as site,
    ):
        site.child.wait_until(site.is_listening, "the site listens")
        traffic = Traffic(site.address, COUNTED)
        try:
            yield site, traffic
            time.sleep(2)
        finally:
            traffic.stop()
        check(server, site, traffic, workers if left is None else left)


def stop_workers(site: Site, count: int, left: int, chance: random.Random) -> None:
    """Stop so many workers one after the other; the kernel would merge signals that are sent at once."""
    for number in range(count, 0, -1):
        time.sleep(chance.uniform(0, 0.5))
        os.kill(site.child.pid, signal.SIGTTOU)
        site.wait_for_workers(left + number - 1)


def hang_up(site: Site) -> None:
    """Reload, and wait until every worker is a new one."""
    before = site.child.children()
    os.kill(site.child.pid, signal.SIGHUP)
    site.wait_until_replaced(before, 4)


@pytest.mark.parametrize("age", [1, 2, 4, 8])
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
def test_a_reload_at_any_age_strands_nothing(
    preload: list[str], age: int, program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    with site_under_traffic(program, free_ports, tmp_path, *preload) as (site, _):
        site.wait_for_workers()
        time.sleep(age * random.Random(age).uniform(0.6, 1))
        hang_up(site)
        time.sleep(random.Random(age).uniform(0, 3))
        hang_up(site)


@pytest.mark.parametrize("seed", range(3))
def test_recycling_reloads_and_kills_together_strand_nothing(
    seed: int, program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    with site_under_traffic(program, free_ports, tmp_path, "--preload", "--max-requests", "50") as (site, _):
        for _ in range(4):
            time.sleep(chance.uniform(0.2, 4))
            if chance.random() < 0.5:
                os.kill(site.child.pid, signal.SIGHUP)
            else:
                pids = site.child.wait_until(site.child.children, "there is a worker")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), signal.SIGKILL)


def test_a_request_that_outlives_a_reload_is_counted(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    options = ["--preload", "--graceful-timeout", "60", "--timeout", "90"]
    counted = 'django_http_requests_total_by_view_transport_method_total{view="slow"}'
    with watched(program, free_ports, tmp_path, WIDTH) as (server, site_ports):
        (tmp_path / "slowsite.py").write_text(SITE)
        with gunicorn(tmp_path, site_ports, *options, "slowsite", PYTHONPATH=f"{tmp_path}:{ROOT}") as site:
            old = site.wait_for_workers()
            answers: list[bytes] = []
            asking = threading.Thread(target=lambda: answers.append(get(f"http://{site.address}/slow/40/", seconds=90)))
            asking.start()
            time.sleep(random.Random(1).uniform(0.5, 2))
            os.kill(site.child.pid, signal.SIGHUP)
            site.child.wait_until(lambda: len(set(site.live().values()) - set(old.values())) == 4, "four new workers")
            assert send_requests(50, lambda _: site.request()).count(200) == 50
            asking.join()

            assert answers == [b"at last"]
            server.child.wait_until(lambda: server.count(counted) == 1, "Prometheus has counted the slow request")
            index = counted.replace("slow", "index")
            server.child.wait_until(lambda: server.count(index) == 50, "Prometheus has counted the others")


def test_workers_have_the_lowest_ports_again_after_the_next_reload(free_ports: range, tmp_path: Path) -> None:
    (tmp_path / "slowsite.py").write_text(SITE)
    with gunicorn(tmp_path, free_ports, "--preload", "slowsite", PYTHONPATH=f"{tmp_path}:{ROOT}") as site:
        site.child.wait_until(site.is_listening, "the site listens")
        asking = [threading.Thread(target=site.request, args=["/slow/5/"]) for _ in range(4)]
        for thread in asking:
            thread.start()
        old = site.wait_for_workers()
        os.kill(site.child.pid, signal.SIGHUP)
        site.child.wait_until(lambda: len(site.live()) == 8, "the new workers have ports beside the old ones")
        for thread in asking:
            thread.join()

        heirs = site.child.wait_until(
            lambda: heirs if len(heirs := site.heirs()) == 4 else {}, "the old ones have heirs"
        )
        assert heirs.keys() == old.keys()
        hang_up(site)

        assert site.live().keys() == old.keys() == set(free_ports[:4])


def test_fewer_workers_strand_nothing(program: Callable[[str], str], free_ports: range, tmp_path: Path) -> None:
    with site_under_traffic(program, free_ports, tmp_path, workers=8, left=2) as (site, _):
        site.wait_for_workers(8)
        stop_workers(site, 6, 2, random.Random(2))


def test_an_upgrade_with_both_masters_for_a_minute_strands_nothing(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    with site_under_traffic(program, free_ports, tmp_path, "--preload", "--pid", str(tmp_path / "pid")) as (site, _):
        old = site.wait_for_workers()
        os.kill(site.child.pid, signal.SIGUSR2)
        site.child.wait_until(lambda: len(site.live()) == 8, "the new master's workers have ports")
        time.sleep(60)
        assert set(old.values()) <= set(site.live().values())
        site.child.process.terminate()
        site.child.wait_until(lambda: not set(old.values()) & set(site.live().values()), "the old workers have ended")


def test_workers_that_take_long_to_end_strand_nothing(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    with site_under_traffic(program, free_ports, tmp_path, "--preload", TEARDOWN_SECONDS="6") as (site, _):
        site.wait_for_workers()
        time.sleep(random.Random(3).uniform(0, 3))
        hang_up(site)


def test_half_of_the_workers_after_a_restart_strand_nothing(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    with watched(program, free_ports, tmp_path, WIDTH) as (server, site_ports):
        with gunicorn(tmp_path, site_ports) as site:
            site.wait_for_workers()
            traffic = Traffic(site.address, COUNTED)
            time.sleep(random.Random(4).uniform(2, 4))
        with gunicorn(tmp_path, site_ports, workers=2) as site:
            site.wait_for_workers(2)
            time.sleep(2)
            traffic.stop()
            check(server, site, traffic, 2)


@pytest.mark.parametrize("end", ["killed", "killed-after-fork", "stopped"])
def test_an_heir_that_ends_or_hangs_strands_nothing(
    end: str, program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    with site_under_traffic(program, free_ports, tmp_path, left=2) as (site, _):
        site.wait_for_workers()
        stop_workers(site, 2, 2, random.Random(5))
        heirs = site.child.wait_until(
            lambda: heirs if len(heirs := site.heirs()) == 2 else {}, "two ports have an heir"
        )
        port, heir = next(iter(heirs.items()))
        if end == "stopped":
            os.kill(heir, signal.SIGSTOP)
            os.kill(site.child.pid, signal.SIGTTIN)
            time.sleep(random.Random(5).uniform(1, 3))
            os.kill(heir, signal.SIGCONT)
            site.wait_for_workers(3)
            stop_workers(site, 1, 2, random.Random(5))
            return
        if end == "killed-after-fork":
            forked: set[int] = set()

            def has_forked() -> bool:
                forked.add(int(get(f"http://{site.address}/fork/60/")))
                return heir in forked

            site.child.wait_until(has_forked, "the heir has forked a child that outlives it")
        os.kill(heir, signal.SIGKILL)
        # Either the successor has the port or another heir: a child of the killed one does not keep it.
        site.child.wait_until(lambda: site.abouts().get(port, {}).get("pid") not in (None, heir), "the port is served")


def test_a_second_prometheus_with_a_longer_interval_misses_nothing(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    slow_folder = tmp_path / "slow"
    slow_folder.mkdir()
    with (
        watched(program, free_ports, tmp_path, WIDTH) as (server, site_ports),
        prometheus(program("prometheus"), slow_folder, free_ports[-3], seconds=7) as slow,
        gunicorn(tmp_path, site_ports, "--preload") as site,
    ):
        export_targets(slow_folder / "targets/django.json", site_ports[:-1])
        site.wait_for_workers()
        traffic = Traffic(site.address, COUNTED)
        time.sleep(random.Random(6).uniform(5, 9))
        stop_workers(site, 3, 1, random.Random(6))
        traffic.stop()
        check(server, site, traffic, 1)
        check(slow, site, traffic, 1)


def test_workers_whose_boots_are_spread_are_metered_as_soon_as_they_are_ready(
    free_ports: range, tmp_path: Path
) -> None:
    config = tmp_path / "boots.py"
    config.write_text(
        "import time\n"
        "def post_fork(server, worker):\n    time.sleep(worker.age - 1)\n"
        "def post_worker_init(worker):\n    print('READY', worker.pid, time.time(), flush=True)\n"
    )
    with gunicorn(tmp_path, free_ports, "-c", str(config), "demo_site.wsgi", workers=10) as site:
        live = site.wait_for_workers(10)
        ready = {int(pid): float(moment) for pid, moment in re.findall(r"READY (\d+) (\S+)", site.child.output())}
    claimed = {pid: read_status(tmp_path / f"ledgers/{port}.ledger") for port, pid in live.items()}
    assert ready.keys() == claimed.keys()
    late = {pid: status.opened_at - ready[pid] for pid, status in claimed.items() if status is not None}
    assert len(late) == 10
    assert max(late.values()) < 1, late


def test_another_worker_is_metered_within_three_seconds(free_ports: range, tmp_path: Path) -> None:
    with gunicorn(tmp_path, free_ports, "--preload", workers=2) as site:
        old = site.wait_for_workers(2)
        for _ in range(2):
            time.sleep(random.Random(7).uniform(0, 3))
            before, began = site.live(), time.time()
            os.kill(site.child.pid, signal.SIGTTIN)
            live = site.wait_for_workers(len(before) + 1)
            (port,) = live.keys() - before.keys()
            status = read_status(tmp_path / f"ledgers/{port}.ledger")
            assert status is not None
            assert status.opened_at - began < 3
        assert old.items() <= site.live().items()
        waits = site.child.output().count("waits up to 2 s for a port")
        assert sum(scrape(port).get('promports_waits_total{reason="reload"}', 0) for port in site.live()) == waits


# An heir that looks more often than ours, and a process whose forked children claim, count once and end at once.
HEIR = """
import sys
import django
from django_promports import heir
heir.LOOK_SECONDS = 0.005
django.setup()
import django_promports
print(django_promports.start(), flush=True)
sys.stdin.read()
"""
CLAIMS = """
import os, random, time
import django
django.setup()
import django_promports
from prometheus_client import Counter
counter = Counter("claims", "Claims.")
took = []
for number in range(1000):
    time.sleep(random.uniform(0, 0.03))
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        began = time.monotonic()
        port = django_promports.start()
        while number == 0 and port is None:  # the first port that nobody had before: the older processes' may come free
            time.sleep(0.01)
            port = django_promports.port()
            began = time.monotonic()
        counter.inc()
        os.write(write_end, f"{port} {time.monotonic() - began}".encode())
        os._exit(0)
    port, seconds = os.read(read_end, 100).split()
    os.close(read_end)
    os.close(write_end)
    os.wait()
    assert port != b"None", number
    took.append(float(seconds))
print(sorted(took)[500], max(took))
"""


def test_a_thousand_claims_against_adopting_heirs_are_neither_delayed_nor_miscounted(
    free_ports: range, tmp_path: Path
) -> None:
    env = {"DEMO_PORT_RANGE": f"{free_ports[0]}-{free_ports[4]}", "DJANGO_SETTINGS_MODULE": "demo_site.settings"}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))
        heirs = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", HEIR],
                    cwd=ROOT,
                    env={**os.environ, **env},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        for heir in heirs:
            assert heir.stdout is not None
            assert heir.stdout.readline().strip().isdigit()
        for port in free_ports[:2]:
            scrape(port)

        done = run_python(CLAIMS, seconds=240, **env)

        assert done.returncode == 0, done.stderr
        median, longest = map(float, done.stdout.split())
        assert median < 0.1
        assert longest < 5  # on a busy machine an heir may be as slow as one that is stopped, and is passed over
        wait_until(lambda: describe(free_ports[2]).get("role") == "heir", "the last port has an heir")
        assert (
            scrape(free_ports[2])["claims_total"]
            + sum(scrape(port).get("claims_total", 0) for port in free_ports[3:5] if describe(port))
            == 1000
        )
        for heir in heirs:
            heir.communicate(timeout=60)
    assert (tmp_path / "log").read_text().count("Handed a port over") > 100
