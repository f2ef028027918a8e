"""Discovery: this site's targets and workers on this machine, for the endpoint, the views and the commands."""

from __future__ import annotations

import time

from django_promports import probe, targets
from django_promports.conf import conf
from django_promports.loop import Loop, Steps
from django_promports.owed import find_unserved, read_folder
from django_promports.page.html import format_duration
from django_promports.page.overview import Overview, make_origin
from django_promports.presence import count_waiting
from django_promports.probe import State


def find_targets(loop: Loop) -> Steps[bytes]:
    """Ask every port of this machine and return the http_sd document of those at which a worker answers."""
    address = conf.local_address
    live = yield from probe.find_live(loop, conf.site, {address: conf.PROMPORTS_PORT_RANGE})
    exported = {conf.PROMPORTS_TARGET_HOST: live[address]}
    groups = targets.target_groups(exported, labels=conf.PROMPORTS_TARGET_LABELS, scheme=conf.scheme)
    return b"".join(targets.dump_json(groups))


def find_unscraped(loop: Loop, since: float) -> Steps[dict[int, str]]:
    """Return the ports of this machine with counts from before this time (time.time()) that were not scraped since.

    With each port comes the reason. The ledgers tell it; processes that count in memory are asked.
    """
    folder, address, ports = conf.PROMPORTS_LEDGER_DIR, conf.local_address, conf.PROMPORTS_PORT_RANGE
    asked_at = time.time()
    answers = yield from probe.ask_all(loop, conf.site, [(address, port) for port in ports])
    found = [probe.read(address, port, answer) for port, answer in zip(ports, answers, strict=True)]
    ledgers = read_folder(folder, ports, conf.project)
    unserved = find_unserved(ledgers, found)
    unscraped = {}
    for seen in found:
        status = ledgers[seen.port].status if seen.port in ledgers else None
        if status is not None and status.is_owed:
            scraped_at: float | None = status.scraped_at
        elif seen.is_worker and seen.scraped is not None:
            ago = seen.scraped.seconds_ago
            scraped_at = 0.0 if ago is None else asked_at - ago
        elif seen.port in unserved or seen.is_worker or (seen.state == State.SILENT and folder is None):
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
    return Overview(site.project, ports, workers, count_waiting(ports), origin, conf.PROMPORTS_ADDRESS)
