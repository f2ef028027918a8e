"""Counting through the ledger: prometheus_client's counters, summaries and histograms, with their numbers in cells.

Only metrics of the registry that is served take part, and of those only what prometheus_client itself wrote: values
are replaced by ones that write every change into their cell as well. Gauges, Info, Enum and all else stay as they are.

A metric is adopted when it is registered, or when the ledger is opened if it was made before; a labelled one gets a
dict for its children that adopts each child as it is made and forgets it as it is removed.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Summary, metrics
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString
from prometheus_client.values import MutexValue

from django_promports.ledger import STATE, Family, Ledger, LedgerFull

logger = logging.getLogger("django_promports")

Labels = tuple[str, ...]
Cells = Any  # of float64, indexed by cell number: a ledger's memoryview, or an array where there is none
# Where a value counts that has no cell, shared by all of them and never read.
NOWHERE: Cells = array("d", [0.0] * (STATE + 1))
KINDS = (Counter, Summary, Histogram)
FULL = "%s: new series are counted in memory, and lost with this process."
# What prometheus_client puts behind a metric's name.
SUFFIXES = {
    "counter": ("", "_total", "_created"),
    "summary": ("", "_count", "_sum", "_created"),
    "histogram": ("", "_bucket", "_count", "_sum", "_created"),
}


class CellValue:
    """A float that is also in a cell, so that it outlives the process. Has the interface of MutexValue."""

    __slots__ = ("_cells", "_exemplar", "_index", "_lock", "_value")
    _multiprocess = False
    # Whether any value of this process ever had an exemplar: then there is more to read than cells.
    has_exemplars = False

    def __init__(self, lock: Any, exemplar: Any) -> None:
        self._value = 0.0
        self._cells, self._index = NOWHERE, STATE
        self._lock = lock
        self._exemplar = exemplar

    def inc(self, amount: float) -> None:
        with self._lock:
            self._value = self._cells[self._index] = self._value + amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        with self._lock:
            self._value = self._cells[self._index] = float(value)
            # Only Counter.reset() sets a value, and begins anew; `created` is the first cell of the series.
            self._cells[self._index - STATE] = time.time()

    def get(self) -> float:
        with self._lock:
            return self._value

    def set_exemplar(self, exemplar: Any) -> None:
        with self._lock:
            self._exemplar = exemplar
            CellValue.has_exemplars = True

    def get_exemplar(self) -> Any:
        with self._lock:
            return self._exemplar

    def attach(self, cells: Cells, index: int) -> None:
        """Go on in a cell, from what it holds and what was counted here."""
        with self._lock:
            self._value = cells[index] = cells[index] + self._value
            self._cells, self._index = cells, index

    def detach(self, value: float) -> None:
        """Leave the cell as it is, and go on from this value in memory."""
        with self._lock:
            self._value = value
            self._cells, self._index = NOWHERE, STATE


class _MovedValue(MutexValue):
    """What a replaced value becomes: an increment that had already begun, in another thread, still counts."""

    _target: CellValue

    @property
    def _value(self) -> float:
        return self._target._value

    @_value.setter
    def _value(self, value: float) -> None:
        target = self._target
        target._value = target._cells[target._index] = value


class Children(dict[Labels, Any]):
    """The children of a labelled metric, by label values; the metric's own lock is held wherever this is called."""

    def __init__(self, book: Book, metric: Any) -> None:
        super().__init__()
        self.book, self.metric = book, metric

    def __setitem__(self, labelvalues: Labels, child: Any) -> None:
        self.book.adopt_child(self.metric, labelvalues, child)
        super().__setitem__(labelvalues, child)

    def __delitem__(self, labelvalues: Labels) -> None:
        child = self[labelvalues]
        super().__delitem__(labelvalues)
        self.book.forget_child(self.metric, labelvalues, child)

    def pop(self, labelvalues: Labels, default: Any = None) -> Any:
        child = self.get(labelvalues, default)
        if labelvalues in self:
            del self[labelvalues]
        return child

    def clear(self) -> None:
        for labelvalues in list(self):
            del self[labelvalues]


