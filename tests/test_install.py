"""Installing the package with pip: the installed Django stays as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.minimal import write_site
from tests.servers import ROOT

pytestmark = pytest.mark.once

README = (ROOT / "README.md").read_text()
# The oldest Python that Django 6.1 supports, and the interpreters that may be it.
OLDEST = (3, 12)
INTERPRETERS = [sys.executable, "python3.12", "python3.13", "python3.14", "python3"]


@pytest.fixture(scope="module")
def interpreter() -> str:
    """A Python that the newest Django supports: this one, or another one of the machine."""
    probe = f"import ensurepip, sys; sys.exit(sys.version_info < {OLDEST})"
    pyenv = sorted(map(str, Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python")))
    for name in [*INTERPRETERS, *pyenv]:
        path = shutil.which(name)
        if path and subprocess.run([path, "-c", probe], capture_output=True, timeout=30, check=False).returncode == 0:
            return path
    message = f"Django 6.1 needs Python {OLDEST[0]}.{OLDEST[1]}, which is not installed"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory, interpreter: str) -> Path:
    """A folder in which pip finds a wheel of this working tree."""
    folder = tmp_path_factory.mktemp("wheels")
    source = tmp_path_factory.mktemp("source") / "tree"
    # A copy: the build must not leave files in the tree, nor pack untracked ones.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "docs", "tests"))
    builder = Environment(tmp_path_factory.mktemp("builder"), interpreter)
    builder.pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(source))
    return folder


class Environment:
    """A new virtual environment."""

    def __init__(self, folder: Path, interpreter: str) -> None:
        subprocess.run([interpreter, "-m", "venv", str(folder)], timeout=120, check=True)
        self.python = str(folder / "bin/python")

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [self.python, *arguments],
            cwd="/",
            env={**clean, **env},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def pip(self, *arguments: str, **env: str) -> None:
        done = self.run("-m", "pip", "--disable-pip-version-check", *arguments, **env)
        assert done.returncode == 0, done.stdout + done.stderr

    def version(self, package: str) -> str:
        """Return the version of a package; empty if it is not installed."""
        code = f"from importlib.metadata import distributions as d; print(*(p.version for p in d(name={package!r})))"
        return self.run("-c", code).stdout.strip()


def install_lines() -> list[str]:
    """Return the lines of the README that install the package."""
    return re.findall(r"^pip install (.*django-promports.*)$", README, re.MULTILINE)


def words(line: str) -> list[str]:
    return [word.strip('"') for word in line.partition("#")[0].split()]


def test_the_readme_has_a_line_for_most_sites_and_one_for_django_6_1() -> None:
    usual, newest = map(words, install_lines())

    assert usual == ["django-promports[django-prometheus]"]
    # Only django-prometheus 2.4.0 has no upper bound: with Django in the same call, pip finds the newest one that fits.
    assert newest == [*usual, "django~=6.1.0"]


@pytest.mark.parametrize(
    ("requirements", "counted"),
    [(["django-promports"], False), (words(install_lines()[-1]), True)],
    ids=["plain", "readme"],
)
def test_an_installation_leaves_django_6_1_as_it_is(
    requirements: list[str], counted: bool, interpreter: str, wheels: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv", interpreter)
    environment.pip("install", "django==6.1.*")
    before = environment.version("django")
    site = tmp_path / "site"
    site.mkdir()
    env = {**write_site(site, counted=counted), "PYTHONPATH": str(site), "MINIMAL_LEDGER_DIR": ""}

    environment.pip("install", *requirements, PIP_FIND_LINKS=str(wheels))
    check = environment.run("-m", "django", "check", **env)

    assert before.startswith("6.1")
    assert environment.version("django") == before
    assert bool(environment.version("django-prometheus")) == counted
    assert environment.run("-m", "pip", "check").returncode == 0
    assert check.returncode == 0, check.stderr
    assert check.stderr.count("promports.") == (0 if counted else 2)
    assert ("django-prometheus is not set up: the package is not installed" in check.stderr) != counted


def test_without_django_prometheus_the_sites_own_metrics_are_served(
    interpreter: str, wheels: Path, free_ports: range, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv", interpreter)
    environment.pip("install", "django-promports", PIP_FIND_LINKS=str(wheels))
    env = {**write_site(tmp_path), "PYTHONPATH": str(tmp_path), "MINIMAL_LEDGER_DIR": str(tmp_path / "ledgers")}
    code = """
import urllib.request, django, django_promports
from prometheus_client import Counter
django.setup()
Counter("events", "Events.").inc(3)
for path in ("/metrics", "/", "/?activity"):
    url = f"http://127.0.0.1:{django_promports.start()}{path}"
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    print(urllib.request.urlopen(request, timeout=20).read().decode())
"""

    done = environment.run("-c", code, DEMO_PORT_RANGE=f"{free_ports[0]}-{free_ports[-1]}", **env)

    assert environment.version("django-prometheus") == ""
    assert "\nevents_total 3.0\n" in done.stdout, done.stderr
    assert '"activity": []' in done.stdout
    assert "ERROR" not in done.stderr
