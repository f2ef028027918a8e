"""A look at the ports of one machine: what each said of itself, as far as it can be believed.

What a port answers is not trusted: another program may have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from django_promports.activity import KEPT_SECONDS, SAMPLE_SECONDS, Sample
from django_promports.loop import Loop, Steps
from django_promports.ports import count_waiting
from django_promports.targets import Answer, Site, ask_all, format_target

# What a worker says of itself is a few kB; of what another program says no more than this is kept or shown.
MAX_SAMPLES = 4 * int(KEPT_SECONDS / SAMPLE_SECONDS)
MAX_TEXT = 200
MAX_NUMBER = 1e15


class Worker(NamedTuple):
    """What a port that is not free says; None or nothing where it says nothing that can be believed."""

    port: int
    state: str
    reason: str = ""
    pid: int | None = None
    command: str = ""
    uptime: float | None = None
    series: int | None = None
    samples: Sequence[Sample] = ()


class Look(NamedTuple):
    """What a look at the ports of one machine found.

    origin: scheme and host of links to the workers, as in "http://[::1]"; None where a browser cannot open them.
    """

    project: str
    ports: Sequence[int]
    workers: Sequence[Worker]
    waiting: int
    origin: str | None


def look(loop: Loop, site: Site, address: str, ports: Sequence[int], origin: str | None) -> Steps[Look]:
    """Ask each port what it does."""
    answers = yield from ask_all(loop, site, [(address, port) for port in ports], "/?activity")
    workers = [read(port, answer) for port, answer in zip(ports, answers, strict=True) if answer.state != "free"]
    return Look(site.project, ports, workers, count_waiting(ports), origin)


def make_origin(scheme: str, host: str) -> str:
    """Return what an address begins with, up to the port."""
    return f"{scheme}://{format_target(host, 0).removesuffix(':0')}"


def read(port: int, answer: Answer) -> Worker:
    """Return what a port said, as far as it makes sense."""
    about = answer.about
    command, uptime = about.get("command"), _number(about.get("uptime_seconds"))
    return Worker(
        port,
        answer.state,
        answer.reason[:MAX_TEXT],
        _whole(about.get("pid")),
        command[:MAX_TEXT] if isinstance(command, str) else "",
        uptime,
        _whole(about.get("series")),
        _read_samples(about.get("activity")),
    )


def _number(value: Any) -> float | None:
    # The comparison says no to NaN, and to whole numbers that no float holds.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER:
        return float(value)
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and _number(value) is not None else None


def _read_samples(value: Any) -> list[Sample]:
    """Return the samples of an answer; none if anything about them is odd."""
    if not isinstance(value, list) or len(value) > MAX_SAMPLES:
        return []
    samples: list[Sample] = []
    for row in value:
        numbers = [number for number in map(_number, row) if number is not None] if isinstance(row, list) else []
        if len(numbers) != 4 or len(row) != 4 or (samples and numbers[0] > samples[-1].ago):
            return []
        samples.append(Sample(*numbers))
    return samples
