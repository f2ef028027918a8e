"""The README and the other documents agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from django.core.management import load_command_class
from prometheus_client import REGISTRY

from django_promports.conf import Conf
from django_promports.own import own_metrics
from tests.servers import ROOT
from tests.test_servers import SERVERS

README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "django_promports"
CODE = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(title: str) -> set[str]:
    return set(re.findall(r"^\| `([^` |=]+)", section(title), re.MULTILINE))


def test_every_setting_is_documented_and_every_documented_one_exists() -> None:
    settings = {name for name in vars(Conf) if name.startswith("PROMPORTS_")}

    assert first_column("Settings") == settings


def test_every_setting_has_the_documented_default(settings: object) -> None:
    for name in first_column("Settings"):
        if hasattr(settings, name):
            delattr(settings, name)
    rows = dict(re.findall(r"^\| `(PROMPORTS_\w+)` \| `([^`]+)` \|", section("Settings"), re.MULTILINE))

    for name, default in rows.items():
        value = getattr(Conf(), name)
        documented = eval(default, {"range": range})
        assert (tuple(documented) if isinstance(documented, range) else documented) == value, name
    described = {f"PROMPORTS_{name}" for name in ("TARGET_HOST", "LEDGER_DIR", "SITE")}
    assert set(rows) | described == first_column("Settings")


def test_every_check_is_documented_once_and_the_other_way_round() -> None:
    documented = re.findall(r"^\| `promports\.([EW]\d+)`", section("System checks"), re.MULTILINE)
    raised = set(re.findall(r'["."]([EW]\d{3})"', CODE["checks.py"]))

    assert len(documented) == len(set(documented))
    assert set(documented) == raised


@pytest.mark.parametrize("command", ["export_targets", "show_targets", "await_scrape"])
def test_every_option_of_a_command_is_documented(command: str) -> None:
    parser = load_command_class("django_promports", command).create_parser("manage.py", command)
    inherited = load_command_class("django.core", "migrate").create_parser("manage.py", "migrate")
    known = {option for action in inherited._actions for option in action.option_strings}
    options = {o for action in parser._actions for o in action.option_strings if o.startswith("--")} - known
    documented = set(re.findall(r"--[a-z-]+", section("Commands")))

    assert options <= documented
    if command == "export_targets":
        assert {f"--{name}" for name in ("output", "host", "label", "worker-label", "live", "format")} <= options


def test_every_metric_is_documented_and_the_other_way_round() -> None:
    own_metrics()
    existing = {name for name in REGISTRY._names_to_collectors if name.startswith("promports_")}
    exposed = {n for n in existing if not n.endswith("_created") and f"{n}_total" not in existing}

    assert first_column("Endpoints") == exposed


def test_install_settings_and_a_first_look_fit_in_thirty_lines() -> None:
    start = "\n".join(README.splitlines()[:30])

    for needed in (
        'pip install "django-promports[django-prometheus]"',
        "INSTALLED_APPS",
        "MIDDLEWARE",
        "curl ",
        "export_targets",
        "your own code makes with `prometheus_client`",
        "loopback by default",
        "docs/page-site.png",
    ):
        assert needed in start


def test_each_local_link_leads_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("prometheus/*.md")):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(path), f"{page.name}: {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_only_conf_reads_the_settings() -> None:
    readers = {name for name, code in CODE.items() if "from django.conf import settings" in code}

    assert readers == {"conf.py"}


def test_the_version_is_the_newest_in_the_changelog() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^## \[(.+?)\]", Path(ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert version
    assert newest
    assert version[1] == newest[1]


def test_every_server_that_is_tested_has_its_row_and_every_cell_says_something() -> None:
    page = (ROOT / "docs/servers.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]

    assert {(server.name, server.mode) for server in SERVERS} <= {(row[0], row[2]) for row in rows}
    assert {"mod_wsgi", "runserver", "Celery", "gRPC", "Thrift", "management command"} <= {row[0] for row in rows}
    for row in rows:
        assert all(row[:8]), row


def test_each_module_is_in_the_table_of_contributing() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| module | concept |")[1].split("\n\n")[0]
    documented = {
        name.rstrip("/") for row in table.splitlines() if row for name in re.findall(r"`([\w/]+)`", row.split("|")[1])
    }
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }

    assert documented == modules - {"__init__"}
