"""Target groups, the target file, and probing ports."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import stat
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from django_promports import probe, targets
from django_promports.kubernetes import dump_kubernetes
from django_promports.loop import Loop
from django_promports.probe import Answer, Site, State
from django_promports.targets import TargetGroup
from django_promports.tls import client_context
from tests.commands import BECOME_NOBODY, answering, endpoint, run_python
from tests.examples import examples
from tests.servers import wait_until

SITE = Site("this")
ABOUT = {"application": "django_promports", "project": "this", "site": "this"}
# Words that YAML 1.1 takes for something else than a string, where they are not quoted.
YAML_WORDS = ["no", "on", "true", "null", "Off", "_", "y", "NO"]

label_names = st.from_regex(r"\A(?!__)[a-zA-Z_][a-zA-Z0-9_]{0,9}\Z") | st.sampled_from(YAML_WORDS)
label_values = st.text().filter(str.isprintable) | st.sampled_from(
    [
        *YAML_WORDS,
        "1",
        "0x1F",
        "1e3",
        "2001-01-01",
        "- a",
        "a: b",
        "# a",
        "'",
        '"',
        "\\",
        "{{ x }}",
        "&a",
        "*a",
        "!a",
        "%",
    ]
)
hosts = st.from_regex(r"\A[a-z0-9_]([a-z0-9_.-]{0,9}[a-z0-9_])?\Z") | st.ip_addresses().map(str)
groups_of_targets = st.lists(
    st.builds(
        TargetGroup,
        targets=st.lists(st.builds(targets.format_target, hosts, st.integers(1, 65535)), min_size=1, max_size=3),
        labels=st.dictionaries(label_names, label_values, max_size=3),
    ),
    max_size=3,
)
# The same examples each time, and no complaint about a slow machine.
quietly = hypothesis_settings(
    max_examples=examples(100), derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize(
    ("host", "bare"),
    [
        ("web1", "web1"),
        ("web-1.example.com.", "web-1.example.com."),
        ("a_b", "a_b"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_host_names_and_ip_addresses_are_hosts(host: str, bare: str) -> None:
    assert targets.check_host(host) == bare


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("web1:19100", "has a port in it; the ports come from PROMPORTS_PORT_RANGE"),
        ("127.0.0.1:19100", "has a port in it; the ports come from PROMPORTS_PORT_RANGE"),
        ("[::1]:19100", "has a port in it; the ports come from PROMPORTS_PORT_RANGE"),
        *(
            (host, "is neither a host name nor an IP address")
            for host in ["", "a b", "http://web1", "web1/metrics", "-a", "a-", ".", "bücher", "web1\n", "a" * 254, "*"]
        ),
    ],
)
def test_what_is_no_host_says_why(host: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'{host!r} {reason}')}$"):
        targets.check_host(host)


def test_a_list_of_hosts_has_one_on_each_line() -> None:
    lines = ["web1\n", "\n", "  \t\n", "# rack 2\n", " [::1] # the old one\r\n", "10.0.0.1"]

    assert targets.parse_hosts(lines) == ["web1", "::1", "10.0.0.1"]


def test_every_line_that_is_no_host_or_a_repeated_one_is_named() -> None:
    lines = ["web1", "a b", "web2:9100", "", "WEB1.", "web3", "web3"]

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - every word is compared
        targets.parse_hosts(lines)

    assert str(caught.value).splitlines() == [
        "line 2: 'a b' is neither a host name nor an IP address",
        "line 3: 'web2:9100' has a port in it; the ports come from PROMPORTS_PORT_RANGE",
        "line 5: 'WEB1.' is in line 1 already",
        "line 7: 'web3' is in line 6 already",
    ]


def test_a_list_that_is_wrong_throughout_is_told_in_part() -> None:
    with pytest.raises(ValueError, match=r"^(line \d+: '-' is .*\n){20}and 80 more$"):
        targets.parse_hosts(["-"] * 100)


@pytest.mark.parametrize("lines", [[], ["\n", "# web1\n"]])
def test_a_list_without_a_host_is_an_error(lines: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^it names no host$"):
        targets.parse_hosts(lines)


@pytest.mark.parametrize("name", ["site", "_site", "Site_1", "no"])
@pytest.mark.parametrize("value", ["shop", "", "a b", "Ω 'x' \"y\" \\", "{{ $x }}"])
def test_prometheus_label_names_with_readable_values_are_labels(name: str, value: str) -> None:
    targets.check_label(name, value)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *((name, "x", "is not a label name") for name in ["", "9x", "a-b", "a.b", "a b", "é", "a\n"]),
        ("__x", "x", "begins with two underscores"),
        ("x", 1, "is 1, not a string"),
        ("x", None, "is None, not a string"),
        ("x", "a\nb", "which has unprintable characters"),
        ("x", "\ud800", "which has unprintable characters"),
    ],
)
def test_what_prometheus_refuses_is_no_label(name: str, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(repr(name))}.* {reason}"):
        targets.check_label(name, value)


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("web1", "web1:19100"),
        ("127.0.0.1", "127.0.0.1:19100"),
        ("::1", "[::1]:19100"),
        ("fe80::1%a", "[fe80::1%a]:19100"),
    ],
)
def test_only_ipv6_addresses_need_brackets(host: str, target: str) -> None:
    assert targets.format_target(host, 19100) == target


@given(st.ip_addresses(v=6) | st.ip_addresses(v=4))
@quietly
def test_any_ip_address_is_a_host_with_or_without_brackets(address: IPv4Address | IPv6Address) -> None:
    host = str(address)

    assert targets.check_host(host) == host == targets.check_host(f"[{host}]")


@pytest.mark.parametrize(
    ("asked", "options", "expected"),
    [
        ({}, {}, []),
        ({"a": []}, {}, []),
        ({"a": []}, {"ports": [1, 2], "scheme": "https"}, []),
        ({"a": [1], "::1": [2]}, {}, [{"targets": ["a:1", "[::1]:2"], "labels": {"site": "shop"}}]),
        ({"a": [1]}, {"scheme": "https"}, [{"targets": ["a:1"], "labels": {"site": "shop", "__scheme__": "https"}}]),
        (
            {"a": [1, 4], "b": [1]},
            {"ports": [1, 3, 4]},
            [
                {"targets": ["a:1", "b:1"], "labels": {"site": "shop", "worker": "0"}},
                {"targets": ["a:4"], "labels": {"site": "shop", "worker": "2"}},
            ],
        ),
    ],
)
def test_targets_are_one_group_or_one_for_each_worker(
    asked: dict[str, list[int]], options: dict[str, Any], expected: list[TargetGroup]
) -> None:
    labels = {"site": "shop"}

    groups = targets.target_groups(asked, labels=labels, **options)

    assert [{**group, "targets": list(group["targets"])} for group in groups] == expected
    assert labels == {"site": "shop"}


@given(groups_of_targets)
@quietly
def test_yaml_and_json_say_the_same(groups: list[TargetGroup]) -> None:
    assert b"".join(targets.dump_json(groups)).decode() == json.dumps(groups, indent=2, ensure_ascii=False) + "\n"
    # Prometheus reads a group without labels as one with none.
    loaded = yaml.safe_load(b"".join(targets.dump_yaml(groups)))
    assert [{"labels": {}, **group} for group in loaded] == groups


@pytest.mark.parametrize("groups", [[], [TargetGroup(targets=["a:1"], labels={"site": "Ω"})]])
def test_a_document_is_readable_utf8_that_ends_with_a_newline(groups: list[TargetGroup]) -> None:
    for dump in (targets.dump_json, targets.dump_yaml):
        content = b"".join(dump(groups))
        assert content.endswith(b"\n")
        assert not groups or "Ω" in content.decode()


@pytest.mark.parametrize("dump", [targets.dump_json, targets.dump_yaml])
@pytest.mark.parametrize("ports", [(), range(20_000, 20_320)], ids=["one group", "a group per port"])
def test_a_long_list_is_never_in_memory_as_a_whole(
    dump: Callable[[Iterable[TargetGroup]], Iterator[bytes]], ports: Sequence[int]
) -> None:
    hosts = dict.fromkeys((f"web{number}.example.com" for number in range(300)), range(20_000, 20_320))
    tracemalloc.start()
    try:
        size = sum(map(len, dump(targets.target_groups(hosts, labels={"site": "shop"}, ports=ports))))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert size > 2_500_000
    assert peak < 500_000


# The published definition of the fields in use: https://github.com/prometheus-operator/prometheus-operator
# (example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml, version 0.91). A dict is an object with no
# other field, a list is an array, a regular expression is a string; fields with a * must be there.
LABEL = r"[a-zA-Z_][a-zA-Z0-9_]*"
NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123
SERVICE = r"(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?"  # IANA_SVC_NAME
POD_MONITOR: dict[str, Any] = {
    "apiVersion*": r"monitoring\.coreos\.com/v1",
    "kind*": "PodMonitor",
    "metadata*": {"name*": NAME},
    "spec*": {
        "selector*": {"matchLabels": {r"app.kubernetes.io/name": NAME}},
        "podMetricsEndpoints": [
            {
                "port": SERVICE,
                "path": r"/metrics",
                "scheme": r"http|https",
                "authorization": {"credentials": {"name": NAME, "key*": "token"}},
                "relabelings": [{"targetLabel": LABEL, "replacement": r".*"}],
            }
        ],
    },
}
CONTAINER: dict[str, Any] = {"ports": [{"name": SERVICE, "containerPort*": range(1, 65536)}]}


def _check_schema(value: Any, schema: Any) -> None:
    if isinstance(schema, dict):
        known = {name.rstrip("*"): field for name, field in schema.items()}
        assert set(value) <= set(known)
        assert {name[:-1] for name in schema if name.endswith("*")} <= set(value)
        for name, field in value.items():
            _check_schema(field, known[name])
    elif isinstance(schema, list):
        assert isinstance(value, list)
        for item in value:
            _check_schema(item, schema[0])
    elif isinstance(schema, range):
        assert value in schema
    else:
        assert isinstance(value, str)
        assert re.fullmatch(schema, value), value


@pytest.mark.parametrize("name", ["demo-site", "no", "1"])
@pytest.mark.parametrize(
    "options",
    [
        {"labels": {}, "worker": False, "scheme": "http", "secret": False},
        {"labels": {"site": 'shop: "1"', "no": "on", "cost": "$1"}, "worker": True, "scheme": "https", "secret": True},
    ],
    ids=["plain", "everything"],
)
def test_kubernetes_and_the_operator_know_every_field(name: str, options: dict[str, Any]) -> None:
    ports = (1, 19100, 65535)

    container, monitor = yaml.safe_load_all(b"".join(dump_kubernetes(name, ports, **options)))

    _check_schema(container, CONTAINER)
    _check_schema(monitor, POD_MONITOR)
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    assert [port["name"] for port in container["ports"]] == [endpoint["port"] for endpoint in endpoints]
    assert [port["containerPort"] for port in container["ports"]] == list(ports)
    assert {endpoint["scheme"] for endpoint in endpoints} == {options["scheme"]}
    assert all(("authorization" in endpoint) == options["secret"] for endpoint in endpoints)
    relabelings = [
        {r["targetLabel"]: r["replacement"] for r in endpoint.get("relabelings", ())} for endpoint in endpoints
    ]
    workers = [{"worker": str(place)} if options["worker"] else {} for place in range(3)]
    labels = {label: value.replace("$", "$$") for label, value in options["labels"].items()}
    assert relabelings == [{**labels, **worker} for worker in workers]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_everybody_can_read_a_written_file(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    before = os.umask(umask)
    try:
        written = targets.write_file(path, lambda: [b"[]\n"])
    finally:
        os.umask(before)

    assert written
    assert path.read_bytes() == b"[]\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_says_it_already_is_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    targets.write_file(path, lambda: [b"[]\n"])
    before = path.stat()

    written = targets.write_file(path, lambda: [b"[]\n"])

    after = path.stat()
    assert not written
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert targets.write_file(path, lambda: [b"[1]\n"])
    assert path.stat().st_ino != before.st_ino
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing/targets.json", FileNotFoundError),
        ("old.json/targets.json", NotADirectoryError),
        (".", IsADirectoryError),
    ],
)
def test_a_file_that_cannot_be_is_an_error(name: str, error: type[OSError], tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_bytes(b"old\n")

    with pytest.raises(error):
        targets.write_file(tmp_path / name, lambda: [b"[]\n"])

    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old\n"


@pytest.mark.parametrize("pieces", [[b"[", b"]"], [b"[]"], [b"[]\n", b"[]"]])
def test_a_file_that_begins_like_the_new_one_or_goes_on_after_it_is_replaced(
    pieces: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "targets.json"
    path.write_bytes(b"[]\n")

    assert targets.write_file(path, pieces.copy)
    assert path.read_bytes() == b"".join(pieces)
    assert not targets.write_file(path, pieces.copy)


def test_a_link_is_left_alone_and_so_is_what_it_leads_to(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "targets.json"
    real.write_bytes(b"old\n")
    link.symlink_to(real)

    with pytest.raises(OSError, match="Is a symbolic link"):
        targets.write_file(link, lambda: [b"[]\n"])

    assert link.readlink() == real
    assert real.read_bytes() == b"old\n"
    assert set(tmp_path.iterdir()) == {real, link}


def test_a_link_to_nothing_and_a_pipe_are_left_alone(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "missing")
    os.mkfifo(pipe)

    for path, what in ((link, "a symbolic link"), (pipe, "not a regular file")):
        with pytest.raises(OSError, match=f"Is {what}"):
            targets.write_file(path, lambda: [b"[]\n"])

    assert set(tmp_path.iterdir()) == {link, pipe}


def test_a_read_only_folder_keeps_its_file() -> None:
    # pytest's own folders cannot be entered by another user.
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "targets.json")
        old.write_bytes(b"old\n")
        os.chmod(folder, 0o555)
        code = (
            "import sys\nfrom pathlib import Path\nfrom django_promports import targets\n"
            f"{BECOME_NOBODY}targets.write_file(Path(sys.argv[1]), lambda: [b'[]'])"
        )

        done = run_python(code, str(old))

        assert done.stderr.splitlines()[-1].startswith("PermissionError: [Errno 13] Permission denied: ")
        assert os.listdir(folder) == ["targets.json"]
        assert old.read_bytes() == b"old\n"
        os.chmod(folder, 0o755)


def test_a_write_that_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    old = tmp_path / "targets.json"
    old.write_bytes(b"old\n")
    # As a full disk does: the file may not grow beyond 1,000 bytes.
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom django_promports import targets\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "targets.write_file(Path(sys.argv[1]), lambda: [bytes(5000)])"
    )

    done = run_python(code, str(old))

    assert done.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old\n"


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    contents = [[json.dumps([{"targets": ["a:1"] * count}]).encode()] for count in (5000, 1)]
    targets.write_file(path, contents[1].copy)
    seen: list[bytes] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        targets.write_file(path, contents[number % 2].copy)
    wait_until(lambda: len(seen) > 20, "the reader reads")
    stop.set()
    reader.join()

    assert set(seen) <= {content for (content,) in contents}
    assert os.listdir(tmp_path) == ["targets.json"]


def test_a_port_where_nobody_listens_is_free(free_ports: range) -> None:
    assert _ask(free_ports[0]) == Answer(State.FREE)


def test_a_port_that_never_answers_is_silent(free_ports: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ASK_SECONDS", 0.2)

    with socket.create_server(("127.0.0.1", free_ports[0])):
        assert _ask(free_ports[0]) == Answer(State.SILENT, reason="no answer in 0.2 s")


def test_many_silent_ports_are_waited_for_together(free_ports: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ASK_SECONDS", 0.5)
    with contextlib.ExitStack() as stack:
        for port in free_ports:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        began = time.monotonic()

        answers = _ask_all([("127.0.0.1", port) for port in free_ports])

        assert {answer.state for answer in answers} == {"silent"}
        assert time.monotonic() - began < 0.5 * len(free_ports) / 2


def _http(status: str, server: str, about: object) -> bytes:
    body = about if isinstance(about, bytes) else json.dumps(about).encode()
    return f"HTTP/1.1 {status}\r\nServer: {server}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (b"", "other"),
        (b"\x00\xff\r\n\r\n\xff", "other"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "other"),
        (b"220 mail ESMTP\r\n", "other"),
        (_http("200 OK", "django_promports", ABOUT), "live"),
        (_http("500 Internal Server Error", "django_promports", ABOUT), "other"),
        (_http("401 Unauthorized", "django_promports", ABOUT), "other"),
        (_http("200 OK", "nginx", ABOUT), "other"),
        (_http("200 OK", "django_promports", {**ABOUT, "site": "that"}), "other"),
        (_http("200 OK", "django_promports", {**ABOUT, "application": "x"}), "other"),
        (_http("200 OK", "django_promports", {"application": "django_promports"}), "other"),
        (_http("200 OK", "django_promports", []), "other"),
        (_http("200 OK", "django_promports", None), "other"),
        (_http("200 OK", "django_promports", b"<html>"), "other"),
        (_http("200 OK", "django_promports", b"\xff"), "other"),
        (_http("200 OK", "django_promports", b"[" * 100_000), "other"),
        (_http("200 OK", "django_promports", json.dumps(ABOUT).encode() + b" " * 200_000), "other"),  # too long
    ],
    ids=lambda value: repr(value)[:60],
)
def test_only_an_endpoint_of_this_site_is_live(
    answer: bytes, state: str, free_ports: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MAX_ABOUT_BYTES", 150_000)

    with answering(free_ports[0], answer):
        assert _ask(free_ports[0]).state == state


def test_a_usual_web_server_is_another_program(free_ports: range, tmp_path: Path) -> None:
    handler = partial(_Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", free_ports[0]), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            answer = _ask(free_ports[0])
        finally:
            server.shutdown()
            thread.join()

    assert answer.state == "other"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_endpoints_are_told_apart_by_their_project_and_asked_for_any_path(free_ports: range) -> None:
    with endpoint(free_ports, site="this", pid=7) as ours, endpoint(free_ports, site="that") as theirs:
        answers = _ask_all([("127.0.0.1", theirs), ("127.0.0.1", ours), ("localhost", ours)])
        (scrape,) = _ask_all([("127.0.0.1", ours)], "/metrics")
        (missing,) = _ask_all([("127.0.0.1", ours)], "/missing")

    assert [answer.state for answer in answers] == ["other", "live", "live"]
    assert answers[1].about == {**ABOUT, "pid": 7, "scrapes": {"total": 0}}
    assert 0 < answers[1].seconds < probe.ASK_SECONDS
    assert (scrape.state, probe.count_samples(scrape.body)) == ("live", 0)
    assert missing.state == "other"


def test_more_targets_than_are_asked_at_once_are_answered_in_order(free_ports: range) -> None:
    with endpoint(free_ports[3:], site="this"):
        answers = _ask_all([("127.0.0.1", port) for port in free_ports] * 5)

    expected = ["live" if index % len(free_ports) == 3 else "free" for index in range(len(answers))]
    assert [answer.state for answer in answers] == expected


@pytest.mark.parametrize(
    ("keys", "with_tls", "state"),
    [([b"right"], True, "live"), ([b"wrong"], True, "other"), ([], True, "other"), ([b"right"], False, "other")],
)
def test_an_endpoint_with_tls_and_a_token_is_live_to_who_speaks_tls_and_has_a_key(
    keys: list[bytes], with_tls: bool, state: str, free_ports: range, tmp_path: Path
) -> None:
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    site = Site("this", client_context(str(tmp_path / "both.pem"), None) if with_tls else None, keys)
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issued.configure_cert(server_tls)

    with endpoint(free_ports, site="this", tls=server_tls, token="s3cret", keys=[b"right"]) as port:
        assert _ask(port, site).state == state


def test_nothing_is_live_where_no_tls_is_spoken(free_ports: range, tmp_path: Path) -> None:
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    site = Site("this", client_context(str(tmp_path / "both.pem"), None))

    with endpoint(free_ports, site="this") as plain, answering(free_ports[1], b"220 mail ESMTP\r\n"):
        assert _ask(plain, site).state == "other"
        assert _ask(free_ports[1], site).state == "other"


def test_a_host_name_with_several_addresses_is_asked_at_each(
    free_ports: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which addresses "localhost" has, and in which order, differs from machine to machine.
    usual = socket.getaddrinfo

    def look_up(host: str, *args: Any, **options: Any) -> list[Any]:
        hosts = ["::1", "127.0.0.1"] if host == "localhost" else [host]
        return [info for host in hosts for info in usual(host, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with endpoint(free_ports, site="this") as port:
        (answer,) = _ask_all([("localhost", port)])

    assert answer.state == "live"


@pytest.mark.parametrize(
    ("exposition", "count"),
    [(b"", 0), (b"# HELP a b\n# TYPE a gauge\na 1\n", 1), (b'a{b="c"} 1\n\na{b="#"} 2\n# EOF\n', 2)],
)
def test_the_samples_of_an_exposition_are_its_lines_without_comments(exposition: bytes, count: int) -> None:
    assert probe.count_samples(exposition) == count


def _ask(port: int, site: Site = SITE) -> Answer:
    (answer,) = _ask_all([("127.0.0.1", port)], site=site)
    return answer


def _ask_all(asked: Sequence[tuple[str, int]], path: str = "/", site: Site = SITE) -> list[Answer]:
    with contextlib.closing(Loop()) as loop:
        return loop.complete(probe.ask_all(loop, site, asked, path))
