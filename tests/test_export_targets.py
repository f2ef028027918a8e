"""The target list for each option, and the errors of wrong options."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from django.core.management import CommandError, call_command
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector
from pytest_django import Settings

import django_promports
from django_promports import probe, targets
from django_promports.presence import announce_waiting
from django_promports.proof import REFUSALS
from django_promports.stopping import stop_signals
from tests.commands import BECOME_NOBODY, DEMO, answering, call, endpoint, run_python, sign
from tests.servers import ROOT, SECONDS, Child, manage, running

# Tests that use these two claim no port.
HTTP = ["127.0.0.1:19100", "127.0.0.1:19101"]


def _group(*members: str, **labels: str) -> dict[str, object]:
    return {"targets": list(members), "labels": labels}


@pytest.mark.parametrize(
    ("arguments", "changed", "expected"),
    [
        ([], {}, [_group(*HTTP)]),
        ([], {"PORT_RANGE": [19107, 19103]}, [_group("127.0.0.1:19103", "127.0.0.1:19107")]),
        ([], {"TARGET_HOST": "web1"}, [_group("web1:19100", "web1:19101")]),
        ([], {"TARGET_HOST": "[2001:db8::1]"}, [_group("[2001:db8::1]:19100", "[2001:db8::1]:19101")]),
        ([], {"ADDRESS": "0.0.0.0"}, [_group(*(f"{socket.gethostname()}:{port}" for port in (19100, 19101)))]),
        ([], {"ADDRESS": "0.0.0.0", "TARGET_HOST": "web1"}, [_group("web1:19100", "web1:19101")]),
        ([], {"TLS_CERTFILE": "cert.pem"}, [_group(*HTTP, __scheme__="https")]),
        ([], {"TARGET_LABELS": {"site": "shop"}}, [_group(*HTTP, site="shop")]),
        (["--label", "site=tea"], {"TARGET_LABELS": {"site": "shop"}}, [_group(*HTTP, site="tea")]),
        (
            ["--label", "rack=", "--label", "query=a=b", "--label", "owner=Ω 'x'"],
            {"TARGET_LABELS": {"site": "shop"}},
            [_group(*HTTP, site="shop", rack="", query="a=b", owner="Ω 'x'")],
        ),
        (["--host", "web1"], {"TARGET_HOST": "web9"}, [_group("web1:19100", "web1:19101")]),
        (
            ["--host", "web1", "--host", "::1", "--host", "[::1]", "--host", "web1"],
            {},
            [_group("web1:19100", "web1:19101", "[::1]:19100", "[::1]:19101")],
        ),
        (
            ["--worker-label", "--host", "a", "--host", "b", "--label", "site=shop"],
            {"TLS_CERTFILE": "cert.pem"},
            [
                _group("a:19100", "b:19100", site="shop", __scheme__="https", worker="0"),
                _group("a:19101", "b:19101", site="shop", __scheme__="https", worker="1"),
            ],
        ),
        (["--label", "worker=web"], {}, [_group(*HTTP, worker="web")]),
    ],
    ids=str,
)
@pytest.mark.parametrize(("format_", "load"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_the_list_has_every_port_of_the_range(
    format_: str,
    load: Callable[[str], list[dict[str, object]]],
    arguments: list[str],
    changed: dict[str, Any],
    expected: list[dict[str, object]],
    settings: Settings,
) -> None:
    for name, value in {"PORT_RANGE": "19100-19101", **changed}.items():
        setattr(settings, f"PROMPORTS_{name}", value)

    out, err = call("export_targets", "--format", format_, *arguments)

    assert [{"labels": {}, **group} for group in load(out)] == expected
    assert err == ""


def test_json_is_the_default(settings: Settings) -> None:
    assert json.loads(call("export_targets")[0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "127.0.0.1"], [("127.0.0.1", 0), ("127.0.0.1", 3)]),
        (["--host", "localhost", "--host", "127.0.0.2"], [("localhost", 0), ("localhost", 3)]),
        ([], [("web1", 0), ("web1", 3)]),
    ],
)
def test_live_leaves_out_free_ports_and_other_programs(
    arguments: list[str],
    expected: list[tuple[str, int]],
    free_ports: range,
    settings: Settings,
    this_process: None,
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:6]
    settings.PROMPORTS_TARGET_HOST = "web1"
    settings.PROMPORTS_LEDGER_DIR = None
    django_promports.start()
    foreign = answering(free_ports[1], b"220 mail ESMTP\r\n")
    with foreign, endpoint(free_ports, site="another"), endpoint(free_ports):
        # The other hosts do not answer.
        out, err = call("export_targets", "--live", *arguments)
        labelled, _ = call("export_targets", "--live", "--worker-label", *arguments)

    found = [f"{host}:{free_ports[place]}" for host, place in expected]
    assert json.loads(out) == [_group(*found)]
    assert err == ""
    workers = [_group(target, worker=str(place)) for target, (_, place) in zip(found, expected, strict=True)]
    assert json.loads(labelled) == workers


@pytest.mark.parametrize("format_", ["json", "yaml"])
def test_no_live_target_is_an_empty_list(format_: str, free_ports: range, settings: Settings) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports

    assert call("export_targets", "--live", "--format", format_) == ("[]\n", "")


def test_live_asks_with_the_sites_own_certificate_and_token(
    free_ports: range, settings: Settings, this_process: None, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    (tmp_path / "token").write_text("hunter2\n")
    settings.PROMPORTS_PORT_RANGE = free_ports
    settings.PROMPORTS_TLS_CERTFILE = tmp_path / "both.pem"
    settings.PROMPORTS_TLS_CLIENT_CAFILE = tmp_path / "ca.pem"
    settings.PROMPORTS_BEARER_TOKEN_FILE = tmp_path / "token"
    settings.PROMPORTS_LEDGER_DIR = None
    django_promports.start()

    out, _ = call("export_targets", "--live")
    shown, _ = call("show_targets")

    assert json.loads(out) == [_group(f"127.0.0.1:{free_ports[0]}", __scheme__="https")]
    assert shown.splitlines()[-2].startswith("1 live, 14 of 15 ports free")


# A separate process, because an endless loop could not be stopped in this one.
MANAGE = "from django.core.management import execute_from_command_line as run; import sys; run(sys.argv)"


def test_a_host_name_that_does_not_exist_does_not_empty_the_list(tmp_path: Path) -> None:
    output = tmp_path / "django.json"
    output.write_text("old\n")
    arguments = ["export_targets", "--live", "--host", "web1.invalid", "--output", str(output)]

    done = run_python(MANAGE, *arguments, seconds=20, DEMO_PORT_RANGE="19100-19101", RES_OPTIONS="timeout:1 attempts:1")

    assert done.returncode == 1
    assert re.fullmatch(r"CommandError: .*web1\.invalid.*\n", done.stderr)
    assert output.read_text() == "old\n"


def test_a_host_to_which_no_route_leads_has_no_live_target() -> None:
    # The kernel refuses a TCP connection to the broadcast address without sending anything.
    arguments = ["export_targets", "--live", "--host", "255.255.255.255"]

    done = run_python(MANAGE, *arguments, seconds=20, DEMO_PORT_RANGE="19100-19101")

    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(
    ("verbosity", "first", "again"),
    [
        ("0", "", ""),
        ("1", "Wrote {}.\n", ""),
        ("2", "Wrote {}.\n", "{} was up to date.\n"),
    ],
)
def test_a_new_file_is_announced_and_one_that_is_right_already_is_left_alone(
    verbosity: str, first: str, again: str, settings: Settings, tmp_path: Path
) -> None:
    output = tmp_path / "django.json"
    arguments = ["export_targets", "--output", str(output), "--verbosity", verbosity]

    new = call(*arguments)
    before = output.stat()
    unchanged = call(*arguments)
    after = output.stat()

    assert new == ("", first.format(output))
    assert unchanged == ("", again.format(output))
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert output.read_text() == call("export_targets")[0]
    assert os.listdir(tmp_path) == ["django.json"]


def test_a_changed_list_replaces_the_file(tmp_path: Path) -> None:
    output = tmp_path / "django.yml"
    output.write_text("old\n")

    _, err = call("export_targets", "-o", str(output), "--format", "yaml", "--host", "web1")

    assert err == f"Wrote {output}.\n"
    (group,) = yaml.safe_load(output.read_text())
    assert group["targets"][0] == "web1:19100"


@pytest.mark.parametrize(
    ("arguments", "changed", "message"),
    [
        ([], {"PORT_RANGE": "19131-19100"}, "PROMPORTS_PORT_RANGE is '19131-19100', .* reversed; write 19100-19131."),
        ([], {"TARGET_HOST": "web1:19100"}, "PROMPORTS_TARGET_HOST is 'web1:19100', .* has a port in it; .*"),
        ([], {"TARGET_LABELS": {"__x": "y"}}, "PROMPORTS_TARGET_LABELS is .* '__x' begins with two underscores, .*"),
        (["--label", "__x=y"], {}, "--label '__x=y' cannot be used: '__x' begins with two underscores, .*"),
        (["--label", "9x=y"], {}, "--label '9x=y' cannot be used: '9x' is not a label name; use letters, digits .*"),
        (["--label", "a-b=y"], {}, "--label 'a-b=y' cannot be used: 'a-b' is not a label name; use letters, digits .*"),
        (["--label", "=y"], {}, "--label '=y' cannot be used: '' is not a label name; use letters, digits .*"),
        (["--label", "x"], {}, "--label 'x' has no '='; write --label NAME=VALUE."),
        (["--label", "x=a\nb"], {}, r"--label 'x=a\\nb' cannot be used: .*"),
        (
            ["--host", "web1:9100"],
            {},
            "--host .* 'web1:9100' has a port in it; the ports come from PROMPORTS_PORT_RANGE.",
        ),
        (["--host", "[::1]:9100"], {}, r"--host .* '\[::1\]:9100' has a port in it; .*"),
        (
            ["--host", "web1", "--host", "a b"],
            {},
            "--host cannot be used: 'a b' is neither a host name nor an IP address.",
        ),
        (["--host", ""], {}, "--host cannot be used: '' is neither a host name nor an IP address."),
        (
            ["--worker-label", "--label", "worker=a"],
            {},
            "The label 'worker' is already set; .* leave out --worker-label.",
        ),
        (["--worker-label"], {"TARGET_LABELS": {"worker": "a"}}, "The label 'worker' is already set; rename it, or .*"),
        (["--format", "xml"], {}, "Error: argument --format: invalid choice: 'xml' .*"),
        *(
            (["--watch", text], {}, f"Error: argument --watch: '{text}' is not a number of seconds above 0")
            for text in ("0", "-1", "x", "nan", "1e9")
        ),
        *(
            (["--hosts-file", name], {}, f"--hosts-file {name} cannot be used:\n{reason}")
            for name, reason in (("/missing", "No such file or directory"), ("/", "Is a directory"))
        ),
        *(
            (["--format", "kubernetes", *words], {}, "--format kubernetes describes every pod; leave out .*")
            for words in (["--host", "web1"], ["--hosts-file", "-"], ["--live"], ["--watch", "1"])
        ),
        (["--check"], {}, "Error: argument --check: not allowed with argument --output/-o"),
        (["--live"], {"BEARER_TOKEN_FILE": "/missing"}, "PROMPORTS_BEARER_TOKEN_FILE is '/missing', .*"),
        (["--live"], {"TLS_CERTFILE": "/missing"}, "PROMPORTS_TLS_CERTFILE is '/missing', .*"),
    ],
    ids=str,
)
def test_a_wrong_option_says_what_is_wrong_and_leaves_the_file_alone(
    arguments: list[str], changed: dict[str, Any], message: str, settings: Settings, tmp_path: Path
) -> None:
    output = tmp_path / "django.json"
    output.write_text("old\n")
    for name, value in changed.items():
        setattr(settings, f"PROMPORTS_{name}", value)

    with pytest.raises(CommandError, match=f"^{message}$"):
        call("export_targets", "--output", str(output), *arguments)

    assert output.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["django.json"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("missing/django.json", "No such file or directory"),
        ("old.json/django.json", "Not a directory"),
        (".", "Is a directory"),
        ("link.json", "Is a symbolic link"),
    ],
)
def test_an_output_that_cannot_be_written_says_why(output: str, reason: str, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old\n")
    (tmp_path / "link.json").symlink_to(old)
    path = tmp_path / output
    message = (
        f"{path} could not be written: {reason}. It must be a regular file, or new, in a folder that exists and is "
        "writable; nothing was changed."
    )

    with pytest.raises(CommandError, match=f"^{re.escape(message)}$"):
        call("export_targets", "--output", str(path))

    assert old.read_text() == "old\n"
    assert sorted(os.listdir(tmp_path)) == ["link.json", "old.json"]
    assert (tmp_path / "link.json").is_symlink()


def test_a_read_only_folder_says_so_and_keeps_its_file() -> None:
    # Everything is imported first, because an unprivileged user may be unable to.
    code = (
        "import sys, django\nfrom io import StringIO\nfrom django.core.management import call_command\n"
        "django.setup()\nfrom django_promports.management.commands.export_targets import Command\n"
        "call_command(Command(), stdout=StringIO())\n"
        f"{BECOME_NOBODY}call_command(Command(), '--output', sys.argv[1])"
    )
    # Another user cannot enter pytest's folders.
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "django.json")
        output.write_text("old\n")
        os.chmod(folder, 0o555)

        done = run_python(code, str(output))

        assert f"CommandError: {output} could not be written: Permission denied. It must" in done.stderr
        assert output.read_text() == "old\n"
        assert os.listdir(folder) == ["django.json"]
        os.chmod(folder, 0o755)


def test_manage_py_writes_the_list_and_nothing_else() -> None:
    done = manage("export_targets", "--host", "web1", DEMO_PORT_RANGE="19100-19101")

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [_group("web1:19100", "web1:19101")]


@pytest.mark.parametrize(
    ("arguments", "range_", "message"),
    [
        (["--host", "web1:19100"], "19100", "CommandError: --host cannot be used: 'web1:19100' has a port in it"),
        ([], "19131-19100", "(promports.E001) PROMPORTS_PORT_RANGE is '19131-19100', which cannot be used"),
    ],
)
def test_manage_py_fails_with_the_reason_on_standard_error(
    arguments: list[str], range_: str, message: str, tmp_path: Path
) -> None:
    output = tmp_path / "django.json"
    output.write_text("old\n")

    done = manage("export_targets", "--output", str(output), *arguments, DEMO_PORT_RANGE=range_)

    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert output.read_text() == "old\n"


def worker(ports: range) -> contextlib.AbstractContextManager[int]:
    """Serve an endpoint of the site that describes itself as another process."""
    return endpoint(ports, site=DEMO)


def test_hosts_come_from_the_command_line_and_from_a_file(settings: Settings, tmp_path: Path) -> None:
    settings.PROMPORTS_PORT_RANGE = "19100-19101"
    inventory = tmp_path / "hosts"
    inventory.write_bytes(b"\xef\xbb\xbfweb1\r\n\r\n# rack 2\r\n::1 # old\r\nweb0")

    out, err = call("export_targets", "--host", "web0", "--hosts-file", str(inventory))

    hosts = "web0", "web1", "[::1]"
    assert json.loads(out) == [_group(*(f"{host}:{port}" for host in hosts for port in (19100, 19101)))]
    assert err == ""


@pytest.mark.parametrize(
    ("inventory", "status", "targets_", "said"),
    [
        (b"web1\n\n# rack 2\nweb2\n", 0, ["web1:19100", "web2:19100"], "Wrote {}.\n"),
        (
            b"web1\n\nb\xfccher\nWEB1\nweb2:19100\n",
            1,
            ["old:1"],
            (
                "CommandError: --hosts-file - cannot be used:\n"
                "line 3: 'b\\\\xfccher' is neither a host name nor an IP address\n"
                "line 4: 'WEB1' is in line 1 already\n"
                "line 5: 'web2:19100' has a port in it; the ports come from PROMPORTS_PORT_RANGE\n"
            ),
        ),
        (b"", 1, ["old:1"], "CommandError: --hosts-file - cannot be used:\nit names no host\n"),
    ],
    ids=["right", "wrong", "empty"],
)
def test_hosts_come_from_standard_input(
    inventory: bytes, status: int, targets_: list[str], said: str, folder: Path
) -> None:
    output = folder / "django.json"
    output.write_text('[{"targets": ["old:1"]}]')

    done = subprocess.run(
        [sys.executable, "manage.py", "export_targets", "--hosts-file", "-", "--output", str(output)],
        input=inventory,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "DEMO_PORT_RANGE": "19100"},
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr.decode()) == (status, b"", said.format(output))
    assert _list(output) == targets_
    assert os.listdir(folder) == ["django.json"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("0.0.0.0", ""),
        ("127.0.0.1", "PROMPORTS_ADDRESS is a loopback address: it cannot be reached from outside the pod.\n"),
    ],
)
def test_kubernetes_gets_the_range_and_the_settings(
    address: str, said: str, settings: Settings, tmp_path: Path
) -> None:
    settings.ROOT_URLCONF = "Tea_Shop.urls"  # the name of the project in tests
    settings.PROMPORTS_ADDRESS = address
    settings.PROMPORTS_PORT_RANGE = [19100, 19105]
    settings.PROMPORTS_TARGET_LABELS = {"site": "shop"}
    settings.PROMPORTS_BEARER_TOKEN_FILE = tmp_path / "token"

    out, err = call("export_targets", "--format", "kubernetes", "--label", "rack=2")

    container, monitor = yaml.safe_load_all(out)
    assert [port["name"] for port in container["ports"]] == ["metrics-19100", "metrics-19105"]
    assert monitor["metadata"]["name"] == "tea-shop"
    (first, second) = monitor["spec"]["podMetricsEndpoints"]
    assert first == {**second, "port": "metrics-19100"}
    assert first["authorization"]["credentials"] == {"name": "tea-shop-metrics", "key": "token"}
    assert [rule["targetLabel"] for rule in first["relabelings"]] == ["site", "rack"]
    assert err == said


def _list(path: Path) -> list[str]:
    """Return the targets of a target file; none if there is no file."""
    groups = json.loads(path.read_text()) if path.exists() else []
    return [target for group in groups for target in group["targets"]]


@contextlib.contextmanager
def _watching(folder: Path, ports: range, *options: str) -> Iterator[Child]:
    command = [sys.executable, "manage.py", "export_targets", "--output", str(folder / "targets.json")]
    range_ = f"{ports[0]}-{ports[3]}"
    log = folder.with_name("watch.log")
    with running(*command, "--watch", "0.05", *options, log=log, DEMO_PORT_RANGE=range_) as child:
        yield child


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for target files only."""
    folder = tmp_path / "targets"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_watched_file_follows_the_workers_and_says_nothing_else(
    number: signal.Signals, free_ports: range, folder: Path
) -> None:
    output = folder / "targets.json"
    first, second = (f"127.0.0.1:{port}" for port in free_ports[:2])
    with _watching(folder, free_ports) as child:
        child.wait_until(output.exists, "an empty list is written")
        assert _list(output) == []
        with worker(free_ports):
            child.wait_until(lambda: _list(output) == [first], "the first worker is listed")
            with worker(free_ports):
                child.wait_until(lambda: _list(output) == [first, second], "both are listed")
            child.wait_until(lambda: _list(output) == [first], "one has left")

        child.wait_until(lambda: _list(output) == [], "the other has left")
        child.process.send_signal(number)
        child.wait_until(lambda: child.process.poll() is not None, "it ends")

    assert child.process.returncode == 0
    assert child.output() == f"Wrote {output}.\n" * 5
    assert os.listdir(folder) == ["targets.json"]


