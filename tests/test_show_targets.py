"""What each port of the range does now, as a table and as JSON."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError
from prometheus_client import CollectorRegistry, Gauge
from pytest_django import Settings

import django_promports
from django_promports import presence, probe
from tests.commands import DEMO, answering, call, endpoint
from tests.servers import ROOT, manage, running, wait_until


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
        stack.enter_context(endpoint(free_ports, site="another"))
        stack.enter_context(endpoint(free_ports))

        out, err = call("show_targets")

    *table, summary, hint, fault = out.splitlines()
    cells = [re.split(" {2,}", re.sub(r"\d+\.\d ms", "# ms", line.strip())) for line in table]
    assert cells == [
        ["port", "state", "role", "pid", "command", "uptime", "series", "scrape", "scraped"],
        [str(free_ports[0]), "live", "worker", "4711", "gunicorn", "8 s", "3", "# ms", "never"],
        [str(free_ports[1]), "other", "-", "-", "-", "-", "-", "-", "-"],
        [str(free_ports[2]), "other", "-", "-", "-", "-", "-", "-", "-"],
        [str(free_ports[3]), "live", "worker", "-", "-", "-", "0", "# ms", "never"],
    ]
    assert summary == f"2 live, 2 of 6 ports free in {free_ports[0]}-{free_ports[5]}."
    assert hint.startswith("No worker was ever scraped. ")
    # The columns are aligned, that of the seconds of a scrape to the right.
    assert len({line.rindex(" ms") for line in table if " ms" in line} | {table[0].rindex("scrape ") + 3}) == 1
    assert fault.startswith(f"Another site (another) has workers at {free_ports[2]}, in the port range of this site")
    assert err == ""


def test_json_has_every_port(free_ports: range, settings: Settings, registry: CollectorRegistry) -> None:
    settings.PROMPORTS_PORT_RANGE = [free_ports[0], free_ports[1], free_ports[5]]
    foreign = answering(free_ports[1], b"220 mail ESMTP\r\n")
    with foreign, endpoint(free_ports, registry=registry, pid=4711, command="gunicorn", uptime_seconds=8.4):
        out, err = call("show_targets", "--json")

    shown = json.loads(out)
    seconds = shown["targets"][0].pop("scrape_seconds")
    assert 0 < seconds < probe.ASK_SECONDS
    unknown = {"role": None, "pid": None, "command": None, "uptime_seconds": None, "series": None, "scrapes": None}
    never = {"total": 0, "by": "", "seconds_ago": None, "interval_seconds": None}
    assert shown == {
        "targets": [
            {
                "port": free_ports[0],
                "state": "live",
                "role": "worker",
                "pid": 4711,
                "command": "gunicorn",
                "uptime_seconds": 8.4,
                "series": 3,
                "scrapes": never,
                "unserved": None,
            },
            {"port": free_ports[1], "state": "other", **unknown, "scrape_seconds": None, "unserved": None},
            {"port": free_ports[5], "state": "free", **unknown, "scrape_seconds": None, "unserved": None},
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
    monkeypatch.setattr(probe, "ASK_SECONDS", 0.2)

    with socket.create_server(("127.0.0.1", free_ports[2])):
        out, _ = call("show_targets")

    assert out.splitlines()[1].split() == [str(free_ports[2]), "silent", *["-"] * 7]
    assert out.splitlines()[2].startswith("0 live, 14 of 15 ports free")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX") or not os.path.exists("/proc/net/unix"), reason="not Linux")
def test_processes_without_a_port_are_counted(free_ports: range, settings: Settings) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    sign = presence.announce_waiting(free_ports)
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
        ({"ADDRESS": "localhost"}, "PROMPORTS_ADDRESS is 'localhost', .* not an IP address."),
        ({"BEARER_TOKEN_FILE": "/missing"}, "PROMPORTS_BEARER_TOKEN_FILE is '/missing', .*"),
        ({"TLS_CERTFILE": "/missing"}, "PROMPORTS_TLS_CERTFILE is '/missing', .*"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["show_targets", "await_scrape"])
def test_a_wrong_setting_says_what_is_wrong(
    command: str, changed: dict[str, Any], message: str, settings: Settings
) -> None:
    for name, value in changed.items():
        setattr(settings, f"PROMPORTS_{name}", value)

    with pytest.raises(CommandError, match=f"^{message}$"):
        call(command)


def test_manage_py_shows_the_range_or_fails_with_the_reason(free_ports: range) -> None:
    def show(range_: str) -> subprocess.CompletedProcess[str]:
        return manage("show_targets", DEMO_PORT_RANGE=range_)

    right, wrong = show(f"{free_ports[0]}-{free_ports[1]}"), show("19131-19100")

    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout == f"0 live, 2 of 2 ports free in {free_ports[0]}-{free_ports[1]}.\n"
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "(promports.E001) PROMPORTS_PORT_RANGE is '19131-19100'" in wrong.stderr


# A new session has no terminal until it opens one; then Ctrl-C reaches it.
TAKE_TERMINAL = (
    "import os, sys\nos.close(os.open(os.ttyname(0), os.O_RDWR))\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
WITHOUT_RICH = (
    "import sys; sys.modules['rich'] = None\n"
    "from django.core.management import execute_from_command_line as run; run(sys.argv)"
)


class Terminal:
    """A program in its own terminal, 100 columns wide."""

    def __init__(self, *words: str, **env: str) -> None:
        self.text = ""
        self._master, slave = pty.openpty()
        os.set_blocking(self._master, False)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        # Variables that enable or disable colours in programs.
        asking = {"NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
        usual = {name: value for name, value in os.environ.items() if name not in asking}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            cwd=ROOT,
            env={**usual, "TERM": "xterm-256color", "DJANGO_SETTINGS_MODULE": "demo_site.settings", **env},
        )
        os.close(slave)

    def read(self) -> str:
        """Return the whole output of the program."""
        with contextlib.suppress(OSError):  # nothing now, or never again
            while chunk := os.read(self._master, 65536):
                self.text += chunk.decode()
        return self.text

    def wait_until(self, condition: Callable[[str], object], what: str) -> None:
        wait_until(lambda: condition(self.read()), what, output=self.read)

    def press_ctrl_c(self) -> int:
        """Return the exit status."""
        os.write(self._master, b"\x03")
        self.wait_until(lambda _: self.process.poll() is not None, "Ctrl-C ends it")
        self.read()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def watching(*words: str, ports: range, **env: str) -> Iterator[Terminal]:
    range_ = f"{ports[0]}-{ports[3]}"
    with contextlib.closing(
        Terminal(*words, "show_targets", "--watch", "0.05", DEMO_PORT_RANGE=range_, **env)
    ) as shown:
        yield shown


def worker(ports: range) -> contextlib.AbstractContextManager[int]:
    """Serve an endpoint of the site that describes itself as another process."""
    return endpoint(ports, site=DEMO, pid=4711, command="[red]gunicorn")


def test_a_watched_table_stays_in_place_on_a_terminal_and_has_colours(free_ports: range) -> None:
    with watching("manage.py", ports=free_ports) as terminal:
        terminal.wait_until(lambda text: "0 live, 4 of 4 ports free" in text, "the idle range is shown")
        with worker(free_ports):
            terminal.wait_until(lambda text: "1 live, 3 of 4" in text, "a worker is shown")
            with answering(free_ports[1], b"220 mail ESMTP\r\n"):
                terminal.wait_until(lambda text: "1 live, 2 of 4" in text, "another program is shown")
        status = terminal.press_ctrl_c()

    assert "\x1b[32mlive" in terminal.text
    assert "\x1b[31mother" in terminal.text
    assert "[red]gunicorn" in terminal.text  # a worker's command line is not markup
    assert "\x1b[1A" in terminal.text  # one line up
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")  # the cursor is back
    assert "Traceback" not in terminal.text
    assert status == 0


@pytest.mark.parametrize(("options", "env"), [(["--no-color"], {}), ([], {"NO_COLOR": "1"})], ids=str)
def test_who_wants_no_colours_gets_none(options: list[str], env: dict[str, str], free_ports: range) -> None:
    command = ["manage.py", "show_targets", "--watch", "0.05", *options]
    terminal = Terminal(*command, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[3]}", **env)
    with contextlib.closing(terminal), worker(free_ports):
        terminal.wait_until(lambda text: "1 live" in text, "a worker is shown")
        status = terminal.press_ctrl_c()

    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.text)
    assert status == 0


def test_without_rich_a_watched_table_is_plain_text(free_ports: range) -> None:
    with watching("-c", WITHOUT_RICH, ports=free_ports) as terminal, worker(free_ports):
        terminal.wait_until(lambda text: text.count("1 live, 3 of 4 ports free") > 2, "it was shown three times")
        status = terminal.press_ctrl_c()

    assert "\x1b" not in terminal.text
    assert re.search(r"\d\d:\d\d:\d\d\r\n +port +state.*\r\n *\d+ +live +worker +4711 ", terminal.text)
    assert "Traceback" not in terminal.text
    assert status == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watched_table_that_is_piped_is_plain_text_and_seen_at_once(
    number: signal.Signals, free_ports: range, tmp_path: Path
) -> None:
    # Longer than the test waits for the table and for the end.
    command = [sys.executable, "manage.py", "show_targets", "--watch", "600"]
    range_ = f"{free_ports[0]}-{free_ports[3]}"
    with worker(free_ports), running(*command, log=tmp_path / "log", DEMO_PORT_RANGE=range_, TERM="xterm") as child:
        child.wait_until(lambda: "1 live, 3 of 4 ports free" in child.output(), "it is shown")
        child.process.send_signal(number)
        child.wait_until(lambda: child.process.poll() is not None, "it ends")

    assert "\x1b" not in child.output()
    assert "Traceback" not in child.output()
    assert child.process.returncode == 0


def test_a_reader_may_go(free_ports: range) -> None:
    words = f"{sys.executable} manage.py show_targets --watch 0.05 | head -n 1"

    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DEMO_PORT_RANGE": f"{free_ports[0]}-{free_ports[3]}"},
        timeout=60,
        check=False,
    )

    assert re.fullmatch(r"\d\d:\d\d:\d\d\n", done.stdout)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_is_watched_by_a_person_and_no_machine() -> None:
    with pytest.raises(CommandError, match="--watch: not allowed with argument --json"):
        call("show_targets", "--json", "--watch")
