"""Targets: checking hosts and labels, target groups for file_sd and http_sd, and writing the target file. No network.

Formats: https://prometheus.io/docs/prometheus/latest/configuration/configuration/#file_sd_config
and https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypedDict

# Targets of a document that are formatted at once: enough to be fast, few enough to use little memory.
TARGETS_AT_ONCE = 1000
# How many wrong lines of a list of hosts are shown.
LINES_TOLD = 20

quote = json.encoder.encode_basestring


class TargetGroup(TypedDict):
    targets: Iterable[str]
    labels: dict[str, str]


def check_host(host: str) -> str:
    """Return the host without brackets. Raises ValueError if it is not a host name or IP address."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if _is_ipv6(bare):
        return bare
    if re.fullmatch(r".*:\d+", bare):
        raise ValueError(f"{host!r} has a port in it; the ports come from PROMPORTS_PORT_RANGE")
    if not re.fullmatch(r"(?=.{1,253}\.?$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?", bare):
        raise ValueError(f"{host!r} is neither a host name nor an IP address")
    return bare


def parse_hosts(lines: Iterable[str]) -> list[str]:
    """Return the hosts of a list with one host per line, without blank lines and comments (from # on).

    Raises ValueError, which names the wrong lines.
    """
    places: dict[str, int] = {}
    hosts, wrong = [], []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            host = check_host(text)
            if (place := places.setdefault(host.lower().rstrip("."), number)) != number:
                raise ValueError(f"{text!r} is in line {place} already")
            hosts.append(host)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = [f"and {len(wrong) - LINES_TOLD} more"] if len(wrong) > LINES_TOLD else []
        raise ValueError("\n".join([*wrong[:LINES_TOLD], *more]))
    if not hosts:
        raise ValueError("it names no host")
    return hosts


def check_label(name: object, value: object) -> None:
    """Raise ValueError if Prometheus would refuse the label, or drop it."""
    # https://prometheus.io/docs/concepts/data_model/#metric-names-and-labels
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name):
        raise ValueError(f"{name!r} is not a label name; use letters, digits and underscores, no digit first")
    if name.startswith("__"):
        raise ValueError(f"{name!r} begins with two underscores, which is reserved for Prometheus")
    if not isinstance(value, str):
        raise ValueError(f"the value of {name!r} is {value!r}, not a string")
    if not value.isprintable():
        raise ValueError(f"the value of {name!r} is {value!r}, which has unprintable characters")


def format_target(host: str, port: int) -> str:
    """Return host:port, with the brackets that an IPv6 address needs."""
    return f"{_format_host(host)}:{port}"


def target_groups(
    targets: Mapping[str, Sequence[int]],
    *,
    labels: Mapping[str, str],
    ports: Sequence[int] = (),
    scheme: str = "http",
) -> Iterator[TargetGroup]:
    """Yield the target groups of hosts with their ports: one, or one per port with a `worker` label if `ports` is set.

    `worker` is the index of the port in `ports`. The targets of a group are generated while they are read.
    """
    common = dict(labels)
    if scheme != "http":
        common["__scheme__"] = scheme
    hosts = {_format_host(host): numbers for host, numbers in targets.items() if numbers}
    if not ports and hosts:
        yield {"targets": (f"{host}:{port}" for host, numbers in hosts.items() for port in numbers), "labels": common}
    for worker, port in enumerate(ports):
        members = [host for host, numbers in hosts.items() if port in numbers]
        if members:
            yield {"targets": map(f"{{}}:{port}".format, members), "labels": {**common, "worker": str(worker)}}


def dump_json(groups: Iterable[TargetGroup]) -> Iterator[bytes]:
    """Yield what json.dumps(indent=2) returns, piece by piece."""
    opening = "[\n"
    for group in groups:
        separator = f'{opening}  {{\n    "targets": [\n      '
        for some in _batches(group["targets"]):
            yield (separator + ",\n      ".join(map(quote, some))).encode()
            separator = ",\n      "
        labels = json.dumps(group["labels"], indent=2, ensure_ascii=False).replace("\n", "\n    ")
        yield f'\n    ],\n    "labels": {labels}\n  }}'.encode()
        opening = ",\n"
    yield b"[]\n" if opening == "[\n" else b"\n]\n"


def dump_yaml(groups: Iterable[TargetGroup]) -> Iterator[bytes]:
    """Yield a YAML document. A JSON string is a YAML string too: https://yaml.org/spec/1.2.2/#json-compatibility."""
    empty = True
    for group in groups:
        empty = False
        yield b"- targets:\n"
        for some in _batches(group["targets"]):
            yield "".join(f"    - {quote(target)}\n" for target in some).encode()
        if group["labels"]:
            lines = (f"    {quote(name)}: {quote(value)}\n" for name, value in group["labels"].items())
            yield "".join(["  labels:\n", *lines]).encode()
    if empty:
        yield b"[]\n"


def write_file(path: Path, content: Callable[[], Iterable[bytes]]) -> bool:
    """Replace the content of the file atomically; return False if the file has this content already.

    Prometheus watches the folder, so an unchanged file is left untouched, and the temporary file has a name that no
    file_sd pattern matches. The content is generated twice, once to compare it. Raises OSError, and leaves the old file
    as it was. A symbolic link is an error too: Prometheus would not notice changes of the file that it points to.
    """
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            is_folder, is_link = stat.S_ISDIR(mode), stat.S_ISLNK(mode)
            what = "a directory" if is_folder else "a symbolic link" if is_link else "not a regular file"
            raise OSError(errno.EISDIR if is_folder else errno.EINVAL, f"Is {what}")
        with path.open("rb") as old:
            if all(old.read(len(piece)) == piece for piece in content()) and not old.read(1):
                return False
    except FileNotFoundError:
        pass
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            if sys.platform != "win32":  # Windows has no such modes
                os.fchmod(file.fileno(), 0o644)  # Prometheus runs as another user
            file.writelines(content())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return True


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _format_host(host: str) -> str:
    return f"[{host}]" if _is_ipv6(host) else host


def _batches(targets: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(targets)
    while batch := list(islice(remaining, TARGETS_AT_ONCE)):
        yield batch