def test_a_watched_file_is_left_untouched_while_nothing_changes(free_ports: range, folder: Path) -> None:
    output = folder / "targets.json"
    with worker(free_ports), _watching(folder, free_ports, "--verbosity", "2") as child:
        child.wait_until(output.exists, "it is written")
        before = output.stat()
        child.wait_until(lambda: child.output().count("was up to date") > 3, "it looked a few times")
        after = output.stat()

    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert child.output().count("Wrote") == 1


def test_a_watch_outlives_a_folder_that_is_gone_for_a_while_and_says_so_once(free_ports: range, folder: Path) -> None:
    output, elsewhere = folder / "targets.json", folder.with_name("elsewhere")
    # Each look connects to this port once.
    with socket.create_server(("127.0.0.1", free_ports[0])) as looks, _watching(folder, free_ports) as child:
        looks.settimeout(SECONDS)

        def after_a_look(condition: Callable[[], object]) -> bool:
            looks.accept()[0].close()
            return bool(condition())

        child.wait_until(lambda: after_a_look(output.exists), "it is written")
        folder.rename(elsewhere)
        with worker(free_ports) as live:
            child.wait_until(lambda: after_a_look(lambda: "could not" in child.output()), "it says what is wrong")
            for _ in range(3):
                child.wait_until(lambda: after_a_look(lambda: True), "it goes on")
            elsewhere.rename(folder)
            child.wait_until(lambda: after_a_look(lambda: "again" in child.output()), "it says that it works again")
            assert _list(output) == [f"127.0.0.1:{live}"]

        child.wait_until(lambda: after_a_look(lambda: not _list(output)), "the worker has left")

    said = [re.sub(r" (could not be written: .*?)\. .*", r" \1", line) for line in child.output().splitlines()]
    assert said == [
        f"Wrote {output}.",
        f"{output} could not be written: No such file or directory",
        f"Wrote {output}.",
        f"{output} is kept current again.",
        f"Wrote {output}.",
    ]
    assert os.listdir(folder) == ["targets.json"]


