"""Sources: where the numbers of a metric's lines come from. Children that this process has made, and unmade series."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

from prometheus_client.core import Metric

from django_promports.kinds import Kind
from django_promports.ledger import Family
from django_promports.values import CellValue, are_known

# The numbers of some children, one child after the other: as objects, or as the bytes of their cells.
State = list[Any] | bytes


class Unknown(Exception):
    """prometheus_client has to expose this collector itself."""


class Source(Protocol):
    """Reads the children of a metric. What a child is depends on the source.

    get_labels: returns the label values of one. get_created: when each was made. find_cells: the cell of the first
    value of each in the ledger; none if one of them is not there. read: numbers, followed by exemplars if there are
    any, and the latter once more. collect: the metric as if it had this child only. All raise Unknown for what they do
    not know.
    """

    def get_labels(self, child: Any) -> tuple[str, ...]: ...

    def get_created(self, children: list[Any]) -> list[Any]: ...

    def find_cells(self, children: list[Any]) -> list[int]: ...

    def read(self, children: list[Any], cells: Sequence[int]) -> tuple[State, list[Any]]: ...

    def collect(self, child: Any) -> Metric: ...


class Made:
    """Children that this process has made. family: in which they count, if they do."""

    def __init__(self, collector: Any, kind: Kind, family: Family | None = None, *, with_exemplars: bool) -> None:
        self.collector, self.kind, self.family = collector, kind, family
        self._read_exemplars = kind.read_exemplars if with_exemplars else None
        self._function = type(collector)._child_samples

    def get_labels(self, child: Any) -> tuple[str, ...]:
        if type(child) is not type(self.collector) or child._child_samples.__func__ is not self._function:
            raise Unknown
        if not are_known(self.kind.get_values(child)):
            raise Unknown
        return tuple(child._labelvalues)

    def get_created(self, children: list[Any]) -> list[Any]:
        return [child._created for child in children]

    def find_cells(self, children: list[Any]) -> list[int]:
        series = self.family.series if self.family else {}
        firsts = [series.get(tuple(child._labelvalues), -1) for child in children if series]
        return [] if -1 in firsts else firsts

    def read(self, children: list[Any], cells: Sequence[int]) -> tuple[State, list[Any]]:
        if cells and self.family and not (self._read_exemplars and CellValue.has_exemplars):
            return self.family.read(cells), []
        numbers = self.kind.read_numbers(children)
        if self.kind.is_settable:
            if any(child._child_samples.__func__ is not self._function for child in children):  # set_function()
                raise Unknown
            # -0.0 equals 0.0, and its text is another one. Only what is set can be -0.0.
            numbers = [number or repr(number) for number in numbers]  # type: ignore[misc]
        if self._read_exemplars is not None and any(exemplars := self._read_exemplars(children)):
            return numbers + exemplars, exemplars
        return numbers, []

    def collect(self, child: Any) -> Metric:
        single = self.collector
        if single._labelnames:
            single = copy.copy(single)
            single._metrics = {tuple(child._labelvalues): child}
        (metric,) = single.collect()
        return metric  # type: ignore[no-any-return]


class InLedger:
    """Series that only the ledger has: pairs of label values and the cell of the first value."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def get_labels(self, child: Any) -> tuple[str, ...]:
        return tuple(child[0])

    def get_created(self, children: list[Any]) -> list[Any]:
        return self._family.read_created(self.find_cells(children))

    def find_cells(self, children: list[Any]) -> list[int]:
        return [first for _, first in children]

    def read(self, children: list[Any], cells: Sequence[int]) -> tuple[State, list[Any]]:
        return self._family.read(cells), []

    def collect(self, child: Any) -> Metric:
        raise Unknown
