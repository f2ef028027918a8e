"""The site creates, registers or removes metrics, or stops, at every step of a scrape."""

from __future__ import annotations

import gzip
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from django_promports.binding import Binding
from django_promports.ledger import Ledger
from django_promports.scrape import pace, packing
from django_promports.scrape.exposition import Exposition
from tests.walk import check_form, read

ACCEPTS = ["", "application/openmetrics-text;version=1.0.0"]
NAMES = [f"metric{number}" for number in range(4)]
Make = Callable[[CollectorRegistry, str], Any]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(packing, "BLOCK_BYTES", 200)


class Process:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = CollectorRegistry(auto_describe=True)
        self.binding = Binding(self.registry)
        self.binding.open(Ledger(path, "site"))
        self.ours = Exposition(self.binding)

    def interrupt(self, accept: str, names: tuple[str, ...], steps: int, act: Callable[[], object]) -> tuple[str, bool]:
        """Scrape, and act after this many steps; return the text, and whether the scrape had that many."""
        scrape = self.ours.render(accept, "gzip", names)
        is_over = False
        for count in range(10**6):
            if count == steps:
                act()
            try:
                next(scrape)
            except StopIteration as stop:
                is_over = count < steps
                text = gzip.decompress(stop.value[1]).decode()
                check_form(text, accept)
                return text, is_over
        raise AssertionError("it does not end")


def make_histogram(registry: CollectorRegistry, name: str) -> Any:
    return Histogram(name, "Help.", ["k"], registry=registry, buckets=[1, 2, 3])


def make_other_buckets(registry: CollectorRegistry, name: str) -> Any:
    return Histogram(name, "Help.", ["k"], registry=registry, buckets=[5, 6])


def make_other_labels(registry: CollectorRegistry, name: str) -> Any:
    return Histogram(name, "Help.", ["l"], registry=registry, buckets=[1, 2, 3])


def make_summary(registry: CollectorRegistry, name: str) -> Any:
    return Summary(name, "Help.", ["k"], registry=registry)


def make_counter(registry: CollectorRegistry, name: str) -> Any:
    return Counter(name, "Help.", ["k"], registry=registry)


def make_gauge(registry: CollectorRegistry, name: str) -> Any:
    return Gauge(name, "Help.", ["k"], registry=registry)


def fill(process: Process, make: Make = make_histogram) -> list[Any]:
    metrics = [make(process.registry, name) for name in NAMES]
    for metric in metrics:
        for label in ("GET", "POST", "PUT"):
            for _ in range(7):
                metric.labels(label).observe(1.5)
    return metrics


def every_step(path: Path, begin: Callable[[Path], Process]) -> Iterator[tuple[int, Process]]:
    """For each step of a scrape, start a process on a copy of the ledger."""
    content = path.read_bytes()
    for steps in range(1, 1000):  # before the first step it has not begun
        own = path.with_name(f"{steps}.ledger")
        own.write_bytes(content)
        process = begin(own)
        try:
            yield steps, process
        finally:
            process.binding.close()
            own.unlink()


def remade(metric: str, text: str) -> dict[str, str]:
    """Return the samples of a metric, without created times."""
    found = read(text)
    return {key: value for key, value in found.items() if key.startswith(f"{metric}_") and "_created" not in key}


@pytest.mark.parametrize("accept", ACCEPTS)
@pytest.mark.parametrize(
    "names", [(), tuple(f"{name}_{part}" for name in NAMES for part in ("bucket", "count", "sum"))]
)
@pytest.mark.parametrize(
    "make", [make_histogram, make_other_buckets, make_other_labels, make_summary, make_counter, make_gauge]
)
def test_what_is_made_in_another_shape_in_the_middle_is_shown_as_it_was_or_as_it_is(
    make: Make, names: tuple[str, ...], accept: str, tmp_path: Path
) -> None:
    before = Process(tmp_path / "former.ledger")
    fill(before)
    whole, _ = before.interrupt(accept, names, -1, list)
    before.binding.close()

    for steps, process in every_step(tmp_path / "former.ledger", Process):

        def make_all(registry: CollectorRegistry = process.registry) -> None:
            for name in NAMES:
                make(registry, name)

        text, is_over = process.interrupt(accept, names, steps, make_all)
        for name in NAMES:
            assert remade(name, text) == remade(name, whole), steps
        if is_over:
            return


@pytest.mark.parametrize("accept", ACCEPTS)
@pytest.mark.parametrize("make", [make_histogram, make_other_buckets, make_summary, make_gauge])
def test_a_metric_that_is_unregistered_and_made_again_in_the_middle_is_shown_once(
    make: Make, accept: str, tmp_path: Path
) -> None:
    Process(tmp_path / "former.ledger").binding.close()
    for steps, process in every_step(tmp_path / "former.ledger", Process):
        metrics = fill(process)
        whole, _ = process.interrupt(accept, (), -1, list)

        def replace(process: Process = process, metrics: list[Any] = metrics) -> None:
            for metric in metrics:
                process.registry.unregister(metric)
                make(process.registry, metric._name).labels("GET")

        text, is_over = process.interrupt(accept, (), steps, replace)
        for name in NAMES:
            assert remade(name, text) == remade(name, whole), steps
        if is_over:
            return


