"""What each port of the range does now, for a person and for a machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
from typing import Any

import pytest
from django.core.management import CommandError
from prometheus_client import CollectorRegistry, Gauge
from pytest_django import Settings

import django_promports
from django_promports import ports, targets
from tests.commands import answering, call, endpoint
from tests.servers import manage


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    gauge = Gauge("cups", "Cups on the table.", ["tea"], registry=registry)
    for tea in ("green", "black", "white"):
        gauge.labels(tea)
    return registry


def test_an_idle_range_is_one_line(free_ports: range, settings: Settings) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports

    out, err = call("show_targets")

    assert out == f"0 live, 15 of 15 ports free in {free_ports[0]}-{free_ports[-1]}.\n"
    assert err == ""


def test_a_table_has_a_line_for_each_port_that_is_not_free(
    free_ports: range, settings: Settings, registry: CollectorRegistry
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:6]
    with contextlib.ExitStack() as stack:
        stack.enter_context(answering(free_ports[1], b"220 mail ESMTP\r\n"))
        stack.enter_context(endpoint(free_ports, registry=registry, pid=4711, command="gunicorn", uptime_seconds=8.4))
        stack.enter_context(endpoint(free_ports, project="another"))
        stack.enter_context(endpoint(free_ports))

        out, err = call("show_targets")

    *table, summary = out.splitlines()
    cells = [re.split(" {2,}", re.sub(r"\d+\.\d ms", "# ms", line.strip())) for line in table]
    assert cells == [
        ["port", "state", "pid", "command", "uptime", "series", "scrape"],
        [str(free_ports[0]), "live", "4711", "gunicorn", "8 s", "3", "# ms"],
        [str(free_ports[1]), "other", "-", "-", "-", "-", "-"],
        [str(free_ports[2]), "other", "-", "-", "-", "-", "-"],
        [str(free_ports[3]), "live", "-", "-", "-", "0", "# ms"],
    ]
    assert summary == f"2 live, 2 of 6 ports free in {free_ports[0]}-{free_ports[5]}."
    # The columns are aligned, and the last one stands right.
    assert len({len(line) for line in table}) == 1
    assert err == ""


def test_json_has_every_port(free_ports: range, settings: Settings, registry: CollectorRegistry) -> None:
    settings.PROMPORTS_PORT_RANGE = [free_ports[0], free_ports[1], free_ports[5]]
    foreign = answering(free_ports[1], b"220 mail ESMTP\r\n")
    with foreign, endpoint(free_ports, registry=registry, pid=4711, command="gunicorn", uptime_seconds=8.4):
        out, err = call("show_targets", "--json")

    shown = json.loads(out)
    seconds = shown["targets"][0].pop("scrape_seconds")
    assert 0 < seconds < targets.ASK_SECONDS
    unknown = {"pid": None, "command": None, "uptime_seconds": None, "series": None}
    assert shown == {
        "targets": [
            {
                "port": free_ports[0],
                "state": "live",
                "pid": 4711,
                "command": "gunicorn",
                "uptime_seconds": 8.4,
                "series": 3,
            },
            {"port": free_ports[1], "state": "other", **unknown, "scrape_seconds": None},
            {"port": free_ports[5], "state": "free", **unknown, "scrape_seconds": None},
        ],
        "waiting_processes": 0,
    }
    assert err == ""


def test_a_process_of_this_site_is_shown_with_its_pid(
    free_ports: range, settings: Settings, this_process: None
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    settings.PROMPORTS_LEDGER_DIR = None
    django_promports.start()

    (row, *rows) = json.loads(call("show_targets", "--json")[0])["targets"]

    assert (row["port"], row["state"], row["pid"]) == (free_ports[0], "live", os.getpid())
    assert 0 <= row["uptime_seconds"] < 60
    assert row["series"] > 0
    assert {other["state"] for other in rows} == {"free"}


def test_a_port_that_never_answers_is_silent(
    free_ports: range, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    monkeypatch.setattr(targets, "ASK_SECONDS", 0.2)

    with socket.create_server(("127.0.0.1", free_ports[2])):
        out, _ = call("show_targets")

    assert out.splitlines()[1].split() == [str(free_ports[2]), "silent", *["-"] * 5]
    assert out.splitlines()[2].startswith("0 live, 14 of 15 ports free")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX") or not os.path.exists("/proc/net/unix"), reason="not Linux")
def test_processes_without_a_port_are_counted(free_ports: range, settings: Settings) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    sign = ports.announce_waiting(free_ports)
    assert sign is not None

    with sign:
        out, _ = call("show_targets")
        counted = json.loads(call("show_targets", "--json")[0])["waiting_processes"]

    assert re.search(r"\n1 process.* waits? for a port .*; widen PROMPORTS_PORT_RANGE\.\n", out)
    assert counted == 1
    assert "wait" not in call("show_targets")[0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 m 0 s"),
        (3599, "59 m 59 s"),
        (3600, "1 h 0 m"),
        (86399, "23 h 59 m"),
        (86400 + 3600, "1 d 1 h"),
        (400 * 86400, "400 d 0 h"),
    ],
)
def test_an_uptime_is_shown_in_its_two_largest_units(
    seconds: float, shown: str, free_ports: range, settings: Settings
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports

    with endpoint(free_ports, uptime_seconds=seconds):
        out, _ = call("show_targets")

    assert f"  {shown}  " in out.splitlines()[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"PORT_RANGE": "19131-19100"}, "PROMPORTS_PORT_RANGE is '19131-19100', .* reversed; write 19100-19131."),
        ({"ADDRESS": "localhost"}, "PROMPORTS_ADDRESS is 'localhost', .* no IP address."),
        ({"BEARER_TOKEN_FILE": "/missing"}, "PROMPORTS_BEARER_TOKEN_FILE is '/missing', .*"),
        ({"TLS_CERTFILE": "/missing"}, "PROMPORTS_TLS_CERTFILE is '/missing', .*"),
    ],
    ids=str,
)
def test_a_wrong_setting_says_what_is_wrong(changed: dict[str, Any], message: str, settings: Settings) -> None:
    for name, value in changed.items():
        setattr(settings, f"PROMPORTS_{name}", value)

    with pytest.raises(CommandError, match=f"^{message}$"):
        call("show_targets")


def test_manage_py_shows_the_range_or_fails_with_the_reason(free_ports: range) -> None:
    def show(range_: str) -> subprocess.CompletedProcess[str]:
        return manage("show_targets", DEMO_PORT_RANGE=range_)

    right, wrong = show(f"{free_ports[0]}-{free_ports[1]}"), show("19131-19100")

    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout == f"0 live, 2 of 2 ports free in {free_ports[0]}-{free_ports[1]}.\n"
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "(promports.E001) PROMPORTS_PORT_RANGE is '19131-19100'" in wrong.stderr
