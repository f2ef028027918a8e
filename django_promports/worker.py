"""This process's claim: who gets one, when, and what becomes of it at a fork.

The only mutable state of the package. Every hook says in which process it runs:

- on_ready(): each process that loads the site. A server process claims; a management command does not.
- _on_uwsgi_fork(): a worker, mule or spooler that uWSGI forked from a process that had loaded the site.
- _on_request(): a server process, at its first request. From then on it is a worker for good.
- _before_fork(), _after_fork_in_parent(): a process that is armed (it claimed once) and forks.
- _after_fork_in_child(): its child.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from django.core import checks as django_checks
from django.core.signals import request_started
from prometheus_client import Gauge

from django_promports import pages, ports, targets
from django_promports.activity import Activity
from django_promports.checks import LEDGER_FOLDER, check_settings
from django_promports.conf import conf
from django_promports.endpoint import Endpoint
from django_promports.exposition import Exposition
from django_promports.ledger import Ledger, LedgerFull, LedgerLocked, make_folder, read_opening
from django_promports.loop import READ, Loop, Steps
from django_promports.secret import make_secret, remove_secret
from django_promports.values import Book

logger = logging.getLogger("django_promports")

# Seconds between two looks for a free port. gunicorn's HUP frees the old workers' ports within a second.
RETRY_SECONDS = 0.5
# Seconds for a supervisor, asked by a worker that it started, to free its port.
STEP_DOWN_SECONDS = 2.0
# In a reload the new workers come before the old ones go. They wait for the ports that the site has had so far, rather
# than move on to new ones: the instances stay the same, and what the old workers counted last is scraped, not left
# behind in ledgers of ports that nobody has. Seconds that they wait, and wait on after each port that changed hands
# (some servers replace one worker after the other), in all; and since when the other workers must have had their ports
# for it to be a reload and no start.
PATIENCE_SECONDS = 5.0
MAX_PATIENCE_SECONDS = 30.0
SETTLED_SECONDS = 5.0

PORT = Gauge("promports_port", "The port that this process holds.")
WAITING = Gauge("promports_waiting_processes", "Processes of this machine that wait for a port of the range.")


class _Undecided(Exception):
    """It is too early to claim: the old workers of a reload still have their ports, or the user may change."""


class _Process:
    """What this process holds, and what is known about it. A forked child begins with a new one."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.port: int | None = None
        self.endpoint: Endpoint | None = None
        self.retry: threading.Thread | None = None
        self.stopping = threading.Event()
        self.retrying_since = 0.0
        self.is_waiting = False
        self.waiting_sign: Any = None
        self.made_folder: Path | None = None
        self.made_secret: tuple[Path, bytes] | None = None
        self.is_secret_missed = False
        self.claimed_at = 0.0
        self.unsaid = ""
        self.broken = False
        # True once it served a request or called start(), and in its forked children, which are its own business.
        # Until then it may be a master, and a child of a master is a worker.
        self.is_worker = False
        self.forking_thread: int | None = None
        self.was_retrying = False


_process = _Process()
_book = Book()
_armed = False
# Where uWSGI forks: a pipe with one byte in it. The child that reads it has what was counted before the fork.
_uwsgi_parcel: int | None = None


def on_ready() -> None:
    """Called by AppConfig.ready(): claim if this process is a server, and otherwise see whether it becomes one.

    Servers import the project's wsgi.py or asgi.py, and with it one of these modules, before the apps are loaded;
    management commands do not.
    """
    request_started.connect(_on_request, dispatch_uid="django_promports")
    if "django.core.wsgi" in sys.modules or "django.core.asgi" in sys.modules:
        uwsgi = sys.modules.get("uwsgi")  # which exists inside uWSGI only
        if uwsgi is not None and uwsgi.worker_id() == 0:
            _await_uwsgi_fork(uwsgi)
        else:
            ports.relieve_parent(_read_first_key(), STEP_DOWN_SECONDS)
            _claim()


def start() -> int | None:
    """Claim a port for this process and serve its metrics there; return the port.

    For processes that Django cannot know to be servers: a Celery pool child, a gRPC server, a daemon. It does
    nothing if the process has a port, and never raises: where no port is free the answer is None, and the
    process takes the first that comes free.
    """
    _become_worker()
    return port()


