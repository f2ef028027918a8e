"""This process's claim: who gets one, when, and what becomes of it at a fork.

The only mutable state of the package. Every hook says in which process it runs:

- on_ready(): each process that loads the site. A server process claims; a management command does not.
- _on_request(): a server process, at its first request. From then on it is a worker for good.
- _before_fork(), _after_fork_in_parent(): a process that is armed (it claimed once) and forks.
- _after_fork_in_child(): its child.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from django.core import checks as django_checks
from django.core.signals import request_started
from prometheus_client import Gauge

from django_promports import ports, targets
from django_promports.checks import LEDGER_FOLDER, check_settings
from django_promports.conf import conf
from django_promports.endpoint import Endpoint
from django_promports.exposition import Exposition
from django_promports.ledger import Ledger, LedgerFull, LedgerLocked, make_folder, read_opening
from django_promports.loop import Loop, Steps
from django_promports.values import Book

logger = logging.getLogger("django_promports")

# Seconds between two looks for a free port. gunicorn's HUP frees the old workers' ports within a second.
RETRY_SECONDS = 0.5
# In a reload the new workers come before the old ones go. They wait for the ports that the site has had so far, rather
# than move on to new ones: the instances stay the same, and what the old workers counted last is scraped, not left
# behind in ledgers of ports that nobody has. Seconds that they wait, and since when the other workers must have had
# their ports for it to be a reload and no start.
PATIENCE_SECONDS = 5.0
SETTLED_SECONDS = 5.0

PORT = Gauge("promports_port", "The port that this process holds.")
WAITING = Gauge("promports_waiting_processes", "Processes of this machine that wait for a port of the range.")


class _Reloading(Exception):
    """Only ports are free that the site has never had, and workers have the others for long."""


class _Process:
    """What this process holds, and what is known about it. A forked child begins with a new one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.port: int | None = None
        self.endpoint: Endpoint | None = None
        self.retry: threading.Thread | None = None
        self.stopping = threading.Event()
        self.waiting_sign: Any = None
        self.broken = False
        # True once it served a request or called start(), and in its forked children, which are its own business.
        # Until then it may be a master, and a child of a master is a worker.
        self.is_worker = False
        self.forking_thread: int | None = None


_process = _Process()
_book = Book()
_armed = False


def on_ready() -> None:
    """Called by AppConfig.ready(): claim if this process is a server, and otherwise see whether it becomes one.

    Servers import the project's wsgi.py or asgi.py, and with it one of these modules, before the apps are loaded;
    management commands do not.
    """
    request_started.connect(_on_request, dispatch_uid="django_promports")
    if "django.core.wsgi" in sys.modules or "django.core.asgi" in sys.modules:
        _claim()


def start() -> int | None:
    """Claim a port for this process and serve its metrics there; return the port.

    For processes that Django cannot know to be servers: a Celery pool child, a gRPC server, a daemon. It does
    nothing if the process has a port, and never raises: where no port is free the answer is None, and the
    process takes the first that comes free.
    """
    _process.is_worker = True
    _claim()
    return port()


def stop() -> None:
    """Free the port of this process, if it has one, and end its thread."""
    _release(_process)
    _process.broken = False


def port() -> int | None:
    """Return the port that this process holds, or None."""
    return _process.port


def _release(process: _Process) -> None:
    process.stopping.set()
    if process.retry is not None and process.retry is not threading.current_thread():
        process.retry.join()
    with process.lock:
        if process.endpoint is not None:
            process.endpoint.stop()
            logger.info("Freed the metrics port. port=%s pid=%s", process.port, os.getpid())
            _book.close()
        process.endpoint = process.port = process.retry = None
        process.stopping = threading.Event()


def _on_request(**kwargs: Any) -> None:
    # Tests that call views are no server; django.core.mail.outbox exists in Django's test environment only.
    mail = sys.modules.get("django.core.mail")
    if hasattr(mail, "outbox"):
        return
    request_started.disconnect(dispatch_uid="django_promports")
    _process.is_worker = True
    _claim()


def _claim() -> None:
    process = _process
    try:
        if not conf.PROMPORTS_ENABLED:
            return
        with process.lock:
            if process.endpoint is not None or process.retry is not None or process.broken:
                return
            _arm()
            errors = [
                message
                for message in check_settings()
                if message.level >= django_checks.ERROR and message.id != LEDGER_FOLDER  # said where it is opened
            ]
            for error in errors:
                logger.error("%s %s This process serves no metrics. (%s)", error.msg, error.hint, error.id)
            if errors:
                process.broken = True
                return
            try:
                _serve(process, patient=True)
            except (ports.RangeFull, _Reloading) as reason:
                if isinstance(reason, ports.RangeFull):
                    _tell_full(process, reason)
                process.retry = threading.Thread(target=_retry, args=[process], name="promports-retry", daemon=True)
                process.retry.start()
    except Exception:
        process.broken = True
        logger.exception("This process (pid %s) serves no metrics.", os.getpid())


def _tell_full(process: _Process, full: ports.RangeFull) -> None:
    logger.error(
        "%s The site is served, but this process (pid %s) is not metered until a port comes free. "
        "Widen PROMPORTS_PORT_RANGE beyond the number of workers.",
        full,
        os.getpid(),
    )
    process.waiting_sign = ports.announce_waiting(conf.PROMPORTS_PORT_RANGE)


