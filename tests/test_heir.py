"""What an heir serves, and what keeps it from serving: real processes, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError
from pytest_django import Settings

from django_promports.conf import Conf
from django_promports.layout import HEADER, SEAL_AT, hash_site
from django_promports.ledger import Ledger
from django_promports.reading import Status, read_status
from tests.commands import BECOME_NOBODY, answering, call, run_python
from tests.data.ledgers.freeze import thaw
from tests.servers import accepts, describe, get, request, scrape, wait_until
from tests.workers import await_heir, kill, worker

FROZEN = Path(__file__).parent / "data/ledgers"


@pytest.fixture(autouse=True)
def port_range(free_ports: range, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> range:
    # The settings of a test have no module, and those of the workers do.
    monkeypatch.setattr(Conf, "project", "demo_site.settings")
    settings.PROMPORTS_PORT_RANGE = free_ports[:4]
    return free_ports[:4]


def status_of(tmp_path: Path, port: int) -> Status:
    status = read_status(tmp_path / f"ledgers/{port}.ledger")
    assert status is not None
    return status


def shown() -> dict[int, dict[str, Any]]:
    return {row["port"]: row for row in json.loads(call("show_targets", "--json")[0])["targets"]}


def test_an_heir_exports_counts_only_and_is_shown_as_one(port_range: range, tmp_path: Path) -> None:
    first, second = port_range[:2]
    with worker(tmp_path, port_range, 5) as one, worker(tmp_path, port_range, 7) as other:
        scrape(first)
        kill(other)
        exported = await_heir(second, one)

        assert exported["work_total"] == 7
        assert not {name for name in exported if name.startswith(("desks", "promports_port", "process_", "python_"))}
        rows = shown()
        assert [(rows[port]["role"], rows[port]["pid"]) for port in (first, second)] == [
            ("worker", one.pid),
            ("heir", one.pid),
        ]
        assert rows[second]["scrapes"]["by"] == "127.0.0.1"
        assert rows[second]["unserved"] is None
        out, _ = call("show_targets")
        assert "2 live (1 for workers that have ended), 2 of 4 ports free" in out
        assert json.loads(get(f"http://127.0.0.1:{first}/targets"))[0]["targets"] == [
            f"127.0.0.1:{first}",
            f"127.0.0.1:{second}",
        ]
        assert f"127.0.0.1:{second}" in call("export_targets", "--live")[0]


def test_a_check_does_not_take_an_heir_for_a_worker(port_range: range, tmp_path: Path) -> None:
    first, second = port_range[:2]
    with worker(tmp_path, port_range, 5) as one, worker(tmp_path, port_range, 7) as other:
        scrape(first)
        kill(other)
        await_heir(second, one)
        out, _ = call("export_targets", "--check")
        assert f"127.0.0.1:{second}  live    pid {one.pid} with the last counts of a worker that has ended\n" in out


def test_where_only_an_heir_answers_no_worker_is_live(
    free_ports: range, port_range: range, settings: Settings, tmp_path: Path
) -> None:
    first, second = port_range[:2]
    with worker(tmp_path, port_range, 5) as one, worker(tmp_path, port_range, 7) as other:
        scrape(first)
        kill(other)
        await_heir(second, one)
        settings.PROMPORTS_PORT_RANGE = free_ports[1:4]  # as a Prometheus that lists these only

        with pytest.raises(CommandError, match=r"no worker is live at 127\.0\.0\.1"):
            call("export_targets", "--check")


def test_what_an_heir_has_shown_is_settled_and_its_port_is_free(port_range: range, tmp_path: Path) -> None:
    second = port_range[1]
    with worker(tmp_path, port_range, 5, "CHANCE_SECONDS=0") as one, worker(tmp_path, port_range, 7) as other:
        scrape(port_range[0])
        kill(other)
        opened_at = status_of(tmp_path, second).opened_at
        await_heir(second, one)
        one.wait_until(lambda: not accepts(second), "the port is free")

    after = status_of(tmp_path, second)
    assert after.settled_at > after.scraped_at > after.opened_at == opened_at
    assert not after.is_owed


def cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert sock.recv(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize(
    "ask",
    [
        lambda port: request(f"http://127.0.0.1:{port}/metrics?name[]=work_total"),
        lambda port: request(f"http://127.0.0.1:{port}/metrics", "HEAD"),
        lambda port: get(f"http://127.0.0.1:{port}/metrics", Accept="text/html"),
        lambda port: call("show_targets"),
        cut_off,
    ],
    ids=["name[]", "HEAD", "browser", "show_targets", "cut off"],
)
def test_what_is_not_a_complete_scrape_settles_nothing(
    ask: Callable[[int], object], port_range: range, tmp_path: Path
) -> None:
    second = port_range[1]
    with worker(tmp_path, port_range, 5, "CHANCE_SECONDS=0") as one, worker(tmp_path, port_range, 7) as other:
        scrape(port_range[0])
        kill(other)
        wait_until(lambda: describe(second).get("role") == "heir", "it has an heir", output=one.output)

        ask(second)
        looks = len(shown()), describe(second)["uptime_seconds"]
        one.wait_until(lambda: describe(second)["uptime_seconds"] > looks[1] + 0.5, "the heir has looked again")
        assert status_of(tmp_path, second).is_owed
        assert describe(second)["scrapes"] == {"total": 0}
        assert scrape(second)["work_total"] == 7
        one.wait_until(lambda: not status_of(tmp_path, second).is_owed, "it is settled after the scrape")


def damage(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rewrite_header(path: Path, *, version: int | None = None, site: str = "demo_site.settings") -> None:
    """Change the version and the site of a ledger."""
    with path.open("rb") as file:
        fields = list(HEADER.unpack(file.read(HEADER.size)))
    fields[1], fields[4] = version or fields[1], hash_site(site)
    header = HEADER.pack(*fields)
    damage(path, 0, header + struct.pack("I", zlib.crc32(header)))


@pytest.mark.parametrize(
    ("harm", "logged"),
    [
        (lambda path: damage(path, 0, b"garbage!"), "it does not begin like a ledger"),
        (lambda path: path.write_bytes(b"short"), "it has 5 bytes instead of 67108864|it does not begin"),
        (lambda path: damage(path, 1040, b"\xff" * 8), "its index is damaged"),
        (lambda path: damage(path, 1032, b"\xff" * 8), "its index is damaged"),
        (lambda path: damage(path, 64, b"\xff" * 8), "its index is damaged"),
        (lambda path: damage(path, SEAL_AT, b"\1\2\3\4"), "somebody changed it|changed while no process had it open"),
        (lambda path: (path.unlink(), path.mkdir()), "[Dd]irectory"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/null")), "symbolic link"),
        (make_fifo, "it is not a file"),
    ],
    ids=["header", "short", "cells end", "index end", "index begin", "seal", "folder", "link", "fifo"],
)
def test_a_damaged_ledger_is_reported_once_and_left_as_it_is(
    harm: Callable[[Path], object], logged: str, port_range: range, tmp_path: Path
) -> None:
    second, third = port_range[1:3]
    path = tmp_path / f"ledgers/{second}.ledger"
    with (
        worker(tmp_path, port_range, 5) as one,
        worker(tmp_path, port_range, 7) as other,
        worker(tmp_path, port_range, 9) as last,
    ):
        scrape(port_range[0])
        os.kill(one.pid, signal.SIGSTOP)  # it must not adopt the port before the harm
        kill(other)
        kill(last)
        harm(path)
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        os.kill(one.pid, signal.SIGCONT)

        exported = await_heir(third, one)  # of the next port
        one.wait_until(lambda: f"The last counts of port {second} cannot be served" in one.output(), "it is logged")
        heard = describe(third)["uptime_seconds"]
        one.wait_until(lambda: describe(third)["uptime_seconds"] > heard + 0.5, "the heir has looked again")

        assert exported["work_total"] == 9
        lines = [line for line in one.output().splitlines() if f"port {second} cannot be served" in line]
        assert len(lines) == 1
        assert content == (path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
        assert "cannot be read" in shown()[second]["unserved"]
        assert "Traceback" not in one.output()


def test_a_ledger_of_another_version_is_reported_and_one_of_another_site_is_none_of_ours(
    port_range: range, tmp_path: Path
) -> None:
    second, third = port_range[1:3]
    folder = tmp_path / "ledgers"
    folder.mkdir(0o700)
    for port in (second, third):
        Ledger(folder / f"{port}.ledger", "demo_site.settings").close()
    rewrite_header(folder / f"{second}.ledger", version=4)
    rewrite_header(folder / f"{third}.ledger", site="another site")
    before = (folder / f"{third}.ledger").read_bytes()

    with worker(tmp_path, port_range, 5) as one:
        scrape(port_range[0])
        one.wait_until(lambda: "another version of django_promports wrote it" in one.output(), "it is logged")

        assert str(third) not in one.output()
        rows = shown()
        assert "another version" in rows[second]["unserved"]
        assert rows[third]["unserved"] is None
    assert (folder / f"{third}.ledger").read_bytes() == before


@pytest.mark.parametrize("name", ["version-2-closed", "version-2-killed", "version-3-killed"])
def test_a_ledger_of_an_earlier_version_is_served_and_settled(name: str, port_range: range, tmp_path: Path) -> None:
    second = port_range[1]
    path = tmp_path / f"ledgers/{second}.ledger"
    path.parent.mkdir(0o700)
    thaw(FROZEN / f"{name}.frozen", path)
    rewrite_header(path)

    with worker(tmp_path, port_range, 5, "CHANCE_SECONDS=0") as one:
        scrape(port_range[0])
        exported = await_heir(second, one)
        one.wait_until(lambda: not accepts(second), "the port is free")

    assert exported["sizes_bytes_count"] == 3
    assert not status_of(tmp_path, second).is_owed
    assert not list(path.parent.glob("*.damaged"))


def test_a_port_that_another_program_has_is_reported_once_and_served_when_it_is_free(
    port_range: range, tmp_path: Path
) -> None:
    second = port_range[1]
    with worker(tmp_path, port_range, 5) as one, worker(tmp_path, port_range, 7) as other:
        scrape(port_range[0])
        os.kill(one.pid, signal.SIGSTOP)
        kill(other)
        with answering(second, b"220 mail ESMTP\r\n"):
            os.kill(one.pid, signal.SIGCONT)
            said = f"The last counts of port {second} cannot be scraped while another program has the port"
            one.wait_until(lambda: said in one.output(), "it is logged")
            assert shown()[second]["unserved"] == "another program has the port"
            out, _ = call("show_targets")
            assert f"The last counts of {second} may not have been scraped: another program has the port." in out

        assert await_heir(second, one)["work_total"] == 7
        assert one.output().count(said) == 1


def test_an_heir_is_not_taken_for_another_program(port_range: range, tmp_path: Path) -> None:
    third = port_range[2]
    with (
        worker(tmp_path, port_range, 5) as one,
        worker(tmp_path, port_range, 6) as two,
        worker(tmp_path, port_range, 7) as other,
    ):
        for port in port_range[:2]:
            scrape(port)
        kill(other)
        await_heir(third, one, two)
        heard = describe(third)["uptime_seconds"]
        one.wait_until(lambda: describe(third)["uptime_seconds"] > heard + 1, "both have looked again")

        assert "another program" not in one.output() + two.output()


def test_the_ports_of_a_stopped_site_are_shown_with_what_to_do(port_range: range, tmp_path: Path) -> None:
    with worker(tmp_path, port_range, 5) as one, worker(tmp_path, port_range, 7) as two:
        kill(one)
        kill(two)

    out, _ = call("show_targets")
    rows = shown()

    assert (
        f"The last counts of {port_range[0]}-{port_range[1]} may not have been scraped: no process of the site runs; "
        "the next one exports them.\n"
    ) in out
    assert [bool(rows[port]["unserved"]) for port in port_range] == [True, True, False, False]


def test_a_folder_of_another_user_is_not_reported_as_damage(port_range: range, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can become another user")
    with worker(tmp_path, port_range, 5) as one:
        kill(one)
    # Only root can read the modules of some installations.
    import_all = "import django, encodings.idna; django.setup(); from django.core.management import call_command\n"
    import_all += "import django_promports.management.commands.show_targets\n"
    range_ = f"{port_range[0]}-{port_range[-1]}"

    done = run_python(f"{import_all}{BECOME_NOBODY}call_command('show_targets')", DEMO_PORT_RANGE=range_)

    assert "may not have been scraped" not in done.stdout
    assert "4 of 4 ports free" in done.stdout, done.stderr
