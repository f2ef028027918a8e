"""manage.py export_targets: the Prometheus target list of this site's workers."""

from __future__ import annotations

import contextlib
import ipaddress
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from django_promports import probe, targets
from django_promports.checks import TAG
from django_promports.conf import conf
from django_promports.discovery import find_faults, look
from django_promports.kubernetes import dump_kubernetes
from django_promports.loop import Loop
from django_promports.presence import count_waiting, format_waiting
from django_promports.probe import Role, State
from django_promports.stopping import parse_seconds, stop_signals


class Command(BaseCommand):
    help = "Writes the Prometheus file_sd target list that covers every port of PROMPORTS_PORT_RANGE."
    requires_system_checks = (TAG,)
    # By host, the ports that were live when --watch looked last.
    live: Mapping[str, Sequence[int]] = {}

    def add_arguments(self, parser: ArgumentParser) -> None:
        destination = parser.add_mutually_exclusive_group()
        destination.add_argument(
            "--check",
            action="store_true",
            help="Write no list, but query every target (on this machine, if no host is given) and report which ones "
            "answer. The exit status is 0 if each host has a live worker and all workers can be scraped. It is 1 if "
            "another program or site holds one of the ports, an endpoint answers too late or not correctly, or a "
            "process waits for a port. Free ports are normal.",
        )
        destination.add_argument(
            "--output",
            "-o",
            type=Path,
            metavar="FILE",
            help="Write to FILE, which is replaced atomically, instead of standard output.",
        )
        parser.add_argument(
            "--host",
            action="append",
            default=[],
            help="Host name or IP address of the targets, instead of PROMPORTS_TARGET_HOST. Repeatable; each host has "
            "every port.",
        )
        parser.add_argument(
            "--hosts-file",
            metavar="FILE",
            help="More hosts, one per line of FILE, or of standard input if FILE is -. Blank lines and comments (#) "
            "are ignored. If a name is invalid or repeated, nothing is written.",
        )
        parser.add_argument(
            "--label",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="A label of every target, added to PROMPORTS_TARGET_LABELS. Repeatable.",
        )
        parser.add_argument(
            "--worker-label",
            action="store_true",
            help="One target group per port with a label `worker`, 0 for the first port.",
        )
        parser.add_argument(
            "--live",
            action="store_true",
            help="List only ports at which a worker of this site answers now, on the given hosts or on this machine.",
        )
        parser.add_argument(
            "--watch",
            type=parse_seconds,
            metavar="SECONDS",
            help="Keep --output current with the live ports: query them every SECONDS until SIGTERM or Ctrl-C. An "
            "error at the start ends the command; a later one is reported once, the file stays as it is, and the "
            "command tries again. A worker that answers too late stays in the file, so that its scrapes fail visibly.",
        )
        parser.add_argument(
            "--format",
            choices=["json", "yaml", "kubernetes"],
            default="json",
            help="Default: json. kubernetes: the named ports of a container, and a PodMonitor that scrapes them.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        watch = options["watch"] is not None
        if watch and options["output"] is None:
            raise CommandError("--watch keeps a file current; set it with --output FILE.")
        options["live"] = options["live"] or watch
        if options["format"] == "kubernetes" and (options["host"] or options["hosts_file"] or options["live"]):
            raise CommandError(
                "--format kubernetes describes every pod; leave out --host, --hosts-file, --live, --watch."
            )
        with _said_to_the_user():
            options["hosts"] = _hosts(**options)
        run = self.check_targets if options["check"] else self.watch if watch else self.write
        if not options["hosts"] and not options["check"] and options["format"] != "kubernetes":
            self.warn(live=options["live"])
        run(**options)

    def warn(self, *, live: bool) -> None:
        """Print what is wrong with the settings, as seen from what runs now. live: other sites are not in the list."""
        # The system checks report settings that cannot be used.
        with contextlib.suppress(ImproperlyConfigured), contextlib.closing(Loop()) as loop:
            for fault in find_faults(loop.complete(look(loop)), rivals=not live):
                self.stderr.write(str(fault))

    def watch(self, **options: Any) -> None:
        trouble = ""
        with stop_signals() as told_to_stop:
            self.write(**options)
            while not told_to_stop(options["watch"]):
                try:
                    self.write(**options)
                except CommandError as error:
                    if str(error) != trouble:
                        trouble = str(error)
                        self.stderr.write(trouble)
                else:
                    if trouble:
                        trouble = ""
                        self.stderr.write(f"{options['output']} is kept current again.", style_func=str)

    def write(self, **options: Any) -> None:
        with _said_to_the_user():
            content = self.content(**options)
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
            self.stderr.write(f"Wrote {output}.", style_func=str)  # without the style of an error
        elif options["verbosity"] > 1:
            self.stderr.write(f"{output} was up to date.", style_func=str)

    def check_targets(self, **options: Any) -> None:
        with _said_to_the_user(), contextlib.closing(Loop()) as loop:
            hosts, ports = options["hosts"], conf.PROMPORTS_PORT_RANGE
            asked = dict.fromkeys(hosts or [conf.local_address], ports)
            found = loop.complete(probe.inspect(loop, conf.site, asked))
        idle, faults = dict.fromkeys(asked), 0
        for seen in found:
            pid = f"pid {seen.pid}" if seen.state == State.LIVE else ""
            role = "with the last counts of a worker that has ended" if seen.role == Role.HEIR else ""
            words = ", ".join(filter(None, [" ".join(filter(None, [pid, role])), seen.reason]))
            self.stdout.write(f"{targets.format_target(seen.host, seen.port)}  {seen.state:6}  {words}".rstrip())
            faults += bool(seen.reason)
            if seen.is_worker:
                idle.pop(seen.host, None)
        wrong = [f"{faults} of {len(found)} ports cannot be scraped"] if faults else []
        if idle:
            wrong.append(f"no worker is live at {', '.join(idle)}")
        if not hosts and (waiting := count_waiting(ports)):
            wrong.append(format_waiting(waiting))
        for fault in [] if hosts else find_faults(found):
            self.stderr.write(str(fault))
        if wrong:
            raise CommandError(f"Check failed: {'; '.join(wrong)}.")

    def content(self, **options: Any) -> Callable[[], Iterator[bytes]]:
        labels = {**conf.PROMPORTS_TARGET_LABELS, **dict(_parse_label(text) for text in options["label"])}
        if options["worker_label"] and "worker" in labels:
            raise ValueError("The label 'worker' is already set; rename it, or leave out --worker-label.")
        if options["format"] == "kubernetes":
            if ipaddress.ip_address(conf.PROMPORTS_ADDRESS).is_loopback:
                self.stderr.write("PROMPORTS_ADDRESS is a loopback address: it cannot be reached from outside the pod.")
            return partial(
                dump_kubernetes,
                conf.slug,
                conf.PROMPORTS_PORT_RANGE,
                labels=labels,
                worker=options["worker_label"],
                scheme=conf.scheme,
                secret=conf.PROMPORTS_BEARER_TOKEN_FILE is not None,
            )
        hosts, ports = options["hosts"], conf.PROMPORTS_PORT_RANGE
        exported: Mapping[str, Sequence[int]] = dict.fromkeys(hosts or [conf.PROMPORTS_TARGET_HOST], ports)
        if options["live"]:
            asked = dict.fromkeys(hosts or [conf.local_address], ports)
            with contextlib.closing(Loop()) as loop:
                self.live = loop.complete(probe.find_live(loop, conf.site, asked, self.live))
            exported = dict(zip(exported, self.live.values(), strict=True))
        dump = targets.dump_yaml if options["format"] == "yaml" else targets.dump_json
        scheme, workers = conf.scheme, ports if options["worker_label"] else ()
        return lambda: dump(targets.target_groups(exported, labels=labels, ports=workers, scheme=scheme))


@contextlib.contextmanager
def _said_to_the_user() -> Iterator[None]:
    try:
        yield
    except (ImproperlyConfigured, ValueError) as error:
        raise CommandError(str(error)) from None


def _hosts(**options: Any) -> list[str]:
    """Return the hosts of the command line and of the file, each once."""
    hosts = [_parse_host(host) for host in options["host"]]
    name = options["hosts_file"]
    if name is not None:
        try:
            # Bytes that are not UTF-8 are not a host name either; parse_hosts() reports them with their line.
            with open(
                0 if name == "-" else name, encoding="utf-8-sig", errors="backslashreplace", closefd=name != "-"
            ) as lines:
                hosts += targets.parse_hosts(lines)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"--hosts-file {name} cannot be used:\n{reason}") from None
    return list(dict.fromkeys(hosts))


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
