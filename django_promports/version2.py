"""Ledgers of version 2: what they hold, for readers and for ledger.py, which converts one when it is taken over.

Header, seal, end of the index, times and cells are at the same offsets as in version 3. The index is a log of records,
{uint32 length, uint32 CRC-32, JSON, padding to 8 bytes}; the first with length 0 is the end. Families are numbered in
their order, and ["forget", family number, labels] or ["forget", family number] removes.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from typing import NamedTuple

from django_promports.kinds import KINDS
from django_promports.layout import (
    CELLS_AT,
    END_AT,
    LONG,
    NUMBER,
    SCRAPED_AT,
    SLOT,
    STATE,
    Content,
    FamilyRecord,
    Labels,
    Layout,
    LedgerDamaged,
    Record,
    SeriesRecord,
    check_seal,
)

# The index may reach a record beyond its recorded end.
SLACK = 64 * 1024


class OldIndex(NamedTuple):
    """records: families and the series that they still have. end: of the index. cells_end: of the cells in use,
    forgotten ones included."""

    records: list[Record]
    end: int
    cells_end: int


def read_old_file(file: int, layout: Layout) -> tuple[Content, float, float]:
    """Return the content of a file that no process has open, and when it was last scraped and opened.

    Raises LedgerDamaged.
    """
    (written,) = LONG.unpack(os.pread(file, LONG.size, END_AT))
    try:
        try:
            old = _read_old_index(file, layout, min(written - layout.index_at + SLACK, layout.size))
        except (ValueError, TypeError, LookupError):  # cut off, perhaps
            old = _read_old_index(file, layout, layout.size)
    except (ValueError, TypeError, LookupError) as error:
        raise LedgerDamaged(f"its index is damaged ({error!r})") from None
    if old.end < written:
        raise LedgerDamaged("the end of its index is missing")
    check_seal(file, layout, old.cells_end, old.end)
    times = os.pread(file, 2 * NUMBER.size, SCRAPED_AT)
    return _collect(file, old), *struct.unpack("=dd", times)


def read_old_families(file: int, layout: Layout) -> Content:
    """Return the content of a file that a process may have open.

    Raises ValueError, TypeError or LookupError if it is damaged, or if a record is being written.
    """
    (written,) = LONG.unpack(os.pread(file, LONG.size, END_AT))
    return _collect(file, _read_old_index(file, layout, written - layout.index_at))


def _collect(file: int, old: OldIndex) -> Content:
    cells = memoryview(os.pread(file, 8 * old.cells_end, CELLS_AT).ljust(8 * old.cells_end, b"\0")).cast("d")
    content: dict[int, tuple[FamilyRecord, list[tuple[Labels, list[float]]]]] = {}
    for record in old.records:
        if isinstance(record, FamilyRecord):
            content[record.number] = record, []
        elif _is_text(record.labelvalues):
            family, series = content[record.family]
            end = record.begin + STATE + family.width
            series.append((record.labelvalues, list(cells[record.begin : end])))
    return list(content.values())


def _is_text(labelvalues: Labels) -> bool:
    """Whether UTF-8 can encode the label values: version 0.1 kept lone surrogates, which no exposition can show."""
    try:
        "".join(labelvalues).encode()
    except (UnicodeEncodeError, TypeError):
        return False
    return True


def _read_old_index(file: int, layout: Layout, size: int) -> OldIndex:
    index = os.pread(file, max(size, 0), layout.index_at)
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
            number, labelvalues, begin = rest
            family = families[number]
            end = begin + STATE + family.width
            if begin < cells_end or end > layout.cells:
                raise ValueError("cells")
            cells_end = end
            series[number][tuple(labelvalues)] = SeriesRecord(number, tuple(labelvalues), begin)
        elif what == "family":
            name, type_, help_, unit, labelnames, bounds = rest
            "".join([name, unit, *labelnames]).encode()
            if type_ not in KINDS:
                raise ValueError(type_)
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
    records: list[Record] = [families[number] for number in numbers]
    records += [one for number in numbers for one in series[number].values()]
    return OldIndex(records, layout.index_at + at, cells_end)
