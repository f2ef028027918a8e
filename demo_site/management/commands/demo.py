"""manage.py demo: run the site, Prometheus and traffic on one machine, and compare their counts.

It starts gunicorn, writes the target file, starts Prometheus and sends requests, all on 127.0.0.1 and in a temporary
folder.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from django.core.management.base import BaseCommand, CommandError
from prometheus_client.parser import text_string_to_metric_families

from django_promports import probe
from django_promports.conf import conf
from django_promports.loop import Loop
from django_promports.ports import RangeFull, claim, format_ports

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[3]
METRIC = "django_http_requests_total_by_view_transport_method_total"
# By view: method, path ({} is one of the six teas that the migrations add), status, share of the traffic.
REQUESTS = {
    "index": ("GET", "/", 200, 40),
    "tea": ("GET", "/teas/{}/", 200, 30),
    "search": ("GET", "/search/?q=g", 200, 16),
    "order": ("POST", "/teas/{}/order/", 201, 10),
    "broken": ("GET", "/broken/", 500, 4),
}
STAFF = "demo"
CLIENTS = 8
PAUSE_SECONDS = 0.1
# For a start, or for several scrapes, on a busy machine.
WAIT_SECONDS = 45.0
STOP_SECONDS = 10.0


class Program(subprocess.Popen[bytes]):
    """A child in its own session, so that Ctrl-C reaches only the demo, which then stops the children in order."""

    def __init__(self, log: Path, words: Sequence[str], env: Mapping[str, str]) -> None:
        self.log = log
        with log.open("wb") as output:
            super().__init__(
                words,
                cwd=ROOT,
                env=env,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        self.terminate()
        try:
            self.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def failure(self, problem: str) -> CommandError:
        state = "was still running" if self.poll() is None else f"had exited with status {self.returncode}"
        lines = self.log.read_text(errors="replace").splitlines() or ["(nothing)"]
        return CommandError("\n".join([f"{problem} {self.log.stem} {state}; the end of its output:", *lines[-40:]]))


class Command(BaseCommand):
    help = "Runs the site with several workers, sends requests, and compares the number sent with the number counted."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--duration", type=int, default=20, metavar="SECONDS", help="Duration of the traffic. Default: 20."
        )
        parser.add_argument(
            "--workers", type=int, default=4, metavar="N", help="Number of gunicorn workers. Default: 4."
        )
        parser.add_argument("--keep", action="store_true", help="Keep everything running until Ctrl-C.")

    def handle(self, *args: Any, duration: int, workers: int, keep: bool, **options: Any) -> None:
        if duration < 1 or workers < 1:
            raise CommandError("--duration and --workers must be 1 or more.")
        self.interrupted = False
        with ExitStack() as self.stack:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # it is under nohup
                    self.stack.callback(signal.signal, signum, signal.signal(signum, self.interrupt))
            self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="promports-demo-")))
            self.run_story(duration, workers, keep)

    def interrupt(self, *args: object) -> None:
        # Raising here could lose a child between its start and its place on the stack.
        self.interrupted = True

    def run_story(self, duration: int, workers: int, keep: bool) -> None:
        *self.ports, self.site_port, self.prometheus_port = _find_free_ports(2 * workers + 2)
        self.env = {
            **os.environ,
            "DEMO_DATABASE": str(self.folder / "demo.sqlite3"),
            "DEMO_PORT_RANGE": format_ports(self.ports),
            # Do not count what another run has left in the default folders, and do not overwrite files of other sites.
            "DEMO_LEDGER_DIR": str(self.folder / "ledgers"),
            "TMPDIR": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder),
            "DJANGO_SUPERUSER_USERNAME": STAFF,
            "DJANGO_SUPERUSER_EMAIL": f"{STAFF}@localhost",
            "DJANGO_SUPERUSER_PASSWORD": secrets.token_urlsafe(8),
        }
        self.manage("migrate")
        self.manage("createsuperuser", "--noinput")
        programs = [self.start_gunicorn(workers)]
        # Prometheus looks for the target files beside its configuration.
        home = shutil.copytree(ROOT / "prometheus", self.folder / "home", ignore=lambda *_: ["targets", "data"])
        (home / "targets").mkdir()
        self.manage("export_targets", "--output", str(home / "targets/django.json"))
        self.say(f"export_targets listed every port of the range: {format_ports(self.ports)}, half of them spare.")
        if found := shutil.which("prometheus"):
            programs.append(self.start_prometheus(found, home, workers))
        else:
            self.say("There is no `prometheus` on PATH; the demo continues without it: https://prometheus.io/download/")

        self.say("Pages that show the workers at work:")
        self.show_pages()
        sent = self.send_requests(duration, programs[0])
        counted = self.count_in_workers()
        sums = {"sum of the workers": sum(counted.values(), Counter[str]())}
        if found:
            self.say("Waiting until Prometheus has scraped the last counts.")
            self.wait_until(lambda: self.ask_prometheus() == sums["sum of the workers"], programs[1])
            sums["Prometheus"] = self.ask_prometheus()
        self.say("\n".join(["", *_format_table({"sent": sent, **counted, **sums})]))
        agree = all(counts == sent for counts in sums.values())
        if agree:
            self.say(self.style.SUCCESS(f"They agree: each of the {sent.total()} requests was counted once."))
        self.say(
            "\n"
            + (
                f"Running until Ctrl-C, or until SIGTERM to {os.getpid()}:"
                if keep
                else "With --keep, these would stay available:"
            )
        )
        self.show_addresses(with_prometheus=bool(found))
        if keep:
            self.keep_running(programs)
        if not agree:
            raise programs[0].failure("They do not agree: the requests counted differ from those sent.")

    def manage(self, *words: str) -> None:
        program = self.start(words[0], sys.executable, "manage.py", *words)
        if not self.wait_until(lambda: program.poll() == 0, program):
            raise program.failure(f"manage.py {words[0]} failed.")

    def start_gunicorn(self, workers: int) -> Program:
        options = ["-c", "demo_site/gunicorn.conf.py", "--bind", f"{HOST}:{self.site_port}", "--workers", str(workers)]
        gunicorn = self.start("gunicorn", sys.executable, "-m", "gunicorn", *options)
        if not self.wait_until(lambda: len(self.ask_workers("/")) == workers, gunicorn):
            raise gunicorn.failure(f"{len(self.ask_workers('/'))} of gunicorn's {workers} workers have a metrics port.")
        self.say(f"gunicorn serves http://{HOST}:{self.site_port}/ with {workers} workers, each with its own metrics:")
        for port, answer in self.ask_workers("/").items():
            self.say(f"  http://{HOST}:{port}/metrics  pid {answer.about['pid']}")
        return gunicorn

    def start_prometheus(self, found: str, home: Path, workers: int) -> Program:
        address = f"{HOST}:{self.prometheus_port}"
        options = [f"--config.file={home / 'prometheus.yml'}", f"--storage.tsdb.path={home / 'data'}"]
        prometheus = self.start("prometheus", found, *options, f"--web.listen-address={address}")
        if not self.wait_until(lambda: self.ask_prometheus("up").total() == workers, prometheus):
            up = self.ask_prometheus("up").total()
            raise prometheus.failure(f"Prometheus has scraped {up} of {workers} workers.")
        self.say(f"Prometheus at http://{address}/ has scraped all of them.")
        return prometheus

    def send_requests(self, duration: int, gunicorn: Program) -> Counter[str]:
        answered: list[str] = []
        self.traffic_ends = time.monotonic() + duration
        told, every = time.monotonic(), PAUSE_SECONDS if self.stdout.isatty() else 3.0
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self.send_until_end, answered) for _ in range(CLIENTS)]
            while not all(client.done() for client in clients):
                self.pause()
                if (now := time.monotonic()) >= told + every:
                    told, left = now, max(0, round(self.traffic_ends - now))
                    self.say(f"{len(answered)} requests answered, {left} s to go", passing=True)
        for error in filter(None, (client.exception() for client in clients)):
            raise gunicorn.failure(f"A request failed: {error!r}.") from error
        self.say(f"{len(answered)} requests answered in {duration} s.")
        return Counter(answered)

    def send_until_end(self, answered: list[str]) -> None:
        views, shares = list(REQUESTS), [share for *_, share in REQUESTS.values()]
        try:
            while time.monotonic() < self.traffic_ends and not self.interrupted:
                (view,) = random.choices(views, shares)
                method, path, expected, _ = REQUESTS[view]
                status, _ = _fetch(self.site_port, path.format(random.randint(1, 6)), method)
                if status != expected:
                    raise ValueError(f"the view {view!r} answered with status {status}, not {expected}")
                answered.append(view)
                time.sleep(random.uniform(0, 0.05))
        except BaseException:
            self.traffic_ends = 0.0  # for the other clients too
            raise

    def count_in_workers(self) -> dict[str, Counter[str]]:
        scrapes, counted = self.ask_workers("/metrics"), {}
        for port, answer in self.ask_workers("/").items():
            counts = counted[f"port {port}, pid {answer.about['pid']}"] = Counter[str]()
            for family in text_string_to_metric_families(scrapes[port].body.decode() if port in scrapes else ""):
                for sample in family.samples:
                    if sample.name == METRIC:
                        counts[sample.labels["view"]] += int(sample.value)
        return counted

    def ask_workers(self, path: str) -> dict[int, probe.Answer]:
        with closing(Loop()) as loop:
            answers = loop.complete(probe.ask_all(loop, conf.site, [(HOST, port) for port in self.ports], path))
        return {port: answer for port, answer in zip(self.ports, answers, strict=True) if answer.state == "live"}

    def ask_prometheus(self, metric: str = METRIC) -> Counter[str]:
        """Return the sum over all workers, by view; empty while Prometheus does not answer."""
        query = urlencode({"query": f'sum by (view) ({metric}{{job="django"}})'})
        try:
            status, body = _fetch(self.prometheus_port, f"/api/v1/query?{query}")
        except (OSError, http.client.HTTPException):
            return Counter()
        series = json.loads(body)["data"]["result"] if status == 200 else []
        return Counter({one["metric"].get("view", ""): int(float(one["value"][1])) for one in series})

    def show_addresses(self, *, with_prometheus: bool) -> None:
        self.say(f"  site        http://{HOST}:{self.site_port}/")
        for port in self.ask_workers("/"):
            self.say(f"  worker      http://{HOST}:{port}/metrics")
        self.show_pages()
        if with_prometheus:
            graph = urlencode({"g0.expr": f"sum by (view) (rate({METRIC}[1m]))", "g0.tab": 0, "g0.range_input": "15m"})
            self.say(f"  Prometheus  http://{HOST}:{self.prometheus_port}/graph?{graph}")
        self.say(f"  dashboards  {ROOT / 'prometheus/dashboards'}, for Grafana")

    def show_pages(self) -> None:
        password = self.env["DJANGO_SUPERUSER_PASSWORD"]
        self.say(f"  page        http://{HOST}:{self.site_port}/metrics/  (log in as {STAFF} with {password})")
        self.say(f"  worker page http://{HOST}:{self.ports[0]}/  (the page of the first worker)")

    def keep_running(self, programs: Sequence[Program]) -> None:
        while not self.interrupted:
            for program in programs:
                if program.poll() is not None:
                    raise program.failure("The demo is over.")
            time.sleep(PAUSE_SECONDS)

    def start(self, name: str, *words: str) -> Program:
        program = Program(self.folder / f"{name}.log", words, self.env)
        self.stack.callback(program.end)
        return program

    def wait_until(self, condition: Callable[[], bool], program: Program) -> bool:
        """Return whether the condition became true before the deadline, and before the program ended."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            last = program.poll() is not None or time.monotonic() > deadline
            if condition():
                return True
            if last:
                return False
            self.pause()

    def pause(self) -> None:
        if self.interrupted:
            raise CommandError("Interrupted. The demo has stopped its programs and removed its files.", returncode=130)
        time.sleep(PAUSE_SECONDS)

    def say(self, text: str, *, passing: bool = False) -> None:
        tty = self.stdout.isatty()
        self.stdout.write(f"\r\x1b[K{text}" if tty else text, ending="" if tty and passing else "\n")
        self.stdout.flush()


def _find_free_ports(count: int) -> range:
    """Return consecutive free ports below the kernel's ephemeral ports."""
    blocks = [range(first, first + count) for first in range(20000, 32768 - count, count)]
    random.shuffle(blocks)  # for demos that start at the same time
    for block in blocks:
        with suppress(RangeFull), ExitStack() as held:
            for port in block:
                held.enter_context(claim(HOST, [port]).listener)
            return block
    raise CommandError(f"There are no {count} consecutive free ports in 20000-32767 on {HOST}. Use fewer --workers.")


def _fetch(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(HOST, port, timeout=10)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()


def _format_table(rows: Mapping[str, Counter[str]]) -> Iterator[str]:
    views = list(dict.fromkeys([*REQUESTS, *(view for counts in rows.values() for view in counts)]))
    cells = [["", *views, "total"]]
    cells += [[name, *(str(counts[view]) for view in views), str(counts.total())] for name, counts in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *numbers in cells:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])