def stop() -> None:
    """Free the port of this process, if it has one, and end its thread."""
    _release(_process)
    _process.broken = False


def port() -> int | None:
    """Return the port that this process holds, or None."""
    return _process.port


def _release(process: _Process, *, undo: bool = False) -> None:
    """Free the port. undo: leave no folder and no ledger behind that this process has made."""
    _stop_retry(process)
    with process.lock:
        if process.endpoint is not None:
            process.endpoint.stop()
            logger.info("Freed the metrics port. port=%s pid=%s", process.port, os.getpid())
            _book.close(undo=undo)
            if undo and process.made_secret is not None:
                with suppress(OSError):
                    remove_secret(*process.made_secret)
            if undo and process.made_folder is not None:
                with suppress(OSError):  # others have their ledgers in it
                    process.made_folder.rmdir()
        process.endpoint = process.port = None
        process.retrying_since, process.is_waiting = 0.0, False


def _stop_retry(process: _Process) -> bool:
    """End the thread that waits for a port; False if there is none."""
    process.stopping.set()
    retry = process.retry
    if retry is not None and retry is not threading.current_thread():
        retry.join()
    process.stopping = threading.Event()
    process.retry = None
    return retry is not None


def _start_retry(process: _Process) -> None:
    process.retrying_since = process.retrying_since or time.monotonic()
    process.retry = threading.Thread(target=_retry, args=[process], name="promports-retry", daemon=True)
    process.retry.start()


def _on_request(**kwargs: Any) -> None:
    # Tests that call views are no server; django.core.mail.outbox exists in Django's test environment only.
    mail = sys.modules.get("django.core.mail")
    if hasattr(mail, "outbox"):
        return
    request_started.disconnect(dispatch_uid="django_promports")
    _become_worker()


def _become_worker() -> None:
    """Claim for a process that is no master, and no longer one that may be."""
    # Forked by a parent without a port, like that of a Celery pool, or by uWSGI with somebody's hook in place of ours.
    if _process.pid != os.getpid():
        _begin_after_unseen_fork()
    _process.is_worker = True
    said, _process.unsaid = _process.unsaid, ""
    if said:
        logger.error(said)
    _claim()


def _claim(*, at_once: bool = True) -> None:
    """Claim a port, now or in a moment. Where that fails for good, say why, once."""
    process = _process
    try:
        if not conf.PROMPORTS_ENABLED:
            return
        with process.lock:
            if process.endpoint is not None or process.is_waiting or not _is_usable(process):
                return
            _arm()
            try:
                if not at_once:
                    raise _Undecided
                _serve(process, waited=0.0)
            except (ports.RangeFull, _Undecided) as reason:
                if isinstance(reason, ports.RangeFull):
                    _tell_full(process, reason)
                if process.retry is None:
                    _start_retry(process)
    except Exception:
        process.broken = True
        logger.exception("This process (pid %s) serves no metrics.", os.getpid())


def _is_usable(process: _Process) -> bool:
    """Whether nothing in the settings forbids to serve metrics; what does is logged once."""
    if process.broken:
        return False
    for message in check_settings():
        if message.level >= django_checks.ERROR and message.id != LEDGER_FOLDER:  # said where it is opened
            logger.error("%s %s This process serves no metrics. (%s)", message.msg, message.hint, message.id)
            process.broken = True
    return not process.broken


def _tell_full(process: _Process, full: ports.RangeFull) -> None:
    logger.error(
        "%s The site is served, but this process (pid %s) is not metered until a port comes free. "
        "Widen PROMPORTS_PORT_RANGE beyond the number of workers.",
        full,
        os.getpid(),
    )
    process.is_waiting = True


