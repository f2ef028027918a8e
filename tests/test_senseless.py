"""Invalid numbers, texts and collectors: each affects only itself, and is gone with the next process."""

from __future__ import annotations

import asyncio
import gzip
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gevent
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from django_promports import storage
from django_promports.binding import Binding
from django_promports.layout import END_AT, STATE
from django_promports.ledger import Ledger
from django_promports.scrape.exposition import Exposition
from tests.commands import run_python
from tests.data.ledgers.freeze import thaw
from tests.walk import check_form, read

LEDGERS = Path(__file__).parent / "data" / "ledgers"
ACCEPTS = ["", "application/openmetrics-text;version=1.0.0"]
accepts = pytest.mark.parametrize("accept", ACCEPTS)
encodings = pytest.mark.parametrize("encoding", ["", "gzip"])
BAD = "\ud83d"


class Process:
    def __init__(self, path: Path) -> None:
        self.registry = CollectorRegistry(auto_describe=True, support_collectors_without_names=True)
        self.binding = Binding(self.registry)
        self.binding.open(Ledger(path, "site"))
        self.ours = Exposition(self.binding)

    def scrape(self, accept: str = "", encoding: str = "", names: tuple[str, ...] = ()) -> dict[str, str]:
        return read(render(self.ours, accept, encoding, names)[1])


def render(ours: Exposition, accept: str = "", encoding: str = "", names: tuple[str, ...] = ()) -> tuple[str, str]:
    """Return content type and text."""
    steps = ours.render(accept, encoding, names)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            headers, body = stop.value
            text = (gzip.decompress(body) if encoding else body).decode()
            content_type = dict(headers)["Content-Type"]
            check_form(text, "openmetrics" if "openmetrics" in content_type else "")
            return content_type, text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "19100.ledger"


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- numbers


@pytest.mark.parametrize("seal", [True, False], ids=["closed", "killed"])
def test_what_is_not_finite_is_zero_in_the_next_process_and_said_once(
    seal: bool, path: Path, logged: Callable[[], list[str]]
) -> None:
    process = Process(path)
    histogram = Histogram("h", "H.", registry=process.registry, buckets=[1])
    summary = Summary("s", "S.", registry=process.registry)
    counter = Counter("c", "C.", ["x"], registry=process.registry)
    for amount in (0.5, math.nan):
        histogram.observe(amount)
        summary.observe(amount)
    counter.labels("x").inc(math.inf)
    counter.labels("y").inc(3)
    counter.labels("z").inc(-0.0)
    counter.labels("z")._value.set(-math.inf)
    Counter("d", "D.", registry=process.registry).inc(math.nan)
    here = process.scrape()
    assert [here[key] for key in ("h_sum", "s_sum", 'c_total{x="x"}', 'c_total{x="z"}', "d_total")] == [
        "NaN", "NaN", "+Inf", "-Inf", "NaN",
    ]  # fmt: skip
    assert process.binding.ledger is not None
    if seal:
        process.binding.close()
    else:
        process.binding.ledger.close(seal=False)

    process = Process(path)
    found = process.scrape()
    zero = dict.fromkeys(["h_sum", "s_sum", 'c_total{x="x"}', 'c_total{x="z"}', "d_total"], "0.0")
    assert found == here | zero
    (warning,) = logged()
    assert "5 numbers were not finite" in warning
    assert "h[]" in warning
    process.binding.close()
    Process(path).binding.close()
    assert len(logged()) == 1


@pytest.mark.parametrize("senseless", [math.nan, math.inf, -math.inf, -1.0, 1e300, 5e-324])
@pytest.mark.parametrize("cell", range(STATE))
@accepts
def test_senseless_times_of_a_series_break_nothing(senseless: float, cell: int, accept: str, path: Path) -> None:
    process = Process(path)
    Counter("c", "C.", ["x"], registry=process.registry).labels("x").inc(3)
    process.scrape()  # so that idle series might be dropped
    ledger = process.binding.ledger
    assert ledger is not None
    ledger.cells[ledger.families["c"].series["x",] - STATE + cell] = senseless
    ledger.close(seal=False)

    for _ in range(2):
        process = Process(path)
        found = process.scrape(accept)
        if cell < 2:  # the third holds the time since which it is idle
            assert found['c_total{x="x"}'] == "3.0"
        assert math.isfinite(float(found.get('c_created{x="x"}', "0")))
        process.binding.close()


