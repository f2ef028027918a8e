"""Which process serves: when this process claims a port, and what happens to the claim at a fork and at exit.

The package's only mutable state is here. Each hook runs in a certain kind of process:

- on_ready(): every process that loads the site, management commands and tests included. It only installs hooks.
- _on_handler(): a process that builds one of Django's handlers: a server, or a master that forks servers.
- _on_uwsgi_fork(): a worker, mule or spooler that uWSGI forked from a process that had loaded the site.
- _on_request(): a process at its first request. From then on it is known to be a worker.
- _await_child(): a process that has a port and is not known to be a worker: it may be a supervisor that spawns them.
- _before_fork(), _after_fork_in_parent(): a process that forks and is armed, which means that it has tried to claim.
- _after_fork_in_child(): the child of such a process.
- _before_patch(), _after_patch(): every process that loads the site, when gevent patches it.
- _at_exit(): every process that exits normally, before Python tears the interpreter down.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from types import FrameType
from typing import Any

from django.core import checks as django_checks
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_started

from django_promports import greenlets, ports, presence
from django_promports.binding import Binding
from django_promports.checks import LEDGER_FOLDER, PLATFORM, check_settings
from django_promports.claim import Holder
from django_promports.conf import conf
from django_promports.endpoint import Endpoint
from django_promports.loop import READ, Steps
from django_promports.serving import make_endpoint, read_first_key, read_terms

logger = logging.getLogger("django_promports")

# Seconds to wait for the endpoint to stop when the process exits: a collector may take minutes.
EXIT_SECONDS = 1.0
# Seconds to wait until a supervisor, asked by a worker that it started, has freed its port.
STEP_DOWN_SECONDS = 2.0
# A process that builds one of these serves requests, or forks processes that do.
HANDLERS = (WSGIHandler, ASGIHandler)


def on_ready() -> None:
    """Install the hooks that claim a port once this process proves to be a server. AppConfig.ready() calls this.

    Every server builds one of Django's handlers, in the process that serves or in a master that forks it. A handler
    that is built in a management command proves nothing; there, the first request that a handler answers does.
    """
    request_started.connect(_on_request, dispatch_uid="django_promports")
    for handler in HANDLERS:
        _watch(handler)
    greenlets.watch_patching(_before_patch, _after_patch)


def _watch(handler: Any) -> None:
    """Call _on_handler() when an instance of this handler class, or of a subclass, is built."""
    build = handler.__init__
    if hasattr(build, "watched_by_promports"):
        return

    @wraps(build)
    def notify_and_build(self: Any, *args: Any, **kwargs: Any) -> None:
        _on_handler()  # first: loading the middleware may fail, because of wrong settings for example
        build(self, *args, **kwargs)

    notify_and_build.watched_by_promports = True  # type: ignore[attr-defined]
    handler.__init__ = notify_and_build


def _on_handler() -> None:
    global _is_server
    try:
        if _is_server or _is_inside_command() or _is_test_run():
            return
        _is_server = True
        uwsgi = sys.modules.get("uwsgi")  # this module exists inside uWSGI only
        if uwsgi is not None and uwsgi.worker_id() == 0:
            _await_uwsgi_fork(uwsgi)
        else:
            presence.relieve_parent(read_first_key(), STEP_DOWN_SECONDS)
            _claim()
    except Exception:
        logger.exception("This process (pid %s) claims no metrics port before its first request.", os.getpid())


def _is_inside_command() -> bool:
    """Whether a management command runs in this process, in any thread: runserver loads the site in a second one."""
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        while caller is not None:
            # execute_from_command_line(), ManagementUtility.execute() or call_command()
            if caller.f_globals.get("__name__") == "django.core.management":
                return True
            caller = caller.f_back
    return False


def _is_test_run() -> bool:
    """Whether Django's test environment is set up, or pytest is running, which imports tests before that is set up."""
    state = getattr(sys.modules.get("django.test.utils"), "_TestState", None)
    # Neither sign of pytest is enough: child processes inherit the variable, and a site may import pytest.
    return hasattr(state, "saved_data") or ("PYTEST_VERSION" in os.environ and "_pytest" in sys.modules)


def start() -> int | None:
    """Claim a port for this process and serve its metrics there; return the port.

    For servers that do not build one of Django's handlers: a Celery pool child, a gRPC server, a daemon. Does
    nothing if the process already has a port. Never raises: if no port is free it returns None, and the process
    claims the first port that comes free.
    """
    _become_worker()
    return port()