def _serve(process: _Process, *, waited: float) -> None:
    port_range = conf.PROMPORTS_PORT_RANGE
    claim, ledger = _claim_with_ledger(process, port_range, waited)
    try:
        if ledger is not None:
            _book.open(ledger)
        endpoint = Endpoint(
            claim.listener,
            exposition=Exposition(_book, created=conf.PROMPORTS_CREATED_SERIES),
            about=_describe(claim.port),
            find_targets=find_targets,
            look=look,
            activity=Activity(_book.registry, conf.metric_namespace),
            tls=conf.server_tls(),
            read_token=conf.read_token,
            read_keys=conf.read_keys,
            host=conf.PROMPORTS_TARGET_HOST,
            claimed_at=process.claimed_at,
        )
    except BaseException:
        _book.close()
        claim.listener.close()
        raise
    PORT.set(claim.port)
    WAITING.set_function(lambda: ports.count_waiting(port_range))
    if not process.is_worker and (listener := ports.open_step_down(_read_first_key())):
        endpoint.hold(partial(_await_child, process, listener), listener)
    endpoint.start()
    process.endpoint, process.port = endpoint, claim.port
    logger.info("Serving metrics. port=%s pid=%s", claim.port, os.getpid())


def _claim_with_ledger(
    process: _Process, port_range: Sequence[int], waited: float
) -> tuple[ports.Claim, Ledger | None]:
    """Claim the lowest port that is free and whose ledger is too; where all ledgers are taken, the lowest free port."""
    folder = conf.PROMPORTS_LEDGER_DIR
    address = conf.PROMPORTS_ADDRESS
    process.unsaid = ""
    if folder is None:
        claim = ports.claim(address, port_range)
        process.claimed_at = time.monotonic()
        return claim, None
    passed: list[ports.Claim] = []
    try:
        while True:
            claim = ports.claim(address, [number for number in port_range if number not in {c.port for c in passed}])
            process.claimed_at = time.monotonic()
            try:
                if make_folder(folder):
                    process.made_folder = folder
                _make_secret(process, folder)
                if _is_reload(folder, port_range, claim.port, waited):
                    passed.append(claim)
                    raise _Undecided
                return claim, Ledger(folder / f"{claim.port}.ledger", conf.project)
            except LedgerLocked:
                passed.append(claim)
            except (OSError, LedgerFull) as error:
                reason = str(error)
                break
    except ports.RangeFull:
        if not passed:
            raise
        # When this one was claimed is not known any more; a later time is as safe.
        claim, reason = passed.pop(0), f"other processes have the ledgers of all free ports in {folder} open"
    finally:
        for other in passed:
            other.listener.close()
    said = f"Counting in memory: {reason}. What pid {os.getpid()} counts is lost when it ends."
    if os.geteuid() == 0 and not process.is_worker:  # a master of root's may have workers of the folder's user
        process.unsaid = said
    else:
        logger.error(said)
    return claim, None


def _make_secret(process: _Process, folder: Path) -> None:
    """Make the site secret in a folder that belongs to this user, unless there is one."""
    try:
        if secret := make_secret(folder):
            process.made_secret = folder, secret
    except OSError as error:
        if not process.is_secret_missed:
            process.is_secret_missed = True
            logger.warning("There is no site secret: %s. Processes of the site know each other by other keys.", error)


def _read_first_key() -> bytes:
    """Return the best key of the site; nothing where it has none, or where a wrong setting hides it."""
    try:
        return next(conf.read_keys(), b"")
    except Exception:  # the claim says what is wrong
        return b""


def _is_reload(folder: Path, port_range: Sequence[int], port: int, waited: float) -> bool:
    """Whether the port is new to the site, and another one will soon come free."""
    if read_opening(folder / f"{port}.ledger") is not None:
        return False
    openings = [read_opening(folder / f"{lower}.ledger") for lower in port_range if lower < port]
    ages = [time.time() - opening for opening in openings if opening is not None]
    if waited < PATIENCE_SECONDS:
        return any(age > SETTLED_SECONDS for age in ages)
    return waited < MAX_PATIENCE_SECONDS and any(age < PATIENCE_SECONDS for age in ages)


def _retry(process: _Process) -> None:
    try:
        while True:
            if process.is_waiting and process.waiting_sign is None:
                process.waiting_sign = ports.announce_waiting(conf.PROMPORTS_PORT_RANGE)
            if process.stopping.wait(RETRY_SECONDS):
                return
            with process.lock:
                if process.stopping.is_set() or process.endpoint is not None:
                    return
                try:
                    _serve(process, waited=time.monotonic() - process.retrying_since)
                except _Undecided:
                    continue
                except ports.RangeFull as full:
                    if not process.is_waiting:
                        _tell_full(process, full)
                    continue
                process.is_waiting = False
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


