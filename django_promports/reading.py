"""Read the ledgers of other processes while they count in them, even if a file is truncated or replaced meanwhile.

Nothing is mapped: a hole that a full file system cannot back, or a truncated file, would kill the reader (SIGBUS).
docs/ledger-format.md specifies what a reader has to do; this module follows it.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from django_promports.layout import (
    CELLS_AT,
    CELLS_END_AT,
    CREATED,
    END_AT,
    HOLDER,
    HOLDER_AT,
    INDEX_AT_AT,
    LAYOUT,
    LONG,
    NUMBER,
    OPEN,
    OPENED_AT,
    QUARANTINE_SECONDS,
    SCRAPED_AT,
    SEAL_AT,
    SETTLED_AT,
    SITE_AT,
    STATE,
    WORD,
    FamilyRecord,
    Labels,
    LedgerDamaged,
    Record,
    SeriesRecord,
    check_seal,
    read_header,
    read_index,
    sort_records,
)
from django_promports.processes import Identity, is_running
from django_promports.version2 import read_old_families

# Attempts to read a file that changes while it is read, or that takes too long to read.
ATTEMPTS = 5

Families = dict[str, tuple[FamilyRecord, dict[Labels, list[float]]]]


class Status(NamedTuple):
    """What a ledger records about its holder and its scrapes.

    site: see hash_site(). opened_at, scraped_at, settled_at: seconds since the epoch, or 0. holder: the last one.
    is_sealed: whether that one closed it.
    """

    site: bytes
    opened_at: float
    scraped_at: float
    settled_at: float
    holder: Identity
    is_sealed: bool

    @property
    def is_owed(self) -> bool:
        """Whether it may have counts that were never scraped."""
        return self.opened_at > self.settled_at

    @property
    def is_held(self) -> bool:
        """Whether its holder is known to have it still. The lock tells it for certain, and the claim of the port."""
        return not self.is_sealed and is_running(self.holder) is True


class Reading(NamedTuple):
    """What a ledger held at one moment. families: by name; of each series created time and values, by label values."""

    status: Status
    families: Families


class Reader:
    """Reads one ledger repeatedly, and opens the new file if the old one was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._known: tuple[bytes, dict[int, Record]] = b"", {}

    def read(self) -> Reading | None:
        """Return what the ledger holds; None if the file does not exist, or is still empty.

        Raises LedgerDamaged if it is not a ledger or is damaged, TimeoutError if reading takes too long each time, and
        OSError if it cannot be read.
        """
        for _ in range(ATTEMPTS):
            file = self._open()
            if file is None:
                return None
            began = time.monotonic()
            reading = self._read(file)
            if time.monotonic() - began < QUARANTINE_SECONDS:
                return reading
        raise TimeoutError(f"{self.path} was not read within {QUARANTINE_SECONDS:.0f} seconds")

    def close(self) -> None:
        """Close the file; the next read() opens it again."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _open(self) -> int | None:
        try:
            status = os.stat(self.path)
            if self._file is None or not os.path.samestat(status, os.fstat(self._file)):
                self.close()
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            self.close()
        return self._file

    def _read(self, file: int) -> Reading | None:
        status = os.fstat(file)
        if not status.st_size:
            return None
        version, _ = read_header(file, status.st_size)
        head = os.pread(file, CELLS_AT, 0).ljust(CELLS_AT, b"\0")
        if version == 2:
            families = self._read_version_2(file)
        else:
            families = self._read_families(
                file, LONG.unpack_from(head, INDEX_AT_AT)[0], LONG.unpack_from(head, END_AT)[0]
            )
        return Reading(_read_status(head), families)

    def _read_families(self, file: int, index_at: int, end: int) -> Families:
        size = min(end, os.fstat(file).st_size) - index_at
        if size <= 0 or index_at <= CELLS_AT:
            return {}
        before = self._read_records(file, size, index_at)
        cells = _read_cells(file, before.values())
        after = self._read_records(file, size, index_at)
        if after is not before:  # a record that is in both was valid all the time
            before = {slot: record for slot, record in before.items() if after.get(slot) == record}
        return _collect(before, cells)

    def _read_records(self, file: int, size: int, index_at: int) -> dict[int, Record]:
        index = os.pread(file, size, index_at)
        if index != self._known[0]:
            try:
                self._known = index, read_index(index, index_at).records
            except (ValueError, TypeError, LookupError) as error:
                raise LedgerDamaged(f"the index of {self.path} is damaged ({error!r})") from None
        return self._known[1]

    def _read_version_2(self, file: int) -> Families:
        for attempt in range(ATTEMPTS):
            try:
                content = read_old_families(file, LAYOUT)
            except (ValueError, TypeError, LookupError) as error:
                if attempt == ATTEMPTS - 1:
                    raise LedgerDamaged(f"the index of {self.path} is damaged ({error!r})") from None
                time.sleep(0.001)  # its holder may be writing
            else:
                return {
                    record.name: (record, {labels: [cells[0], *cells[STATE:]] for labels, cells in series})
                    for record, series in content
                }
        raise AssertionError


def read_status(path: Path) -> Status | None:
    """Return what a ledger records about its holder and its scrapes; None if there is no ledger."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            read_header(file, os.fstat(file).st_size)
            return _read_status(os.pread(file, CELLS_AT, 0).ljust(CELLS_AT, b"\0"))
        finally:
            os.close(file)
    except (OSError, LedgerDamaged, struct.error):
        return None


