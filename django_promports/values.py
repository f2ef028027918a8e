"""Counting through the ledger: prometheus_client's counters, summaries and histograms, with their numbers in cells.

Only metrics of the registry that is served take part, and of those only what prometheus_client itself wrote: values
are replaced by ones that write every change into their cell as well. Gauges, Info, Enum and all else stay as they are.

A metric is adopted when it is registered, or when the ledger is opened if it was made before; a labelled one gets a
dict for its children that adopts each child as it is made and forgets it as it is removed.

All of this may happen anywhere: Python runs finalizers and signal handlers in the middle of whatever a thread does, and
they may count, make series and remove them. So no lock is held while anything but a few numbers is stored, but for the
book's own; who wants that one does not wait for long, and leaves what is to be done to the thread that has it.
"""

from __future__ import annotations

import logging
import math
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Summary, metrics
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString
from prometheus_client.values import MutexValue

from django_promports.layout import STATE
from django_promports.ledger import Family, Ledger, LedgerFull

logger = logging.getLogger("django_promports")

Labels = tuple[str, ...]
Cells = Any  # of float64, indexed by cell number: a ledger's memoryview, or an array where there is none
# Where a value counts that has no cell, shared by all of them and never read.
NOWHERE: Cells = array("d", [0.0] * (STATE + 1))
KINDS = (Counter, Summary, Histogram)
FULL = "%s: new series are counted in memory, and lost with this process."
# Seconds that a thread waits for others to finish with the ledger. What it wants is done a moment later if that is not
# enough; the second is for opening and closing it, when the next step depends on it.
PATIENCE_SECONDS, LONG_PATIENCE_SECONDS = 0.05, 5.0
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

    # Nothing is called under the lock: Python looks for signals and finalizers after calls, and they may want it.

    def inc(self, amount: float) -> None:
        with self._lock:
            self._value = self._cells[self._index] = self._value + amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        value = float(value)
        with self._lock:
            self._value = self._cells[self._index] = value

    def set_created(self, moment: float) -> None:
        """Note when a counter with this value began anew; `created` is the first cell of its series."""
        with self._lock:
            self._cells[self._index - STATE] = moment

    def get(self) -> float:
        with self._lock:
            return self._value

    def set_exemplar(self, exemplar: Any) -> None:
        former = self._exemplar  # goes after the lock: it may have a finalizer
        with self._lock:
            self._exemplar = exemplar
            CellValue.has_exemplars = True
        del former

    def get_exemplar(self) -> Any:
        with self._lock:
            return self._exemplar

    def attach(self, cells: Cells, index: int) -> None:
        """Go on in a cell, from what it holds and what was counted here."""
        with self._lock:
            self._value = cells[index] = cells[index] + self._value
            self._cells, self._index = cells, index

    def detach(self, *, keep: bool) -> None:
        """Leave the cell as it is, and go on in memory, from the same value or from zero."""
        with self._lock:
            if not keep:
                self._value = 0.0
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


class _NoLock:
    """In the place of an adopted metric's lock.

    prometheus_client holds that lock while it makes a child. A finalizer that runs meanwhile may want it too, or that
    of another metric, whose holder may be in the same situation. Children needs no lock: each of its steps is one
    operation of a dict. Both methods take any arguments and return what is false, in C, as every labels() passes here.
    """

    __enter__ = __exit__ = staticmethod("".format)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return True

    def release(self) -> None:
        pass


class Children(dict[Labels, Any]):
    """The children of a labelled metric, by label values. No lock is held, and a child that is there stays."""

    def __init__(self, book: Book, metric: Any) -> None:
        super().__init__(metric._metrics)
        self.book, self.metric = book, metric

    def __setitem__(self, labelvalues: Labels, child: Any) -> None:
        if self.setdefault(labelvalues, child) is child:
            self.book.adopt_child(self.metric, labelvalues, child)

    def __missing__(self, labelvalues: Labels) -> Any:
        return self.metric.labels(*labelvalues)  # removed since labels() has made it

    def __delitem__(self, labelvalues: Labels) -> None:
        self.pop(labelvalues)

    def pop(self, labelvalues: Labels, default: Any = None) -> Any:
        child = super().pop(labelvalues, None)
        if child is None:
            return default
        self.book.forget_child(self.metric, labelvalues, child)
        return child

    def clear(self) -> None:
        for labelvalues in list(self):
            self.pop(labelvalues)