def _serve(process: _Process, *, patient: bool) -> None:
    port_range = conf.PROMPORTS_PORT_RANGE
    claim, ledger = _claim_with_ledger(port_range, patient)
    try:
        if ledger is not None:
            _book.open(ledger)
        endpoint = Endpoint(
            claim.listener,
            exposition=Exposition(_book, created=conf.PROMPORTS_CREATED_SERIES),
            about=_describe(claim.port),
            find_targets=find_targets,
            tls=conf.server_tls(),
            read_token=conf.read_token,
        )
    except BaseException:
        _book.close()
        claim.listener.close()
        raise
    PORT.set(claim.port)
    WAITING.set_function(lambda: ports.count_waiting(port_range))
    endpoint.start()
    process.endpoint, process.port = endpoint, claim.port
    logger.info("Serving metrics. port=%s pid=%s", claim.port, os.getpid())


def _claim_with_ledger(port_range: Sequence[int], patient: bool) -> tuple[ports.Claim, Ledger | None]:
    """Claim the lowest port that is free and whose ledger is too; where all ledgers are taken, the lowest free port."""
    folder = conf.PROMPORTS_LEDGER_DIR
    address = conf.PROMPORTS_ADDRESS
    if folder is None:
        return ports.claim(address, port_range), None
    passed: list[ports.Claim] = []
    try:
        while True:
            claim = ports.claim(address, [number for number in port_range if number not in {c.port for c in passed}])
            try:
                make_folder(folder)
                if patient and _is_reload(folder, port_range, claim.port):
                    passed.append(claim)
                    raise _Reloading
                return claim, Ledger(folder / f"{claim.port}.ledger", conf.project)
            except LedgerLocked:
                passed.append(claim)
            except (OSError, LedgerFull) as error:
                reason = str(error)
                break
    except ports.RangeFull:
        if not passed:
            raise
        claim, reason = passed.pop(0), f"other processes have the ledgers of all free ports in {folder} open"
    finally:
        for other in passed:
            other.listener.close()
    logger.error("Counting in memory: %s. What pid %s counts is lost when it ends.", reason, os.getpid())
    return claim, None


def _is_reload(folder: Path, port_range: Sequence[int], port: int) -> bool:
    if read_opening(folder / f"{port}.ledger") is not None:
        return False
    openings = [read_opening(folder / f"{lower}.ledger") for lower in port_range if lower < port]
    return any(opening is not None and opening < time.time() - SETTLED_SECONDS for opening in openings)


def _retry(process: _Process) -> None:
    began = time.monotonic()
    try:
        while not process.stopping.wait(RETRY_SECONDS):
            with process.lock:
                if process.stopping.is_set():
                    return
                try:
                    _serve(process, patient=time.monotonic() < began + PATIENCE_SECONDS)
                except _Reloading:
                    continue
                except ports.RangeFull as full:
                    if process.waiting_sign is None:
                        _tell_full(process, full)
                    continue
                process.retry = None
                return
    except Exception:
        process.broken = True
        logger.exception("This process (pid %s) serves no metrics.", os.getpid())
    finally:
        if process.waiting_sign is not None:
            process.waiting_sign.close()
            process.waiting_sign = None


def _describe(claimed: int) -> Any:
    about = {
        "application": targets.APPLICATION,
        "project": conf.project,
        "pid": os.getpid(),
        "port": claimed,
        "command": _command(),
    }
    began = time.monotonic()
    return lambda: {**about, "uptime_seconds": round(time.monotonic() - began, 3)}


def _command() -> str:
    """Return the words of the command line up to the first option: a later one may be a secret."""
    program, *words = sys.argv or [sys.executable]
    path = Path(program)
    name = path.parent.name if path.name == "__main__.py" else path.name  # python -m gunicorn
    return " ".join([name, *takewhile(lambda word: not word.startswith("-"), words)])


def find_targets(loop: Loop) -> Steps[bytes]:
    """Ask every port of this machine and return the http_sd document of those at which a worker answers."""
    address = conf.local_address
    live = yield from targets.find_live(loop, conf.site, {address: conf.PROMPORTS_PORT_RANGE})
    exported = {conf.PROMPORTS_TARGET_HOST: live[address]}
    groups = targets.target_groups(exported, labels=conf.PROMPORTS_TARGET_LABELS, scheme=conf.scheme)
    return b"".join(targets.dump_json(groups))


def _arm() -> None:
    global _armed
    if not _armed:
        _armed = True
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
        )


def _before_fork() -> None:
    process = _process
    if not process.is_worker:
        # A master: its first child may have the port, and it must not fork with threads of ours running.
        _release(process)
    process.lock.acquire()
    process.forking_thread = threading.get_ident()
    if process.endpoint is not None:
        # The child inherits every lock as it is now; it must not inherit one that the endpoint's thread holds.
        process.endpoint.pause()


def _after_fork_in_parent() -> None:
    process = _process
    if process.forking_thread == threading.get_ident():
        process.forking_thread = None
        if process.endpoint is not None:
            process.endpoint.unpause()
        try:
            if not process.is_worker:
                _book.hand_over()
        finally:
            process.lock.release()


def _after_fork_in_child() -> None:
    global _process
    parent, _process = _process, _Process()
    _process.is_worker, _process.broken = parent.is_worker, parent.broken
    if parent.forking_thread is None:  # armed by another thread in the middle of this fork
        return
    try:
        _book.begin_in_child(keep=not parent.is_worker)
        if parent.endpoint is not None:
            parent.endpoint.abandon()
        if parent.waiting_sign is not None:
            parent.waiting_sign.close()
    except Exception:
        logger.exception("A forked child (pid %s) could not close what it inherited.", os.getpid())
    if not parent.is_worker:
        _prepare_gevent()
        _claim()


def _prepare_gevent() -> None:
    # gevent prepares a child's hub after these hooks, and before that no thread of its kind can start. It may be
    # done twice: https://www.gevent.org/api/gevent.html#gevent.reinit
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        sys.modules["gevent"].reinit()
