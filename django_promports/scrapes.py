"""Scrapes: who scrapes this process, when and how often. Counts are safe once they were scraped completely.

A scrape is complete when a peer that is not a process of this site has asked for all metrics and received the whole
response. Whether Prometheus kept it cannot be seen from here: a scrape over its sample_limit is received and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import NamedTuple

from django_promports.http import Request
from django_promports.own import own_metrics
from django_promports.proof import PROBE

# Prometheus sends it with each scrape: https://prometheus.io/docs/prometheus/latest/configuration/configuration/
PROMETHEUS_HEADER = "X-Prometheus-Scrape-Timeout-Seconds"
# Scrapers that are remembered; of more, the one that was not seen for the longest time is forgotten.
MAX_SCRAPERS = 8


class Scraper(NamedTuple):
    """A client that scrapes. scraped_at: seconds of time.monotonic(). interval: the longest so far, or 0."""

    scraped_at: float
    interval: float = 0.0


class Scrapes:
    """The complete scrapes of one process, on all its ports.

    count: how many there were.
    """

    def __init__(self) -> None:
        self.count = 0
        self._is_prometheus_known = False
        # By address, timeout and port: two Prometheus servers may share an address, and have other intervals.
        self._scrapers: dict[tuple[str, str, str], Scraper] = {}

    @property
    def longest_interval(self) -> float:
        """The longest interval between two scrapes of one scraper, in seconds; 0 if none came twice."""
        return max((scraper.interval for scraper in self._scrapers.values()), default=0.0)

    def note(self, request: Request, peer: str, began: float) -> bool:
        """Note that a response with all metrics was received; return whether that was a complete scrape.

        peer: its address. began: when the render began, in seconds of time.time(). Once Prometheus was seen, only its
        requests count. A page in a browser and a probe never do.
        """
        timeout = request.header(PROMETHEUS_HEADER)
        self._is_prometheus_known |= bool(timeout)
        if request.command != "GET" or request.header(PROBE) or "text/html" in request.header("Accept"):
            return False
        if self._is_prometheus_known and not timeout:
            return False
        self.count += 1
        key, now = (peer, timeout, request.header("Host")), monotonic()
        former = self._scrapers.pop(key, None)  # so that the latest is the last one
        interval = max(former.interval, now - former.scraped_at) if former else 0.0
        self._scrapers[key] = Scraper(now, interval)
        own = own_metrics()
        own.scraped_at.labels(peer).set(began)
        own.interval.labels(peer).set(max(one.interval for (by, *_), one in self._scrapers.items() if by == peer))
        if len(self._scrapers) > MAX_SCRAPERS:
            self._forget(next(iter(self._scrapers)))
        return True

    def _forget(self, key: tuple[str, str, str]) -> None:
        del self._scrapers[key]
        if not any(peer == key[0] for peer, *_ in self._scrapers):
            own_metrics().scraped_at.remove(key[0])
            own_metrics().interval.remove(key[0])

    def describe(self) -> Mapping[str, object]:
        """Return what / shows: how many scrapes, who made the last one, how long ago it was, and the interval."""
        if not self._scrapers:
            return {"count": self.count}
        (address, *_), scraper = list(self._scrapers.items())[-1]
        return {
            "count": self.count,
            "by": address,
            "ago": round(monotonic() - scraper.scraped_at, 3),
            "interval": round(scraper.interval, 3),
        }