class Unmade(NamedTuple):
    """The series of a family that only the ledger has: the first cell of each, by label values.

    A series leaves when this process has made it and its numbers are in one. So who reads these first and the
    metric's children after finds each series here, there, or in both, and then this is the one with all of the number.
    """

    family: Family
    series: dict[Labels, int]

    def are_of(self, collector: Any) -> bool:
        """Whether they are series of this collector, rather than of another of its name."""
        return is_known(collector) and _shape(collector) == self.family.shape

    def fit(self, owners: dict[str, Any]) -> bool:
        """Whether nothing else has a name of theirs."""
        return all(name not in owners or self.are_of(owners[name]) for name in sample_names(self.family))


class Book:
    """The metrics of a registry, and the ledger in which they are counted while there is one.

    It is a registry itself: collect() adds the series that are in the ledger and that this process has not made.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.ledger: Ledger | None = None
        self._families: dict[Any, Family] = {}  # of the metrics that this process has made
        self._unmade: dict[str, Unmade] = {}  # by metric
        self._values: set[CellValue] = set()
        self._parcel: list[tuple[str, Any, float]] = []
        self._installed = False
        self._warned: set[str] = set()
        self._begin_acts()

    def _begin_acts(self) -> None:
        self._lock = threading.RLock()
        self._acts: deque[Callable[[], None]] = deque()
        self._acting = False

    def _act(self, act: Callable[[], None], seconds: float = PATIENCE_SECONDS) -> None:
        """Change the ledger or what is known of it, one act after the other, each undisturbed by the next.

        It is done on return, unless this thread is in the middle of another act, or another thread is and does not
        finish in these seconds. Then that one goes on with this one.
        """
        self._acts.append(act)
        lock = self._lock  # not that of a child that this thread forks meanwhile
        while self._acts and lock.acquire(timeout=seconds):
            try:
                if self._acting:
                    return
                self._acting = True
                try:
                    while self._acts:
                        self._try(self._acts.popleft())
                finally:
                    self._acting = False
            finally:
                lock.release()

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except LedgerFull as full:
            self._warn(FULL, full)
        except UnicodeEncodeError as error:
            self._warn("Text that UTF-8 cannot encode: %.200r. The series is counted in memory.", error.object)
        except Exception:
            self._warn("A metric cannot be counted in the ledger, only in memory.", exc_info=True)

    def open(self, ledger: Ledger) -> None:
        """Count in this ledger from now on; what was counted so far in this process is added to it."""

        def begin() -> None:
            self._unmade = {name: Unmade(family, family.series.copy()) for name, family in ledger.families.items()}
            self.ledger, self._warned = ledger, set()

        self._install()
        self._act(begin, LONG_PATIENCE_SECONDS)
        for collector in list(self.registry._collector_to_names):
            self._adopt(collector)

    def close(self, *, undo: bool = False) -> None:
        """Let go of the ledger: what was counted is in it, and this process counts on from zero, in memory.

        undo: remove a ledger that this process made, and keep in memory what was counted.
        """

        def end() -> None:
            ledger, self.ledger = self.ledger, None
            remove = undo and ledger is not None and ledger.is_new
            for value in self._values:
                value.detach(keep=remove)
            self._clear()
            if ledger is not None:
                ledger.close(remove=remove)

        self._act(end, LONG_PATIENCE_SECONDS)

    def note_scrape(self, ledger: Ledger | None) -> None:
        """Note that all of this ledger was scraped just now, if it still is the one."""

        def note() -> None:
            if ledger is not None and ledger is self.ledger:
                ledger.note_scrape()

        self._act(note)

    def pack(self) -> None:
        """Move the numbers in memory into a parcel, for the child that this process is about to fork."""
        for child in self._children():
            for value in _get_values(child):
                with value._lock:
                    number, value._value = value._value, 0.0
                self._parcel.append((child._name, value, number))

    def part_with_parcel(self) -> None:
        """Forget the parcel, in the process that forked: the child has it."""
        self._parcel.clear()

    def begin_in_child(self, *, keep: bool) -> None:
        """Let go of the parent's ledger in a forked child, and of locks that the parent's threads may have held.

        keep: whether what the parent packed is this process's now.
        """
        self._begin_acts()
        self.registry._lock = threading.RLock()  # type: ignore[assignment]
        collectors: list[Any] = list(self.registry._collector_to_names)
        for collector in collectors:
            if is_known(collector) and collector._labelnames and type(collector._metrics) is not Children:
                collector._lock = threading.Lock()
        for value in self._values:
            value._lock = threading.Lock()
            value.detach(keep=False)
        for child in self._children():
            for value in _get_values(child):
                value._lock = threading.Lock()
                value._value = 0.0
        for name, value, number in self._parcel if keep else ():
            if math.isfinite(number):
                value._value = number
            else:
                self._warn("%s was not finite in the process that forked this one, and begins at zero.", name)
        ledger, self.ledger = self.ledger, None
        self._clear()
        self._parcel.clear()
        if ledger is not None:
            ledger.close(seal=False)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the registry, and the series of the ledger that this process has not made."""
        ledger = self.ledger
        yield from self._merge(self.registry.collect, None)
        self.note_scrape(ledger)

    def restricted_registry(self, names: Iterable[str]) -> Restricted:
        """Return a registry that collects the samples of these names only."""
        return Restricted(self, frozenset(names))

    def list_unmade(self) -> dict[str, Unmade]:
        """Return the series that only the ledger has, by metric. They go on leaving as they are made."""
        return self._unmade.copy()

    def find_family(self, metric: Any) -> Family | None:
        """Return the family in which a metric counts; None if it does not count in the ledger, or not yet."""
        return self._families.get(metric)

    def adopt_child(self, metric: Any, labelvalues: Labels, child: Any) -> None:
        """Count a child, or a metric without labels, in the ledger, from what the ledger says already."""
        if self.ledger is not None:
            self._act(partial(self._attach, metric, _read_help(metric), labelvalues, child))

    def forget_child(self, metric: Any, labelvalues: Labels, child: Any) -> None:
        """Take a child that the site removed out of the ledger; who still has it counts in memory."""

        def forget() -> None:
            first = self._detach(child)
            family = self._families.get(metric)
            if family is not None and first is not None and family.series.get(labelvalues) == first:
                self._forget(family, labelvalues)

        self._act(forget)

    def forget_unmade(self, metric: Any, concerns: Callable[[Labels], bool]) -> None:
        """Take those series of a metric out of the ledger that this process has not made and that it concerns."""

        def forget() -> None:
            unmade = self._unmade.get(metric._name)
            if unmade is not None and metric in self.registry._collector_to_names:
                for labelvalues in filter(concerns, list(unmade.series)):
                    del unmade.series[labelvalues]
                    self._forget(unmade.family, labelvalues)

        self._act(forget)

    def _watch_removals(self, metric: Any) -> None:
        """Make a labelled metric forget, with its children, series that only the ledger has."""

        def remove(*labelvalues: Any) -> None:
            type(metric).remove(metric, *labelvalues)
            wanted = tuple(map(str, labelvalues))
            self.forget_unmade(metric, lambda series: series == wanted)

        def remove_by_labels(labels: dict[str, str]) -> None:
            type(metric).remove_by_labels(metric, labels)
            wanted = {(name, str(value)) for name, value in labels.items()}
            self.forget_unmade(
                metric, lambda series: bool(wanted) and wanted <= set(zip(metric._labelnames, series, strict=True))
            )

        def clear() -> None:  # the class's own would put a plain dict in the place of ours
            metric._metrics.clear()
            self.forget_unmade(metric, lambda series: True)

        metric.remove, metric.remove_by_labels, metric.clear = remove, remove_by_labels, clear

    def _forget(self, family: Family, labelvalues: Labels | None = None) -> None:
        if self.ledger is not None:
            self.ledger.forget(family, labelvalues)

    def _attach(self, metric: Any, help_: str, labelvalues: Labels, child: Any) -> None:
        ledger = self.ledger
        if ledger is None or not self._has(metric, labelvalues, child):
            return
        values = _get_values(child)
        if not values:
            raise TypeError(f"the values of {metric._name} are not known")
        if values[0] in self._values:
            return
        family = self._find_family(ledger, metric, help_)
        unmade = self._unmade[family.name].series if family.name in self._unmade else {}
        first = unmade.get(labelvalues)
        if first is None:
            if labelvalues in family.series:  # that of a child whose removal comes after this
                self._forget(family, labelvalues)
            first = ledger.add_series(family, labelvalues, child._created)
        else:
            child._created = ledger.cells[first]
        attached = [_replace(value) for value in values]
        self._values.update(attached)
        for index, value in enumerate(attached, first + STATE):
            value.attach(ledger.cells, index)
        _put_values(child, attached)
        if labelvalues in unmade:
            # The label values as the metric has them: one copy in memory is enough.
            del family.series[labelvalues]
            family.series[labelvalues] = first
            del unmade[labelvalues]
            if not unmade:
                del self._unmade[family.name]

    def _has(self, metric: Any, labelvalues: Labels, child: Any) -> bool:
        """Whether a child is still there, and its metric in the registry."""
        is_there = not metric._labelnames or metric._metrics.get(labelvalues) is child
        return is_there and metric in self.registry._collector_to_names

    def _detach(self, child: Any) -> int | None:
        """Let a child count on in memory; return its first cell if it had any."""
        first = None
        for value in reversed(_get_values(child)):
            if value in self._values:
                first = value._index - STATE
                self._values.remove(value)
                value.detach(keep=True)
        return first

    def _find_family(self, ledger: Ledger, metric: Any, help_: str) -> Family:
        family = self._families.get(metric)
        if family is None:
            for other, known in list(self._families.items()):
                if known.name == metric._name:  # unregistered, and this one comes before we hear of it
                    self._abandon(other)
            type_, labelnames, bounds = _shape(metric)
            family = ledger.add_family(metric._name, type_, help_, metric._unit, labelnames, bounds)
            self._families[metric] = family
            unmade = self._unmade.get(metric._name)
            if unmade is not None and unmade.family is not family:  # another metric had the name
                del self._unmade[metric._name]
        return family

    def _adopt(self, collector: Any) -> None:
        """Adopt a collector that is registered, with the children that it has and those that it will have."""
        if not is_known(collector):
            self._act(partial(self._make_way, collector))
        elif collector._labelnames:
            with collector._lock:
                if type(collector._metrics) is not Children:
                    collector._metrics = Children(self, collector)
                    self._watch_removals(collector)
                collector._metrics.book = self
                collector._lock = _NoLock()
            for labelvalues, child in collector._metrics.copy().items():
                self.adopt_child(collector, labelvalues, child)
            self._act(partial(self._compare_shape, collector, _read_help(collector)))
        else:
            self.adopt_child(collector, (), collector)

    def _compare_shape(self, metric: Any, help_: str) -> None:
        """Forget the ledger's series of a metric if they have other labels or buckets than it has now."""
        if self.ledger is not None and metric._name in self._unmade and metric in self.registry._collector_to_names:
            self._find_family(self.ledger, metric, help_)

    def _make_way(self, collector: Collector) -> None:
        """Forget the series of a counter whose name something else has taken."""
        names = set(self.registry._collector_to_names.get(collector, ()))
        for name, unmade in list(self._unmade.items()):
            if unmade.series and not names.isdisjoint(sample_names(unmade.family)):
                logger.warning("%s is no counter, summary or histogram any more; its counts are forgotten.", name)
                del self._unmade[name]
                self._forget(unmade.family)

    def _abandon(self, metric: Any) -> None:
        """Forget a metric that was unregistered; it counts on in memory."""
        family = self._families.pop(metric, None)
        for child in _list_children(metric):
            self._detach(child)
        if family is not None:
            self._unmade.pop(family.name, None)
            self._forget(family)

    def _install(self) -> None:
        """Hear of what is registered, unregistered and reset from now on."""
        if self._installed:
            return
        self._installed = True
        if Counter.reset is not _reset:
            Counter.reset = _reset  # type: ignore[method-assign, assignment]
        register, unregister = self.registry.register, self.registry.unregister

        def register_and_adopt(collector: Collector) -> None:
            register(collector)
            try:
                self._adopt(collector)
            except Exception:
                self._warn("A metric cannot be counted in the ledger, only in memory.", exc_info=True)

        def unregister_and_abandon(collector: Collector) -> None:
            unregister(collector)
            if is_known(collector):
                self._act(partial(self._abandon, collector))

        with self.registry._lock:  # it is held while a collector describes itself, and a finalizer may register another
            self.registry._lock = threading.RLock()  # type: ignore[assignment]
        self.registry.register = register_and_adopt  # type: ignore[method-assign]
        self.registry.unregister = unregister_and_abandon  # type: ignore[method-assign]

    def _merge(self, collect: Callable[[], Iterable[Metric]], names: frozenset[str] | None) -> Iterator[Metric]:
        left = {name: unmade._replace(series=unmade.series.copy()) for name, unmade in self.list_unmade().items()}
        taken = self.registry._names_to_collectors.copy()
        for metric in collect():
            unmade = left.pop(metric.name, None)
            if unmade is not None and unmade.are_of(self.registry._names_to_collectors.get(metric.name)):
                add_samples(metric, *unmade, names)
            yield metric
        for unmade in left.values():
            if unmade.fit(taken):
                metric = make_metric(unmade.family)
                add_samples(metric, *unmade, names)
                if metric.samples:
                    yield metric

    def _children(self) -> Iterator[Any]:
        for collector in list(self.registry._collector_to_names):
            if is_known(collector):
                yield from _list_children(collector)

    def _clear(self) -> None:
        self._values, self._families, self._unmade = set(), {}, {}

    def _warn(self, message: str, *arguments: object, exc_info: bool = False) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.error(message, *arguments, exc_info=exc_info)


