"""The cost of a scrape in the worker: prometheus_client's WSGI app and django_promports alternate on one registry.

    python -m tests.benchmarks.scrape [samples...]

The registry is shaped like that of django-prometheus and counts in a ledger, as by default. Scrapes ask for OpenMetrics
and gzip, as Prometheus does. Times are the CPU time of the scraping thread, ratios are medians over interleaved rounds.
"""

from __future__ import annotations

import gc
import logging
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from django_promports.binding import Binding
from django_promports.ledger import Ledger
from django_promports.scrape.exposition import Exposition

ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
# django-prometheus' own.
SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 25.0, 50.0, 75.0, float("inf"))
SIZES = tuple(float(2**n) for n in range(30))
CHANGES = {"every child": 1.0, "10 % of children": 0.1, "none": 0.0}
TARGETS = {"every child": 25, "10 % of children": 50, "none": 60}


def build(samples: int) -> tuple[CollectorRegistry, list[Any]]:
    """Return a registry with about this many samples, seven of eight in histograms, and its children."""
    registry = CollectorRegistry()
    children: list[Any] = []
    for when in ("before", "after"):
        children.append(Counter(f"django_http_requests_{when}_middlewares_total", "Requests.", registry=registry))
    children.append(Histogram("django_http_requests_body_total_bytes", "Size.", registry=registry, buckets=SIZES))
    children.append(Gauge("django_http_requests_in_progress", "Requests that run.", registry=registry))
    latency = Histogram(
        "django_http_requests_latency_seconds_by_view_method",
        "Histogram of request processing time labelled by view.",
        ["view", "method"],
        registry=registry,
        buckets=SECONDS,
    )
    responses = Counter(
        "django_http_responses_total_by_status_view_method",
        "Count of responses by status, view, method.",
        ["status", "view", "method"],
        registry=registry,
    )
    # A view has 20 samples of latency and, at most, 4 of responses.
    for i in range(round(samples / 23)):
        view, method = f"app{i % 20}:view-name-{i}", ("GET", "POST")[i % 2]
        children.append(latency.labels(view, method))
        children += [responses.labels(status, view, method) for status in ("200", "404")[: 1 + i % 2]]
    return registry, children


def touch(child: Any, chance: random.Random) -> None:
    if isinstance(child, Histogram):
        child.observe(chance.expovariate(3))
    else:
        child.inc()


def render(exposition: Exposition) -> tuple[bytes, float, float]:
    """Return the body, its CPU seconds, and the longest time between two yields."""
    steps = exposition.render(ACCEPT, "gzip", [])
    longest = total = 0.0
    while True:
        begin = time.thread_time()
        try:
            next(steps)
        except StopIteration as stop:
            turn = time.thread_time() - begin
            _, body = stop.value
            return body, total + turn, max(longest, turn)
        turn = time.thread_time() - begin
        total, longest = total + turn, max(longest, turn)


def take_time(call: Callable[[], object]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def measure_cache(samples: int) -> float:
    """Return the bytes per sample that an exposition keeps after several scrapes."""
    registry, children = build(samples)
    chance = random.Random(2)
    exposition = Exposition(Binding(registry))
    tracemalloc.start()
    try:
        for _ in range(3):
            for child in children:
                touch(child, chance)
            gc.collect()
            render(exposition)
        kept = tracemalloc.get_traced_memory()[0]
        exposition.forms.clear()
        gc.collect()
        return (kept - tracemalloc.get_traced_memory()[0]) / count_samples(registry)
    finally:
        tracemalloc.stop()


def count_samples(registry: CollectorRegistry) -> int:
    return sum(len(metric.samples) for metric in registry.collect())


def main(sizes: list[int]) -> None:
    logging.basicConfig()  # shows a warning if django_promports does not know this prometheus_client
    write = sys.stdout.write
    write("| samples | changed | prometheus_client | django_promports | cheaper | wanted | longest turn | cache |\n")
    write("|--:|---|--:|--:|--:|--:|--:|--:|\n")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            registry, children = build(size)
            binding = Binding(registry)
            binding.open(Ledger(Path(folder) / "benchmark.ledger", "benchmark"))
            write(measure(size, registry, binding, children))
            binding.close()
        sys.stdout.flush()


def measure(size: int, registry: CollectorRegistry, binding: Binding, children: list[Any]) -> str:
    """Return the lines of the table for one registry."""
    chance = random.Random(1)
    for child in children:
        for _ in range(30):
            touch(child, chance)
    samples = count_samples(registry)
    app = make_wsgi_app(registry)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "HTTP_ACCEPT": ACCEPT, "HTTP_ACCEPT_ENCODING": "gzip"}
    gc.collect()  # otherwise the first scrape includes garbage from creating the registry
    exposition = Exposition(binding)
    _, first, first_turn = render(exposition)
    results: dict[str, list[tuple[float, float, float]]] = {change: [] for change in CHANGES}
    for _ in range(max(5, min(25, 250_000 // size))):
        for change, share in CHANGES.items():
            for child in children:
                if chance.random() < share:
                    touch(child, chance)
            theirs = take_time(lambda: app(environ, lambda status, headers: None))
            _, ours, turn = render(exposition)
            results[change].append((theirs, ours, turn))
    lines = ""
    cache = measure_cache(size)
    for change, rows in results.items():
        theirs, ours = median(row[0] for row in rows), median(row[1] for row in rows)
        cheaper = median(row[0] / row[1] for row in rows)
        turns = [row[2] for row in rows]
        lines += (
            f"| {samples:,} | {change} | {1e6 * theirs / samples:.1f} us | {1e6 * ours / samples:.3f} us"
            f" | {cheaper:.0f} x | {TARGETS[change]} x | {1e3 * median(turns):.2f} ms (max {1e3 * max(turns):.2f})"
            f" | {cache:.0f} B |\n"
        )
    first_each = f"{1e6 * first / samples:.3f} us"
    return f"{lines}| {samples:,} | first scrape | | {first_each} | | | {1e3 * first_turn:.2f} ms | {cache:.0f} B |\n"


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [1_000, 10_000, 100_000])
