"""Serving: what this process serves on its ports, by the settings: routes, endpoint and heir are put together here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from django_promports import ports, presence
from django_promports.activity import Activity
from django_promports.binding import Binding
from django_promports.conf import conf
from django_promports.discovery import find_targets, survey, watch
from django_promports.endpoint import Endpoint
from django_promports.folders import identify
from django_promports.heir import Heir
from django_promports.own import own_metrics
from django_promports.probe import APPLICATION
from django_promports.routes import Routes
from django_promports.scrape.exposition import Exposition
from django_promports.scrapes import Scrapes
from django_promports.terms import Terms


def read_terms() -> Terms:
    """Return the current settings of a claim."""
    return Terms(
        conf.PROMPORTS_ADDRESS,
        conf.PROMPORTS_PORT_RANGE,
        conf.PROMPORTS_LEDGER_DIR,
        conf.no_ledger_dir,
        conf.PROMPORTS_SITE,
        read_first_key(),
        conf.former_sites,
        conf.former_folders,
    )


def make_endpoint(claim: ports.Claim, binding: Binding, *, claimed_at: float) -> tuple[Endpoint, Heir | None]:
    """Return the endpoint of a claimed port, and what it serves for ended processes if it has a ledger.

    claimed_at: in seconds of time.monotonic().
    """
    terms, scrapes, created = read_terms(), Scrapes(), conf.PROMPORTS_CREATED_SERIES

    def make_routes(
        port: int, binding: Binding, note_scrape: Callable[[float], None], role: str = "heir", **more: Any
    ) -> Routes:
        return Routes(
            exposition=Exposition(binding, created=created),
            about=_describe(port, role),
            find_targets=find_targets,
            survey=survey,
            read_token=conf.read_token,
            read_keys=conf.read_keys,
            host=conf.PROMPORTS_TARGET_HOST,
            scrapes=scrapes,
            note_scrape=note_scrape,
            **more,
        )

    activity = Activity(binding.registry, conf.metric_namespace)
    routes = make_routes(claim.port, binding, binding.note_scrape, "worker", activity=activity, claimed_at=claimed_at)
    endpoint = Endpoint(claim.listener, routes, tls=conf.server_tls())
    endpoint.run(partial(watch, port=claim.port, claimed_at=claimed_at))
    own_metrics().port.set(claim.port)
    own_metrics().waiting.set_function(lambda: presence.count_waiting(terms.ports))
    if terms.folder is None or binding.ledger is None:
        return endpoint, None
    heir = Heir(terms.folder, terms, endpoint, scrapes, make_routes)
    endpoint.run(heir.watch)
    return endpoint, heir


def read_first_key() -> bytes:
    """Return the first of the site's keys; empty if it has none, or if a wrong setting makes them unreadable."""
    try:
        return next(conf.read_keys(), b"")
    except Exception:  # the claim logs what is wrong
        return b""


def _describe(claimed: int, role: str) -> Any:
    about = {
        "role": role,
        "application": APPLICATION,
        "project": conf.project,
        "site": conf.PROMPORTS_SITE,
        "place": conf.place,
        "ledger_folder": identify(conf.PROMPORTS_LEDGER_DIR),
        "pid": os.getpid(),
        "port": claimed,
        "command": _command(),
    }
    began = time.monotonic()
    return lambda: {**about, "uptime_seconds": round(time.monotonic() - began, 3)}


def _command() -> str:
    """Return the command line up to its first option: what follows may be a secret."""
    program, *words = sys.argv or [sys.executable]
    path = Path(program)
    name = path.parent.name if path.name == "__main__.py" else path.name  # python -m gunicorn
    return " ".join([name, *takewhile(lambda word: not word.startswith("-"), words)])
