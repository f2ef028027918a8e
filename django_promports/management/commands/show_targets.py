"""manage.py show_targets: what each port of the range does now."""

from __future__ import annotations

import contextlib
import json
import os
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from time import strftime
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from django_promports import probe
from django_promports.checks import TAG
from django_promports.conf import conf
from django_promports.discovery import find_faults, read_ledgers
from django_promports.loop import Loop
from django_promports.owed import find_unserved
from django_promports.page.html import NEVER, format_duration, format_live, format_scraped, format_unscraped
from django_promports.ports import format_ports
from django_promports.presence import count_waiting, format_waiting
from django_promports.probe import Role, Scraped, Seen, State
from django_promports.stopping import parse_seconds, stop_signals

COLUMNS = ("port", "state", "role", "pid", "command", "uptime", "series", "scrape", "scraped")
# Columns of numbers are aligned right.
RIGHT = {"port", "pid", "uptime", "series", "scrape"}
COLOURS = {State.LIVE: "green", State.SILENT: "yellow", State.OTHER: "red"}
WATCH_SECONDS = 2.0

Rows = Sequence[dict[str, Any]]


class Command(BaseCommand):
    help = (
        "Shows the state of each port of PROMPORTS_PORT_RANGE: live (a process of this site answers), free, "
        "other (another program or site holds it) or silent (connected, but no answer in time). A live process is the "
        "worker that has claimed the port, or the heir of one that has ended: it exports the last counts. `scrape` is "
        "how long this command waited for the metrics, `scraped` who else received all of them last."
    )
    requires_system_checks = (TAG,)

    def add_arguments(self, parser: ArgumentParser) -> None:
        manner = parser.add_mutually_exclusive_group()
        manner.add_argument("--json", action="store_true", help="Print JSON: times in seconds, null if unknown.")
        manner.add_argument(
            "--watch",
            nargs="?",
            const=WATCH_SECONDS,
            type=parse_seconds,
            metavar="SECONDS",
            help=f"Repeat every SECONDS, {WATCH_SECONDS:g} by default, until Ctrl-C. On a terminal the table is "
            "updated in place and coloured if `rich` is installed: pip install django-promports[cli].",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            if options["watch"] is not None:
                self.watch(**options)
                return
            rows, waiting, faults = _inspect()
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from None
        if options["json"]:
            self.stdout.write(json.dumps({"targets": rows, "waiting_processes": waiting}, indent=2))
            for fault in faults:
                self.stderr.write(fault)
        else:
            self.show(rows, waiting, faults)

    def show(self, rows: Rows, waiting: int, faults: Sequence[str]) -> None:
        if table := _table(_cells(rows)):
            self.stdout.write("\n".join(table))
        summary, *warnings = _summary(rows, waiting, faults)
        self.stdout.write(summary)
        for warning in warnings:
            self.stdout.write(self.style.ERROR(warning))

    def watch(self, **options: Any) -> None:
        with stop_signals() as told_to_stop, self.screen(**options) as show:
            try:
                while True:
                    show(*_inspect())
                    if told_to_stop(options["watch"]):
                        break
            except BrokenPipeError:  # the reader has gone; Python's own flush at exit must not raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    @contextlib.contextmanager
    def screen(self, **options: Any) -> Iterator[Callable[[Rows, int, Sequence[str]], None]]:
        """Give a function that shows targets in place of the previous ones or, if that is not possible, below them."""
        if not self.stdout.isatty() or find_spec("rich") is None:
            yield self.show_below
            return
        from rich.console import Console, Group
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        def show(rows: Rows, waiting: int, faults: Sequence[str]) -> None:
            table = Table(box=None)
            header, *cells = _cells(rows) or [list(COLUMNS)]
            for name in header:
                table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True)
            for port, state, *others in cells:
                shown = [Text(text, "bold yellow" if text == NEVER else "") for text in others]
                table.add_row(port, Text(state, COLOURS[State(state)]), *shown)
            summary, *warnings = _summary(rows, waiting, faults)
            # A low terminal cuts off the end, so the summary comes first.
            top = Text(f"{strftime('%X')}  {summary}")
            live.update(Group(top, *(Text(warning, "bold red") for warning in warnings), table), refresh=True)

        console = Console(no_color=options["no_color"] or None, highlight=False)
        with Live(console=console, auto_refresh=False) as live:
            yield show

    def show_below(self, rows: Rows, waiting: int, faults: Sequence[str]) -> None:
        self.stdout.write(strftime("%X"))
        self.show(rows, waiting, faults)
        self.stdout.write("")
        self.stdout.flush()


def _inspect() -> tuple[Rows, int, list[str]]:
    """Return a row for each port, how many processes wait for one, and what is wrong with the settings."""
    ports = conf.PROMPORTS_PORT_RANGE
    with contextlib.closing(Loop()) as loop:
        found = loop.complete(probe.inspect(loop, conf.site, {conf.local_address: ports}))
    unserved = find_unserved(read_ledgers(), found)
    rows = [_row(seen, unserved.get(seen.port)) for seen in found]
    return rows, count_waiting(ports), [str(fault) for fault in find_faults(found)]


def _row(seen: Seen, unserved: str | None) -> dict[str, Any]:
    scraped = seen.scraped
    return {
        "port": seen.port,
        "state": seen.state,
        "role": seen.role,
        "pid": seen.pid,
        "command": seen.command or None,
        "uptime_seconds": seen.uptime,
        "series": seen.series,
        "scrape_seconds": seen.scrape_seconds,
        "scrapes": None if scraped is None else scraped._asdict(),
        "unserved": unserved,
    }


def _summary(rows: Rows, waiting: int, faults: Sequence[str]) -> Iterator[str]:
    """Yield the summary, then warnings."""
    states = Counter(row["state"] for row in rows)
    ports = [row["port"] for row in rows]
    workers = [row for row in rows if row["role"] == Role.WORKER]
    live = format_live(states[State.LIVE], states[State.LIVE] - len(workers))
    summary = [f"{live}, {states[State.FREE]} of {len(rows)} ports free in {format_ports(ports)}."]
    if never := sum(row["scrapes"] is not None and not row["scrapes"]["total"] for row in workers):
        summary.append(format_unscraped(never, len(workers), conf.PROMPORTS_ADDRESS))
    yield "\n".join(summary)
    if waiting:
        yield f"{format_waiting(waiting)}; widen PROMPORTS_PORT_RANGE."
    for reason in dict.fromkeys(row["unserved"] for row in rows if row["unserved"]):
        owed = [row["port"] for row in rows if row["unserved"] == reason]
        yield f"The last counts of {format_ports(owed)} may not have been scraped: {reason}."
    yield from faults


def _cells(rows: Rows) -> list[list[str]]:
    """Return the header and a row for each port that is not free; nothing if all are free."""
    cells = [list(COLUMNS)]
    for row in rows:
        if row["state"] == State.FREE:
            continue
        uptime, scrape = row["uptime_seconds"], row["scrape_seconds"]
        values = [
            row["port"],
            row["state"],
            row["role"],
            row["pid"],
            row["command"],
            None if uptime is None else format_duration(uptime),
            row["series"],
            None if scrape is None else f"{scrape * 1000:.1f} ms",
            None if row["scrapes"] is None else format_scraped(Scraped(**row["scrapes"])),
        ]
        cells.append(["-" if value is None else str(value) for value in values])
    return cells if len(cells) > 1 else []


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if name in RIGHT else text.ljust(width)
            for name, text, width in zip(COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]