def test_a_watched_file_keeps_a_worker_that_answers_too_late(free_ports: range, folder: Path) -> None:
    about = json.dumps({"application": "django_promports", "site": DEMO}).encode()
    with contextlib.ExitStack() as stack:
        overloaded, _ = (stack.enter_context(socket.create_server(("127.0.0.1", port))) for port in free_ports[:2])
        overloaded.settimeout(SECONDS)
        child = stack.enter_context(_watching(folder, free_ports))

        def lists(*ports: int) -> bool:
            return _list(folder / "targets.json") == [f"127.0.0.1:{port}" for port in ports]

        def answer_a_look() -> bool:
            with overloaded.accept()[0] as peer:
                peer.sendall(sign(peer.recv(65536), about))
            return lists(free_ports[0])

        child.wait_until(answer_a_look, "the worker is listed, and not the program that says nothing")
        # From now on neither prints anything.
        with worker(free_ports) as port:
            child.wait_until(lambda: lists(free_ports[0], port), "another worker is listed too")


def test_a_watched_inventory_is_read_once(free_ports: range, folder: Path) -> None:
    output = folder / "targets.json"
    command = [sys.executable, "manage.py", "export_targets", "--hosts-file", "-", "--output", str(output)]
    log = folder.with_name("watch.log")
    pipe = f"echo 127.0.0.1 | exec {shlex.join([*command, '--watch', '0.05'])}"
    with running("bash", "-c", pipe, log=log, DEMO_PORT_RANGE=str(free_ports[0])) as child:
        child.wait_until(output.exists, "an empty list is written")
        with worker(free_ports) as port:
            child.wait_until(lambda: _list(output) == [f"127.0.0.1:{port}"], "the worker is listed")

    assert "cannot be used" not in child.output()


