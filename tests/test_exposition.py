from __future__ import annotations

import gzip
import logging
import math
import random
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from django.test import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    Summary,
    make_wsgi_app,
)
from prometheus_client import metrics as prometheus_metrics
from prometheus_client import values as prometheus_values
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from django_promports.binding import Binding
from django_promports.ledger import Ledger
from django_promports.probe import count_samples
from django_promports.scrape import exposition
from django_promports.scrape.exposition import Exposition
from django_promports.values import CellValue
from tests.examples import examples

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
ESCAPINGS = ("allow-utf-8", "underscores", "dots", "values", "unheard-of")
FORMATS = [
    "",
    OPENMETRICS,
    "text/plain;version=0.0.4",
    "application/openmetrics-text",
    "application/openmetrics-text;version=1.0.0",
    *(f"application/openmetrics-text;version=1.0.0;escaping={escaping}" for escaping in ESCAPINGS),
    *(f"text/plain;version=1.0.0;escaping={escaping}" for escaping in ESCAPINGS),
]
Answer = tuple[list[tuple[str, str]], bytes]


def ask_prometheus_client(binding: Any, accept: str, encoding: str, names: Sequence[str] = ()) -> Answer:
    """Return headers and plain body."""
    headers: list[tuple[str, str]] = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/metrics",
        "QUERY_STRING": urlencode([("name[]", name) for name in names]),
        "HTTP_ACCEPT": accept,
        "HTTP_ACCEPT_ENCODING": encoding,
    }
    body = b"".join(make_wsgi_app(binding)(environ, lambda status, pairs: headers.extend(pairs)))
    return headers, gzip.decompress(body) if ("Content-Encoding", "gzip") in headers else body


def complete(steps: Iterator[None]) -> tuple[Any, int]:
    """Return the result of the generator, and how often it yielded."""
    count = 0
    while True:
        try:
            next(steps)
            count += 1
        except StopIteration as stop:
            return stop.value, count


def ask(ours: Exposition, accept: str = OPENMETRICS, encoding: str = "gzip", names: Sequence[str] = ()) -> Answer:
    """Return headers and plain body."""
    (headers, body), _ = complete(ours.render(accept, encoding, names))
    return headers, gzip.decompress(body) if ("Content-Encoding", "gzip") in headers else body


def assert_equal(
    ours: Exposition, binding: Binding, accept: str = OPENMETRICS, encoding: str = "gzip", names: Sequence[str] = ()
) -> None:
    expected, got = ask_prometheus_client(binding, accept, encoding, names), ask(ours, accept, encoding, names)
    if names:
        # prometheus_client walks a set of collectors here, so their order differs from process to process.
        assert (got[0], split_families(got[1])) == (expected[0], split_families(expected[1]))
    else:
        assert got == expected


def split_families(body: bytes) -> list[bytes]:
    return sorted(re.split(rb"(?m)^(?=# HELP )", body.removesuffix(b"# EOF\n")))


@pytest.fixture(autouse=True)
def created_series() -> Iterator[None]:
    yield
    prometheus_metrics._use_created = True


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.name == "django_promports"]


# --- whatever the registry

# A name that ends with a newline passes prometheus_client's own check for plain names, and breaks its text.
NAMES = st.one_of(
    st.sampled_from(["requests", "http_requests_total", "temps_écoulé", "a.b", "x{y}", '100 %(s)s "q"', "_created"]),
    st.text(min_size=1, max_size=6),
).filter(lambda name: not name.endswith("\n"))
LABELNAMES = NAMES.filter(lambda name: not name.startswith("__") and name not in ("le", "quantile"))
LABELVALUES = st.one_of(
    st.sampled_from(["", "a", "b", 'q"', "\\", "\n", "%s %%b", "ö€😀", "\ue0000\ue000"]), st.text(max_size=4)
)
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.1, 999999.0, 1e6, 1234567.5, 1e16, 1e-7, 5e-324, math.inf, -math.inf, math.nan]),
    st.floats(),
    st.integers(-5, 5).map(float),
)
BUCKETS = (
    st.lists(st.floats(allow_nan=False), min_size=1, max_size=6, unique=True)
    .map(sorted)
    .filter(lambda bounds: bounds != [math.inf])
)
EXEMPLARS = st.one_of(
    st.none(), st.none(), st.dictionaries(st.sampled_from(["trace_id", "ñ"]), LABELVALUES, min_size=1)
)


