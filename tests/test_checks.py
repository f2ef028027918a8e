"""Each wrong setting is reported by one check with an id, and settings are read at use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from django.core import checks as django_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.test import override_settings
from pytest_django import Settings

from django_promports import checks
from django_promports.conf import conf
from tests.minimal import django_admin, serve_site, write_site
from tests.servers import ROOT

# Wrong settings and the ids of their checks. The first setting is the one that the message must name;
# files are those of the `pem_files` fixture.
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"PROMPORTS_PORT_RANGE": "19131-19100"}, ["E001"]),
    ({"PROMPORTS_PORT_RANGE": []}, ["E001"]),
    ({"PROMPORTS_PORT_RANGE": None}, ["E001"]),
    ({"PROMPORTS_PORT_RANGE": range(65530, 65540)}, ["E001"]),
    ({"PROMPORTS_PORT_RANGE": range(1020, 1030)}, ["E010"]),
    ({"PROMPORTS_PORT_RANGE": [80]}, ["E010"]),
    ({"PROMPORTS_PORT_RANGE": range(32760, 32770)}, ["W001"]),
    ({"PROMPORTS_PORT_RANGE": [1023, 60999]}, ["E010", "W001"]),
    ({"PROMPORTS_ADDRESS": "localhost"}, ["E002"]),
    ({"PROMPORTS_ADDRESS": "192.0.2.1"}, ["E002"]),
    ({"PROMPORTS_ADDRESS": ""}, ["E002"]),
    ({"PROMPORTS_ADDRESS": None}, ["E002"]),
    ({"PROMPORTS_TARGET_HOST": "web1:19100"}, ["E005"]),
    ({"PROMPORTS_TARGET_HOST": "http://web1"}, ["E005"]),
    ({"PROMPORTS_TARGET_HOST": ""}, ["E005"]),
    ({"PROMPORTS_TARGET_HOST": 8}, ["E005"]),
    ({"PROMPORTS_TARGET_LABELS": {"__site": "shop"}}, ["E006"]),
    ({"PROMPORTS_TARGET_LABELS": {"si-te": "shop"}}, ["E006"]),
    ({"PROMPORTS_TARGET_LABELS": {"site": 1}}, ["E006"]),
    ({"PROMPORTS_TARGET_LABELS": {1: "shop"}}, ["E006"]),
    ({"PROMPORTS_TARGET_LABELS": {"site": "a\nb"}}, ["E006"]),
    ({"PROMPORTS_TARGET_LABELS": ["site"]}, ["E006"]),
    ({"PROMPORTS_TLS_CERTFILE": "missing.pem"}, ["E007"]),
    ({"PROMPORTS_TLS_CERTFILE": "empty"}, ["E007"]),
    ({"PROMPORTS_TLS_CERTFILE": "cert.pem"}, ["E007"]),
    ({"PROMPORTS_TLS_CERTFILE": "."}, ["E007"]),
    ({"PROMPORTS_TLS_CERTFILE": 8}, ["E007"]),
    ({"PROMPORTS_TLS_KEYFILE": "key.pem"}, ["E007"]),
    ({"PROMPORTS_TLS_KEYFILE": "missing.pem", "PROMPORTS_TLS_CERTFILE": "cert.pem"}, ["E007"]),
    ({"PROMPORTS_TLS_CERTFILE": "cert.pem", "PROMPORTS_TLS_KEYFILE": "other-key.pem"}, ["E007"]),
    ({"PROMPORTS_TLS_CLIENT_CAFILE": "ca.pem"}, ["E007"]),
    ({"PROMPORTS_TLS_CLIENT_CAFILE": "missing.pem", "PROMPORTS_TLS_CERTFILE": "both.pem"}, ["E007"]),
    ({"PROMPORTS_TLS_CLIENT_CAFILE": "empty", "PROMPORTS_TLS_CERTFILE": "both.pem"}, ["E007"]),
    ({"PROMPORTS_BEARER_TOKEN_FILE": "missing"}, ["E008"]),
    ({"PROMPORTS_BEARER_TOKEN_FILE": "empty"}, ["E008"]),
    ({"PROMPORTS_BEARER_TOKEN_FILE": "two-words"}, ["E008"]),
    ({"PROMPORTS_BEARER_TOKEN_FILE": "not-ascii"}, ["E008"]),
    ({"PROMPORTS_BEARER_TOKEN_FILE": "."}, ["E008"]),
    ({"PROMPORTS_BEARER_TOKEN_FILE": 8}, ["E008"]),
    ({"PROMPORTS_ENABLED": "no"}, ["E009"]),
    ({"PROMPORTS_ENABLED": None}, ["E009"]),
    ({"PROMPORTS_CREATED_SERIES": "no"}, ["E013"]),
    ({"PROMPORTS_SITE": ""}, ["E015"]),
    ({"PROMPORTS_SITE": None}, ["E015"]),
    ({"PROMPORTS_SITE": 8}, ["E015"]),
    ({"PROMPORTS_SITE": "tea\nshop"}, ["E015"]),
    ({"PROMPORTS_SITE": "tea\udcff"}, ["E015"]),
    ({"PROMPORTS_SITE": "\u00e9" * 51}, ["E015"]),
    ({"PROMPORTS_LEDGER_DIR": "ledgers"}, ["E011"]),
    ({"PROMPORTS_LEDGER_DIR": ""}, ["E011"]),
    ({"PROMPORTS_LEDGER_DIR": 8}, ["E011"]),
    ({"PROMETHEUS_METRICS_EXPORT_PORT": 8001}, ["E004"]),
    ({"PROMETHEUS_METRICS_EXPORT_PORT_RANGE": range(8001, 8050)}, ["E004"]),
    ({"PROMPORTS_ADDRESS": "localhost", "PROMPORTS_PORT_RANGE": "", "PROMPORTS_ENABLED": 1}, ["E001", "E002", "E009"]),
]
# Checks that settings alone do not trigger; each has a test below, or in the test module that is named.
ELSEWHERE = {"W004", "E003", "E012", "E014", "W002", "W003", "W007", "W009", "W010"}
ELSEWHERE |= {"W005", "W006", "W008"}  # test_read_only, test_platforms, test_odd_settings; W009 and W010: test_sites
GOOD: list[dict[str, Any]] = [
    {},
    {"PROMPORTS_PORT_RANGE": [1024, 32767, 61000], "PROMPORTS_ENABLED": False},
    {"PROMPORTS_ADDRESS": "0.0.0.0"},
    {"PROMPORTS_TARGET_HOST": "web1.example.com", "PROMPORTS_TARGET_LABELS": {"site": "Café 'Ω'"}},
    {"PROMPORTS_TLS_CERTFILE": "cert.pem", "PROMPORTS_TLS_KEYFILE": Path("key.pem")},
    {"PROMPORTS_TLS_CERTFILE": Path("both.pem"), "PROMPORTS_TLS_CLIENT_CAFILE": "ca.pem"},
    {"PROMPORTS_BEARER_TOKEN_FILE": "token"},
    {"PROMPORTS_LEDGER_DIR": None},
    {"PROMPORTS_SITE": "Café 'Ω'"},
]


@pytest.fixture(scope="module")
def pem_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with valid and invalid certificates, keys and tokens."""
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    issued, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    contents = {
        "ca.pem": authority.cert_pem.bytes(),
        "cert.pem": issued.cert_chain_pems[0].bytes(),
        "key.pem": issued.private_key_pem.bytes(),
        "both.pem": issued.private_key_and_cert_chain_pem.bytes(),
        "locked.pem": issued.cert_chain_pems[0].bytes() + locked,
        "other-key.pem": other.private_key_pem.bytes(),
        "token": b"hunter2\n",
        "empty": b"\n",
        "two-words": b"hunter 2\n",
        "not-ascii": "höhö\n".encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def plain_machine(tmp_path: Path, pem_files: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default settings, and the kernel's default port numbers instead of those of this machine."""
    del settings.PROMPORTS_PORT_RANGE
    settings.PROMPORTS_LEDGER_DIR = tmp_path / "missing"
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ip_unprivileged_port_start").write_text("1024\n")
    (tmp_path / "ip_local_port_range").write_text("32768\t60999\n")
    monkeypatch.setattr(checks, "KERNEL", tmp_path)
    monkeypatch.chdir(pem_files)


@pytest.mark.parametrize(("wrong", "ids"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_setting_is_named_and_comes_with_a_hint(
    wrong: dict[str, Any], ids: list[str], settings: Settings
) -> None:
    for name, value in wrong.items():
        setattr(settings, name, value)

    messages = checks.check_settings()

    assert [message.id for message in messages] == [f"promports.{number}" for number in ids]
    assert [type(message).__name__[0] for message in messages] == [number[0] for number in ids]
    assert any(re.search(rf"\b{next(iter(wrong))}\b", message.msg) for message in messages), messages
    for message in messages:
        _is_helpful(message)


@pytest.mark.parametrize("good", GOOD, ids=lambda value: str(value)[:60])
def test_good_settings_pass(good: dict[str, Any], settings: Settings) -> None:
    for name, value in good.items():
        setattr(settings, name, value)

    assert checks.check_settings() == []
    assert django_checks.run_checks(tags=[checks.TAG]) == []


def test_ids_are_unique_and_each_is_produced_by_a_test() -> None:
    assert checks.__file__ is not None
    written = re.findall(r"\b[EW]\d{3}\b", Path(checks.__file__).read_text())

    assert len(written) == len(set(written))
    assert set(written) == {number for _, ids in WRONG for number in ids} | ELSEWHERE


@pytest.mark.parametrize(
    ("options", "ids"),
    [({"master": True}, ["promports.E014"]), ({"enable-threads": True}, []), ({"threads": b"2"}, [])],
    ids=["no-threads", "enable-threads", "threads"],
)
def test_uwsgi_without_threads_is_an_error(
    options: dict[str, object], ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The module uwsgi exists only inside uWSGI; test_servers.py runs it.
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(opt=options))

    messages = checks.check_settings()

    assert [message.id for message in messages] == ids
    for message in messages:
        _is_helpful(message)


@pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_multiprocess_mode_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")

    (message,) = checks.check_settings()

    assert message.id == "promports.E003"
    assert name in message.msg
    _is_helpful(message)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"PORT_RANGE": range(8001, 8050)}, "PROMPORTS_PORT_RANGE = range(8001, 8050) instead."),
        ({"PORT_RANGE": [8001, 8002], "PORT": 8000}, "PROMPORTS_PORT_RANGE = [8001, 8002] instead."),
        ({"PORT": 8001}, "PROMPORTS_PORT_RANGE = range(19100, 19132) instead."),
        ({"PORT_RANGE": {8001}}, "PROMPORTS_PORT_RANGE = range(19100, 19132) instead."),
        (
            {"PORT_RANGE": range(8001, 8050), "ADDRESS": "0.0.0.0"},
            "PROMPORTS_PORT_RANGE = range(8001, 8050) and PROMPORTS_ADDRESS = '0.0.0.0' instead.",
        ),
    ],
    ids=str,
)
def test_the_hint_translates_the_settings_of_django_prometheus(
    old: dict[str, Any], new: str, settings: Settings
) -> None:
    for name, value in old.items():
        setattr(settings, f"PROMETHEUS_METRICS_EXPORT_{name}", value)

    (message,) = checks.check_settings()

    assert message.id == "promports.E004"
    assert message.hint is not None
    assert message.hint.endswith(f" and set {new}")