def test_a_watch_that_is_wrong_from_the_start_ends(free_ports: range, folder: Path) -> None:
    folder.rmdir()

    with _watching(folder, free_ports) as child:
        child.wait_until(lambda: child.process.poll() is not None, "it ends")

    assert child.process.returncode == 1
    assert "could not be written: No such file or directory." in child.output()


def test_only_a_file_can_be_watched() -> None:
    with pytest.raises(CommandError, match=r"^--watch keeps a file current; set it with --output FILE\.$"):
        call("export_targets", "--watch", "1")


def test_a_signal_waits_until_what_was_begun_is_done() -> None:
    usual = signal.getsignal(signal.SIGTERM)

    with stop_signals() as told_to_stop:
        before = told_to_stop(0)
        os.kill(os.getpid(), signal.SIGTERM)
        # A second signal meets the previous handler.
        assert signal.getsignal(signal.SIGTERM) == usual
        after = told_to_stop(SECONDS)

    assert (before, after) == (False, True)
    assert signal.getsignal(signal.SIGTERM) == usual


def _check(*arguments: str) -> tuple[list[list[str]], str]:
    """Return the cells of the report, and the error message."""
    out = StringIO()
    try:
        call_command("export_targets", "--check", *arguments, stdout=out, no_color=True)
    except CommandError as error:
        return _cells(out), str(error)
    return _cells(out), ""


