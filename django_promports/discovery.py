"""Discovery: this site's targets on this machine, for the endpoint, the site's own views and the commands."""

from __future__ import annotations

from django_promports import targets
from django_promports.conf import conf
from django_promports.loop import Loop, Steps
from django_promports.page import look as ports_seen


def find_targets(loop: Loop) -> Steps[bytes]:
    """Ask every port of this machine and return the http_sd document of those at which a worker answers."""
    address = conf.local_address
    live = yield from targets.find_live(loop, conf.site, {address: conf.PROMPORTS_PORT_RANGE})
    exported = {conf.PROMPORTS_TARGET_HOST: live[address]}
    groups = targets.target_groups(exported, labels=conf.PROMPORTS_TARGET_LABELS, scheme=conf.scheme)
    return b"".join(targets.dump_json(groups))


def look(loop: Loop) -> Steps[ports_seen.Look]:
    """Ask every port of this machine what it does, for the page."""
    # Where there is a token no browser has it, and links would lead nowhere.
    guarded = conf.PROMPORTS_BEARER_TOKEN_FILE is not None
    origin = None if guarded else ports_seen.make_origin(conf.scheme, conf.PROMPORTS_TARGET_HOST)
    return (yield from ports_seen.look(loop, conf.site, conf.local_address, conf.PROMPORTS_PORT_RANGE, origin))
