"""Owed: the ports whose last counts were not scraped, as the ledger folder tells. For commands."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from django_promports.layout import hash_site
from django_promports.probe import Seen, State
from django_promports.reading import Status, find_damage, read_status

NOT_RUNNING = "no process of the site runs; the next one exports them"
# An heir adopts a port within seconds. One that nobody scrapes does not, and frees the port again.
NO_HEIR = "no process serves the port yet; one does within seconds, or after its own first scrape"


class Resting(NamedTuple):
    """What the folder tells of a port. status: None if its ledger cannot be read. damage: why not, or empty."""

    status: Status | None
    damage: str = ""

    @property
    def is_orphaned(self) -> bool:
        """Whether it has counts that may not have been scraped, and its holder has ended."""
        return self.status is not None and self.status.is_owed and not self.status.is_held


def read_folder(folder: Path | None, ports: Iterable[int], sites: Iterable[str]) -> dict[int, Resting]:
    """Return what the folder tells of each port that has a ledger of one of these sites, or one that cannot be read.

    The content of a ledger is checked if it is owed and no process holds it.
    """
    found: dict[int, Resting] = {}
    if folder is None or not os.access(folder, os.X_OK):
        return found
    known = {hash_site(site) for site in sites}
    for port in ports:
        path = folder / f"{port}.ledger"
        status = read_status(path)
        if status is not None and status.site not in known:
            continue
        damage = ""
        if status is None or (status.is_owed and not status.is_held):
            damage = find_damage(path)
        if status is not None or damage:
            found[port] = Resting(None if damage else status, damage)
    return found


def find_unserved(ledgers: Mapping[int, Resting], found: Sequence[Seen]) -> dict[int, str]:
    """Return why the last counts of an ended worker cannot be scraped, for each port of which that is so.

    found: what was found at each port.
    """
    states = {seen.port: seen.state for seen in found}
    is_running = any(seen.is_worker for seen in found)
    unserved = {}
    for port, resting in ledgers.items():
        if resting.damage:
            unserved[port] = f"the ledger cannot be read: {resting.damage}"
        elif resting.is_orphaned and states[port] == State.FREE:
            unserved[port] = NO_HEIR if is_running else NOT_RUNNING
        elif resting.is_orphaned and states[port] != State.LIVE:
            unserved[port] = "another program has the port"
    return unserved
