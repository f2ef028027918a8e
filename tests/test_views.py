"""The view with the live targets: who may read it, and how Prometheus uses it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Set
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import Client
from django.urls import resolve
from pytest_django import Settings

from tests.commands import endpoint
from tests.servers import Prometheus, Site, get, gunicorn, prometheus, send_requests

PATH = "/metrics/targets"


@pytest.fixture
def token_file(tmp_path: Path, settings: Settings) -> Path:
    path = tmp_path / "token"
    path.write_text("s3cret")
    settings.PROMPORTS_BEARER_TOKEN_FILE = path
    return path


def test_who_has_the_token_is_told_the_live_targets(
    client: Client, free_ports: range, settings: Settings, token_file: Path
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports
    settings.PROMPORTS_TARGET_HOST = "web1"
    settings.PROMPORTS_TARGET_LABELS = {"site": "shop"}

    with endpoint(free_ports[2:], token="s3cret"):
        answer = client.get(PATH, headers={"Authorization": "Bearer s3cret"})

    assert (answer.status_code, answer["Content-Type"]) == (200, "application/json")
    assert json.loads(answer.content) == [{"targets": [f"web1:{free_ports[2]}"], "labels": {"site": "shop"}}]
    assert "no-store" in answer["Cache-Control"]


def test_no_live_target_is_an_empty_list(
    client: Client, free_ports: range, settings: Settings, token_file: Path
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports

    assert client.get(PATH, headers={"Authorization": "Bearer s3cret"}).content == b"[]\n"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "Bearer s3cr\u00e9t"]
)
def test_who_has_no_token_is_told_nothing(client: Client, token_file: Path, header: str) -> None:
    answer = client.get(PATH, headers={"Authorization": header})

    assert (answer.status_code, answer["WWW-Authenticate"]) == (401, "Bearer")
    assert b"targets" not in answer.content


def test_nobody_is_told_where_there_is_no_token(client: Client) -> None:
    answer = client.get(PATH)

    assert answer.status_code == 403
    assert b"PROMPORTS_BEARER_TOKEN_FILE" in answer.content


def test_a_token_that_cannot_be_read_is_an_error_and_no_empty_list(client: Client, token_file: Path) -> None:
    token_file.unlink()

    with pytest.raises(ImproperlyConfigured, match="PROMPORTS_BEARER_TOKEN_FILE"):
        client.get(PATH, headers={"Authorization": "Bearer s3cret"})


def test_the_targets_are_only_read(client: Client, token_file: Path) -> None:
    assert client.post(PATH, headers={"Authorization": "Bearer s3cret"}).status_code == 405


def test_prometheus_need_not_log_in_where_everybody_else_must() -> None:
    # The attribute of a view that LoginRequiredMiddleware reads.
    assert resolve(PATH).func.login_required is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [["-k", "sync"], ["-k", "gthread", "--threads", "4"], ["-k", "gevent"]], ids=str)
def test_a_worker_that_asks_its_own_endpoint_is_answered(
    options: list[str], free_ports: range, tmp_path: Path, token_file: Path
) -> None:
    with gunicorn(tmp_path, free_ports, *options, workers=2, DEMO_TOKEN_FILE=str(token_file)) as site:
        live = site.wait_for_workers(2)

        def ask(_: int) -> int:
            (group,) = json.loads(get(f"http://{site.address}{PATH}", 20, Authorization="Bearer s3cret"))
            return len(set(group["targets"]) & {f"127.0.0.1:{port}" for port in live})

        assert send_requests(12, ask) == [2] * 12, site.child.output()


CONFIGURATION = """
global:
  scrape_interval: 5s
scrape_configs:
  - job_name: endpoint
    authorization: {{credentials_file: {token_file}}}
    http_sd_configs:
      - url: http://127.0.0.1:{port}/targets
        refresh_interval: 1s
        authorization: {{type: Bearer, credentials_file: {token_file}}}
  - job_name: site
    authorization: {{credentials_file: {token_file}}}
    http_sd_configs:
      - url: http://{address}/metrics/targets
        refresh_interval: 1s
        authorization: {{type: Bearer, credentials_file: {token_file}}}
"""


@pytest.mark.long
def test_prometheus_follows_the_workers_through_a_reload_and_when_their_number_changes(
    program: Callable[[str], str], free_ports: range, tmp_path: Path, token_file: Path
) -> None:
    *ports, prometheus_port = free_ports
    with gunicorn(tmp_path, ports, workers=2, DEMO_TOKEN_FILE=str(token_file)) as site:
        site.wait_for_workers(2)
        config = CONFIGURATION.format(token_file=token_file, port=ports[0], address=site.address)
        with prometheus(program("prometheus"), tmp_path, prometheus_port, config) as server:
            began = wait_until_scraped(server, site)

            old = site.wait_until_settled(2)
            os.kill(site.child.pid, signal.SIGHUP)
            site.wait_until_replaced(old.values(), 2)
            wait_until_scraped(server, site, but=began)

            for number, workers in ((signal.SIGTTIN, 3), (signal.SIGTTOU, 2)):
                os.kill(site.child.pid, number)
                site.wait_for_workers(workers)
                wait_until_scraped(server, site)


def wait_until_scraped(server: Prometheus, site: Site, but: Set[float] = frozenset()) -> set[float]:
    """Wait until the targets of both jobs are exactly the live workers and heirs, and the workers have been scraped.

    Return the start times of the processes. but: start times of processes that must be gone. A refresh takes a second,
    and Prometheus applies new targets every five; the rest of the deadline is for a busy machine.
    """

    def find() -> set[float]:
        live, heirs = ({f"127.0.0.1:{port}" for port in found()} for found in (site.live, site.heirs))
        listed = live | heirs
        known: dict[str, set[str]] = {"endpoint": set(), "site": set()}
        for target in server.ask("targets")["activeTargets"]:
            known[target["labels"]["job"]].add(target["labels"]["instance"])
        began = {job: server.query(f'process_start_time_seconds{{job="{job}"}}') for job in known}
        if f"127.0.0.1:{site.ports[0]}" not in live:  # Prometheus gets its list from this one, and keeps the last list
            del known["endpoint"]
        if any(known[job] != listed or set(began[job]) != live or set(began[job].values()) & but for job in known):
            return set()
        return set(began["site"].values())

    return server.child.wait_until(find, "Prometheus scrapes the live workers and knows no others")
