"""Activity: the requests of one process in the last minutes and how long they took, sampled every few seconds.

The samples come from django-prometheus' own counters, so a request costs nothing more. The endpoint's loop reads two of
them (about 70 us, every 5 s) and keeps the last minutes (10 kB). Without django-prometheus' middleware nothing is kept.
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
    """The counts at one moment. They may include those of earlier processes, so only differences are meaningful."""

    ago: float  # seconds
    requests: float
    answered: float
    seconds: float  # that all answers took together


class Activity:
    """The samples of this process's last minutes.

    namespace: the prefix of the names of django-prometheus' metrics, if any.
    """

    def __init__(self, registry: CollectorRegistry, namespace: str = "") -> None:
        self._collectors = registry._names_to_collectors
        self._names = [f"{namespace}_{name}" if namespace else name for name in (REQUESTS, LATENCY)]
        self._kept: deque[tuple[float, float, float, float]] = deque(maxlen=int(KEPT_SECONDS / SAMPLE_SECONDS) + 1)

    def keep(self, loop: Loop) -> Steps[None]:
        """Take a sample every SAMPLE_SECONDS, forever."""
        while True:
            self._kept.extend(self._take())
            yield from loop.sleep(SAMPLE_SECONDS)

    def samples(self) -> list[Sample]:
        """Return the kept samples, oldest first, and a current one; empty if requests are not counted."""
        taken = [*self._kept, *self._take()]
        now = monotonic()
        return [Sample(round(now - moment, 2), *counts) for moment, *counts in taken]

    def _take(self) -> list[tuple[float, float, float, float]]:
        requests, latency = map(self._collectors.get, self._names)
        if type(requests) is not Counter or type(latency) is not Histogram:
            return []
        if requests._labelnames or latency._labelnames:  # other metrics of the same name
            return []
        counts = {**_read(requests), **_read(latency)}
        return [(monotonic(), counts["_total"], counts["_count"], counts["_sum"])]


def _read(metric: Any) -> dict[str, float]:
    """Return the numbers of a metric by the suffix of the sample's name."""
    return {
        sample.name.removeprefix(family.name): sample.value for family in metric.collect() for sample in family.samples
    }
