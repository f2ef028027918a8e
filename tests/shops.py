"""Sites of which several have the same settings module, config.settings, as half of all projects do."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from tests.minimal import serve_site, write_site
from tests.servers import Site

SETTINGS = """
import os
from minimal import *

SECRET_KEY = {secret_key!r}
BASE_DIR = {folder!r}
ROOT_URLCONF = "config.urls"
exec(os.environ.get("SHOP_SETTINGS", ""))
"""
URLS = """
from django.http import HttpResponse
from django.urls import path
from prometheus_client import Counter

ORDERS = Counter("shop_{name}_orders_total", "Orders.")

def order(request):
    ORDERS.inc()
    return HttpResponse()

urlpatterns = [path("", order)]
"""


class Shop:
    """One of these sites, in a folder of its own. Its default ledger folder is in `runtime`."""

    def __init__(self, tmp_path: Path, name: str, secret_key: str = "", runtime: Path | None = None) -> None:
        self.folder, self.counter = tmp_path / name, f"shop_{name}_orders_total"
        self.runtime = runtime or tmp_path / "run"
        self.temporary = tmp_path / "tmp"
        (self.folder / "config").mkdir(parents=True)
        for folder in (self.runtime, self.temporary):
            folder.mkdir(mode=0o700, exist_ok=True)
        self.env = write_site(self.folder) | {
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "RUNTIME_DIRECTORY": f"{self.runtime}:/nonexistent",
            "TMPDIR": str(self.temporary),
        }
        settings = SETTINGS.format(secret_key=secret_key or f"the key of {name}", folder=str(self.folder))
        (self.folder / "config" / "settings.py").write_text(settings)
        (self.folder / "config" / "urls.py").write_text(URLS.format(name=name))
        (self.folder / "demo.sqlite3").touch()  # servers.serving() makes one, which these sites do not use

    def serve(
        self, ports: Sequence[int], own_port: int, *options: str, workers: int = 1, **env: str
    ) -> contextlib.AbstractContextManager[Site]:
        return serve_site(self.folder, [*ports, own_port], *options, "-w", str(workers), **{**self.env, **env})
