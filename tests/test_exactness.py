"""Nothing counted is ever lost: a real Prometheus, real gunicorn, recycling, reloads and kills under load."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.servers import Gunicorn, Prometheus, gunicorn, manage, prometheus, scrape

WORKERS = 4
# What is asked, and the series that count it. django-prometheus' metric is made when its middleware is loaded, the
# shop's when Django imports the URLconf, which it does at the first request.
COUNTED = {
    ("GET", "/"): ("django_http_requests_total_by_view_transport_method_total", 'view="index"'),
    ("GET", "/search/?q=g"): ("shop_search_seconds_count", ""),
    ("POST", "/teas/1/order/"): ("shop_orders_total", 'tea="Assam"'),
}
# A histogram and a summary, in all their parts.
PARTS = ["shop_search_seconds_bucket", "shop_search_seconds_sum", "shop_ordered_grams_count", "shop_ordered_grams_sum"]


class Traffic:
    """Requests from several threads until stop(): how many were answered, and how many may be counted all the same."""

    def __init__(self, address: str, threads: int = 4) -> None:
        self.answered: Counter[tuple[str, str]] = Counter()
        self.unanswered: Counter[tuple[str, str]] = Counter()
        self._address = address
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        for asked in itertools.cycle(random.sample(list(COUNTED), len(COUNTED))):
            if self._ended.wait(0.02):
                return
            try:
                status = self._ask(*asked)
            except ConnectionRefusedError:
                continue  # nobody can have counted it
            with self._lock:
                (self.answered if status in (200, 201) else self.unanswered)[asked] += 1

    def _ask(self, method: str, path: str) -> int:
        with contextlib.closing(http.client.HTTPConnection(self._address, timeout=20)) as connection:
            connection.connect()
            try:
                connection.request(method, path)
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                return 0
            return response.status


def do_nothing(site: Gunicorn, seconds: float) -> None:
    time.sleep(seconds)


def kill_every_two_seconds(site: Gunicorn, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(2)
        live = site.child.wait_until(site.live, "a worker answers")
        os.kill(random.choice(list(live.values())), signal.SIGKILL)


def reload_twice(site: Gunicorn, seconds: float) -> None:
    for _ in range(2):
        time.sleep(seconds / 2)
        before = site.live()
        os.kill(site.child.pid, signal.SIGHUP)

        def renewed(before: dict[int, int] = before) -> bool:
            live = site.live()
            return len(live) == WORKERS and not set(before.values()) & set(live.values())

        site.child.wait_until(renewed, "new workers answer")
        assert sorted(site.live()) == sorted(before), "the new workers have the ports of the old ones"


# The options of gunicorn, what happens meanwhile, and how wide the range is.
SCENARIOS: dict[str, tuple[list[str], Callable[[Gunicorn, float], None], int]] = {
    "plain": ([], do_nothing, 12),
    "recycle": (["--max-requests", "50"], do_nothing, 12),
    "preload-recycle": (["--preload", "--max-requests", "50"], do_nothing, 12),
    "kill": ([], kill_every_two_seconds, 12),
    "preload-kill": (["--preload"], kill_every_two_seconds, 12),
    "reload": ([], reload_twice, 12),
    "preload-reload": (["--preload"], reload_twice, 12),
    "reload-narrow": (["--preload"], reload_twice, WORKERS),
    "threads": (["-k", "gthread", "--threads", "8", "--max-requests", "100"], do_nothing, 12),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_prometheus_counts_every_answered_request_once(
    scenario: str, program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    options, disturb, width = SCENARIOS[scenario]
    with watched(program, free_ports, tmp_path, width) as (server, site_ports):
        with gunicorn(tmp_path, site_ports, *options) as site:
            site.wait_for_workers(WORKERS)
            traffic = Traffic(site.address)
            disturb(site, 12)
            traffic.stop()

            check(server, site, traffic)
        assert len(list((tmp_path / "ledgers").iterdir())) <= width
        if scenario != "plain":
            assert site.child.output().count("Booting worker") > WORKERS


def test_prometheus_counts_every_answered_request_once_over_a_restart(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    with watched(program, free_ports, tmp_path, 12) as (server, site_ports):
        with gunicorn(tmp_path, site_ports) as site:
            site.wait_for_workers(WORKERS)
            traffic = Traffic(site.address)
            time.sleep(5)
        with gunicorn(tmp_path, site_ports) as site:
            site.wait_for_workers(WORKERS)
            time.sleep(5)
            traffic.stop()

            check(server, site, traffic)


@contextlib.contextmanager
def watched(
    program: Callable[[str], str], free_ports: range, tmp_path: Path, width: int
) -> Iterator[tuple[Prometheus, Sequence[int]]]:
    """Run Prometheus at 1 s scrapes over so many ports; give it, and the ports of gunicorn."""
    *metric_ports, site_port, prometheus_port = [*free_ports[:width], *free_ports[-2:]]
    with prometheus(program("prometheus"), tmp_path, prometheus_port) as server:
        exported = manage(
            "export_targets",
            "--output",
            str(tmp_path / "targets/django.json"),
            DEMO_PORT_RANGE=f"{metric_ports[0]}-{metric_ports[-1]}",
        )
        assert exported.returncode == 0, exported.stderr
        yield server, [*metric_ports, site_port]


def check(server: Prometheus, site: Gunicorn, traffic: Traffic) -> None:
    """Assert that ledgers and Prometheus have each answered request once, and at most once what was not answered."""
    site.child.wait_until(lambda: len(site.live()) == WORKERS, "all workers answer again")
    for asked, (metric, label) in COUNTED.items():
        answered, unanswered = traffic.answered[asked], traffic.unanswered[asked]
        in_ledgers = total(site, metric, label)
        assert answered > 30
        assert answered <= in_ledgers <= answered + unanswered, f"{metric}\n{site.child.output()}"
    for metric, label in [*COUNTED.values(), *((part, "") for part in PARTS)]:
        expected = pytest.approx(total(site, metric, label))  # sums are floats, added in another order

        def counted(metric: str = metric, label: str = label, expected: object = expected) -> bool:
            return server.count(f"{metric}{{{label}}}") == expected

        server.child.wait_until(counted, f"Prometheus has counted {metric} as the ledgers did: {expected}")
    assert server.count("shop_search_seconds_bucket{le='+Inf'}") == server.count("shop_search_seconds_count")


def total(site: Gunicorn, metric: str, label: str) -> float:
    """Return the sum over all workers, as they show it now."""
    samples = [sample for port in site.live() for sample in scrape(port).items()]
    return sum(
        value for name, value in samples if name.startswith(metric) and name[len(metric) :][:1] in "{" and label in name
    )