@pytest.mark.skipif(not Path("/proc/sys/net/ipv4/ip_local_port_range").exists(), reason="not Linux")
def test_the_kernels_own_numbers_are_read(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    settings.PROMPORTS_PORT_RANGE = range(low, low + 4)

    assert "promports.W001" in [message.id for message in checks.check_settings()]


def test_a_kernel_that_does_not_say_is_taken_for_a_usual_one(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "ip_local_port_range").unlink()
    (tmp_path / "ip_unprivileged_port_start").write_text("?")
    settings.PROMPORTS_PORT_RANGE = [1023, 32768]

    assert [message.id for message in checks.check_settings()] == ["promports.E010", "promports.W001"]


def test_manage_py_check_shows_the_errors(settings: Settings) -> None:
    call_command("check")
    settings.PROMPORTS_PORT_RANGE = "19131-19100"

    with pytest.raises(SystemCheckError, match=r"\(promports\.E001\) PROMPORTS_PORT_RANGE is '19131-19100'"):
        call_command("check")


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
@pytest.mark.parametrize(
    ("guards", "ids"),
    [
        ({}, ["promports.W002"]),
        ({"PROMPORTS_BEARER_TOKEN_FILE": "token"}, []),
        ({"PROMPORTS_TLS_CERTFILE": "both.pem", "PROMPORTS_TLS_CLIENT_CAFILE": "ca.pem"}, []),
    ],
    ids=str,
)
def test_metrics_that_anybody_can_read_are_a_warning_at_deploy_time(
    address: str, guards: dict[str, str], ids: list[str], settings: Settings
) -> None:
    settings.PROMPORTS_ADDRESS = address
    settings.PROMPORTS_LEDGER_DIR = None
    for name, value in guards.items():
        setattr(settings, name, value)

    _shows_at_deploy_time_only(ids)


@pytest.mark.parametrize(
    ("setting", "number"),
    [("PROMPORTS_ADDRESS", "E002"), ("PROMPORTS_TLS_CERTFILE", "E007"), ("PROMPORTS_LEDGER_DIR", "E011")],
)
def test_at_deploy_time_a_wrong_setting_is_said_once(setting: str, number: str, settings: Settings) -> None:
    settings.PROMPORTS_LEDGER_DIR = None
    setattr(settings, setting, 8)

    messages = django_checks.run_checks(tags=[checks.TAG], include_deployment_checks=True)

    assert [message.id for message in messages] == [f"promports.{number}"]


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="not Linux")
@pytest.mark.parametrize(
    ("folder", "ids"), [("/sys/shop/ledgers", ["promports.W003"]), ("/dev/shm/shop/ledgers", []), (None, [])]
)
def test_ledgers_on_a_disk_are_a_warning_at_deploy_time(folder: str | None, ids: list[str], settings: Settings) -> None:
    settings.PROMPORTS_LEDGER_DIR = folder

    _shows_at_deploy_time_only(ids)


