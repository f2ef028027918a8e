"""The storage of a ledger: one mapped file, with the families and series that it holds.

docs/ledger-format.md is the specification. A kill between any two stores leaves a file that can be read: a record is in
its slot before one store publishes it, and one store forgets it. So does an exception that a signal handler raises
between any two of them. Cells of a forgotten series are used again after QUARANTINE_SECONDS, so that no reader takes
new counts there for those of the forgotten series.
"""

from __future__ import annotations

import mmap
import os
import time
from array import array
from pathlib import Path

from django_promports.family import Family
from django_promports.layout import (
    CELLS_AT,
    CELLS_END_AT,
    END_AT,
    INDEX_AT_AT,
    LONG,
    NUMBER,
    OPEN,
    QUARANTINE_SECONDS,
    SEAL_AT,
    SLOT,
    STATE,
    WORD,
    WRITING_AT,
    FamilyRecord,
    Index,
    Labels,
    Layout,
    LedgerDamaged,
    Record,
    SeriesRecord,
    check_seal,
    decode,
    encode,
    free_state,
    read_index,
    seal_content,
    seal_payload,
    sort_records,
)
from django_promports.space import Space

# Space is reserved in pieces of this size before it is written: a mapped page that the full file system cannot back
# would kill the process (SIGBUS).
PIECE = 64 * 1024


class LedgerFull(Exception):
    """There is no room for another series, in the ledger or on the file system."""