def _cells(out: StringIO) -> list[list[str]]:
    return [re.split(" {2,}", line) for line in out.getvalue().splitlines()]


def test_a_check_is_passed_where_a_worker_is_live_and_nobody_else_has_a_port(
    free_ports: range, settings: Settings
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:3]
    settings.PROMPORTS_TARGET_HOST = "web1.invalid"  # not asked

    with endpoint(free_ports[1:], pid=4711):
        report, wrong = _check()

    assert report == [
        [f"127.0.0.1:{free_ports[0]}", "free"],
        [f"127.0.0.1:{free_ports[1]}", "live", "pid 4711"],
        [f"127.0.0.1:{free_ports[2]}", "free"],
    ]
    assert wrong == ""


def test_a_check_says_of_each_port_what_is_wrong_with_it(
    free_ports: range, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:7]
    monkeypatch.setattr(probe, "ASK_SECONDS", 2.0)
    slow, registry = SlowCollector(), CollectorRegistry()
    registry.register(slow)
    garbage = b"HTTP/1.1 200 OK\r\nServer: django_promports\r\n\r\n<html>"
    with contextlib.ExitStack() as stack:
        stack.enter_context(endpoint(free_ports, pid=1))
        stack.enter_context(answering(free_ports[1], b"220 mail ESMTP\r\n"))
        stack.enter_context(answering(free_ports[2], garbage))
        stack.enter_context(socket.create_server(("127.0.0.1", free_ports[3])))
        stack.enter_context(endpoint(free_ports, site="another"))
        stack.enter_context(endpoint(free_ports, token="of another", keys=[b"of another"]))
        stack.enter_context(endpoint(free_ports, registry=registry, pid=2))
        stack.callback(slow.go_on.set)

        report, wrong = _check()

    assert [[target.rpartition(":")[2], *cells] for target, *cells in report] == [
        [str(free_ports[0]), "live", "pid 1"],
        [str(free_ports[1]), "other", "another program has the port"],
        [str(free_ports[2]), "other", "its answer is malformed"],
        [str(free_ports[3]), "silent", "no answer in 2 s"],
        [str(free_ports[4]), "other", "it is the endpoint of another site, 'another'"],
        [str(free_ports[5]), "other", f"the endpoint answers '401 Unauthorized': {REFUSALS['key']}"],
        [str(free_ports[6]), "live", "pid 2, /metrics: no answer in 2 s"],
    ]
    assert wrong == "Check failed: 6 of 7 ports cannot be scraped."


