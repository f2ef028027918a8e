"""Free space inside a ledger, by size. A piece can be kept in quarantine until no reader uses it any more."""

from __future__ import annotations

import time
from collections import deque


class Space:
    """Free pieces, each known by where it begins. quarantine: seconds until a piece that was in use is ready."""

    def __init__(self, quarantine: float = 0.0) -> None:
        self._quarantine = quarantine
        self._ready: dict[int, list[int]] = {}  # where pieces begin, by size
        self._resting: deque[tuple[float, int, int]] = deque()
        self.count = 0

    def give_back(self, begin: int, size: int) -> None:
        """Add a piece that was in use until now: it is quarantined first."""
        self._resting.append((time.monotonic() + self._quarantine, begin, size))
        self.count += 1

    def add(self, begin: int, size: int) -> None:
        """Add a piece that can be used at once."""
        self._ready.setdefault(size, []).append(begin)
        self.count += 1

    def take(self, size: int) -> int | None:
        """Return where a piece of exactly this size begins; None if none is ready."""
        if not self.count:
            return None
        while self._resting and self._resting[0][0] <= time.monotonic():
            _, begin, resting = self._resting.popleft()
            self._ready.setdefault(resting, []).append(begin)
        pieces = self._ready.get(size)
        if not pieces:
            return None
        self.count -= 1
        begin = pieces.pop()
        if not pieces:
            del self._ready[size]
        return begin

    def take_larger(self, size: int) -> tuple[int, int] | None:
        """Return begin and size of the smallest piece that is larger; None if none is ready."""
        if not self._ready:
            return None
        larger = min((ready for ready in self._ready if ready > size), default=None)
        begin = self.take(larger) if larger is not None else None
        return None if larger is None or begin is None else (begin, larger)