class Storage:
    """An open file. Its holder ensures that one change ends before another begins.

    families: by name. cells: a memoryview of float64, indexed by cell number.
    """

    cells: memoryview[float]

    def __init__(self, path: Path, file: int, layout: Layout) -> None:
        """Map a file that is there. It is closed with the storage."""
        self.path, self.file, self.layout = path, file, layout
        self.families: dict[str, Family] = {}
        self._by_number: dict[int, Family] = {}
        self._next_number = 0
        # Where the record of a series is, by the cell of its first value; 0 for other cells. A dict would take
        # twice the memory.
        self._slots = array("I")
        self._free, self._holes = Space(), Space(QUARANTINE_SECONDS)  # slots, and cells
        self._cells_end = self._cells_reserved = 0
        self._index_end = self._index_reserved = layout.index_at
        self._map = mmap.mmap(file, layout.size)
        # One store each. struct.pack_into() clears the bytes first, and a kill in between would leave zeros.
        self._words, self._longs = memoryview(self._map).cast("I"), memoryview(self._map).cast("Q")
        self.cells = memoryview(self._map)[CELLS_AT : layout.index_at].cast("d")

    @classmethod
    def create(cls, path: Path, file: int, layout: Layout, site: bytes) -> Storage:
        """Begin an empty file. Raises LedgerFull."""
        _reserve(file, 0, CELLS_AT)
        os.ftruncate(file, layout.size)
        header = layout.pack_header(site).ljust(SEAL_AT, b"\0") + WORD.pack(OPEN)
        os.pwrite(file, header.ljust(END_AT, b"\0") + LONG.pack(layout.index_at), 0)
        return cls(path, file, layout)

    @property
    def is_sparse(self) -> bool:
        """Whether much of it is free."""
        return self._free.count > self._count_slots() // 4

    def load(self) -> None:
        """Learn what the file holds. Raises LedgerDamaged."""
        try:
            if self.read_long(INDEX_AT_AT) != self.layout.index_at:
                raise ValueError("where it begins")
            self._learn(self._read_index())
        except (ValueError, TypeError, LookupError) as error:
            raise LedgerDamaged(f"its index is damaged ({error!r})") from None

    def mark_open(self) -> None:
        """Break the seal, before the first cell changes: the holder may be killed."""
        self._write_word(SEAL_AT, OPEN)

    def close(self, *, seal: bool) -> None:
        """Close the file. A seal shows the next holder whether it was changed meanwhile."""
        if seal:
            self._retract()
            self.write_long(CELLS_END_AT, self._cells_end)  # an exception may have interrupted a change
            self.write_long(END_AT, self._index_end)
            self._write_word(SEAL_AT, seal_content(self.file, self.layout, self._cells_end, self._index_end))
        self.unmap()
        os.close(self.file)

    def unmap(self) -> None:
        """Unmap the file, but keep it open and locked."""
        for view in (self.cells, self._words, self._longs):
            view.release()
        self._map.close()

    def read_long(self, at: int) -> int:
        return LONG.unpack_from(self._map, at)[0]  # type: ignore[no-any-return]

    def write_long(self, at: int, value: int) -> None:
        self._longs[at // 8] = value

    def _write_word(self, at: int, value: int) -> None:
        self._words[at // 4] = value

    def read_number(self, at: int) -> float:
        return NUMBER.unpack_from(self._map, at)[0]  # type: ignore[no-any-return]

    def write_number(self, at: int, value: float) -> None:
        self.write_long(at, LONG.unpack(NUMBER.pack(value))[0])

    def add_family(self, record: FamilyRecord) -> Family:
        """Make a family; it gets a number of its own. Raises LedgerFull."""
        self._publish(record._replace(number=self._next_number))
        return self.families[record.name]

    def add_series(self, family: Family, labelvalues: Labels, numbers: list[float]) -> int:
        """Make a series with these cells; return that of its first value. Raises LedgerFull and UnicodeEncodeError."""
        begin = self._take_cells(len(numbers))
        self.cells[begin : begin + len(numbers)] = memoryview(array("d", numbers))
        try:
            self._publish(SeriesRecord(family.record.number, labelvalues, begin))
        except (LedgerFull, UnicodeEncodeError):  # before anything was written; else the next holder has the cells
            self._holes.add(begin, len(numbers))
            raise
        return begin + STATE

    def forget(self, family: Family, labelvalues: Labels | None = None) -> None:
        """Remove a series, or a whole family with its series. Cells rest for a while before they are used again.

        A family that was forgotten can be read for as long.
        """
        number, name = family.record.number, family.record.name
        if self._by_number.get(number) is not family:
            return
        if labelvalues is not None:
            if (first := family.series.get(labelvalues)) is not None:
                self._forget_series(family, first)
                family.series.pop(labelvalues, None)
            return
        family.rests_until = time.monotonic() + QUARANTINE_SECONDS
        self.families.pop(name, None)
        for first in list(family.series.values()):
            self._forget_series(family, first)
        size = self._free_slot(family.slot)
        del self._by_number[number]
        self._free.add(family.slot, size)

    def _count_slots(self) -> int:
        return len(self._slots) - self._slots.count(0)

    def _forget_series(self, family: Family, first: int) -> None:
        if slot := self._slots[first]:  # 0: an exception interrupted an earlier attempt to forget it
            size = self._free_slot(slot)
            self._slots[first] = 0
            self._free.add(slot, size)
            self._holes.give_back(first - STATE, STATE + family.width)

    def _read_index(self) -> Index:
        """Read as much as there is. It may reach one record beyond the end that is written down."""
        length = max(0, self.read_long(END_AT) - self.layout.index_at) + PIECE
        while True:
            part = os.pread(self.file, min(length, self.layout.size), self.layout.index_at)
            index = read_index(part, self.layout.index_at)
            is_cut = not index.is_whole or index.end + SLOT.size > self.layout.index_at + len(part)
            if not is_cut or self.layout.index_at + len(part) >= self.layout.size:
                return index
            length = self.layout.size

    def _learn(self, index: Index) -> None:
        writing = self.read_long(WRITING_AT)
        if not index.is_whole or index.unsure.keys() - {writing}:
            raise ValueError(f"at byte {index.end}: {list(index.unsure)}")
        if not self.layout.index_at <= self.read_long(END_AT) <= index.end:
            raise LedgerDamaged("the end of its index is missing")
        cells_end = self.read_long(CELLS_END_AT)
        if cells_end > self.layout.cells:
            raise ValueError("cells")
        check_seal(self.file, self.layout, cells_end, index.end)
        self._index_end = index.end
        for slot, record in sort_records(index.records.items()):
            if isinstance(record, SeriesRecord) and record.family not in self._by_number:
                self._free.add(slot, self._free_slot(slot))  # of a family that was replaced
            else:
                self._apply(slot, record)
        for slot, size in (index.free | index.unsure).items():
            if slot in index.unsure:
                self._blank(slot, size)
            self._free.add(slot, size)
        self.write_long(WRITING_AT, 0)
        position = 0
        pieces = [
            (first - STATE, first + family.width)
            for family in self._by_number.values()
            for first in family.series.values()
        ]
        for begin, end in sorted(pieces):
            if begin < position:
                raise ValueError("cells of two series")
            if begin > position:
                self._holes.give_back(position, begin - position)
            position = end
        if self._count_slots() != len(pieces) or position > self.layout.cells:
            raise ValueError("cells")
        self._cells_end = max(position, cells_end)
        if position < self._cells_end:
            self._holes.give_back(position, self._cells_end - position)

    def _apply(self, slot: int, record: Record) -> None:
        """Take over a record in this slot: one that was just published, or one that was found in the file."""
        if isinstance(record, SeriesRecord):
            number, labelvalues, begin = record
            if not 0 <= begin < self.layout.cells:
                raise ValueError("cells")
            first = begin + STATE
            if first >= len(self._slots):
                self._slots.frombytes(bytes(self._slots.itemsize * (first + 1 - len(self._slots))))
            self._slots[first] = slot
            self._by_number[number].series[labelvalues] = first
            return
        former = self.families.get(record.name)
        if former is not None and former.record.number > record.number:  # whoever replaced this one was interrupted
            self._free.add(slot, self._free_slot(slot))
            return
        if former is not None:
            del self._by_number[former.record.number]
            self._free.add(former.slot, self._free_slot(former.slot))
        family = Family(record, {}, self.cells, slot)
        self._next_number = max(self._next_number, record.number + 1)
        self._by_number[record.number] = self.families[record.name] = family

    def _knows(self, record: Record) -> bool:
        family = self._by_number.get(record[0] if isinstance(record, SeriesRecord) else record.number)
        if family is None or isinstance(record, FamilyRecord):
            return family is not None
        return family.series.get(record.labelvalues) == record.begin + STATE

    def _take_cells(self, count: int) -> int:
        first = self._holes.take(count)
        if first is None and (larger := self._holes.take_larger(count)) is not None:
            first, size = larger
            self._holes.add(first + count, size - count)
        if first is not None:
            _reserve(self.file, CELLS_AT + 8 * first, 8 * count)  # and zero
            return first
        first, end = self._cells_end, self._cells_end + count
        if end > self.layout.cells:
            raise LedgerFull(f"{self.path} is full")
        if end > self._cells_reserved:
            self._cells_reserved = self._reserve(CELLS_AT + 8 * first, 8 * count, CELLS_AT, self.layout.index_at) // 8
        self._cells_end = end
        self.write_long(CELLS_END_AT, end)
        return first

    def _publish(self, record: Record) -> None:
        """Write a record to the file, and apply it."""
        payload = encode(record)
        self._retract()
        size = len(payload) + SLOT.size
        slot, end = self._free.take(size), self._index_end
        if slot is None and end + size + SLOT.size > self.layout.size:
            larger = self._free.take_larger(size)
            if larger is None:
                raise LedgerFull(f"{self.path} is full")
            slot, size = larger
            payload = payload.ljust(size - SLOT.size)
        if slot is None:
            slot, end = end, end + size
            if end + SLOT.size > self._index_reserved:
                self._index_reserved = self.layout.index_at + self._reserve(
                    slot, end + SLOT.size - slot, self.layout.index_at, self.layout.size
                )
        self.write_long(WRITING_AT, slot)
        if slot == self._index_end:
            SLOT.pack_into(self._map, end, 0, 0)  # whatever lies behind it is not a record
        else:
            self._write_word(slot + WORD.size, 0)
        self._map[slot + SLOT.size : slot + size] = payload
        self._write_word(slot + WORD.size, seal_payload(payload))
        if slot == self._index_end:
            self._write_word(slot, size)
            self.write_long(END_AT, end)
            self._index_end = end
        self._apply(slot, record)
        self.write_long(WRITING_AT, 0)

    def _retract(self) -> None:
        """Take back a record whose writing a signal handler interrupted, unless it is known."""
        slot = self.read_long(WRITING_AT)
        if not slot:
            return
        if slot == self._index_end:
            self.write_long(END_AT, slot)
            self._write_word(slot, 0)
        else:
            size, state = SLOT.unpack_from(self._map, slot)
            payload = self._map[slot + SLOT.size : slot + size]
            if state != seal_payload(payload) or not self._knows(decode(payload)):
                self._blank(slot, size)
                self.write_long(WRITING_AT, 0)
                self._free.add(slot, size)
                return
        self.write_long(WRITING_AT, 0)

    def _free_slot(self, slot: int) -> int:
        """Forget the record in a slot; return its size."""
        size: int = WORD.unpack_from(self._map, slot)[0]
        state = free_state(seal_payload(self._map[slot + SLOT.size : slot + size]))
        self._write_word(slot + WORD.size, state)
        return size

    def _blank(self, slot: int, size: int) -> None:
        """Make a free slot of one that may hold half a record."""
        self._write_word(slot + WORD.size, 0)
        self._map[slot + SLOT.size : slot + size] = b" " * (size - SLOT.size)
        self._free_slot(slot)

    def _reserve(self, begin: int, length: int, base: int, limit: int) -> int:
        """Reserve these bytes and the rest of their piece of the area from `base` to `limit`.

        Nothing may be in use from `begin` to `limit`: what lies before in the piece was reserved when it was written.
        Returns how far the reserved space reaches from `base`.
        """
        end = -(-(begin - base + length) // PIECE) * PIECE
        _reserve(self.file, begin, min(base + end, limit) - begin)
        return end


def _reserve(file: int, offset: int, length: int) -> None:
    """Write zeros to bytes of the file that nobody uses yet. Raises LedgerFull.

    posix_fallocate(3) is not everywhere (macOS), is not supported by every file system, and reads and writes back bytes
    in use where glibc emulates it, which would undo a count of another thread. Zeros reserve space on each of them.
    """
    end = offset + length
    try:
        while offset < end:
            offset += os.pwrite(file, bytes(end - offset), offset)
    except OSError as error:
        raise LedgerFull(f"no room on the file system of the ledger ({error.strerror})") from None
