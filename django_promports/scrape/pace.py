"""Slices: how long a scrape keeps the interpreter before other threads get it."""

from __future__ import annotations

from collections.abc import Generator
from time import perf_counter

# A request waits this long for the interpreter at most. That is little beside the 5 ms of sys.getswitchinterval(), and
# long enough that a switch of threads, some 20 us, does not matter.
SLICE_SECONDS = 0.0005

Slices = Generator[None, None, None]  # work that yields between two slices


class Turn:
    """The time that this thread has had the interpreter."""

    def __init__(self) -> None:
        self._end = perf_counter() + SLICE_SECONDS / 2

    def is_over(self) -> bool:
        return perf_counter() >= self._end

    def rest(self) -> Slices:
        """Give the interpreter up once, then start another turn."""
        yield
        self._end = perf_counter() + SLICE_SECONDS / 2
