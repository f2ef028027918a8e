"""Scrapes: who scrapes this process, when and how often. Counts are safe once they were scraped completely.

A scrape is complete when a peer that is not a process of this site has asked for all metrics and received the whole
response. Whether Prometheus kept it cannot be seen from here: a scrape over its sample_limit is received and dropped.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic

from django_promports.http import Request
from django_promports.own import own_metrics
from django_promports.proof import PROBE

# Prometheus sends it with each scrape: https://prometheus.io/docs/prometheus/latest/configuration/configuration/
PROMETHEUS_HEADER = "X-Prometheus-Scrape-Timeout-Seconds"
# Scrapers that are remembered; of more, the one that was not seen for the longest time is forgotten.
MAX_SCRAPERS = 8


@dataclass
class Scraper:
    """A client that scrapes. interval, longest: seconds between two scrapes of one port, the last ones and the longest.

    times: when the render of the last scrape of each port began (time.monotonic).
    """

    address: str
    interval: float = 0.0
    longest: float = 0.0
    times: dict[int, float] = field(default_factory=dict)


class Scrapes:
    """The complete scrapes of one process, on all its ports.

    count: how many there were.
    """

    def __init__(self) -> None:
        self._is_prometheus_known = False
        self._counts: Counter[int] = Counter()
        # By address and what else tells scrapers apart: two of them may share an address, and have other intervals.
        self._scrapers: dict[tuple[str, str, str], Scraper] = {}
        own = own_metrics()
        for gauge in (own.scraped_at, own.interval):  # those of the process that forked this one
            gauge.clear()

    @property
    def count(self) -> int:
        return sum(self._counts.values())

    @property
    def longest_interval(self) -> float:
        """The longest interval between two scrapes of a port by one scraper, in seconds; 0 if none came twice."""
        return max((scraper.longest for scraper in self._scrapers.values()), default=0.0)

    def see(self, request: Request) -> None:
        """Note that a request for metrics came, whether it is answered completely or not.

        Once Prometheus was seen, only its requests are complete scrapes.
        """
        self._is_prometheus_known |= bool(request.header(PROMETHEUS_HEADER))

    def note(self, request: Request, peer: str, port: int, began: float) -> bool:
        """Note that a response with all metrics was received; return whether that was a complete scrape.

        peer: its address. port: that was scraped. began: when the render began, in seconds of time.time(). A page in a
        browser, a probe and a HEAD request never count.
        """
        timeout = request.header(PROMETHEUS_HEADER)
        if request.command != "GET" or request.header(PROBE) or "text/html" in request.header("Accept"):
            return False
        if self._is_prometheus_known and not timeout:
            return False
        self._counts[port] += 1
        key, own = (peer, timeout, request.header("User-Agent")), own_metrics()
        now = monotonic() - max(time.time() - began, 0.0)
        scraper = self._scrapers.pop(key, None) or Scraper(peer)
        self._scrapers[key] = scraper  # the latest is the last one
        if port in scraper.times:
            scraper.interval = now - scraper.times[port]
            scraper.longest = max(scraper.longest, scraper.interval)
        scraper.times[port] = now
        own.scraped_at.labels(peer).set(began)
        own.interval.labels(peer).set(max(one.longest for one in self._scrapers.values() if one.address == peer))
        if len(self._scrapers) > MAX_SCRAPERS:
            self._forget(next(iter(self._scrapers)))
        return True

    def _forget(self, key: tuple[str, str, str]) -> None:
        address = self._scrapers.pop(key).address
        if all(scraper.address != address for scraper in self._scrapers.values()):
            own_metrics().scraped_at.remove(address)
            own_metrics().interval.remove(address)

    def describe(self, port: int) -> Mapping[str, object]:
        """Return what / shows of a port: how many scrapes, who made the last one, its age, and the interval."""
        scrapers = [scraper for scraper in self._scrapers.values() if port in scraper.times]
        if not scrapers:
            return {"total": self._counts[port]}
        last = max(scrapers, key=lambda scraper: scraper.times[port])
        return {
            "total": self._counts[port],
            "by": last.address,
            "seconds_ago": round(monotonic() - last.times[port], 3),
            "interval_seconds": round(last.interval, 3),
        }
