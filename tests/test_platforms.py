"""macOS and Windows, simulated on Linux: what they lack is removed before the site is imported.

No test machine runs them. A sitecustomize.py, which Python imports first, removes what is missing there according to
the documentation of Python's os, socket, signal and select modules.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.commands import run_python
from tests.minimal import django_admin, write_site
from tests.servers import ROOT, database, gunicorn, manage, request, runserver, scrape, send_requests

pytestmark = pytest.mark.once

MACOS = """
# The standard library asks for the platform when these are imported, and would look for what only macOS has.
import asyncio, ctypes.util, multiprocessing, subprocess, sysconfig, urllib.request, uuid, webbrowser, zoneinfo
import errno, os, select, selectors, socket, sys

def remove(module, *names):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

remove(os, "posix_fallocate", "posix_fadvise", "pipe2", "memfd_create", "eventfd", "pidfd_open", "sched_getaffinity")
remove(socket, "SO_PEERCRED", "SO_BINDTODEVICE", "IP_BIND_ADDRESS_NO_PORT", "MSG_NOSIGNAL", "SOCK_CLOEXEC")
read_link = os.readlink

def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith("/proc/"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])
    if event in ("socket.bind", "socket.connect"):
        address = os.fsencode(arguments[1]) if isinstance(arguments[1], str) else arguments[1]
        if isinstance(address, bytes) and address.startswith(b"\\0"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

def close_selectors():
    # Like a kqueue, which is not inherited by a forked child.
    for number in range(3, 256):
        try:
            if "eventpoll" in read_link(f"/proc/self/fd/{number}"):
                os.close(number)
        except OSError:
            pass

os.register_at_fork(after_in_child=close_selectors)
sys.addaudithook(hook)
sys.platform = "darwin"
"""

WINDOWS = """
import os, select, sys

def remove(module, *names):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

remove(select, "epoll", "poll", "kqueue")
# The standard library asks for the platform when these are imported, and would look for what only Windows has.
import asyncio, concurrent.futures.thread, ctypes.util, http.server, logging.config, mimetypes, multiprocessing
import multiprocessing.connection, random, selectors, shutil, socketserver, sqlite3, ssl, subprocess, tempfile, unittest
import urllib.request, uuid, webbrowser, zoneinfo
import errno, signal, socket, time

for name in ("fcntl", "grp", "pwd", "resource", "syslog", "termios"):
    sys.modules[name] = None
remove(os, "fork", "forkpty", "register_at_fork", "geteuid", "getuid", "getegid", "getgid", "setuid", "setgid", "chown")
remove(os, "posix_fallocate", "pread", "pwrite", "fchmod", "fchown", "mkfifo", "killpg", "getpgid", "setsid")
remove(os, "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "sched_getaffinity", "sysconf", "uname")
remove(signal, "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT", "SIGCHLD", "SIGPIPE", "pthread_sigmask")
remove(socket, "AF_UNIX", "SO_PEERCRED", "SO_REUSEPORT", "MSG_DONTWAIT", "MSG_NOSIGNAL", "IP_BIND_ADDRESS_NO_PORT")
remove(time, "tzset")

def socketpair(family=socket.AF_INET, type=socket.SOCK_STREAM, proto=0):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]

socket.socketpair = socketpair
connect = socket.socket.connect_ex

def connect_ex(self, address):
    error = connect(self, address)
    return errno.EWOULDBLOCK if error == errno.EINPROGRESS else error

def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(("/proc/", "/dev/shm")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])

socket.socket.connect_ex = connect_ex
sys.addaudithook(hook)
sys.platform = "win32"
"""


@pytest.fixture
def macos(tmp_path: Path) -> dict[str, str]:
    """The environment of a process to which this machine looks like macOS."""
    return _stand_in(tmp_path, MACOS)


@pytest.fixture
def windows(tmp_path: Path) -> dict[str, str]:
    """The environment of a process to which this machine looks like Windows."""
    return _stand_in(tmp_path, WINDOWS)


def _stand_in(tmp_path: Path, code: str) -> dict[str, str]:
    folder = tmp_path / "platform"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_on_macos_workers_claim_and_count_and_no_kill_loses_a_request(
    kind: str, preload: list[str], free_ports: range, tmp_path: Path, macos: dict[str, str]
) -> None:
    requests = "django_http_requests_before_middlewares_total"
    range_ = f"{free_ports[0]}-{free_ports[-2]}"
    with gunicorn(tmp_path, free_ports, "-k", kind, *preload, workers=2, **macos) as site:
        live = site.wait_for_workers(2)
        statuses = send_requests(60, lambda _: site.request())
        counted = {port: scrape(port)[requests] for port in live}

        os.kill(live[free_ports[0]], signal.SIGKILL)
        site.wait_until_replaced([live[free_ports[0]]], 2)
        statuses += send_requests(60, lambda _: site.request())
        shown = manage("show_targets", "--json", DEMO_PORT_RANGE=range_, **macos)
        listed = manage("export_targets", "--live", DEMO_PORT_RANGE=range_, **macos)

        assert statuses.count(200) == 120, site.child.output()
        assert sum(counted.values()) == 60
        assert site.total() == 120
        assert scrape(free_ports[0])["promports_waiting_processes"] == 0
        states = [row["state"] for row in json.loads(shown.stdout)["targets"]]
        assert states.count("live") == 2, shown.stdout + shown.stderr
        (group,) = json.loads(listed.stdout)
        assert group["targets"] == [f"127.0.0.1:{port}" for port in free_ports[:2]]
        assert "ERROR django_promports" not in site.child.output()
        assert "WARNING django_promports" not in site.child.output()
        assert "Traceback" not in site.child.output()


def test_on_macos_a_forked_helper_lets_go_of_the_port(free_ports: range, macos: dict[str, str]) -> None:
    script = """