def look(loop: Loop) -> Steps[pages.Look]:
    """Ask every port of this machine what it does, for the page."""
    # Where there is a token no browser has it, and links would lead nowhere.
    guarded = conf.PROMPORTS_BEARER_TOKEN_FILE is not None
    origin = None if guarded else pages.make_origin(conf.scheme, conf.PROMPORTS_TARGET_HOST)
    return (yield from pages.look(loop, conf.site, conf.local_address, conf.PROMPORTS_PORT_RANGE, origin))


def _arm() -> None:
    global _armed
    if not _armed:
        _armed = True
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
        )


def _before_fork() -> None:
    process = _process
    if process.is_worker:
        process.was_retrying = _stop_retry(process)
    else:
        # A master: its first child may have the port. The ledger is the workers', who may be of another user.
        _release(process, undo=os.geteuid() == 0)
    process.lock.acquire()
    process.forking_thread = threading.get_ident()
    if process.endpoint is not None:
        # A child inherits every lock as it is, without the thread that holds it. Python warns of that since 3.12.
        process.endpoint.pause()
    if not process.is_worker:
        _book.pack()


def _after_fork_in_parent() -> None:
    process = _process
    if process.forking_thread == threading.get_ident():
        process.forking_thread = None
        try:
            if process.endpoint is not None:
                process.endpoint.start()
            elif process.was_retrying:
                _start_retry(process)
            _book.part_with_parcel()
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
        # gunicorn changes the user in the child, which is why one of root's claims with its first request, or soon.
        _claim(at_once=os.geteuid() != 0)


def _await_child(process: _Process, listener: socket.socket) -> Steps[None]:
    """Free the port of a supervisor, which loads the site and serves nothing, when a child comes that claims.

    Supervisors that fork are known by that; this is for those that spawn, like hypercorn's with --reload.
    """
    while not process.is_worker:
        yield listener, READ
        with suppress(OSError):
            peer, _ = listener.accept()
            if ports.is_child(peer) and not process.is_worker:
                threading.Thread(target=_step_down, args=[process, peer], daemon=True).start()
                return
            peer.close()


def _step_down(process: _Process, peer: socket.socket) -> None:
    try:
        _release(process)
    finally:
        peer.close()  # which is what the child waits for


def _await_uwsgi_fork(uwsgi: Any) -> None:
    """Let workers claim that uWSGI forks from this process.

    It forks in C, without telling Python, but for its own hook in the child:
    https://uwsgi-docs.readthedocs.io/en/latest/PythonDecorators.html#uwsgidecorators.postfork
    """
    global _uwsgi_parcel
    try:
        if not conf.PROMPORTS_ENABLED or not _is_usable(_process):
            return
        _uwsgi_parcel, write_end = os.pipe()
        os.write(write_end, b".")
        os.close(write_end)
        uwsgi.post_fork_hook = partial(_on_uwsgi_fork, uwsgi, getattr(uwsgi, "post_fork_hook", None))
    except Exception:
        logger.exception("uWSGI's workers (of pid %s) serve metrics from their first request on.", os.getpid())


def _on_uwsgi_fork(uwsgi: Any, site_hook: Callable[[], object] | None) -> None:
    _begin_after_unseen_fork()
    if uwsgi.worker_id() > 0:  # no mule and no spooler
        _claim()
    if site_hook is not None:
        site_hook()


def _begin_after_unseen_fork() -> None:
    """Begin in a child of a process that was not armed, or forked in C: all its children have copies of its numbers."""
    global _process
    parent, _process = _process, _Process()
    _process.broken = parent.broken
    try:
        _book.pack()
        _book.begin_in_child(keep=_uwsgi_parcel is not None and os.read(_uwsgi_parcel, 1) != b"")
    except Exception:
        logger.exception("A forked child (pid %s) may count what its parent has counted.", os.getpid())


def _prepare_gevent() -> None:
    # gevent prepares a child's hub after these hooks, and before that no thread of its kind can start. It may be
    # done twice: https://www.gevent.org/api/gevent.html#gevent.reinit
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        sys.modules["gevent"].reinit()
