"""Processes that are not servers claim no port, create no file and print nothing, whatever they import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, Site, database, describe, gunicorn, listening_ports, manage, request, running, serving

pytestmark = pytest.mark.long

# Each imports django.test, and with it django.core.wsgi.
NEIGHBOURS = [
    "wagtail",
    "wagtail.users",
    "wagtail.images",
    "wagtail.documents",
    "wagtail.admin",
    "taggit",
    "modelcluster",
    "ninja",
    "debug_toolbar",
    "rest_framework",
    "rest_framework_simplejwt",
    "graphene_django",
    "viewflow",
    "oauth2_provider",
    "django_extensions",
]
# Additional apps of the demo site: none, a local one, or packages from PyPI in a separate environment.
SITES = [
    pytest.param([], id="demo"),
    pytest.param(["importing"], id="own-app"),
    pytest.param(NEIGHBOURS, id="packages", marks=pytest.mark.neighbours),
]
COMMANDS = {
    "check": [sys.executable, str(ROOT / "manage.py"), "check"],
    "migrate": [sys.executable, str(ROOT / "manage.py"), "migrate"],
    "shell": [sys.executable, str(ROOT / "manage.py"), "shell", "-c", "from demo_site.wsgi import application"],
    "test": [sys.executable, str(ROOT / "manage.py"), "test", "probe_tests"],
    "runtests": [sys.executable, "runtests.py"],
    "pytest-django": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "probe_tests.py", "early_tests.py"],
    "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:django", "plain_tests.py"],
    "cron": [sys.executable, "cron.py"],
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Write a project around the demo site, with settings `probe_site` and the additional apps of PROBE_APPS."""
    (tmp_path / "importing").mkdir()
    for name in ("__init__", "models"):
        (tmp_path / f"importing/{name}.py").write_text("import django.test.signals\n")
    (tmp_path / "importing/apps.py").write_text(
        "import django.test.signals\nfrom django.apps import AppConfig\n"
        "class Config(AppConfig):\n    name = 'importing'\n"
    )
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def environment(project: Path, apps: list[str], ports: range) -> dict[str, str]:
    return {
        "PYTHONPATH": f"{project}:{ROOT}",
        "DJANGO_SETTINGS_MODULE": "probe_site",
        "DEMO_PORT_RANGE": f"{ports[0]}-{ports[-2]}",
        "DEMO_DATABASE": str(project / "probe.sqlite3"),
        "PROBE_APPS": json.dumps(apps),
    }