def test_what_a_master_counts_that_is_not_finite_is_zero_in_its_child(tmp_path: Path) -> None:
    script = """
import math, os, sys
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter, Summary
from django_promports.ledger import Ledger
from django_promports.binding import Binding

registry = CollectorRegistry()
counter = Counter("c", "C.", ["x"], registry=registry)
summary = Summary("s", "S.", registry=registry)
binding = Binding(registry)
counter.labels("a").inc(math.nan)
counter.labels("b").inc(2)
summary.observe(math.inf)
binding.carry_counts()
binding.begin_in_child(keep=True)
binding.open(Ledger(Path(sys.argv[1]), "site"))
print(*(s.value for m in binding.collect() for s in m.samples if "_created" not in s.name))
binding.close()
"""
    done = run_python(script, str(tmp_path / "1.ledger"))

    assert done.stdout == "0.0 2.0 1.0 0.0\n", done.stderr
    assert done.stderr.count("was not finite") == 1


def test_a_histogram_that_is_set_to_zero_is_zero(path: Path) -> None:
    process = Process(path)
    histogram = Histogram("h", "H.", ["x"], registry=process.registry)
    counter = Counter("m", "M.", registry=process.registry)
    summary = Summary("s", "S.", registry=process.registry)
    created = counter._created
    histogram.labels("a").observe(3)
    histogram.labels("b").observe(3)
    before = process.scrape()
    child = histogram.labels("b")
    child._sum.set(0)
    for bucket in child._buckets:
        bucket.set(0)
    summary._sum.set(0)
    summary._count.set(0)
    counter._value.set(123)  # which mirrors a counter of something else

    expected = {key: "0.0" if 'x="b"' in key and "_created" not in key else value for key, value in before.items()}
    expected["m_total"] = "123.0"
    for _ in range(2):
        assert process.scrape() == expected
        assert float(process.scrape(ACCEPTS[1])["m_created"]) == created
        process.binding.close()
        process = Process(path)
    process.binding.close()


@accepts
def test_a_reset_shows_its_created_time_though_a_neighbour_is_removed_after_it(accept: str, path: Path) -> None:
    process = Process(path)
    counter = Counter("c", "C.", ["x"], registry=process.registry)
    for label in "abx":
        counter.labels(label).inc()
    process.scrape(accept)
    counter.labels("a").reset()
    counter.remove("b")

    expected = counter.labels("a")._created
    assert float(process.scrape(accept)['c_created{x="a"}']) == expected
    assert process.binding.ledger is not None
    process.binding.ledger.close(seal=False)  # killed: also that is in the ledger
    assert float(Process(path).scrape(accept)['c_created{x="a"}']) == expected


# --- texts


def make_bad(process: Process) -> None:
    counter = Counter("c", "C.", ["x"], registry=process.registry)
    histogram = Histogram("h", "H.", ["x"], registry=process.registry, buckets=[1])
    for label in (BAD, "good", "\udcff bytes"):
        counter.labels(label).inc()
        histogram.labels(label).observe(0.5)
        Gauge("g", "G.", ["x"], registry=None)
    gauge = Gauge("g", "G.", ["x"], registry=process.registry)
    gauge.labels(BAD).set(1)
    gauge.labels("good").set(1)
    Info("i", "I.", ["x"], registry=process.registry).labels(BAD).info({"version": "1"})
    Counter("help", f"Help {BAD}.", registry=process.registry).inc()


GOOD = {
    'c_total{x="good"}': "1.0",
    'h_bucket{le="1.0",x="good"}': "1.0",
    'h_bucket{le="+Inf",x="good"}': "1.0",
    'h_count{x="good"}': "1.0",
    'h_sum{x="good"}': "0.5",
    'g{x="good"}': "1.0",
    "help_total": "1.0",
}


def without_created(found: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in found.items() if "_created" not in key}


@accepts
@encodings
def test_a_lone_surrogate_costs_its_own_series_only(
    accept: str, encoding: str, path: Path, logged: Callable[[], list[str]]
) -> None:
    process = Process(path)
    make_bad(process)
    for _ in range(3):
        assert without_created(process.scrape(accept, encoding)) == GOOD
    assert process.ours.failures == 3 * 5
    assert process.ours.series == len(process.scrape(accept, encoding))
    names = tuple(sorted({key.partition("{")[0] for key in GOOD}))
    assert process.scrape(accept, encoding, names) == GOOD
    assert len(logged()) == 1 + 5  # the ledger's, and one for each metric
    assert not [line for line in logged() if "Scrapes are right" in line]
    process.binding.close()

    process = Process(path)  # not made durable; and before the first request
    expected = {key: value for key, value in GOOD.items() if not key.startswith("g{")}
    assert without_created(process.scrape(accept, encoding)) == expected
    assert process.scrape(accept, encoding, names) == expected
    assert process.ours.failures == 0
    process.binding.close()


