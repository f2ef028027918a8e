"""Signs between processes of one machine: who waits for a port, and the step-down socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from django_promports import presence
from tests.servers import ROOT

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract unix sockets")


@needs_linux
def test_waiting_processes_are_counted_for_each_range_until_they_stop_waiting_or_end(
    free_ports: range, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    range_, other = free_ports[:4], free_ports[4:]
    assert presence.count_waiting(range_) == 0
    sign = presence.announce_waiting(range_)
    assert sign is not None
    first = hold(f"held = presence.announce_waiting({range_!r})")
    hold(f"held = presence.announce_waiting({range_!r})")
    hold(f"held = presence.announce_waiting({other!r})")

    counts = [presence.count_waiting(range_)]
    assert presence.announce_waiting(range_) is None
    counts.append(presence.count_waiting(range_))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    counts.append(presence.count_waiting(range_))
    sign.close()
    counts.append(presence.count_waiting(range_))

    assert counts == [3, 3, 2, 1]
    assert presence.count_waiting(other) == 1


KEY = b"k" * 32
# A child that says when it begins to wait for its parent, and when that is over.
RELIEVE = (
    "import os, sys; from django_promports import presence\n"
    "print('begun', flush=True); presence.relieve_parent(bytes.fromhex(sys.argv[1]), float(sys.argv[2])); print('done')"
)


def _find_name(key: bytes) -> bytes:
    """Return the name of this process's step-down socket."""
    listener = presence.open_step_down(key)
    assert listener is not None
    with listener:
        return bytes(listener.getsockname())


def _relieve(key: bytes, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RELIEVE, key.hex(), str(seconds)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@needs_linux
def test_a_child_waits_until_its_parent_has_stepped_down() -> None:
    listener = presence.open_step_down(KEY)
    assert listener is not None
    with listener, _relieve(KEY, 60) as child:
        listener.setblocking(True)
        listener.settimeout(30)
        peer, _ = listener.accept()
        with peer:
            assert presence.is_child(peer)
            assert child.poll() is None
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
        assert child.communicate(timeout=30)[0] == "done\n"


@needs_linux
@pytest.mark.parametrize("key", [b"", KEY], ids=["without a key", "with the key"])
def test_a_stranger_who_listens_under_the_name_of_the_parent_delays_nobody(
    key: bytes, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    hold(f"held = socket.socket(socket.AF_UNIX); held.bind({_find_name(key)!r}); held.listen()")

    with _relieve(key, 600) as child:
        assert child.communicate(timeout=30)[0] == "begun\ndone\n"


@needs_linux
def test_a_stranger_whose_queue_is_full_delays_nobody(hold: Callable[[str], subprocess.Popen[str]]) -> None:
    hold(
        f"name = {_find_name(KEY)!r}\n"
        "held = socket.socket(socket.AF_UNIX); held.bind(name); held.listen(0)\n"
        "callers = [socket.socket(socket.AF_UNIX) for _ in range(3)]\n"
        "[caller.setblocking(False) for caller in callers]; [caller.connect_ex(name) for caller in callers]"
    )

    with _relieve(KEY, 600) as child:
        assert child.communicate(timeout=30)[0] == "begun\ndone\n"


@needs_linux
def test_who_has_no_key_cannot_know_the_name_and_takes_no_supervisors_place(
    hold: Callable[[str], subprocess.Popen[str]],
) -> None:
    hold(
        f"names = [b'\\0django_promports/door/{os.getpid()}', {_find_name(b'')!r}, {_find_name(b'guess')!r}]\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in names]\n"
        "[sock.bind(name) for sock, name in zip(held, names)]"
    )

    listener = presence.open_step_down(KEY)

    assert listener is not None
    listener.close()


@needs_linux
def test_nobody_but_a_child_relieves_a_process(hold: Callable[[str], subprocess.Popen[str]]) -> None:
    listener = presence.open_step_down(KEY)
    assert listener is not None
    with listener, socket.socket(socket.AF_UNIX) as stranger:
        listener.setblocking(True)
        stranger.connect(listener.getsockname())
        peer, _ = listener.accept()
        with peer:
            assert not presence.is_child(peer)  # it is this process


@needs_linux
def test_who_has_no_parent_to_relieve_goes_on(hold: Callable[[str], subprocess.Popen[str]]) -> None:
    with _relieve(KEY, 600) as child:
        assert child.communicate(timeout=30)[0] == "begun\ndone\n"