@pytest.mark.parametrize("unsafe", ["file", "link", "shared"])
def test_a_ledger_folder_that_others_could_use_is_an_error(unsafe: str, settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "ledgers"
    if unsafe == "file":
        folder.touch()
    elif unsafe == "link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir(mode=0o700)
    if unsafe == "shared":
        folder.chmod(0o770)
    settings.PROMPORTS_LEDGER_DIR = folder

    (message,) = checks.check_settings()

    assert message.id == "promports.E012"
    assert (
        f"PROMPORTS_LEDGER_DIR cannot be used: {'others may write to ' if unsafe == 'shared' else ''}{folder}"
        in message.msg
    )
    _is_helpful(message)


def test_a_ledger_folder_of_another_user_is_a_warning(settings: Settings, tmp_path: Path) -> None:
    # The user who runs a command may differ from the one who runs the workers.
    folder = Path("/") if os.geteuid() else tmp_path / "ledgers"
    if not os.geteuid():
        folder.mkdir(mode=0o700)
        os.chown(folder, 65534, -1)
    settings.PROMPORTS_LEDGER_DIR = folder

    (message,) = checks.check_settings()

    assert message.id == "promports.W004"
    assert f"{folder} belongs to user" in message.msg
    _is_helpful(message)


def test_a_folder_of_this_user_is_good_for_ledgers(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "ledgers").mkdir(mode=0o700)
    settings.PROMPORTS_LEDGER_DIR = str(tmp_path / "ledgers")

    assert checks.check_settings() == []


BEFORE, AFTER = (f"django_prometheus.middleware.Prometheus{name}Middleware" for name in ("Before", "After"))


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ("", "MIDDLEWARE does not have PrometheusBeforeMiddleware and PrometheusAfterMiddleware, so requests are not"),
        (
            f"MIDDLEWARE = ['{BEFORE}']",
            "MIDDLEWARE does not have PrometheusAfterMiddleware, so requests are not counted",
        ),
        ("MIDDLEWARE = ['nowhere.Middleware', 'nowhere']", "MIDDLEWARE does not have PrometheusBeforeMiddleware and"),
        (f"MIDDLEWARE = ['{BEFORE}', '{AFTER}']; INSTALLED_APPS.pop()", "INSTALLED_APPS does not have"),
        (f"MIDDLEWARE = ['{BEFORE}', '{AFTER}']; SILENCED_SYSTEM_CHECKS = ['promports.W007']", ""),
        (f"MIDDLEWARE = ('{BEFORE}', '{AFTER}')", ""),
        (f"MIDDLEWARE = ['{BEFORE}', 'labelled.Middleware']", ""),
        ("SILENCED_SYSTEM_CHECKS = ['promports.W007']", ""),
    ],
    ids=["nothing", "before", "strange", "no-app", "both-silenced", "both", "subclass", "silenced"],
)
def test_a_site_whose_requests_are_not_counted_is_told_what_is_missing(
    changes: str, missing: str, tmp_path: Path
) -> None:
    env = {**write_site(tmp_path), "DJANGO_SETTINGS_MODULE": "changed"}
    (tmp_path / "labelled.py").write_text(
        "from django_prometheus.middleware import PrometheusAfterMiddleware\n\n"
        "class Middleware(PrometheusAfterMiddleware): pass\n"
    )
    lines = ["from minimal import *", "INSTALLED_APPS += ['django_prometheus']", changes]
    (tmp_path / "changed.py").write_text("\n".join(lines))

    check = django_admin("check", MINIMAL_LEDGER_DIR="", **env)

    assert check.returncode == 0, check.stderr
    if missing:
        assert f"(promports.W007) django-prometheus is not set up: {missing}" in check.stderr
        assert "HINT: Install it with `pip install" in check.stderr
        assert "SILENCED_SYSTEM_CHECKS = ['promports.W007']." in check.stderr
    assert check.stderr.count("promports.") == (2 if missing else 0)


