"""A metric type is one entry in `kinds`: a type that the package does not know is added here, and kept and rendered."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Sample

from django_promports.binding import Binding
from django_promports.kinds import KINDS, Kind
from django_promports.ledger import Ledger
from django_promports.scrape.exposition import Exposition

ACCEPTS = ["", "text/plain;version=1.0.0;escaping=allow-utf-8", "application/openmetrics-text;version=1.0.0"]


class Stock(MetricWrapperBase):
    """A toy type: what came in and what went out, as a pair."""

    _type = "unknown"
    asked = 0  # how often any of them was asked for samples

    def _metric_init(self) -> None:
        def make(suffix: str) -> values.MutexValue:
            described = self._type, self._name, self._name + suffix, self._labelnames, self._labelvalues
            return values.ValueClass(*described, self._documentation)  # type: ignore[no-any-return]

        self._in, self._out = make("_in"), make("_out")
        self._created = time.time()

    def move(self, into: float, out: float) -> None:
        self._in.inc(into)  # type: ignore[no-untyped-call]
        self._out.inc(out)  # type: ignore[no-untyped-call]

    def _child_samples(self) -> Iterable[Sample]:
        Stock.asked += 1
        values: list[Any] = [self._in, self._out]
        return [Sample(suffix, {}, value.get()) for suffix, value in zip(("_in", "_out"), values, strict=True)]


STOCK = Kind(
    "unknown",
    f"{__name__}:Stock",
    {"_in": "_in", "_out": "_out"},
    growing=slice(0, 2),
    read_numbers=lambda children: [value._value for child in children for value in (child._in, child._out)],
    exercise=lambda child: child.move(3, 2),
    has_created=False,
)


class Process:
    def __init__(self, path: Path) -> None:
        self.registry = CollectorRegistry()
        self.binding = Binding(self.registry)
        self.binding.open(Ledger(path, "site"))
        self.exposition = Exposition(self.binding)

    def make(self) -> tuple[Stock, Stock]:
        return Stock("shelf", "One.", registry=self.registry), Stock("b", 'a"\\', ["at"], registry=self.registry)

    def render(self, accept: str, encoding: str = "") -> bytes:
        steps = self.exposition.render(accept, encoding, [])
        try:
            while True:
                next(steps)
        except StopIteration as stop:
            _, body = stop.value
        return gzip.decompress(body) if encoding else body


def encode(collected: CollectorRegistry | Binding, accept: str) -> bytes:
    encoder, _ = choose_encoder(accept)
    return encoder(collected)


@pytest.fixture
def with_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, STOCK.type, STOCK)


@pytest.mark.usefixtures("with_stock")
@pytest.mark.parametrize("encoding", ["", "gzip"])
@pytest.mark.parametrize("accept", ACCEPTS)
def test_a_toy_type_is_rendered_from_templates_as_prometheus_client_renders_it(
    accept: str, encoding: str, tmp_path: Path
) -> None:
    process = Process(tmp_path / "1.ledger")
    shelf, shelves = process.make()
    shelves.labels('"top"\n').move(1, 0)

    process.render(accept, encoding)  # learns the text
    for step in range(4):
        shelf.move(step, 1e9)
        shelves.labels(f"{step}%").move(0.1, step)
        asked = Stock.asked
        rendered = process.render(accept, encoding)
        assert Stock.asked == asked
        assert rendered == encode(process.registry, accept)
        assert rendered.count(b"\n") > 2 * step

    process.binding.close()


@pytest.mark.usefixtures("with_stock")
@pytest.mark.parametrize("accept", ACCEPTS)
def test_a_toy_type_is_continued_by_a_successor(accept: str, tmp_path: Path) -> None:
    path = tmp_path / "1.ledger"
    first = Process(path)
    shelf, shelves = first.make()
    shelf.move(5, 2)
    shelves.labels("x").move(7, 1)
    counted = first.render(accept)
    assert first.binding.ledger is not None
    first.binding.ledger.close(seal=False)  # as if it was killed

    second = Process(path)
    Stock.asked = 0
    assert sorted(second.render(accept).splitlines()) == sorted(counted.splitlines())  # it has made neither of them
    assert Stock.asked <= 2, "only to learn the text"
    shelf, shelves = second.make()
    shelf.move(1, 1)
    shelves.labels("x").move(1, 1)

    rendered = second.render(accept)
    assert rendered == encode(second.registry, accept)
    lines = [line.rpartition(b" ") for line in rendered.splitlines() if b"#" not in line]
    samples = {name: float(value) for name, _, value in lines}
    assert samples == {b"shelf_in": 6, b"shelf_out": 3, b'b_in{at="x"}': 8, b'b_out{at="x"}': 2}
    second.binding.close()


def test_a_type_without_an_entry_is_served_and_not_kept(tmp_path: Path) -> None:
    process = Process(tmp_path / "1.ledger")
    shelf, _ = process.make()
    Counter("jobs", "Known.", registry=process.registry).inc()
    shelf.move(5, 2)

    assert process.render("") == encode(process.registry, "")
    assert process.binding.ledger is not None
    assert [*process.binding.ledger.families] == ["jobs"]
    process.binding.close()