@accepts
def test_a_lone_surrogate_in_target_info_or_in_an_exemplar_costs_that(accept: str, path: Path) -> None:
    process = Process(path)
    counter = Counter("c", "C.", ["x"], registry=process.registry)
    counter.labels("a").inc(2, {"trace_id": BAD})
    counter.labels("b").inc(2, {"trace_id": "good"})
    process.registry.set_target_info({"host": BAD})
    for _ in range(2):
        found = process.scrape(accept)
        assert found['c_total{x="a"}'] == "2.0"
        assert found['c_total{x="b"}'].startswith('2.0 # {trace_id="good"}' if accept else "2.0")
        assert not [key for key in found if key.startswith("target")]
    process.registry.set_target_info({"host": "good"})
    assert process.scrape(accept)['target_info{host="good"}'] == ("1.0")
    process.binding.close()


@accepts
@pytest.mark.skipif(sys.byteorder != "little", reason="the frozen file is of a little-endian machine")
def test_a_lone_surrogate_that_an_older_version_kept_is_gone_with_the_next_process(accept: str, path: Path) -> None:
    thaw(LEDGERS / "version-2-surrogates.frozen", path)
    for _ in range(2):
        process = Process(path)
        assert without_created(process.scrape(accept)) == {'c_total{x="good"}': "1.0"}
        process.binding.close()


class Contrary(str):
    """A string whose methods raise, or return something else than a string."""

    __slots__ = ()

    def __str__(self) -> str:
        return self

    def replace(self, *arguments: Any) -> Any:
        raise SystemExit("no text")

    def encode(self, *arguments: Any) -> Any:
        raise SystemExit("no text")

    def __format__(self, spec: str) -> Any:
        raise SystemExit("no text")


@accepts
def test_text_that_misbehaves_costs_its_own_series_or_metric_only(accept: str, path: Path) -> None:
    process = Process(path)
    counter = Counter("c", "C.", ["x"], registry=process.registry)
    gauge = Gauge("g", "G.", ["x"], registry=process.registry)
    for metric in (counter, gauge):
        metric.labels(Contrary("bad")).inc()
        metric.labels("good").inc()
    gauge.labels("good").set_function(lambda: 2.0)  # prometheus_client's way
    Gauge("number", 5, registry=process.registry).set(1)  # type: ignore[arg-type]
    Counter("nothing", None, registry=process.registry).inc()  # type: ignore[arg-type]
    found = process.scrape(accept)
    assert found['c_total{x="good"}'] == "1.0"
    assert found['g{x="good"}'] == "2.0"
    assert found["number"] == "1.0"
    assert found["nothing_total"] == "1.0"
    process.binding.close()


# --- collectors


