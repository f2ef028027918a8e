"""A fork at any moment: no child inherits a lock that is held."""

from __future__ import annotations

import pytest

from tests.commands import run_python

PROCESS = """
import logging, os, signal, sys, threading, warnings

# A child that hangs is killed, which shows in its status. (faulthandler's watchdog is a thread, and not inherited.)
os.register_at_fork(after_in_child=lambda: signal.alarm(60))
threads_at_forks = []
# Hooks that run before a fork run in reverse order of registration.
os.register_at_fork(before=lambda: threads_at_forks.append(len(os.listdir("/proc/self/task"))))

import django
from django.core.wsgi import get_wsgi_application
django.setup()
if sys.argv[1] == "master":
    get_wsgi_application()
from prometheus_client import Counter
import django_promports
from tests.servers import scrape

if sys.argv[1] == "worker":
    django_promports.start()
port = django_promports.port()
beats = Counter("beats", "Beats.", ["who"])
"""

BUSY = """
class Unbuffered(logging.Handler):
    # Python itself takes care of the locks of streams.
    def emit(self, record):
        os.write(null, self.format(record).encode())

null = os.open(os.devnull, os.O_WRONLY)
logger = logging.getLogger("beat")
logger.addHandler(Unbuffered())
over = threading.Event()

def keep(act):
    def run():
        while not over.wait(0.0005):
            act()
    thread = threading.Thread(target=run)
    thread.start()
    return thread

counted = 0
def count():
    global counted
    beats.labels("thread").inc()
    counted += 1

def look():
    try:
        scrape(port)
    except OSError:  # a master has freed its port
        pass

threads = [keep(count), keep(lambda: logger.warning("beat")), keep(look)]
try:
    for number in range(500):
        pid = os.fork()
        if pid == 0:
            beats.labels("child").inc()
            logger.warning("beat")
            if sys.argv[1] == "master":
                django_promports.start()  # at once: a child of a root process waits, because it may change its user
            os._exit(0 if (django_promports.port() is None) == (sys.argv[1] == "worker") else 1)
        status = os.waitpid(pid, 0)[1]
        assert status == 0, (number, status)
finally:
    over.set()
    for thread in threads:
        thread.join()
django_promports.start()
samples = scrape(django_promports.port())
assert samples['beats_total{who="thread"}'] == counted, (samples, counted)
assert samples.get('beats_total{who="child"}', 0) == (500 if sys.argv[1] == "master" else 0)
print("DONE")
"""

# In this program only the package starts threads.
ALONE = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(50):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
assert threads_at_forks == [1] * 50, threads_at_forks
# Before 3.13.10, Python 3.13 counts threads after the hooks that restart ours:
# https://github.com/python/cpython/issues/137109
if not (3, 13) <= sys.version_info < (3, 13, 10):
    assert not caught, [str(warning.message) for warning in caught]
if sys.argv[1] == "worker":
    assert scrape(port)["promports_port"] == port
print("DONE")
"""


@pytest.mark.parametrize("kind", ["master", "worker"])
def test_no_deadlock_in_500_forks_while_threads_scrape_log_and_count(kind: str, free_ports: range) -> None:
    assert _run(PROCESS + BUSY, kind, free_ports[:1]) == ["DONE"]


@pytest.mark.parametrize("kind", ["master", "worker"])
def test_a_fork_does_not_warn_of_threads_of_ours(kind: str, free_ports: range) -> None:
    assert _run(PROCESS + ALONE, kind, free_ports) == ["DONE"]


def _run(script: str, kind: str, ports: range) -> list[str]:
    # It takes half a minute on an idle machine.
    done = run_python(script, kind, seconds=300, DEMO_PORT_RANGE=f"{ports[0]}-{ports[-1]}")
    assert done.returncode == 0, done.stderr[-10000:]
    return done.stdout.split()
