"""If no folder is writable, every command works, and workers count in memory and log it once.

This is the case in a container with readOnlyRootFilesystem. In a new mount namespace the whole file system is
read-only, also for root. If namespaces are not permitted, a sitecustomize.py raises the errors that the kernel would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.minimal import django_admin, serve_site, write_site
from tests.servers import Site, scrape, send_requests

pytestmark = pytest.mark.once

# Everything except separate mounts, like /proc, and one folder in /dev/shm if it is to be writable. User names are
# unknown, too.
NAMESPACE = """
if [ "{writable}" ]; then mount --bind "{writable}" "{writable}"; fi
for folder in /tmp /var/tmp /usr/tmp "$PWD"; do
    if [ -d "$folder" ]; then mount --bind "$folder" "$folder"; mount -o remount,bind,ro "$folder"; fi
done
mount -o remount,bind,ro /dev/shm
mount -o remount,bind,ro /
mount --bind /dev/null /etc/passwd
cd "$PWD"
exec "$@"
"""
REFUSALS = """
import errno, os, sys

def hook(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event == "os.mkdir") and not isinstance(arguments[0], int):
        if not os.fsdecode(arguments[0]).startswith({writable!r}):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

def access(path, mode, *, access=os.access):  # it has no audit event
    return access(path, mode) and (not mode & os.W_OK or os.fsdecode(path).startswith({writable!r}))

sys.addaudithook(hook)
os.access = access
"""


class Machine(NamedTuple):
    """How to start a process without a writable folder, and its environment."""

    wrapper: Sequence[str]
    env: dict[str, str]


# The variables that name folders, set to missing ones.
ODD = {"TMPDIR": "/nonexistent/\udcff", "TEMP": "relative", "TMP": "", "HOME": "/nonexistent"}
# The setting, whether the check and the workers report something, and the environment.
FOLDERS: dict[str, tuple[str | None, bool, dict[str, str]]] = {
    "unset": (None, True, {}),
    "unset-odd": (None, True, ODD),
    "none": ("", False, ODD),
    "set": ("{shm}/ledgers", False, ODD),
}


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder in /dev/shm, which stays writable."""
    folder = Path("/dev/shm", f"promports-test-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def read_only(tmp_path: Path, environment: dict[str, str], writable: Path | None = None) -> Machine:
    """Return a machine without a writable folder, or with this one, in /dev/shm."""
    env = {**write_site(tmp_path), **environment}
    permitted = subprocess.run(["unshare", "--mount", "true"], capture_output=True, timeout=30, check=False)
    if permitted.returncode == 0:
        script = NAMESPACE.format(writable=writable or "")
        return Machine(["unshare", "--mount", "sh", "-ec", script, "sh"], env)
    folder = tmp_path / "refusals"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        REFUSALS.format(writable=("/dev/null", str(writable)) if writable else ("/dev/null",))
    )
    return Machine([], {**env, "PYTHONPATH": f"{folder}:{env['PYTHONPATH']}"})


@pytest.mark.parametrize("kind", FOLDERS)
def test_commands_work(kind: str, tmp_path: Path) -> None:
    setting, told, environment = FOLDERS[kind]
    wrapper, env = read_only(tmp_path, environment)
    if setting is not None:
        env["MINIMAL_LEDGER_DIR"] = setting.format(shm="/dev/shm/nowhere")
    commands = [["check"], ["check", "--deploy", "--tag", "promports"], ["migrate"], ["test", "minimal_tests"]]
    commands += [["export_targets"], ["export_targets", "--live"], ["show_targets"], ["shell", "-c", "print(1)"]]

    done = {" ".join(command): django_admin(*command, wrapper=wrapper, **env) for command in commands}

    for command, process in done.items():
        assert process.returncode == 0, (command, process.stderr)
        assert "Traceback" not in process.stderr, (command, process.stderr)
        assert "ERROR" not in process.stderr, (command, process.stderr)
        assert process.stderr.count("promports.W005") <= told, (command, process.stderr)
    check = done["check"].stderr
    assert check.count("promports.W005") == told, check
    assert ("no default for it (No usable temporary directory found in" in check) == told
    assert "127.0.0.1:19100" in done["export_targets"].stdout


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["no-preload", "preload"])
def test_workers_serve_metrics_and_say_once_that_they_count_in_memory(
    preload: list[str], kind: str, free_ports: range, tmp_path: Path, shm: Path
) -> None:
    # gunicorn itself needs a writable folder for the heartbeats of its workers.
    setting, told, environment = FOLDERS[kind]
    wrapper, env = read_only(tmp_path, environment, shm)
    if setting is not None:
        env["MINIMAL_LEDGER_DIR"] = setting.format(shm=shm)

    options = ["--worker-tmp-dir", str(shm), *preload]
    with serve_site(tmp_path, free_ports, *options, wrapper=wrapper, **env) as site:
        workers = site.wait_for_workers(2)
        statuses = send_requests(20, lambda _: site.request())

        assert statuses.count(200) == 20
        assert {scrape(port)["promports_port"] for port in workers} == set(workers)
        if told:
            _ask_until_all_have_said_so(site, workers)
        output = site.child.output()
        for pid in workers.values():
            assert output.count(f"What pid {pid} counts is lost when it ends.") == told, output
        assert output.count("ERROR") == output.count("Counting in memory: PROMPORTS_LEDGER_DIR is not set") <= 3
        assert "Traceback" not in output
        assert (shm / "ledgers").exists() == (kind == "set")


def test_a_folder_that_was_chosen_and_cannot_be_made_is_an_error_of_each_worker_and_no_more(
    free_ports: range, tmp_path: Path, shm: Path
) -> None:
    wrapper, env = read_only(tmp_path, {}, shm)
    env["MINIMAL_LEDGER_DIR"] = "/var/shop/ledgers"

    with serve_site(tmp_path, free_ports, "--worker-tmp-dir", str(shm), wrapper=wrapper, **env) as site:
        workers = site.wait_for_workers(2)

        _ask_until_all_have_said_so(site, workers)

        output = site.child.output()
        assert output.count("ERROR django_promports Counting in memory: [Errno 30] Read-only file system") == 2, output
        assert output.count("ERROR") == len(workers)


def _ask_until_all_have_said_so(site: Site, workers: Mapping[int, int]) -> None:
    """Send requests until every worker has logged it. A worker that runs as root does so at its first request."""
    said = [f"What pid {pid} counts is lost" for pid in workers.values()]
    site.child.wait_until(
        lambda: site.request() == 200 and all(words in site.child.output() for words in said), "each worker said so"
    )
