"""Sites of one machine do not take each other's ports, counts and folders for their own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from pytest_django import Settings

from django_promports import discovery, folders
from django_promports.conf import conf
from django_promports.ledger import Ledger
from django_promports.loop import Loop
from tests.commands import BECOME_NOBODY, call, endpoint, run_python
from tests.data.ledgers.freeze import thaw
from tests.minimal import django_admin
from tests.servers import ROOT, Site, get, scrape, wait_until
from tests.shops import Shop

pytestmark = pytest.mark.once

FROZEN = ROOT / "tests/data/ledgers"


def orders(site: Site, shop: Shop) -> dict[int, float]:
    """Return what the ports of a site export of a shop's counter."""
    return {port: value for port in site.live() if (value := scrape(port).get(shop.counter)) is not None}


# ---- who is who


def test_sites_with_one_settings_module_differ_by_their_secret_key(settings: Settings) -> None:
    names = set()
    for key in ("one", "two", b"two", "three"):
        settings.SECRET_KEY = key
        names.add(conf.PROMPORTS_SITE)

    assert len(names) == 3
    for name in names:
        assert re.fullmatch(re.escape(conf.project) + "-[0-9a-f]{8}", name)


class Unreadable:
    def __str__(self) -> str:
        raise RuntimeError("no key today")


@pytest.mark.parametrize("key", ["", None, Unreadable()], ids=["empty", "none", "unreadable"])
def test_without_a_secret_key_a_site_is_its_settings_module(key: object, settings: Settings) -> None:
    if key is None:
        del settings.SECRET_KEY
    else:
        settings.SECRET_KEY = key

    assert conf.project == conf.PROMPORTS_SITE
    assert conf.former_sites == (conf.project,)


def test_a_name_that_is_set_is_used_and_people_see_the_settings_module(settings: Settings) -> None:
    project = conf.project
    settings.PROMPORTS_SITE = "tea/shop 1"
    del settings.PROMPORTS_LEDGER_DIR

    assert conf.PROMPORTS_SITE == conf.site.name == "tea/shop 1"
    assert conf.project == project
    assert conf.PROMPORTS_LEDGER_DIR is not None
    assert conf.PROMPORTS_LEDGER_DIR.name == f"django_promports-{os.geteuid()}-tea_shop 1"


def test_a_worker_says_which_site_it_is_where_it_runs_and_where_its_ledgers_are(
    free_ports: range, tmp_path: Path
) -> None:
    shop = Shop(tmp_path, "a")
    (tmp_path / "current").symlink_to(shop.folder)

    with shop.serve(free_ports[:8], free_ports[14], SHOP_SETTINGS=f"BASE_DIR = {str(tmp_path / 'current')!r}") as site:
        site.wait_for_workers(1)
        (about,) = site.abouts().values()

    (folder,) = shop.runtime.iterdir()
    assert about["project"] == "config.settings"
    assert re.fullmatch(r"config\.settings-[0-9a-f]{8}", about["site"])
    assert about["place"] == str(shop.folder)
    assert about["ledger_folder"] == f"{folder.stat().st_dev}:{folder.stat().st_ino}"
    assert folder.name == f"django_promports-{os.geteuid()}-{about['site']}"


# ---- two sites with the settings module config.settings


def test_two_sites_with_one_settings_module_share_nothing(free_ports: range, tmp_path: Path) -> None:
    ports = free_ports[:8]
    a, b = Shop(tmp_path, "a"), Shop(tmp_path, "b")

    with a.serve(ports, free_ports[13]) as site:
        site.wait_for_workers(1)
        assert [site.request() for _ in range(7)] == [200] * 7
        os.kill(site.child.pid, signal.SIGKILL)  # so that nothing is tidied up
        for pid in site.live().values():
            os.kill(pid, signal.SIGKILL)
        site.child.process.wait()
    with b.serve(ports, free_ports[14]) as other:
        (port,) = other.wait_for_workers(1)
        assert [other.request() for _ in range(3)] == [200] * 3

        assert a.counter not in scrape(port)
        assert scrape(port)[b.counter] == 3
        with a.serve(ports, free_ports[13]) as site:
            site.child.wait_until(site.is_listening, "the site listens")
            assert site.request() == 200
            wait_until(lambda: len(site.live()) == 2, "both have a worker", output=site.child.output)
            lists = {port: json.loads(get(f"http://127.0.0.1:{port}/targets"))[0]["targets"] for port in site.live()}

            # Its port is taken, so its counts wait in the ledger of that port.
            assert orders(site, a) == {ports[1]: 1}
            assert orders(site, b) == {ports[0]: 3}
            assert lists == {port: [f"127.0.0.1:{port}"] for port in ports[:2]}
    with a.serve(ports, free_ports[13]) as site:
        site.wait_for_workers(1)
        site.child.wait_until(lambda: orders(site, a) == {ports[0]: 7}, "its counts are continued")
        assert "damaged" not in site.child.output()
    assert len(list(a.runtime.iterdir())) == 2