class SlowCollector(Collector):
    def __init__(self) -> None:
        self.go_on = threading.Event()

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        assert self.go_on.wait(SECONDS)
        yield from ()


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ([], ""),
        (["--host", "127.0.0.1"], ""),
        (["--host", "127.0.0.1", "--host", "127.0.0.2"], "no worker is live at 127.0.0.2."),
        (["--host", "255.255.255.255"], "1 of 1 ports cannot be scraped; no worker is live at 255.255.255.255."),
    ],
)
def test_a_check_wants_a_live_worker_at_each_host(
    arguments: list[str], wrong: str, free_ports: range, settings: Settings
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:1]

    with endpoint(free_ports):
        assert _check(*arguments)[1] == (wrong and f"Check failed: {wrong}")


@pytest.mark.skipif(not os.path.exists("/proc/net/unix"), reason="not Linux")
def test_a_check_fails_while_a_process_waits_for_a_port(free_ports: range, settings: Settings) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:1]
    sign = announce_waiting(free_ports[:1])
    assert sign is not None

    with endpoint(free_ports), sign:
        assert _check()[1] == "Check failed: 1 process waits for a port and is not metered."


def test_a_check_names_a_host_that_does_not_exist(settings: Settings, free_ports: range) -> None:
    done = run_python(
        MANAGE,
        *("export_targets", "--check", "--host", "web1.invalid", "--host", "127.0.0.1"),
        seconds=20,
        DEMO_PORT_RANGE=str(free_ports[0]),
        RES_OPTIONS="timeout:1 attempts:1",
    )

    assert done.stdout.splitlines() == [
        f"web1.invalid:{free_ports[0]}  other   'web1.invalid' has no address",
        f"127.0.0.1:{free_ports[0]}  free",
    ]
    assert done.returncode == 1


