"""Counting in a ledger: this process counts as without one, and the next one continues."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import prometheus_client.values
import pytest
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.values import MutexValue

from django_promports import storage
from django_promports.binding import Binding
from django_promports.layout import CELLS_AT, LAYOUT, Layout
from django_promports.ledger import Ledger
from tests.commands import run_python
from tests.servers import parse, wait_until

Samples = dict[str, float]
Make = Callable[[CollectorRegistry], None]


class Process:
    """The metrics of one process, bound to the ledger of a port."""

    def __init__(self, path: Path, layout: Layout = LAYOUT) -> None:
        self.path, self.layout = path, layout
        self.registry = CollectorRegistry(auto_describe=True)
        self.binding = Binding(self.registry)

    def open(self) -> None:
        self.binding.open(Ledger(self.path, "site", self.layout))

    def samples(self) -> Samples:
        return samples(self.binding)


@pytest.fixture
def processes(tmp_path: Path) -> Callable[[], contextlib.AbstractContextManager[Process]]:
    """Start processes, one after the other, that each hold the ledger until they end."""

    @contextlib.contextmanager
    def begin(*, before: Make | None = None, layout: Layout = LAYOUT) -> Iterator[Process]:
        process = Process(tmp_path / "19100.ledger", layout)
        if before is not None:
            before(process.registry)
        process.open()
        try:
            yield process
        finally:
            process.binding.close()

    return begin


Begin = Callable[..., contextlib.AbstractContextManager[Process]]


def exposition(collector: Any) -> bytes:
    return generate_latest(collector)


def samples(collector: Any, *, created: bool = True) -> Samples:
    found = parse(exposition(collector).decode())
    return found if created else {name: value for name, value in found.items() if "_created" not in name}


def make_counter(registry: CollectorRegistry) -> Counter:
    return Counter("jobs", "Jobs done.", registry=registry)


def make_labelled_counter(registry: CollectorRegistry) -> Counter:
    return Counter("jobs", "Jobs done.", ["kind", "state"], registry=registry)


def make_summary(registry: CollectorRegistry) -> Summary:
    return Summary("size", 'Of "jobs"\n\\.', unit="bytes", registry=registry)


def make_labelled_summary(registry: CollectorRegistry) -> Summary:
    return Summary("size", 'Of "jobs"\n\\.', ["kind", "state"], unit="bytes", registry=registry)


def make_histogram(registry: CollectorRegistry) -> Histogram:
    return Histogram("seconds", "Of jobs.", namespace="job", buckets=[-1, 0.5, 2.5], registry=registry)


def make_labelled_histogram(registry: CollectorRegistry) -> Histogram:
    return Histogram("seconds", "Of jobs.", ["kind", "state"], namespace="job", registry=registry)


MAKERS = [
    make_counter,
    make_labelled_counter,
    make_summary,
    make_labelled_summary,
    make_histogram,
    make_labelled_histogram,
]
all_kinds = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))


def work(metric: Any, *kinds: str) -> None:
    """Count a little in a metric; in several children if it has labels."""
    children = [metric.labels(kind, 'a"b\\\n') for kind in kinds] if metric._labelnames else [metric]
    for number, child in enumerate(children, 1):
        if isinstance(metric, Counter):
            child.inc()
            child.inc(number / 7)
        else:
            for amount in (0.1 * number, 1, -3.5, 100):
                child.observe(amount)


def expected_after(make: Callable[[CollectorRegistry], Any], *works: tuple[str, ...]) -> Samples:
    registry = CollectorRegistry()
    metric = make(registry)
    for kinds in works:
        work(metric, *kinds)
    return samples(registry, created=False)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@all_kinds
@pytest.mark.parametrize("early", [True, False], ids=["made before the ledger is open", "made later"])
def test_the_next_process_goes_on_with_the_same_numbers(
    make: Callable[[CollectorRegistry], Any], early: bool, processes: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Samples] = []
    for _ in range(3):
        with begin_with(make, early, processes) as (process, metric):
            if seen:
                assert process.samples() == seen[-1]
            work(metric, "x", "y")
            seen.append(process.samples())

    assert {name: value for name, value in seen[-1].items() if "_created" not in name} == pytest.approx(
        expected_after(make, *[("x", "y")] * 3)
    )
    assert not errors(caplog)


@all_kinds
def test_what_was_counted_before_the_ledger_is_open_is_added_to_it(
    make: Callable[[CollectorRegistry], Any], processes: Begin
) -> None:
    for _ in range(2):
        with processes(before=lambda registry: work(make(registry), "x", "y")) as process:
            last = process.samples()

    with processes() as process:
        assert process.samples() == last
    assert {name: value for name, value in last.items() if "_created" not in name} == pytest.approx(
        expected_after(make, ("x", "y"), ("x", "y"))
    )


@contextlib.contextmanager
def begin_with(
    make: Callable[[CollectorRegistry], Any], early: bool, processes: Begin
) -> Iterator[tuple[Process, Any]]:
    """Start a process that creates a metric. early: before it opens the ledger."""
    metrics: list[Any] = []
    with processes(before=(lambda registry: metrics.append(make(registry))) if early else None) as process:
        yield process, metrics[0] if early else make(process.registry)


def make_all(registry: CollectorRegistry) -> list[Any]:
    return [
        make_labelled_counter(registry),
        make_labelled_summary(registry),
        make_labelled_histogram(registry),
        Counter("plain", "No labels.", registry=registry),
    ]


def test_series_of_the_predecessor_are_served_before_the_metric_is_made(processes: Begin) -> None:
    with processes() as process:
        for metric in make_all(process.registry):
            work(metric, "x", "y")
        classic, openmetrics = exposition(process.binding), generate_openmetrics(process.binding)  # type: ignore[no-untyped-call]

    with processes() as process:
        assert sorted(exposition(process.binding).splitlines()) == sorted(classic.splitlines())
        assert sorted(generate_openmetrics(process.binding).splitlines()) == sorted(openmetrics.splitlines())  # type: ignore[no-untyped-call]
        make_all(process.registry)
        assert sorted(exposition(process.binding).splitlines()) == sorted(classic.splitlines())


def test_a_metric_with_some_of_its_children_made_has_the_others_too(processes: Begin) -> None:
    with processes() as process:
        for metric in make_all(process.registry)[:3]:
            work(metric, "x", "y", "z")
        before = process.samples()

    with processes() as process:
        for metric in make_all(process.registry)[:3]:
            metric.labels("y", 'a"b\\\n')
        after = process.samples()
        families = [metric.name for metric in process.binding.collect()]

    assert after == before
    assert len(families) == len(set(families)) == 4


@pytest.mark.parametrize("made", ["nothing", "parents", "one child", "all"])
@pytest.mark.parametrize(
    "names", [["jobs_total"], ["job_seconds_bucket", "size_bytes_sum"], ["jobs_created", "plain_total"], ["nothing"]]
)
def test_a_restricted_registry_has_the_series_of_the_predecessor_too(
    made: str, names: list[str], processes: Begin
) -> None:
    with processes() as process:
        for metric in make_all(process.registry):
            work(metric, "x", "y")
        expected = samples(process.registry.restricted_registry(names))

    with processes() as process:
        if made != "nothing":
            for metric in make_all(process.registry)[:3]:
                for kind in {"one child": "y", "all": "xy"}.get(made, ""):
                    metric.labels(kind, 'a"b\\\n')

        assert samples(process.binding.restricted_registry(names)) == expected


def test_all_else_is_as_without_a_ledger(processes: Begin) -> None:
    def use(registry: CollectorRegistry) -> bytes:
        gauge = Gauge("gauge", "A gauge.", ["x"], registry=registry)
        gauge.labels("a").set(5)
        gauge.labels("a").dec(2)
        Gauge("function", "A gauge of a function.", registry=registry).set_function(lambda: 42.0)
        Info("build", "Some info.", registry=registry).info({"version": "1"})
        Enum("state", "A state.", states=["on", "off"], registry=registry).state("off")
        registry.set_target_info({"env": "test"})
        counter = Counter("jobs", "Jobs.", ["x"], registry=registry)
        counter.labels("a").inc(2, {"trace_id": "1"})
        histogram = Histogram("seconds", "Seconds.", buckets=[1, 2], registry=registry)
        histogram.observe(1.5, {"trace_id": "2"})
        with histogram.time(), pytest.raises(KeyError), counter.labels("b").count_exceptions():
            raise KeyError
        for wrong in (lambda: counter.inc(), lambda: counter.labels("a").inc(-1), lambda: counter.labels("a", "b")):
            with pytest.raises(ValueError):  # noqa: PT011  the messages are prometheus_client's
                wrong()
        return b""

    def normalise(text: bytes) -> bytes:
        return re.sub(rb"\d{10}\.\d+|\d\.\d+e[-+]0\d|seconds_sum .*", b"TIME", text)

    plain = CollectorRegistry(auto_describe=True)
    use(plain)
    expected = normalise(generate_openmetrics(plain))  # type: ignore[no-untyped-call]

    with processes() as process:
        use(process.registry)
        assert normalise(generate_openmetrics(process.binding)) == expected  # type: ignore[no-untyped-call]
    with processes(before=use) as process:
        counts = normalise(generate_openmetrics(process.binding))  # type: ignore[no-untyped-call]
    assert b'jobs_total{x="a"} 4.0 # {trace_id="1"} 2.0' in counts
    with processes() as process:
        names = {name.partition("{")[0] for name in process.samples()}
    assert names == {
        "jobs_total",
        "jobs_created",
        "seconds_bucket",
        "seconds_count",
        "seconds_sum",
        "seconds_created",
    }


REMOVALS: dict[str, tuple[Callable[[Any], None], set[str]]] = {
    "remove": (lambda metric: metric.remove("x", 'a"b\\\n'), {"y", "z"}),
    "remove_by_labels": (lambda metric: metric.remove_by_labels({"kind": "y"}), {"x", "z"}),
    "remove_by_labels of all": (lambda metric: metric.remove_by_labels({"state": 'a"b\\\n'}), set()),
    "remove_by_labels of none": (lambda metric: metric.remove_by_labels({}), {"x", "y", "z"}),
    "remove what is not there": (lambda metric: metric.remove("x", "other"), {"x", "y", "z"}),
    "clear": (lambda metric: metric.clear(), set()),
}


@pytest.mark.parametrize("make", MAKERS[1::2], ids=lambda make: make.__name__.removeprefix("make_labelled_"))
@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("made", ["", "x", "xyz"], ids=["only in the ledger", "partly made", "made"])
def test_what_is_removed_is_gone_here_and_in_the_next_process(
    make: Callable[[CollectorRegistry], Any], removal: str, made: str, processes: Begin
) -> None:
    remove, left = REMOVALS[removal]
    with processes() as process:
        work(make(process.registry), "x", "y", "z")
        before = process.samples()
    expected = {name: value for name, value in before.items() if re.findall('kind="(.)"', name)[0] in left}

    with processes() as process:
        metric = make(process.registry)
        for kind in made:
            metric.labels(kind, 'a"b\\\n')
        remove(metric)
        assert process.samples() == expected

    with processes() as process:
        assert process.samples() == expected
        work(make(process.registry), "x", "y", "z")  # what was removed begins at zero
        again = process.samples()
    with processes() as process:
        assert process.samples() == again
    fresh = expected_after(make, ("x", "y", "z"))
    kept = expected_after(make, ("x", "y", "z"), ("x", "y", "z"))
    assert {name: value for name, value in again.items() if "_created" not in name} == pytest.approx(
        {name: (kept if re.findall('kind="(.)"', name)[0] in left else fresh)[name] for name in fresh}
    )


def test_wrong_arguments_of_a_removal_are_refused_as_ever(processes: Begin) -> None:
    with processes() as process:
        metric = make_labelled_counter(process.registry)

        with pytest.raises(ValueError, match="Incorrect label count"):
            metric.remove("x")
        with pytest.raises(ValueError, match="Unknown label names"):
            metric.remove_by_labels({"nope": "x"})
        with pytest.raises(TypeError):
            metric.remove_by_labels("x")  # type: ignore[arg-type]


def test_a_removed_child_that_somebody_still_has_counts_nowhere(processes: Begin) -> None:
    with processes() as process:
        metric = make_labelled_counter(process.registry)
        child = metric.labels("x", "y")
        child.inc()
        metric.remove("x", "y")
        child.inc(10)
        metric.labels("x", "y").inc(5)
        child.inc(10)

        assert child._value.get() == 21
        assert process.samples()['jobs_total{kind="x",state="y"}'] == 5
    with processes() as process:
        assert process.samples()['jobs_total{kind="x",state="y"}'] == 5


def test_a_reset_counter_begins_at_zero_with_a_new_created_time(processes: Begin) -> None:
    with processes() as process:
        make_counter(process.registry).inc(5)
        created = process.samples()["jobs_created"]

    with processes() as process:
        counter = make_counter(process.registry)
        counter.reset()
        counter.inc(2)
        after = process.samples()

    assert after["jobs_total"] == 2
    assert after["jobs_created"] > created
    with processes() as process:
        assert process.samples() == pytest.approx(after, abs=1e-3, rel=0)


@all_kinds
@pytest.mark.parametrize("early", [True, False])
def test_what_is_unregistered_is_gone_here_and_in_the_next_process(
    make: Callable[[CollectorRegistry], Any], early: bool, processes: Begin
) -> None:
    with processes() as process:
        metric = make(process.registry)
        work(metric, "x", "y")

    with begin_with(make, early, processes) as (process, metric):
        work(metric, "x")
        process.registry.unregister(metric)
        work(metric, "x", "z")  # code that still holds the metric
        assert process.samples() == {}

    with processes() as process:
        assert process.samples() == {}


@all_kinds
def test_a_metric_made_after_one_of_its_name_was_unregistered_begins_at_zero(
    make: Callable[[CollectorRegistry], Any], processes: Begin
) -> None:
    with processes() as process:
        former = make(process.registry)
        work(former, "x", "y")
        process.registry.unregister(former)
        work(make(process.registry), "x", "y")
        work(former, "x", "y")
        here = process.samples()

    assert {name: value for name, value in here.items() if "_created" not in name} == pytest.approx(
        expected_after(make, ("x", "y"))
    )
    with processes() as process:
        assert process.samples() == here


def test_a_metric_that_is_registered_again_goes_on(processes: Begin) -> None:
    with processes() as process:
        metric = make_labelled_counter(process.registry)
        metric.labels("x", "y").inc(2)
        process.registry.unregister(metric)
        metric.labels("x", "y").inc(3)
        process.registry.register(metric)
        metric.labels("x", "y").inc(4)
        metric.labels("x", "z").inc(1)
        here = process.samples()

    assert here['jobs_total{kind="x",state="y"}'] == 9
    with processes() as process:
        assert process.samples() == here


def test_a_refused_registration_changes_nothing(processes: Begin) -> None:
    with processes() as process:
        make_counter(process.registry).inc(3)
        with pytest.raises(ValueError, match="Duplicated"):
            Summary("jobs", "Something else.", registry=process.registry)
        here = process.samples()

    assert here["jobs_total"] == 3
    with processes() as process:
        assert process.samples() == here


def make_other_buckets(registry: CollectorRegistry) -> Histogram:
    return Histogram("seconds", "Of jobs.", namespace="job", buckets=[-1, 0.5, 3.5], registry=registry)


def make_labelled_namesake(registry: CollectorRegistry) -> Histogram:
    return Histogram("seconds", "Of jobs.", ["kind", "state"], namespace="job", buckets=[-1, 0.5], registry=registry)


def make_summary_namesake(registry: CollectorRegistry) -> Summary:
    return Summary("seconds", "Of jobs.", namespace="job", registry=registry)


def make_counter_namesake(registry: CollectorRegistry) -> Counter:
    return Counter("seconds", "Of jobs.", namespace="job", registry=registry)


@pytest.mark.parametrize(
    "make", [make_other_buckets, make_labelled_namesake, make_summary_namesake, make_counter_namesake]
)
@pytest.mark.parametrize("early", [True, False])
def test_a_metric_of_another_shape_begins_at_zero(
    make: Callable[[CollectorRegistry], Any], early: bool, processes: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    with processes() as process:
        work(make_histogram(process.registry))

    with begin_with(make, early, processes) as (process, metric):
        assert errors(caplog) == ["job_seconds has other labels or buckets than before; its counts begin at zero."]
        assert set(samples(process.binding, created=False).values()) <= {0.0}
        work(metric, "x")
        here = process.samples()

    assert {name: value for name, value in here.items() if "_created" not in name} == pytest.approx(
        expected_after(make, ("x",))
    )
    with processes() as process:
        assert process.samples() == here


@pytest.mark.parametrize("name", ["jobs", "jobs_total", "jobs_created"])
@pytest.mark.parametrize("early", [True, False])
def test_a_counter_that_became_a_gauge_is_a_gauge(
    name: str, early: bool, processes: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    def make(registry: CollectorRegistry) -> None:
        Gauge(name, "Jobs now.", registry=registry).set(3)

    with processes() as process:
        make_counter(process.registry).inc(5)

    with processes(before=make if early else None) as process:
        if not early:
            make(process.registry)
        assert process.samples() == {name: 3.0}
        assert len(errors(caplog)) == 1
    with processes() as process:
        assert process.samples() == {}


def test_a_gauge_of_a_longer_name_leaves_a_counter_alone(processes: Begin, caplog: pytest.LogCaptureFixture) -> None:
    with processes() as process:
        make_counter(process.registry).inc(5)

    with processes() as process:
        Gauge("jobs_active", "Jobs now.", registry=process.registry)
        Gauge("jobs_count", "Jobs now.", registry=process.registry)
        assert process.samples()["jobs_total"] == 5
    assert not errors(caplog)


def test_metrics_of_other_registries_are_left_alone(processes: Begin) -> None:
    other = CollectorRegistry()
    elsewhere, nowhere = make_counter(other), Counter("jobs", "Jobs done.", registry=None)
    elsewhere.inc(7)
    with processes() as process:
        make_counter(process.registry).inc(1)
        for counter in (elsewhere, nowhere):
            counter.inc(100)
            assert type(counter._value) is MutexValue
        assert samples(other)["jobs_total"] == 107
        assert process.samples()["jobs_total"] == 1
    with processes() as process:
        assert process.samples()["jobs_total"] == 1


def run_threads(works: Iterable[Callable[[], None]]) -> None:
    """Run each function in its own thread, concurrently; an exception in one of them is raised here."""
    raised: list[BaseException] = []
    works = list(works)
    start = threading.Barrier(len(works))

    def guard(work: Callable[[], None]) -> None:
        try:
            start.wait(30)
            work()
        except BaseException as error:
            raised.append(error)

    crowd = [threading.Thread(target=guard, args=[work], daemon=True) for work in works]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if raised:
        raise raised[0]


def test_children_made_in_eight_threads_are_counted_once_and_always_served(processes: Begin) -> None:
    kinds = [str(number) for number in range(150)]
    with processes() as process:
        counter = make_labelled_counter(process.registry)
        for kind in kinds:
            counter.labels(kind, "x").inc(1000)
    with processes() as process:
        finished: list[int] = []

        def make(number: int) -> None:
            try:
                wait_until(lambda: "jobs" in process.registry._names_to_collectors, "the metric is made")
                metric: Any = process.registry._names_to_collectors["jobs"]
                for kind in kinds[number:] + kinds[:number]:
                    metric.labels(kind, "x").inc()
                    time.sleep(0)
            finally:
                finished.append(number)

        def scrape() -> None:
            make_labelled_counter(process.registry)
            while len(finished) < 7:
                names = [
                    (sample.name, *sample.labels.values())
                    for metric in process.binding.collect()
                    for sample in metric.samples
                ]
                assert len(names) == 2 * len(kinds)
                assert len(set(names)) == len(names)

        run_threads([*(lambda number=number: make(number) for number in range(7)), scrape])

        assert set(samples(process.binding, created=False).values()) == {1007.0}
    with processes() as process:
        assert set(samples(process.binding, created=False).values()) == {1007.0}


def test_a_series_is_never_served_twice_while_its_metric_is_made(processes: Begin) -> None:
    with processes() as process:
        make_counter(process.registry).inc(5)

    with processes() as process:
        collecting = process.registry.collect

        def collect_slowly() -> Iterator[Any]:
            make_counter(process.registry).inc()  # as if in another thread, in the middle of the scrape
            yield from collecting()

        process.registry.collect = collect_slowly  # type: ignore[method-assign]

        found = [(sample.name, sample.value) for metric in process.binding.collect() for sample in metric.samples]
    assert [name for name, _ in sorted(found)] == ["jobs_created", "jobs_total"]
    assert dict(found)["jobs_total"] == 6


def test_increments_while_the_ledger_opens_and_closes_are_counted_exactly_once(tmp_path: Path) -> None:
    process = Process(tmp_path / "19100.ledger")
    counter = make_counter(process.registry)
    labelled = Counter("labelled", "Labelled.", ["thread"], registry=process.registry)
    summary = make_summary(process.registry)
    histogram = Histogram("seconds", "Seconds.", buckets=[1], registry=process.registry)
    opening = threading.Event()
    counted = [0] * 8

    def increment(number: int) -> None:
        while not opening.is_set():
            counter.inc()
            labelled.labels(str(number)).inc()
            labelled.labels(f"{number} {counted[number] % 50}").inc()
            summary.observe(2)
            histogram.observe(0.5)
            counted[number] += 1

    def open_and_close() -> None:
        try:
            for _ in range(25):
                process.open()
                time.sleep(0.002)
                process.binding.close()
                time.sleep(0.002)
        finally:
            opening.set()

    run_threads([*(lambda number=number: increment(number) for number in range(8)), open_and_close])

    process.open()
    found = samples(process.binding, created=False)
    process.binding.close()
    total = sum(counted)
    assert total > 100
    assert found["jobs_total"] == found["size_bytes_count"] == found["seconds_count"] == total
    assert found["size_bytes_sum"] == 2 * total
    assert found["seconds_sum"] == total / 2
    assert sum(value for name, value in found.items() if name.startswith("labelled")) == 2 * total
    for number in range(8):
        assert found[f'labelled_total{{thread="{number}"}}'] == counted[number]


def test_an_increment_that_had_begun_when_its_value_was_replaced_counts(processes: Begin) -> None:
    with processes() as process:
        make_counter(process.registry).inc(5)

    process = Process(process.path)
    counter = make_counter(process.registry)
    value = counter._value
    held, release = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with value._lock:
            held.set()
            release.wait(30)

    threads = [threading.Thread(target=hold_the_lock, daemon=True)]
    threads[0].start()
    held.wait(30)
    threads += [threading.Thread(target=value.inc, args=[2], daemon=True) for _ in range(4)]
    threads.append(threading.Thread(target=process.open, daemon=True))
    for thread in threads[1:]:
        thread.start()
        time.sleep(0.01)
    release.set()
    for thread in threads:
        thread.join(30)
    value.inc(1)

    assert process.samples()["jobs_total"] == 5 + 4 * 2 + 1
    process.binding.close()
    with processes() as process:
        assert process.samples()["jobs_total"] == 14


class OtherValue(MutexValue):
    """A custom value class."""


def test_values_of_another_class_stay_in_memory(
    processes: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with processes() as process:
        known = make_labelled_counter(process.registry)
        known.labels("x", "y").inc()
        monkeypatch.setattr(prometheus_client.values, "ValueClass", OtherValue)
        for make in (make_summary, make_histogram):
            work(make(process.registry))
        known.labels("x", "z").inc()
        here = samples(process.binding, created=False)

    assert len(errors(caplog)) == 1
    assert here["size_bytes_count"] == here["job_seconds_count"] == 4
    assert here['jobs_total{kind="x",state="z"}'] == 1
    with processes() as process:
        assert samples(process.binding, created=False) == {'jobs_total{kind="x",state="y"}': 1.0}


# Soon full.
SMALL = Layout(size=CELLS_AT + 8 * LAYOUT.cells + 4096)


def test_a_full_ledger_is_one_error_and_counting_goes_on(processes: Begin, caplog: pytest.LogCaptureFixture) -> None:
    with processes(layout=SMALL) as process:
        metric = make_labelled_histogram(process.registry)
        for number in range(100):
            for _ in range(3):
                metric.labels(str(number), "x" * 50).observe(1)
        late = make_counter(process.registry)
        late.inc(2)
        here = samples(process.binding, created=False)
        assert {value for name, value in here.items() if "_count" in name} == {3.0}
        assert here["jobs_total"] == 2
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "counted in memory" in errors(caplog)[0]

    with processes(layout=SMALL) as process:
        kept = samples(process.binding, created=False)
    assert 10 * 18 < len(kept) < len(here)
    assert kept.items() <= here.items()


def test_a_full_ledger_refuses_the_site_nothing(processes: Begin, caplog: pytest.LogCaptureFixture) -> None:
    with processes(layout=SMALL) as process:
        for make in (make_counter, make_summary, make_histogram):
            work(make(process.registry))
        metric = Counter("labelled", "Labelled.", ["x"], registry=process.registry)
        for number in range(300):
            metric.labels(f"{number} {'x' * (50 if number < 60 else 1)}").inc()

    with processes(layout=SMALL) as process:
        metric = Counter("labelled", "Labelled.", ["x"], registry=process.registry)
        for number in range(300):
            metric.labels(f"{number}").inc()
        metric.remove("1")
        metric.remove_by_labels({"x": f"2 {'x' * 50}"})
        metric.clear()
        histogram = make_histogram(process.registry)
        process.registry.unregister(histogram)
        Gauge("jobs", "A gauge now.", registry=process.registry).set(3)
        Counter("size_bytes", "A counter now.", registry=process.registry).inc(4)
        here = samples(process.binding, created=False)

    assert len(errors(caplog)) >= 1
    assert {"jobs": 3.0, "size_bytes_total": 4.0}.items() <= here.items()
    assert not [name for name in here if name.startswith("labelled")]


def test_a_binding_without_a_ledger_serves_the_registry(tmp_path: Path) -> None:
    process = Process(tmp_path / "19100.ledger")
    for metric in make_all(process.registry):
        work(metric, "x")

    assert exposition(process.binding) == exposition(process.registry)


def test_after_the_end_a_process_counts_on_from_zero(processes: Begin) -> None:
    with processes() as process:
        metric = make_labelled_counter(process.registry)
        child = metric.labels("x", "y")
        child.inc(5)
    child.inc(2)

    assert process.samples()['jobs_total{kind="x",state="y"}'] == 2
    process.open()
    child.inc(1)
    assert process.samples()['jobs_total{kind="x",state="y"}'] == 8
    process.binding.close()


# A process with four threads that count forks again and again; each child counts too, and must leave the ledger alone.
FORKED_CHILDREN = """
import faulthandler, os, sys, threading, time
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from django_promports.ledger import Ledger, LedgerLocked
from django_promports.binding import Binding