def test_two_sites_in_one_range_are_told_about_each_other(free_ports: range, tmp_path: Path) -> None:
    ports = free_ports[:8]
    a, b = Shop(tmp_path, "a"), Shop(tmp_path, "b")

    with a.serve(ports, free_ports[13]) as site, b.serve(ports, free_ports[14], workers=3) as other:
        wait_until(lambda: len(site.live()) == 4, "both have workers", output=other.child.output)
        names = {port: about["site"] for port, about in site.abouts().items()}
        (of_a,) = {name for name in names.values() if list(names.values()).count(name) == 1}
        (place,) = [port for port, name in names.items() if name == of_a]
        words = f"Another site ({of_a}) has workers at {place}, in the port range of this site"
        range_ = {"DEMO_PORT_RANGE": f"{ports[0]}-{ports[-1]}"}
        deploy = ["check", "--deploy", "--tag", "promports"]
        commands = [["export_targets"], ["export_targets", "--live"], ["show_targets"], deploy, ["check"]]
        done = {" ".join(command): django_admin(*command, **b.env, **range_) for command in commands}
        other.child.wait_until(lambda: "Another site" in site.child.output() + other.child.output(), "one logs it")
        output = site.child.output() + other.child.output()

    listed = json.loads(done["export_targets"].stdout)[0]["targets"]
    assert listed == [f"127.0.0.1:{port}" for port in ports]
    assert words in done["export_targets"].stderr
    assert "Another site" not in done["export_targets --live"].stderr
    assert len(json.loads(done["export_targets --live"].stdout)[0]["targets"]) == 3
    assert words in done["show_targets"].stdout
    assert f"(promports.W009) {words}" in done[" ".join(deploy)].stderr
    assert "W009" not in done["check"].stderr
    assert [process.returncode for process in done.values()] == [0] * 5
    assert output.count("Another site") <= 2, output  # by the oldest worker of each site, not by all


@pytest.mark.parametrize("format_", ["json", "yaml"])
def test_the_list_is_written_whatever_is_in_the_range(
    format_: str, free_ports: range, settings: Settings, tmp_path: Path
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:4]
    with endpoint(free_ports, site="b"), endpoint(free_ports, token="t", keys=[b"of c"]), endpoint(free_ports):
        out, err = call("export_targets", "--format", format_)
        hosts = call("export_targets", "--host", "web1")

    assert all(str(port) in out for port in free_ports[:4])
    assert err.splitlines() == [
        f"Another site ({name}) has workers at {port}, in the port range of this site: a target list of the whole "
        "range contains both, and sums count both. Give each site a PROMPORTS_PORT_RANGE of its own."
        for name, port in (("b", free_ports[0]), ("with other keys", free_ports[1]))
    ]
    assert hosts[1] == ""  # other machines, perhaps


def test_a_secret_key_that_each_process_makes_for_itself_is_named(free_ports: range, tmp_path: Path) -> None:
    ports = free_ports[:8]
    shop = Shop(tmp_path, "a")
    random = "SECRET_KEY = os.urandom(16).hex()"

    with shop.serve(ports, free_ports[14], workers=2, SHOP_SETTINGS=random) as site:
        site.wait_for_workers(2)

        site.child.wait_until(lambda: "give all its processes the same SECRET_KEY" in site.child.output(), "")

    assert f"have the settings module config.settings and the folder {shop.folder} of this site" in site.child.output()


def test_many_folders_of_one_settings_module_are_a_warning(tmp_path: Path) -> None:
    shop = Shop(tmp_path, "a")
    name = f"django_promports-{os.geteuid()}-config.settings"
    for number in range(9):
        (shop.runtime / f"{name}-0000000{number}").mkdir(mode=0o700)
    set_ = {"MINIMAL_LEDGER_DIR": str(shop.runtime / f"{name}-00000000")}

    warned = django_admin("check", **shop.env).stderr
    (shop.runtime / f"{name}-00000000").rename(shop.runtime / f"{name}-another")
    few = django_admin("check", **shop.env).stderr

    assert "(promports.W010) There are 9 ledger folders of sites with the settings module config.settings in" in warned
    assert "promports.W010" not in few + django_admin("check", **shop.env, **set_).stderr


