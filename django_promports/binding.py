"""The binding of a registry to a ledger: its metrics count in cells while a ledger is open.

Only metrics of the registry that is served take part, and of those only the types that `kinds` knows and that are
counted: their value objects are replaced by ones that write every change into their cell as well. All other collectors
stay as they are.

A metric is adopted when it is registered, or when the ledger is opened if it was made before. A labelled one gets a
dict that adopts each child as it is made and forgets it as it is removed.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from django_promports.acts import LONG_PATIENCE_SECONDS, Acts
from django_promports.children import Children, Labels, NoLock
from django_promports.kinds import KINDS, Kind, find_counted, find_kind
from django_promports.ledger import Family, Ledger, LedgerFull
from django_promports.unmade import Unmade, merge, read_shape, sample_names
from django_promports.values import CellValue, are_known, give_cell, watch_resets

logger = logging.getLogger("django_promports")

FULL = "%s: new series are counted in memory, and lost with this process."


class Binding:
    """The metrics of a registry, and the ledger in which they are counted while one is open.

    It is a registry itself: collect() adds the unmade series. acts: each change of the ledger, or of what is known of
    it, is one, so that no two of them overlap.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.ledger: Ledger | None = None
        self._families: dict[Any, Family] = {}  # of the metrics that this process has made
        self._unmade: dict[str, Unmade] = {}  # by metric
        self._values: set[CellValue] = set()
        self._carried: list[tuple[str, Any, float]] = []
        self._installed = False
        self._warned: set[str] = set()
        self.acts = Acts(self._try)

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
        """Count in this ledger from now on. What this process has counted so far is added to it."""

        def begin() -> None:
            self.show(ledger.families)
            self.ledger, self._warned = ledger, set()

        self._install()
        self.acts.do(begin, LONG_PATIENCE_SECONDS)
        for collector in list(self.registry._collector_to_names):
            self._adopt(collector)

    def show(self, families: Mapping[str, Family]) -> None:
        """Expose the series of these families as unmade."""
        self._unmade = {name: Unmade(family, family.series.copy()) for name, family in families.items()}

    def close(self, *, undo: bool = False) -> None:
        """Close the ledger, which keeps its counts. This process continues in memory, from zero.

        undo: remove a ledger that this process made, and keep its counts in memory.
        """

        def end() -> None:
            ledger, self.ledger = self.ledger, None
            remove = undo and ledger is not None and ledger.is_new
            for value in self._values:
                value.detach(keep=remove)
            self._clear()
            if ledger is not None:
                ledger.close(remove=remove)

        self.acts.do(end, LONG_PATIENCE_SECONDS)

    def note_scrape(self, began: float) -> None:
        """Note that a complete scrape showed the counts of this time (time.time())."""

        def note() -> None:
            if self.ledger is not None:
                self.ledger.note_scrape(began)

        self.acts.do(note)

    def carry_counts(self) -> None:
        """Set the counts in memory aside, and start at zero: the child that is about to be forked carries them on."""
        for child in self._children():
            for value in _get_values(child):
                with value._lock:
                    number, value._value = value._value, 0.0
                self._carried.append((child._name, value, number))

    def drop_carried_counts(self) -> None:
        """Forget the carried counts in the process that forked: the child has them."""
        self._carried.clear()

    def begin_in_child(self, *, keep: bool) -> None:
        """Close the parent's ledger in a forked child, and replace locks that the parent's threads may have held.

        keep: whether this process takes over the counts that the parent carried.
        """
        self.acts.begin_in_child()
        self.registry._lock = threading.RLock()  # type: ignore[assignment]
        collectors: list[Any] = list(self.registry._collector_to_names)
        for collector in collectors:
            if find_counted(collector) and collector._labelnames and type(collector._metrics) is not Children:
                collector._lock = threading.Lock()
        for value in self._values:
            value._lock = threading.Lock()
            value.detach(keep=False)
        for child in self._children():
            for value in _get_values(child):
                value._lock = threading.Lock()
                value._value = 0.0
        for name, value, number in self._carried if keep else ():
            if math.isfinite(number):
                value._value = number
            else:
                self._warn("%s was not finite in the process that forked this one. It starts at zero.", name)
        ledger, self.ledger = self.ledger, None
        self._clear()
        self._carried.clear()
        if ledger is not None:
            ledger.close(seal=False)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the registry, and the unmade series of the ledger."""
        yield from merge(self.registry, self.list_unmade(), self.registry.collect, None)

    def restricted_registry(self, names: Iterable[str]) -> Restricted:
        """Return a registry that collects the samples of these names only."""
        return Restricted(self, frozenset(names))

    def list_unmade(self) -> dict[str, Unmade]:
        """Return the unmade series, by metric. A series that is made later leaves what was returned, too."""
        return self._unmade.copy()

    def find_family(self, metric: Any) -> Family | None:
        """Return the family in which a metric counts; None if it does not count in the ledger, or not yet."""
        return self._families.get(metric)

    def adopt_child(self, metric: Any, labelvalues: Labels, child: Any) -> None:
        """Count a child, or a metric without labels, in the ledger, from the number that it has there."""
        if self.ledger is not None:
            self.acts.do(partial(self._attach, metric, _read_help(metric), labelvalues, child))

    def forget_child(self, metric: Any, labelvalues: Labels, child: Any) -> None:
        """Remove a child's series from the ledger. Code that still has the child counts in memory."""

        def forget() -> None:
            first = self._detach(child)
            family = self._families.get(metric)
            if family is not None and first is not None and family.series.get(labelvalues) == first:
                self._forget(family, labelvalues)

        self.acts.do(forget)

    def forget_unmade(self, metric: Any, concerns: Callable[[Labels], bool]) -> None:
        """Remove from the ledger those unmade series of a metric for whose label values `concerns` is true."""

        def forget() -> None:
            unmade = self._unmade.get(metric._name)
            if unmade is not None and metric in self.registry._collector_to_names:
                for labelvalues in filter(concerns, list(unmade.series)):
                    del unmade.series[labelvalues]
                    self._forget(unmade.family, labelvalues)

        self.acts.do(forget)

    def _watch_removals(self, metric: Any) -> None:
        """Make a labelled metric's removals remove unmade series too."""

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

        def clear() -> None:  # the class's own would replace our dict by a plain one
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
        kind = find_kind(child)
        values = kind.get_values(child) if kind is not None else []
        if kind is None or not are_known(values):
            raise TypeError(f"the values of {metric._name} are not known")
        if values[0] in self._values:
            return
        family = self._find_family(ledger, kind, metric, help_)
        name = family.record.name
        unmade = self._unmade[name].series if name in self._unmade else {}
        first = unmade.get(labelvalues)
        if first is None:
            if labelvalues in family.series:  # of a former child, whose removal is still to be made
                self._forget(family, labelvalues)
            first = ledger.add_series(family, labelvalues, child._created)
        else:
            (child._created,) = family.read_created([first])
        attached = [give_cell(value) for value in values]
        self._values.update(attached)
        for cell, value in enumerate(attached, first):
            value.attach(ledger.cells, cell)
        kind.put_values(child, attached)
        if labelvalues in unmade:
            # Keep the metric's copy of the label values only, to save memory.
            del family.series[labelvalues]
            family.series[labelvalues] = first
            del unmade[labelvalues]
            if not unmade:
                del self._unmade[name]

    def _has(self, metric: Any, labelvalues: Labels, child: Any) -> bool:
        """Whether a child is still there, and its metric in the registry."""
        is_there = not metric._labelnames or metric._metrics.get(labelvalues) is child
        return is_there and metric in self.registry._collector_to_names

    def _detach(self, child: Any) -> int | None:
        """Let a child continue in memory; return the cell of its first value if it had any."""
        first = None
        for value in reversed(_get_values(child)):
            if value in self._values:
                first = value._index
                self._values.remove(value)
                value.detach(keep=True)
        return first

    def _find_family(self, ledger: Ledger, kind: Kind, metric: Any, help_: str) -> Family:
        family = self._families.get(metric)
        if family is None:
            for other, known in list(self._families.items()):
                if known.record.name == metric._name:  # it was unregistered, and its act comes later
                    self._abandon(other)
            type_, labelnames, bounds = read_shape(kind, metric)
            family = ledger.add_family(metric._name, type_, help_, metric._unit, labelnames, bounds)
            self._families[metric] = family
            unmade = self._unmade.get(metric._name)
            if unmade is not None and unmade.family is not family:  # another metric had the name
                del self._unmade[metric._name]
        return family

    def _adopt(self, collector: Any) -> None:
        """Count a registered collector in the ledger, with the children that it has and will have."""
        kind = find_counted(collector)
        if kind is None:
            self.acts.do(partial(self._make_way, collector))
        elif collector._labelnames:
            with collector._lock:
                if type(collector._metrics) is not Children:
                    collector._metrics = Children(self, collector)
                    self._watch_removals(collector)
                collector._metrics.listener = self
                collector._lock = NoLock()
            for labelvalues, child in collector._metrics.copy().items():
                self.adopt_child(collector, labelvalues, child)
            self.acts.do(partial(self._compare_shape, kind, collector, _read_help(collector)))
        else:
            self.adopt_child(collector, (), collector)

    def _compare_shape(self, kind: Kind, metric: Any, help_: str) -> None:
        """Forget the ledger's series of a metric if they have other labels or buckets than it has now."""
        if self.ledger is not None and metric._name in self._unmade and metric in self.registry._collector_to_names:
            self._find_family(self.ledger, kind, metric, help_)

    def _make_way(self, collector: Collector) -> None:
        """Forget unmade series whose name another collector has taken."""
        names = set(self.registry._collector_to_names.get(collector, ()))
        for name, unmade in list(self._unmade.items()):
            if unmade.series and not names.isdisjoint(sample_names(unmade.family)):
                logger.warning("%s is not a counter, summary or histogram any more; its counts are forgotten.", name)
                del self._unmade[name]
                self._forget(unmade.family)

    def _abandon(self, metric: Any) -> None:
        """Forget a metric that was unregistered; it continues in memory."""
        family = self._families.pop(metric, None)
        for child in _list_children(metric):
            self._detach(child)
        if family is not None:
            self._unmade.pop(family.record.name, None)
            self._forget(family)

    def _install(self) -> None:
        """Notice each registration, unregistration and reset from now on."""
        if self._installed:
            return
        self._installed = True
        for kind in KINDS.values():
            if kind.is_counted and hasattr(kind.cls, "reset"):
                watch_resets(kind)
        register, unregister = self.registry.register, self.registry.unregister

        def register_and_adopt(collector: Collector) -> None:
            register(collector)
            try:
                self._adopt(collector)
            except Exception:
                self._warn("A metric cannot be counted in the ledger, only in memory.", exc_info=True)

        def unregister_and_abandon(collector: Collector) -> None:
            unregister(collector)
            if find_counted(collector):
                self.acts.do(partial(self._abandon, collector))

        with self.registry._lock:  # it is held while a collector describes itself, and a finalizer may register another
            self.registry._lock = threading.RLock()  # type: ignore[assignment]
        self.registry.register = register_and_adopt  # type: ignore[method-assign]
        self.registry.unregister = unregister_and_abandon  # type: ignore[method-assign]

    def _children(self) -> Iterator[Any]:
        for collector in list(self.registry._collector_to_names):
            if find_counted(collector):
                yield from _list_children(collector)

    def _clear(self) -> None:
        self._values, self._families, self._unmade = set(), {}, {}

    def _warn(self, message: str, *arguments: object, exc_info: bool = False) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.error(message, *arguments, exc_info=exc_info)


class Restricted:
    """A binding, of which only the samples of some names are collected."""

    def __init__(self, binding: Binding, names: frozenset[str]) -> None:
        self._binding, self._names = binding, names

    def collect(self) -> Iterator[Metric]:
        registry = self._binding.registry.restricted_registry(self._names)
        return merge(self._binding.registry, self._binding.list_unmade(), registry.collect, self._names)


def _read_help(metric: Any) -> str:
    """Return the help text. It may run code of the site, a translation for example, so never call this in an act."""
    try:
        return str(metric._documentation)
    except Exception:
        return ""


def _list_children(metric: Any) -> list[Any]:
    return list(metric._metrics.values()) if metric._labelnames else [metric]


def _get_values(child: Any) -> list[Any]:
    """Return the values of a child in the order of its cells; none if they are not what prometheus_client makes."""
    kind = find_kind(child)
    values = kind.get_values(child) if kind is not None else []
    return values if are_known(values) else []
