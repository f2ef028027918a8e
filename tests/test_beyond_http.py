"""Processes that serve no Django requests: the programs of docs/beyond-http.md, run unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.matrix import YES, Row, versions
from tests.servers import (
    ROOT,
    SECONDS,
    Child,
    accepts,
    describe,
    how_they_ended,
    listening_ports,
    manage,
    running,
    scrape,
    wait_until,
)

pytestmark = pytest.mark.servers

PAGE = (ROOT / "docs/beyond-http.md").read_text()
# The code blocks that start with a file name.
PROGRAMS = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COUNT = 200
POOLS = {
    "prefork": ["--pool=prefork", "--concurrency=4"],
    "threads": ["--pool=threads", "--concurrency=4"],
    "gevent": ["--pool=gevent", "--concurrency=4"],
    "solo": ["--pool=solo"],
}
RECYCLE = "--max-tasks-per-child=10"
# Runs first in each process of the shop: at exit it prints the ports that the program bound.
REPORT = """
import atexit, sys

bound = set()
sys.addaudithook(lambda event, arguments: bound.add(arguments[1][1]) if event == "socket.bind" else None)
atexit.register(lambda: print("BOUND", sorted(bound - {0})))
"""


class Shop:
    """The Django project of the page, and the counts of its processes."""

    def __init__(self, folder: Path, ports: range) -> None:
        *self.ports, self.server_port, self.redis_port = ports
        self.folder = folder
        self.queue = f"redis://127.0.0.1:{self.redis_port}/0"
        self.env = {
            "DJANGO_SETTINGS_MODULE": "shop.settings",
            "PROMPORTS_PORT_RANGE": f"{self.ports[0]}-{self.ports[-1]}",
            "PYTHONPATH": f"{folder}:{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "QUEUE": self.queue,
        }
        files = {
            **{name: text for name, text in PROGRAMS.items() if name.startswith("shop/")},
            "shop/management/__init__.py": "",
            "shop/management/commands/__init__.py": "",
            "shop/settings.py": "\n".join(
                [
                    "from demo_site.settings import *",
                    PROGRAMS["settings.py"],
                    "INSTALLED_APPS += ['shop']",
                    "CELERY_BROKER_URL = CELERY_RESULT_BACKEND = os.environ['QUEUE']",
                    "CELERY_BEAT_SCHEDULE = {'pack': {'task': 'shop.tasks.pack', 'schedule': 0.2, 'args': [0]}}",
                ]
            ),
        }
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def run(self, *arguments: str) -> AbstractContextManager[Child]:
        return running(sys.executable, *arguments, log=self.folder / "shop.log", **self.env)

    def python(self, *arguments: str) -> str:
        """Run Python until it ends, and return its output."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def live(self) -> dict[int, int]:
        """Return the pid of each live port."""
        return {port: about["pid"] for port in self.ports if (about := describe(port))}

    def packed(self) -> float:
        return sum(scrape(port).get("shop_packed_total", 0) for port in self.live())

    def wait_for_count(self, child: Child, count: int) -> None:
        """Wait until the total is right: between a worker and its successor, the counts of a port are not visible."""
        child.wait_until(lambda: self.packed() == count, f"{count} pieces of work are counted")

    def wait_for(self, child: Child, processes: int, gone: int = 0) -> dict[int, int]:
        """Wait until this many processes answer on the lowest ports, without the process that is gone."""

        def answering() -> dict[int, int]:
            live = self.live()
            complete = sorted(live) == self.ports[:processes] and gone not in live.values()
            return live if complete else {}

        return child.wait_until(answering, f"{processes} processes answer")


@pytest.fixture
def shop(free_ports: range, tmp_path: Path) -> Shop:
    return Shop(tmp_path, free_ports)


@pytest.fixture
def redis(shop: Shop, program: Callable[[str], str]) -> Iterator[None]:
    options = ["--bind", "127.0.0.1", "--port", str(shop.redis_port), "--dir", str(shop.folder), "--save", ""]
    with running(program("redis-server"), *options, log=shop.folder / "redis.log") as child:

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", shop.redis_port), 5) as client:
                client.sendall(b"PING\r\n")
                return client.recv(7) == b"+PONG\r\n"
            return False

        child.wait_until(answers, "Redis answers")
        yield