@pytest.mark.parametrize("apps", SITES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_process_that_is_not_a_server_holds_no_port_makes_no_file_and_says_nothing(
    command: str, apps: list[str], free_ports: range, project: Path
) -> None:
    done = subprocess.run(
        COMMANDS[command],
        cwd=project,
        env={**os.environ, **environment(project, apps, free_ports)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    # Port 0 is used by the check of the address, and by a live server in a test.
    assert "BOUND [] THREADS ['MainThread']" in done.stderr, done.stderr
    assert "WSGI True" in done.stderr or not apps, "the apps are not what they are here for"
    assert "promports" not in done.stdout + done.stderr
    assert not (project / "ledgers").exists()


@pytest.mark.parametrize("apps", SITES)
@pytest.mark.parametrize(
    ("words", "ready"),
    [
        (["beat", "--pidfile=", "--schedule=beat", "--loglevel=info"], "beat: Starting"),
        (["worker", "--pool=solo", "--loglevel=info"], "ready."),
        (["worker", "--pool=prefork", "--concurrency=2", "--loglevel=info"], "ready."),
    ],
    ids=["beat", "worker solo", "worker prefork"],
)
@pytest.mark.neighbours
def test_celery_without_start_holds_no_port(
    words: list[str], ready: str, apps: list[str], free_ports: range, project: Path
) -> None:
    arguments = [sys.executable, "-m", "celery", f"--workdir={project}", "-A", "probe_celery", *words]
    with running(*arguments, log=project / "celery.log", **environment(project, apps, free_ports)) as child:
        child.wait_until(lambda: ready in child.output(), "Celery is ready")

        held = [port for pid in (child.pid, *child.children()) for port in listening_ports(pid)]

        assert not held
    assert "promports" not in child.output()
    assert not (project / "ledgers").exists()


@pytest.mark.parametrize("apps", SITES)
def test_a_test_run_beside_a_live_site_changes_no_live_counter(
    apps: list[str], free_ports: range, project: Path
) -> None:
    env = environment(project, apps, free_ports)
    (project / "probe_wsgi.py").write_text("from demo_site.wsgi import application\n")
    served = {**env, "DEMO_DATABASE": str(database(project))}
    with gunicorn(project, free_ports, "probe_wsgi", workers=1, **served) as site:
        site.wait_for_workers(1)
        assert [site.request() for _ in range(3)] == [200] * 3

        tests = manage("test", "many_tests", **env)
        # If the tests had held a port, the next worker would continue its counts.
        os.kill(site.child.pid, signal.SIGTTIN)
        site.wait_for_workers(2)

        assert tests.returncode == 0, tests.stderr
        assert "ANSWERED 1000" in tests.stderr
        assert site.total() == 3


@pytest.mark.parametrize("apps", SITES)
def test_a_command_on_a_site_that_is_down_finds_no_worker(apps: list[str], free_ports: range, project: Path) -> None:
    env = environment(project, apps, free_ports)

    shown = manage("show_targets", "--json", **env)
    checked = manage("export_targets", "--check", **env)

    assert {target["state"] for target in json.loads(shown.stdout)["targets"]} == {"free"}
    assert checked.returncode == 1
    assert "no worker is live" in checked.stderr


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
@pytest.mark.parametrize("where", ["gunicorn.conf.py", "wsgi.py"])
def test_a_server_that_sets_django_up_early_claims_before_its_first_request(
    where: str, preload: list[str], free_ports: range, project: Path
) -> None:
    """The call stack and the imported modules when the app is ready do not identify these servers."""
    early = "import django\ndjango.setup()\n"
    config, wsgi = project / "early.conf.py", project / "early_wsgi.py"
    config.write_text(early if where == "gunicorn.conf.py" else "")
    wsgi.write_text(f"{early if where == 'wsgi.py' else ''}from demo_site.wsgi import application\n")
    options = ["-c", str(config), "early_wsgi", *preload]

    with gunicorn(project, free_ports, *options, workers=4, **environment(project, [], free_ports)) as site:
        live = site.wait_for_workers()

        assert sorted(live) == list(free_ports[:4])
        assert set(live.values()) == set(site.child.children())


@pytest.mark.servers
@pytest.mark.parametrize("server", ["uvicorn", "hypercorn", "granian"])
def test_an_asgi_server_that_sets_django_up_early_claims_before_its_first_request(
    server: str, free_ports: range, project: Path
) -> None:
    (project / "early_asgi.py").write_text("import django\ndjango.setup()\nfrom demo_site.asgi import application\n")
    words = {
        "uvicorn": ["uvicorn", "--port", "{port}", "--workers", "2", "early_asgi:application"],
        "hypercorn": ["hypercorn", "-b", "127.0.0.1:{port}", "-w", "2", "early_asgi:application"],
        "granian": ["granian", "--interface", "asgi", "--port", "{port}", "--workers", "2", "early_asgi:application"],
    }[server]

    with serving(project, free_ports, *words, **environment(project, [], free_ports)) as site:
        assert sorted(site.wait_for_workers(2)) == list(free_ports[:2])
        site.wait_until_settled(2)  # granian's workers miss a SIGTERM while they start


@pytest.mark.neighbours
def test_the_parent_of_runserver_plus_builds_a_handler_and_holds_no_port(free_ports: range, project: Path) -> None:
    *metric_ports, site_port = free_ports
    env = {**environment(project, NEIGHBOURS, free_ports), "DEMO_DATABASE": str(database(project))}
    words = [sys.executable, "manage.py", "runserver_plus", "--insecure", f"127.0.0.1:{site_port}"]
    with running(*words, log=project / "runserver.log", **env) as child:
        site = Site(child, f"127.0.0.1:{site_port}", metric_ports)
        child.wait_until(lambda: site.request() == 200, "runserver_plus answers")

        about = child.wait_until(lambda: describe(metric_ports[0]), "the endpoint answers")

        assert about["pid"] in child.children()
        assert not listening_ports(child.pid) & set(metric_ports)
        assert not describe(metric_ports[1])


def test_a_cache_warmer_adds_nothing_to_the_live_counters(free_ports: range, project: Path) -> None:
    """Cache warmers and static site generators use the test client outside of tests."""
    env = environment(project, ["importing"], free_ports)
    with gunicorn(project, free_ports, workers=1, **{**env, "DEMO_DATABASE": str(database(project))}) as site:
        (port, _), *_ = site.wait_for_workers(1).items()
        assert request(f"http://{site.address}/") == 200

        warmed = subprocess.run(
            [sys.executable, "cron.py"],
            cwd=project,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        assert warmed.returncode == 0, warmed.stderr
        assert list(site.live()) == [port]
        assert site.total() == 1


PROBE_TESTS = """
import urllib.request
from django.core.mail import send_mail
from django.test import LiveServerTestCase, TestCase
from demo_site.wsgi import application

class Test(TestCase):
    def test_view(self):
        send_mail("subject", "text", "a@example.com", ["b@example.com"])
        assert self.client.get("/").status_code == 200

class LiveTest(LiveServerTestCase):
    def test_live_server(self):
        with urllib.request.urlopen(f"{self.live_server_url}/") as response:
            assert response.status == 200
"""

FILES = {
    # At exit a process prints whether django.core.wsgi was imported, which ports it bound, and its threads.
    "sitecustomize.py": """
import atexit, sys, threading

bound = set()

def hook(event, arguments):
    if event == "socket.bind" and isinstance(arguments[1], tuple):
        bound.add(arguments[1][1])

def report():
    threads = sorted(thread.name for thread in threading.enumerate())
    print("WSGI", "django.core.wsgi" in sys.modules, "BOUND", sorted(bound - {0}), "THREADS", threads, file=sys.stderr)

sys.addaudithook(hook)
atexit.register(report)
""",
    "probe_site.py": """
import json, os
from demo_site.settings import *

before = ["django.contrib.sessions", "django.contrib.messages", "django.contrib.staticfiles"]
INSTALLED_APPS = [*before, *json.loads(os.environ["PROBE_APPS"]), *INSTALLED_APPS]
STATIC_URL = "static/"
ROOT_URLCONF = "demo_site.urls"
EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
OAUTH2_PROVIDER_APPLICATION_MODEL = "oauth2_provider.Application"
GRAPHENE = {}
SILENCED_SYSTEM_CHECKS = ["debug_toolbar.W001", "debug_toolbar.W003", "wagtailadmin.W003", "fields.W344"]
""",
    "probe_tests.py": PROBE_TESTS,
    # pytest imports this before pytest-django sets the test environment up.
    "early_tests.py": """
from demo_site.asgi import application
from demo_site.wsgi import application as wsgi
from tests_of_handlers import ask

def test_handler(db):
    assert ask(wsgi) == "200 OK"
""",
    "tests_of_handlers.py": """
from wsgiref.util import setup_testing_defaults

def ask(application):
    statuses, environ = [], {}
    setup_testing_defaults(environ)
    application(environ, lambda status, headers: statuses.append(status))
    return statuses[0]
""",
    "plain_tests.py": """
import django
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from django.test import Client
from demo_site.wsgi import application
from tests_of_handlers import ask

def test_view():
    assert Client(SERVER_NAME="localhost").get("/").status_code == 200
    assert ask(application) == "200 OK"
""",
    "pytest.ini": "[pytest]\npython_files = *_tests.py\n",
    "many_tests.py": """
import sys
from django.test import TestCase

class Test(TestCase):
    def test_view(self):
        answered = sum(self.client.get("/").status_code == 200 for _ in range(1000))
        print("ANSWERED", answered, file=sys.stderr)
""",
    # As Django documents it for reusable apps:
    # https://docs.djangoproject.com/en/5.2/topics/testing/advanced/#using-the-django-test-runner-to-test-reusable-applications
    "runtests.py": """
import sys
import django
from django.conf import settings
from django.test.utils import get_runner

django.setup()
sys.exit(bool(get_runner(settings)().run_tests(["probe_tests"])))
""",
    "cron.py": """
import django
django.setup()
from django.test import Client
Client(SERVER_NAME="localhost", raise_request_exception=False).get("/")
import django_promports
assert django_promports.port() is None
""",
    "probe_celery.py": """
from celery import Celery
app = Celery("probe", broker="memory://")
""",
}