path = Path(sys.argv[1])
registry = CollectorRegistry()
counter = Counter("events", "Events.", ["thread"], registry=registry)
histogram = Histogram("seconds", "Seconds.", registry=registry)
binding = Binding(registry)
binding.open(Ledger(path, "site"))
counted, stopping, going = [0] * 4, False, threading.Event()

def work(number):
    while not stopping:
        going.wait()
        counter.labels(str(number)).inc()
        counter.labels(f"{number} {counted[number] % 20}").inc()
        histogram.observe(1)
        counted[number] += 1

threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
for thread in threads:
    thread.start()
sys.setswitchinterval(1e-4)
failed = 0
for fork in range(200):
    going.set()
    time.sleep(0.002)
    # In the middle of something, most times; and sometimes surely so.
    held = [counter.labels("0")._value._lock, histogram._sum._lock, registry._lock] if fork % 20 == 0 else []
    for lock in held:
        lock.acquire()
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(20, exit=True)
        try:
            binding.begin_in_child(keep=False)
            lines = generate_latest(binding).decode().splitlines()
            before = {line for line in lines if line.startswith("events_total")}
            assert all(line.endswith(" 0.0") for line in before), "numbers of the parent"
            for number in range(4):
                counter.labels(str(number)).inc(1e6)
                counter.labels(f"new {fork}").inc(1e6)
            histogram.observe(1e6)
            Counter(f"other_{fork}", "Other.", registry=registry).inc(1e6)
            counter.remove("0")
            counter.clear()
            generate_latest(binding)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    for lock in held:
        lock.release()
    going.clear()
    failed += os.waitpid(pid, 0)[1] != 0
