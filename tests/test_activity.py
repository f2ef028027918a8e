"""The samples that a process keeps of its last five minutes."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from django_promports import activity as activity_module
from django_promports.activity import KEPT_SECONDS, LATENCY, REQUESTS, SAMPLE_SECONDS, Activity
from django_promports.binding import Binding
from django_promports.ledger import Ledger
from django_promports.loop import Loop, Steps
from django_promports.page.rates import measure_all
from tests.servers import SECONDS


def count_requests(registry: CollectorRegistry, namespace: str = "") -> tuple[Counter, Histogram]:
    """Create the two metrics that django-prometheus' middleware creates."""
    return (
        Counter(REQUESTS, "Requests.", namespace=namespace, registry=registry),
        Histogram(LATENCY, "Latency.", namespace=namespace, registry=registry),
    )


@pytest.mark.parametrize("namespace", ["", "shop"])
def test_the_counts_of_now_are_those_of_the_middleware(namespace: str) -> None:
    registry = CollectorRegistry()
    requests, latency = count_requests(registry, namespace)
    requests.inc(3)
    latency.observe(0.25)
    latency.observe(0.5)

    (sample,) = Activity(registry, namespace).samples()

    assert sample[1:] == (3, 2, 0.75)
    assert 0 <= sample.ago < SECONDS


def test_without_the_middleware_there_is_nothing() -> None:
    registry = CollectorRegistry()
    Gauge(REQUESTS.removesuffix("_total"), "Another metric of that name.", registry=registry)
    Histogram(LATENCY, "With labels.", ["view"], registry=registry)

    assert Activity(registry).samples() == []


def test_what_earlier_processes_counted_is_no_request_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity_module, "SAMPLE_SECONDS", 0.001)
    for amount in (1000, 4):
        binding = Binding(CollectorRegistry())
        binding.open(Ledger(tmp_path / "1.ledger", "site"))
        activity, loop = Activity(binding.registry), Loop()
        loop.spawn(activity.keep(loop))
        loop.turn()
        requests, _ = count_requests(binding.registry)  # at the first request, it may be
        loop.turn()
        requests.inc(amount)
        taken = activity.samples()
        loop.close()
        binding.close()

    assert taken[0].requests == 1000
    assert taken[-1].requests - taken[0].requests == 4


def test_only_the_last_minutes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    requests, _ = count_requests(registry)
    activity = Activity(registry)
    moments = iter(range(10_000))
    monkeypatch.setattr(activity_module, "monotonic", lambda: next(moments) * SAMPLE_SECONDS)

    with contextlib.closing(Loop()) as loop:
        steps = activity.keep(loop)
        monkeypatch.setattr(loop, "current", object)
        for _ in range(500):
            next(steps)
            requests.inc(10)
        steps.close()
    taken = activity.samples()

    assert KEPT_SECONDS <= taken[0].ago <= KEPT_SECONDS + 3 * SAMPLE_SECONDS
    assert {rate.requests for rate in measure_all(taken)} == {10 / SAMPLE_SECONDS}


def test_who_sleeps_holds_nobody_up_and_goes_on_in_time() -> None:
    woken: list[tuple[str, float]] = []

    def sleep(name: str, seconds: float) -> Steps[None]:
        yield from loop.sleep(seconds)
        woken.append((name, time.monotonic() - began))

    with contextlib.closing(Loop()) as loop:
        began = time.monotonic()
        dropped = loop.spawn(sleep("dropped", 0.05))
        loop.spawn(sleep("late", 0.3))
        loop.spawn(sleep("early", 0.1))
        loop.turn()
        loop.drop(dropped)
        while len(woken) < 2 and time.monotonic() < began + SECONDS:
            loop.turn()

        assert not loop._sleeping

    assert [name for name, _ in woken] == ["early", "late"]
    assert woken[0][1] >= 0.1
    assert woken[1][1] >= 0.3