# ---- one site in two places


def test_a_site_that_runs_from_two_places_is_told_of_both(free_ports: range, tmp_path: Path) -> None:
    ports = free_ports[:8]
    a, b = Shop(tmp_path, "a", "copied"), Shop(tmp_path, "b", "copied")
    range_ = {"DEMO_PORT_RANGE": f"{ports[0]}-{ports[-1]}"}

    with a.serve(ports, free_ports[13]) as site:
        site.wait_for_workers(1)
        with b.serve(ports, free_ports[14]) as other:
            other.wait_for_workers(2)
            said = django_admin("show_targets", **a.env, **range_).stdout
            named = django_admin("show_targets", **a.env, **range_, SHOP_SETTINGS="PROMPORTS_SITE = 'a'").stdout

    assert f"Workers of this site run from {b.folder} (at {ports[1]}) and from {a.folder}, and share their" in said
    assert "set PROMPORTS_SITE to another name in each of them" in said
    assert "2 live" in said
    assert "0 live" in named
    assert "Workers of this site run from" not in named


def look_twice(port: int, claimed_at: float) -> None:
    with contextlib.closing(Loop()) as loop:
        loop.complete(discovery.watch(loop, port=port, claimed_at=claimed_at))


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    # A test cannot wait for ten minutes.
    monkeypatch.setattr(discovery, "DEPLOYMENT_SECONDS", 0.01)


def test_a_second_place_is_logged_after_a_deployment_would_be_over(
    free_ports: range, settings: Settings, no_rest: None, caplog: pytest.LogCaptureFixture
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:4]
    own, *_ = free_ports
    with endpoint(free_ports[1:], place="/srv/b", uptime_seconds=1e6, pid=1):
        look_twice(own, time.monotonic())

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"Workers of this site run from /srv/b (at {free_ports[1]}) and from {ROOT}")


def test_an_older_worker_of_the_same_place_is_the_one_that_logs(
    free_ports: range, settings: Settings, no_rest: None, caplog: pytest.LogCaptureFixture
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:4]
    own, *others = free_ports
    with (
        endpoint(others, site="another"),
        endpoint(others, place="/srv/b", uptime_seconds=1e6),
        endpoint(others, place=conf.place, uptime_seconds=100.0),
    ):
        look_twice(own, time.monotonic() - 10)
        assert caplog.records == []
        look_twice(own, time.monotonic() - 1000)

    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "Another site",
        "Workers of this site run from /srv/b",
    ]


def test_what_another_program_says_cannot_break_a_line(
    free_ports: range, settings: Settings, no_rest: None, caplog: pytest.LogCaptureFixture
) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports[:2]
    with endpoint(free_ports[1:], site="\x1b[31m\nERROR " + "x" * 500, keys=[b"none of ours"]):
        look_twice(free_ports[0], time.monotonic())

    (record,) = caplog.records
    assert "Another site (?[31m?ERROR xxx" in record.getMessage()
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 500


# ---- where the ledgers are


DEFAULT_FOLDER = """
import os
from pathlib import Path
import django
django.setup()
from django.conf import settings
from django_promports import folders
from django_promports.conf import conf
if hasattr(settings, "PROMPORTS_LEDGER_DIR"):
    del settings.PROMPORTS_LEDGER_DIR
{code}
print(conf.PROMPORTS_LEDGER_DIR, conf.no_ledger_dir)
"""


def default_folder(code: str = "", **env: str) -> str:
    """Return the default folder of a process with this environment, and why there is none."""
    done = run_python(DEFAULT_FOLDER.format(code=code), seconds=60, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DEMO_LEDGER_DIR")
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    return folder


def test_the_default_folder_is_in_the_first_runtime_directory(runtime: Path) -> None:
    found = default_folder(RUNTIME_DIRECTORY=f"{runtime}:{runtime}/two")

    assert re.fullmatch(rf"{runtime}/django_promports-\d+-demo_site\.settings-[0-9a-f]{{8}}", found)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="not Linux")
