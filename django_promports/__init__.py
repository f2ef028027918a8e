"""Prometheus metrics for Django sites that run as many processes: one process, one port.

Every worker of the site claims a port of PROMPORTS_PORT_RANGE and serves its own metrics
there from a thread, as soon as the app is in INSTALLED_APPS. `manage.py export_targets`
lists the ports for Prometheus. Processes that do not serve HTTP requests (a Celery pool
child, a gRPC server, a daemon) call start() themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from django_promports.worker import port, start, stop

__all__ = ["port", "start", "stop"]


def __getattr__(name: str) -> Any:
    # Imported on access, because worker needs Django. The modules that count, render and serve work without it, and
    # importing one of them imports this package first.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from django_promports import worker

    return getattr(worker, name)
