"""Terms: the settings of a claim, read once for each attempt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Terms(NamedTuple):
    """The settings of a claim.

    folder: where the ledgers are; None: count in memory. no_folder: why there is none, unless the settings ask for
    that. site: the site to which the ledgers belong. key: known to the processes of the site only; empty if it has no
    such key. former_sites, former_folders: what the site was called before, and where its ledgers were.
    """

    address: str
    ports: Sequence[int]
    folder: Path | None
    no_folder: str
    site: str
    key: bytes
    former_sites: Sequence[str] = ()
    former_folders: Sequence[Path] = ()