stopping = True
going.set()
for thread in threads:
    thread.join()
binding.close()
successor = CollectorRegistry()
binding = Binding(successor)
binding.open(Ledger(path, "site"))
found = {
    (sample.name, sample.labels.get("thread")): sample.value
    for metric in binding.collect() for sample in metric.samples if not sample.labels.get("le")
}
binding.close()
for number in range(4):
    assert found["events_total", str(number)] == counted[number]
assert sum(value for (name, _), value in found.items() if name == "events_total") == 2 * sum(counted)
assert found["seconds_count", None] == found["seconds_sum", None] == sum(counted)
assert not [name for name, _ in found if name.startswith("other")]
print(failed, sum(counted) > 0)
"""


def test_a_workers_forked_child_leaves_the_ledger_alone(tmp_path: Path) -> None:
    done = run_python(FORKED_CHILDREN, str(tmp_path / "19100.ledger"), PYTHONWARNINGS="ignore::DeprecationWarning")

    assert done.stdout == "0 True\n", done.stderr


# A master that counts before, between and after its forks; its children each take over the ledger of a port.
MASTER = """
import os, sys
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter, Histogram
from django_promports.ledger import Ledger
from django_promports.binding import Binding

folder, forks = Path(sys.argv[1]), 5
registry = CollectorRegistry()
counter = Counter("events", "Events.", ["who"], registry=registry)
plain = Counter("plain", "Plain.", registry=registry)
seconds = Histogram("seconds", "Seconds.", registry=registry)
binding = Binding(registry)

