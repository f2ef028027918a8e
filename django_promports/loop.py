"""The event loop: many sockets in one thread. A conversation is a generator that yields what it waits for.

Conversations have deadlines, can wait for each other, and can share one result (single flight).

No socket blocks, so that no peer can delay another; only the selector waits. So the same code works in a thread, under
gevent (where the selector yields to the hub) and in a command.

It is not asyncio, for two reasons. Under gevent all greenlets share one OS thread: while an asyncio loop runs in it,
every ORM call of the site raises SynchronousOnlyOperation. And processes fork: a forked child that closes an asyncio
loop that it inherited, with its server, deregisters the listener from the epoll that both share, which stops the
parent's accepts.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from itertools import islice
from types import GeneratorType
from typing import Any, TypeVar, cast

from django_promports.greenlets import make_selector
from django_promports.logs import LimitedLog

T = TypeVar("T")
# What a conversation yields: the socket and the events it waits for, NEXT_TURN to let the others go first, or None to
# wait until the loop wakes it.
Wait = tuple[socket.socket, int] | object | None
Steps = Generator[Wait, None, T]

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
NEXT_TURN: Wait = object()
CHUNK = 65536
# Seconds to wait in give_way(). A thread that releases the GIL and requests it at once gets it back before another
# thread has woken up, so a real wait is needed. This is the shortest that epoll supports.
REST_SECONDS = 0.001


class Dropped(Exception):
    """A conversation was ended before it had a result."""


class Conversation:
    """A generator in progress, the socket that is closed with it, and when (time.monotonic) it is dropped.

    Once it is_over it has a result or an error, for the conversations that join it.
    """

    __slots__ = (
        "deadline",
        "error",
        "is_expected",
        "is_over",
        "joiners",
        "result",
        "socket",
        "steps",
        "thrown",
        "waiting_on",
    )

    def __init__(self, steps: Steps[Any], seconds: float | None, sock: socket.socket | None) -> None:
        self.steps = steps
        self.socket = sock
        self.waiting_on: int | None = None
        self.thrown: BaseException | None = None  # raised in its next step: the selector refused its socket
        self.is_expected = False  # it will be joined, perhaps only after its end
        self.joiners: list[Conversation] = []
        self.is_over = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.set_deadline(seconds)

    def set_deadline(self, seconds: float | None) -> None:
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def outcome(self) -> Any:
        """Return the result of a conversation that is over, or raise its error."""
        if self.error is not None:
            raise self.error
        return self.result

    def close(self) -> None:
        try:
            if not cast(
                "GeneratorType[Any, Any, Any]", self.steps
            ).gi_running:  # a step may fork, and the child closes what it inherited
                self.steps.close()
        finally:
            if self.socket is not None:  # a generator that has not started runs no `finally`
                self.socket.close()


class Loop:
    """Advances conversations, one step at a time.

    An error in a conversation ends only that one. It is raised in those that joined it, and logged if none did. Between
    two turns no conversation holds a lock or is inside a step, so another thread may take the next turn.
    """

    def __init__(self, log: LimitedLog | None = None) -> None:
        self._log = log or LimitedLog()
        self._conversations: dict[Conversation, None] = {}  # oldest first
        # A waiting conversation is in one place: here, _resting, _sleeping, the joiners of another, or the selector.
        self._due: deque[Conversation] = deque()
        self._resting: list[Conversation] = []
        self._sleeping: dict[Conversation, float] = {}  # and when (time.monotonic) each continues
        self._shared: dict[Hashable, Conversation] = {}
        self._current: Conversation | None = None
        self._selector = make_selector()
        self._wakee, self._waker = socket.socketpair()
        self._wakee.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._wakee, READ, None)

    def spawn(self, steps: Steps[Any], seconds: float | None = None, sock: socket.socket | None = None) -> Conversation:
        """Start a conversation, and drop it after so many seconds. The socket is closed if it is dropped or fails."""
        conversation = Conversation(steps, seconds, sock)
        self._conversations[conversation] = None
        self._due.append(conversation)
        return conversation

    def drop(self, conversation: Conversation) -> None:
        """End a conversation at its current step, unless it is over; its generator cleans up in `finally`."""
        self._forget(conversation)
        self._end(conversation, error=Dropped())

    def current(self) -> Conversation:
        """Return the conversation whose step is running."""
        assert self._current is not None
        return self._current

    def give_way(self) -> Steps[None]:
        """Release the GIL for a moment, to the threads of the site and to the other conversations."""
        self._resting.append(self.current())
        yield None

    def sleep(self, seconds: float) -> Steps[None]:
        """Continue at the first turn after so many seconds."""
        self._sleeping[self.current()] = time.monotonic() + seconds
        yield None

    def join(self, conversation: Conversation) -> Steps[Any]:
        """Wait until a conversation is over and return its result. Raises its error, or Dropped."""
        if not conversation.is_over:
            conversation.joiners.append(self.current())
            yield None
        return conversation.outcome()

    def share(self, key: Hashable, begin: Callable[[], Steps[T]]) -> Steps[T]:
        """Run a conversation and return its result; concurrent calls with the same key share it (single flight)."""
        shared = self._shared.get(key)
        if shared is None or shared.is_over:
            # A conversation of its own, so that it continues if the first caller is dropped.
            shared = self._shared[key] = self.spawn(self._keep_shared(key, begin()))
        return cast("T", (yield from self.join(shared)))

    def _keep_shared(self, key: Hashable, steps: Steps[T]) -> Steps[T]:
        try:
            return (yield from steps)
        finally:
            del self._shared[key]

    def gather(self, many: Iterable[Steps[T]], seconds: float, at_once: int = 64) -> Steps[list[T | None]]:
        """Run many conversations, `at_once` of them at a time, and return their results in order.

        One that takes longer than `seconds` is dropped; its result is None. Raises the error of the first that fails.
        """
        results: list[T | None] = []
        remaining = iter(many)
        while batch := list(islice(remaining, at_once)):
            children = [self._spawn_expected(steps, seconds) for steps in batch]
            try:
                for child in children:
                    try:
                        results.append((yield from self.join(child)))
                    except Dropped:
                        results.append(None)
            finally:
                for child in children:
                    self.drop(child)
        return results

    def complete(self, steps: Steps[T]) -> T:
        """Take turns until this conversation is over; return its result or raise its error."""
        conversation = self._spawn_expected(steps)
        while not conversation.is_over:
            self.turn()
        return cast("T", conversation.outcome())

    def _spawn_expected(self, steps: Steps[Any], seconds: float | None = None) -> Conversation:
        conversation = self.spawn(steps, seconds)
        conversation.is_expected = True
        return conversation

    def turn(self) -> None:
        """Wait until a conversation can continue or a deadline passes, then advance each that can by one step."""
        if self._resting:
            timeout: float | None = REST_SECONDS
        else:
            timeout = 0.0 if self._due else self._seconds_to_deadline()
        events = self._selector.select(timeout)
        self._due += self._resting
        self._resting.clear()
        for key, _ in events:
            if key.data is None:
                self._drain_wakeups()
            elif key.data.waiting_on == key.fd:  # not dropped by an earlier step of this turn
                self._forget(key.data)
                self._due.append(key.data)
        self._drop_late()
        self._wake_sleepers()
        for _ in range(len(self._due)):  # one that is due again after its step waits for the next turn
            conversation = self._due.popleft()
            if not conversation.is_over:
                self._advance(conversation)

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
        for conversation in self._conversations:
            conversation.waiting_on = None
        for conversation in list(self._conversations):
            self.drop(conversation)
        self._wakee.close()
        self._waker.close()

    def _advance(self, conversation: Conversation) -> None:
        self._current, thrown, conversation.thrown = conversation, conversation.thrown, None
        try:
            wait = next(conversation.steps) if thrown is None else conversation.steps.throw(thrown)
        except StopIteration as end:
            self._end(conversation, result=end.value)
            return
        except BaseException as error:
            self._end(conversation, error=error)
            if is_interrupt(error):
                raise
            return
        finally:
            self._current = None
        if conversation.is_over:  # the step forked, and this is the child, which has closed the loop
            return
        if wait is NEXT_TURN:
            self._due.append(conversation)
        elif wait is not None:
            self._await(conversation, *cast("tuple[socket.socket, int]", wait))

    def _await(self, conversation: Conversation, sock: socket.socket, events: int) -> None:
        try:
            fileno = sock.fileno()
            self._selector.register(fileno, events, conversation)
            conversation.waiting_on = fileno
        except Exception as error:  # the kernel has no room for another one, for example
            conversation.thrown = error
            self._due.append(conversation)

    def _end(self, conversation: Conversation, *, result: Any = None, error: BaseException | None = None) -> None:
        if conversation.is_over:
            return
        self._conversations.pop(conversation)
        self._sleeping.pop(conversation, None)
        conversation.is_over, conversation.result, conversation.error = True, result, error
        joiners = [joiner for joiner in conversation.joiners if not joiner.is_over]
        self._due += joiners
        if error is None:
            return
        try:
            conversation.close()
        except BaseException as failure:
            if is_interrupt(failure):
                raise
            error = failure
        if not (joiners or conversation.is_expected or isinstance(error, Dropped | GeneratorExit)):
            kind = type(error), getattr(conversation.steps, "__qualname__", "")
            self._log.error(kind, "%s failed; the rest of the metrics endpoint continues.", kind[1], exc_info=error)

    def _forget(self, conversation: Conversation) -> None:
        # Before the descriptor is closed: gevent's selector requires that, and the kernel may reuse the number.
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
            self._due.append(conversation)

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [c.deadline for c in self._conversations if c.deadline is not None]
        deadlines += self._sleeping.values()
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _drain_wakeups(self) -> None:
        try:
            self._wakee.recv(CHUNK)
        except BlockingIOError:
            pass


def is_interrupt(error: BaseException) -> bool:
    """Return whether the error is Ctrl-C, which must end the process: in the main thread, or in a greenlet of it."""
    return isinstance(error, KeyboardInterrupt) and threading.main_thread().native_id == threading.get_native_id()


def attempt(sock: socket.socket, operation: Callable[[], T], events: int) -> Steps[T]:
    """Repeat a non-blocking operation until it does not have to wait any more."""
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
    """Return the next bytes, a chunk at most; empty at the end of the stream.

    It waits first, so that a peer that never stops sending leaves the others a turn after each chunk.
    """
    # The selector does not see what OpenSSL has already decrypted.
    yield NEXT_TURN if isinstance(sock, ssl.SSLSocket) and sock.pending() else (sock, READ)
    try:
        return (yield from attempt(sock, lambda: sock.recv(CHUNK), READ))
    except ssl.SSLError:  # closed without a TLS close_notify alert
        return b""


def send_all(sock: socket.socket, data: bytes) -> Steps[None]:
    """Send all of the data, a chunk in each turn."""
    rest = memoryview(data)
    while rest:
        sent = yield from attempt(sock, lambda: sock.send(rest[:CHUNK]), WRITE)  # noqa: B023
        rest = rest[sent:]
        if rest:
            yield NEXT_TURN
