"""Settings of gunicorn. Nothing here is specific to metrics."""

from __future__ import annotations

wsgi_app = "demo_site.wsgi"
bind = "127.0.0.1:8000"
workers = 4