class Stamped(Collector):
    """Metrics of other types, with timestamps, as custom collectors make them."""

    def __init__(self, name: str, numbers: list[float]) -> None:
        self.name, self.numbers = name, numbers

    def describe(self) -> Iterable[Metric]:
        return [Metric(self.name, "", "unknown")]

    def collect(self) -> Iterable[Metric]:
        gauge = GaugeMetricFamily(f"{self.name}_gauge", "Stamped\nlines", labels=["n"])
        for i, number in enumerate(self.numbers * 4):
            gauge.add_metric([str(i)], number, timestamp=1.5 + i)
        yield gauge
        yield CounterMetricFamily(f"{self.name}_counter", "", value=self.numbers[0], created=12.0)
        yield UnknownMetricFamily(f"{self.name}_unknown", "", value=self.numbers[-1])
        yield GaugeHistogramMetricFamily(f"{self.name}_gh", "", buckets=[("1.0", 1), ("+Inf", 2)], gsum_value=3.0)


class Mine(Counter):
    """A subclass that changes what is exposed."""

    def _child_samples(self) -> Iterable[Sample]:
        return [*super()._child_samples(), Sample("_mine", {}, 1.0)]


CLASSES = [Counter, Gauge, Summary, Histogram, Info, Enum, Mine]
METRICS = st.fixed_dictionaries(
    {
        "cls": st.sampled_from([Counter, Histogram, *CLASSES]),
        "name": NAMES,
        "help": st.one_of(st.just("Help."), st.text(max_size=5)),
        "labelnames": st.one_of(st.just([]), st.lists(LABELNAMES, max_size=3, unique=True)),
        "unit": st.sampled_from(["", "", "seconds"]),
        "buckets": BUCKETS,
    }
)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["count"] * 8 + ["remove", "reset", "clear", "function", "unregister", "created", "forget"]),
        st.integers(0, 5),
        st.tuples(LABELVALUES, LABELVALUES, LABELVALUES),
        NUMBERS,
        EXEMPLARS,
    ),
    max_size=8,
)
SCRAPES = st.tuples(st.sampled_from(FORMATS), st.sampled_from(["", "gzip", "br, GZIP;q=1"]), st.booleans())


def make_metrics(registry: CollectorRegistry, specs: list[dict[str, Any]]) -> list[Any]:
    made = []
    for spec in specs:
        cls, more = spec["cls"], {}
        if cls is Histogram:
            more["buckets"] = spec["buckets"]
        elif cls is Enum:
            more["states"] = ["on", "off"]
        unit = "" if cls in (Info, Enum) else spec["unit"]
        try:
            made.append(cls(spec["name"], spec["help"], spec["labelnames"], unit=unit, registry=registry, **more))
        except ValueError:  # a name that is taken, or that this type must not have
            pass
    return made


def operate(
    registry: CollectorRegistry,
    metric: Any,
    what: str,
    labelvalues: Sequence[str],
    number: float,
    exemplar: dict[str, str] | None,
) -> None:
    labels = labelvalues[: len(metric._labelnames)]
    if what == "created":
        prometheus_metrics._use_created = number <= 0  # what disable_created_metrics() does
    elif what == "unregister":
        try:
            registry.unregister(metric)
        except KeyError:
            registry.register(metric)
    elif labels and what == "remove":
        metric.remove(*labels)
    elif labels and what == "forget":
        metric.remove_by_labels({metric._labelnames[0]: labels[0]})
    elif labels and what == "clear":
        metric.clear()
    else:
        child = metric.labels(*labels) if labels else metric
        if isinstance(child, Counter):
            if what == "reset":
                child.reset()
            else:
                child.inc(0.0 if number < 0 else number, exemplar)
        elif isinstance(child, Gauge):
            if what == "function":
                child.set_function(lambda: number)
            else:
                child.set(number)
        elif isinstance(child, Histogram):
            child.observe(number, exemplar)
        elif isinstance(child, Summary):
            child.observe(number)
        elif isinstance(child, Info):
            child.info({"\ue000version": labelvalues[0]})
        elif isinstance(child, Enum):
            child.state("on" if number > 0 else "off")


