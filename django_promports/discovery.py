"""Discovery: this site's targets and workers on this machine, for the endpoint, the views and the commands."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from django_promports import probe, targets
from django_promports.conf import conf
from django_promports.loop import Loop, Steps
from django_promports.neighbours import Fault, find_other_folders, find_other_places, find_rivals
from django_promports.owed import Resting, find_unserved, read_folder
from django_promports.page.html import format_duration
from django_promports.page.overview import Overview, make_origin
from django_promports.presence import count_waiting
from django_promports.probe import Seen, State

logger = logging.getLogger("django_promports")

# Seconds after which no worker of a former release should run any more: a rolling deployment is over.
DEPLOYMENT_SECONDS = 600.0


def find_targets(loop: Loop) -> Steps[bytes]:
    """Ask every port of this machine and return the http_sd document of those at which a worker answers."""
    address = conf.local_address
    live = yield from probe.find_live(loop, conf.site, {address: conf.PROMPORTS_PORT_RANGE})
    exported = {conf.PROMPORTS_TARGET_HOST: live[address]}
    groups = targets.target_groups(exported, labels=conf.PROMPORTS_TARGET_LABELS, scheme=conf.scheme)
    return b"".join(targets.dump_json(groups))


def read_ledgers() -> dict[int, Resting]:
    """Return what the ledger folder tells of each port of the range."""
    sites = conf.PROMPORTS_SITE, *conf.former_sites
    return read_folder(conf.PROMPORTS_LEDGER_DIR, conf.PROMPORTS_PORT_RANGE, sites)


def find_unscraped(loop: Loop, since: float) -> Steps[dict[int, str]]:
    """Return the ports of this machine with counts from before this time (time.time()) that were not scraped since.

    With each port comes the reason. The ledgers tell it; processes that count in memory are asked.
    """
    asked_at = time.time()
    found = yield from look(loop)
    ledgers, has_no_folder = read_ledgers(), conf.PROMPORTS_LEDGER_DIR is None
    unserved = find_unserved(ledgers, found)
    unscraped = {}
    for seen in found:
        status = ledgers[seen.port].status if seen.port in ledgers else None
        if status is not None and status.is_owed:
            scraped_at: float | None = status.scraped_at
        elif seen.is_worker and seen.scraped is not None:
            ago = seen.scraped.seconds_ago
            scraped_at = 0.0 if ago is None else asked_at - ago
        elif seen.port in unserved or seen.is_worker or (seen.state == State.SILENT and has_no_folder):
            scraped_at = None
        else:
            continue
        if scraped_at is None or scraped_at < since:
            unscraped[seen.port] = (
                unserved.get(seen.port)
                or _format_age(scraped_at)
                or seen.reason
                or "it does not tell when it was scraped"
            )
    return unscraped


def _format_age(scraped_at: float | None) -> str:
    if not scraped_at:
        return "never scraped" if scraped_at is not None else ""
    return f"last scraped {format_duration(max(time.time() - scraped_at, 0))} ago"


def survey(loop: Loop) -> Steps[Overview]:
    """Ask every port of this machine what it does, for the page."""
    site, ports = conf.site, conf.PROMPORTS_PORT_RANGE
    # If the endpoints require a token, a browser does not have it, and the links would fail.
    guarded = conf.PROMPORTS_BEARER_TOKEN_FILE is not None
    origin = None if guarded else make_origin(conf.scheme, conf.PROMPORTS_TARGET_HOST)
    found = yield from probe.survey(loop, site, conf.local_address, ports)
    workers = [seen for seen in found if seen.state != State.FREE]
    return Overview(conf.project, ports, workers, count_waiting(ports), origin, conf.PROMPORTS_ADDRESS)


def look(loop: Loop) -> Steps[list[Seen]]:
    """Ask every port of this machine what it is."""
    return (yield from probe.look(loop, conf.site, conf.local_address, conf.PROMPORTS_PORT_RANGE))


def find_faults(found: Sequence[Seen], *, rivals: bool = True) -> list[Fault]:
    """Return what is wrong with the settings, as seen from what was found at the ports of this machine.

    rivals: whether another site in the range matters.
    """
    return [
        *(find_rivals(found, conf.project, conf.place) if rivals else ()),
        *find_other_places(found, conf.place),
        *find_other_folders(found, conf.PROMPORTS_LEDGER_DIR),
    ]


def watch(loop: Loop, *, port: int, claimed_at: float) -> Steps[None]:
    """Log once after the claim if another site has ports of the range, and later if this one runs in two places.

    Of the workers that run from one place only the oldest does so: most new workers ask one port.
    """
    logged: set[Fault] = set()
    for rest in (0.0, DEPLOYMENT_SECONDS):
        yield from loop.sleep(rest)
        try:
            found = yield from _look_at_others(loop, port, claimed_at)
            faults = [*find_rivals(found, conf.project, conf.place)]
            if rest:
                faults += find_other_places(found, conf.place)
            for fault in faults:
                if fault not in logged:
                    logger.warning("%s", fault)
            logged.update(faults)
        except Exception:
            logger.debug("Could not look at the other ports of the range.", exc_info=True)


def _look_at_others(loop: Loop, own: int, claimed_at: float) -> Steps[list[Seen]]:
    """Ask the other ports, nearest first; return nothing if an older worker of this place is among them."""
    site, address, place, found = conf.site, conf.local_address, conf.place, []
    others = [port for port in conf.PROMPORTS_PORT_RANGE if port != own]
    for port in sorted(others, key=lambda port: abs(port - own)):
        (seen,) = yield from probe.look(loop, site, address, [port])
        is_sibling = seen.state == State.LIVE and seen.place == place
        if is_sibling and (seen.uptime or 0.0) > time.monotonic() - claimed_at:
            return []
        found.append(seen)
    return sorted(found, key=lambda seen: seen.port)
