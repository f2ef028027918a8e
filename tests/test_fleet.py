"""Prometheus accepts the configurations in the docs, and the arithmetic of docs/fleet.md is right."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import ROOT

PAGE = (ROOT / "docs/fleet.md").read_text()
README = (ROOT / "README.md").read_text()
CONFIGURATIONS = re.findall(r"^```yaml\n(.*?)^```", README + PAGE, re.MULTILINE | re.DOTALL)
WORKERS, SERIES, SECONDS, ADDED = 4, 1000, 15, 5


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_prometheus_accepts_each_configuration(
    configuration: str, program: Callable[[str], str], tmp_path: Path
) -> None:
    path = tmp_path / "prometheus.yml"
    path.write_text(configuration.replace("/etc/prometheus", str(tmp_path)))
    (tmp_path / "token").write_text("s3cret")

    done = subprocess.run(
        [program("promtool"), "check", "config", str(path)], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("hosts", [1, 100, 10_000])
@pytest.mark.parametrize("which", ["all 32 ports", "live ports"])
def test_the_table_of_costs_follows_from_what_is_assumed(hosts: int, which: str) -> None:
    targets = hosts * (32 if which == "all 32 ports" else WORKERS)
    series = hosts * WORKERS * SERIES + targets * ADDED
    scrapes = targets / SECONDS
    cells = [f"{targets:,}", f"{series:,}", f"{scrapes:,.{0 if scrapes > 10 else 1}f}", f"{series / SECONDS:,.0f}"]

    assert f"{WORKERS} workers a host with {SERIES:,} series each, a scrape each {SECONDS} s" in PAGE
    assert f"| {hosts:,}, {which} | {' | '.join(cells)} |" in PAGE


def test_what_is_said_of_memory_and_of_shares_follows_from_the_table() -> None:
    text = " ".join(PAGE.split())
    series = {hosts: hosts * (WORKERS * SERIES + 32 * ADDED) for hosts in (100, 500, 10_000)}

    assert f"100 hosts take {series[100] * 4e3 / 1e9:.1f} GB" in text
    assert f"10,000 hosts take {series[10_000] * 4e3 / 1e9:.0f} GB" in text
    assert f"{series[500]:,} series ({series[500] * 4e3 / 1e9:.1f} GB) and {500 * 32 / SECONDS:,.0f} scrapes" in text
