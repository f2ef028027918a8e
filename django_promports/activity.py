"""What one process did lately: how many requests it had and how long they took, looked up every few seconds.

The numbers are django-prometheus' own counters, so nothing is added to a request; the endpoint's loop looks at two of
them (some 70 us, every 5 s) and keeps the last minutes (10 kB). Where its middleware is not installed, nothing is kept.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram

from django_promports.loop import Loop, Steps

REQUESTS = "django_http_requests_before_middlewares_total"
LATENCY = "django_http_requests_latency_including_middlewares_seconds"
SAMPLE_SECONDS = 5.0
KEPT_SECONDS = 300.0


class Sample(NamedTuple):
    """The counts of a moment, which may begin with those of earlier processes: only differences mean anything."""

    ago: float  # seconds
    requests: float
    answered: float
    seconds: float  # that all the answers took


class Activity:
    """The samples of this process's last minutes.

    namespace: what the names of django-prometheus' metrics begin with, if anything.
    """

    def __init__(self, registry: CollectorRegistry, namespace: str = "") -> None:
        self._collectors = registry._names_to_collectors
        self._names = [f"{namespace}_{name}" if namespace else name for name in (REQUESTS, LATENCY)]
        self._kept: deque[tuple[float, float, float, float]] = deque(maxlen=int(KEPT_SECONDS / SAMPLE_SECONDS) + 1)

    def keep(self, loop: Loop) -> Steps[None]:
        """Take a sample every few seconds, for ever."""
        while True:
            self._kept.extend(self._take())
            yield from loop.sleep(SAMPLE_SECONDS)

    def samples(self) -> list[Sample]:
        """Return what is kept, oldest first, and the counts of now; empty where nobody counts requests."""
        taken = [*self._kept, *self._take()]
        now = monotonic()
        return [Sample(round(now - moment, 2), *counts) for moment, *counts in taken]

    def _take(self) -> list[tuple[float, float, float, float]]:
        requests, latency = map(self._collectors.get, self._names)
        if type(requests) is not Counter or type(latency) is not Histogram:
            return []
        if requests._labelnames or latency._labelnames:  # they are others of that name
            return []
        counts = {**_read(requests), **_read(latency)}
        return [(monotonic(), counts["_total"], counts["_count"], counts["_sum"])]


def _read(metric: Any) -> dict[str, float]:
    """Return the numbers of a metric by what their samples' names end in."""
    return {
        sample.name.removeprefix(family.name): sample.value for family in metric.collect() for sample in family.samples
    }
