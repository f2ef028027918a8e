"""No count is lost: a real Prometheus, real gunicorn, recycling, reloads and kills under load."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from django_promports.folders import make_folder
from django_promports.ledger import Ledger
from tests.counted import COUNTED, check, watched
from tests.servers import ROOT, Site, database, gunicorn, manage, scrape, send_requests
from tests.traffic import Traffic

WORKERS = 4


def do_nothing(site: Site, seconds: float) -> None:
    time.sleep(seconds)


def kill_every_two_seconds(site: Site, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(2)
        live = site.child.wait_until(site.live, "a worker answers")
        os.kill(random.choice(list(live.values())), signal.SIGKILL)


def reload_twice(site: Site, seconds: float) -> None:
    for _ in range(2):
        time.sleep(seconds / 2)
        before = site.live()
        os.kill(site.child.pid, signal.SIGHUP)
        site.wait_until_replaced(before.values(), WORKERS)
        assert sorted(site.live()) == sorted(before), "the new workers have the ports of the old ones"


# The options of gunicorn, what happens during the test, and the size of the range.
SCENARIOS: dict[str, tuple[list[str], Callable[[Site, float], None], int]] = {
    "plain": ([], do_nothing, 12),
    "recycle": (["--max-requests", "50"], do_nothing, 12),
    "preload-recycle": (["--preload", "--max-requests", "50"], do_nothing, 12),
    "kill": ([], kill_every_two_seconds, 12),
    "preload-kill": (["--preload"], kill_every_two_seconds, 12),
    "reload": ([], reload_twice, 12),
    "preload-reload": (["--preload"], reload_twice, 12),
    "reload-narrow": (["--preload"], reload_twice, WORKERS),
    "threads": (["-k", "gthread", "--threads", "8", "--max-requests", "100"], do_nothing, 12),
}


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_prometheus_counts_every_answered_request_once(
    scenario: str, program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    options, disturb, width = SCENARIOS[scenario]
    with watched(program, free_ports, tmp_path, width) as (server, site_ports):
        with gunicorn(tmp_path, site_ports, *options) as site:
            site.wait_for_workers(WORKERS)
            traffic = Traffic(site.address, COUNTED)
            disturb(site, 12)
            traffic.stop()

            check(server, site, traffic, WORKERS)
        assert len(list((tmp_path / "ledgers").glob("*.ledger*"))) <= width
        if scenario != "plain":
            assert site.child.output().count("Booting worker") > WORKERS


@pytest.mark.long
def test_prometheus_counts_every_answered_request_once_over_a_restart(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    with watched(program, free_ports, tmp_path, 12) as (server, site_ports):
        with gunicorn(tmp_path, site_ports) as site:
            site.wait_for_workers(WORKERS)
            traffic = Traffic(site.address, COUNTED)
            time.sleep(5)
        with gunicorn(tmp_path, site_ports) as site:
            site.wait_for_workers(WORKERS)
            time.sleep(5)
            traffic.stop()

            check(server, site, traffic, WORKERS)


@pytest.mark.parametrize("ledgers", ["ledgers", ""], ids=["ledgers", "memory"])
def test_what_a_preloading_master_counts_is_exported_once(ledgers: str, free_ports: range, tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(
        "from prometheus_client import Counter\n"
        "LOADED = Counter('loaded', 'Made and counted before the app is ready.')\n"
        "LOADED.inc(3)\n"
        "from demo_site.wsgi import application\n"
        "LOADED.inc(4)\n"
    )
    env: dict[str, Any] = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "DEMO_LEDGER_DIR": ledgers and str(tmp_path / ledgers)}
    with gunicorn(tmp_path, free_ports, "--preload", "counting", **env) as site:
        site.wait_for_workers()
        at_first = site.total("loaded_total")

        os.kill(max(site.child.children()), signal.SIGTERM)
        site.child.wait_until(lambda: site.child.output().count("Booting worker") == 5, "a successor comes")
        site.wait_for_workers()

        assert at_first == 7
        assert site.total("loaded_total") == 7


def test_without_ledgers_all_that_living_workers_counted_is_there(free_ports: range, tmp_path: Path) -> None:
    with gunicorn(tmp_path, free_ports, DEMO_LEDGER_DIR="") as site:
        live = site.wait_for_workers()
        assert send_requests(100, lambda _: site.request()).count(200) == 100
        before = site.total()
        lost = scrape(free_ports[0])["django_http_requests_before_middlewares_total"]

        os.kill(live[free_ports[0]], signal.SIGKILL)
        site.child.wait_until(lambda: len(now := site.live()) == 4 and now != live, "a successor comes")

        assert before == 100
        assert site.total() == 100 - lost
        assert not (tmp_path / "ledgers").exists()


def test_a_process_that_finds_all_ledgers_taken_counts_in_memory_and_says_so(free_ports: range, tmp_path: Path) -> None:
    folder = tmp_path / "ledgers"
    make_folder(folder)
    # As in containers that share the folder but not their ports.
    ledgers = [Ledger(folder / f"{port}.ledger", "demo_site.settings") for port in free_ports[:3]]
    with contextlib.ExitStack() as stack:
        for ledger in ledgers:
            stack.callback(ledger.close)
        width = f"{free_ports[0]}-{free_ports[2]}"
        with gunicorn(tmp_path, free_ports, workers=1, range_=width) as site:
            assert list(site.wait_for_workers(1)) == [free_ports[0]]
            assert site.request() == 200
            assert site.total() == 1
            assert "Counting in memory: other processes have the ledgers" in site.child.output()


def test_a_port_whose_ledger_is_taken_is_passed_over(free_ports: range, tmp_path: Path) -> None:
    make_folder(tmp_path / "ledgers")
    taken = Ledger(tmp_path / "ledgers" / f"{free_ports[0]}.ledger", "demo_site.settings")
    with contextlib.closing(taken), gunicorn(tmp_path, free_ports, workers=2) as site:
        assert sorted(site.wait_for_workers(2)) == list(free_ports[1:3])


@pytest.mark.parametrize("mode", [0o777, None], ids=["writable", "link"])
def test_in_a_folder_that_is_not_safe_workers_count_in_memory(
    mode: int | None, free_ports: range, tmp_path: Path
) -> None:
    database(tmp_path)  # by a command, which would not run with the wrong folder
    folder = tmp_path / "ledgers"
    if mode is None:
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(mode)
    with gunicorn(tmp_path, free_ports, workers=1) as site:
        site.wait_for_workers(1)
        assert site.request() == 200
        assert site.total() == 1
        assert site.child.output().count("Counting in memory") == 1
    assert not list(folder.iterdir())
    checked = manage("check")
    assert checked.returncode == 1
    assert "promports.E012" in checked.stderr