class Book:
    """The metrics of a registry, and the ledger in which they are counted while there is one.

    It is a registry itself: collect() adds the series that are in the ledger and that this process has not made.
    Locks are taken in the order: a metric's, this book's, the ledger's, a value's.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.ledger: Ledger | None = None
        self._lock = threading.RLock()
        self._families: dict[str, Family] = {}  # of the metrics that this process has made
        self._unmade: dict[str, dict[Labels, int]] = {}  # first cells of the series that it has not, by metric
        self._values: set[CellValue] = set()
        self._parcel: list[tuple[Any, float]] = []
        self._installed = False
        self._warned = False

    def open(self, ledger: Ledger) -> None:
        """Count in this ledger from now on; what was counted so far in this process is added to it."""
        with self._lock:
            self._install()
            self._unmade = {name: dict(family.series) for name, family in ledger.families.items()}
            self.ledger, self._warned = ledger, False
        for collector in list(self.registry._collector_to_names):
            self._adopt(collector)

    def close(self, *, undo: bool = False) -> None:
        """Let go of the ledger: what was counted is in it, and this process counts on from zero, in memory.

        undo: remove a ledger that this process made, and keep in memory what was counted.
        """
        with self._lock:
            ledger, self.ledger = self.ledger, None
            undo = undo and ledger is not None and ledger.is_new
            for value in self._values:
                value.detach(value._value if undo else 0.0)
            self._clear()
            if ledger is not None:
                ledger.close(remove=undo)

    def pack(self) -> None:
        """Move the numbers in memory into a parcel, for the child that this process is about to fork."""
        for child in self._children():
            for value in _get_values(child):
                with value._lock:
                    self._parcel.append((value, value._value))
                    value._value = 0.0

    def part_with_parcel(self) -> None:
        """Forget the parcel, in the process that forked: the child has it."""
        self._parcel.clear()

    def begin_in_child(self, *, keep: bool) -> None:
        """Let go of the parent's ledger in a forked child, and of locks that the parent's threads may have held.

        keep: whether what the parent packed is this process's now.
        """
        self._lock = threading.RLock()
        self.registry._lock = threading.Lock()
        for collector in list(self.registry._collector_to_names):
            if isinstance(collector, KINDS) and collector._labelnames:
                collector._lock = threading.Lock()
        for value in self._values:
            value._lock = threading.Lock()
            value.detach(0.0)
        for child in self._children():
            for value in _get_values(child):
                value._lock = threading.Lock()
                value._value = 0.0
        for value, number in self._parcel if keep else ():
            value._value = number
        ledger, self.ledger = self.ledger, None
        self._clear()
        self._parcel.clear()
        if ledger is not None:
            ledger.close(seal=False)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the registry, and the series of the ledger that this process has not made."""
        yield from self._merge(self.registry.collect(), None)
        if self.ledger is not None:
            self.ledger.note_scrape()

    def restricted_registry(self, names: Iterable[str]) -> Restricted:
        """Return a registry that collects the samples of these names only."""
        return Restricted(self, frozenset(names))

    def unmade_names(self) -> list[str]:
        """Return the metrics of which the ledger has series that this process has not made."""
        with self._lock:
            return list(self._unmade)

    def list_unmade(self, name: str) -> list[tuple[Labels, int]]:
        """Return those series of a metric: label values and first cell."""
        with self._lock:
            return list(self._unmade.get(name, {}).items())

    def adopt_child(self, metric: Any, labelvalues: Labels, child: Any) -> None:
        """Count a child, or a metric without labels, in the ledger, from what the ledger says already."""
        try:
            with self._lock:
                if self.ledger is not None:
                    self._attach(self.ledger, metric, labelvalues, child)
        except LedgerFull as full:
            self._warn(FULL, full)
        except Exception:
            self._warn("%s cannot be counted in the ledger, only in memory.", metric, exc_info=True)

    def forget_child(self, metric: Any, labelvalues: Labels, child: Any) -> None:
        """Take a child that the site removed out of the ledger; who still has it counts in memory."""
        with self._lock:
            for value in _get_values(child):
                if value in self._values:
                    self._values.remove(value)
                    value.detach(value._value)
            self._forget(metric._name, labelvalues)

    def forget_unmade(self, metric: Any, concerns: Callable[[Labels], bool]) -> None:
        """Take those series of a metric out of the ledger that this process has not made and that it concerns."""
        with self._lock:
            for labelvalues in filter(concerns, list(self._unmade.get(metric._name, ()))):
                self._forget(metric._name, labelvalues)

    def _watch_removals(self, metric: Any) -> None:
        """Make a labelled metric forget, with its children, series that only the ledger has."""

        def remove(*labelvalues: Any) -> None:
            type(metric).remove(metric, *labelvalues)
            self.forget_unmade(metric, lambda series: series == tuple(map(str, labelvalues)))

        def remove_by_labels(labels: dict[str, str]) -> None:
            type(metric).remove_by_labels(metric, labels)
            wanted = {(name, str(value)) for name, value in labels.items()}
            self.forget_unmade(
                metric, lambda series: bool(wanted) and wanted <= set(zip(metric._labelnames, series, strict=True))
            )

        def clear() -> None:  # the class's own would put a plain dict in the place of ours
            with metric._lock:
                metric._metrics.clear()
            self.forget_unmade(metric, lambda series: True)

        metric.remove, metric.remove_by_labels, metric.clear = remove, remove_by_labels, clear

    def _forget(self, name: str, labelvalues: Labels | None = None) -> None:
        if labelvalues is None:
            self._unmade.pop(name, None)
        else:
            self._unmade.get(name, {}).pop(labelvalues, None)
        try:
            if self.ledger is not None and (family := self.ledger.families.get(name)):
                self.ledger.forget(family, labelvalues)
        except LedgerFull as full:
            self._warn("%s: what was removed comes back in the next process.", full)

    def _attach(self, ledger: Ledger, metric: Any, labelvalues: Labels, child: Any) -> None:
        values = _get_values(child)
        if not values:
            raise TypeError("its values are not known")
        family = self._find_family(ledger, metric)
        unmade = self._unmade.get(family.name, {})
        first = unmade.pop(labelvalues, None)
        if first is None:
            first = ledger.add_series(family, labelvalues, child._created)
        else:
            child._created = ledger.cells[first]
            # The label values as the metric has them: one copy in memory is enough.
            del family.series[labelvalues]
            family.series[labelvalues] = first
            if not unmade:
                del self._unmade[family.name]
        attached = [_replace(value) for value in values]
        for index, value in enumerate(attached, first + STATE):
            value.attach(ledger.cells, index)
        _put_values(child, attached)
        self._values.update(attached)

    def _find_family(self, ledger: Ledger, metric: Any) -> Family:
        family = self._families.get(metric._name)
        if family is None:
            bounds = tuple(map(floatToGoString, metric._upper_bounds)) if isinstance(metric, Histogram) else ()
            shape = (metric._type, metric._documentation, metric._unit, tuple(metric._labelnames), bounds)
            family = self._families[metric._name] = ledger.add_family(metric._name, *shape)
            if not family.series:
                self._unmade.pop(metric._name, None)  # another metric had the name
        return family

    def _adopt(self, collector: Any) -> None:
        """Adopt a collector that is registered, with the children that it has and those that it will have."""
        if not isinstance(collector, KINDS):
            self._make_way(collector)
        elif collector._labelnames:
            with collector._lock:
                if type(collector._metrics) is not Children:
                    children = Children(self, collector)
                    dict.update(children, collector._metrics)  # type: ignore[misc]
                    collector._metrics = children  # type: ignore[assignment]
                    self._watch_removals(collector)
                for labelvalues, child in collector._metrics.items():
                    self.adopt_child(collector, tuple(labelvalues), child)
                self._compare_shape(collector)
        else:
            self.adopt_child(collector, (), collector)

    def _compare_shape(self, metric: Any) -> None:
        """Forget the ledger's series of a metric if they have other labels or buckets than it has now."""
        with self._lock:
            if self.ledger is not None and metric._name in self._unmade:
                try:
                    self._find_family(self.ledger, metric)
                except LedgerFull as full:
                    self._warn(FULL, full)

    def _make_way(self, collector: Collector) -> None:
        """Forget the series of a counter whose name something else has taken."""
        with self._lock:
            names = set(self.registry._collector_to_names.get(collector, ()))
            for name, family in list(self.ledger.families.items()) if self.ledger is not None else ():
                if self._unmade.get(name) and names & {name + suffix for suffix in SUFFIXES[family.type]}:
                    logger.warning("%s is no counter, summary or histogram any more; its counts are forgotten.", name)
                    self._forget(name)

    def _abandon(self, collector: Any) -> None:
        """Forget a collector that was unregistered; it counts on in memory."""
        if isinstance(collector, KINDS):
            if collector._labelnames:
                with collector._lock:
                    collector._metrics = dict(collector._metrics)
                    for name in ("remove", "remove_by_labels", "clear"):
                        vars(collector).pop(name, None)
            for child in _list_children(collector):
                self.forget_child(collector, tuple(child._labelvalues), child)
            with self._lock:
                if self._families.pop(collector._name, None) is not None:
                    self._forget(collector._name)

    def _install(self) -> None:
        """Hear of what is registered and unregistered from now on."""
        if self._installed:
            return
        self._installed = True
        register, unregister = self.registry.register, self.registry.unregister

        def register_and_adopt(collector: Collector) -> None:
            register(collector)
            self._adopt(collector)

        def unregister_and_abandon(collector: Collector) -> None:
            unregister(collector)
            self._abandon(collector)

        self.registry.register = register_and_adopt  # type: ignore[method-assign]
        self.registry.unregister = unregister_and_abandon  # type: ignore[method-assign]

    def _merge(self, metrics: Iterable[Metric], names: frozenset[str] | None) -> Iterator[Metric]:
        with self._lock:
            ledger = self.ledger
            unmade = {
                name: (ledger.families[name], dict(series))
                for name, series in self._unmade.items()
                if ledger and series
            }
        for metric in metrics:
            if ledger and metric.name in unmade:
                family, series = unmade.pop(metric.name)
                if series != self._unmade.get(metric.name):  # some were made since
                    made = {
                        tuple(sample.labels.get(name, "") for name in family.labelnames) for sample in metric.samples
                    }
                    series = {labelvalues: first for labelvalues, first in series.items() if labelvalues not in made}
                metric.samples += list_samples(ledger, family, series, names)
            yield metric
        for name, (family, series) in unmade.items():
            if ledger:
                metric = Metric(name, family.help, family.type, family.unit)
                metric.samples = list_samples(ledger, family, series, names)
                if metric.samples:
                    yield metric

    def _children(self) -> Iterator[Any]:
        for collector in list(self.registry._collector_to_names):
            if isinstance(collector, KINDS):
                yield from _list_children(collector)

    def _clear(self) -> None:
        self._values, self._families, self._unmade = set(), {}, {}

    def _warn(self, message: str, *arguments: object, exc_info: bool = False) -> None:
        if not self._warned:
            self._warned = True
            logger.error(message, *arguments, exc_info=exc_info)


