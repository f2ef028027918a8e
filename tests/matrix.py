"""The matrix of servers: the results of the tests, and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

COLUMNS = ("server", "version", "mode", "ports", "exact", "recycle", "kill", "end", "notes")
BEGIN, END = "<!-- the tests write this table -->\n", "<!-- end of the table -->\n"


class Row(TypedDict, total=False):
    """The results for one server in one mode.

    ports: the number of processes with a port. exact: every request or task was counted once. recycle, kill: what was
    done while the sum stayed exact. Each is a check mark, a check mark with a word, or a reason. end: whether workers
    seal their ledgers when they are told to stop. notes: what a user has to know or do.
    """

    server: str
    version: str
    mode: str
    ports: str
    exact: str
    recycle: str
    kill: str
    end: str
    notes: str


YES = "✓"


def versions(*packages: str) -> str:
    """Return the versions of installed packages: the first without, the others with their names."""
    first, *others = packages
    return ", ".join([version(first), *(f"{name} {version(name)}" for name in others)])


def format_table(rows: Iterable[Row]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [[row.get(column, "") for column in COLUMNS] for row in sorted(rows, key=_order)]  # type: ignore[misc]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_table(page: Path, rows: Iterable[Row]) -> None:
    """Write the table between its markers in the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + format_table(rows) + END + after)


def _order(row: Row) -> tuple[str, str, str]:
    return row["server"].lower(), row.get("version", ""), row["mode"]