def test_without_a_usable_runtime_directory_the_default_folder_is_in_shared_memory(runtime: Path) -> None:
    for unusable in ("", "relative", str(runtime / "missing"), __file__):
        found = default_folder(RUNTIME_DIRECTORY=unusable, TMPDIR=str(runtime))

        assert found.startswith("/dev/shm/django_promports-"), unusable


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_runtime_directory_of_another_user_is_not_used(runtime: Path) -> None:
    found = default_folder(BECOME_NOBODY, RUNTIME_DIRECTORY=str(runtime))

    assert found.startswith("/dev/shm/django_promports-65534-")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="not Linux")
def test_counts_in_shared_memory_outlive_the_site(free_ports: range, tmp_path: Path) -> None:
    shop = Shop(tmp_path, "a", secret_key=str(tmp_path))
    found = set()

    try:
        for total in (2, 4):
            with shop.serve(free_ports[:4], free_ports[14], RUNTIME_DIRECTORY="") as site:
                (port,) = site.wait_for_workers(1)
                assert [site.request() for _ in range(2)] == [200] * 2
                assert orders(site, shop) == {port: total}
                found.add(Path("/dev/shm", f"django_promports-{os.geteuid()}-{site.abouts()[port]['site']}"))
        (folder,) = found
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / f"{port}.ledger").exists()
    finally:
        for folder in found:
            shutil.rmtree(folder)


@pytest.mark.parametrize("shared", ["missing", "not-sticky"])
def test_where_shared_memory_cannot_be_used_it_is_the_temporary_directory(
    shared: str, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    # The folder of the machine cannot be taken away or opened to everyone.
    folder = tmp_path / "shm"
    if shared == "not-sticky":
        folder.mkdir()
        folder.chmod(0o777)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        else:
            pytest.skip("only root may give folders away")
    monkeypatch.setattr(folders, "SHARED_MEMORY", folder)
    monkeypatch.setattr("tempfile.tempdir", str(runtime))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)

    assert folders.find_base() == runtime


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_where_logind_would_remove_it_it_is_the_temporary_directory(runtime: Path) -> None:
    # systemd does not run in a container, and a test cannot start it.
    systemd = "folders.SYSTEMD = '/'\n"

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        nobody = default_folder(BECOME_NOBODY + systemd, TMPDIR=folder)
        root = default_folder(systemd, TMPDIR=folder)

    assert nobody.startswith(f"{folder}/django_promports-65534-")
    assert root.startswith("/dev/shm/django_promports-0-")


def test_a_command_that_looks_at_another_folder_says_so(free_ports: range, tmp_path: Path) -> None:
    ports = free_ports[:4]
    shop = Shop(tmp_path, "a")
    elsewhere = tmp_path / "private"
    elsewhere.mkdir(mode=0o700)
    env = {**shop.env, "DEMO_PORT_RANGE": f"{ports[0]}-{ports[-1]}"}

    with shop.serve(ports, free_ports[14], workers=2) as site:
        site.wait_for_workers(2)
        commands = [["show_targets"], ["show_targets", "--json"], ["export_targets", "--live"]]
        commands += [["export_targets", "--check"]]
        same = [django_admin(*command, **env) for command in commands]
        other = [django_admin(*command, **{**env, "RUNTIME_DIRECTORY": str(elsewhere)}) for command in commands]

    words = f"The workers at {ports[0]}-{ports[1]} keep their ledgers in another folder than this process, which uses "
    for process in same:
        assert "another folder" not in process.stdout + process.stderr
    for process in other:
        assert process.returncode == 0, process.stderr
        assert (process.stdout + process.stderr).count(f"{words}{elsewhere}/django_promports-") == 1
        assert "set PROMPORTS_LEDGER_DIR to one folder for both" in process.stdout + process.stderr
    assert "2 live" in other[0].stdout  # both know SECRET_KEY
    assert len(json.loads(other[1].stdout)["targets"]) == 4


# ---- counts of a version that knew the settings module only


