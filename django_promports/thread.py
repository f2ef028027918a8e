"""The thread that runs a loop: it pauses while the process forks, and is replaced if anything ends it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from django_promports.logs import LimitedLog
from django_promports.loop import Conversation, Loop, is_interrupt

# Seconds to wait for the thread in pause(): longer than even a long response takes to make.
PAUSE_SECONDS = 10.0
# Seconds before a thread that ends repeatedly is replaced, doubled each time. After a thread that ran for
# HEALTHY_SECONDS the count starts again.
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.05, 5.0
HEALTHY_SECONDS = 60.0


class LoopThread:
    """A loop, and the thread that runs it.

    begin: spawns the conversations of a new loop, and returns the one without which the loop is useless. A thread that
    ends while it should run may have left its loop inside a step; then the next one gets a new loop.
    """

    def __init__(self, name: str, begin: Callable[[Loop], Conversation], log: LimitedLog) -> None:
        self._name = name
        self._begin = begin
        self._log = log
        self._lock = threading.Lock()  # guards which thread runs, if any; not held at a fork
        self._thread: threading.Thread | None = None
        self._former: threading.Thread | None = None
        self._closed = False
        self._failures = 0
        self._make_loop()

    def start(self) -> None:
        """Start the thread, or start it again after pause()."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._start()

    def pause(self, seconds: float = PAUSE_SECONDS) -> None:
        """Stop the thread between two turns of the loop until start(), and wait up to `seconds` for it."""
        if not self._lock.acquire(timeout=seconds):  # something has ended a thread while it was starting
            return
        try:
            thread = self._thread
            if thread is None or thread is threading.current_thread():  # a step may fork
                return
            self._thread, self._former = None, thread
        finally:
            self._lock.release()
        self.loop.wake()
        thread.join(seconds)
        if not thread.is_alive():
            _await_end(thread)

    def close(self) -> None:
        """Close the loop for good: after pause(), or in a forked child, which inherits it without the thread."""
        self._closed = True
        self.loop.close()

    def _make_loop(self) -> None:
        self._is_intact = False
        self.loop = Loop(self._log)
        self._vital = self._begin(self.loop)
        self._is_intact = True

    def _start(self) -> None:
        former, self._thread = self._thread, threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._thread = former
            raise

    def _run(self) -> None:
        me = threading.current_thread()
        try:
            self._live(me)
            while not self._is_done(me):
                self._live(me)
        finally:
            # Three times in all: an exception that another thread raises in this one may interrupt the check itself.
            try:
                self._is_done(me)
            finally:
                self._is_done(me)

    def _live(self, me: threading.Thread) -> None:
        error: BaseException | None = None
        began = time.monotonic()
        try:
            self._turn(me)
        except BaseException as failure:
            error = failure
        if self._thread is me and not self._closed:
            self._failures = 1 if time.monotonic() - began > HEALTHY_SECONDS else min(self._failures + 1, 20)
            # The type without the traceback: an exception from outside says nothing about the code that it interrupts.
            name = type(error).__name__ if error else "nothing accepts connections"
            message = "The thread %s ended (%s); another one replaces it. pid=%s"
            self._log.error("thread", message, self._name, name, os.getpid())
        if error is not None and is_interrupt(error):
            raise error

    def _turn(self, me: threading.Thread) -> None:
        if self._former is not None and self._former is not me:  # it may still be in a long step
            self._former.join()
        resume_at = time.monotonic() + self._backoff()
        while self._thread is me and time.monotonic() < resume_at:
            time.sleep(BACKOFF_SECONDS)
        if self._thread is me and not self._is_intact:
            with suppress(Exception):
                self.loop.close()
            self._make_loop()
        while self._thread is me and not self._vital.is_over:
            self._is_intact = False
            self.loop.turn()
            self._is_intact = True
        self._is_intact = not self._vital.is_over

    def _backoff(self) -> float:
        return min(BACKOFF_SECONDS * 2**self._failures, MAX_BACKOFF_SECONDS) if self._failures > 1 else 0.0

    def _is_done(self, me: threading.Thread) -> bool:
        """Start another thread if this one should still run; False if that fails and this one has to continue."""
        with self._lock:
            if self._thread is me and not self._closed:
                self._former = me
                with suppress(Exception):
                    self._start()
            return self._thread is not me or self._closed


def _await_end(thread: threading.Thread) -> None:
    """Wait until a joined thread has ended in the kernel too: at a fork, Python 3.12 asks the kernel how many run."""
    if thread.native_id == threading.get_native_id():  # it was a greenlet
        return
    deadline = time.monotonic() + PAUSE_SECONDS
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < deadline:
        time.sleep(0)