import os, sys, django, django_promports
django.setup()
port = django_promports.start()
ready, stay = os.pipe(), os.pipe()
if os.fork() == 0:
    os.write(ready[1], b".")
    os.read(stay[0], 1)
    os._exit(0)
os.read(ready[0], 1)
django_promports.stop()
print(django_promports.start() == port)
os.write(stay[1], b".")
os.wait()
"""
    done = run_python(script, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[5]}", seconds=60, **macos)

    assert done.stdout == "True\n", done.stderr
    assert "ERROR" not in done.stderr


def test_on_macos_the_check_finds_nothing(macos: dict[str, str], tmp_path: Path) -> None:
    probe = "import os, sys; print(sys.platform, hasattr(os, 'posix_fallocate'))"
    shell = manage("shell", "-c", probe, DEMO_DATABASE=str(database(tmp_path)), **macos)

    check = manage("check", "--tag", "promports", "--deploy", **macos)

    assert "darwin False" in shell.stdout, shell.stderr
    assert check.returncode == 0
    assert check.stdout == "System check identified no issues (0 silenced).\n"
    assert check.stderr == ""


@pytest.mark.parametrize("arguments", [["check"], ["check", "--deploy", "--tag", "promports"]], ids=["check", "deploy"])
def test_on_windows_the_check_says_once_that_no_metrics_are_served(
    arguments: list[str], windows: dict[str, str], tmp_path: Path
) -> None:
    env = {**write_site(tmp_path), "PYTHONPATH": f"{tmp_path}:{windows['PYTHONPATH']}"}

    # Settings for servers need not be valid on a laptop.
    check = django_admin(*arguments, MINIMAL_LEDGER_DIR="run/shop", DEMO_PORT_RANGE="80", **env)

    assert check.returncode == 0, check.stderr
    assert check.stderr.count("promports.") == 1
    assert "?: (promports.W006) Metrics are served on Unix only" in check.stderr
    assert "HINT: Run the site in WSL or in a container" in check.stderr


@pytest.mark.parametrize(
    "arguments", [["migrate"], ["shell", "-c", "print(1)"], ["test", "minimal_tests"]], ids=lambda a: a[0]
)
def test_on_windows_commands_work(arguments: list[str], windows: dict[str, str], tmp_path: Path) -> None:
    env = {**write_site(tmp_path), "PYTHONPATH": f"{tmp_path}:{windows['PYTHONPATH']}"}

    done = django_admin(*arguments, **env)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "ERROR" not in done.stderr


def test_on_windows_targets_are_exported_and_asked(windows: dict[str, str], free_ports: range, tmp_path: Path) -> None:
    range_ = f"{free_ports[0]}-{free_ports[3]}"
    output = tmp_path / "targets.json"
    with gunicorn(tmp_path, free_ports, workers=1) as site:
        site.wait_for_workers(1)

        exported = manage("export_targets", "--output", str(output), DEMO_PORT_RANGE=range_, **windows)
        live = manage("export_targets", "--live", DEMO_PORT_RANGE=range_, **windows)
        shown = manage("show_targets", DEMO_PORT_RANGE=range_, **windows)

    assert exported.returncode == live.returncode == shown.returncode == 0, exported.stderr + live.stderr
    (group,) = json.loads(output.read_text())
    assert group["targets"] == [f"127.0.0.1:{port}" for port in free_ports[:4]]
    (group,) = json.loads(live.stdout)
    assert group["targets"] == [f"127.0.0.1:{free_ports[0]}"]
    assert "1 live, 3 of 4 ports free" in shown.stdout


@pytest.mark.parametrize("options", [["--noreload"], []], ids=["noreload", "reload"])
def test_on_windows_runserver_serves_the_site_without_ports(
    options: list[str], windows: dict[str, str], free_ports: range, tmp_path: Path
) -> None:
    with runserver(tmp_path, free_ports, *options, **windows) as site:
        site.child.wait_until(lambda: site.request() == 200, "runserver answers")

        statuses = send_requests(20, lambda _: site.request())

        assert statuses.count(200) == 20
        assert not [port for port in site.ports if request(f"http://127.0.0.1:{port}/", seconds=1)]
        output = site.child.output()
        assert output.count("(promports.W006) Metrics are served on Unix only") == 1, output
        assert output.count("INFO django_promports Metrics are served on Unix only") <= 1
        assert "ERROR" not in output
        assert "Traceback" not in output


def test_on_windows_every_module_imports_and_start_returns_none(windows: dict[str, str]) -> None:
    code = """
import importlib, pkgutil, sys, threading, django, django_promports
django.setup()
for module in pkgutil.walk_packages(django_promports.__path__, "django_promports."):
    importlib.import_module(module.name)
print(sys.platform, django_promports.start(), django_promports.start(), django_promports.port())
django_promports.stop()
print(threading.active_count())
"""
    done = run_python(code, seconds=60, **windows)

    assert done.stdout == "win32 None None None\n1\n", done.stderr
    assert done.stderr.count("Metrics are served on Unix only") == 1
    assert "ERROR" not in done.stderr
