"""The thread that turns a loop: it pauses while the process forks, and is replaced if anything ends it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from django_promports.logs import LimitedLog
from django_promports.loop import Conversation, Loop, is_interrupt

# Seconds to wait for the thread at pause(): longer than the longest answer takes to make.
PAUSE_SECONDS = 10.0
# Seconds before a thread that ends again and again is replaced, doubled each time; and how long one must have lived
# for its end to count as the first.
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.05, 5.0
HEALTHY_SECONDS = 60.0


class LoopThread:
    """A loop, and the thread that turns it.

    begin: spawns in a new loop what it is for, and returns the conversation without which the loop is useless. A thread
    that ends while it should run may have left its loop in the middle of something, so the next one has a new loop.
    """

    def __init__(self, name: str, begin: Callable[[Loop], Conversation], log: LimitedLog) -> None:
        self._name = name
        self._begin = begin
        self._log = log
        self._lock = threading.Lock()  # for whether and which thread runs; nobody holds it at a fork
        self._thread: threading.Thread | None = None
        self._former: threading.Thread | None = None
        self._closed = False
        self._failures = 0
        self._make_loop()

    def start(self) -> None:
        """Turn the loop from now on, or again."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._start()

    def pause(self, seconds: float = PAUSE_SECONDS) -> None:
        """Stop the thread between two turns of the loop, until start(); wait so many seconds for it."""
        with self._lock:
            thread = self._thread
            if thread is None or thread is threading.current_thread():  # a step may fork
                return
            self._thread, self._former = None, thread
        self.loop.wake()
        thread.join(seconds)
        if not thread.is_alive():
            _await_end(thread)

    def close(self) -> None:
        """Close the loop for good: after pause(), or in a forked child, which has inherited it without the thread."""
        self._closed = True
        self.loop.close()

    def _make_loop(self) -> None:
        self._is_sound = False
        self.loop = Loop(self._log)
        self._vital = self._begin(self.loop)
        self._is_sound = True

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
            while not self._is_through(me):
                self._live(me)
        finally:
            # Again, and once more: what ends a thread from outside may have come in the middle of this.
            try:
                self._is_through(me)
            finally:
                self._is_through(me)

    def _live(self, me: threading.Thread) -> None:
        error: BaseException | None = None
        began = time.monotonic()
        try:
            self._turn(me)
        except BaseException as failure:
            error = failure
        if self._thread is me and not self._closed:
            self._failures = 1 if time.monotonic() - began > HEALTHY_SECONDS else min(self._failures + 1, 20)
            # The type, and not the traceback: what ends a thread from outside did nothing wrong where it hit.
            name = type(error).__name__ if error else "nothing accepts connections"
            said = "The thread %s ended (%s); another one goes on. pid=%s"
            self._log.error("thread", said, self._name, name, os.getpid())
        if error is not None and is_interrupt(error):
            raise error

    def _turn(self, me: threading.Thread) -> None:
        if self._former is not None and self._former is not me:  # it may still be in a step that takes its time
            self._former.join()
        resume_at = time.monotonic() + self._backoff()
        while self._thread is me and time.monotonic() < resume_at:
            time.sleep(BACKOFF_SECONDS)
        if self._thread is me and not self._is_sound:
            with suppress(Exception):
                self.loop.close()
            self._make_loop()
        while self._thread is me and not self._vital.is_over:
            self._is_sound = False
            self.loop.turn()
            self._is_sound = True
        self._is_sound = not self._vital.is_over

    def _backoff(self) -> float:
        return min(BACKOFF_SECONDS * 2**self._failures, MAX_BACKOFF_SECONDS) if self._failures > 1 else 0.0

    def _is_through(self, me: threading.Thread) -> bool:
        """Start another thread if this one should still run; False if that fails, and this one has to go on."""
        with self._lock:
            if self._thread is me and not self._closed:
                self._former = me
                with suppress(Exception):
                    self._start()
            return self._thread is not me or self._closed


def _await_end(thread: threading.Thread) -> None:
    """Wait until the kernel, too, has ended a thread that was joined: Python 3.12 asks it how many there are."""
    if thread.native_id == threading.get_native_id():  # it was a greenlet
        return
    deadline = time.monotonic() + PAUSE_SECONDS
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < deadline:
        time.sleep(0)
