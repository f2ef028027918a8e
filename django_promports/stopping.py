"""Commands that run until a signal stops them: the option for their interval, and waiting for SIGINT or SIGTERM."""

from __future__ import annotations

import contextlib
import math
import select
import signal
import socket
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator


def parse_seconds(text: str) -> float:
    """Parse the seconds of a command-line option."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:  # select() accepts no more than some years
        raise ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[float], bool]]:
    """Provide a function that waits for so many seconds and returns whether SIGINT or SIGTERM has arrived.

    The signal interrupts only that wait, so that no work is left unfinished. A second signal has the effect that it has
    without this context manager.
    """
    wakee, waker = socket.socketpair()
    waker.setblocking(False)
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        restore()
        waker.send(b".")

    try:
        for number in previous:
            signal.signal(number, stop)
        yield lambda seconds: bool(select.select([wakee], [], [], seconds)[0])
    finally:
        restore()
        wakee.close()
        waker.close()
