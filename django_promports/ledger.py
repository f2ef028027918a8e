"""The ledger: the file behind a port, in which its counts outlive the process that made them.

The file is mapped into memory, so a count is safe the moment it is written: the kernel owns the pages, whatever
becomes of the process. One process at a time has it open, under flock(2).

Format, version 2, in native byte order. Nothing moves, so that a kill at any instant leaves a readable file:

    0          header: magic, version, byte order, size, SHA-256 of the application's name, CRC-32 of all that
    1024       seal: CRC-32 of cells and index if the last holder closed the file, or OPEN while one has it open
    1032       uint64 end of the index, written after each record
    2048       float64 times in seconds since the epoch: of the last complete scrape, of the last opening
    4096       cells: float64 each
    INDEX_AT   index: records one after the other, each 8-byte aligned; the first with length 0 is the end
               uint32 length, uint32 CRC-32 of the payload, payload: a JSON list
               ["family", name, type, help, unit, [label names], [bucket bounds]], numbered from 0
               ["series", family number, [label values], first cell]
               ["forget", family number, [label values]], or ["forget", family number] for the whole family

A record counts once its length is there, which is written last. A series owns STATE cells (created, activity at the
last claim, time of the last claim that found other activity) and then its values: a counter's one, a summary's count
and sum, a histogram's sum and buckets (each bucket by itself, not cumulated).

The seal covers the cells only when the last holder closed the file; of one whose holder was killed, header, index and
sizes can be verified, and the cells are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import stat
import struct
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django_promports.kinds import KINDS
from django_promports.unix import lock_file

logger = logging.getLogger("django_promports")

MAGIC = b"promport"
VERSION = 2
SIZE = 64 * 1024 * 1024  # sparse: pages that nobody wrote take no memory and no disk
SEAL_AT, END_AT, SCRAPED_AT, OPENED_AT, CELLS_AT = 1024, 1032, 2048, 2056, 4096
OPEN = int.from_bytes(b"OPEN", "big")  # not 0: a sealed file whose seal was torn out must not look open
CELL_COUNT = 2 * 1024 * 1024  # a hundred thousand histograms
INDEX_AT = CELLS_AT + 8 * CELL_COUNT
HEADER = struct.Struct("=8sIIQ32s")
WORD = struct.Struct("=I")
LONG = struct.Struct("=Q")
NUMBER = struct.Struct("=d")
RECORD = struct.Struct("=II")
# Space is reserved in pieces of this size before it is written: a mapped page that the full file system cannot back
# would kill the process (SIGBUS).
PIECE = 64 * 1024
# Cells of a series before its values.
STATE = 3
# A series that nobody touched for this long, and that was scraped since, is dropped at the next claim. Shorter, and a
# counter that grows once an hour would begin anew each time, which PromQL does not count.
FORGET_SECONDS = 24 * 3600.0
# Seconds to wait for the lock: a process that ends frees its port a moment before its files.
LOCK_SECONDS = 0.5


class LedgerLocked(Exception):
    """Another process has this ledger open."""


class LedgerFull(Exception):
    """There is no room for another series, in the ledger or on the file system."""


class LedgerDamaged(Exception):
    """The file is no ledger of this application, or not a whole one."""


class ForeignFolder(PermissionError):
    """The folder belongs to another user."""


@dataclass(eq=False, slots=True)
class Family:
    """What the series of one metric have in common, and the first cell of each, by label values.

    It is an identity: a metric that is made again, in another shape or after it was forgotten, has another family and
    other cells. cells: those of its ledger; reading them after the ledger was closed raises ValueError. width: how many
    values a series has.
    """

    number: int
    name: str
    type: str
    help: str
    unit: str
    labelnames: tuple[str, ...]
    bounds: tuple[str, ...]
    series: dict[tuple[str, ...], int] = field(repr=False)
    cells: memoryview[float] = field(repr=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = KINDS[self.type].count_values(self.bounds)

    @property
    def shape(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """What has to stay the same for its numbers to mean the same."""
        return self.type, self.labelnames, self.bounds

    @property
    def growing(self) -> slice:
        """Which of its values never fall."""
        return KINDS[self.type].growing

    def read(self, firsts: Iterable[int]) -> bytes:
        """Return the values of the series that begin at these cells, as bytes of float64, one after the other."""
        cells, end = self.cells, STATE + self.width
        return b"".join([cells[first + STATE : first + end] for first in firsts])


class Ledger:
    """An open ledger. Whoever has it sees to it that one change ends before another begins.

    families: the metrics that it holds, by name. cells: a memoryview of float64, indexed by cell number. A series'
    values begin STATE cells after its first one. is_new: whether there was no such file before.
    """

    def __init__(self, path: Path, application: str) -> None:
        """Open the file, or make it; drop what nobody touches any more, and what makes no sense.

        Raises LedgerLocked, and OSError if it cannot be opened or is not this user's. A file that is no ledger of
        this application, or damaged, is set aside with a WARNING, and a new one begins.
        """
        self.path = path
        self.families: dict[str, Family] = {}
        self._application = hashlib.sha256(application.encode()).digest()
        self._by_number: list[Family] = []
        self._forgotten = 0
        self._file = _open_locked(path)
        self.is_new = self._is_unwritten()
        try:
            self._map()
            try:
                self._read()
            except LedgerDamaged as damage:
                aside = path.with_name(f"{path.name}.damaged")
                aside.unlink(missing_ok=True)
                os.link(path, aside)  # the path itself is never free for another process
                logger.warning(
                    "%s cannot be continued: %s. It is %s now; its counts begin at zero.", path, damage, aside
                )
                self._renew([])
            else:
                WORD.pack_into(self._map_, SEAL_AT, OPEN)  # before the first cell changes: its holder may be killed
                self._tidy()
        except BaseException:
            self.close(seal=False)
            raise
        NUMBER.pack_into(self._map_, OPENED_AT, time.time())

    def add_family(
        self, name: str, type_: str, help_: str, unit: str, labelnames: tuple[str, ...], bounds: tuple[str, ...]
    ) -> Family:
        """Return the family of this name, made where there is none. One of another shape is forgotten first.

        Raises LedgerFull.
        """
        known = self.families.get(name)
        if known is not None:
            if known.shape == (type_, labelnames, bounds):
                return known
            logger.warning("%s has other labels or buckets than before; its counts begin at zero.", name)
            self.forget(known)
        return self._add_family(name, type_, help_, unit, labelnames, bounds)

    def add_series(self, family: Family, labelvalues: tuple[str, ...], created: float) -> int:
        """Return the first cell of a new series; its values are zero.

        Raises LedgerFull, and UnicodeEncodeError for label values that no exposition can show.
        """
        return self._add_series(family, labelvalues, [created, 0.0, time.time()] + [0.0] * family.width)

    def forget(self, family: Family, labelvalues: tuple[str, ...] | None = None) -> None:
        """Remove a series, or all of a family with the family itself. Their cells are not used again."""
        if labelvalues is None:
            if self.families.get(family.name) is family:
                self._append(["forget", family.number])
                self._forgotten += len(family.series) + 1
                del self.families[family.name]
        elif family.series.pop(labelvalues, None) is not None:
            self._forgotten += 1
            self._append(["forget", family.number, labelvalues])

    def note_scrape(self) -> None:
        """Note that all of it was scraped just now."""
        NUMBER.pack_into(self._map_, SCRAPED_AT, time.time())

    def close(self, *, seal: bool = True, remove: bool = False) -> None:
        """Let another process have it. Sealed, the next holder can tell whether the file rested unharmed.

        Nobody may use the cells any more. In a forked child of the holder (seal=False) this only lets go of what
        the child inherited. remove: remove the file as well.
        """
        if seal:
            # A signal handler may have raised in an append, between the record and our knowledge of it.
            if self._index_end + RECORD.size <= SIZE and WORD.unpack_from(self._map_, self._index_end)[0]:
                RECORD.pack_into(self._map_, self._index_end, 0, 0)
                LONG.pack_into(self._map_, END_AT, self._index_end)
            WORD.pack_into(self._map_, SEAL_AT, self._checksum())
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
        size = os.fstat(self._file).st_size
        if size == SIZE:
            self._map_ = mmap.mmap(self._file, SIZE)
            self.cells = memoryview(self._map_)[CELLS_AT:INDEX_AT].cast("d")
        self._cells_end = self._cells_reserved = 0
        self._index_end = self._index_reserved = INDEX_AT

    def _is_unwritten(self) -> bool:
        """Whether nothing was ever counted in the file: it is new, or its maker was killed before the header."""
        begins = os.pread(self._file, len(MAGIC), 0) + os.pread(self._file, WORD.size, INDEX_AT)
        return not begins.strip(b"\0")

    def _create(self) -> None:
        header = HEADER.pack(MAGIC, VERSION, 0x01020304, SIZE, self._application)
        try:
            _reserve(self._file, 0, CELLS_AT)
            _reserve(self._file, INDEX_AT, RECORD.size)  # where tmpfs is full, even reading a hole is a SIGBUS
        except LedgerFull:
            os.ftruncate(self._file, 0)
            raise
        os.ftruncate(self._file, SIZE)
        # Last: without it the file counts as new.
        os.pwrite(self._file, (header + WORD.pack(zlib.crc32(header))).ljust(SEAL_AT, b"\0") + WORD.pack(OPEN), 0)

    def _read(self) -> None:
        size = os.fstat(self._file).st_size
        if size != SIZE:
            raise LedgerDamaged(f"it has {size} bytes instead of {SIZE}")
        header = self._map_[: HEADER.size]
        if header[:8] != MAGIC or WORD.unpack_from(self._map_, HEADER.size)[0] != zlib.crc32(header):
            raise LedgerDamaged("it does not begin like a ledger")
        if header[:-32] != HEADER.pack(MAGIC, VERSION, 0x01020304, SIZE, b"")[:-32]:
            raise LedgerDamaged("another version of django_promports wrote it")
        if header[-32:] != self._application:
            raise LedgerDamaged("it belongs to another site")
        try:
            while record := self._read_record():
                self._apply(record)
        except (ValueError, TypeError, LookupError, struct.error) as error:
            raise LedgerDamaged(f"its index is damaged at byte {self._index_end} ({error!r})") from None
        if self._index_end < LONG.unpack_from(self._map_, END_AT)[0]:
            raise LedgerDamaged("the end of its index is missing")
        seal = WORD.unpack_from(self._map_, SEAL_AT)[0]
        if seal != OPEN and seal != self._checksum():
            raise LedgerDamaged("somebody changed it while no process had it open")
        # What was written was reserved; it may have been the last of its piece.
        self._cells_reserved = self._index_reserved = 0

    def _read_record(self) -> list[Any]:
        if self._index_end + RECORD.size > SIZE:
            return []
        length, checksum = RECORD.unpack_from(self._map_, self._index_end)
        if length == 0:
            return []
        begin = self._index_end + RECORD.size
        if begin + length > SIZE:
            raise ValueError("too long")
        payload = self._map_[begin : begin + length]
        if zlib.crc32(payload) != checksum:
            raise ValueError("checksum")
        self._index_end = begin + _align(length)
        record = json.loads(payload)
        if not isinstance(record, list):
            raise TypeError("no list")
        return record

    def _apply(self, record: list[Any]) -> None:
        what, *rest = record
        if what == "series":
            number, labelvalues, first = rest
            family = self._by_number[number]
            if first < self._cells_end or first + STATE + family.width > CELL_COUNT:
                raise ValueError("cells")
            self._forgotten += tuple(labelvalues) in family.series  # it was dropped, and came back
            family.series[tuple(labelvalues)] = first
            self._cells_end = first + STATE + family.width
        elif what == "family":
            name, type_, help_, unit, labelnames, bounds = rest
            "".join([name, unit, *labelnames]).encode()
            self._hold(name, type_, help_, unit, tuple(labelnames), tuple(bounds))
        elif what == "forget":
            family = self._by_number[rest[0]]
            if len(rest) > 1:
                del family.series[tuple(rest[1])]
                self._forgotten += 1
            else:
                self._forgotten += len(family.series) + 1
                del self.families[family.name]
        else:
            raise ValueError(what)

    def _add_family(
        self, name: str, type_: str, help_: str, unit: str, labelnames: tuple[str, ...], bounds: tuple[str, ...]
    ) -> Family:
        help_ = str.encode(help_, errors="replace").decode()  # a lone surrogate in it must not cost the counts
        self._append(["family", name, type_, help_, unit, labelnames, bounds])
        return self._hold(name, type_, help_, unit, labelnames, bounds)

    def _hold(
        self, name: str, type_: str, help_: str, unit: str, labelnames: tuple[str, ...], bounds: tuple[str, ...]
    ) -> Family:
        family = Family(len(self._by_number), name, type_, help_, unit, labelnames, bounds, {}, self.cells)
        self._by_number.append(family)
        self.families[name] = family
        return family

    def _add_series(self, family: Family, labelvalues: tuple[str, ...], cells: list[float]) -> int:
        first, end = self._cells_end, self._cells_end + len(cells)
        if end > CELL_COUNT:
            raise LedgerFull(f"{self.path} is full")
        if end > self._cells_reserved:
            self._cells_reserved = self._reserve(CELLS_AT + 8 * first, 8 * len(cells), CELLS_AT, INDEX_AT) // 8
        for position, value in enumerate(cells, first):
            self.cells[position] = value
        index_end, self._cells_end = self._index_end, end
        try:
            self._append(["series", family.number, labelvalues, first])
        finally:  # whatever interrupts this, like a signal handler that raises: no two records have the same cells
            if self._index_end == index_end:
                self._cells_end = first
        family.series[labelvalues] = first
        return first

    def _append(self, record: list[Any]) -> None:
        payload = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        begin = self._index_end + RECORD.size
        end = begin + _align(len(payload))
        if end + RECORD.size > SIZE:
            raise LedgerFull(f"{self.path} is full")
        if end + RECORD.size > self._index_reserved:
            self._index_reserved = INDEX_AT + self._reserve(
                self._index_end, end + RECORD.size - self._index_end, INDEX_AT, SIZE
            )
        self._map_[begin : begin + len(payload)] = payload
        # Whatever lies behind it is no record; then it counts as one itself.
        RECORD.pack_into(self._map_, end, 0, 0)
        WORD.pack_into(self._map_, self._index_end + WORD.size, zlib.crc32(payload))
        WORD.pack_into(self._map_, self._index_end, len(payload))
        LONG.pack_into(self._map_, END_AT, end)
        self._index_end = end

    def _reserve(self, begin: int, length: int, base: int, limit: int) -> int:
        """Reserve these bytes and the rest of their piece of the area from `base` to `limit`.

        Nothing may be in use from `begin` to `limit`: what lies before in the piece was reserved when it was written.
        Returns how far the reserved space reaches from `base`.
        """
        end = -(-(begin - base + length) // PIECE) * PIECE
        _reserve(self._file, begin, min(base + end, limit) - begin)
        return end

    def _tidy(self) -> None:
        """Note which series the last holder touched, and leave out those that nobody did for long.

        Numbers that are not finite are zero from here on, and series are left out that no exposition can show.
        """
        now = time.time()
        scraped = NUMBER.unpack_from(self._map_, SCRAPED_AT)[0]
        cells, senseless = self.cells, []
        for family in list(self.families.values()):
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
                if not _is_text(labelvalues):
                    del family.series[labelvalues]
                    self._forgotten += 1
                elif activity != row[1] or not is_sound:
                    cells[first + 1], cells[first + 2] = activity if math.isfinite(activity) else 0.0, now
                elif row[2] < min(scraped, now - FORGET_SECONDS):
                    del family.series[labelvalues]
                    self._forgotten += 1
        if senseless:
            logger.warning(
                "%s: %s numbers were not finite and begin at zero, in %s and %s other series.",
                self.path,
                len(senseless),
                senseless[0],
                len(set(senseless)) - 1,
            )
        live = sum(len(family.series) for family in self.families.values())
        if self._forgotten > live // 4:
            self._renew(
                [
                    (
                        family,
                        [(values, list(cells[i : i + STATE + family.width])) for values, i in family.series.items()],
                    )
                    for family in self.families.values()
                    if family.series
                ]
            )

    def _renew(self, content: list[tuple[Family, list[tuple[tuple[str, ...], list[float]]]]]) -> None:
        """Put a new file with this content in the place of the old one."""
        scraped = NUMBER.unpack_from(self._map_, SCRAPED_AT)[0] if content else 0.0
        temporary = self.path.with_name(f".{self.path.name}.new")
        temporary.unlink(missing_ok=True)
        old, self._file = self._file, _open_locked(temporary)
        if hasattr(self, "cells"):
            self.cells.release()
            self._map_.close()
        self.families, self._by_number, self._forgotten = {}, [], 0
        try:
            self._map()
            for family, series in content:
                new = self._add_family(
                    family.name, family.type, family.help, family.unit, family.labelnames, family.bounds
                )
                for labelvalues, cells in series:
                    self._add_series(new, labelvalues, cells)
            NUMBER.pack_into(self._map_, SCRAPED_AT, scraped)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(old)

    def _checksum(self) -> int:
        """CRC-32 of everything that the index and its cells say; never OPEN, and never 0, which nobody wrote."""
        cells = zlib.crc32(self._map_[CELLS_AT : CELLS_AT + 8 * self._cells_end])
        checksum = zlib.crc32(self._map_[INDEX_AT : self._index_end], cells)
        return checksum if checksum not in (0, OPEN) else 1


def read_opening(path: Path) -> float | None:
    """Return when a ledger was opened last, in seconds since the epoch; None if there is none."""
    try:
        with path.open("rb") as file:
            return float(NUMBER.unpack(os.pread(file.fileno(), NUMBER.size, OPENED_AT))[0])
    except (OSError, struct.error):
        return None


def make_folder(path: Path) -> bool:
    """Make the folder of the ledgers, for this user only; False if it was there already.

    Raises OSError if it cannot be made, PermissionError if it is a link, or another user's, or others may write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
        return True
    except FileExistsError:
        check_folder(path)
        return False


def check_folder(path: Path) -> None:
    """Raise PermissionError if nobody's ledgers must be in this folder, ForeignFolder if this user's must not."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{path} is no folder, or a link to one")
    if status.st_mode & 0o022:
        raise PermissionError(f"others may write to {path}")
    if status.st_uid != os.geteuid():
        raise ForeignFolder(f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}, who runs this process")


def find_filesystem(path: Path) -> str:
    """Return the type of the file system that the path, or its nearest parent, is on; "" where that is unknown."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    try:
        # man 5 proc: the third field is the device, the one after " - " the type.
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            if line.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return line.partition(" - ")[2].split()[0]
    except OSError:
        pass
    return ""


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


def _align(length: int) -> int:
    return -(-length // 8) * 8
