"""Real servers in their own process groups, and waiting for conditions."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from django_promports.reading import read_status

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
# Generous: only a broken program should reach a deadline, not a slow one.
SECONDS = 30.0
# granian's --workers-kill-timeout and its siblings leave this to it: what it takes for a start that has failed.
START_SECONDS = 5.0


class Child:
    """A process with its descendants and their output."""

    def __init__(self, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def children(self) -> list[int]:
        return children(self.pid)

    def survivors(self) -> list[str]:
        """Return the names of the processes of its session that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, fields = path.read_text().rpartition(")")
                if int(fields.split()[3]) == self.pid and fields.split()[0] not in "ZX":
                    found.append(f"{name})")
        return found

    def wait_until(self, condition: Callable[[], T], what: str, seconds: float = SECONDS) -> T:
        return wait_until(condition, what, seconds, self.output)

    def stop(self, seconds: float = SECONDS) -> None:
        """Terminate it as an operator does, then kill what is left of its session."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"It does not stop.\n{self.output()}")  # noqa: B904 - what went wrong before shows too
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()


def wait_until(condition: Callable[[], T], what: str, seconds: float = SECONDS, output: Callable[[], str] = str) -> T:
    """Return the first true value of the condition."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"Waited {seconds} s in vain: {what}. Last: {value!r}\n{output()}")
        time.sleep(0.02)


def children(parent: int) -> list[int]:
    """Return the pids of a process's direct children."""
    pids = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        pids += [int(pid) for pid in (task / "children").read_text().split()]
    return pids


@contextlib.contextmanager
def running(*arguments: str, log: Path, **env: str) -> Iterator[Child]:
    child = Child(arguments, log, env)
    try:
        yield child
    finally:
        child.stop()


class Site:
    """The demo site under some server: its address, and what its endpoints report."""

    def __init__(self, child: Child, address: str, ports: Sequence[int], token: str = "") -> None:
        self.child, self.address, self.ports, self.token = child, address, ports, token

    def request(self, path: str = "/", method: str = "GET") -> int:
        return request(f"http://{self.address}{path}", method)

    def is_listening(self) -> bool:
        return accepts(int(self.address.rpartition(":")[2]))

    def abouts(self) -> dict[int, dict[str, Any]]:
        """Return how the endpoint at each live port describes itself."""
        return {port: about for port in self.ports if (about := describe(port, self.token))}

    def live(self) -> dict[int, int]:
        """Return the pid of each worker by its port."""
        return {port: about["pid"] for port, about in self.abouts().items() if about.get("role") != "heir"}

    def heirs(self) -> dict[int, int]:
        """Return the pid of the heir of each port that has one."""
        return {port: about["pid"] for port, about in self.abouts().items() if about.get("role") == "heir"}

    def wait_for_workers(self, count: int = 4) -> dict[int, int]:
        return self.child.wait_until(
            lambda: live if len(live := self.live()) == count else {}, f"{count} workers answer"
        )

    def wait_until_settled(self, count: int) -> dict[int, int]:
        """Wait until no worker is young: granian stops if one ends while it is young."""

        def settled() -> dict[int, int]:
            workers = {port: about for port, about in self.abouts().items() if about.get("role") != "heir"}
            young = any(about["uptime_seconds"] <= START_SECONDS for about in workers.values())
            return {} if young or len(workers) != count else {port: about["pid"] for port, about in workers.items()}

        return self.child.wait_until(settled, f"{count} workers have settled")

    def wait_until_replaced(self, gone: Collection[int], count: int = 4) -> dict[int, int]:
        """Wait until all workers have ports again, and none of them is one of the old processes."""
        return self.child.wait_until(
            lambda: live if len(live := self.live()) == count and not set(gone) & set(live.values()) else {},
            f"{count} workers answer, none of them of {sorted(gone)}",
        )

    def total(self, sample: str = "django_http_requests_before_middlewares_total") -> float:
        return sum(scrape(port).get(sample, 0) for port in self.abouts())


@contextlib.contextmanager
def serving(tmp_path: Path, ports: Sequence[int], *words: str, range_: str = "", **env: str) -> Iterator[Site]:
    """Run a server of the demo site. The site uses the last port, the workers claim the others for their metrics.

    {port} in the command line stands for the port of the site.
    """
    *metric_ports, site_port = ports
    settings = {
        "DJANGO_SETTINGS_MODULE": "demo_site.settings",
        "DEMO_PORT_RANGE": range_ or f"{metric_ports[0]}-{metric_ports[-1]}",
        "DEMO_DATABASE": str(database(tmp_path)),
        "PYTHONUNBUFFERED": "1",
        **env,
    }
    arguments = [word.replace("{port}", str(site_port)) for word in words]
    with running(*arguments, log=tmp_path / "server.log", **settings) as child:
        token = Path(env["DEMO_TOKEN_FILE"]).read_text() if "DEMO_TOKEN_FILE" in env else ""
        yield Site(child, f"127.0.0.1:{site_port}", metric_ports, token)


def gunicorn(
    tmp_path: Path, ports: Sequence[int], *options: str, workers: int = 4, range_: str = "", **env: str
) -> contextlib.AbstractContextManager[Site]:
    """Run gunicorn on the demo site."""
    # The script: after SIGUSR2, gunicorn cannot run what `python -m` ran, as its own `http` would hide Python's.
    words = [sys.executable, str(Path(sys.executable).with_name("gunicorn"))]
    words += ["-c", "demo_site/gunicorn.conf.py", "--no-control-socket"]
    # A worker that is just being forked misses the SIGTERM that gunicorn sends it, and is killed after this time.
    words += ["-b", "127.0.0.1:{port}", "-w", str(workers), "--graceful-timeout", "15", *options]
    return serving(tmp_path, ports, *words, range_=range_, **env)