def stop() -> None:
    """Free the port of this process, if it has one, and stop its thread."""
    _process.release()
    _process.is_broken = False


def port() -> int | None:
    """Return the port that this process holds, or None."""
    return _process.port


def _at_exit() -> None:
    # Python may take seconds to tear a process down. Without this, the port would accept connections all that time
    # and answer none. A forked child inherits the hook of its parent, but not the port.
    process = _process
    if process.pid != os.getpid():
        return
    try:
        process.release(seconds=EXIT_SECONDS)
    except Exception:
        logger.exception("Could not free the metrics port before the process exits. pid=%s", os.getpid())


# atexit calls hooks in reverse order. The site's own are registered later and run first, so what they count is kept.
atexit.register(_at_exit)


def _on_request(sender: Any = None, **kwargs: Any) -> None:
    # django.test.Client has a handler class of its own. Sites also use it outside of tests, to warm caches for example.
    if not (isinstance(sender, type) and issubclass(sender, HANDLERS)) or _is_test_run():
        return
    request_started.disconnect(dispatch_uid="django_promports")
    if _process.port is None:  # forked by multiprocessing, for example
        try:
            presence.relieve_parent(read_first_key(), STEP_DOWN_SECONDS)
        except Exception:
            logger.exception("Could not ask the parent of pid %s to free its port.", os.getpid())
    _become_worker()


def _become_worker() -> None:
    """Mark this process as a worker, then claim a port."""
    # The parent was not armed, like that of a Celery pool, or it is uWSGI and the site has replaced our hook.
    if _process.pid != os.getpid():
        _begin_after_unseen_fork()
    _process.become_worker()
    _claim()


def _claim(*, at_once: bool = True) -> None:
    """Claim a port, at once or from the retry thread. If this process can never serve, log the reason once."""
    process = _process
    try:
        if not conf.PROMPORTS_ENABLED:
            return
        with process.lock:
            if process.endpoint is None and not process.waiting_for and _is_usable(process):
                _arm()
                process.claim(at_once=at_once)
    except Exception:
        process.is_broken = True
        logger.exception("This process (pid %s) serves no metrics.", os.getpid())


def _is_usable(process: Holder) -> bool:
    """Whether the settings allow this process to serve metrics; if not, the reasons are logged once."""
    if process.is_broken:
        return False
    for message in check_settings():
        if message.id == PLATFORM:
            logger.info("%s (%s)", message.msg, message.id)
            process.is_broken = True
        elif message.level >= django_checks.ERROR and message.id != LEDGER_FOLDER:  # logged when it is opened
            logger.error("%s %s This process serves no metrics. (%s)", message.msg, message.hint, message.id)
            process.is_broken = True
    return not process.is_broken


def _make_endpoint(process: Holder, claim: ports.Claim) -> Endpoint:
    endpoint, process.heir = make_endpoint(claim, _binding, claimed_at=process.claimed_at)
    if not process.is_worker and (listener := presence.open_step_down(read_first_key())):
        endpoint.run(lambda loop: _await_child(process, listener), listener)
    return endpoint


_binding = Binding()
_process = Holder(_binding, read_terms, _make_endpoint)
_armed = False
_is_server = False  # it has built a handler: it is a server, or a master that forks servers
_forking_thread: int | None = None
_keeps_port = False  # in a fork: the process that forks keeps its port, and its child claims none
_was_retrying = False
_was_serving = False
# Under uWSGI: the read end of a pipe that holds one byte. The child that reads the byte keeps the carried counts, which
# are those made before the fork.
_uwsgi_carried: int | None = None


def _begin_process() -> Holder:
    """Give this forked or patched process a Holder with locks of its own, and return the former one."""
    global _process
    parent, _process = _process, Holder(_binding, read_terms, _make_endpoint)
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
    global _forking_thread, _keeps_port, _was_retrying
    process = _process
    keeps_port = process.is_worker or _is_multiprocessing()
    was_retrying = False
    if keeps_port:
        was_retrying = process.stop_retry()
    else:
        # A master: its first child may claim the port. A master that is root leaves no ledger, because its workers may
        # run as another user.
        process.release(undo=os.geteuid() == 0)
    process.lock.acquire()
    _forking_thread, _keeps_port, _was_retrying = threading.get_ident(), keeps_port, was_retrying
    if process.endpoint is not None:
        # A child inherits each lock as it is, but not the thread that holds it. Since 3.12, Python warns about forks
        # in a process with threads.
        process.endpoint.pause()
    if not keeps_port:
        _binding.carry_counts()


