"""Acts: a queue of changes that any thread may request. They are made one at a time, and no thread waits long.

Python runs finalizers and signal handlers in the middle of whatever a thread does, and they may request a change too.
So a thread that is making one already, or does not get the lock soon, leaves it to the thread that has the lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

# Seconds that a thread waits for the lock. The second is for opening and closing a ledger, when the next step depends
# on it.
PATIENCE_SECONDS, LONG_PATIENCE_SECONDS = 0.05, 5.0


class Acts:
    """A queue of changes; its length is how many wait. try_: makes one, and raises nothing."""

    def __init__(self, try_: Callable[[Callable[[], None]], None]) -> None:
        self._try = try_
        self.begin_in_child()

    def __len__(self) -> int:
        return len(self._waiting)

    def begin_in_child(self) -> None:
        """Start with an empty queue and a free lock in a forked child: another thread may have held it at the fork."""
        self._lock = threading.RLock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_acting = False

    def do(self, act: Callable[[], None], seconds: float = PATIENCE_SECONDS) -> None:
        """Make a change, after those that were requested before.

        It is made on return, unless this thread is in the middle of another change, or another thread has the lock for
        longer than `seconds`. Then that thread makes this change as well.
        """
        self._waiting.append(act)
        lock = self._lock  # if the act forks, the child has another one
        while self._waiting and lock.acquire(timeout=seconds):
            try:
                if self._is_acting:
                    return
                self._is_acting = True
                try:
                    while self._waiting:
                        self._try(self._waiting.popleft())
                finally:
                    self._is_acting = False
            finally:
                lock.release()
