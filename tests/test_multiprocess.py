"""PROMETHEUS_MULTIPROC_DIR is an error with a hint, and the site serves requests, whatever the value is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import run_python
from tests.minimal import django_admin, serve_site, write_site
from tests.servers import send_requests

pytestmark = pytest.mark.once

# prometheus_client creates a file in the folder for each metric. The only folders in which root cannot create files are
# those of kernel file systems.
FOLDERS = {"missing": "{tmp}/missing", "file": "{tmp}/file", "unwritable": "/proc", "good": "{tmp}", "empty": ""}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
def test_the_site_serves_and_the_log_and_the_check_name_the_variable(
    preload: list[str], kind: str, free_ports: range, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    env = {**write_site(tmp_path), "PROMETHEUS_MULTIPROC_DIR": FOLDERS[kind].format(tmp=tmp_path)}

    with serve_site(tmp_path, free_ports, *preload, **env) as site:
        site.child.wait_until(lambda: site.request() == 200, "the site answers")
        statuses = send_requests(20, lambda _: site.request())
        workers = site.child.children()

        assert statuses.count(200) == 20
        assert not site.live()
        output = site.child.output()
        assert 1 <= output.count("ERROR django_promports PROMETHEUS_MULTIPROC_DIR is set") <= len(workers) + 1, output
        assert output.count("ERROR") == output.count("(promports.E003)")
        assert "Traceback" not in output

    check = django_admin("check", **env)
    assert check.returncode == 1
    assert check.stderr.count("promports.E003") == 1
    assert "Traceback" not in check.stderr


def test_with_django_prometheus_too_the_cause_is_named(free_ports: range, tmp_path: Path) -> None:
    # django-prometheus' middleware creates metrics when it is loaded, so the worker cannot boot, whatever we do.
    env = {**write_site(tmp_path, counted=True), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "missing")}

    check = django_admin("check", **env)
    with serve_site(tmp_path, free_ports, **env) as site:
        site.child.wait_until(lambda: site.child.process.poll() is not None, "gunicorn ends")

        output = site.child.output()

    assert check.returncode == 1
    assert check.stderr.count("promports.") == check.stderr.count("promports.E003") == 1
    assert "Traceback" not in check.stderr
    assert "ERROR django_promports PROMETHEUS_MULTIPROC_DIR is set" in output.partition("Traceback")[0]


def test_no_metric_of_the_package_is_made_before_the_process_serves(free_ports: range, tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, django, django_promports
from prometheus_client import REGISTRY
django.setup()
for module in pkgutil.walk_packages(django_promports.__path__, "django_promports."):
    importlib.import_module(module.name)

def own():
    return sum(name.startswith("promports_") for name in REGISTRY._names_to_collectors)

print(own())
for _ in range(2):
    assert django_promports.start()
    print(own())
    django_promports.stop()
"""
    env = write_site(tmp_path)

    done = run_python(code, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[-1]}", seconds=60, **env)

    assert done.returncode == 0, done.stderr
    before, after, again = map(int, done.stdout.split())
    assert (before, after) == (0, again)
    assert after >= 4
