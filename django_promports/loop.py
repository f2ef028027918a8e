"""Many sockets, one thread: a conversation is a generator that yields what it waits for.

No socket ever blocks, so that no peer can hold up another; only the selector waits. That makes the same code
right in a thread, under gevent (where the selector yields to the hub) and in a command.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from itertools import islice
from types import GeneratorType
from typing import Any, NoReturn, TypeVar, cast

T = TypeVar("T")
# What a conversation yields: the socket and the events it waits for, or None to wait for resume().
Wait = tuple[socket.socket, int] | None
Steps = Generator[Wait, None, T]

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
CHUNK = 65536
# Seconds of a rest in give_way(). Letting go of the interpreter and asking for it at once gets it back before another
# thread has woken up, so it takes a real wait; this is the shortest that epoll knows.
REST_SECONDS = 0.001


class Conversation:
    """A generator on its way, the socket that is closed with it, and when (time.monotonic) it is dropped."""

    __slots__ = ("deadline", "socket", "steps", "waiting_on")

    def __init__(self, steps: Steps[Any], seconds: float | None, sock: socket.socket | None) -> None:
        self.steps = steps
        self.socket = sock
        self.waiting_on: int | None = None
        self.set_deadline(seconds)

    def set_deadline(self, seconds: float | None) -> None:
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def close(self) -> None:
        if not cast(
            "GeneratorType[Any, Any, Any]", self.steps
        ).gi_running:  # a step may fork, and its child closes what it inherited
            self.steps.close()
        if self.socket is not None:  # a generator that has not begun has no `finally` yet
            self.socket.close()


class Flight:
    """A conversation whose result several others wait for."""

    def __init__(self) -> None:
        self.passengers: list[Conversation] = []
        self.outcome: Callable[[], Any] | None = None  # returns the result, or raises


class Loop:
    """Advances conversations, one step at a time.

    Between two turns no conversation is inside a lock or half-way through anything, and the next turn may be taken by
    another thread.
    """

    def __init__(self) -> None:
        self._conversations: dict[Conversation, None] = {}  # oldest first
        self._resumed: deque[Conversation] = deque()
        self._resting: list[Conversation] = []
        self._sleeping: dict[Conversation, float] = {}  # and when (time.monotonic) each goes on
        self._flights: dict[Hashable, Flight] = {}
        self._current: Conversation | None = None
        self._selector = selectors.DefaultSelector()
        self._wakee, self._waker = socket.socketpair()
        self._wakee.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._wakee, READ, None)

    def spawn(self, steps: Steps[Any], seconds: float | None = None, sock: socket.socket | None = None) -> Conversation:
        """Begin a conversation; it is dropped after that many seconds, and the socket closed if it is."""
        conversation = Conversation(steps, seconds, sock)
        self._conversations[conversation] = None
        self._resumed.append(conversation)
        return conversation

    def resume(self, conversation: Conversation) -> None:
        """Let a conversation that yielded None take its next step."""
        self._resumed.append(conversation)

    def drop(self, conversation: Conversation) -> None:
        """End a conversation where it stands; its generator cleans up in `finally`."""
        self._forget(conversation)
        self._conversations.pop(conversation, None)
        self._sleeping.pop(conversation, None)
        conversation.close()

    def current(self) -> Conversation:
        """Return the conversation whose step is running."""
        assert self._current is not None
        return self._current

    def give_way(self) -> Steps[None]:
        """Let everybody else have the interpreter for a moment, the site's threads included."""
        self._resting.append(self.current())
        yield None

    def sleep(self, seconds: float) -> Steps[None]:
        """Go on after so many seconds, or as soon as a turn comes after that."""
        self._sleeping[self.current()] = time.monotonic() + seconds
        yield None

    def share(self, key: Hashable, begin: Callable[[], Steps[T]]) -> Steps[T]:
        """Hold a conversation and return its result; all who ask for the same key meanwhile have that result too."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight()
            # On its own, so that it goes on if who asked first hangs up.
            self.spawn(self._fly(key, flight, begin()))
        flight.passengers.append(self.current())
        while flight.outcome is None:
            yield None
        return cast("T", flight.outcome())

    def _fly(self, key: Hashable, flight: Flight, steps: Steps[Any]) -> Steps[None]:
        try:
            result = yield from steps
            flight.outcome = lambda: result
        except Exception as error:
            failure = error
            flight.outcome = lambda: _raise(failure)
        finally:
            del self._flights[key]
            for passenger in flight.passengers:
                self.resume(passenger)

    def gather(self, many: Iterable[Steps[T]], seconds: float, at_once: int = 64) -> Steps[list[T | None]]:
        """Hold many conversations, so many at once, and return their results in order: None where one was dropped."""
        parent = self.current()
        results: list[T | None] = []

        def keep(index: int, steps: Steps[T]) -> Steps[None]:
            try:
                results[index] = yield from steps
            finally:
                self.resume(parent)

        remaining = iter(many)
        while batch := list(islice(remaining, at_once)):
            start = len(results)
            results += [None] * len(batch)
            children = [self.spawn(keep(start + i, steps), seconds) for i, steps in enumerate(batch)]
            while any(child in self._conversations for child in children):
                yield None
        return results

    def complete(self, steps: Steps[T]) -> T:
        """Run until this conversation ends and return its result."""
        results: list[T] = []

        def keep() -> Steps[None]:
            results.append((yield from steps))

        conversation = self.spawn(keep())
        while conversation in self._conversations:
            self.turn()
        return results[0]

    def turn(self) -> None:
        """Wait until a conversation can go on or a deadline passes, and advance what can."""
        if self._resting:
            timeout: float | None = REST_SECONDS
        else:
            timeout = 0.0 if self._resumed else self._seconds_to_deadline()
        events = self._selector.select(timeout)
        self._resumed += self._resting
        self._resting.clear()
        for key, _ in events:
            if key.data is None:
                self._drain_wakeups()
            elif key.data.waiting_on == key.fd:  # not dropped by an earlier step of this turn
                self._advance(key.data)
        self._drop_late()
        self._wake_sleepers()
        self._advance_resumed()

    def wake(self) -> None:
        """Make a turn() that waits in another thread return."""
        try:
            self._waker.send(b".")
        except OSError:  # full (it will wake anyway) or closed
            pass

    def close(self) -> None:
        """Drop every conversation and close every descriptor. In a forked child this leaves the parent's untouched."""
        # First: deregistering from an inherited epoll would deregister the parent's sockets.
        self._selector.close()
        for conversation in list(self._conversations):
            conversation.waiting_on = None
            conversation.close()
        self._conversations.clear()
        self._wakee.close()
        self._waker.close()

    def _advance_resumed(self) -> None:
        for _ in range(len(self._resumed)):  # one that resumes itself lets the others have their turn
            conversation = self._resumed.popleft()
            if conversation in self._conversations:
                self._advance(conversation)

    def _advance(self, conversation: Conversation) -> None:
        self._forget(conversation)
        self._current = conversation
        try:
            wait = next(conversation.steps)
        except BaseException as error:
            self._conversations.pop(conversation, None)
            if not isinstance(error, StopIteration):
                raise
            return
        finally:
            self._current = None
        if wait is not None:
            sock, events = wait
            conversation.waiting_on = sock.fileno()
            self._selector.register(conversation.waiting_on, events, conversation)

    def _forget(self, conversation: Conversation) -> None:
        # Before the descriptor is closed: gevent's selector insists, and the kernel may hand out the number again.
        if conversation.waiting_on is not None:
            self._selector.unregister(conversation.waiting_on)
            conversation.waiting_on = None

    def _drop_late(self) -> None:
        now = time.monotonic()
        for conversation in [c for c in self._conversations if c.deadline is not None and c.deadline <= now]:
            self.drop(conversation)

    def _wake_sleepers(self) -> None:
        now = time.monotonic()
        for conversation in [c for c, moment in self._sleeping.items() if moment <= now]:
            del self._sleeping[conversation]
            self._resumed.append(conversation)

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [c.deadline for c in self._conversations if c.deadline is not None]
        deadlines += self._sleeping.values()
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _drain_wakeups(self) -> None:
        try:
            self._wakee.recv(CHUNK)
        except BlockingIOError:
            pass


def attempt(sock: socket.socket, operation: Callable[[], T], events: int) -> Steps[T]:
    """Repeat a non-blocking operation until it does not have to wait."""
    while True:
        try:
            return operation()
        except (BlockingIOError, InterruptedError):
            yield sock, events
        except ssl.SSLWantReadError:
            yield sock, READ
        except ssl.SSLWantWriteError:
            yield sock, WRITE


def receive(sock: socket.socket) -> Steps[bytes]:
    """Return what arrives next; empty at the end of the stream."""
    try:
        return (yield from attempt(sock, lambda: sock.recv(CHUNK), READ))
    except ssl.SSLError:  # cut off without TLS' own goodbye
        return b""


def send_all(sock: socket.socket, data: bytes) -> Steps[None]:
    """Send all of it."""
    rest = memoryview(data)
    while rest:
        sent = yield from attempt(sock, lambda: sock.send(rest[:CHUNK]), WRITE)  # noqa: B023
        rest = rest[sent:]


def _raise(error: Exception) -> NoReturn:
    raise error
