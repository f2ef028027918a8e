"""A family: the series of one metric in an open ledger, and their numbers.

A series is known by the cell of its first value. Only the modules of the ledger know which cells it has before that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from django_promports.layout import CREATED, STATE, FamilyRecord, Labels


@dataclass(eq=False, slots=True)
class Family:
    """The series of one metric: the cell of the first value of each, by label values.

    It is an identity: a metric that is made again, in another shape or after it was forgotten, has another family and
    other cells. record: its index record. cells: those of its ledger; reading them after the ledger was closed
    raises ValueError. slot: where its record is. width: how many values a series has. rests_until: when its cells may
    be used again after it was forgotten, in seconds of time.monotonic().
    """

    record: FamilyRecord
    series: dict[Labels, int] = field(repr=False)
    cells: memoryview[float] = field(repr=False)
    slot: int = field(repr=False)
    rests_until: float = field(default=math.inf, init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.record.width

    def read(self, firsts: Iterable[int]) -> bytes:
        """Return the values of the series that begin at these cells, as bytes of float64, one after the other.

        Raises ValueError if the family was forgotten too long ago.
        """
        cells, width = self.cells, self.width
        numbers = b"".join([cells[first : first + width] for first in firsts])
        self._check()
        return numbers

    def read_created(self, firsts: Iterable[int]) -> list[float]:
        """Return when these series were created, in seconds since the epoch. Raises ValueError as read() does."""
        cells = self.cells
        created = [cells[first + CREATED] for first in firsts]
        self._check()
        return created

    def find_row(self, first: int) -> slice:
        """Return where all cells of a series are, those before its values included."""
        return slice(first - STATE, first + self.width)

    def _check(self) -> None:
        """Raise ValueError if what was just read from its cells may be another family's."""
        if time.monotonic() >= self.rests_until:
            raise ValueError(f"{self.record.name} was forgotten")
