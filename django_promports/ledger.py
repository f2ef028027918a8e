"""The ledger: the file behind a port, in which its counts outlive the process that made them.

The file is mapped into memory, so a count is safe the moment it is written: the kernel owns the pages, whatever
becomes of the process. One process at a time has it open, under flock(2). This module decides what the next holder
takes over from the last one; docs/ledger-format.md is the specification of the file.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from django_promports.family import Family
from django_promports.kinds import KINDS
from django_promports.layout import (
    HOLDER_AT,
    LAYOUT,
    LONG,
    OPENED_AT,
    SCRAPED_AT,
    SETTLED_AT,
    STATE,
    Content,
    FamilyRecord,
    Labels,
    Layout,
    LedgerDamaged,
    hash_site,
    read_header,
)
from django_promports.processes import identify
from django_promports.storage import LedgerFull, Storage
from django_promports.unix import lock_file
from django_promports.version2 import read_old_file

__all__ = ["Family", "Ledger", "LedgerFull", "LedgerLocked"]

logger = logging.getLogger("django_promports")

# A series that did not change for this long, and was scraped since then, is dropped at the next claim. Shorter, and a
# counter that grows once an hour would restart from zero each time, which PromQL does not count.
FORGET_SECONDS = 24 * 3600.0
# Seconds to wait for the lock: a process that ends frees its port a moment before its files.
LOCK_SECONDS = 0.5


class LedgerLocked(Exception):
    """Another process has this ledger open."""


class Copy(NamedTuple):
    """The initial content of a new file."""

    content: Content
    scraped_at: float = 0.0
    opened_at: float = 0.0


class Ledger:
    """An open ledger. Its holder ensures that one change ends before another begins.

    families: the metrics that it holds, by name. cells: a memoryview of float64, indexed by cell number. is_new:
    whether there was no such file before.
    """

    def __init__(
        self,
        path: Path,
        application: str,
        layout: Layout = LAYOUT,
        file: int | None = None,
        former: Iterable[str] = (),
    ) -> None:
        """Open the file, or make it; drop what nobody touches any more, and what makes no sense.

        Raises LedgerLocked, and OSError if it cannot be opened or is not this user's. One of version 2 is converted,
        and one of a former name of the application is continued. A file that is not a ledger of this application, or
        damaged, is set aside with a WARNING, and replaced. file: if it is open and locked already. former: those names.
        """
        self.path = path
        self._site, self._layout = hash_site(application), layout
        self._former, self._is_former = {hash_site(name) for name in former}, False
        if file is not None and not _is_at(path, file):
            os.close(file)
            file = None
        if file is None:
            file = open_locked(path)
        try:
            self.is_new = os.fstat(file).st_size == 0
            self._storage = self._load(file)
        except BaseException:
            os.close(file)
            raise
        if self._storage.file != file:  # held until the new one is in its place
            os.close(file)
        try:
            self._storage.mark_open()
            self._tidy()
            self._note_holder()
        except BaseException:
            self.close(seal=False)
            raise
        self.families, self.cells = self._storage.families, self._storage.cells

    @property
    def scraped_at(self) -> float:
        """Counts that are older were scraped completely; in seconds since the epoch, 0 if it never was."""
        return self._storage.read_number(SCRAPED_AT)

    def add_family(
        self, name: str, type_: str, help_: str, unit: str, labelnames: Labels, bounds: Labels, mode: str = ""
    ) -> Family:
        """Return the family of this name, made where there is none. One of another shape is forgotten first.

        mode: a gauge's multiprocess mode. Raises LedgerFull.
        """
        known = self.families.get(name)
        if known is not None:
            if known.record.shape == (type_, labelnames, bounds):
                return known
            logger.warning("%s has other labels or buckets than before; its counts begin at zero.", name)
            self.forget(known)
        help_ = str.encode(help_, errors="replace").decode()  # a lone surrogate in it must not cost the counts
        return self._storage.add_family(FamilyRecord(0, name, type_, help_, unit, labelnames, bounds, mode))

    def add_series(self, family: Family, labelvalues: Labels, created: float) -> int:
        """Return the cell of the first value of a new series; its values are zero.

        Raises LedgerFull, and UnicodeEncodeError for label values that no exposition can show.
        """
        numbers = [created, 0.0, time.time()] + [0.0] * family.width
        return self._storage.add_series(family, labelvalues, numbers)

    def forget(self, family: Family, labelvalues: Labels | None = None) -> None:
        """Remove a series, or a whole family with its series. Cells rest for a while before they are used again."""
        self._storage.forget(family, labelvalues)

    def note_scrape(self, began: float) -> None:
        """Note that a complete scrape showed the counts of this time (time.time()), unless it was opened later."""
        if began >= self._storage.read_number(OPENED_AT):
            self._storage.write_number(SCRAPED_AT, max(began, self.scraped_at))

    def close(self, *, seal: bool = True, remove: bool = False) -> None:
        """Close the file, and release its lock. A seal shows the next holder whether the file was changed meanwhile.

        The cells must not be used any more. In a forked child of the holder (seal=False) this only lets go of what
        the child inherited. remove: remove the file as well.
        """
        if remove:  # while the lock is held
            self.path.unlink(missing_ok=True)
        self._storage.close(seal=seal)

    def _load(self, file: int) -> Storage:
        """Return the storage in this file, or in a new one that has taken its place."""
        if self.is_new:
            return self._renew(Copy([]))
        try:
            version, site = read_header(file, self._layout.size)
            if site != self._site and site not in self._former:
                raise LedgerDamaged("it belongs to another site")
            if version == 2:
                return self._renew(Copy(*read_old_file(file, self._layout)))
            self._is_former = site != self._site
            storage = Storage(self.path, file, self._layout)
            try:
                storage.load()
            except BaseException:
                storage.unmap()
                raise
            return storage
        except LedgerDamaged as damage:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            aside.unlink(missing_ok=True)
            os.link(self.path, aside)  # the path itself is never free for another process
            logger.warning(
                "%s cannot be continued: %s. It is %s now; its counts begin at zero.", self.path, damage, aside
            )
            return self._renew(Copy([]))

    def _tidy(self) -> None:
        """Note which series the last holder changed, and forget those that did not change for long.

        Numbers that are not finite become zero. Gauges are forgotten: they described a process that has ended.
        """
        now, scraped, storage = time.time(), self.scraped_at, self._storage
        cells, senseless = storage.cells, []
        for family in list(storage.families.values()):
            if family.record.type == "gauge":
                self.forget(family)
                continue
            growing = KINDS[family.record.type].growing
            for labelvalues, first in list(family.series.items()):
                row: list[Any] = cells[family.find_row(first)].tolist()
                is_sound = math.isfinite(sum(row))
                if not is_sound:  # or the sum of them is too large
                    for index, number in enumerate(row):
                        if not math.isfinite(number):
                            cells[first - STATE + index] = row[index] = 0.0
                            senseless.append(f"{family.record.name}{list(labelvalues)}")
                activity = sum(row[STATE:][growing])
                if activity != row[1] or not is_sound:
                    cells[first - 2], cells[first - 1] = activity if math.isfinite(activity) else 0.0, now
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
        if storage.is_sparse or self._is_former:  # a new file has the site's present name
            content = [
                (
                    family.record,
                    [(labels, list(cells[family.find_row(first)])) for labels, first in family.series.items()],
                )
                for family in storage.families.values()
                if family.series
            ]
            with suppress(LedgerFull):  # there is room in the old one
                self._storage = self._renew(Copy(content, scraped, storage.read_number(OPENED_AT)))
                storage.close(seal=False)

    def _renew(self, copy: Copy) -> Storage:
        """Put a new file with this content in the place of the old one, which stays as it is until then."""
        temporary = self.path.with_name(f".{self.path.name}.new")
        temporary.unlink(missing_ok=True)
        file = open_locked(temporary)
        try:
            storage = Storage.create(self.path, file, self._layout, self._site)
            for record, many in copy.content:
                family = storage.add_family(record)
                for labelvalues, numbers in many:
                    storage.add_series(family, labelvalues, numbers)
            storage.write_number(SCRAPED_AT, copy.scraped_at)
            storage.write_number(OPENED_AT, copy.opened_at)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(file)
            raise
        return storage

    def _note_holder(self) -> None:
        storage, holder = self._storage, identify()
        storage.write_long(HOLDER_AT, 0)  # until the rest is there
        for number, value in enumerate(holder[1:], 1):
            storage.write_long(HOLDER_AT + number * LONG.size, value)
        storage.write_long(HOLDER_AT, holder.pid)
        # Whatever the clock did meanwhile: what is counted from now on has not been settled.
        settled_at = storage.read_number(SETTLED_AT)
        storage.write_number(OPENED_AT, max(time.time(), math.nextafter(settled_at, math.inf)))


def open_locked(path: Path, *, seconds: float = LOCK_SECONDS, create: bool = True) -> int:
    """Open a ledger of this user and lock it. Raises LedgerLocked after so many seconds, and OSError."""
    deadline = time.monotonic() + seconds
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    while True:
        file = os.open(path, flags, 0o600)
        try:
            status = os.fstat(file)
            if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
                raise PermissionError(f"{path} is not a file of this user")
            lock_file(file)
            if _is_at(path, file):  # else the former holder has just renewed it
                return file
            os.close(file)
        except BlockingIOError:
            os.close(file)
            if time.monotonic() >= deadline:
                raise LedgerLocked(f"Another process has {path} open") from None
            time.sleep(0.01)
        except BaseException:
            os.close(file)
            raise


def _is_at(path: Path, file: int) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
