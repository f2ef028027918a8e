"""Metrics of Django sites that run as many processes: one process, one port.

Every worker of the site claims a port out of PROMPORTS_PORT_RANGE and serves its own
Prometheus metrics there from a thread; `manage.py export_targets` lists the ports for
Prometheus. Adding the app to INSTALLED_APPS does all of that. Processes that serve no
HTTP requests (a Celery pool child, a gRPC server, a daemon) call start() themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from django_promports.worker import port, start, stop

__all__ = ["port", "start", "stop"]


def __getattr__(name: str) -> Any:
    # Found when asked for: the modules that count, render and serve need no Django, and import this one too.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from django_promports import worker

    return getattr(worker, name)
