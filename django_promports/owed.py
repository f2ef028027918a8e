"""Owed: the ports whose last counts were not scraped, as the ledger folder tells. For commands; no process is asked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from django_promports.layout import hash_site
from django_promports.reading import Status, find_damage, read_status


class Resting(NamedTuple):
    """What the folder tells of a port. status: None if its ledger cannot be read. damage: why not, or empty."""

    status: Status | None
    damage: str = ""


def read_folder(folder: Path, ports: Iterable[int], site: str) -> dict[int, Resting]:
    """Return what the folder tells of each port that has a ledger of this site, or one that cannot be read.

    The content of a ledger is checked if it is owed and no process holds it.
    """
    found = {}
    key = hash_site(site)
    for port in ports:
        path = folder / f"{port}.ledger"
        status = read_status(path)
        if status is not None and status.site != key:
            continue
        damage = ""
        if status is None or (status.is_owed and not status.is_held):
            damage = find_damage(path)
        if status is not None or damage:
            found[port] = Resting(None if damage else status, damage)
    return found
