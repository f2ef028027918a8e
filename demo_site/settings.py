"""Settings of the demo, a tea shop. Tests and concurrent runs override some of them with environment variables."""

from __future__ import annotations

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent

DEBUG = bool(os.environ.get("DEMO_DEBUG"))
SECRET_KEY = "the demo keeps no secrets"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]
ROOT_URLCONF = "demo_site.urls"
WSGI_APPLICATION = "demo_site.wsgi.application"
ASGI_APPLICATION = "demo_site.asgi.application"
TIME_ZONE = "UTC"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# The page with the workers requires a staff user, so users must be able to log in.
AUTH_APPS = ["django.contrib.auth", "django.contrib.contenttypes"]
AUTH_MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
LOGIN_URL = "login"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "DIRS": [BASE_DIR / "templates"]}]

# The two settings that django_promports needs.
INSTALLED_APPS = [
    "django_prometheus",
    "django_promports",
    "demo_site",
    *AUTH_APPS,
]
MIDDLEWARE = [
    "django_prometheus.middleware.PrometheusBeforeMiddleware",
    "django.middleware.common.CommonMiddleware",
    *AUTH_MIDDLEWARE,
    "django_prometheus.middleware.PrometheusAfterMiddleware",
]

PROMPORTS_ADDRESS = os.environ.get("DEMO_ADDRESS", "127.0.0.1")
if "DEMO_LEDGER_DIR" in os.environ:
    PROMPORTS_LEDGER_DIR = os.environ["DEMO_LEDGER_DIR"] or None
PROMPORTS_BEARER_TOKEN_FILE = os.environ.get("DEMO_TOKEN_FILE")
PROMPORTS_PORT_RANGE = os.environ.get("DEMO_PORT_RANGE", "19100-19131")

# django-prometheus' backends measure queries and count cache hits.
DATABASES = {
    "default": {
        "ENGINE": "django_prometheus.db.backends.sqlite3",
        "NAME": os.environ.get("DEMO_DATABASE", BASE_DIR / "demo.sqlite3"),
        "OPTIONS": {"timeout": 20, "transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=wal"},
    }
}
CACHES = {"default": {"BACKEND": "django_prometheus.cache.backends.locmem.LocMemCache"}}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"short": {"format": "%(levelname)s %(name)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "short"}},
    "loggers": {"django_promports": {"handlers": ["console"], "level": "INFO"}},
}