class Restricted:
    """A book, of which only the samples of some names are collected."""

    def __init__(self, book: Book, names: frozenset[str]) -> None:
        self._book, self._names = book, names

    def collect(self) -> Iterator[Metric]:
        registry = self._book.registry.restricted_registry(self._names)
        return self._book._merge(registry.collect, self._names)


def make_metric(family: Family) -> Metric:
    """Return a metric for the samples of a family's series."""
    return Metric(family.name, family.help, family.type, family.unit)


def add_samples(metric: Metric, family: Family, series: dict[Labels, int], names: frozenset[str] | None) -> None:
    """Give a metric the samples of series that only the ledger has, in the place of those that it has of them already.

    names: of the samples that are wanted, if not all are.
    """
    try:
        samples = _list_samples(family, series, names)
    except ValueError:  # the ledger was closed, or the family forgotten
        return
    if samples:
        metric.samples = [
            sample
            for sample in metric.samples
            if tuple(sample.labels.get(name, "") for name in family.labelnames) not in series
        ]
        metric.samples += samples


def _list_samples(family: Family, series: dict[Labels, int], names: frozenset[str] | None) -> list[Sample]:
    samples = []
    for labelvalues, first in series.items():
        labels = dict(zip(family.labelnames, labelvalues, strict=True))
        created, *_ = cells = family.cells[first : first + STATE + family.width].tolist()
        if family.series.get(labelvalues) != first:  # removed since, and its cells may be another's by now
            continue
        family.check()
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
            numbers.append(("_created", {}, created))
        samples += [
            Sample(family.name + suffix, {**labels, **more}, value)
            for suffix, more, value in numbers
            if not names or family.name + suffix in names
        ]
    return samples


