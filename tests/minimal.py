"""A site with only django_promports: no database file, no metrics, and django-prometheus on request."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.servers import ROOT, Site, serving

SETTINGS = """
import os
from django.http import HttpResponse
from django.urls import path

SECRET_KEY = "a minimal site keeps no secrets"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "minimal"
WSGI_APPLICATION = "minimal_wsgi.application"
INSTALLED_APPS = ["django_promports"]
MIDDLEWARE = []
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
USE_TZ = True
PROMPORTS_PORT_RANGE = os.environ.get("DEMO_PORT_RANGE", "19100-19131")
if "MINIMAL_LEDGER_DIR" in os.environ:
    PROMPORTS_LEDGER_DIR = os.environ["MINIMAL_LEDGER_DIR"] or None
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"short": {"format": "%(levelname)s %(name)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "short"}},
    "loggers": {"django_promports": {"handlers": ["console"], "level": "INFO"}},
}
urlpatterns = [path("", lambda request: HttpResponse())]
"""
# The same site with django-prometheus.
COUNTED = """
from minimal import *

INSTALLED_APPS += ["django_prometheus"]
MIDDLEWARE = [
    "django_prometheus.middleware.PrometheusBeforeMiddleware",
    "django_prometheus.middleware.PrometheusAfterMiddleware",
]
"""
WSGI = """
from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
"""
TESTS = """
from django.test import SimpleTestCase

class Test(SimpleTestCase):
    def test_view(self):
        assert self.client.get("/").status_code == 200
"""


def write_site(folder: Path, *, counted: bool = False) -> dict[str, str]:
    """Write the site to the folder; return the environment that it needs. counted: with django-prometheus."""
    (folder / "minimal.py").write_text(SETTINGS)
    (folder / "counted.py").write_text(COUNTED)
    (folder / "minimal_wsgi.py").write_text(WSGI)
    (folder / "minimal_tests.py").write_text(TESTS)
    module = "counted" if counted else "minimal"
    return {"PYTHONPATH": f"{folder}:{ROOT}", "DJANGO_SETTINGS_MODULE": module, "PYTHONUNBUFFERED": "1"}


def django_admin(*arguments: str, wrapper: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run a management command of the site."""
    return subprocess.run(
        [*wrapper, sys.executable, "-m", "django", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def serve_site(
    tmp_path: Path, ports: Sequence[int], *options: str, wrapper: Sequence[str] = (), **env: str
) -> contextlib.AbstractContextManager[Site]:
    """Run gunicorn on the site with two workers. wrapper: the start of a command line that runs another."""
    words = [*wrapper, sys.executable, "-m", "gunicorn", "--no-control-socket", "-w", "2", "-b", "127.0.0.1:{port}"]
    words += ["--graceful-timeout", "15"]  # as in servers.gunicorn()
    return serving(tmp_path, ports, *words, *options, "minimal_wsgi", **env)
