"""Overview: what the page shows of the workers of one machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from django_promports.probe import Seen
from django_promports.targets import format_target


class Overview(NamedTuple):
    """What a survey of the ports of one machine found.

    workers: the ports that are not free. waiting: how many processes wait for a port. origin: scheme and host of links
    to the workers, as in "http://[::1]"; None where a browser cannot open them. address: the one that the ports are
    bound to.
    """

    project: str
    ports: Sequence[int]
    workers: Sequence[Seen]
    waiting: int
    origin: str | None
    address: str = ""


def make_origin(scheme: str, host: str) -> str:
    """Return a URL up to its port."""
    return f"{scheme}://{format_target(host, 0).removesuffix(':0')}"