@pytest.mark.parametrize("pool", POOLS)
def test_celery_counts_each_task_once(pool: str, shop: Shop, redis: None, row: Row) -> None:
    if pool == "prefork":
        row["end"] = check(shop, celery(*POOLS[pool], RECYCLE), lambda: send_tasks(shop), 4, recycled=True)
        report(row, "Celery", "celery", "prefork, 4 children", 4, "celery")
        row["recycle"] = f"{YES} `--max-tasks-per-child`"
    else:
        row["end"] = check(shop, celery(*POOLS[pool]), lambda: send_tasks(shop), 1)
        report(row, "Celery", "celery", pool, 1, "celery")


def test_what_the_parent_counted_is_in_no_childs_counts(shop: Shop, redis: None) -> None:
    tasks = shop.folder / "shop/tasks.py"
    # As a database backend that counts connections does if something makes a query at start-up.
    tasks.write_text(f"{tasks.read_text()}\nPACKED.inc(1000)\n")
    with shop.run(*celery(*POOLS["prefork"], RECYCLE)) as child:
        before = shop.wait_for(child, 4)
        send_tasks(shop)
        child.wait_until(lambda: not set(before.values()) & set(child.children()), "all children were replaced")
        shop.wait_for_count(child, COUNT)


def test_only_what_runs_tasks_holds_a_port(shop: Shop, redis: None) -> None:
    (shop.folder / "sitecustomize.py").write_text(REPORT)
    with shop.run(*celery(*POOLS["prefork"])) as child:
        live = shop.wait_for(child, 4)
        assert set(live.values()) == set(child.children())

        inspected = shop.python("-m", "celery", "-A", "shop", "inspect", "ping")
        schedule = ["--schedule", str(shop.folder / "schedule")]
        with shop.run("-m", "celery", "-A", "shop", "beat", *schedule) as beat:
            child.wait_until(lambda: shop.packed() > 2, "beat sends tasks")
            assert not listening_ports(beat.pid)
            assert shop.live() == live

        assert not listening_ports(child.pid)
        assert "pong" in inspected
        assert "BOUND []" in inspected


@pytest.mark.parametrize("processes", [1, 4], ids=["one-process", "forked"])
def test_a_grpc_server_counts_each_call_once(processes: int, shop: Shop, row: Row) -> None:
    address = f"127.0.0.1:{shop.server_port}"
    script = f"""
import grpc

for _ in range(20):  # each opens a connection
    with grpc.insecure_channel("{address}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        pack = channel.unary_unary("/shop.Shop/Pack")
        for number in range({COUNT // 20}):
            assert pack(b"%d" % number, timeout={SECONDS}, wait_for_ready=True) == b"%d" % number
"""
    row["end"] = check(shop, serve("grpc_server", processes, address), lambda: shop.python("-c", script), processes)

    report_processes(row, "gRPC", "grpcio", processes, "grpc")


@pytest.mark.parametrize("processes", [1, 4], ids=["one-process", "forked"])
def test_a_thrift_server_counts_each_call_once(processes: int, shop: Shop, row: Row) -> None:
    address = ("127.0.0.1", shop.server_port)
    script = f"""
import thriftpy2
from thriftpy2.rpc import client_context

shop = thriftpy2.load({str(shop.folder / "shop/shop.thrift")!r}, module_name="shop_thrift")
for _ in range(20):
    with client_context(shop.Shop, *{address}) as client:
        for number in range({COUNT // 20}):
            assert client.pack(number) == number
"""

    def call() -> None:
        wait_until(lambda: accepts(shop.server_port), "the server listens")
        shop.python("-c", script)

    row["end"] = check(shop, serve("thrift_server", processes, *address), call, processes)

    report_processes(row, "Thrift", "thriftpy2", processes, "thrift")


