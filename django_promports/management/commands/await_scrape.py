"""manage.py await_scrape: wait until everything that this site has counted was scraped, before it is stopped."""

from __future__ import annotations

import contextlib
import time
from argparse import ArgumentParser
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from django_promports.checks import TAG
from django_promports.discovery import find_unscraped
from django_promports.loop import Loop
from django_promports.owed import NOT_RUNNING
from django_promports.stopping import parse_seconds, stop_signals

# Seconds between two looks at the ledgers and the ports.
LOOK_SECONDS = 0.5
# If no process of the site runs for this time, waiting is useless: the site has ended, rather than one worker of it.
ENDED_SECONDS = 5.0


class Command(BaseCommand):
    help = (
        "Waits until everything that the processes of this site on this machine have counted before the command began "
        "was scraped completely, then exits with status 0. Run it before the site is stopped, after its traffic has "
        "stopped: in a preStop hook of Kubernetes, or in ExecStop of systemd. If that takes longer than --timeout, the "
        "exit status is 1, and the message names the ports. Without ledgers the processes are asked when they were "
        "scraped. If nothing was counted, because no process of the site ever ran, there is nothing to wait for."
    )
    requires_system_checks = (TAG,)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--timeout",
            type=parse_seconds,
            default=30.0,
            metavar="SECONDS",
            help="Wait for SECONDS at most, 30 by default. It should be more than two scrape intervals of Prometheus.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        began, deadline = time.time(), time.monotonic() + options["timeout"]
        shown: dict[int, str] = {}
        ended_at: float | None = None
        with stop_signals() as told_to_stop, contextlib.closing(Loop()) as loop:
            while True:
                try:
                    waiting = loop.complete(find_unscraped(loop, began))
                except ImproperlyConfigured as error:
                    raise CommandError(str(error)) from None
                if options["verbosity"] > 1 and waiting.keys() != shown.keys():
                    self.stderr.write(f"Not scraped yet: {_format(waiting) or 'nothing'}.", style_func=str)
                shown = waiting
                if not waiting:
                    return
                if set(waiting.values()) != {NOT_RUNNING}:
                    ended_at = None
                elif ended_at is None:
                    ended_at = time.monotonic()
                elif time.monotonic() - ended_at > ENDED_SECONDS:
                    raise CommandError(f"Not scraped: {_format(waiting)}.")
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise CommandError(f"Not scraped within {options['timeout']:g} s: {_format(waiting)}.")
                if told_to_stop(min(rest, LOOK_SECONDS)):
                    raise CommandError(f"Stopped by a signal. Not scraped yet: {_format(waiting)}.")


def _format(waiting: dict[int, str]) -> str:
    return ", ".join(f"{port} ({reason})" for port, reason in waiting.items())
