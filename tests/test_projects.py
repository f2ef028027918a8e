"""No count of a real project is lost: wagtail, oscar and a django-ninja API, a reload and a kill under traffic."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.projects import PROJECTS, Project, environment, run
from tests.servers import Prometheus, accepts, prometheus, running
from tests.traffic import Traffic

pytestmark = pytest.mark.projects

WORKERS = 4
WIDTH = 12
# The reload and the kill happen at random moments of this many seconds from the first response.
DISTURBED = 6.0
# Generous, for a slow machine: three projects start and reload at the same time.
LONG = 90.0
RESPONSES = "django_http_responses_total_by_status_view_method_total"
REQUESTS = "django_http_requests_before_middlewares_total"


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Callable[[Project, Path], None]:
    """Copy a project with its database; the first test of the run that wants it makes it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"projects-{testrun_uid}"

    def copy(project: Project, folder: Path) -> None:
        shared.mkdir(exist_ok=True)
        original, unfinished = shared / project.name, shared / f"{project.name}-unfinished"
        with (shared / f"{project.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not original.exists():
                project.make(unfinished)
                unfinished.rename(original)
        shutil.copytree(original, folder)

    return copy


@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["plain", "preload"])
@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_prometheus_counts_every_answered_request_of_a_project_once(
    project: Project,
    options: list[str],
    make: Callable[[Project, Path], None],
    program: Callable[[str], str],
    free_ports: range,
    tmp_path: Path,
) -> None:
    *metric_ports, site_port, prometheus_port = [*free_ports[:WIDTH], *free_ports[-2:]]
    folder = tmp_path / project.name
    make(project, folder)
    with (folder / "site_settings.py").open("a") as settings:
        settings.write(f"PROMPORTS_PORT_RANGE = '{metric_ports[0]}-{metric_ports[-1]}'\n")
        settings.write(f"PROMPORTS_LEDGER_DIR = '{tmp_path / 'ledgers'}'\n")
    dice = random.Random(random.randrange(2**32))  # pytest-randomly prints its seed
    events = sorted((dice.uniform(0, DISTURBED), name) for name in ("HUP", "KILL"))

    words = [sys.executable, "-m", "gunicorn", f"{project.name}.wsgi", "--chdir", str(folder), "--no-control-socket"]
    words += ["-b", f"127.0.0.1:{site_port}", "-w", str(WORKERS), "--graceful-timeout", "15", *options]
    with prometheus(program("prometheus"), tmp_path, prometheus_port) as server:
        run(folder, "manage.py", "export_targets", "--output", str(tmp_path / "targets/django.json"))
        with running(*words, log=tmp_path / "server.log", **environment(folder)) as site:
            site.wait_until(lambda: accepts(site_port), "the site listens")
            traffic = Traffic(f"127.0.0.1:{site_port}", project.asked)
            site.wait_until(traffic.answered.total, "the site answers", LONG)
            begun = time.monotonic()
            for moment, event in events:
                time.sleep(max(0.0, begun + moment - time.monotonic()))
                workers = site.children()
                if event == "HUP":
                    os.kill(site.pid, signal.SIGHUP)
                    old = workers
                else:
                    os.kill(dice.choice(workers), signal.SIGKILL)
            site.wait_until(
                lambda: len(now := site.children()) == WORKERS and not set(now) & set(old), "all workers are new", LONG
            )
            before = traffic.answered.copy()
            site.wait_until(
                lambda: all(traffic.answered[asked] >= before[asked] + 20 for asked in project.asked),
                "the new workers answer",
                LONG,
            )
            traffic.stop()

            def story() -> str:
                return f"{events}\n{run(folder, 'manage.py', 'show_targets')}\n{site.output()}"

            check(server, project, traffic, story)


def check(server: Prometheus, project: Project, traffic: Traffic, story: Callable[[], str]) -> None:
    """Assert that Prometheus counts each answered request once, and unanswered ones at most once."""
    assert not traffic.errors, story()
    assert traffic.unanswered.total() <= 4, story()  # a kill can cost each thread of the traffic one response
    wanted = {REQUESTS: (traffic.answered.total(), traffic.unanswered.total())}
    for (method, path), view in project.asked.items():
        series = f'{RESPONSES}{{view="{view}",method="{method}",status="200"}}'
        wanted[series] = traffic.answered[method, path], traffic.unanswered[method, path]

    def wrong() -> list[str]:
        return [
            f"{series}: {counted:g} counted, {answered} answered, {unanswered} not"
            for series, (answered, unanswered) in wanted.items()
            if not answered <= (counted := server.count(series)) <= answered + unanswered
        ]

    deadline = time.monotonic() + 60
    while wrong() and time.monotonic() < deadline:
        time.sleep(0.2)
    # A count that is exported twice may come later.
    scraped = server.query("count_over_time(up[1h])")
    server.child.wait_until(
        lambda: all(number >= scraped[port] + 3 for port, number in server.query("count_over_time(up[1h])").items()),
        "three more scrapes",
    )
    assert not (found := wrong()), "\n".join([*found, story()])
