"""What a ledger of version 2 holds, for those that read it and for the conversion when it is taken over.

Its header, seal, end of the index, times and cells stand where those of version 3 do. Its index only grows: a record
after the other, {uint32 length, uint32 CRC-32, JSON, padding to 8 bytes}; the first with length 0 is the end. Families
are numbered in their order, and ["forget", family number, labels] or ["forget", family number] removes.
"""

from __future__ import annotations

import json
import zlib
from typing import NamedTuple

from django_promports.layout import (
    SLOT,
    STATE,
    FamilyRecord,
    Record,
    SeriesRecord,
    count_values,
)


class OldIndex(NamedTuple):
    """records: families and the series that they still have. end: of the index, and of the cells in use, forgotten ones
    included."""

    records: list[Record]
    end: int
    cells_end: int


def read_old_index(index: bytes, begin: int, cell_count: int) -> OldIndex:
    """Read an index that begins at this place of the file.

    Raises ValueError, TypeError or LookupError if it is damaged; of one with a live holder that may pass.
    """
    families: list[FamilyRecord] = []
    living: dict[str, int] = {}  # by name; a family of the same name takes the place of an older one
    series: dict[int, dict[tuple[str, ...], SeriesRecord]] = {}
    at = cells_end = 0
    while at + SLOT.size <= len(index):
        length, checksum = SLOT.unpack_from(index, at)
        if not length:
            break
        payload = index[at + SLOT.size : at + SLOT.size + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            raise ValueError("checksum")
        at += SLOT.size + -(-length // 8) * 8
        what, *rest = json.loads(payload)
        if what == "series":
            number, labelvalues, first = rest
            family = families[number]
            end = first + STATE + count_values(family.type, family.bounds)
            if first < cells_end or end > cell_count:
                raise ValueError("cells")
            cells_end = end
            series[number][tuple(labelvalues)] = SeriesRecord(number, tuple(labelvalues), first)
        elif what == "family":
            name, type_, help_, unit, labelnames, bounds = rest
            "".join([name, unit, *labelnames]).encode()
            count_values(type_, bounds)
            number = len(families)
            families.append(FamilyRecord(number, name, type_, help_, unit, tuple(labelnames), tuple(bounds), ""))
            living[name], series[number] = number, {}
        elif what == "forget":
            number = rest[0]
            if len(rest) > 1:
                del series[number][tuple(rest[1])]
            else:
                del living[families[number].name]
        else:
            raise ValueError(what)
    numbers = sorted(living.values())
    records = [families[number] for number in numbers]
    return OldIndex([*records, *(one for number in numbers for one in series[number].values())], begin + at, cells_end)