def test_a_worker_does_not_log_that_requests_are_not_counted(free_ports: range, tmp_path: Path) -> None:
    env = write_site(tmp_path)
    with serve_site(tmp_path, free_ports, MINIMAL_LEDGER_DIR="", **env) as site:
        site.wait_for_workers(2)
        assert site.request() == 200

        assert "W007" not in site.child.output()
        assert "WARNING" not in site.child.output()


def test_a_project_without_urls_has_a_name_and_a_ledger_folder_all_the_same(settings: Settings) -> None:
    # As in a gRPC server or a daemon that calls settings.configure().
    del settings.ROOT_URLCONF
    del settings.PROMPORTS_LEDGER_DIR

    assert conf.project
    assert conf.PROMPORTS_LEDGER_DIR is not None


def test_settings_are_read_at_use() -> None:
    before = conf.PROMPORTS_PORT_RANGE

    with override_settings(PROMPORTS_PORT_RANGE="19200-19201", PROMPORTS_ADDRESS="localhost"):
        inside = conf.PROMPORTS_PORT_RANGE
        broken = checks.check_settings()

    assert inside == (19200, 19201)
    assert broken != []
    assert conf.PROMPORTS_PORT_RANGE == before == tuple(range(19100, 19132))
    assert checks.check_settings() == []


def test_a_key_with_a_passphrase_is_an_error_and_no_prompt(pem_files: Path) -> None:
    code = (
        "from django.conf import settings\n"
        "settings.configure(ROOT_URLCONF='urls', PROMPORTS_LEDGER_DIR=None, PROMPORTS_TLS_CERTFILE='locked.pem')\n"
        "from django_promports.checks import check_settings\n"
        "print([message.id for message in check_settings()])\n"
    )
    # Without a terminal OpenSSL asks standard input, which stays open and silent here.
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=pem_files,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            child.wait(10)
        finally:
            child.kill()
        assert child.stdout is not None
        assert child.stdout.read() == "['promports.E007']\n"


def _shows_at_deploy_time_only(ids: list[str]) -> None:
    usual = django_checks.run_checks(tags=[checks.TAG])
    deploy = django_checks.run_checks(tags=[checks.TAG], include_deployment_checks=True)

    assert usual == []
    assert [message.id for message in deploy] == ids
    for message in deploy:
        _is_helpful(message)


def _is_helpful(message: django_checks.CheckMessage) -> None:
    assert message.msg.endswith(".")
    assert not message.msg.endswith("..")
    assert message.hint
    assert message.hint.endswith(".")
