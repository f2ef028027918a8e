"""The cost of counting in a ledger: python -m tests.benchmarks.increment

Compares an increment in memory, in a ledger, and in prometheus_client's multiprocess mode: short rounds alternate in
one process, and the medians of their ratios are shown, in CPU time. Then measures, in new processes, the time to take
over the series of a predecessor, and the memory of a worker with and without a ledger.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import prometheus_client.values
from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest

from django_promports.binding import Binding
from django_promports.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
MODES = ("in memory", "ledger", "multiprocess mode")
ROUNDS, TIMES = 150, 5_000
PROCESSES = 5
RATIO, TAKEOVER_MILLISECONDS, MEGABYTES = 1.15, 100.0, 3.0
# django-prometheus' own latency buckets: with +Inf 17.
BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 25, 50, 75)
SHAPES = ("10,000 samples like django-prometheus'", "10,000 counters")


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        print("| CPU time of | " + " | ".join(MODES) + " | ledger / in memory | multiprocess / in memory | required |")
        print("|---|" + "---|" * (len(MODES) + 3))
        for operation, rounds in time_increments(Path(folder)).items():
            medians = [f"{statistics.median(seconds) / TIMES * 1e9:.0f} ns" for seconds in zip(*rounds, strict=True)]
            ratios = [statistics.median(seconds[mode] / seconds[0] for seconds in rounds) for mode in (1, 2)]
            cells = [f"`{operation}`", *medians, f"**{ratios[0]:.2f}**", f"{ratios[1]:.2f}", f"at most {RATIO}"]
            print("| " + " | ".join(cells) + " |")
        print("\n| taking over, and a worker's memory | in memory | ledger | difference | required |")
        print("|---|---|---|---|---|")
        for shape in SHAPES:
            milliseconds = [run("take_over", shape, folder)["milliseconds"] for _ in range(PROCESSES)]
            print(
                f"| {shape}: CPU time of taking over | | {statistics.median(milliseconds):.0f} ms | "
                f"| less than {TAKEOVER_MILLISECONDS:.0f} ms |"
            )
        for shape in SHAPES:
            kinds = "Rss", "Pss", "Private"
            workers = [(run("hold", shape, ""), run("hold", shape, folder)) for _ in range(PROCESSES)]
            for kind in kinds:
                memory, ledger = (statistics.median(worker[mode][kind] for worker in workers) for mode in (0, 1))
                cells = [f"{shape}: {kind}", f"{memory:.1f} MB", f"{ledger:.1f} MB", f"**{ledger - memory:+.1f} MB**"]
                print("| " + " | ".join(cells) + f" | at most +{MEGABYTES:.0f} MB |")


def time_increments(folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """Return the CPU seconds of TIMES calls in each round, by operation and mode."""
    modes = [make_in_memory(), make_through_ledger(folder), make_multiprocess(folder)]
    rounds: dict[str, list[tuple[float, ...]]] = {operation: [] for operation in modes[0]}
    for number in range(ROUNDS):
        for operation in rounds:
            seconds = [0.0] * len(modes)
            for position in range(len(modes)):
                mode = (position + number) % len(modes)
                seconds[mode] = time_calls(modes[mode][operation])
            rounds[operation].append(tuple(seconds))
    return rounds


def time_calls(increment: Callable[[float], None]) -> float:
    began = time.thread_time()
    for _ in repeat(None, TIMES):
        increment(0.3)
    return time.thread_time() - began


def make_increments(registry: CollectorRegistry | None) -> dict[str, Callable[[float], None]]:
    counter = Counter("plain", "A counter.", registry=registry)
    labelled = Counter("labelled", "A labelled counter.", ["method", "view"], registry=registry)
    histogram = Histogram("seconds", "A histogram.", registry=registry)
    summary = Summary("size", "A summary.", registry=registry)
    return {
        "Counter.inc": counter.inc,
        "child.inc": labelled.labels("GET", "index").inc,
        "Counter.labels().inc": lambda amount: labelled.labels("GET", "index").inc(amount),
        "Histogram.observe": histogram.observe,
        "Summary.observe": summary.observe,
    }


def make_in_memory() -> dict[str, Callable[[float], None]]:
    return make_increments(CollectorRegistry())


def make_through_ledger(folder: Path) -> dict[str, Callable[[float], None]]:
    registry = CollectorRegistry()
    Binding(registry).open(Ledger(folder / "increments.ledger", "benchmark"))
    return make_increments(registry)


def make_multiprocess(folder: Path) -> dict[str, Callable[[float], None]]:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    usual = prometheus_client.values.ValueClass
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue()  # type: ignore[no-untyped-call]
    try:
        return make_increments(None)
    finally:
        prometheus_client.values.ValueClass = usual
        del os.environ["PROMETHEUS_MULTIPROC_DIR"]


def make_parents(shape: str, registry: CollectorRegistry) -> list[Any]:
    if shape != SHAPES[0]:
        return [Counter("events", "Events.", ["kind"], registry=registry)]
    labelnames = ["view", "method"]
    return [
        Histogram(
            "django_http_requests_latency_seconds_by_view_method",
            "Histogram of request processing time labelled by view.",
            labelnames,
            buckets=BUCKETS,
            registry=registry,
        ),
        Counter("django_http_responses_total_by_status_view_method", "Responses.", labelnames, registry=registry),
    ]


def make_children(metrics: list[Any]) -> None:
    """Count in 400 histograms with 20 samples each and 1,000 counters with 2, or in 10,000 counters."""
    *histograms, counter = metrics
    if not histograms:
        for number in range(10_000):
            counter.labels(f"kind {number}").inc()
        return
    for number in range(400):
        histograms[0].labels(f"app.views.view_{number // 2}", ("GET", "POST")[number % 2]).observe(0.3)
    for number in range(1_000):
        counter.labels(f"app.views.view_{number // 4}", f"{number % 4}").inc()


def open_ledger(shape: str, folder: str) -> Ledger:
    return Ledger(Path(folder) / f"{SHAPES.index(shape)}.ledger", "benchmark")


def take_over(shape: str, folder: str) -> dict[str, float]:
    """Return the CPU time that this process needs to take over the counts of the last one."""
    registry = CollectorRegistry()
    make_parents(shape, registry)
    binding = Binding(registry)
    began = time.process_time()
    binding.open(open_ledger(shape, folder))
    milliseconds = (time.process_time() - began) * 1000
    samples = sum(len(metric.samples) for metric in binding.collect())
    assert samples == (10_000 if shape == SHAPES[0] else 20_000), samples
    binding.close()
    return {"milliseconds": milliseconds}


def hold(shape: str, folder: str) -> dict[str, float]:
    """Return the megabytes that this process uses when every series exists and was scraped once.

    It counts in the ledger in the folder, or in memory if there is no folder.
    """
    registry = CollectorRegistry()
    metrics = make_parents(shape, registry)
    binding = Binding(registry)
    if folder:
        binding.open(open_ledger(shape, folder))
    make_children(metrics)
    generate_latest(binding)
    gc.collect()
    megabytes = {"Private": 0.0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        if name in ("Rss:", "Pss:"):
            megabytes[name[:-1]] = int(size) / 1024
        elif name.startswith("Private_"):
            megabytes["Private"] += int(size) / 1024
    binding.close()
    return megabytes


def run(what: str, shape: str, folder: str) -> dict[str, float]:
    """Run the function in a new process; if there is no ledger yet, a predecessor creates it."""
    if folder and not (Path(folder) / f"{SHAPES.index(shape)}.ledger").exists():
        call("hold", shape, folder)
    return call(what, shape, folder)


def call(what: str, shape: str, folder: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.increment", what, shape, folder],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps({"take_over": take_over, "hold": hold}[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