def test_the_exit_status_of_a_check_is_for_scripts(free_ports: range) -> None:
    with worker(free_ports):
        well = manage("export_targets", "--check", DEMO_PORT_RANGE=str(free_ports[0]))
    idle = manage("export_targets", "--check", DEMO_PORT_RANGE=str(free_ports[0]))

    assert (well.returncode, well.stderr) == (0, "")
    assert (idle.returncode, idle.stderr) == (
        1,
        "CommandError: Check failed: no worker is live at 127.0.0.1.\n",
    )
    assert idle.stdout == f"127.0.0.1:{free_ports[0]}  free\n"


def test_prometheus_accepts_what_is_written(program: Callable[[str], str], settings: Settings, tmp_path: Path) -> None:
    settings.PROMPORTS_TLS_CERTFILE = "cert.pem"
    settings.PROMPORTS_TARGET_LABELS = {"site": "Ω 'x': \"y\" \\ # no", "no": "yes", "_": ""}
    (tmp_path / "prometheus.yml").write_text(
        "scrape_configs:\n  - {job_name: django, file_sd_configs: [{files: ['*.sd.json', '*.sd.yml']}]}\n"
    )
    check = [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")]
    for format_, name in (("json", "a.sd.json"), ("yaml", "b.sd.yml")):
        call("export_targets", "--format", format_, "--output", str(tmp_path / name), "--host", "::1", "--worker-label")

    accepted = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    targets.write_file(tmp_path / "c.sd.yml", lambda: [b"- targets: no list\n"])
    refused = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)

    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert refused.returncode != 0  # promtool does read them
