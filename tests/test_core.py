"""The core counts, renders and serves when Django cannot be imported."""

from __future__ import annotations

from pathlib import Path

from django_promports.ledger import Ledger
from tests.commands import run_python
from tests.servers import ROOT

# Modules that read the settings, implement Django's hooks, or are commands.
DJANGO_FACE = {"apps", "checks", "conf", "discovery", "serving", "urls", "views", "worker"}
WITHOUT_DJANGO = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("django", "django_prometheus"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
SERVE = """
import urllib.request
from importlib import import_module
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

folder, first, last, *modules = sys.argv[1:]
for module in modules:
    import_module(f"django_promports.{module}")

from django_promports import ports
from django_promports.activity import Activity
from django_promports.endpoint import Endpoint
from django_promports.routes import Routes
from django_promports.scrape.exposition import Exposition
from django_promports.ledger import Ledger
from django_promports.binding import Binding

def serve(count):
    registry = CollectorRegistry()
    claim = ports.claim("127.0.0.1", range(int(first), int(last) + 1))
    binding = Binding(registry)
    binding.open(Ledger(Path(folder, f"{claim.port}.ledger"), "a site"))
    Counter("pieces", "Work done.", ["who"], registry=registry).labels("me").inc(count)
    routes = Routes(
        about=lambda: {},
        find_targets=lambda loop: iter(()),
        survey=lambda loop: iter(()),
        exposition=Exposition(binding),
        activity=Activity(registry),
    )
    endpoint = Endpoint(claim.listener, routes)
    endpoint.start()
    with urllib.request.urlopen(f"http://127.0.0.1:{claim.port}/metrics") as response:
        lines = response.read().decode().splitlines()
    endpoint.pause()
    binding.close()
    endpoint.stop()
    return next(line for line in lines if line.startswith("pieces_total"))

print(serve(3))
print(serve(4))
assert not any(name.partition(".")[0] == "django" for name in sys.modules)
"""


def test_the_core_counts_renders_and_serves_a_registry_where_django_cannot_be_imported(
    free_ports: range, tmp_path: Path
) -> None:
    package = ROOT / "django_promports"
    files = [*package.glob("*.py"), *(path for sub in ("page", "scrape") for path in package.glob(f"{sub}/*.py"))]
    names = {".".join(path.relative_to(package).with_suffix("").parts) for path in files}
    core = sorted(name for name in names if name not in {*DJANGO_FACE, "__init__"} and not name.endswith("__init__"))

    done = run_python(WITHOUT_DJANGO + SERVE, str(tmp_path), str(free_ports[0]), str(free_ports[-1]), *core)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ['pieces_total{who="me"} 3.0', 'pieces_total{who="me"} 7.0']


def test_what_needs_django_says_so_when_it_is_missing() -> None:
    done = run_python(f"{WITHOUT_DJANGO}\nimport django_promports\ndjango_promports.start()")

    assert "ModuleNotFoundError: No module named 'django" in done.stderr


READ = """
import sys
sys.modules["prometheus_client"] = None  # importing it fails

from pathlib import Path
from django_promports.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]), "a site")
for family in ledger.families.values():
    print(family.record.type, len(family.read(family.series.values())) // 8)
ledger.close()
"""


def test_a_ledger_is_read_where_prometheus_client_cannot_be_imported(tmp_path: Path) -> None:
    path = tmp_path / "1.ledger"
    ledger = Ledger(path, "a site")
    for type_, bounds in (("counter", ()), ("summary", ()), ("histogram", ("1.0", "+Inf"))):
        ledger.add_series(ledger.add_family(type_, type_, "", "", (), bounds), (), 1.0)
    ledger.close()

    done = run_python(READ, str(path))

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["counter 1", "summary 2", "histogram 3"]
