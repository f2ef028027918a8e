"""All that is known of each metric type: its values, its shape, its samples and its lines.

A type that can be kept and rendered has one entry in KINDS. This module does not import prometheus_client: the ledger
needs the shapes, and programs that only read ledgers do not need the classes. A class is looked up on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import accumulate
from typing import Any, Protocol

Number = tuple[str, dict[str, str], float]  # a sample's suffix, its own labels and its value


class Texts(Protocol):
    """Formats numbers as prometheus_client does. Indexing is for counts, whose texts are worth keeping."""

    def format(self, number: Any) -> bytes: ...

    def __getitem__(self, count: float) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Kind:
    """A metric type whose values are floats in attributes of the child, each exposed as one sample.

    type: prometheus_client's name of it. class_name: "module:class". attributes: those that hold the value objects, in
    the order of their cells, each with the suffix of its sample. growing: which of the values never fall.
    read_numbers, read_exemplars: return those of all the children, one child after the other, the same number for each.
    They name the attributes in their source, which is several times as fast as getattr(). exercise: changes a new child
    so that it exposes all the samples that it can have.

    is_counted: whether the ledger keeps its values. is_settable: whether a child may get any number, -0.0 included, or
    a function in the place of its value. has_created: whether it may expose `_created`. name_suffix: what a new
    metric's name needs so that its samples get their names.
    """

    type: str
    class_name: str
    attributes: Mapping[str, str]
    growing: slice
    read_numbers: Callable[[Iterable[Any]], list[float]]
    exercise: Callable[[Any], object]
    read_exemplars: Callable[[Iterable[Any]], list[Any]] | None = None
    is_counted: bool = True
    is_settable: bool = False
    has_created: bool = True
    name_suffix: str = ""

    @cached_property
    def cls(self) -> Any:
        module, _, name = self.class_name.partition(":")
        return getattr(import_module(module), name)

    @cached_property
    def suffixes(self) -> frozenset[str]:
        """What follows the metric's name in the names that it takes in a registry."""
        return frozenset(["", *self.attributes.values(), *(["_created"] if self.has_created else [])])

    def make(self, name: str, help_: str, unit: str, labelnames: Sequence[str], bounds: Sequence[str]) -> Any:
        """Return a metric of this type that is not registered."""
        return self.cls(name + self.name_suffix, help_, labelnames, unit=unit, registry=None, **self._options(bounds))

    def count_values(self, bounds: Sequence[str]) -> int:
        """Return how many values a series has."""
        return len(self.attributes)

    def read_bounds(self, metric: Any) -> tuple[str, ...]:
        """Return the upper bounds of a metric's buckets, as text."""
        return ()

    def get_values(self, child: Any) -> list[Any]:
        """Return a child's value objects in the order of their cells."""
        return [getattr(child, name) for name in self.attributes]

    def put_values(self, child: Any, values: Sequence[Any]) -> None:
        """Replace a child's value objects."""
        for name, value in zip(self.attributes, values, strict=True):
            setattr(child, name, value)

    def list_numbers(self, row: Sequence[float], bounds: Sequence[str]) -> list[Number]:
        """Return what a series with these values exposes, in prometheus_client's order, without `_created`."""
        return [(suffix, {}, value) for suffix, value in zip(self.attributes.values(), row, strict=True)]

    def fill(self, templates: list[bytes], numbers: list[Any], slots: int, texts: Texts) -> list[bytes]:
        """Return the children's lines: their templates, with `slots` slots each, filled with their numbers."""
        format_ = texts.format
        if len(self.attributes) == 1:
            return [template % format_(number) for template, number in zip(templates, numbers, strict=True)]
        filled = map(format_, numbers)
        rows = zip(*[filled] * len(self.attributes), strict=True)
        return [template % row for template, row in zip(templates, rows, strict=True)]

    def _options(self, bounds: Sequence[str]) -> dict[str, Any]:
        return {}


