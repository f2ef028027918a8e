"""Discovery: this site's targets and workers on this machine, for the endpoint, the views and the commands."""

from __future__ import annotations

from django_promports import probe, targets
from django_promports.conf import conf
from django_promports.loop import Loop, Steps
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


def survey(loop: Loop) -> Steps[Overview]:
    """Ask every port of this machine what it does, for the page."""
    site, ports = conf.site, conf.PROMPORTS_PORT_RANGE
    # If the endpoints require a token, a browser does not have it, and the links would fail.
    guarded = conf.PROMPORTS_BEARER_TOKEN_FILE is not None
    origin = None if guarded else make_origin(conf.scheme, conf.PROMPORTS_TARGET_HOST)
    found = yield from probe.survey(loop, site, conf.local_address, ports)
    workers = [seen for seen in found if seen.state != State.FREE]
    return Overview(site.project, ports, workers, count_waiting(ports), origin, conf.PROMPORTS_ADDRESS)
