"""A real Prometheus finds the workers, counts every request, and never reads an incomplete file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from django_promports.targets import dump_json, target_groups, write_file
from tests.servers import ROOT, export_targets, get, gunicorn, manage, prometheus, running, send_requests


def test_promtool_accepts_the_configuration_and_the_exported_file(
    program: Callable[[str], str], tmp_path: Path
) -> None:
    promtool = program("promtool")
    shutil.copytree(ROOT / "prometheus", tmp_path / "prometheus")
    for name, options in (("django.json", []), ("django.yml", ["--format", "yaml", "--worker-label"])):
        output = tmp_path / "prometheus/targets" / name
        assert manage("export_targets", "--output", str(output), *options).returncode == 0
    with running(
        promtool, "check", "config", str(tmp_path / "prometheus/prometheus.yml"), log=tmp_path / "promtool.log"
    ) as child:
        child.wait_until(lambda: child.process.poll() is not None, "promtool ends")

    assert child.process.returncode == 0, child.output()
    assert "WARNING" not in child.output()


def test_prometheus_shows_every_live_worker_and_counts_every_request(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    *ports, prometheus_port = free_ports
    # The file is written once, at deploy time, before anything runs.
    with prometheus(program("prometheus"), tmp_path, prometheus_port) as server:
        export_targets(tmp_path / "targets/django.json", ports[:-1])
        with gunicorn(tmp_path, ports) as site:
            live = {f"127.0.0.1:{port}" for port in site.wait_for_workers()}
            server.child.wait_until(lambda: server.up() == live, "every worker is up, and nothing else")

            statuses = send_requests(600, lambda _: site.request())

            assert statuses.count(200) == 600
            name = "django_http_requests_before_middlewares_total"
            counted = server.child.wait_until(
                lambda: values if sum((values := server.query(name)).values()) >= 600 else {}, "all are counted"
            )
            assert sum(counted.values()) == 600
            assert set(counted) == live
        assert {t["scrapeUrl"] for t in server.ask("targets")["activeTargets"]} == {
            f"http://127.0.0.1:{port}/metrics" for port in ports[:-1]
        }


@pytest.mark.long
def test_prometheus_never_sees_a_file_half_written(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    path = tmp_path / "targets/django.json"
    with prometheus(program("prometheus"), tmp_path, free_ports[-1]) as server:
        for i in range(200):
            # Long enough for a reader to see an incomplete file, if there were one.
            hosts = [f"10.{i}.{n // 250}.{n % 250}" for n in range(3000)] if i < 199 else ["127.0.0.1"]
            content = list(dump_json(target_groups(dict.fromkeys(hosts, (1,)), labels={})))
            assert write_file(path, content.copy)
        server.child.wait_until(
            lambda: len(server.ask("targets")["activeTargets"]) == 1, "Prometheus has read the last version"
        )

        failures = get(f"{server.url}/metrics").decode()

    assert "prometheus_sd_file_read_errors_total 0\n" in failures
    assert "level=error" not in server.child.output()
    assert [entry.name for entry in path.parent.iterdir()] == ["django.json"]
