"""The ledger: the file behind a port, in which its counts outlive the process that made them.

The file is mapped into memory, so a count is safe the moment it is written: the kernel owns the pages, whatever
becomes of the process. One process at a time has it open, under flock(2).

docs/ledger-format.md is the specification of the file. A kill between any two stores leaves a file that can be read:
a record is in its slot before one store publishes it, and one store forgets it. Cells of a forgotten series are used
again after QUARANTINE_SECONDS, when no reader can take what is counted there then for its numbers.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import stat
import time
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django_promports.layout import (
    CELLS_AT,
    CELLS_END_AT,
    END_AT,
    HEADER,
    HOLDER_AT,
    INDEX_AT_AT,
    LAYOUT,
    LONG,
    MAGIC,
    NUMBER,
    OPEN,
    OPENED_AT,
    QUARANTINE_SECONDS,
    SEAL_AT,
    SETTLED_AT,
    SLOT,
    STATE,
    WORD,
    WRITING_AT,
    FamilyRecord,
    Index,
    Layout,
    LedgerDamaged,
    Record,
    SeriesRecord,
    count_values,
    decode,
    encode,
    free_state,
    hash_site,
    read_index,
    read_version,
    seal_payload,
    sort_records,
)
from django_promports.space import Space
from django_promports.unix import lock_file
from django_promports.version2 import read_old_index

logger = logging.getLogger("django_promports")

# Space is reserved in pieces of this size before it is written: a mapped page that the full file system cannot back
# would kill the process (SIGBUS).
PIECE = 64 * 1024
# A series that nobody touched for this long, and that was scraped since, is dropped at the next claim. Shorter, and a
# counter that grows once an hour would restart from zero each time, which PromQL does not count.
FORGET_SECONDS = 24 * 3600.0
# Seconds to wait for the lock: a process that ends frees its port a moment before its files.
LOCK_SECONDS = 0.5

Labels = tuple[str, ...]
# What a new file holds from the start: families, and of each the label values and all cells of its series.
Content = list[tuple[FamilyRecord, list[tuple[Labels, list[float]]]]]


class LedgerLocked(Exception):
    """Another process has this ledger open."""


class LedgerFull(Exception):
    """There is no room for another series, in the ledger or on the file system."""


@dataclass(eq=False, slots=True)
class Family:
    """What the series of one metric have in common, and the first cell of each, by label values.

    It is an identity: a metric that is made again, in another shape or after it was forgotten, has another family and
    other cells. cells: those of its ledger; reading them after the ledger was closed raises ValueError. width: how many
    values a series has. forgotten: how many of its series were forgotten; while that stays the same, so do the cells of
    all its series.
    """

    number: int
    name: str
    type: str
    help: str
    unit: str
    labelnames: Labels
    bounds: Labels
    mode: str
    series: dict[Labels, int] = field(repr=False)
    cells: memoryview[float] = field(repr=False)
    slot: int = field(repr=False)
    forgotten: int = 0
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = count_values(self.type, self.bounds)

    @property
    def shape(self) -> tuple[str, Labels, Labels]:
        """What has to stay the same for its numbers to mean the same."""
        return self.type, self.labelnames, self.bounds

    @property
    def growing(self) -> slice:
        """Which of its values only ever grow: all but the sum of observations, which may be negative."""
        return slice(1, None) if self.type == "histogram" else slice(0, 1)

    def read(self, firsts: Iterable[int]) -> bytes:
        """Return the values of the series that begin at these cells, as bytes of float64, one after the other."""
        cells, end = self.cells, STATE + self.width
        return b"".join([cells[first + STATE : first + end] for first in firsts])


class Ledger:
    """An open ledger. Its holder ensures that one change ends before another begins.

    families: the metrics that it holds, by name. cells: a memoryview of float64, indexed by cell number. A series'
    values begin STATE cells after its first one. is_new: whether there was no such file before.
    """

    def __init__(self, path: Path, application: str, layout: Layout = LAYOUT) -> None:
        """Open the file, or make it; drop what nobody touches any more, and what makes no sense.

        Raises LedgerLocked, and OSError if it cannot be opened or is not this user's. One of version 2 is converted. A
        file that is not a ledger of this application, or damaged, is set aside with a WARNING, and replaced.
        """
        self.path = path
        self.layout = layout
        self.families: dict[str, Family] = {}
        self._site = hash_site(application)
        self._file = _open_locked(path)
        self.is_new = self._is_unwritten()
        try:
            self._map()
            try:
                content = self._read()
            except LedgerDamaged as damage:
                aside = path.with_name(f"{path.name}.damaged")
                aside.unlink(missing_ok=True)
                os.link(path, aside)  # the path itself is never free for another process
                logger.warning(
                    "%s cannot be continued: %s. It is %s now; its counts begin at zero.", path, damage, aside
                )
                self._renew([], settled_at=0.0, opened_at=0.0)
            else:
                if content is not None:
                    self._renew(content, settled_at=self.settled_at, opened_at=self._read_number(OPENED_AT))
                WORD.pack_into(self._map_, SEAL_AT, OPEN)  # before the first cell changes: its holder may be killed
                self._tidy()
        except BaseException:
            self.close(seal=False)
            raise
        self._note_holder()

    @property
    def settled_at(self) -> float:
        """When all of it was scraped last, in seconds since the epoch; 0 if it never was."""
        return self._read_number(SETTLED_AT)

    def add_family(
        self, name: str, type_: str, help_: str, unit: str, labelnames: Labels, bounds: Labels, mode: str = ""
    ) -> Family:
        """Return the family of this name, made where there is none. One of another shape is forgotten first.

        mode: a gauge's multiprocess mode. Raises LedgerFull.
        """
        known = self.families.get(name)
        if known is not None:
            if known.shape == (type_, labelnames, bounds):
                return known
            logger.warning("%s has other labels or buckets than before; its counts begin at zero.", name)
            self.forget(known)
        help_ = str.encode(help_, errors="replace").decode()  # a lone surrogate in it must not cost the counts
        self._publish(FamilyRecord(self._next_number, name, type_, help_, unit, labelnames, bounds, mode))
        return self.families[name]

    def add_series(self, family: Family, labelvalues: Labels, created: float) -> int:
        """Return the first cell of a new series; its values are zero.

        Raises LedgerFull, and UnicodeEncodeError for label values that no exposition can show.
        """
        return self._add_series(family, labelvalues, [created, 0.0, time.time()] + [0.0] * family.width)

    def forget(self, family: Family, labelvalues: Labels | None = None) -> None:
        """Remove a series, or all of a family and then the family itself. Their cells rest before they are used again."""
        if labelvalues is None:
            if self.families.get(family.name) is family:
                for one in list(family.series):
                    self.forget(family, one)
                del self.families[family.name], self._by_number[family.number]
                self._free.add(family.slot, self._free_slot(family.slot))
        elif (first := family.series.get(labelvalues)) is not None:
            # In this order: whatever interrupts it, no record is left of a series that is not known here.
            slot = self._slots[first]
            size = self._free_slot(slot)
            family.forgotten += 1
            del family.series[labelvalues], self._slots[first]
            self._free.add(slot, size)
            self._holes.give_back(first, STATE + family.width)

    def note_scrape(self) -> None:
        """Note that all of it was scraped just now."""
        NUMBER.pack_into(self._map_, SETTLED_AT, time.time())

    def close(self, *, seal: bool = True, remove: bool = False) -> None:
        """Let another process have it. Sealed, the next holder can tell whether the file rested unharmed.

        Nobody may use the cells any more. In a forked child of the holder (seal=False) this only lets go of what
        the child inherited. remove: remove the file as well.
        """
        if seal:
            self._retract()
            WORD.pack_into(self._map_, SEAL_AT, self._checksum(self._cells_end, self._index_end))
        if hasattr(self, "cells"):
            self.cells.release()
        if hasattr(self, "_map_"):
            self._map_.close()
        if remove:  # while the lock is held
            self.path.unlink(missing_ok=True)
        os.close(self._file)

    def _map(self) -> None:
        if self._is_unwritten():
            self._create()
        if os.fstat(self._file).st_size == self.layout.size:
            self._map_ = mmap.mmap(self._file, self.layout.size)
            self.cells = memoryview(self._map_)[CELLS_AT : self.layout.index_at].cast("d")
        self.families = {}
        self._by_number: dict[int, Family] = {}
        self._next_number = 0
        self._slots: dict[int, int] = {}  # where the record of a series is, by its first cell
        self._free, self._holes = Space(), Space(QUARANTINE_SECONDS)  # slots, and cells
        self._cells_end = self._cells_reserved = 0
        self._index_end = self._index_reserved = self.layout.index_at

    def _is_unwritten(self) -> bool:
        """Whether nothing was ever counted in the file: it is new, or its maker was killed before the header."""
        return not any(
            os.pread(self._file, length, at).strip(b"\0")
            for at, length in ((0, len(MAGIC)), (CELLS_AT, PIECE), (self.layout.index_at, PIECE))
        )

    def _create(self) -> None:
        try:
            _reserve(self._file, 0, CELLS_AT)
        except LedgerFull:
            os.ftruncate(self._file, 0)
            raise
        os.ftruncate(self._file, self.layout.size)
        # Last: without it the file counts as new.
        os.pwrite(self._file, self.layout.pack_header(self._site).ljust(SEAL_AT, b"\0") + WORD.pack(OPEN), 0)

    def _read(self) -> Content | None:
        """Learn what the file holds. Return what a new one has to hold in its place, if it is of version 2."""
        size = os.fstat(self._file).st_size
        if size != self.layout.size:
            raise LedgerDamaged(f"it has {size} bytes instead of {self.layout.size}")
        version, site = read_version(os.pread(self._file, HEADER.size + WORD.size, 0), size)
        if site != self._site:
            raise LedgerDamaged("it belongs to another site")
        try:
            if version == 2:
                return self._read_version_2()
            if self._read_long(INDEX_AT_AT) != self.layout.index_at:
                raise ValueError("where it begins")
            self._learn(self._read_index())
        except (ValueError, TypeError, LookupError) as error:
            raise LedgerDamaged(f"its index is damaged ({error!r})") from None
        return None

    def _read_index(self) -> Index:
        """Read as much as there is. It may reach one record beyond the end that is written down."""
        length = max(0, self._read_long(END_AT) - self.layout.index_at) + PIECE
        while True:
            part = os.pread(self._file, min(length, self.layout.size), self.layout.index_at)
            index = read_index(part, self.layout.index_at)
            is_cut = not index.is_whole or index.end + SLOT.size > self.layout.index_at + len(part)
            if not is_cut or self.layout.index_at + len(part) >= self.layout.size:
                return index
            length = self.layout.size

    def _learn(self, index: Index) -> None:
        writing = self._read_long(WRITING_AT)
        if not index.is_whole or index.unsure.keys() - {writing}:
            raise ValueError(f"at byte {index.end}: {list(index.unsure)}")
        if index.end < self._read_long(END_AT):
            raise LedgerDamaged("the end of its index is missing")
        cells_end = self._read_long(CELLS_END_AT)
        if cells_end > self.layout.cells:
            raise ValueError("cells")
        seal = WORD.unpack_from(self._map_, SEAL_AT)[0]
        if seal != OPEN and seal != self._checksum(cells_end, index.end):
            raise LedgerDamaged("somebody changed it while no process had it open")
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
        LONG.pack_into(self._map_, WRITING_AT, 0)
        position = 0
        pieces = [
            (first, first + STATE + family.width)
            for family in self._by_number.values()
            for first in family.series.values()
        ]
        for first, end in sorted(pieces):
            if first < position:
                raise ValueError("cells of two series")
            if first > position:
                self._holes.give_back(position, first - position)
            position = end
        if len(self._slots) != len(pieces) or position > self.layout.cells:
            raise ValueError("cells")
        self._cells_end = max(position, cells_end)
        if position < self._cells_end:
            self._holes.give_back(position, self._cells_end - position)

    def _read_version_2(self) -> Content:
        length = max(0, self._read_long(END_AT) - self.layout.index_at) + PIECE
        try:
            old = read_old_index(
                os.pread(self._file, length, self.layout.index_at), self.layout.index_at, self.layout.cells
            )
        except (ValueError, TypeError, LookupError):  # cut off, perhaps
            index = os.pread(self._file, self.layout.size, self.layout.index_at)
            old = read_old_index(index, self.layout.index_at, self.layout.cells)
        if old.end < self._read_long(END_AT):
            raise LedgerDamaged("the end of its index is missing")
        seal = WORD.unpack_from(self._map_, SEAL_AT)[0]
        if seal != OPEN and seal != self._checksum(old.cells_end, old.end):
            raise LedgerDamaged("somebody changed it while no process had it open")
        content: dict[int, tuple[FamilyRecord, list[tuple[Labels, list[float]]]]] = {}
        for record in old.records:
            if isinstance(record, FamilyRecord):
                content[record.number] = record, []
            elif _is_text(record.labelvalues):  # version 0.1 kept lone surrogates, which no exposition can show
                family, series = content[record.family]
                end = record.first + STATE + count_values(family.type, family.bounds)
                series.append((record.labelvalues, self.cells[record.first : end].tolist()))
        return list(content.values())

    def _apply(self, slot: int, record: Record) -> None:
        """Know a record that is in this slot, one that was just published or one that was found there."""
        if isinstance(record, SeriesRecord):
            number, labelvalues, first = record
            self._slots[first] = slot
            self._by_number[number].series[labelvalues] = first
            return
        former = self.families.get(record.name)
        if former is not None and former.number > record.number:  # whoever replaced this one was interrupted
            self._free.add(slot, self._free_slot(slot))
            return
        if former is not None:
            del self._by_number[former.number]
            self._free.add(former.slot, self._free_slot(former.slot))
        family = Family(*record, {}, self.cells, slot)
        self._next_number = max(self._next_number, record.number + 1)
        self._by_number[record.number] = self.families[record.name] = family

    def _knows(self, record: Record) -> bool:
        family = self._by_number.get(record[0] if isinstance(record, SeriesRecord) else record.number)
        if family is None or isinstance(record, FamilyRecord):
            return family is not None
        return family.series.get(record.labelvalues) == record.first

    def _add_series(self, family: Family, labelvalues: Labels, numbers: list[float]) -> int:
        first = self._take_cells(len(numbers))
        self.cells[first : first + len(numbers)] = memoryview(array("d", numbers))
        try:
            self._publish(SeriesRecord(family.number, labelvalues, first))
        except (LedgerFull, UnicodeEncodeError):  # before anything was written; else the next holder has the cells
            self._holes.add(first, len(numbers))
            raise
        return first

    def _take_cells(self, count: int) -> int:
        first = self._holes.take(count)
        if first is None and (larger := self._holes.take_larger(count)) is not None:
            first, size = larger
            self._holes.add(first + count, size - count)
        if first is not None:
            _reserve(self._file, CELLS_AT + 8 * first, 8 * count)  # and zero
            return first
        first, end = self._cells_end, self._cells_end + count
        if end > self.layout.cells:
            raise LedgerFull(f"{self.path} is full")
        if end > self._cells_reserved:
            self._cells_reserved = self._reserve(CELLS_AT + 8 * first, 8 * count, CELLS_AT, self.layout.index_at) // 8
        self._cells_end = end
        LONG.pack_into(self._map_, CELLS_END_AT, end)
        return first

    def _publish(self, record: Record) -> None:
        """Write a record and know it from then on."""
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
        LONG.pack_into(self._map_, WRITING_AT, slot)
        if slot == self._index_end:
            SLOT.pack_into(self._map_, end, 0, 0)  # whatever lies behind it is not a record
        else:
            WORD.pack_into(self._map_, slot + WORD.size, 0)
        self._map_[slot + SLOT.size : slot + size] = payload
        WORD.pack_into(self._map_, slot + WORD.size, seal_payload(payload))
        if slot == self._index_end:
            WORD.pack_into(self._map_, slot, size)
            LONG.pack_into(self._map_, END_AT, end)
            self._index_end = end
        self._apply(slot, record)
        LONG.pack_into(self._map_, WRITING_AT, 0)

    def _retract(self) -> None:
        """Take back a record whose writing a signal handler interrupted, unless it is known."""
        slot = self._read_long(WRITING_AT)
        if not slot:
            return
        if slot == self._index_end:
            LONG.pack_into(self._map_, END_AT, slot)
            WORD.pack_into(self._map_, slot, 0)
        else:
            size, state = SLOT.unpack_from(self._map_, slot)
            payload = self._map_[slot + SLOT.size : slot + size]
            if state != seal_payload(payload) or not self._knows(decode(payload)):
                self._blank(slot, size)
                LONG.pack_into(self._map_, WRITING_AT, 0)
                self._free.add(slot, size)
                return
        LONG.pack_into(self._map_, WRITING_AT, 0)

    def _free_slot(self, slot: int) -> int:
        """Forget the record in a slot; return its size."""
        size: int = WORD.unpack_from(self._map_, slot)[0]
        state = free_state(seal_payload(self._map_[slot + SLOT.size : slot + size]))
        WORD.pack_into(self._map_, slot + WORD.size, state)
        return size

    def _blank(self, slot: int, size: int) -> None:
        """Make a free slot of one that may hold half a record."""
        WORD.pack_into(self._map_, slot + WORD.size, 0)
        self._map_[slot + SLOT.size : slot + size] = b" " * (size - SLOT.size)
        self._free_slot(slot)

    def _reserve(self, begin: int, length: int, base: int, limit: int) -> int:
        """Reserve these bytes and the rest of their piece of the area from `base` to `limit`.

        Nothing may be in use from `begin` to `limit`: what lies before in the piece was reserved when it was written.
        Returns how far the reserved space reaches from `base`.
        """
        end = -(-(begin - base + length) // PIECE) * PIECE
        _reserve(self._file, begin, min(base + end, limit) - begin)
        return end

    def _tidy(self) -> None:
        """Note which series the last holder touched, and forget those that nobody did for long.

        Numbers that are not finite are zero from here on, and what gauges said went with their process.
        """
        now, scraped = time.time(), self.settled_at
        cells, senseless = self.cells, []
        for family in list(self.families.values()):
            if family.type == "gauge":
                self.forget(family)
                continue
            width, growing = STATE + family.width, family.growing
            for labelvalues, first in list(family.series.items()):
                row: list[Any] = cells[first : first + width].tolist()
                is_sound = math.isfinite(sum(row))
                if not is_sound:  # or the sum of them is too large
                    for cell, number in enumerate(row, first):
                        if not math.isfinite(number):
                            cells[cell] = row[cell - first] = 0.0
                            senseless.append(f"{family.name}{list(labelvalues)}")
                activity = sum(row[STATE:][growing])
                if activity != row[1] or not is_sound:
                    cells[first + 1], cells[first + 2] = activity if math.isfinite(activity) else 0.0, now
                elif row[2] < min(scraped, now - FORGET_SECONDS):
                    self.forget(family, labelvalues)
        if senseless:
            logger.warning(
                "%s: %s numbers were not finite and begin at zero, in %s and %s other series.",
                self.path,
                len(senseless),
                senseless[0],
                len(set(senseless)) - 1,
            )
        if self._free.count > len(self._slots) // 4:
            content = [
                (
                    FamilyRecord(
                        family.number,
                        family.name,
                        family.type,
                        family.help,
                        family.unit,
                        family.labelnames,
                        family.bounds,
                        family.mode,
                    ),
                    [
                        (labelvalues, cells[first : first + STATE + family.width].tolist())
                        for labelvalues, first in family.series.items()
                    ],
                )
                for family in self.families.values()
                if family.series
            ]
            self._renew(content, settled_at=scraped, opened_at=self._read_number(OPENED_AT))

    def _renew(self, content: Content, *, settled_at: float, opened_at: float) -> None:
        """Put a new file with this content in the place of the old one, which stays as it is until then."""
        temporary = self.path.with_name(f".{self.path.name}.new")
        temporary.unlink(missing_ok=True)
        old, self._file = self._file, _open_locked(temporary)
        if hasattr(self, "cells"):
            self.cells.release()
            self._map_.close()
        try:
            self._map()
            for number, (record, series) in enumerate(content):
                self._publish(record._replace(number=number))
                for labelvalues, numbers in series:
                    self._add_series(self._by_number[number], labelvalues, numbers)
            NUMBER.pack_into(self._map_, SETTLED_AT, settled_at)
            NUMBER.pack_into(self._map_, OPENED_AT, opened_at)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(old)

    def _note_holder(self) -> None:
        LONG.pack_into(self._map_, HOLDER_AT, 0)  # until the rest is there
        for number, value in enumerate(_identify_process(), 1):
            LONG.pack_into(self._map_, HOLDER_AT + number * LONG.size, value)
        LONG.pack_into(self._map_, HOLDER_AT, os.getpid())
        NUMBER.pack_into(self._map_, OPENED_AT, time.time())

    def _read_long(self, at: int) -> int:
        return LONG.unpack_from(self._map_, at)[0]  # type: ignore[no-any-return]

    def _read_number(self, at: int) -> float:
        return NUMBER.unpack_from(self._map_, at)[0]  # type: ignore[no-any-return]

    def _checksum(self, cells_end: int, index_end: int) -> int:
        """CRC-32 of the cells and the index up to these ends; never OPEN, and never 0, which nobody wrote.

        They are read from the file: what a damaged number points at may not be backed by memory.
        """
        cells = zlib.crc32(os.pread(self._file, 8 * cells_end, CELLS_AT))
        index_at = self.layout.index_at
        checksum = zlib.crc32(os.pread(self._file, index_end - index_at, index_at), cells)
        return checksum if checksum not in (0, OPEN) else 1


def _identify_process() -> tuple[int, int]:
    """Return when this process started, in clock ticks since the boot, and its pid namespace; 0 where unknown."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()  # man 5 proc: the 22nd
        return int(fields[19]), os.stat("/proc/self/ns/pid").st_ino
    except (OSError, ValueError, LookupError):
        return 0, 0


def _open_locked(path: Path) -> int:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            status = os.fstat(file)
            if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
                raise PermissionError(f"{path} is not a file of this user")
            lock_file(file)
            if os.path.samestat(os.stat(path), status):  # else the former holder has just renewed it
                return file
            os.close(file)
        except BlockingIOError:
            os.close(file)
            if time.monotonic() > deadline:
                raise LedgerLocked(f"Another process has {path} open") from None
            time.sleep(0.01)
        except FileNotFoundError:
            os.close(file)
        except BaseException:
            os.close(file)
            raise


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


def _is_text(labelvalues: tuple[str, ...]) -> bool:
    """Whether UTF-8 can encode the label values: JSON can write lone surrogates down, and expositions cannot."""
    try:
        "".join(labelvalues).encode()
    except (UnicodeEncodeError, TypeError):
        return False
    return True
