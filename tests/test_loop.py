"""Conversations: how they affect each other, and where their results go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trustme

from django_promports import logs
from django_promports import loop as loop_module
from django_promports.loop import CHUNK, NEXT_TURN, READ, Dropped, Loop, Steps, attempt, receive, send_all


@pytest.fixture
def loop() -> Iterator[Loop]:
    with contextlib.closing(Loop()) as loop:
        yield loop


def fail(error: BaseException) -> Steps[Any]:
    yield NEXT_TURN
    raise error


def count_turns(seconds: float = 60) -> Steps[int]:
    """Count steps until the deadline of the conversation that joins."""
    until, steps = time.monotonic() + seconds, 0
    while time.monotonic() < until and steps < 1000:
        steps += 1
        yield NEXT_TURN
    return steps


class Timeout(BaseException):
    """A timeout like that of gevent."""


ERRORS = [RuntimeError("x"), SystemExit(3), asyncio.CancelledError(), Timeout(), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_in_a_conversation_costs_only_that_one(
    error: BaseException, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        loop.spawn(fail(error), sock=ours)

        assert loop.complete(count_turns()) == 1000

        assert theirs.recv(1) == b""
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_handed_to_whoever_joined(
    error: BaseException, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    def give_to(how: str) -> Steps[str]:
        try:
            if how == "gather":
                yield from loop.gather([count_turns(), fail(error)], 60)
            elif how == "share":
                yield from loop.share("key", lambda: fail(error))
            else:
                yield from loop.join(loop.spawn(fail(error)))
        except BaseException as caught:
            return how if caught is error else "another"
        return ""

    for how in ("gather", "share", "join"):
        assert loop.complete(give_to(how)) == how
    with pytest.raises(type(error)):
        loop.complete(fail(error))
    assert not caplog.records


def test_all_who_share_a_conversation_have_its_error(loop: Loop) -> None:
    begun = []

    def begin() -> Steps[None]:
        begun.append(1)
        yield from fail(RuntimeError("no"))

    def ask() -> Steps[str]:
        try:
            yield from loop.share("key", begin)
        except RuntimeError as error:
            return str(error)
        return ""

    assert loop.complete(loop.gather([ask() for _ in range(5)], 60)) == ["no"] * 5
    assert begun == [1]


def test_who_shares_with_one_that_was_dropped_has_the_result(loop: Loop) -> None:
    def work() -> Steps[int]:
        yield from loop.sleep(0.05)
        return 7

    first = loop.spawn(loop.share("key", work))
    second = loop.spawn(loop.share("key", work))
    loop.turn()
    loop.drop(first)

    assert loop.complete(loop.join(second)) == 7
    assert not loop._shared


def test_ctrl_c_ends_a_command_wherever_it_hits(loop: Loop) -> None:
    with pytest.raises(KeyboardInterrupt):
        loop.complete(loop.gather([count_turns(), fail(KeyboardInterrupt())], 60))
    loop.spawn(fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        loop.complete(count_turns())


def test_errors_that_come_again_and_again_are_counted_and_logged_now_and_then(
    loop: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(500):
        loop.spawn(fail(RuntimeError("the same")))
    loop.spawn(fail(ValueError("another")))
    loop.complete(count_turns())
    monkeypatch.setattr(logs, "LIMIT_SECONDS", 0.0)
    loop.spawn(fail(RuntimeError("the same")))
    loop.complete(count_turns())

    assert len(caplog.records) == 3
    assert "(499 more like this" in caplog.records[-1].getMessage()


def test_a_conversation_is_woken_once(loop: Loop) -> None:
    def end() -> Steps[int]:
        return 1
        yield

    def gather_and_sleep() -> Steps[float]:
        assert (yield from loop.gather([end() for _ in range(3)], 60)) == [1, 1, 1]
        began = time.monotonic()
        yield from loop.sleep(0.3)
        return time.monotonic() - began

    assert loop.complete(gather_and_sleep()) >= 0.3


def test_what_is_dropped_has_no_result_and_is_not_news(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    def hang() -> Steps[Any]:
        yield None

    assert loop.complete(loop.gather([hang(), count_turns()], 0.1)) == [None, 1000]
    conversation = loop.spawn(hang())
    loop.drop(conversation)
    with pytest.raises(Dropped):
        loop.complete(loop.join(conversation))
    assert not caplog.records


def test_who_leaves_a_gathering_ends_it(loop: Loop) -> None:
    ended = []

    def hang() -> Steps[None]:
        try:
            yield None
        finally:
            ended.append(1)

    parent = loop.spawn(loop.gather([hang(), hang()], 60))
    loop.turn()
    loop.turn()
    loop.drop(parent)

    assert ended == [1, 1]


def test_a_cleanup_that_fails_costs_nobody_else(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    def clean_up_badly() -> Steps[None]:
        try:
            yield None
        finally:
            raise SystemExit

    conversation = loop.spawn(clean_up_badly())
    loop.turn()
    loop.drop(conversation)

    assert loop.complete(count_turns()) == 1000
    assert len(caplog.records) == 1


def test_a_socket_that_cannot_be_waited_for_is_an_error_where_it_is_waited_for(loop: Loop) -> None:
    def wait() -> Steps[str]:
        closed = socket.socket()
        closed.close()
        try:
            yield closed, READ
        except ValueError:
            return "an error"
        return ""

    assert loop.complete(wait()) == "an error"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for sock in (ours, theirs):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * CHUNK)
        yield ours, theirs


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("size", [CHUNK, 1000])
def test_who_receives_lets_the_others_have_a_turn_after_each_chunk(
    tls: bool, size: int, loop: Loop, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "CHUNK", size)
    ours, theirs = loop.complete(shake_hands(loop, *pair)) if tls else pair
    theirs.send(b"x" * 3 * CHUNK)
    turns, seen = 0, []

    def count() -> Steps[None]:
        nonlocal turns
        while True:
            turns += 1
            yield NEXT_TURN

    def take() -> Steps[None]:
        for _ in range(3):
            assert len((yield from receive(ours))) <= size
            seen.append(turns)

    with ours, theirs:
        loop.spawn(count())
        loop.complete(take())

    assert len(set(seen)) == 3


def test_who_sends_lets_the_others_have_a_turn_after_each_chunk(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    turns = 0

    def count() -> Steps[None]:
        nonlocal turns
        while True:
            turns += 1
            yield NEXT_TURN

    loop.spawn(count())
    loop.complete(send_all(pair[0], b"x" * 3 * CHUNK))

    assert turns >= 2


def shake_hands(loop: Loop, ours: socket.socket, theirs: socket.socket) -> Steps[tuple[socket.socket, socket.socket]]:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    trustme.CA().issue_cert("localhost").configure_cert(server)
    wrapped = (
        server.wrap_socket(ours, server_side=True, do_handshake_on_connect=False),
        client.wrap_socket(theirs, do_handshake_on_connect=False),
    )
    yield from loop.gather([attempt(sock, sock.do_handshake, READ) for sock in wrapped], 60)
    return wrapped


def test_a_deadline_holds_whatever_arrives(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    over = threading.Event()

    def give() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                theirs.send(b"x" * CHUNK)

    def take() -> Steps[None]:
        while (yield from receive(ours)):
            pass

    theirs.settimeout(0.1)
    thread = threading.Thread(target=give)
    thread.start()
    try:
        assert loop.complete(loop.gather([take()], 0.3)) == [None]
    finally:
        over.set()
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_all_of_a_long_answer_arrives(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    data = bytes(range(256)) * 20_000

    def give() -> Steps[None]:
        yield from send_all(theirs, data)
        theirs.shutdown(socket.SHUT_WR)

    def take() -> Steps[Any]:
        received = bytearray()
        while chunk := (yield from receive(ours)):
            received += chunk
        return received

    loop.spawn(give())
    assert loop.complete(take()) == data
