"""A float in a cell: prometheus_client's MutexValue, whose number is also in a ledger.

Python runs finalizers and signal handlers between any two steps of a thread, and they may count. So nothing is called
under a value's lock, and no lock is held while an object is freed.
"""

from __future__ import annotations

from array import array
from functools import update_wrapper
from typing import Any

from prometheus_client.values import MutexValue

from django_promports.kinds import Kind
from django_promports.layout import CREATED

Cells = Any  # of float64, indexed by cell number: a ledger's memoryview, or an array where there is none
# The cells of values that have none. Nobody reads them.
NOWHERE: Cells = array("d", [0.0])


class CellValue:
    """A float that is also in a cell, so that it outlives the process. Has the interface of MutexValue."""

    __slots__ = ("_cells", "_exemplar", "_index", "_lock", "_value")
    _multiprocess = False
    # Whether any value of this process ever had an exemplar: then the cells do not hold all that is exposed.
    has_exemplars = False

    def __init__(self, lock: Any, exemplar: Any) -> None:
        self._value = 0.0
        self._cells, self._index = NOWHERE, 0
        self._lock = lock
        self._exemplar = exemplar

    def inc(self, amount: float) -> None:
        with self._lock:
            self._value = self._cells[self._index] = self._value + amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        value = float(value)
        with self._lock:
            self._value = self._cells[self._index] = value

    def set_created(self, moment: float) -> None:
        """Write to the ledger when a counter with this value was reset. Only the first value of a series can do it."""
        with self._lock:
            if self._cells is not NOWHERE:
                self._cells[self._index + CREATED] = moment

    def get(self) -> float:
        with self._lock:
            return self._value

    def set_exemplar(self, exemplar: Any) -> None:
        former = self._exemplar  # freed after the lock: it may have a finalizer
        with self._lock:
            self._exemplar = exemplar
            CellValue.has_exemplars = True
        del former

    def get_exemplar(self) -> Any:
        with self._lock:
            return self._exemplar

    def attach(self, cells: Cells, index: int) -> None:
        """Continue in a cell, from the sum of its number and this one."""
        with self._lock:
            self._value = cells[index] = cells[index] + self._value
            self._cells, self._index = cells, index

    def detach(self, *, keep: bool) -> None:
        """Leave the cell as it is, and continue in memory, from the same number or from zero."""
        with self._lock:
            if not keep:
                self._value = 0.0
            self._cells, self._index = NOWHERE, 0


class _MovedValue(MutexValue):
    """A MutexValue that was replaced: an increment that another thread has begun is still counted."""

    _target: CellValue

    @property
    def _value(self) -> float:
        return self._target._value

    @_value.setter
    def _value(self, value: float) -> None:
        target = self._target
        target._value = target._cells[target._index] = value


KNOWN = frozenset({MutexValue, CellValue})


def are_known(values: list[Any]) -> bool:
    """Whether these are values that this package can read and replace."""
    return KNOWN.issuperset(map(type, values))


def give_cell(value: Any) -> CellValue:
    """Return a value that can have a cell, with the number, exemplar and lock of this one, which it replaces."""
    if isinstance(value, CellValue):
        return value
    replacement = CellValue(value._lock, value._exemplar)
    vars(value)["_target"] = replacement  # the dict exists from here on, so the next lines allocate nothing
    with value._lock:
        replacement._value, replacement._exemplar = value._value, value._exemplar
        value.__class__ = _MovedValue
    CellValue.has_exemplars |= replacement._exemplar is not None
    return replacement


def watch_resets(kind: Kind) -> None:
    """Make reset() of a metric type write the new created time to the ledger too."""
    reset = kind.cls.reset
    if hasattr(reset, "notes_created"):
        return

    def reset_and_note(child: Any) -> None:
        reset(child)
        value = kind.get_values(child)[0]
        if type(value) is CellValue:
            value.set_created(child._created)

    kind.cls.reset = update_wrapper(reset_and_note, reset)
    kind.cls.reset.notes_created = True