def read_locked(path: Path, file: int) -> Reading:
    """Return what a ledger holds that this process has locked. Raises OSError, and LedgerDamaged as its holder would.

    file: open at this path. It stays open.
    """
    version, _ = read_header(file, LAYOUT.size)
    index_at, cells_end, end = (
        LONG.unpack(os.pread(file, LONG.size, at))[0] for at in (INDEX_AT_AT, CELLS_END_AT, END_AT)
    )
    if version != 2 and not (
        index_at == LAYOUT.index_at and cells_end <= LAYOUT.cells and index_at <= end <= LAYOUT.size
    ):
        raise LedgerDamaged("its index is damaged")
    reader = Reader(path)
    try:
        reading = reader.read()
    finally:
        reader.close()
    if reading is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if version != 2:
        check_seal(file, LAYOUT, cells_end, end)
    return reading


def find_damage(path: Path) -> str:
    """Return why the ledger at this path cannot be read; empty if it can, if there is none, or if it is being made."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                return "it is not a file"
            if status.st_size:
                read_locked(path, file)
        finally:
            os.close(file)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # its numbers may be any
        return str(error)
    return ""


def _read_status(head: bytes) -> Status:
    (site,) = struct.unpack_from("32s", head, SITE_AT)
    opened_at, scraped_at, settled_at = (NUMBER.unpack_from(head, at)[0] for at in (OPENED_AT, SCRAPED_AT, SETTLED_AT))
    holder = Identity(*HOLDER.unpack_from(head, HOLDER_AT))
    if not holder.pid:  # it is being written, or by version 0.1
        holder = Identity(0, 0, 0)
    return Status(site, opened_at, scraped_at, settled_at, holder, WORD.unpack_from(head, SEAL_AT)[0] != OPEN)


def _read_cells(file: int, records: Iterable[Record]) -> memoryview[float]:
    """Return the cells up to the last one that a record may need, as far as they are there."""
    records = list(records)
    widths = {one.number: STATE + one.width for one in records if isinstance(one, FamilyRecord)}
    end = max((one.begin + widths.get(one.family, 0) for one in records if isinstance(one, SeriesRecord)), default=0)
    cells = os.pread(file, 8 * end, CELLS_AT)
    return memoryview(cells[: len(cells) // 8 * 8]).cast("d")


def _collect(records: dict[int, Record], cells: memoryview[float]) -> Families:
    families: Families = {}
    by_number: dict[int, tuple[FamilyRecord, dict[Labels, list[float]]]] = {}
    for _, record in sort_records(records.items()):
        if isinstance(record, FamilyRecord):
            former = families.get(record.name)
            if former is None or former[0].number < record.number:
                families[record.name] = by_number[record.number] = record, {}
                if former is not None:
                    del by_number[former[0].number]
        elif record.family in by_number:
            family, series = by_number[record.family]
            first, end = record.begin + STATE, record.begin + STATE + family.width
            if end <= len(cells):
                series[record.labelvalues] = [cells[first + CREATED], *cells[first:end]]
    return families
