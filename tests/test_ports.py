"""Which ports can be claimed, which process gets which, and which processes wait."""

from __future__ import annotations

import errno
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence

import pytest

from django_promports import ports
from tests.commands import BECOME_NOBODY, run_python


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
both_families = pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])

LISTEN = (
    "held = socket.socket(); [held.setsockopt(socket.SOL_SOCKET, option, 1) for option in {}]; "
    "held.bind(('127.0.0.1', {})); held.listen()"
)
RACE = """
import os, sys
from django_promports import ports

range_ = range(int(sys.argv[1]), int(sys.argv[2]))
(gate, open_gate), (results, report), (end, let_end) = os.pipe(), os.pipe(), os.pipe()
for _ in range(100):
    if os.fork() == 0:
        os.close(open_gate)
        os.close(let_end)
        os.read(gate, 1)
        try:
            claim = ports.claim("127.0.0.1", range_)
            os.write(report, b"%d\\n" % claim.port)
        except BaseException as error:
            os.write(report, f"{error!r}\\n".encode())
        os.read(end, 1)
        os._exit(0)
os.close(open_gate)
os.close(report)
with open(results) as lines:
    print(*(next(lines) for _ in range(100)))
os.close(let_end)
for _ in range(100):
    os.wait()
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (range(19100, 19103), (19100, 19101, 19102)),
        (range(19102, 19099, -1), (19100, 19101, 19102)),
        (range(19100, 19105, 2), (19100, 19102, 19104)),
        ([19107, 19100], (19100, 19107)),
        ((1, 65535), (1, 65535)),
        ("19100-19102", (19100, 19101, 19102)),
        (" 19100 - 19101 ", (19100, 19101)),
        ("19100-19100", (19100,)),
        ("19100", (19100,)),
        ("1-65535", tuple(range(1, 65536))),
    ],
    ids=repr,
)
def test_a_port_range_may_be_written_in_several_ways(value: object, expected: tuple[int, ...]) -> None:
    assert ports.parse_ports(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it is empty"),
        (range(5, 5), "it is empty"),
        (range(19132, 19100), "it is reversed"),
        ("19131-19100", "it is reversed; write 19100-19131"),
        (range(65530, 65537), "65536 is outside 1..65535"),
        (range(10), "0 is outside 1..65535"),
        ([19100, -1], "-1 is outside 1..65535"),
        ("0", "0 is outside 1..65535"),
        ("65535-99999999999999999999", "99999999999999999999 is outside 1..65535"),
        ("", 'it does not parse; write it like "19100-19131"'),
        ("19100-", 'it does not parse; write it like "19100-19131"'),
        ("19100,19101", 'it does not parse; write it like "19100-19131"'),
        ("19100:19131", 'it does not parse; write it like "19100-19131"'),
        ("1e4", 'it does not parse; write it like "19100-19131"'),
        ("١٩١٠٠", 'it does not parse; write it like "19100-19131"'),
        (None, 'it is not a range; write range(19100, 19132) or "19100-19131"'),
        (19100, 'it is not a range; write range(19100, 19132) or "19100-19131"'),
        (True, 'it is not a range; write range(19100, 19132) or "19100-19131"'),
        ({19100}, 'it is not a range; write range(19100, 19132) or "19100-19131"'),
        (b"19100", 'it is not a range; write range(19100, 19132) or "19100-19131"'),
        ([True], "True is not a port number"),
        ([19100.0], "19100.0 is not a port number"),
        (["19100"], "'19100' is not a port number"),
        ([19100, 19101, 19100], "it names a port twice"),
    ],
    ids=repr,
)
def test_a_wrong_port_range_says_what_is_wrong(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ports.parse_ports(value)


@pytest.mark.parametrize(
    ("range_", "written"),
    [
        ((19100,), "19100"),
        ((19100, 19101), "19100-19101"),
        (range(19100, 19132), "19100-19131"),
        ((19100, 19102), "19100,19102"),
    ],
)
def test_contiguous_ports_are_written_as_a_range(range_: Sequence[int], written: str) -> None:
    assert ports.format_ports(range_) == written


@pytest.mark.parametrize(
    ("address", "family"), [("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET), ("::1", socket.AF_INET6)]
)
def test_the_address_decides_the_family(address: str, family: socket.AddressFamily) -> None:
    found, target = ports.resolve(address, 19100)

    assert (found, target[:2]) == (family, (address, 19100))


@pytest.mark.parametrize("address", ["localhost", "", "127.1", "127.0.0.1:80", "[::1]", "127.0.0.1 "])
def test_what_is_no_ip_address_is_not_looked_up(address: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(address))} is not an IP address$"):
        ports.resolve(address)


@both_families
def test_a_claim_is_the_lowest_free_port(address: str, free_ports: range) -> None:
    first = ports.claim(address, free_ports)
    second = ports.claim(address, free_ports)
    third = ports.claim(address, free_ports)
    with first.listener, third.listener:
        second.listener.close()

        again = ports.claim(address, free_ports)

        with again.listener, socket.create_connection((address, again.port)):
            assert [first.port, second.port, third.port] == list(free_ports[:3])
            assert again.port == second.port
            assert again.listener.getsockname()[:2] == (address, again.port)


@both_families
def test_a_full_range_says_which(address: str, free_ports: range) -> None:
    first, second = free_ports[:2]
    with ports.claim(address, [first, second]).listener, ports.claim(address, [first, second]).listener:
        message = f"No free port in {first}-{second} on {address}: 2 of 2 taken."

        with pytest.raises(ports.RangeFull, match=f"^{re.escape(message)}$"):
            ports.claim(address, [first, second])


@both_families
def test_a_freed_port_is_claimed_at_once_although_its_connections_are_in_time_wait(
    address: str, free_ports: range
) -> None:
    port, listener = ports.claim(address, free_ports)
    with socket.create_connection((address, port)):
        listener.setblocking(True)
        listener.accept()[0].close()  # who closes first has the connection in TIME_WAIT
    listener.close()
    with socket.socket(ports.resolve(address)[0]) as plain, pytest.raises(OSError, match="in use"):
        plain.bind((address, port))

    again = ports.claim(address, free_ports)

    again.listener.close()
    assert again.port == port


def test_a_claim_is_shared_with_nobody(free_ports: range) -> None:
    port, listener = ports.claim("127.0.0.1", free_ports)

    with listener:
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        assert not listener.get_inheritable()
        with pytest.raises(ports.RangeFull):
            ports.claim("127.0.0.1", [port])
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))


@pytest.fixture
def many_free_ports() -> Iterator[range]:
    """More than a hundred ports, below those of free_ports, whose blocks are shorter. The first one is the guard."""
    count = 112
    for first in range(10000, 12000 - count, count):
        try:
            with socket.create_server(("127.0.0.1", first)):
                for port in range(first + 1, first + count):
                    socket.create_server(("127.0.0.1", port)).close()
                yield range(first + 1, first + count)
                return
        except OSError:
            continue
    raise RuntimeError(f"No {count} free ports below 12000")


def test_a_hundred_processes_that_claim_at_once_get_a_hundred_ports(many_free_ports: range) -> None:
    done = run_python(RACE, str(many_free_ports.start), str(many_free_ports.stop))

    assert done.returncode == 0, done.stderr
    claimed = done.stdout.split()
    assert len(set(claimed)) == 100, claimed
    assert {int(port) for port in claimed} <= set(many_free_ports)


@pytest.mark.parametrize("options", [[socket.SO_REUSEADDR], [socket.SO_REUSEADDR, socket.SO_REUSEPORT]])
def test_a_port_at_which_another_program_listens_is_passed_over(
    options: list[int], free_ports: range, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    hold(LISTEN.format(options, free_ports[0]))

    port, listener = ports.claim("127.0.0.1", free_ports)

    listener.close()
    assert port == free_ports[1]


@needs_ipv6
def test_every_interface_means_ipv4_too(free_ports: range) -> None:
    with socket.create_server(("127.0.0.1", free_ports[0])):
        port, listener = ports.claim("::", free_ports)

    with listener, socket.create_connection(("127.0.0.1", port)), socket.create_connection(("::1", port)):
        assert port == free_ports[1]


@pytest.mark.parametrize("bind", [lambda: ports.claim("192.0.2.1", [19100]), lambda: ports.check_address("192.0.2.1")])
def test_a_foreign_address_is_no_full_range(bind: Callable[[], object]) -> None:
    with pytest.raises(OSError, match="Cannot assign requested address") as caught:
        bind()

    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_privileged_port_is_no_full_range(free_ports: range) -> None:
    code = (
        "from django_promports import ports\nports.resolve('127.0.0.1')\n"
        + BECOME_NOBODY
        + (
            "print(open('/proc/sys/net/ipv4/ip_unprivileged_port_start').read())\n"
            f"ports.claim('127.0.0.1', [1, {free_ports[0]}])"
        )
    )

    done = run_python(code)

    if done.stdout.strip() in ("0", "1"):
        pytest.skip("no port is privileged on this machine")
    assert done.stderr.splitlines()[-1] == "PermissionError: [Errno 13] Permission denied"


@both_families
def test_checking_an_address_takes_no_port(address: str) -> None:
    ports.check_address(address)

    with pytest.raises(ValueError, match="'localhost' is not an IP address"):
        ports.check_address("localhost")
