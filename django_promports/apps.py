"""The Django app: registers the system checks, and has worker.py find out whether this process is a server."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks as django_checks

from django_promports import checks, worker


class PromportsConfig(AppConfig):
    name = "django_promports"
    verbose_name = "Metrics ports"

    def ready(self) -> None:
        django_checks.register(checks.check_settings, checks.TAG)
        django_checks.register(checks.check_requests, checks.TAG)
        django_checks.register(checks.check_deployment, checks.TAG, deploy=True)
        worker.on_ready()
