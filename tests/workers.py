"""Workers of the demo site as single processes, whose heirs are quick."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.servers import Child, describe, running, scrape, wait_until

# An heir looks often, so that a test can await what it does.
WORK = """
import sys, time
import django
django.setup()
import django_promports
from django_promports import heir
from prometheus_client import Counter, Gauge
heir.LOOK_SECONDS = 0.05
for setting in sys.argv[2:]:
    name, _, value = setting.partition("=")
    setattr(heir, name, float(value))
django_promports.start()
while django_promports.port() is None:  # as in a reload, if the others have run for a while
    time.sleep(0.01)
Counter("work", "Work done.").inc(float(sys.argv[1]))
Gauge("desks", "Desks in use.").set(1)
print("working", flush=True)
while True:
    time.sleep(3600)
"""


@contextlib.contextmanager
def worker(folder: Path, ports: Sequence[int], count: float, *constants: str, **env: str) -> Iterator[Child]:
    """Run a process that claims the lowest free port and counts. constants: of the heir, as NAME=VALUE."""
    words = [sys.executable, "-c", WORK, str(count), *constants]
    log = folder / f"worker{len(list(folder.glob('worker*.log')))}.log"
    settings = {"DJANGO_SETTINGS_MODULE": "demo_site.settings", "DEMO_PORT_RANGE": f"{ports[0]}-{ports[-1]}", **env}
    with running(*words, log=log, **settings) as child:
        child.wait_until(lambda: "working" in child.output(), "it works")
        yield child


def kill(child: Child) -> None:
    child.process.kill()
    child.process.wait()


def await_heir(port: int, *children: Child) -> dict[str, float]:
    """Wait until an heir serves the port; return what it exports, which is a complete scrape."""
    output = lambda: "\n".join(child.output() for child in children)  # noqa: E731
    wait_until(lambda: describe(port).get("role") == "heir", f"port {port} has an heir", output=output)
    return scrape(port)
