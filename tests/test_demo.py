"""The demo runs, agrees with what it sent, and leaves nothing behind."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import describe, log_in, running

pytestmark = pytest.mark.long


@pytest.mark.parametrize("with_prometheus", [True, False], ids=["prometheus", "alone"])
def test_the_demo_counts_what_it_sent(with_prometheus: bool, program: Callable[[str], str], tmp_path: Path) -> None:
    path = {} if with_prometheus and program("prometheus") else {"PATH": "/nonexistent"}
    command = [sys.executable, "manage.py", "demo", "--duration", "2", "--workers", "2"]
    with running(*command, log=tmp_path / "demo.log", TMPDIR=str(tmp_path), **path) as demo:
        status = demo.wait_until(lambda: {demo.process.poll()} - {None}, "the demo ends", 120)

    assert status == {0}, demo.output()
    assert "They agree" in demo.output()
    assert ("has scraped all of them" if with_prometheus else "no `prometheus` on PATH") in demo.output()
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo.log"]
    assert _find_login(demo.output())
    assert "prometheus/dashboards" in demo.output()
    ports = set(re.findall(r"http://127.0.0.1:(\d+)/metrics\s", demo.output()))
    assert len(ports) == 2
    assert not any(describe(int(port)) for port in ports)


def test_a_kept_demo_runs_until_it_is_told_to_stop(tmp_path: Path) -> None:
    command = [sys.executable, "manage.py", "demo", "--duration", "1", "--workers", "1", "--keep"]
    with running(*command, log=tmp_path / "demo.log", TMPDIR=str(tmp_path), PATH="/nonexistent") as demo:
        demo.wait_until(lambda: "Running until Ctrl-C" in demo.output(), "the demo has told its story", 60)
        (port,) = set(re.findall(r"http://127.0.0.1:(\d+)/metrics\s", demo.output()))
        answered = describe(int(port))
        page, name, password = _find_login(demo.output())
        drawn = log_in(page, name, password)

        demo.process.send_signal(signal.SIGINT)
        status = demo.wait_until(lambda: {demo.process.poll()} - {None}, "the demo ends")

    assert answered
    assert b"1 live" in drawn
    assert status == {0}, demo.output()
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo.log"]


def _find_login(output: str) -> tuple[str, str, str]:
    """Return the address of the site's page, with a user name and a password."""
    found = re.search(r"page +(http://127.0.0.1:\d+/metrics/) +\(log in as (\w+) with (\S+)\)", output)
    assert found, output
    address, name, password = found.groups()
    return address, name, password
