"""The demo site under traffic and a real Prometheus, and whether each answered request was counted once."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.servers import Prometheus, Site, export_targets, prometheus, scrape
from tests.traffic import Traffic

# The requests, and the series that count them. django-prometheus creates its metric when its middleware is loaded, the
# shop when Django imports the URLconf, at the first request.
COUNTED = {
    ("GET", "/"): ("django_http_requests_total_by_view_transport_method_total", 'view="index"'),
    ("GET", "/search/?q=g"): ("shop_search_seconds_count", ""),
    ("POST", "/teas/1/order/"): ("shop_orders_total", 'tea="Assam"'),
}
# A histogram and a summary, with all their samples.
PARTS = ["shop_search_seconds_bucket", "shop_search_seconds_sum", "shop_ordered_grams_count", "shop_ordered_grams_sum"]


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