def count(times):
    for number in range(times):
        counter.labels(str(number % 3)).inc()
        plain.inc()
        seconds.observe(1)

count(3)
binding.open(Ledger(folder / "0.ledger", "site"))
count(10)
for fork in range(forks):
    count(100)
    binding.close()    # the first time: it lets its port go before it forks; later it has none
    count(200)
    binding.carry_counts()
    count(300)
    pid = os.fork()
    if pid == 0:
        try:
            binding.begin_in_child(keep=True)
            count(300)
            binding.open(Ledger(folder / f"{fork}.ledger", "site"))
            count(400)
            if fork % 2:
                binding.close()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(0)
    binding.drop_carried_counts()
    os.waitpid(pid, 0)
count(7)
binding.open(Ledger(folder / "0.ledger", "site"))
binding.close()
found = {}
for path in folder.glob("*.ledger"):
    binding = Binding(CollectorRegistry())
    binding.open(Ledger(path, "site"))
    for metric in binding.collect():
        for sample in metric.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    binding.close()
expected = 3 + 10 + 7 + forks * (100 + 200 + 300 + 300 + 400)
for name in ("events_total", "plain_total", "seconds_count", "seconds_sum"):
    print(name, found[name] - expected)
"""


def test_what_a_master_counts_is_counted_once_over_its_children(tmp_path: Path) -> None:
    done = run_python(MASTER, str(tmp_path))

    assert done.stderr == ""
    assert done.stdout == "".join(
        f"{name} 0.0\n" for name in ("events_total", "plain_total", "seconds_count", "seconds_sum")
    )


def test_cells_hold_what_the_metric_says(processes: Begin) -> None:
    with processes() as process:
        counter = make_counter(process.registry)
        ledger = process.binding.ledger
        assert ledger is not None
        family = ledger.families["jobs"]
        first = family.series[()]
        for number in range(1, 4):
            counter.inc()
            assert ledger.cells[first] == number

        wait_until(lambda: family.read_created([first]) == [counter._created], "created is there", 1)


def test_a_series_that_is_removed_during_a_scrape_shows_no_number_of_another(
    processes: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "QUARANTINE_SECONDS", 0.0)  # as if the collector had taken that long
    with processes() as process:
        make_labelled_counter(process.registry).labels("old", "x").inc(5)
    with processes() as process:

        class Collecting(Collector):
            def describe(self) -> list[Metric]:
                return []

            def collect(self) -> list[Metric]:
                metric.remove("old", "x")
                metric.labels("new", "x").inc(7)
                return []

        process.registry.register(Collecting())
        metric = make_labelled_counter(process.registry)

        assert samples(process.binding, created=False) == {'jobs_total{kind="new",state="x"}': 7.0}
