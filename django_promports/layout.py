"""The layout of a ledger file, version 3: offsets, sizes, and how index records are encoded and found.

docs/ledger-format.md is the specification. This module needs neither fcntl nor mmap, so that any process can use it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from django_promports.kinds import KINDS

MAGIC = b"promport"
VERSION = 3
BYTE_ORDER = 0x01020304
HEADER = struct.Struct("=8sIIQ32s")  # magic, version, byte order, size, site; its CRC-32 follows
# Native formats: struct writes them with one store, but "=I" byte by byte, so that a kill could leave half a number.
WORD = struct.Struct("I")
LONG = struct.Struct("Q")
NUMBER = struct.Struct("d")
SLOT = struct.Struct("II")  # size of the whole slot, state; the payload follows

SITE_AT, INDEX_AT_AT = 24, 64
SEAL_AT, END_AT, CELLS_END_AT, WRITING_AT = 1024, 1032, 1040, 1048
SCRAPED_AT, OPENED_AT, SETTLED_AT = 2048, 2056, 2088
HOLDER = struct.Struct("=QQQ")  # pid, start in clock ticks since the boot, inode of the pid namespace
HOLDER_AT = 2064
CELLS_AT = 4096
OPEN = int.from_bytes(b"OPEN", "big")  # not 0: a sealed file whose seal was torn out must not look open
# Cells of a series before its values: created, activity at the last claim, time of the last claim that found another.
# Only the modules of the ledger know them. For all others a series begins with its first value.
STATE = 3
CREATED = -STATE  # where the created time is, counted from the first value
# How long a forgotten series' cells are left alone, by the monotonic clock. A reader has to be faster.
QUARANTINE_SECONDS = 10.0


@dataclass(frozen=True)
class Layout:
    """The sizes of a ledger: bytes of the file, which is sparse, and the number of its cells."""

    size: int = 64 * 1024 * 1024
    cells: int = 2 * 1024 * 1024  # a hundred thousand histograms

    @property
    def index_at(self) -> int:
        return CELLS_AT + 8 * self.cells

    def pack_header(self, site: bytes) -> bytes:
        """Return the first bytes of a ledger of this site."""
        header = HEADER.pack(MAGIC, VERSION, BYTE_ORDER, self.size, site)
        return (header + WORD.pack(zlib.crc32(header))).ljust(INDEX_AT_AT, b"\0") + LONG.pack(self.index_at)


LAYOUT = Layout()


class LedgerDamaged(Exception):
    """The file is not a ledger of this site, or not a whole one."""


def hash_site(site: str) -> bytes:
    """Return what stands for a site in its ledgers."""
    return hashlib.sha256(site.encode()).digest()


def read_header(file: int, size: int) -> tuple[int, bytes]:
    """Return the version and the site of a ledger that should have this size. Raises LedgerDamaged."""
    has = os.fstat(file).st_size
    if has != size:
        raise LedgerDamaged(f"it has {has} bytes instead of {size}")
    head = os.pread(file, HEADER.size + WORD.size, 0)
    magic, version, byte_order, file_size, site = HEADER.unpack_from(head)
    if magic != MAGIC or head[HEADER.size :] != WORD.pack(zlib.crc32(head[: HEADER.size])):
        raise LedgerDamaged("it does not begin like a ledger")
    if version not in (2, VERSION) or byte_order != BYTE_ORDER or file_size != size:
        raise LedgerDamaged("another version of django_promports wrote it")
    return version, site


def seal_content(file: int, layout: Layout, cells_end: int, index_end: int) -> int:
    """Return the seal of cells and index up to these ends; never OPEN, and never 0, which nobody wrote.

    They are read from the file: what a damaged number points at may not be backed by memory.
    """
    cells = zlib.crc32(os.pread(file, 8 * cells_end, CELLS_AT))
    seal = zlib.crc32(os.pread(file, index_end - layout.index_at, layout.index_at), cells)
    return seal if seal not in (0, OPEN) else 1


def check_seal(file: int, layout: Layout, cells_end: int, index_end: int) -> None:
    """Raise LedgerDamaged if somebody changed the file after it was closed."""
    seal = WORD.unpack(os.pread(file, WORD.size, SEAL_AT))[0]
    if seal != OPEN and seal != seal_content(file, layout, cells_end, index_end):
        raise LedgerDamaged("somebody changed it while no process had it open")


Labels = tuple[str, ...]


class FamilyRecord(NamedTuple):
    """An index record that describes a metric. mode: a gauge's multiprocess mode."""

    number: int
    name: str
    type: str
    help: str
    unit: str
    labelnames: Labels
    bounds: Labels
    mode: str

    @property
    def shape(self) -> tuple[str, Labels, Labels]:
        """What has to stay the same for its numbers to mean the same."""
        return self.type, self.labelnames, self.bounds

    @property
    def width(self) -> int:
        """How many values a series has. Raises KeyError for an unknown type."""
        return KINDS[self.type].count_values(self.bounds)