class Restricted:
    """A book, of which only the samples of some names are collected."""

    def __init__(self, book: Book, names: frozenset[str]) -> None:
        self._book, self._names = book, names

    def collect(self) -> Iterator[Metric]:
        registry = self._book.registry.restricted_registry(self._names)
        return self._book._merge(registry.collect(), self._names)


def list_samples(
    ledger: Ledger, family: Family, series: dict[Labels, int], names: frozenset[str] | None
) -> list[Sample]:
    """Return the samples that prometheus_client would make of these series."""
    samples = []
    for labelvalues, first in series.items():
        labels = dict(zip(family.labelnames, labelvalues, strict=True))
        cells = ledger.cells[first : first + STATE + family.width].tolist()
        values = cells[STATE:]
        numbers: list[tuple[str, dict[str, str], float]]
        if family.type == "counter":
            numbers = [("_total", {}, values[0])]
        elif family.type == "summary":
            numbers = [("_count", {}, values[0]), ("_sum", {}, values[1])]
        else:
            counts = list(accumulate(values[1:]))
            numbers = [("_bucket", {"le": le}, count) for le, count in zip(family.bounds, counts, strict=True)]
            numbers.append(("_count", {}, counts[-1]))
            if float(family.bounds[0]) >= 0:
                numbers.append(("_sum", {}, values[0]))
        if metrics._use_created:
            numbers.append(("_created", {}, cells[0]))
        samples += [
            Sample(family.name + suffix, {**labels, **more}, value)
            for suffix, more, value in numbers
            if names is None or family.name + suffix in names
        ]
    return samples


def _list_children(metric: Any) -> list[Any]:
    return list(metric._metrics.values()) if metric._labelnames else [metric]


def _get_values(child: Any) -> list[Any]:
    """Return the values of a child in the order of its cells; none if they are not what prometheus_client makes."""
    values: list[Any]
    if isinstance(child, Counter):
        values = [child._value]
    elif isinstance(child, Summary):
        values = [child._count, child._sum]
    else:
        values = [child._sum, *child._buckets]
    return values if all(type(value) in (MutexValue, CellValue) for value in values) else []


def _put_values(child: Any, values: list[CellValue]) -> None:
    if isinstance(child, Counter):
        (child._value,) = values
    elif isinstance(child, Summary):
        child._count, child._sum = values
    else:
        child._sum, *child._buckets = values


def _replace(value: Any) -> CellValue:
    """Return a value with a cell for one without, with its number, exemplar and lock."""
    if isinstance(value, CellValue):
        return value
    with value._lock:
        replacement = CellValue(value._lock, value._exemplar)
        CellValue.has_exemplars |= value._exemplar is not None
        replacement._value = value._value
        value._target = replacement
        value.__class__ = _MovedValue
    return replacement