class _Bucketed(Kind):
    """A type with a value for each bucket as well, which holds what lies between two bounds.

    A sample of a bucket is the sum of its own value and those before it, and the last one is also the count.
    """

    @cached_property
    def suffixes(self) -> frozenset[str]:
        return frozenset(["", "_bucket", "_count", "_sum", "_created"])

    def count_values(self, bounds: Sequence[str]) -> int:
        return len(self.attributes) + len(bounds)

    def read_bounds(self, metric: Any) -> tuple[str, ...]:
        from prometheus_client.utils import floatToGoString

        return tuple(map(floatToGoString, metric._upper_bounds))

    def get_values(self, child: Any) -> list[Any]:
        return [child._sum, *child._buckets]

    def put_values(self, child: Any, values: Sequence[Any]) -> None:
        child._sum, *child._buckets = values

    def list_numbers(self, row: Sequence[float], bounds: Sequence[str]) -> list[Number]:
        total, *counts = row
        counts = list(accumulate(counts))
        numbers: list[Number] = [("_bucket", {"le": le}, count) for le, count in zip(bounds, counts, strict=True)]
        numbers.append(("_count", {}, counts[-1]))
        if float(bounds[0]) >= 0:  # prometheus_client exposes no sum if observations may be negative
            numbers.append(("_sum", {}, total))
        return numbers

    def fill(self, templates: list[bytes], numbers: list[Any], slots: int, texts: Texts) -> list[bytes]:
        width = len(numbers) // len(templates)
        rows = []
        for first, template in zip(range(0, len(numbers), width), templates, strict=True):
            row = numbers[first : first + width]
            total, row[0] = row[0], 0.0
            filled = [texts[count] for count in accumulate(row)]
            filled += (filled[-1], texts.format(total))  # the slot for _sum may be missing
            rows.append(template % tuple(filled[1 : slots + 1]))
        return rows

    def _options(self, bounds: Sequence[str]) -> dict[str, Any]:
        return {"buckets": bounds}


def _observe(child: Any) -> None:
    child.observe(0.5)
    child.observe(7)


KINDS: dict[str, Kind] = {
    kind.type: kind
    for kind in (
        Kind(
            "counter",
            "prometheus_client:Counter",
            {"_value": "_total"},
            growing=slice(0, 1),
            read_numbers=lambda children: [child._value._value for child in children],
            exercise=lambda child: child.inc(7),
            read_exemplars=lambda children: [child._value._exemplar for child in children],
            name_suffix="_total",
        ),
        Kind(
            "gauge",
            "prometheus_client:Gauge",
            {"_value": ""},
            growing=slice(0, 0),
            read_numbers=lambda children: [child._value._value for child in children],
            exercise=lambda child: child.set(7),
            is_counted=False,
            is_settable=True,
            has_created=False,
        ),
        # A sum of observations may fall: they may be negative.
        Kind(
            "summary",
            "prometheus_client:Summary",
            {"_count": "_count", "_sum": "_sum"},
            growing=slice(0, 1),
            read_numbers=lambda children: [value._value for child in children for value in (child._count, child._sum)],
            exercise=_observe,
        ),
        _Bucketed(
            "histogram",
            "prometheus_client:Histogram",
            {"_sum": "_sum"},
            growing=slice(1, None),
            read_numbers=lambda children: [
                value._value for child in children for part in ((child._sum,), child._buckets) for value in part
            ],
            exercise=_observe,
            read_exemplars=lambda children: [value._exemplar for child in children for value in child._buckets],
        ),
    )
}


def find_kind(metric: Any) -> Kind | None:
    """Return the kind of a metric, a child or an object of a subclass; None for everything else."""
    for kind in KINDS.values():
        if isinstance(metric, kind.cls):
            return kind
    return None


def find_counted(collector: Any) -> Kind | None:
    """Return the kind of a metric whose values the ledger keeps; None for everything else.

    A child that was registered by itself has its parent's name, so its values are not kept.
    """
    kind = find_kind(collector)
    return kind if kind is not None and kind.is_counted and not collector._labelvalues else None