class Stubborn(Collector):
    """A collector that raises, and has no name."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.is_registered = False

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("half", "Half.", value=1)
        raise self.error

    def __repr__(self) -> str:
        raise self.error

    def __hash__(self) -> int:
        if self.is_registered:
            raise self.error
        return 1


@accepts
@pytest.mark.parametrize("names", [(), ("good_total", "half", "broken")])
@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError(),
        SystemExit(1),
        KeyboardInterrupt(),
        GeneratorExit(),
        gevent.Timeout(1),
        gevent.GreenletExit(),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_collector_raises_costs_its_own_metrics_only(
    error: BaseException, names: tuple[str, ...], accept: str, path: Path, logged: Callable[[], list[str]]
) -> None:
    def fail() -> float:
        raise error

    process = Process(path)
    stubborn = Stubborn(error)
    process.registry.register(stubborn)
    stubborn.is_registered = True
    gauge = Gauge("broken", "Broken.", registry=process.registry)
    gauge.set_function(fail)
    Counter("good", "Good.", registry=process.registry).inc()
    for _ in range(3):
        assert without_created(process.scrape(accept, "", names)) == {"good_total": "1.0"}
    assert process.ours.failures == 6
    assert len(logged()) == 2
    assert "Stubborn" in "".join(logged())
    gauge.set(1)
    del gauge._child_samples
    assert process.scrape(accept)["broken"] == "1.0"
    process.binding.close()


def test_giving_a_scrape_up_is_no_failure_of_a_collector(path: Path) -> None:
    process = Process(path)
    for number in range(50):
        Gauge(f"g{number}", "G.", registry=process.registry).set_function(lambda: 1.0)
    for steps in range(20):
        scrape = process.ours.render("", "", ())
        for _ in range(steps):
            next(scrape, None)
        scrape.close()
    assert process.ours.failures == 0
    process.binding.close()


@pytest.mark.parametrize("value", ["text", None, [], object()])
@accepts
def test_a_value_that_is_no_number_costs_its_own_metric_only(value: Any, accept: str, path: Path) -> None:
    class Custom(Collector):
        def collect(self) -> Iterable[Metric]:
            metric = GaugeMetricFamily("custom", "Custom.", labels=["x"])
            metric.add_metric(["good"], 1)
            yield metric
            other = GaugeMetricFamily("custom_other", "Custom.", labels=["x"])
            other.add_metric(["good"], 1)
            other.samples.append(Sample("custom_other", {"x": "bad"}, value))
            yield other

    process = Process(path)
    Gauge("broken", "Broken.", registry=process.registry).set_function(lambda: value)
    Gauge("nan", "NaN.", registry=process.registry).set_function(lambda: math.nan)
    process.registry.register(Custom())
    found = process.scrape(accept)
    assert found["nan"] == "NaN"
    assert found['custom{x="good"}'] == found['custom_other{x="good"}'] == "1.0"
    assert "broken" not in found
    process.binding.close()


# --- what is asked for


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("application/openmetrics-text;version=2.0.0", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=99", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=1.2.3", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text; version=2.0.0;q=1", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=0.0.1", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1", "text/plain; version=0.0.4"),
        *(
            (f"application/openmetrics-text;version={version}", "text/plain; version=0.0.4")
            for version in ("x", "1e5", '"1.0.0"', "1.x.0", "2.x", "-1", "9" * 5000, "1." * 3000, "\u00b2", "1.0 x")
        ),
        ("application/openmetrics-text;version=x,text/plain;version=1.0.0", "text/plain; version=1.0.0"),
        ("text/plain;version=7.0", "text/plain; version=1.0.0"),
        ("text/plain;version=x", "text/plain; version=0.0.4"),
    ],
)  # fmt: skip
def test_no_version_is_promised_that_is_not_written(accept: str, content_type: str) -> None:
    registry = CollectorRegistry()
    Counter("c", "C.", registry=registry).inc()
    found, text = render(Exposition(Binding(registry)), accept)

    assert found.startswith(content_type)
    assert text.endswith("# EOF\n") == ("openmetrics" in content_type)


def test_any_accept_header_gets_what_it_is_told(path: Path) -> None:
    chance = random.Random(9)
    registry = CollectorRegistry()
    Counter("requests.served", "C.", ["méthode"], registry=registry).labels('"é\\\n').inc()
    ours = Exposition(Binding(registry))
    kinds = ["application/openmetrics-text", "text/plain", "*/*", "text/html", "", "text/plain;charset=x"]
    versions = [
        "0.0.4",
        "1.0.0",
        "2.0.0",
        "1",
        "",
        "x",
        "1e5",
        "٣.0.0",
        "0x1",
        "1_0.0.0",
        "9" * 20,
        " 1.0.0 ",
        "=",
        "1=2",
    ]
    parameters = ["version", "escaping", "q", "charset", "Version", "version ", ""]
    escapings = ["allow-utf-8", "underscores", "dots", "values", "", "x"]
    for _ in range(2000):
        ranges = []
        for _ in range(chance.randrange(4)):
            one = chance.choice(kinds)
            for _ in range(chance.randrange(4)):
                one += f"{chance.choice(['; ', ';', ' ;'])}{chance.choice(parameters)}{chance.choice('==== ')}"
                one += chance.choice(versions + escapings)
            ranges.append(one)
        accept = chance.choice([",", ", ", ",,"]).join(ranges)
        if chance.random() < 0.3:
            position = chance.randrange(len(accept) + 1)
            accept = accept[:position] + chance.choice([";", "=", "\x00", "é", "version=2"]) + accept[position:]

        content_type, text = render(ours, accept)

        is_openmetrics = content_type.startswith("application/openmetrics-text; version=1.0.0;")
        assert is_openmetrics == text.endswith("# EOF\n"), accept
        assert is_openmetrics or content_type.startswith(("text/plain; version=0.0.4;", "text/plain; version=1.0.0;"))
        assert ('{"requests.served' in text) == ("escaping=allow-utf-8" in content_type), accept


@pytest.mark.parametrize("more", range(3))
def test_a_record_that_was_interrupted_is_no_record(more: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler may raise between any two steps of an append; here it does right after the record."""

    class Interrupted(Exception):
        pass

    write = storage.Storage.write_long

    def fail(one: storage.Storage, at: int, number: int) -> None:
        if at == END_AT:
            raise Interrupted
        write(one, at, number)

    ledger = Ledger(path, "site")
    family = ledger.add_family("c", "counter", "C.", "", ("x",), ())
    first = ledger.add_series(family, ("a",), 1.0)
    ledger.cells[first] = 5.0
    with monkeypatch.context() as patch:
        patch.setattr(storage.Storage, "write_long", fail)
        with pytest.raises(Interrupted):
            ledger.add_series(family, ("b",), 1.0)
    for labels in [("c",), ("b",)][:more]:
        ledger.cells[ledger.add_series(family, labels, 1.0)] = 7.0
    expected = dict(family.series)
    ledger.close()

    ledger = Ledger(path, "site")
    assert ledger.families["c"].series == expected
    assert [ledger.cells[first] for first in expected.values()] == [5.0, 7.0, 7.0][: len(expected)]
    ledger.close()
