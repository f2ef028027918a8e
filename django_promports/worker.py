"""Which process serves: when this one claims a port, and what becomes of the claim at a fork and at the end.

What it holds is the package's only mutable state. Every hook says in which process it runs:

- on_ready(): each process that loads the site, management commands and tests included. It only watches.
- _on_handler(): a process that built one of Django's handlers: a server, or a master that forks servers.
- _on_uwsgi_fork(): a worker, mule or spooler that uWSGI forked from a process that had loaded the site.
- _on_request(): a process at its first request. A server is a worker from then on.
- _at_exit(): each process that ends by itself, before Python tears it down.
- _before_fork(), _after_fork_in_parent(): a process that is armed (it claimed once) and forks.
- _after_fork_in_child(): its child.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any

from django.core import checks as django_checks
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_started

from django_promports import ports, presence
from django_promports.activity import Activity
from django_promports.binding import Binding
from django_promports.checks import LEDGER_FOLDER, PLATFORM, check_settings
from django_promports.claim import Holder, Terms
from django_promports.conf import conf
from django_promports.discovery import find_targets, survey
from django_promports.endpoint import Endpoint
from django_promports.loop import READ, Steps
from django_promports.own import own_metrics
from django_promports.probe import APPLICATION
from django_promports.scrape.exposition import Exposition

logger = logging.getLogger("django_promports")

# Seconds for the endpoint to come to a stop when the process ends: a collector may take minutes.
EXIT_SECONDS = 1.0
# Seconds for a supervisor, asked by a worker that it started, to free its port.
STEP_DOWN_SECONDS = 2.0
# Whoever builds one of these serves requests, or forks processes that do.
HANDLERS = (WSGIHandler, ASGIHandler)


def on_ready() -> None:
    """Called by AppConfig.ready(): claim once this process proves to be a server.

    Every server builds one of Django's handlers, in the process that serves or in a master that forks it. A handler
    that is built in a management command proves nothing; there the first request that a handler answers does.
    """
    request_started.connect(_on_request, dispatch_uid="django_promports")
    for handler in HANDLERS:
        _watch(handler)


def _watch(handler: Any) -> None:
    """Call _on_handler() when an object of this class, or of a subclass, is built."""
    build = handler.__init__
    if hasattr(build, "watched_by_promports"):
        return

    @wraps(build)
    def tell_and_build(self: Any, *args: Any, **kwargs: Any) -> None:
        _on_handler()  # first: what is wrong with the settings may keep the middleware from being loaded
        build(self, *args, **kwargs)

    tell_and_build.watched_by_promports = True  # type: ignore[attr-defined]
    handler.__init__ = tell_and_build


def _on_handler() -> None:
    global _is_server
    try:
        if _is_server or _is_inside_command() or _is_test_run():
            return
        _is_server = True
        uwsgi = sys.modules.get("uwsgi")  # which exists inside uWSGI only
        if uwsgi is not None and uwsgi.worker_id() == 0:
            _await_uwsgi_fork(uwsgi)
        else:
            presence.relieve_parent(_read_first_key(), STEP_DOWN_SECONDS)
            _claim()
    except Exception:
        logger.exception("This process (pid %s) claims no metrics port before its first request.", os.getpid())


def _is_inside_command() -> bool:
    """Whether a management command runs in this process, in any thread: runserver loads the site in its second one."""
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        while caller is not None:
            # execute_from_command_line(), ManagementUtility.execute() or call_command()
            if caller.f_globals.get("__name__") == "django.core.management":
                return True
            caller = caller.f_back
    return False


def _is_test_run() -> bool:
    """Whether Django's test environment is set up, or pytest runs, which imports a project's tests before that."""
    state = getattr(sys.modules.get("django.test.utils"), "_TestState", None)
    # Each of pytest's two signs misleads alone: child processes inherit the variable, and a site may import pytest.
    return hasattr(state, "saved_data") or ("PYTEST_VERSION" in os.environ and "_pytest" in sys.modules)


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
    _process.release()
    _process.is_broken = False


def port() -> int | None:
    """Return the port that this process holds, or None."""
    return _process.port


def _at_exit() -> None:
    # Python may take seconds to tear a process down, and nobody would answer at the port. A forked child has the hook
    # of its parent, but not the port.
    process = _process
    if process.pid != os.getpid():
        return
    try:
        process.release(seconds=EXIT_SECONDS)
    except Exception:
        logger.exception("The metrics port is not freed before the process ends. pid=%s", os.getpid())


# Python calls what is registered last first, and what the site registers may count.
atexit.register(_at_exit)


def _on_request(sender: Any = None, **kwargs: Any) -> None:
    # The test client sends a handler of its own: it also warms caches and builds static sites, outside of tests.
    if not (isinstance(sender, type) and issubclass(sender, HANDLERS)) or _is_test_run():
        return
    request_started.disconnect(dispatch_uid="django_promports")
    _become_worker()


def _become_worker() -> None:
    """Mark this process as a worker, then claim a port."""
    # Forked by a parent without a port, like that of a Celery pool, or by uWSGI with somebody's hook in place of ours.
    if _process.pid != os.getpid():
        _begin_after_unseen_fork()
    _process.become_worker()
    _claim()


def _claim(*, at_once: bool = True) -> None:
    """Claim a port, now or in a moment. Where that fails for good, say why, once."""
    process = _process
    try:
        if not conf.PROMPORTS_ENABLED:
            return
        with process.lock:
            if process.endpoint is None and not process.is_waiting and _is_usable(process):
                _arm()
                process.claim(at_once=at_once)
    except Exception:
        process.is_broken = True
        logger.exception("This process (pid %s) serves no metrics.", os.getpid())


def _is_usable(process: Holder) -> bool:
    """Whether the settings allow to serve metrics; what does not is logged once."""
    if process.is_broken:
        return False
    for message in check_settings():
        if message.id == PLATFORM:
            logger.info("%s (%s)", message.msg, message.id)
            process.is_broken = True
        elif message.level >= django_checks.ERROR and message.id != LEDGER_FOLDER:  # said where it is opened
            logger.error("%s %s This process serves no metrics. (%s)", message.msg, message.hint, message.id)
            process.is_broken = True
    return not process.is_broken


def _read_terms() -> Terms:
    return Terms(
        conf.PROMPORTS_ADDRESS,
        conf.PROMPORTS_PORT_RANGE,
        conf.PROMPORTS_LEDGER_DIR,
        conf.no_ledger_dir,
        conf.project,
    )


def _make_endpoint(process: Holder, claim: ports.Claim) -> Endpoint:
    port_range = conf.PROMPORTS_PORT_RANGE
    endpoint = Endpoint(
        claim.listener,
        exposition=Exposition(_binding, created=conf.PROMPORTS_CREATED_SERIES),
        about=_describe(claim.port),
        find_targets=find_targets,
        survey=survey,
        activity=Activity(_binding.registry, conf.metric_namespace),
        tls=conf.server_tls(),
        read_token=conf.read_token,
        read_keys=conf.read_keys,
        host=conf.PROMPORTS_TARGET_HOST,
        claimed_at=process.claimed_at,
    )
    own_metrics().port.set(claim.port)
    own_metrics().waiting.set_function(lambda: presence.count_waiting(port_range))
    if not process.is_worker and (listener := presence.open_step_down(_read_first_key())):
        endpoint.hold(partial(_await_child, process, listener), listener)
    return endpoint


def _read_first_key() -> bytes:
    """Return the best key of the site; nothing where it has none, or where a wrong setting hides it."""
    try:
        return next(conf.read_keys(), b"")
    except Exception:  # the claim says what is wrong
        return b""


def _describe(claimed: int) -> Any:
    about = {
        "application": APPLICATION,
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


_binding = Binding()
_process = Holder(_binding, _read_terms, _make_endpoint)
_armed = False
_is_server = False  # or a master that forks servers: it has built a handler
_forking_thread: int | None = None
_was_retrying = False
# Where uWSGI forks: a pipe with one byte in it. The child that reads it has what was counted before the fork.
_uwsgi_counts_pipe: int | None = None


def _begin_process() -> Holder:
    """Begin in a forked child, and return what the parent holds."""
    global _process
    parent, _process = _process, Holder(_binding, _read_terms, _make_endpoint)
    _process.is_broken = parent.is_broken
    return parent


def _arm() -> None:
    global _armed
    if not _armed:
        _armed = True
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
        )


def _before_fork() -> None:
    global _forking_thread, _was_retrying
    process = _process
    if process.is_worker:
        _was_retrying = process.stop_retry()
    else:
        # A master: its first child may have the port. The ledger is the workers', who may be of another user.
        process.release(undo=os.geteuid() == 0)
        _was_retrying = False
    process.lock.acquire()
    _forking_thread = threading.get_ident()
    if process.endpoint is not None:
        # A child inherits every lock as it is, without the thread that holds it. Python warns of that since 3.12.
        process.endpoint.pause()
    if not process.is_worker:
        _binding.carry_counts()


def _after_fork_in_parent() -> None:
    global _forking_thread
    process = _process
    if _forking_thread == threading.get_ident():
        _forking_thread = None
        try:
            if process.endpoint is not None:
                process.endpoint.start()
            elif _was_retrying:
                process.start_retry()
            _binding.drop_carried_counts()
        finally:
            process.lock.release()


def _after_fork_in_child() -> None:
    global _forking_thread
    parent = _begin_process()
    _process.is_worker = parent.is_worker
    if _forking_thread is None:  # armed by another thread in the middle of this fork
        return
    _forking_thread = None
    try:
        _binding.begin_in_child(keep=not parent.is_worker)
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


def _await_child(process: Holder, listener: socket.socket) -> Steps[None]:
    """Free the port of a supervisor, which loads the site and serves nothing, when a child comes that claims.

    Supervisors that fork are known by that; this is for those that spawn, like hypercorn's with --reload.
    """
    while not process.is_worker:
        yield listener, READ
        with suppress(OSError):
            peer, _ = listener.accept()
            if presence.is_child(peer) and not process.is_worker:
                threading.Thread(target=_step_down, args=[process, peer], daemon=True).start()
                return
            peer.close()


def _step_down(process: Holder, peer: socket.socket) -> None:
    try:
        process.release()
    finally:
        peer.close()  # which is what the child waits for


def _await_uwsgi_fork(uwsgi: Any) -> None:
    """Let workers claim that uWSGI forks from this process.

    It forks in C, without telling Python, but for its own hook in the child:
    https://uwsgi-docs.readthedocs.io/en/latest/PythonDecorators.html#uwsgidecorators.postfork
    """
    global _uwsgi_counts_pipe
    try:
        if not conf.PROMPORTS_ENABLED or not _is_usable(_process):
            return
        _uwsgi_counts_pipe, write_end = os.pipe()
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
    _begin_process()
    try:
        _binding.carry_counts()
        _binding.begin_in_child(keep=_uwsgi_counts_pipe is not None and os.read(_uwsgi_counts_pipe, 1) != b"")
    except Exception:
        logger.exception("A forked child (pid %s) may count what its parent has counted.", os.getpid())


def _prepare_gevent() -> None:
    # gevent prepares a child's hub after these hooks, and before that no thread of its kind can start. It may be
    # done twice: https://www.gevent.org/api/gevent.html#gevent.reinit
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        sys.modules["gevent"].reinit()
