"""manage.py await_scrape: it returns once everything that was counted before it began has been scraped."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from django.core.management import CommandError
from pytest_django import Settings

from django_promports.conf import Conf
from tests.commands import answering, call
from tests.servers import Child, export_targets, gunicorn, manage, prometheus, request, running, scrape, send_requests
from tests.workers import await_heir, kill, worker

pytestmark = pytest.mark.once


@pytest.fixture
def port_range(free_ports: range, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> range:
    # The settings of a test have no module, and those of the workers do.
    monkeypatch.setattr(Conf, "project", "demo_site.settings")
    settings.PROMPORTS_PORT_RANGE = free_ports[:4]
    return free_ports[:4]


@contextlib.contextmanager
def awaiting(tmp_path: Path, ports: Sequence[int], *options: str, **env: str) -> Iterator[Child]:
    """Run the command, and wait until it waits."""
    words = [sys.executable, "manage.py", "await_scrape", "--verbosity", "2", *options]
    log = tmp_path / f"await{time.monotonic_ns()}.log"
    with running(*words, log=log, DEMO_PORT_RANGE=f"{ports[0]}-{ports[-1]}", **env) as child:
        child.wait_until(lambda: "Not scraped yet: " in child.output(), "it waits")
        yield child


def pending(child: Child) -> list[int]:
    """Return the ports that the command has named last."""
    last = [line for line in child.output().splitlines() if line.startswith("Not scraped yet: ")][-1]
    return [int(port) for port in re.findall(r"(\d+) \(", last)]


def status(child: Child) -> int:
    child.wait_until(lambda: child.process.poll() is not None, "it ends")
    assert "Traceback" not in child.output()
    return child.process.returncode


def test_it_waits_for_a_complete_scrape_of_each_worker(free_ports: range, tmp_path: Path) -> None:
    with gunicorn(tmp_path, free_ports[:5], workers=3) as site:
        site.wait_for_workers(3)
        assert set(send_requests(60, lambda _: site.request())) == {200}
        for port in site.live():
            scrape(port)
        send_requests(20, lambda _: site.request())

        with awaiting(tmp_path, free_ports[:4]) as command:
            assert pending(command) == list(free_ports[:3])
            first, *others = site.live()
            request(f"http://127.0.0.1:{first}/metrics", "HEAD")
            request(f"http://127.0.0.1:{first}/metrics?name[]=up")
            for port in others:
                scrape(port)
            command.wait_until(lambda: pending(command) == [first], "it waits for the last one")
            assert command.process.poll() is None
            scrape(first)
            assert status(command) == 0


def test_a_worker_that_was_replaced_meanwhile_has_to_be_scraped_too(free_ports: range, tmp_path: Path) -> None:
    with gunicorn(tmp_path, free_ports[:5], workers=1) as site:
        ((port, pid),) = site.wait_for_workers(1).items()
        with awaiting(tmp_path, free_ports[:4]) as command:
            os.kill(pid, signal.SIGKILL)
            site.wait_until_replaced([pid], 1)
            scrape(port)
            assert status(command) == 0


def test_it_waits_until_an_heir_was_scraped(port_range: range, tmp_path: Path) -> None:
    first, second = port_range[:2]
    with worker(tmp_path, port_range, 5) as one, worker(tmp_path, port_range, 7) as other:
        scrape(first)
        scrape(second)
        kill(other)
        with awaiting(tmp_path, port_range) as command:
            assert pending(command) == [first, second]
            scrape(first)
            command.wait_until(lambda: pending(command) == [second], "it waits for the heir")
            await_heir(second, one)
            assert status(command) == 0


def test_what_an_heir_has_settled_is_not_awaited(port_range: range, tmp_path: Path) -> None:
    first, second = port_range[:2]
    with worker(tmp_path, port_range, 5, "CHANCE_SECONDS=0") as one, worker(tmp_path, port_range, 7) as other:
        scrape(first)
        kill(other)
        await_heir(second, one)
        with awaiting(tmp_path, port_range) as command:
            command.wait_until(lambda: pending(command) == [first], "it waits for the worker only")
            scrape(first)
            assert status(command) == 0


def test_a_timeout_names_the_ports(port_range: range, tmp_path: Path) -> None:
    first, second, third = port_range[:3]
    with worker(tmp_path, port_range, 5), worker(tmp_path, port_range, 7), worker(tmp_path, port_range, 9) as last:
        scrape(second)
        kill(last)
        with answering(third, b"220 mail ESMTP\r\n"), pytest.raises(CommandError) as raised:
            call("await_scrape", "--timeout", "0.1")

    assert re.fullmatch(
        rf"Not scraped within 0\.1 s: {first} \(never scraped\), {second} \(last scraped \d+ s ago\), "
        rf"{third} \(another program has the port\)\.",
        str(raised.value),
    )


def test_the_exit_status_of_a_timeout_is_1_and_nothing_else_is_printed(port_range: range, tmp_path: Path) -> None:
    range_ = f"{port_range[0]}-{port_range[-1]}"
    with worker(tmp_path, port_range, 5):
        done = manage("await_scrape", "--timeout=0.1", DEMO_PORT_RANGE=range_)

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"CommandError: Not scraped within 0.1 s: {port_range[0]} (never scraped).\n"


@pytest.mark.parametrize("folder", [True, False], ids=["no ledger", "in memory"])
def test_where_nothing_was_counted_it_returns_at_once_and_is_quiet(
    folder: bool, port_range: range, settings: Settings, tmp_path: Path
) -> None:
    if not folder:
        settings.PROMPORTS_LEDGER_DIR = None

    assert call("await_scrape", "--timeout", "0.001") == ("", "")


def test_processes_that_count_in_memory_are_asked(port_range: range, tmp_path: Path) -> None:
    first, second = port_range[:2]
    memory = {"DEMO_LEDGER_DIR": ""}
    with worker(tmp_path, port_range, 5, **memory), worker(tmp_path, port_range, 7, **memory):
        scrape(first)
        scrape(second)
        with awaiting(tmp_path, port_range, **memory) as command:
            assert pending(command) == [first, second]
            scrape(second)
            command.wait_until(lambda: pending(command) == [first], "it waits for the last one")
            scrape(first)
            assert status(command) == 0


def test_a_process_that_counts_in_memory_beside_the_ledgers_is_asked_too(port_range: range, tmp_path: Path) -> None:
    first, second = port_range[:2]
    folder = tmp_path / "ledgers"
    folder.mkdir(0o700)
    (folder / f"{second}.ledger").mkdir()  # no process can open it
    with worker(tmp_path, port_range, 5), worker(tmp_path, port_range, 7) as two:
        assert "Counting in memory" in two.output()
        with awaiting(tmp_path, port_range) as command:
            assert pending(command) == [first, second]
            scrape(first)
            scrape(second)
            assert status(command) == 0


def test_a_site_that_has_ended_is_not_awaited_until_the_timeout(port_range: range, tmp_path: Path) -> None:
    with worker(tmp_path, port_range, 5) as one:
        kill(one)

    began = time.monotonic()
    with pytest.raises(CommandError, match=rf"^Not scraped: {port_range[0]} \(no process of the site runs"):
        call("await_scrape", "--timeout", "600")
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_line(number: signal.Signals, port_range: range, tmp_path: Path) -> None:
    with worker(tmp_path, port_range, 5), awaiting(tmp_path, port_range, "--timeout", "600") as command:
        command.process.send_signal(number)

        assert status(command) == 1
        assert f"Stopped by a signal. Not scraped yet: {port_range[0]} (never scraped)." in command.output()


@pytest.mark.succession
def test_a_pod_that_waits_before_it_is_deleted_takes_no_count_with_it(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    *metric_ports, site_port, prometheus_port = free_ports[:6]
    folder = tmp_path / "prometheus"
    folder.mkdir()
    # With this interval, hardly any of the last requests are scraped by chance.
    with prometheus(program("prometheus"), folder, prometheus_port, seconds=5) as server:
        export_targets(folder / "targets/django.json", metric_ports)
        with gunicorn(tmp_path, [*metric_ports, site_port], workers=3) as site:
            live = site.wait_for_workers(3)
            server.child.wait_until(lambda: len(server.up()) == 3, "Prometheus scrapes the workers")
            answered = send_requests(100, lambda _: site.request()).count(200)
            os.kill(live[metric_ports[2]], signal.SIGKILL)
            answered += send_requests(100, lambda _: site.request()).count(200)
            done = manage("await_scrape", DEMO_PORT_RANGE=f"{metric_ports[0]}-{metric_ports[-1]}")
            os.killpg(site.child.pid, signal.SIGKILL)
            shutil.rmtree(tmp_path / "ledgers")

        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert server.count("django_http_requests_before_middlewares_total") >= answered


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "soon"])
def test_a_timeout_is_a_number_of_seconds(timeout: str) -> None:
    with pytest.raises(CommandError, match=r"--timeout: .* is not a number of seconds above 0"):
        call("await_scrape", f"--timeout={timeout}")