def sample_names(family: Family) -> set[str]:
    return {family.name + suffix for suffix in SUFFIXES[family.type]}


def _shape(metric: Any) -> tuple[str, Labels, Labels]:
    bounds = tuple(map(floatToGoString, metric._upper_bounds)) if isinstance(metric, Histogram) else ()
    return metric._type, tuple(metric._labelnames), bounds


def _read_help(metric: Any) -> str:
    """Return the help text; of the site's code, which translates it, say, nothing runs in an act."""
    try:
        return str(metric._documentation)
    except Exception:
        return ""


def is_known(collector: Any) -> bool:
    """Whether it is a metric that counts in the ledger; a child that was registered by itself is none."""
    return isinstance(collector, KINDS) and not collector._labelvalues


_reset_counter = Counter.reset


def _reset(counter: Counter) -> None:
    """Counter.reset(), whose new created time has to be in the ledger too."""
    _reset_counter(counter)
    value: Any = counter._value
    if type(value) is CellValue:
        value.set_created(counter._created)


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
    replacement = CellValue(value._lock, value._exemplar)
    vars(value)["_target"] = replacement  # by now there is a dict, and the next lines allocate nothing
    with value._lock:
        replacement._value, replacement._exemplar = value._value, value._exemplar
        value.__class__ = _MovedValue
    CellValue.has_exemplars |= replacement._exemplar is not None
    return replacement
