"""manage.py export_targets: the Prometheus target list of this site's workers."""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from django_promports import targets
from django_promports.checks import TAG
from django_promports.conf import conf
from django_promports.loop import Loop


class Command(BaseCommand):
    help = "Writes the Prometheus file_sd target list that covers every port of PROMPORTS_PORT_RANGE."
    requires_system_checks = (TAG,)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--output",
            "-o",
            type=Path,
            metavar="FILE",
            help="Write to FILE, which Prometheus never sees half written, instead of standard output.",
        )
        parser.add_argument(
            "--host",
            action="append",
            default=[],
            help="Host name or IP address of a target, instead of PROMPORTS_TARGET_HOST. Repeat it for several hosts: "
            "each has every port.",
        )
        parser.add_argument(
            "--label",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="Label of every target, added to PROMPORTS_TARGET_LABELS. Repeatable.",
        )
        parser.add_argument(
            "--worker-label",
            action="store_true",
            help="One target group per port, with a label `worker` that counts the ports from 0.",
        )
        parser.add_argument(
            "--live",
            action="store_true",
            help="Only the ports at which a worker of this site answers now: at the hosts given, or on this machine.",
        )
        parser.add_argument("--format", choices=["json", "yaml"], default="json", help="Default: json.")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            content = self.content(**options)
        except (ImproperlyConfigured, ValueError) as error:
            raise CommandError(str(error)) from None
        output: Path | None = options["output"]
        if output is None:
            for piece in content():
                self.stdout.write(piece.decode(), ending="")
            return
        try:
            written = targets.write_file(output, content)
        except OSError as error:
            raise CommandError(
                f"{output} could not be written: {error.strerror}. It must be a regular file, or new, in a folder that "
                "exists and is writable; nothing was changed."
            ) from None
        if options["verbosity"] > 0 and written:
            self.stderr.write(f"Wrote {output}.", style_func=str)  # no error
        elif options["verbosity"] > 1:
            self.stderr.write(f"{output} was up to date.", style_func=str)

    def content(self, **options: Any) -> Callable[[], Iterator[bytes]]:
        labels = {**conf.PROMPORTS_TARGET_LABELS, **dict(_parse_label(text) for text in options["label"])}
        if options["worker_label"] and "worker" in labels:
            raise ValueError("The label 'worker' is set already; rename it, or leave out --worker-label.")
        hosts = list(dict.fromkeys(_parse_host(host) for host in options["host"]))
        ports: Sequence[int] = conf.PROMPORTS_PORT_RANGE
        if options["live"]:
            with contextlib.closing(Loop()) as loop:
                asked = dict.fromkeys(hosts or [conf.local_address], ports)
                exported: Mapping[str, Sequence[int]] = loop.complete(targets.find_live(loop, conf.site, asked))
            if not hosts:
                exported = {conf.PROMPORTS_TARGET_HOST: exported[conf.local_address]}
        else:
            exported = dict.fromkeys(hosts or [conf.PROMPORTS_TARGET_HOST], ports)
        dump = targets.dump_yaml if options["format"] == "yaml" else targets.dump_json
        scheme, workers = conf.scheme, ports if options["worker_label"] else ()
        return lambda: dump(targets.target_groups(exported, labels=labels, ports=workers, scheme=scheme))


def _parse_label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--label {text!r} has no '='; write --label NAME=VALUE.")
    try:
        targets.check_label(name, value)
    except ValueError as error:
        raise ValueError(f"--label {text!r} cannot be used: {error}.") from None
    return name, value


def _parse_host(text: str) -> str:
    try:
        return targets.check_host(text)
    except ValueError as error:
        raise ValueError(f"--host cannot be used: {error}.") from None