def runserver(
    tmp_path: Path, ports: Sequence[int], *options: str, **env: str
) -> contextlib.AbstractContextManager[Site]:
    """Run Django's development server on the demo site."""
    words = [sys.executable, "manage.py", "runserver", "127.0.0.1:{port}", *options]
    return serving(tmp_path, ports, *words, **{"DEMO_DEBUG": "1", **env})


def database(tmp_path: Path) -> Path:
    """Return a database of the demo site in the folder; the first call creates it."""
    path = tmp_path / "demo.sqlite3"
    if not path.exists():
        done = manage("migrate", "--verbosity=0", DEMO_DATABASE=str(path))
        assert done.returncode == 0, done.stdout + done.stderr
    return path


def manage(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run manage.py."""
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def request(url: str, method: str = "GET", seconds: float = 20) -> int:
    """Return the status of the response, or 0 if there is none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=seconds) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            error.read()
            return error.code
    except (OSError, HTTPException, ValueError):
        return 0


def export_targets(output: Path, ports: Sequence[int]) -> None:
    """Write the target list of a range, as at deploy time."""
    done = manage("export_targets", "--output", str(output), DEMO_PORT_RANGE=f"{ports[0]}-{ports[-1]}")
    assert done.returncode == 0, done.stderr


def get(url: str, seconds: float = 10, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds) as response:
        return bytes(response.read())


def describe(port: int, token: str = "") -> dict[str, Any]:
    """Return how the endpoint at the port describes itself; nothing if there is none."""
    headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        about: dict[str, Any] = json.loads(get(f"http://127.0.0.1:{port}/", 5, **headers))
    except (OSError, HTTPException):
        return {}
    return about


def log_in(url: str, name: str, password: str) -> bytes:
    """Return the body of a page that requires a login; the body of the error, if it is refused."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(url, timeout=20) as form:
        (token,) = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', form.read().decode())
        fields = {"username": name, "password": password, "csrfmiddlewaretoken": token}
    try:
        with opener.open(form.url, urllib.parse.urlencode(fields).encode(), timeout=20) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.read()


def parse(text: str) -> dict[str, float]:
    """Return the samples of an exposition by name and labels, in exposition format."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def scrape(port: int, seconds: float = 10) -> dict[str, float]:
    return parse(get(f"http://127.0.0.1:{port}/metrics", seconds).decode())


def send_requests(count: int, ask: Callable[[int], int], threads: int = 8) -> list[int]:
    """Call `ask` that many times from several threads and return the statuses."""
    statuses: list[int] = []
    numbers = iter(range(count))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            status = ask(number)
            with lock:
                statuses.append(status)

    crowd = [threading.Thread(target=work) for _ in range(threads)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    return statuses


class Prometheus:
    def __init__(self, child: Child, port: int) -> None:
        self.child, self.url = child, f"http://127.0.0.1:{port}"

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        return json.loads(get(f"{self.url}/api/v1/{path}?{query}"))["data"]

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return b"Ready" in get(f"{self.url}/-/ready", 5)
        return False

    def query(self, expression: str) -> dict[str, float]:
        """Return the values of an instant query by instance."""
        result = self.ask("query", query=expression)["result"]
        return {series["metric"].get("instance", ""): float(series["value"][1]) for series in result}

    def count(self, metric: str) -> float:
        """Return the total that Prometheus has counted, over all resets and instances, including first values.

        PromQL's increase() does the same for a range of samples, except that it ignores the first value of a series.
        """
        total = 0.0
        for series in self.ask("query", query=f"{metric}[1h]")["result"]:
            last = 0.0
            for _, text in series["values"]:
                value = float(text)
                total += value if value < last else value - last
                last = value
        return total

    def up(self) -> set[str]:
        return {instance for instance, value in self.query("up").items() if value == 1}


@contextlib.contextmanager
def prometheus(
    program: str,
    folder: Path,
    port: int,
    config: str | None = None,
    change_rules: Callable[[str], str] = str,
    seconds: int = 1,
) -> Iterator[Prometheus]:
    """Run Prometheus with the project's configuration and rules, or others, but with intervals of so many seconds."""
    (folder / "targets").mkdir()
    (folder / "rules").mkdir()
    for path in (ROOT / "prometheus/rules").iterdir():
        (folder / "rules" / path.name).write_text(change_rules(path.read_text()))
    if config is None:
        config = (ROOT / "prometheus/prometheus.yml").read_text()
    assert "_interval: 5s" in config
    (folder / "prometheus.yml").write_text(config.replace("_interval: 5s", f"_interval: {seconds}s"))
    arguments = [
        program,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with running(*arguments, log=folder / "prometheus.log") as child:
        server = Prometheus(child, port)
        child.wait_until(server.is_ready, "Prometheus is ready")
        yield server


def how_they_ended(folder: Path, ports: Iterable[int]) -> str:
    """Return how the last holders of these ports ended, as their ledgers tell: in an orderly way, or at once."""
    statuses = [read_status(folder / f"{port}.ledger") for port in ports]
    assert None not in statuses
    seals = [status is not None and status.is_sealed for status in statuses]
    unsealed = seals.count(False)
    assert unsealed in (0, len(seals)), f"{unsealed} of {len(seals)} ledgers are not sealed"
    return "at once" if unsealed else "sealed"


def accepts(port: int) -> bool:
    """Return whether a port of this machine accepts connections."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def listening_ports(pid: int) -> set[int]:
    """Return the TCP ports on which a process has a listening socket open, inherited ones included."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry))
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
                ports.add(int(columns[1].rpartition(":")[2], 16))
    return ports