def write_former(folder: Path, port: int, kind: str, counter: str, site: str) -> None:
    """Write a ledger with 7 orders, as version 0.1 or today's does."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{port}.ledger"
    ledger = Ledger(path, site)
    family = ledger.add_family(counter.removesuffix("_total"), "counter", "Orders.", "", (), ())
    ledger.cells[ledger.add_series(family, (), time.time())] = 7.0
    ledger.close(seal=kind == "sealed")


@pytest.mark.parametrize("kind", ["sealed", "killed"])
@pytest.mark.parametrize("where", ["default", "set"])
def test_the_counts_of_a_site_that_was_its_settings_module_are_continued_once(
    where: str, kind: str, free_ports: range, tmp_path: Path
) -> None:
    ports = free_ports[:4]
    a, b = Shop(tmp_path, "a"), Shop(tmp_path, "b")
    old = a.temporary / f"django_promports-{os.geteuid()}-config.settings"
    env = {}
    if where == "set":
        old = tmp_path / "set"
        env["MINIMAL_LEDGER_DIR"] = str(old)
    for port in ports[:2]:
        write_former(old, port, kind, a.counter, "config.settings")

    with a.serve(ports, free_ports[13], workers=2, **env) as site:
        site.wait_for_workers(2)
        site.child.wait_until(lambda: sum(orders(site, a).values()) == 14, "both ledgers are continued")
        assert site.request() == 200
        assert sum(orders(site, a).values()) == 15
        with b.serve(ports, free_ports[14], workers=2) as other:
            wait_until(lambda: len(site.live()) == 4, "both have workers", output=other.child.output)
            assert other.request() == 200

            assert sum(orders(site, a).values()) == 15
            assert "WARNING django_promports /" not in other.child.output()
    with a.serve(ports, free_ports[13], workers=2, **env) as site:
        site.wait_for_workers(2)
        site.child.wait_until(lambda: sum(orders(site, a).values()) == 15, "nothing is lost or counted twice")
        assert "damaged" not in site.child.output()
    if where == "default":
        assert not old.exists()


@pytest.mark.parametrize("name", ["version-2-closed", "version-2-killed", "version-3-closed", "version-3-killed"])
def test_a_ledger_of_a_former_name_is_continued_by_the_first_that_takes_it(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = json.loads((FROZEN / f"{name}.json").read_text())
    path = tmp_path / "19100.ledger"
    thaw(FROZEN / f"{name}.frozen", path)

    first = Ledger(path, "site-1", former=["other", "site"])
    found = {
        name: {labels: list(first.cells[at : at + family.width]) for labels, at in family.series.items()}
        for name, family in first.families.items()
    }
    scraped_at = first.scraped_at
    first.close()
    assert caplog.records == []
    second = Ledger(path, "site-2", former=["other", "site"])
    families = dict(second.families)
    second.close()

    kept = {name for name, family in held["families"].items() if family["series"] and family["family"][0] != "gauge"}
    assert set(found) == kept
    for name in kept:
        expected = {tuple(labels): cells[3:] for labels, cells in held["families"][name]["series"]}
        assert found[name] == expected
    assert scraped_at == held["settled_at"]
    assert families == {}
    assert "it belongs to another site" in caplog.text


def test_a_new_secret_key_continues_the_counts_of_its_fallbacks(free_ports: range, tmp_path: Path) -> None:
    ports = free_ports[:4]
    shop = Shop(tmp_path, "a")
    changed = "SECRET_KEY_FALLBACKS, SECRET_KEY = [SECRET_KEY], 'a new key'"

    for environment, total in (({}, 3), ({"SHOP_SETTINGS": changed}, 6)):
        with shop.serve(ports, free_ports[14], workers=1, **environment) as site:
            site.wait_for_workers(1)
            assert [site.request() for _ in range(3)] == [200] * 3
            assert sum(orders(site, shop).values()) == total
            assert "damaged" not in site.child.output()

    assert len(list(shop.runtime.iterdir())) == 1


def test_a_folder_of_version_0_1_is_kept_where_it_is_unless_the_site_has_another(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(runtime))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, new = (f"django_promports-{os.geteuid()}-{name}" for name in ("shop", "shop-1"))

    found = [folders.find_default("shop-1", "shop")]
    (tmp_path / old).mkdir(mode=0o700)
    found.append(folders.find_default("shop-1", "shop"))
    (tmp_path / old).rename(tmp_path / new)
    found.append(folders.find_default("shop-1", "shop"))
    (runtime / new).mkdir(mode=0o700)
    found.append(folders.find_default("shop-1", "shop"))

    assert found == [runtime / new, tmp_path / new, tmp_path / new, runtime / new]


def test_a_folder_of_version_0_1_that_others_may_write_to_is_left_alone(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    old.chmod(0o777)

    assert folders.make_folder(new, [tmp_path / "missing", old])
    assert old.is_dir()
    assert new.is_dir()


def test_a_folder_that_is_there_is_not_replaced_by_a_former_one(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir(mode=0o700)
        (folder / folder.name).touch()

    assert not folders.make_folder(new, [old])
    assert os.listdir(new) == ["new"]
    assert os.listdir(old) == ["old"]
