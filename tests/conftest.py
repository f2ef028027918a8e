from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from django_promports import worker
from tests.matrix import Row, write_table
from tests.servers import ROOT

# Every test gets its own block of ports, below the kernel's ephemeral ports.
BLOCKS = range(12000, 32000, 16)
WIDE_BLOCKS = range(10000, 11980, 36)


rows: list[Row] = []  # the results of this run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers-table",
        type=Path,
        metavar="PAGE",
        help="write the results of the server tests to the table in this page",
    )


def pytest_sessionstart() -> None:
    # A shell starts background jobs with SIGINT ignored, and children would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        rows.extend(value for name, value in report.user_properties if name == "row")  # type: ignore[misc]


def pytest_sessionfinish(session: pytest.Session) -> None:
    page = session.config.getoption("--servers-table")
    if page and rows and not hasattr(session.config, "workerinput"):
        write_table(page, rows)


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Row:
    """The results of a test for one server; they become a row of docs/servers.md."""
    found = Row()
    record_property("row", found)
    return found


@pytest.fixture(autouse=True)
def own_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    """Give each test, and the processes that it starts, a ledger folder of its own."""
    monkeypatch.setenv("DEMO_LEDGER_DIR", str(tmp_path / "ledgers"))
    settings.PROMPORTS_LEDGER_DIR = tmp_path / "ledgers"


@pytest.fixture
def free_ports() -> Iterator[range]:
    """Fifteen consecutive unused ports."""
    with _free_block(BLOCKS) as ports:
        yield ports


@pytest.fixture
def many_free_ports() -> Iterator[range]:
    """Thirty-five consecutive unused ports: as many as the default range has, and some for servers."""
    with _free_block(WIDE_BLOCKS) as ports:
        yield ports


@contextlib.contextmanager
def _free_block(blocks: range) -> Iterator[range]:
    """Give the ports of a block except the first, where a listening socket reserves the block."""
    for first in blocks:
        ports = range(first + 1, first + blocks.step)
        with contextlib.ExitStack() as stack:
            try:
                guard = stack.enter_context(_bound(first))
                guard.listen()
                for port in ports:
                    _bound(port).close()
            except OSError:
                continue
            yield ports
            return
    raise RuntimeError(f"No free block of ports in {blocks}")


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return sock


@pytest.fixture
def program() -> Callable[[str], str]:
    """Find a program that may be missing on a developer's machine, but not in CI."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            if os.environ.get("CI"):
                pytest.fail(f"{name} is missing; .ci/run installs it")
            pytest.skip(f"{name} is not installed")
        return path

    return find


@pytest.fixture
def this_process() -> Iterator[None]:
    """Let the test claim ports in this process, and free them afterwards."""
    yield
    worker.stop()


# A process of its own that holds a socket until its standard input ends.
HOLD = (
    "import socket, sys; from django_promports import ports, presence\n{}\nprint('ready', flush=True); sys.stdin.read()"
)


@pytest.fixture
def hold() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start processes that each hold a socket; they end with the test."""
    children = []

    def start(statement: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD.format(statement)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in children:
        child.communicate(timeout=30)
