"""System checks: what makes a worker serve no metrics, or wrong ones. Workers log the errors too."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from django.apps import apps
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from django_promports import discovery, folders, neighbours, unix
from django_promports.conf import WILDCARDS, conf, show
from django_promports.loop import Loop
from django_promports.ports import format_ports

TAG = "promports"
# The only error with which a worker still serves its metrics.
LEDGER_FOLDER = "promports.E012"
# The only warning with which it does not.
PLATFORM = "promports.W006"
REQUESTS = "promports.W007"
# File systems in memory. On any other, a write to a mapped file sometimes waits for the disk.
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
# So many sites of one user with one settings module are not expected.
MAX_SIBLINGS = 8
KERNEL = Path("/proc/sys/net/ipv4")
# The classes that count requests, in their order.
MIDDLEWARE = ("PrometheusBeforeMiddleware", "PrometheusAfterMiddleware")

# For each setting: the id of its check, a function that reads it, the hint.
READERS: list[tuple[str, Callable[[], object], str]] = [
    ("E001", lambda: conf.PROMPORTS_PORT_RANGE, "Use a value such as range(19100, 19132) or '19100-19131'."),
    (
        "E002",
        lambda: conf.PROMPORTS_ADDRESS,
        "Use '127.0.0.1' for this machine only, or '0.0.0.0' or '::' for every interface.",
    ),
    (
        "E005",
        lambda: conf.PROMPORTS_TARGET_HOST,
        "Use the name or IP address at which Prometheus reaches this host.",
    ),
    ("E006", lambda: conf.PROMPORTS_TARGET_LABELS, "Use a dict of strings, such as {'site': 'shop'}."),
    (
        "E007",
        lambda: conf.server_tls(),
        "Use readable PEM files. Set PROMPORTS_TLS_KEYFILE if the certificate file does not contain the key.",
    ),
    ("E008", lambda: conf.read_token(), "Use a readable file that contains the token."),
    ("E009", lambda: conf.PROMPORTS_ENABLED, "Use True or False."),
    (
        "E015",
        lambda: conf.PROMPORTS_SITE,
        "Use a short name that no other site of the machine has, such as 'shop'.",
    ),
    ("E013", lambda: conf.PROMPORTS_CREATED_SERIES, "Use True or False."),
    (
        "E011",
        lambda: conf.PROMPORTS_LEDGER_DIR,
        "Use the absolute path of a folder on a tmpfs, such as '/run/shop', or None.",
    ),
]


def check_settings(**kwargs: Any) -> list[checks.CheckMessage]:
    """Report settings that cannot be used, and what would make metrics wrong."""
    if not unix.SUPPORTED:
        return [
            checks.Warning(
                "Metrics are served on Unix only: no process of this site claims a port.",
                hint="Run the site in WSL or in a container to see its metrics. Here it works without them.",
                id=PLATFORM,
            )
        ]
    return _carry_out(_check_values, _check_ports, _check_rivals, _check_uwsgi, _check_ledgers)


def check_requests(**kwargs: Any) -> list[checks.CheckMessage]:
    """Report that requests are not counted. Workers do not log this: each would repeat it."""
    return _carry_out(_check_requests) if unix.SUPPORTED else []


def check_deployment(**kwargs: Any) -> list[checks.CheckMessage]:
    """With `check --deploy`, report what concerns the machine: who can read the metrics, disks, and other sites."""
    return _carry_out(_check_exposure, _check_file_system, _check_other_sites) if unix.SUPPORTED else []


def _carry_out(*parts: Callable[[], Iterable[checks.CheckMessage]]) -> list[checks.CheckMessage]:
    """Return the messages of some checks. An exception would end every command, so it becomes a message too."""
    messages: list[checks.CheckMessage] = []
    for part in parts:
        try:
            messages += part()
        except Exception as error:
            messages.append(
                checks.Warning(
                    f"django_promports could not complete its checks: {part.__name__}() raised {show(error)}.",
                    hint="Correct the setting or environment variable that the error refers to.",
                    id="promports.W008",
                )
            )
    return messages


def _check_file_system() -> list[checks.CheckMessage]:
    try:
        folder = conf.PROMPORTS_LEDGER_DIR
        file_system = folders.find_filesystem(folder) if folder else ""
    except (ImproperlyConfigured, OSError):
        return []  # check_settings() reports it
    if not file_system or file_system in IN_MEMORY:
        return []
    return [
        checks.Warning(
            f"PROMPORTS_LEDGER_DIR is {str(folder)!r}, on {file_system}: requests may have to wait for the disk.",
            hint="Use a folder on a tmpfs, such as one under /run (RuntimeDirectory= of systemd) or in /dev/shm.",
            id="promports.W003",
        )
    ]


def _check_exposure() -> list[checks.CheckMessage]:
    try:
        exposed = conf.PROMPORTS_ADDRESS in WILDCARDS
        guarded = conf.PROMPORTS_TLS_CERTFILE or conf.PROMPORTS_BEARER_TOKEN_FILE
    except ImproperlyConfigured:
        return []  # check_settings() reports it
    if not exposed or guarded:
        return []
    return [
        checks.Warning(
            f"PROMPORTS_ADDRESS is {conf.PROMPORTS_ADDRESS!r}: everyone who can reach this host can read the metrics.",
            hint="Bind an internal address, or set PROMPORTS_BEARER_TOKEN_FILE or PROMPORTS_TLS_CERTFILE with "
            "PROMPORTS_TLS_CLIENT_CAFILE. Silence this check if a firewall protects the ports.",
            id="promports.W002",
        )
    ]


def _check_other_sites() -> Iterator[checks.CheckMessage]:
    try:
        with contextlib.closing(Loop()) as loop:
            found = loop.complete(discovery.look(loop)) if conf.PROMPORTS_ENABLED else []
    except (ImproperlyConfigured, OSError):
        return  # check_settings() reports it
    for fault in neighbours.find_rivals(found, conf.project, conf.place):
        yield checks.Warning(fault.what, hint=fault.hint, id="promports.W009")


def _check_values() -> Iterator[checks.CheckMessage]:
    said = set()
    for number, read, hint in READERS:
        try:
            read()
        except ImproperlyConfigured as error:
            if str(error) not in said:  # the default of the target host is the address
                said.add(str(error))
                yield checks.Error(str(error), hint=hint, id=f"promports.{number}")


def _check_ports() -> Iterator[checks.CheckMessage]:
    try:
        ports = conf.PROMPORTS_PORT_RANGE
    except ImproperlyConfigured:
        return
    first_free = _kernel_numbers("ip_unprivileged_port_start", [1024])[0]
    if ports[0] < first_free:
        yield checks.Error(
            f"PROMPORTS_PORT_RANGE starts at {ports[0]}, but only root may bind ports below {first_free}.",
            hint="Choose ports from 1024 up, such as range(19100, 19132).",
            id="promports.E010",
        )
    low, high = _kernel_numbers("ip_local_port_range", [32768, 60999])
    if stolen := [port for port in ports if low <= port <= high]:
        yield checks.Warning(
            f"PROMPORTS_PORT_RANGE contains {format_ports(stolen)}, which the kernel uses for outgoing connections "
            f"({low}-{high}): a worker may find its port in use.",
            hint=f"Choose ports below {low}, such as range(19100, 19132).",
            id="promports.W001",
        )


def _check_rivals() -> Iterator[checks.CheckMessage]:
    if name := next((n for n in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir") if n in os.environ), None):
        yield checks.Error(
            f"{name} is set in the environment: prometheus_client would share values between processes through files, "
            "and the ports would export some of them twice and others not at all.",
            hint=f"Unset {name}; django_promports does not need multiprocess mode.",
            id="promports.E003",
        )
    old_range = conf.django_prometheus("PORT_RANGE")
    if old_range or conf.django_prometheus("PORT"):
        name = "PROMETHEUS_METRICS_EXPORT_PORT" + ("_RANGE" if old_range else "")
        # A range, list or tuple can be shown; any other iterable would be consumed.
        ports = old_range if isinstance(old_range, range | list | tuple) else range(19100, 19132)
        replacement = f"PROMPORTS_PORT_RANGE = {show(ports)}"
        if address := conf.django_prometheus("ADDRESS"):
            replacement += f" and PROMPORTS_ADDRESS = {show(address)}"
        yield checks.Error(
            f"{name} is set: django-prometheus would serve the same metrics on its own ports.",
            hint=f"Remove {name} and set {replacement} instead.",
            id="promports.E004",
        )


def _check_uwsgi() -> Iterator[checks.CheckMessage]:
    uwsgi = sys.modules.get("uwsgi")  # exists only inside uWSGI
    if uwsgi is not None and not {"enable-threads", "threads"} & set(uwsgi.opt):
        yield checks.Error(
            "uWSGI runs without Python threads, so the thread that serves metrics would never run.",
            hint="Set enable-threads = true in uWSGI's configuration, or threads = N.",
            id="promports.E014",
        )


def _check_requests() -> Iterator[checks.CheckMessage]:
    if find_spec("django_prometheus") is None:
        missing = "the package is not installed, so requests are not counted"
    elif absent := [name for name in MIDDLEWARE if not _has_middleware(name)]:
        missing = f"MIDDLEWARE does not have {' and '.join(absent)}, so requests are not counted"
    elif not apps.is_installed("django_prometheus"):
        missing = "INSTALLED_APPS does not have 'django_prometheus'"
    else:
        return
    yield checks.Warning(
        f"django-prometheus is not set up: {missing}.",
        hint='Install it with `pip install "django-promports[django-prometheus]"`, then add the app and its two '
        "middleware classes to the settings. If you want only your own metrics, set "
        f"SILENCED_SYSTEM_CHECKS = ['{REQUESTS}'].",
        id=REQUESTS,
    )


def _check_ledgers() -> Iterator[checks.CheckMessage]:
    try:
        folder = conf.PROMPORTS_LEDGER_DIR
        if folder is not None:
            yield from _check_siblings(folder)
            folders.check_folder(folder)
        elif conf.no_ledger_dir:
            yield checks.Warning(
                f"{conf.no_ledger_dir}. Workers count in memory, and their counts are lost when they end.",
                hint="Set PROMPORTS_LEDGER_DIR to a folder on a tmpfs, such as '/run/shop', or to None.",
                id="promports.W005",
            )
    except FileNotFoundError:
        pass  # the first worker creates it
    except ImproperlyConfigured:
        pass  # _check_values() reports it
    except folders.ForeignFolder as error:
        yield checks.Warning(
            f"PROMPORTS_LEDGER_DIR: {error}.",
            hint="This is correct if the owner of the folder runs the workers. Workers of the current user would "
            "count in memory, and their counts would be lost when they end.",
            id="promports.W004",
        )
    except OSError as error:
        yield checks.Error(
            f"PROMPORTS_LEDGER_DIR cannot be used: {error}. Workers count in memory, and their counts are lost when "
            "they end.",
            hint="Use a folder that belongs to the user who runs the workers, with mode 0700.",
            id=LEDGER_FOLDER,
        )


def _check_siblings(folder: Path) -> Iterator[checks.CheckMessage]:
    number = len(folders.find_siblings(folder, conf.project)) if conf.has_default_ledger_dir else 0
    if number > MAX_SIBLINGS:
        yield checks.Warning(
            f"There are {number} ledger folders of sites with the settings module {conf.project} in {folder.parent}.",
            hint="If each process makes a random SECRET_KEY, so that each counts as another site, set SECRET_KEY or "
            "PROMPORTS_SITE to a fixed value. Then remove the folders that are not in use.",
            id="promports.W010",
        )


def _has_middleware(name: str) -> bool:
    """Return whether the site has this middleware of django-prometheus, or a class that inherits from it."""
    path = f"django_prometheus.middleware.{name}"
    if path in conf.middleware:
        return True
    for other in conf.middleware:
        try:
            candidate, wanted = import_string(other), import_string(path)
        except Exception:  # the server reports it when it loads the middleware
            continue
        if isinstance(candidate, type) and issubclass(candidate, wanted):
            return True
    return False


def _kernel_numbers(name: str, default: list[int]) -> list[int]:
    try:
        numbers = [int(number) for number in (KERNEL / name).read_text().split()]
    except (OSError, ValueError):
        return default
    return numbers if len(numbers) == len(default) else default