def _is_multiprocessing() -> bool:
    """Whether multiprocessing forks (a Pool, a ProcessPoolExecutor), or a copy of it, like billiard.

    A server that forks after it has loaded the site calls os.fork() itself. So the child is a helper, even if this
    process has served no request yet. If it serves requests after all, it claims at its first one, and a parent that
    has served none frees its port.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module not in (__name__, "gevent.os"):  # the caller of os.fork()
            return module.endswith(".popen_fork")
        frame = frame.f_back
    return False


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
    if _forking_thread is None:  # another thread armed this process during the fork: _before_fork() did not run
        return
    _forking_thread = None
    _process.is_worker = _keeps_port
    try:
        _binding.begin_in_child(keep=not _keeps_port)
        if parent.heir is not None:
            parent.heir.close_ledgers()
        if parent.endpoint is not None:
            parent.endpoint.abandon()
        if parent.waiting_sign is not None:
            parent.waiting_sign.close()
    except Exception:
        logger.exception("A forked child (pid %s) could not close what it inherited.", os.getpid())
    if not _keeps_port:
        greenlets.begin_in_child()
        # gunicorn changes the user in the child after the fork. So a child that is root claims later: at its first
        # request, or from the retry thread.
        _claim(at_once=os.geteuid() != 0)


def _await_child(process: Holder, listener: socket.socket) -> Steps[None]:
    """Free the port of this process when a child that wants to claim connects to the step-down socket.

    Such a process is a supervisor, which loads the site and serves no requests. One that forks its workers is
    recognised by the fork; this is for those that spawn them, like hypercorn with --reload.
    """
    while True:  # a worker, too, answers by closing the connection, so that no child waits
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
        peer.close()  # the child waits for this
    if process.is_worker:  # its own first request came meanwhile
        _claim()


def _await_uwsgi_fork(uwsgi: Any) -> None:
    """Let the workers claim that uWSGI forks from this process.

    It forks in C, so that Python's fork hooks do not run. It calls a hook of its own in the child:
    https://uwsgi-docs.readthedocs.io/en/latest/PythonDecorators.html#uwsgidecorators.postfork
    """
    global _uwsgi_carried
    try:
        if not conf.PROMPORTS_ENABLED or not _is_usable(_process):
            return
        _uwsgi_carried, write_end = os.pipe()
        os.write(write_end, b".")
        os.close(write_end)
        uwsgi.post_fork_hook = partial(_on_uwsgi_fork, uwsgi, getattr(uwsgi, "post_fork_hook", None))
    except Exception:
        logger.exception("uWSGI workers forked from pid %s serve no metrics before their first request.", os.getpid())


def _on_uwsgi_fork(uwsgi: Any, site_hook: Callable[[], object] | None) -> None:
    _begin_after_unseen_fork()
    if uwsgi.worker_id() > 0:  # not a mule or a spooler
        _claim()
    if site_hook is not None:
        site_hook()


def _begin_after_unseen_fork() -> None:
    """Set up a child whose fork ran none of our fork hooks: its parent was not armed, or forked in C.

    Each such child has a copy of its parent's counts, and at most one of them may keep the copy.
    """
    _begin_process()
    try:
        _binding.carry_counts()
        _binding.begin_in_child(keep=_uwsgi_carried is not None and os.read(_uwsgi_carried, 1) != b"")
    except Exception:
        logger.exception("A forked child (pid %s) may export counts of its parent a second time.", os.getpid())


def _before_patch() -> None:
    """Free the port and end the threads of this process while threads and locks still are what they were."""
    global _was_retrying, _was_serving
    process = _process
    try:
        _was_retrying, _was_serving = process.stop_retry(), process.endpoint is not None
        if _was_serving:
            process.release(undo=not process.is_worker and os.geteuid() == 0)  # as before a fork
    except Exception:
        logger.exception("Could not free the metrics port before gevent patches pid %s.", os.getpid())


def _after_patch() -> None:
    """Claim again, usually the same port, with the threads and locks that there are now."""
    former = _begin_process()
    _process.is_worker, _process.waiting_for = former.is_worker, former.waiting_for
    if _was_serving:
        _claim()
    elif _was_retrying:
        try:
            _process.start_retry()
        except Exception:
            logger.exception("This process (pid %s) does not wait for a port any more.", os.getpid())
