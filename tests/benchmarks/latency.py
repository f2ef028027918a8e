"""The effect of scrapes on request latency: python -m tests.benchmarks.latency

A gthread worker with 10,000 samples answers requests that arrive at a fixed rate and wait a few times each, as for a
database. Short rounds alternate: no scrapes, scrapes of django_promports' endpoint, and scrapes of prometheus_client's
server in the same process, once a second each, with the headers that Prometheus sends. The medians of the rounds' p50
and p99 are compared with those of the rounds without scrapes, whose spread is the noise level of the machine.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from prometheus_client import Counter, Histogram, start_http_server

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 10_000
WAITS, WAIT_SECONDS = 4, 0.001
REQUESTS_PER_SECOND = 40
ACCEPT = {
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "Accept-Encoding": "gzip",
}
KINDS = ("no scrapes", "django_promports", "prometheus_client")

metrics: list[Any] = []
urlpatterns: list[Any] = []


def view(request: HttpRequest) -> HttpResponse:
    """Wait a few times, as for queries, and count each time."""
    for _ in range(WAITS):
        time.sleep(WAIT_SECONDS)
        for metric in random.sample(metrics, 5):
            metric()
    return HttpResponse("ok")


def make_application() -> Any:
    """Create the WSGI application in the worker."""
    settings.configure(
        ALLOWED_HOSTS=["*"],
        INSTALLED_APPS=["django_promports"],
        PROMPORTS_PORT_RANGE=[int(os.environ["BENCHMARK_PORT"])],
        PROMPORTS_LEDGER_DIR=os.environ["BENCHMARK_LEDGERS"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="a benchmark",
    )
    urlpatterns.append(path("", view))
    application = get_wsgi_application()
    buckets = [0.01 * 1.6**i for i in range(16)]
    latency = Histogram(
        "benchmark_latency_seconds", "Shaped like django-prometheus'.", ["view", "method"], buckets=buckets
    )
    calls = Counter("benchmark_calls", "Shaped like django-prometheus'.", ["view", "transport", "method"])
    for i in range(SAMPLES // 22):  # 20 samples of a histogram child and two of a counter's
        child, counter = latency.labels(f"shop:view-{i}", "GET"), calls.labels(f"shop:view-{i}", "http", "GET")
        metrics.extend([lambda child=child: child.observe(random.random()), counter.inc])
        child.observe(0.1)
    start_http_server(int(os.environ["BENCHMARK_PORT"]) + 1, "127.0.0.1")
    return application


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="of each kind; default: 25")
    parser.add_argument("--seconds", type=float, default=2.5, help="of a round; default: 2.5")
    parser.add_argument("--port", type=int, default=21890, help="the first of three; default: 21890")
    parser.add_argument("--plot", type=Path, help="write a PNG")
    options = parser.parse_args()
    rounds: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [
                *[sys.executable, "-m", "gunicorn", "-k", "gthread", "--threads", "8", "-w", "1"],
                *[
                    "--no-control-socket",
                    "-b",
                    f"127.0.0.1:{options.port + 2}",
                    "tests.benchmarks.latency:make_application()",
                ],
            ],
            cwd=ROOT,
            env={**os.environ, "BENCHMARK_PORT": str(options.port), "BENCHMARK_LEDGERS": f"{folder}/ledgers"},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            wait_for(options.port + 2, server)
            for _ in range(options.rounds):
                for kind in random.sample(KINDS, len(KINDS)):
                    rounds[kind].append(hold_round(kind, options.port, options.seconds))
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.communicate()
    print_table(rounds)
    if options.plot:
        plot(rounds, options.plot)


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            return ask(port)
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise SystemExit(f"The worker does not answer.\n{server.communicate()[1].decode()}")


def ask(port: int, target: str = "/", **headers: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise OSError(response.status)
    finally:
        connection.close()


def hold_round(kind: str, port: int, seconds: float) -> list[float]:
    """Send requests at the fixed rate and return their latencies, in seconds from when they were due."""
    latencies: list[float] = []
    ended = threading.Event()

    def send(due: float) -> None:
        ask(port + 2)
        latencies.append(time.perf_counter() - due)

    def scrape() -> None:
        while not ended.wait(0.3):
            ask(port + KINDS.index(kind) - 1, "/metrics", **ACCEPT)
            ended.wait(0.7)

    scraper = threading.Thread(target=scrape) if kind != KINDS[0] else None
    if scraper:
        scraper.start()
    begin, threads = time.perf_counter(), []
    for i in range(int(seconds * REQUESTS_PER_SECOND)):
        due = begin + i / REQUESTS_PER_SECOND
        time.sleep(max(0.0, due - time.perf_counter()))
        threads.append(threading.Thread(target=send, args=[time.perf_counter()]))
        threads[-1].start()
    for thread in threads:
        thread.join()
    ended.set()
    if scraper:
        scraper.join()
    return latencies


def percentile(latencies: list[float], share: float) -> float:
    return sorted(latencies)[min(len(latencies) - 1, int(share * len(latencies)))]


def print_table(rounds: dict[str, list[list[float]]]) -> None:
    print("| scrapes, once a second | p50 | ratio | p99 | ratio |")
    print("|---|---|---|---|---|")
    of = {k: {s: [percentile(r, s) for r in rounds[k]] for s in (0.5, 0.99)} for k in KINDS}
    for kind in KINDS:
        cells = [kind]
        for share in (0.5, 0.99):
            median = statistics.median(of[kind][share])
            cells += [f"{median * 1000:.1f} ms", f"{median / statistics.median(of[KINDS[0]][share]):.2f}"]
        print("| " + " | ".join(cells) + " |")
    for share in (0.5, 0.99):
        low, middle, high = statistics.quantiles(of[KINDS[0]][share], n=4)
        print(
            f"\nNoise: without scrapes the middle half of the rounds has a p{share * 100:.0f} of {low / middle:.2f} to "
            f"{high / middle:.2f} of the median."
        )


def plot(rounds: dict[str, list[list[float]]], target: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for kind in KINDS:
        latencies = sorted(latency * 1000 for one in rounds[kind] for latency in one)
        axes.plot(latencies, [100 * (i + 1) / len(latencies) for i in range(len(latencies))], label=kind)
    axes.set(xlabel="latency of a request, ms", ylabel="% of requests that are faster", ylim=(80, 100.2), xscale="log")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