@pytest.mark.parametrize("processes", [1, 4], ids=["one-process", "forked"])
def test_a_management_command_counts_each_piece_of_work_once(processes: int, shop: Shop, redis: None, row: Row) -> None:
    script = f"""
import os, time
from redis import Redis

with Redis.from_url(os.environ["QUEUE"]) as redis:
    redis.delete("packed")
    redis.rpush("orders", *range({COUNT}))
    deadline = time.monotonic() + {SECONDS}
    while int(redis.get("packed") or 0) < {COUNT}:
        assert time.monotonic() < deadline, redis.get("packed")
        time.sleep(0.02)
"""
    command = ["manage.py", "pack_orders", f"--processes={processes}"]
    row["end"] = check(shop, command, lambda: shop.python("-c", script), processes)

    report_processes(row, "management command", "django", processes, "a-management-command")


def test_the_targets_of_a_service_have_its_range_and_label(shop: Shop) -> None:
    command = re.search(r"^PROMPORTS_PORT_RANGE=(\S+) PROMPORTS_SERVICE=(\S+) ", PAGE, re.MULTILINE)
    assert command

    done = manage("export_targets", **{**shop.env, "PROMPORTS_PORT_RANGE": command[1], "PROMPORTS_SERVICE": command[2]})

    (group,) = json.loads(done.stdout)
    assert group["targets"][0] == "127.0.0.1:19200"
    assert group["targets"][-1] == "127.0.0.1:19231"
    assert group["labels"] == {"service": "celery"}
    assert f"Environment={command[0].strip()}\n" in PAGE


def check(
    shop: Shop, program: Sequence[str], work: Callable[[], object], processes: int, *, recycled: bool = False
) -> str:
    """Work, kill a process, work again, and check that everything is counted.

    A forked child is replaced, a program is started again. Return how the processes ended when they were told to stop.
    """
    with contextlib.ExitStack() as stack:
        child = stack.enter_context(shop.run(*program))
        first = shop.wait_for(child, processes)
        work()
        if recycled:
            child.wait_until(lambda: not set(first.values()) & set(child.children()), "all children were replaced")
        shop.wait_for_count(child, COUNT)
        live = shop.wait_for(child, processes)
        # A parent holds no port and runs no code that counts.
        assert set(live.values()) == (set(child.children()) if processes > 1 else {child.pid})
        assert processes == 1 or not listening_ports(child.pid)

        killed = live[shop.ports[0]]
        os.kill(killed, signal.SIGKILL)
        if processes == 1:
            child.process.wait()
            child = stack.enter_context(shop.run(*program))
        shop.wait_for(child, processes, gone=killed)
        work()

        shop.wait_for_count(child, 2 * COUNT)
        shop.wait_for(child, processes)
        stop(child)
    assert not shop.live()
    return how_they_ended(shop.folder / "ledgers", shop.ports[:processes])


def stop(child: Child) -> None:
    """Stop a program as an operator does, and check that it leaves no process behind."""
    child.process.terminate()
    try:
        child.process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"It does not stop.\n{child.output()}") from None
    left = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session(pid) == child.pid]
    assert not left, child.output()


def session(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return 0


def celery(*options: str) -> list[str]:
    return ["-m", "celery", "-A", "shop", "worker", "--loglevel=INFO", "--without-gossip", "--without-mingle", *options]


def send_tasks(shop: Shop) -> None:
    script = f"""
from shop.tasks import pack

results = [pack.delay(number) for number in range({COUNT})]
assert [result.get(timeout={SECONDS}) for result in results] == list(range({COUNT}))
"""
    shop.python("-c", script)


def serve(module: str, processes: int, *address: object) -> list[str]:
    """Return the arguments of `python` that run a server of the page, in one process or several."""
    arguments = ", ".join(map(repr, address))
    call = f"serve({arguments})" if processes == 1 else f"keep_running({processes}, serve, {arguments})"
    return ["-c", f"from shop.{module} import serve; from shop.processes import keep_running; {call}"]


def report_processes(row: Row, server: str, package: str, processes: int, section: str) -> None:
    mode = f"{processes} forked children" if processes > 1 else "one process"
    report(row, server, package, mode, processes, section)


def report(row: Row, server: str, package: str, mode: str, ports: int, section: str) -> None:
    row["server"], row["version"], row["mode"], row["ports"] = server, versions(package), mode, str(ports)
    row["exact"], row["recycle"] = YES, "has none"
    row["kill"] = f"{YES} child" if ports > 1 else f"{YES} started again"
    row["notes"] = f"[how](beyond-http.md#{section})"
