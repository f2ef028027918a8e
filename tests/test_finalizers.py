"""Finalizers and signal handlers that count, create and remove series, and register metrics while another does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import run_python

# Everything that interrupts other code records its increments, so that the end of the test can check each of them.
PROCESS = """
import collections, faulthandler, gc, signal, sys, threading, time
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from django_promports.scrape.exposition import Exposition
from django_promports.ledger import Ledger
from django_promports.binding import Binding

faulthandler.dump_traceback_later(90, exit=True)
path, what, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
registry = CollectorRegistry(auto_describe=True)
binding = Binding(registry)
binding.open(Ledger(path, "site"))
F = Counter("f", "F.", ["x"], registry=registry)
G = Counter("g", "G.", ["x"], registry=registry)
H = Histogram("h", "H.", ["x"], registry=registry, buckets=[1])
R = Counter("removed", "Removed.", ["x"], registry=registry)
plain = Counter("plain", "Plain.", registry=registry)
numbers = iter(range(10**9))
counted = collections.Counter()
tally = collections.deque()  # appending to it calls nothing

def interfere():
    number = next(numbers)
    label = str(number % 3000)
    F.labels(label).inc()
    G.labels(label).inc()
    H.labels(label).observe(0.5)
    plain.inc()
    tally.append(label)
    R.labels(label).inc()
    R.remove(str(number % 7))
    if number % 50 == 0:
        R.clear()
    if number % 20 == 0:
        other = Counter(f"other_{number}", "Other.", ["x"], registry=registry)
        other.labels("y").inc()
        registry.unregister(other)

class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        interfere()

def count(name):
    while time.monotonic() < end:
        Cycle()
        number = next(numbers)
        label = f"{name} {number % 5000}"
        for metric in (F, G):
            metric.labels(label).inc()
        H.labels(label).observe(0.5)
        R.labels(str(number % 7)).inc()
        plain.inc()
        tally.append(label)

def scrape():
    ours = Exposition(binding)
    while time.monotonic() < end:
        for step in ours.render("application/openmetrics-text;version=1.0.0", "gzip", ()):
            Cycle()
        generate_latest(binding)

end = time.monotonic() + seconds
threads = [threading.Thread(target=scrape)]
if what in ("threads", "all"):
    threads += [threading.Thread(target=count, args=[f"thread {number}"]) for number in range(4)]
if what in ("finalizers", "threads", "all"):
    gc.set_threshold(20, 5, 100)
if what in ("signals", "all"):

    def handle(number, frame):
        interfere()
        if time.monotonic() < end:  # only now: a handler slower than its timer would interrupt itself forever
            signal.setitimer(signal.ITIMER_REAL, 0.0003)

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
sys.setswitchinterval(1e-4)
for thread in threads:
    thread.start()
count("main")
signal.signal(signal.SIGALRM, signal.SIG_IGN)
signal.setitimer(signal.ITIMER_REAL, 0)
for thread in threads:
    thread.join()
gc.disable()
binding.close()
assert len(binding.acts) == 0

registry = CollectorRegistry()
binding = Binding(registry)
binding.open(Ledger(path, "site"))
found = {
    (sample.name, sample.labels.get("x")): sample.value for metric in binding.collect() for sample in metric.samples
}
binding.close()
expected = collections.Counter(tally)
for name in ("f_total", "g_total", "h_count"):
    got = {x: value for (one, x), value in found.items() if one == name}
    assert got == expected, (name, len(got), len(expected), sum(got.values()), sum(expected.values()))
assert found["plain_total", None] == len(tally)
assert not [name for name, _ in found if name.startswith("other")]
print(len(tally))
"""


@pytest.mark.parametrize("what", ["finalizers", "signals", "threads", "all"])
def test_no_hang_and_no_half_record_whatever_is_interrupted(what: str, tmp_path: Path) -> None:
    done = run_python(PROCESS, str(tmp_path / "19100.ledger"), what, "1.5", seconds=120)

    assert done.returncode == 0, done.stderr[-10000:]
    assert not done.stderr, done.stderr[-10000:]
    assert int(done.stdout) > 100
