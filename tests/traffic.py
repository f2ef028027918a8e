"""Traffic on the demo site under the eyes of a real Prometheus, and whether each answered request was counted once."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.servers import Prometheus, Site, export_targets, prometheus, scrape

# The requests, and the series that count them. django-prometheus creates its metric when its middleware is loaded, the
# shop when Django imports the URLconf, at the first request.
COUNTED = {
    ("GET", "/"): ("django_http_requests_total_by_view_transport_method_total", 'view="index"'),
    ("GET", "/search/?q=g"): ("shop_search_seconds_count", ""),
    ("POST", "/teas/1/order/"): ("shop_orders_total", 'tea="Assam"'),
}
# A histogram and a summary, with all their samples.
PARTS = ["shop_search_seconds_bucket", "shop_search_seconds_sum", "shop_ordered_grams_count", "shop_ordered_grams_sum"]


class Traffic:
    """Requests from several threads until stop(): how many were answered, and how many others may have been counted."""

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
                continue  # it cannot have been counted
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


@contextlib.contextmanager
def watched(
    program: Callable[[str], str], free_ports: range, tmp_path: Path, width: int
) -> Iterator[tuple[Prometheus, Sequence[int]]]:
    """Run Prometheus with a scrape interval of 1 s over this many ports; give it, and the ports of gunicorn."""
    *metric_ports, site_port, prometheus_port = [*free_ports[:width], *free_ports[-2:]]
    with prometheus(program("prometheus"), tmp_path, prometheus_port) as server:
        export_targets(tmp_path / "targets/django.json", metric_ports)
        yield server, [*metric_ports, site_port]


def check(server: Prometheus, site: Site, traffic: Traffic, workers: int) -> None:
    """Assert that ledgers and Prometheus count each answered request once, and unanswered ones at most once."""
    site.child.wait_until(lambda: len(site.live()) == workers, "all workers answer again")
    for asked, (metric, label) in COUNTED.items():
        answered, unanswered = traffic.answered[asked], traffic.unanswered[asked]
        assert answered > 30
        in_ledgers = 0.0

        def is_exact(metric: str = metric, label: str = label, least: int = answered, more: int = unanswered) -> bool:
            nonlocal in_ledgers
            with contextlib.suppress(OSError, http.client.HTTPException):  # a worker was about to end, and has ended
                in_ledgers = total(site, metric, label)
            return least <= in_ledgers <= least + more

        try:
            site.child.wait_until(is_exact, f"{metric} has each answered request once")
        except AssertionError as error:
            raise AssertionError(f"{in_ledgers} in the ledgers, {answered} answered, {unanswered} not") from error
    for metric, label in [*COUNTED.values(), *((part, "") for part in PARTS)]:
        expected = pytest.approx(total(site, metric, label))  # float sums, added in a different order

        def counted(metric: str = metric, label: str = label, expected: object = expected) -> bool:
            return server.count(f"{metric}{{{label}}}") == expected

        server.child.wait_until(counted, f"Prometheus has counted {metric} as the ledgers did: {expected}")
    assert server.count("shop_search_seconds_bucket{le='+Inf'}") == server.count("shop_search_seconds_count")


def total(site: Site, metric: str, label: str) -> float:
    """Return the sum over all workers and heirs now."""
    samples = [sample for port in site.abouts() for sample in scrape(port).items()]
    return sum(
        value for name, value in samples if name.startswith(metric) and name[len(metric) :][:1] in "{" and label in name
    )
