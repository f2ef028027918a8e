"""Neighbours: settings that are wrong only because of what other endpoints of the machine do.

Two sites in one port range, one site that runs from two folders, and a command that uses another ledger folder than the
workers. A process that looks at its own settings only can see none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from django_promports.folders import identify
from django_promports.ports import format_ports
from django_promports.probe import Rival, Seen, State


class Fault(NamedTuple):
    """What is wrong, and what to do."""

    what: str
    hint: str

    def __str__(self) -> str:
        return f"{self.what} {self.hint}"


def find_rivals(found: Iterable[Seen], project: str, place: str) -> Iterator[Fault]:
    """Yield which ports are held by endpoints of another site. project, place: of this site."""
    rivals: dict[Rival, list[int]] = {}
    for seen in found:
        if seen.rival is not None:
            rivals.setdefault(seen.rival, []).append(seen.port)
    for rival, ports in rivals.items():
        if place and (rival.project, rival.place) == (project, place):
            yield Fault(
                f"Workers at {format_ports(ports)} have the settings module {project} and the folder {place} of this "
                "site, but another SECRET_KEY, so they count as another site.",
                "If they belong to this site, give all its processes the same SECRET_KEY, or set PROMPORTS_SITE; if "
                "not, give each site a PROMPORTS_PORT_RANGE of its own.",
            )
        else:
            yield Fault(
                f"Another site ({rival.site or 'with other keys'}) has workers at {format_ports(ports)}, in the port "
                "range of this site: a target list of the whole range contains both, and sums count both.",
                "Give each site a PROMPORTS_PORT_RANGE of its own.",
            )


def find_other_places(found: Iterable[Seen], place: str) -> Iterator[Fault]:
    """Yield from where else workers of this site run."""
    places: dict[str, list[int]] = {}
    for seen in found:
        if seen.state == State.LIVE and seen.place and seen.place != place:
            places.setdefault(seen.place, []).append(seen.port)
    for other, ports in places.items() if place else ():
        yield Fault(
            f"Workers of this site run from {other} (at {format_ports(ports)}) and from {place}, and share their "
            "counts.",
            "If these are two sites, set PROMPORTS_SITE to another name in each of them. During a deployment this is "
            "normal.",
        )


def find_other_folders(found: Iterable[Seen], folder: Path | None) -> Iterator[Fault]:
    """Yield which workers keep their ledgers elsewhere. folder: that of this process."""
    mine = identify(folder)
    ports = [seen.port for seen in found if seen.ledger_folder and seen.ledger_folder != mine]
    if ports:
        yield Fault(
            f"The workers at {format_ports(ports)} keep their ledgers in another folder than this process, which uses "
            f"{folder or 'none'}.",
            "Run it as their user and in their container, with the same RUNTIME_DIRECTORY and TMPDIR (PrivateTmp= of "
            "systemd changes the folder, too), or set PROMPORTS_LEDGER_DIR to one folder for both.",
        )
