"""Real Django projects, made with the commands of their packages and measured as the README says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import ROOT
from tests.traffic import Asked

# The settings module of each project is site_settings. It imports the module of the project, and adds what a deployment
# needs and what the README asks for.
DEPLOYED = """
DEBUG = False
SECRET_KEY = "these projects keep no secrets"
ALLOWED_HOSTS = ["127.0.0.1"]
DATABASES["default"]["OPTIONS"] = {"timeout": 20, "transaction_mode": "IMMEDIATE"}

INSTALLED_APPS = [*INSTALLED_APPS, "django_prometheus", "django_promports"]
MIDDLEWARE = [
    "django_prometheus.middleware.PrometheusBeforeMiddleware",
    *MIDDLEWARE,
    "django_prometheus.middleware.PrometheusAfterMiddleware",
]
"""

# What oscar's documentation adds to the settings of a new project.
OSCAR = """
from oscar.defaults import *
from store.settings import *
from oscar import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "sorl.thumbnail"]
MIDDLEWARE += [
    "oscar.apps.basket.middleware.BasketMiddleware",
    "django.contrib.flatpages.middleware.FlatpageFallbackMiddleware",
]
TEMPLATES[0]["OPTIONS"]["context_processors"] += [
    "oscar.apps.search.context_processors.search_form",
    "oscar.apps.checkout.context_processors.checkout",
    "oscar.apps.communication.notifications.context_processors.notifications",
    "oscar.core.context_processors.metadata",
]
AUTHENTICATION_BACKENDS = ["oscar.apps.customer.auth_backends.EmailBackend"]
HAYSTACK_CONNECTIONS = {"default": {"ENGINE": "haystack.backends.simple_backend.SimpleEngine"}}
MEDIA_ROOT, MEDIA_URL = BASE_DIR / "media", "/media/"
ROOT_URLCONF = "store_urls"
SITE_ID = 1
"""
OSCAR_URLS = """
from django.apps import apps
from django.urls import include, path

urlpatterns = [
    path("i18n/", include("django.conf.urls.i18n")),
    path("", include(apps.get_app_config("oscar").urls[0])),
]
"""
OSCAR_BOOKS = """\
Book,Books > Novels,9780000000001,Emma,A novel.,Publisher,1,9.90,10
Book,Books > Novels,9780000000002,Persuasion,Another novel.,Publisher,2,8.90,10
"""

NINJA = """
from library.settings import *

INSTALLED_APPS += ["loans"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "library_urls"
"""
NINJA_URLS = """
import time

from django.urls import path
from loans.models import Loan
from ninja import ModelSchema, NinjaAPI

api = NinjaAPI()


class LoanOut(ModelSchema):
    class Meta:
        model = Loan
        fields = ["id", "title"]


@api.get("/loans", response=list[LoanOut])
def list_loans(request):
    return Loan.objects.order_by("-id")[:20]


@api.post("/loans", response=LoanOut)
def add_loan(request, title: str):
    return Loan.objects.create(title=title)


@api.get("/loans/number")
def count_loans(request):
    time.sleep(0.3)  # as a request to another service; old workers of a reload finish it while the new ones claim ports
    return Loan.objects.count()


urlpatterns = [path("api/", api.urls)]
"""
NINJA_MODELS = """
from django.db import models


class Loan(models.Model):
    title = models.CharField(max_length=100)
"""


@dataclass(frozen=True)
class Project:
    """A project and the requests that are sent to it, with the names of the views that answer them.

    start: the command that generates it. commands: management commands that prepare its database.
    """

    name: str
    start: Sequence[str]
    settings: str
    asked: Mapping[Asked, str]
    files: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[Sequence[str]] = ()

    def make(self, folder: Path) -> None:
        """Make the project in this folder, with its database."""
        folder.mkdir()
        run(folder, "-m", *self.start, self.name, str(folder))
        for name, text in {**self.files, "site_settings.py": self.settings + DEPLOYED}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        for command in self.commands:
            run(folder, "manage.py", *command)


MIGRATE = ["migrate", "--verbosity=0"]
PROJECTS = [
    Project(
        "bakery",
        ["wagtail.bin.wagtail", "start"],
        "from bakery.settings.base import *\n",
        {("GET", "/"): "wagtail_serve", ("GET", "/search/?query=home"): "search"},
        commands=[MIGRATE],
    ),
    Project(
        "store",
        ["django", "startproject"],
        OSCAR,
        {
            ("GET", "/catalogue/"): "catalogue:index",
            ("GET", "/catalogue/emma_1/"): "catalogue:detail",
            ("GET", "/basket/"): "basket:summary",
        },
        {"store_urls.py": OSCAR_URLS, "books.csv": OSCAR_BOOKS},
        [MIGRATE, ["oscar_import_catalogue", "books.csv"]],
    ),
    Project(
        "library",
        ["django", "startproject"],
        NINJA,
        {
            # The name of a path is that of its first operation.
            ("GET", "/api/loans"): "api-1.0.0:list_loans",
            ("POST", "/api/loans?title=Emma"): "api-1.0.0:list_loans",
            ("GET", "/api/loans/number"): "api-1.0.0:count_loans",
        },
        {"library_urls.py": NINJA_URLS, "loans/__init__.py": "", "loans/models.py": NINJA_MODELS},
        [["makemigrations", "loans", "--verbosity=0"], MIGRATE],
    ),
]


def run(folder: Path, *arguments: str) -> str:
    """Run Python in the folder of a project and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of the project in this folder."""
    return {"PYTHONPATH": f"{folder}:{ROOT}", "DJANGO_SETTINGS_MODULE": "site_settings", "PYTHONUNBUFFERED": "1"}