@pytest.mark.parametrize("accept", ACCEPTS)
@pytest.mark.parametrize("reopen", [True, False])
def test_a_ledger_that_is_closed_in_the_middle_leaves_a_valid_scrape(
    reopen: bool, accept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = Process(tmp_path / "former.ledger")
    fill(before)
    before.binding.close()

    for steps, process in every_step(tmp_path / "former.ledger", Process):
        for name in NAMES[:2]:
            make_histogram(process.registry, name).labels("GET").observe(1)

        def stop(process: Process = process) -> None:
            process.binding.close()
            if reopen:
                process.binding.open(Ledger(process.path, "site"))

        text, is_over = process.interrupt(accept, (), steps, stop)
        assert 'metric0_count{k="GET"}' in text
        assert process.ours.failures == 0
        if is_over:
            break
    assert not caplog.records


def test_a_scrape_is_noted_in_the_ledger_that_it_showed(tmp_path: Path) -> None:
    process = Process(tmp_path / "1.ledger")
    began = time.time()
    process.binding.note_scrape(began)
    assert process.binding.ledger is not None
    assert process.binding.ledger.scraped_at == began

    process.binding.close()
    other = Ledger(tmp_path / "2.ledger", "site")
    process.binding.open(other)
    process.binding.note_scrape(began)
    assert other.scraped_at == 0
    began = time.time()
    process.binding.note_scrape(began)
    assert other.scraped_at == began
    process.binding.close()


@pytest.mark.parametrize("accept", ACCEPTS)
@pytest.mark.parametrize("names", [(), ("jobs_total", "jobs_created")])
def test_a_counter_does_not_fall_while_its_adoption_is_pending(
    accept: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    before = Process(tmp_path / "1.ledger")
    make_counter(before.registry, "jobs").labels("GET").inc(1000)
    before.binding.close()
    process = Process(tmp_path / "1.ledger")
    counter = make_counter(process.registry, "jobs")
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert over.wait(60)

    thread = threading.Thread(target=process.binding.acts.do, args=[hold])  # no public act takes as long as this has to
    thread.start()
    assert held.wait(60)
    counter.labels("GET").inc(5)  # continues after a moment, counted in memory

    text, _ = process.interrupt(accept, names, -1, list)
    assert read(text)['jobs_total{k="GET"}'] == "1000.0"
    assert {s.value for m in process.binding.collect() for s in m.samples if s.name == "jobs_total"} == {1000.0}
    assert process.ours.render(accept, "", names)

    over.set()
    thread.join(60)
    text, _ = process.interrupt(accept, names, -1, list)
    assert read(text)['jobs_total{k="GET"}'] == "1005.0"
    process.binding.close()


def test_a_finalizer_may_want_a_lock_whose_holder_makes_a_series(tmp_path: Path) -> None:
    lock, inside, held, done = threading.Lock(), threading.Event(), threading.Event(), threading.Event()

    class Interrupted(Ledger):
        """A finalizer that runs while a series is created, in the first thread only."""

        def add_series(self, *arguments: Any) -> int:
            if threading.current_thread() is threading.main_thread():
                inside.set()
                assert held.wait(60)
                with lock:
                    pass
            return super().add_series(*arguments)

    path = tmp_path / "1.ledger"
    registry = CollectorRegistry()
    binding = Binding(registry)
    binding.open(Interrupted(path, "site"))
    counter = make_counter(registry, "jobs")

    def work() -> None:
        assert inside.wait(60)
        with lock:
            held.set()
            counter.labels("GET").inc()
        done.set()

    threading.Thread(target=work, daemon=True).start()
    Counter("other", "Other.", registry=registry).inc()

    assert done.wait(60)
    binding.close()
    successor = Process(path)
    text, _ = successor.interrupt("", (), -1, list)
    assert {'jobs_total{k="GET"}': "1.0", "other_total": "1.0"}.items() <= read(text).items()
    successor.binding.close()


def test_a_fork_in_the_middle_of_making_a_series_leaves_both_processes_counting(tmp_path: Path) -> None:
    children: list[int] = []

    class Forking(Ledger):
        """A finalizer forks where the first series is made."""

        def add_series(self, *arguments: Any) -> int:
            if not children:
                children.append(os.fork())
                if children == [0]:
                    binding.begin_in_child(keep=False)
            return super().add_series(*arguments)

    registry = CollectorRegistry()
    binding = Binding(registry)
    binding.open(Forking(tmp_path / "1.ledger", "site"))
    counter = make_counter(registry, "jobs")
    counter.labels("GET").inc()
    counter.labels("POST").inc()
    if children == [0]:
        found = {s.labels["k"]: s.value for m in registry.collect() for s in m.samples if s.name == "jobs_total"}
        os._exit(0 if found == {"GET": 1.0, "POST": 1.0} else 1)
    assert os.waitpid(children[0], 0)[1] == 0
    binding.close()
    successor = Process(tmp_path / "1.ledger")
    text, _ = successor.interrupt("", (), -1, list)
    assert {'jobs_total{k="GET"}': "1.0", 'jobs_total{k="POST"}': "1.0"}.items() <= read(text).items()
    successor.binding.close()