def sample_names(binding: Binding) -> list[str]:
    return sorted({sample.name for metric in binding.collect() for sample in metric.samples})


@settings(derandomize=True, deadline=None, max_examples=examples(150), suppress_health_check=list(HealthCheck))
@given(data=st.data(), specs=st.lists(METRICS, min_size=1, max_size=6), with_ledger=st.booleans())
def test_output_equals_prometheus_clients(
    data: st.DataObject, specs: list[dict[str, Any]], with_ledger: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()  # of the example before
    prometheus_metrics._use_created = True
    CellValue.has_exemplars = False
    with tempfile.TemporaryDirectory() as folder:
        bindings = []
        # The second process comes after the first one, and has made some of its metrics.
        for made in (specs, specs[: data.draw(st.integers(0, len(specs)))])[: 1 + with_ledger]:
            target = data.draw(st.sampled_from([None, {"target": "x"}]))
            registry = CollectorRegistry(target_info=target, auto_describe=True)
            binding = Binding(registry)
            if with_ledger:
                binding.open(Ledger(Path(folder) / "1.ledger", "app"))
            bindings.append(binding)
            collectors = make_metrics(registry, made)
            if data.draw(st.booleans()):
                registry.register(Stamped("stamped", data.draw(st.lists(NUMBERS, min_size=1, max_size=9))))
            ours = Exposition(binding)
            for accept, encoding, restrict in data.draw(st.lists(SCRAPES, min_size=1, max_size=4)):
                for what, which, labelvalues, number, exemplar in data.draw(OPERATIONS) if collectors else []:
                    operate(registry, collectors[which % len(collectors)], what, labelvalues, number, exemplar)
                names = sample_names(binding)
                if restrict and names:
                    assert_equal(
                        ours, binding, accept, encoding, data.draw(st.lists(st.sampled_from(names), min_size=1))
                    )
                assert_equal(ours, binding, accept, encoding)
                assert_equal(ours, binding, accept, encoding)
            assert "is not what django_promports knows" not in caplog.text
            assert ours.failures == 0
            binding.close()


def test_every_format_equals_prometheus_clients_twice_over(registry: CollectorRegistry) -> None:
    Info("build", "Version.", registry=registry).info({"version": '1"'})
    fill(registry, 20)
    ours, binding = Exposition(Binding(registry)), Binding(registry)
    for accept in FORMATS * 2:
        for encoding in ("", "gzip", "identity", "deflate;q=1, gzip;q=0.5"):
            assert_equal(ours, binding, accept, encoding)


def test_demo_sites_registry_equals_prometheus_clients(
    client: Client, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import demo_site.metrics  # noqa: F401

    # Those that look at the process give other numbers a moment later; what they gave once has to do.
    for collector in list(REGISTRY._collector_to_names):
        if not hasattr(collector, "_labelnames"):
            frozen = list(collector.collect())
            monkeypatch.setattr(collector, "collect", lambda frozen=frozen: frozen)
    binding = Binding(REGISTRY)
    ours = Exposition(binding)
    for path in ("/nowhere/", "/nowhere/else/"):
        client.get(path)
        for accept in FORMATS:
            assert_equal(ours, binding, accept)
    assert b"django_http_responses_total_by_status_view_method_total" in ask(ours)[1]
    assert not warnings()


def fill(registry: CollectorRegistry, views: int) -> list[Any]:
    """Create metrics like those of django-prometheus."""
    seconds = Histogram("latency_seconds", "Time.", ["view", "method"], registry=registry, buckets=(0.01, 0.1, 1, 10))
    responses = Counter("responses", "Responses.", ["status", "view"], registry=registry)
    temperature = Gauge("temperature_celsius", "Heat.", ["room"], registry=registry)
    body = Summary("body_bytes", "Size.", registry=registry)
    body.observe(2.0**31)
    children: list[Any] = [body]
    for i in range(views):
        children += [seconds.labels(f"view-{i}", "GET"), responses.labels("200", f"view-{i}"), temperature.labels(i)]
    for child in children:
        touch(child, 0.5)
    return children


def touch(child: Any, number: float) -> None:
    (child.inc if isinstance(child, Counter | Gauge) else child.observe)(number)


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_large_registry_stays_equal_while_its_children_come_change_and_go(
    registry: CollectorRegistry, accept: str, warnings: Callable[[], list[str]]
) -> None:
    chance = random.Random(4)
    children = fill(registry, 400)
    binding = Binding(registry)
    ours = Exposition(binding)
    for step in range(12):
        assert_equal(ours, binding, accept)
        for child in chance.sample(children, len(children) // 9 * (step % 3)):
            touch(child, chance.random())
        for collector in list(registry._collector_to_names):
            if step % 4 == 3 and isinstance(collector, Counter | Histogram) and collector._labelnames:
                for labelvalues in chance.sample(list(collector._metrics), 100):
                    collector.remove(*labelvalues)
                    collector.labels(f"new-{step}", labelvalues[1])
    assert not warnings()


# --- the ledger


def test_series_that_only_the_ledger_has_are_exposed(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    before = Binding(CollectorRegistry())
    before.open(Ledger(tmp_path / "1.ledger", "app"))
    fill(before.registry, 150)
    Counter("odd_total_total", "Odd.", registry=before.registry).inc()
    before.close()

    registry = CollectorRegistry()
    binding = Binding(registry)
    binding.open(Ledger(tmp_path / "1.ledger", "app"))
    ours = Exposition(binding)
    lines = ask(ours)[1].count(b"\n")
    assert lines > 150 * 10
    for accept in (OPENMETRICS, ""):
        assert_equal(ours, binding, accept)
    responses = Counter("responses", "Responses.", ["status", "view"], registry=registry)
    for i in range(0, 150, 2):
        responses.labels("200", f"view-{i}").inc()
        assert_equal(ours, binding, ("", OPENMETRICS)[i % 4 // 2])
    assert ask(ours)[1].count(b"\n") == lines
    responses.clear()
    assert_equal(ours, binding)
    assert not warnings()
    binding.close()


# --- what changes without a number that does


def test_exemplar_that_comes_after_its_count_shows(registry: CollectorRegistry) -> None:
    counter = Counter("requests", "", ["view"], registry=registry)
    counter.labels("a").inc()
    binding = Binding(registry)
    ours = Exposition(binding)
    assert_equal(ours, binding)
    counter.labels("a").inc(0, {"trace_id": "x"})
    assert b'trace_id="x"' in ask(ours)[1]
    counter.labels("a").inc(0, {"trace_id": "y"})
    assert b'trace_id="y"' in ask(ours)[1]
    assert_equal(ours, binding)
    assert_equal(ours, binding, "")


def test_exemplar_shows_where_cells_were_read_before(
    registry: CollectorRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CellValue, "has_exemplars", False)
    counter = Counter("requests", "", ["view"], registry=registry)
    binding = Binding(registry)
    binding.open(Ledger(tmp_path / "1.ledger", "app"))
    ours = Exposition(binding)
    counter.labels("a").inc()
    assert_equal(ours, binding)
    counter.labels("a").inc(0, {"trace_id": "x"})
    assert b'trace_id="x"' in ask(ours)[1]
    assert_equal(ours, binding)
    binding.close()


def test_metric_is_read_from_its_new_cells(registry: CollectorRegistry, tmp_path: Path) -> None:
    counter = Counter("requests", "", ["view"], registry=registry)
    binding = Binding(registry)
    ours = Exposition(binding)
    for name in ("1.ledger", "2.ledger"):
        binding.open(Ledger(tmp_path / name, "app"))
        for _ in range(2):
            counter.labels("a").inc()
            assert_equal(ours, binding)
            registry.unregister(counter)
            registry.register(counter)
            counter.labels("a").inc()
            assert_equal(ours, binding)
        binding.close()
        counter.labels("a").inc()
        assert_equal(ours, binding)


def test_reset_counter_has_a_new_created_series(registry: CollectorRegistry) -> None:
    counter = Counter("requests", "", registry=registry)
    binding = Binding(registry)
    ours = Exposition(binding)
    assert_equal(ours, binding)
    counter.reset()
    assert_equal(ours, binding)
    assert_equal(ours, binding, "")


def test_gauge_tells_zero_from_minus_zero(registry: CollectorRegistry) -> None:
    gauge = Gauge("balance", "", registry=registry)
    ours = Exposition(Binding(registry))
    gauge.set(0.0)
    assert b"balance 0.0\n" in ask(ours)[1]
    gauge.set(-0.0)
    assert b"balance -0.0\n" in ask(ours)[1]


def test_created_series_can_be_left_out(registry: CollectorRegistry, tmp_path: Path) -> None:
    before = Binding(CollectorRegistry())
    before.open(Ledger(tmp_path / "1.ledger", "app"))
    Counter("former", "", registry=before.registry).inc()
    before.close()

    children = fill(registry, 3)
    Mine("mine", "", registry=registry)
    registry.register(Stamped("stamped", [1.0]))
    binding = Binding(registry)
    binding.open(Ledger(tmp_path / "1.ledger", "app"))
    ours, with_created = Exposition(binding, created=False), Exposition(binding)
    for accept in FORMATS:
        body, whole = ask(ours, accept)[1], ask(with_created, accept)[1]
        assert b"_created" in whole
        assert [line for line in body.splitlines() if b"stamped" not in line] == [
            line for line in whole.splitlines() if b"_created" not in line and b"stamped" not in line
        ]
        assert b"_created" not in body
    children[1].observe(1.0, {"trace_id": "x"})
    assert b"_created" not in ask(ours)[1]
    binding.close()


# --- what this module does not know


def rename_buckets(monkeypatch: pytest.MonkeyPatch, cls: type[Histogram]) -> None:
    """Make a Histogram like that of a prometheus_client with other internals."""
    init, samples, observe = cls._metric_init, cls._child_samples, cls.observe

    def rename(self: Any, old: str, new: str) -> None:
        if old in vars(self):
            setattr(self, new, vars(self).pop(old))

    def with_buckets(function: Any) -> Any:
        def wrapped(self: Any, *arguments: Any) -> Any:
            rename(self, "_counts_of", "_buckets")
            try:
                return function(self, *arguments)
            finally:
                rename(self, "_buckets", "_counts_of")

        return wrapped

    monkeypatch.setattr(cls, "_metric_init", with_buckets(init))
    monkeypatch.setattr(cls, "_child_samples", with_buckets(samples))
    monkeypatch.setattr(cls, "observe", with_buckets(observe))


def test_moved_internals_cost_speed_and_one_warning(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    binding = Binding(registry)
    ours = Exposition(binding)
    with monkeypatch.context() as patch:
        rename_buckets(patch, Histogram)
        children = fill(registry, 3)
        for name in ("first", "second"):
            Histogram(name, "", registry=registry).observe(1)
        for accept in FORMATS:
            touch(children[1], 1.0)
            assert_equal(ours, binding, accept)
    (warning,) = warnings()
    assert "slower" in warning


def test_class_that_is_patched_between_two_scrapes_is_noticed(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(registry, 3)
    binding = Binding(registry)
    ours = Exposition(binding)
    assert_equal(ours, binding)
    monkeypatch.setattr(Counter, "_child_samples", lambda self: [Sample("_patched", {}, 1.0)])
    assert_equal(ours, binding)
    assert b"_patched" in ask(ours)[1]


@pytest.mark.parametrize("gone", ["_use_created", "_names_to_collectors"])
def test_registry_that_moved_goes_through_prometheus_client_as_a_whole(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]], gone: str
) -> None:
    fill(registry, 3)
    ours = Exposition(Binding(registry))
    expected = ask(ours)
    with monkeypatch.context() as patch:
        if gone == "_use_created":
            patch.setattr(exposition, "metrics", object())
        else:
            patch.setattr(exposition, "CollectorRegistry", type("Other", (), {"collect": None}))
        assert [ask(ours), ask(ours)] == [expected, expected]
    assert len(warnings()) == 1


def test_values_of_another_class_go_through_prometheus_client(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    class Doubled(prometheus_values.MutexValue):
        def get(self) -> float:
            return 2 * self._value

    fill(registry, 2)
    binding = Binding(registry)
    ours = Exposition(binding)
    assert_equal(ours, binding)
    monkeypatch.setattr(prometheus_values, "ValueClass", Doubled)
    Counter("doubled", "", registry=registry).inc(4)
    for collector in list(registry._collector_to_names):
        if isinstance(collector, Counter) and collector._labelnames:
            collector.labels("200", "doubled").inc(4)
    assert b"doubled_total 8.0" in ask(ours)[1]
    assert_equal(ours, binding)
    assert not warnings()


def test_subclass_and_function_keep_their_own_samples(
    registry: CollectorRegistry, warnings: Callable[[], list[str]]
) -> None:
    numbers = iter(range(100))
    gauge = Gauge("queue", "", ["name"], registry=registry)
    gauge.labels("a").set(7)
    Mine("mine", "", registry=registry).inc()
    registry.register(Counter("parent", "", ["x"], registry=None).labels("child"))
    ours = Exposition(Binding(registry))
    assert b"mine_mine 1.0" in ask(ours)[1]
    gauge.labels("b").set_function(lambda: float(next(numbers)))
    assert [re.findall(rb'queue{name="b"} (.*)', ask(ours)[1]) for _ in range(2)] == [[b"0.0"], [b"1.0"]]
    assert b'queue{name="a"} 7.0' in ask(ours)[1]
    assert b"\nparent_total 0.0\n" in ask(ours)[1]
    assert not warnings()


def test_custom_collector_leaves_the_others_fast(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(registry, 3)
    registry.register(Stamped("stamped", [1.0]))
    ours = Exposition(Binding(registry))
    expected = ask(ours)
    monkeypatch.setattr(prometheus_metrics.MetricWrapperBase, "_get_metric", None)  # the generic way needs it
    assert ask(ours) == expected


def test_collector_that_raises_costs_its_own_metrics_only(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Collector):
        def collect(self) -> Iterable[Metric]:
            yield GaugeMetricFamily("half", "", value=1)
            raise RuntimeError("database gone")

    fill(registry, 2)
    binding = Binding(registry)
    ours = Exposition(binding)
    expected = ask(ours)
    registry.register(Broken())
    broken_gauge = Gauge("broken", "", registry=registry)
    broken_gauge.set_function(lambda: 1 / 0)
    assert [ask(ours) for _ in range(3)] == [expected] * 3
    assert ours.failures == 6
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "Broken" in errors[0].getMessage()


def test_label_that_cannot_be_encoded_costs_its_own_series_only(registry: CollectorRegistry) -> None:
    children = fill(registry, 2)
    bad = Counter("bad", "", ["x"], registry=registry)
    ours = Exposition(Binding(registry))
    bad.labels("\ud800").inc()
    touch(children[1], 1.0)
    body = ask(ours)[1]
    assert b"latency_seconds_bucket" in body
    assert b"bad_total" not in body
    assert ours.failures == 1


# --- while requests run


def test_histogram_is_consistent_while_threads_count(registry: CollectorRegistry, tmp_path: Path) -> None:
    histogram = Histogram("seconds", "", ["view"], registry=registry, buckets=[0.1, 0.2, 0.5, 1])
    binding = Binding(registry)
    binding.open(Ledger(tmp_path / "1.ledger", "app"))
    ours = Exposition(binding)
    stop = threading.Event()

    def count(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            histogram.labels(f"view-{chance.randrange(30)}").observe(chance.random() * 1.5)

    threads = [threading.Thread(target=count, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(60):
            body = ask(ours, OPENMETRICS if round_ % 2 else "")[1].decode()
            for view in range(30):
                buckets = [float(n) for n in re.findall(rf'seconds_bucket{{le=".*",view="view-{view}"}} (.*)', body)]
                counts = [float(n) for n in re.findall(rf'seconds_count{{view="view-{view}"}} (.*)', body)]
                assert buckets == sorted(buckets)
                assert buckets[-1:] == counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert_equal(ours, binding)
    binding.close()


def test_big_registry_is_rendered_in_many_slices(registry: CollectorRegistry) -> None:
    fill(registry, 2000)
    ours = Exposition(Binding(registry))
    assert complete(ours.render(OPENMETRICS, "gzip", []))[1] >= 20


def test_slow_collector_of_many_samples_is_encoded_in_slices(registry: CollectorRegistry) -> None:
    registry.register(Stamped("stamped", [1.0] * 100))
    ours = Exposition(Binding(registry))
    assert complete(ours.render(OPENMETRICS, "gzip", []))[1] >= 20


def test_renders_may_overlap_and_be_given_up(registry: CollectorRegistry) -> None:
    children = fill(registry, 1000)
    binding = Binding(registry)
    ours = Exposition(binding)
    ask(ours)
    for rounds in range(1, 8):
        for child in children[::rounds]:
            touch(child, 0.25)
        first, second = (ours.render(OPENMETRICS, "gzip", []) for _ in range(2))
        for _ in range(rounds):
            next(first, None)
            next(second, None)
        second.close()
        (_, body), _ = complete(first)
        assert gzip.decompress(body) == ask(ours)[1]
        assert_equal(ours, binding)


def test_compressed_body_is_one_gzip_member(registry: CollectorRegistry) -> None:
    fill(registry, 300)
    ours = Exposition(Binding(registry))
    for _ in range(2):
        (_, body), _ = complete(ours.render(OPENMETRICS, "gzip", []))
        decompressor = zlib.decompressobj(16 + zlib.MAX_WBITS)
        plain = decompressor.decompress(body)
        assert decompressor.eof
        assert not decompressor.unused_data
        assert plain == ask(ours, encoding="")[1]


# --- what is kept


def kept_bytes(ours: Exposition) -> int:
    return sum(
        block.size + len(block.plain) + len(block.packed or b"")
        for form in ours.forms.values()
        for kept in form.metrics.values()
        for section in kept.sections or []
        for blocks in section.blocks
        for block in blocks
    ) + sum(len(plain) + len(packed) for form in ours.forms.values() for plain, packed in form.packed.items())


def test_cache_is_bounded_while_label_sets_churn(registry: CollectorRegistry) -> None:
    users = Counter("logins", "", ["user"], registry=registry)
    Gauge("steady", "", registry=registry)
    ours = Exposition(Binding(registry))
    sizes = []
    for generation in range(30):
        for i in range(200):
            users.labels(f"user-{generation:03}-{i:03}").inc()
            if generation and i % 5:  # one of five stays for a while
                users.remove(f"user-{generation - 1:03}-{i:03}")
            if generation > 4 and not i % 5:
                users.remove(f"user-{generation - 5:03}-{i:03}")
        ask(ours)
        sizes.append(kept_bytes(ours))
    assert max(sizes[10:]) < 1.2 * max(sizes[5:10])
    users.clear()
    ask(ours)
    assert kept_bytes(ours) < 0.02 * max(sizes)


def test_at_most_two_formats_are_kept_and_none_that_is_not_asked_for(registry: CollectorRegistry) -> None:
    fill(registry, 5)
    ours = Exposition(Binding(registry))
    for accept in FORMATS:
        ask(ours, accept)
        assert len(ours.forms) <= 2
    for _ in range(exposition.MAX_IDLE_SCRAPES):
        ask(ours)
    assert len(ours.forms) == 1


def test_unregistered_metric_leaves_the_cache(registry: CollectorRegistry) -> None:
    counter = Counter("requests", "", registry=registry)
    ours = Exposition(Binding(registry))
    ask(ours)
    assert kept_bytes(ours) > 0
    registry.unregister(counter)
    assert ask(ours)[1] == b"# EOF\n"
    assert kept_bytes(ours) == len(b"# EOF\n") + len(next(iter(next(iter(ours.forms.values())).packed.values())))


@pytest.mark.parametrize("encoding", ["", "gzip"])
@pytest.mark.parametrize("accept", ["", "application/openmetrics-text;version=1.0.0"])
@pytest.mark.parametrize("created", [True, False])
def test_the_series_of_the_last_exposition_are_known(accept: str, encoding: str, created: bool) -> None:
    registry = CollectorRegistry()
    counter = Counter("apples", 'Help with "\n# quotes.', ["kind"], registry=registry)
    Histogram("seconds", "Help.", registry=registry).observe(1)
    Gauge("level", "Help.", registry=registry)
    Info("version", "Help.", registry=registry).info({"major": "1"})
    GCCollector(registry)
    ours = Exposition(Binding(registry), created=created)
    assert ours.series is None

    for kind in range(300):
        counter.labels(f"{kind}\n# {kind}").inc()
        if kind % 100 == 0:
            _, body = complete(ours.render(accept, encoding, ()))[0]
            text = gzip.decompress(body) if encoding else body
            assert ours.series == count_samples(text)
            complete(ours.render(accept, encoding, ("level",)))
            assert ours.series == count_samples(text)
