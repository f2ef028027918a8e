"""manage.py show_targets: what each port of the range does now."""

from __future__ import annotations

import contextlib
import json
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from django_promports import targets
from django_promports.checks import TAG
from django_promports.conf import conf
from django_promports.loop import Loop
from django_promports.ports import count_waiting, format_ports, format_waiting

COLUMNS = ("port", "state", "pid", "command", "uptime", "series", "scrape")
# Columns of numbers stand right.
RIGHT = {"port", "pid", "uptime", "series", "scrape"}


class Command(BaseCommand):
    help = (
        "Shows what each port of PROMPORTS_PORT_RANGE does now: live (a worker of this site answers), free, "
        "other (another program or site has it) or silent (connected, but no answer in time)."
    )
    requires_system_checks = (TAG,)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="For a machine: times in seconds, null where unknown.")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            ports = conf.PROMPORTS_PORT_RANGE
            with contextlib.closing(Loop()) as loop:
                rows = [
                    _row(seen) for seen in loop.complete(targets.look(loop, conf.site, {conf.local_address: ports}))
                ]
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from None
        waiting = count_waiting(ports)
        if options["json"]:
            self.stdout.write(json.dumps({"targets": rows, "waiting_processes": waiting}, indent=2))
            return
        shown = [row for row in rows if row["state"] != "free"]
        if shown:
            self.stdout.write("\n".join(_table(shown)))
        live = sum(row["state"] == "live" for row in rows)
        free = len(rows) - len(shown)
        self.stdout.write(f"{live} live, {free} of {len(rows)} ports free in {format_ports(ports)}.")
        if waiting:
            self.stdout.write(self.style.ERROR(f"{format_waiting(waiting)}; widen PROMPORTS_PORT_RANGE."))


def _row(seen: targets.Seen) -> dict[str, Any]:
    about, scrape = seen.answer.about, seen.scrape
    scraped = scrape is not None and scrape.state == "live"
    return {
        "port": seen.port,
        "state": seen.answer.state,
        "pid": about.get("pid"),
        "command": about.get("command"),
        "uptime_seconds": about.get("uptime_seconds"),
        "series": scrape.about["series"] if scrape and scraped else None,
        "scrape_seconds": round(scrape.seconds, 4) if scrape and scraped else None,
    }


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    cells = [list(COLUMNS)]
    for row in rows:
        uptime, scrape = row["uptime_seconds"], row["scrape_seconds"]
        values = [
            row["port"],
            row["state"],
            row["pid"],
            row["command"],
            None if uptime is None else _duration(uptime),
            row["series"],
            None if scrape is None else f"{scrape * 1000:.1f} ms",
        ]
        cells.append(["-" if value is None else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = [
            text.rjust(width) if name in RIGHT else text.ljust(width)
            for name, text, width in zip(COLUMNS, line, widths, strict=True)
        ]
        yield "  ".join(padded).rstrip()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    for amount, unit, smaller, smaller_unit in ((days, "d", hours, "h"), (hours, "h", minutes, "m")):
        if amount:
            return f"{amount} {unit} {smaller} {smaller_unit}"
    return f"{minutes} m {rest} s" if minutes else f"{rest} s"