class SeriesRecord(NamedTuple):
    """An index record of a series. family: its number. begin: the first of its cells, before its values."""

    family: int
    labelvalues: Labels
    begin: int


Record = FamilyRecord | SeriesRecord
# Families, and of each the label values and all cells of its series.
Content = list[tuple[FamilyRecord, list[tuple[Labels, list[float]]]]]


def encode(record: Record) -> bytes:
    """Return a record as the payload of a slot of the size that fits it. Raises UnicodeEncodeError."""
    what = "series" if isinstance(record, SeriesRecord) else "family"
    payload = json.dumps([what, *record], ensure_ascii=False, separators=(",", ":")).encode()
    return payload.ljust(_round(len(payload) + SLOT.size) - SLOT.size)


def decode(payload: bytes) -> Record:
    """Return the record in a payload. Raises ValueError, TypeError or LookupError if it holds none."""
    return _make_record(json.loads(payload))


def _make_record(parsed: Any) -> Record:
    what, *rest = parsed
    if what == "series":
        family, labelvalues, begin = rest
        return SeriesRecord(family, tuple(labelvalues), begin)
    if what != "family":
        raise ValueError(what)
    number, name, type_, help_, unit, labelnames, bounds, mode = rest
    "".join([name, unit, *labelnames]).encode()
    return FamilyRecord(number, name, type_, help_, unit, tuple(labelnames), tuple(bounds), mode)


def _round(size: int) -> int:
    """Round up to one of eight sizes between two powers of two, so that slots of like records can be used again."""
    step = max(8, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def seal_payload(payload: bytes) -> int:
    """Return the state of a published slot with this payload; never 0, nor what a free slot has."""
    checksum = zlib.crc32(payload, len(payload) + SLOT.size)
    return checksum if checksum not in (0, 0xFFFFFFFF) else 1


def free_state(state: int) -> int:
    """Return the state of a slot that was published with this one and is free now."""
    return state ^ 0xFFFFFFFF


class Index(NamedTuple):
    """What an index holds. Each is known by where its slot begins in the file.

    free, unsure: sizes of slots that are free, and of those that are being written or damaged. end: where the next slot
    can begin. is_whole: whether slots lead to the end, one after the other.
    """

    records: dict[int, Record]
    free: dict[int, int]
    unsure: dict[int, int]
    end: int
    is_whole: bool


def read_index(index: bytes, begin: int) -> Index:
    """Read an index, or the first part of one, that begins at this place of the file.

    Raises ValueError, TypeError or LookupError for a record that is complete but malformed.
    """
    places: list[int] = []
    payloads: list[bytes] = []
    free: dict[int, int] = {}
    unsure: dict[int, int] = {}
    at, is_whole = 0, True
    while at + SLOT.size <= len(index):
        size, state = SLOT.unpack_from(index, at)
        if not size:
            break
        if size % 8 or size <= SLOT.size or at + size > len(index):
            is_whole = False
            break
        payload = index[at + SLOT.size : at + size]
        published = seal_payload(payload)
        if state == published:
            places.append(begin + at)
            payloads.append(payload)
        elif state == free_state(published):
            free[begin + at] = size
        else:
            unsure[begin + at] = size
        at += size
    parsed = json.loads(b"[%b]" % b",".join(payloads))  # at once: much faster than one by one
    records = dict(zip(places, map(_make_record, parsed), strict=True))
    return Index(records, free, unsure, begin + at, is_whole)


def sort_records(records: Iterable[tuple[int, Record]]) -> list[tuple[int, Record]]:
    """Return records with families before series: a used slot may hold either."""
    return sorted(records, key=lambda placed: isinstance(placed[1], SeriesRecord))
