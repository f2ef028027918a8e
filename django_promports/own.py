"""The package's own metrics, promports_*.

They are created when the process first serves, never at import: with PROMETHEUS_MULTIPROC_DIR set, prometheus_client
opens a file for each new metric, and if that failed, the site would not start. With it set, a check forbids serving.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from prometheus_client import Counter, Gauge


class OwnMetrics(NamedTuple):
    """served, failed, refused: the children of promports_scrapes_total."""

    port: Gauge
    waiting: Gauge
    served: Counter
    failed: Counter
    refused: Counter
    collector_failures: Counter
    scraped_at: Gauge
    interval: Gauge
    waits: Counter


@cache
def own_metrics() -> OwnMetrics:
    """Return the metrics of this process, in prometheus_client's default registry, created at the first call."""
    scrapes = Counter(
        "promports_scrapes_total",
        "Scrapes of this process: served, failed (an error while answering), refused (malformed, unauthorized, too "
        "slow or one connection too many).",
        ["outcome"],
    )
    return OwnMetrics(
        Gauge("promports_port", "The port that this process holds."),
        Gauge("promports_waiting_processes", "Processes of this machine that wait for a port of the range."),
        scrapes.labels("served"),
        scrapes.labels("failed"),
        scrapes.labels("refused"),
        Counter(
            "promports_collector_failures_total",
            "Times that a collector raised, or that labels or numbers could not be shown in a scrape.",
        ),
        Gauge(
            "promports_last_scrape_timestamp_seconds",
            "When this process was last scraped completely, by the address of the scraper.",
            ["scraper"],
        ),
        Gauge(
            "promports_longest_scrape_interval_seconds",
            "The longest time between two complete scrapes of this process, by the address of the scraper.",
            ["scraper"],
        ),
        Counter(
            "promports_waits_total",
            "Times that this process waited for a port: because the range was full (range_full), or for one that an "
            "older process might free in a reload (reload).",
            ["reason"],
        ),
    )
