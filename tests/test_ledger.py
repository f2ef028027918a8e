"""The file behind a port: whoever opens it next finds what was counted, or a new one, and never something else."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_promports import ledger as ledger_module
from django_promports.folders import check_folder, find_filesystem, make_folder
from django_promports.layout import (
    BYTE_ORDER,
    CELLS_AT,
    END_AT,
    HEADER,
    LAYOUT,
    MAGIC,
    SCRAPED_AT,
    SEAL_AT,
    SLOT,
    VERSION,
    WORD,
    Layout,
    hash_site,
)
from django_promports.ledger import Family, Ledger, LedgerFull
from tests.commands import run_python
from tests.examples import examples

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these file systems")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and mount")

HOUR = 3600.0
# Sizes of a small ledger, to fill it and to damage every part of it.
SMALL = Layout(size=CELLS_AT + 8 * 512 + 8192, cells=512)

Counts = dict[tuple[str, tuple[str, ...]], list[float]]


class Clock:
    """Stands in for the module `time` in ledger.py: no machine lets a day pass within a test."""

    monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "19100.ledger"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ledger_module, "time", clock)
    return clock


@contextlib.contextmanager
def opened(path: Path, *, seal: bool = True, application: str = "site", layout: Layout = LAYOUT) -> Iterator[Ledger]:
    """Hold a ledger; without the seal it is left as a killed holder leaves it."""
    ledger = Ledger(path, application, layout)
    try:
        yield ledger
    finally:
        ledger.close(seal=seal)


def add_counter(ledger: Ledger, name: str = "apples", labelnames: tuple[str, ...] = ("kind",)) -> Family:
    return ledger.add_family(name, "counter", "Apples eaten.", "", labelnames, ())


def count(ledger: Ledger, family: Family, labelvalues: tuple[str, ...], *amounts: float) -> None:
    """Add to the values of a series, made where there is none."""
    first = family.series.get(labelvalues)
    if first is None:
        first = ledger.add_series(family, labelvalues, 1.5)
    for cell, amount in enumerate(amounts or (1.0,), first):
        ledger.cells[cell] += amount


def read(ledger: Ledger) -> Counts:
    """Return created time and values of every series."""
    return {
        (family.record.name, labelvalues): [
            *family.read_created([first]),
            *ledger.cells[first : first + family.width].tolist(),
        ]
        for family in ledger.families.values()
        for labelvalues, first in family.series.items()
    }


def fill(ledger: Ledger) -> Counts:
    """Count in families of every type, forget some, and return what must be found later."""
    apples = add_counter(ledger)
    for number in range(20):
        count(ledger, apples, (f"kind {number}",), number + 0.5)
    sizes = ledger.add_family("sizes_bytes", "summary", 'Of "pears"\n.', "bytes", (), ())
    count(ledger, sizes, (), 3, -7.25)
    seconds = ledger.add_family("seconds", "histogram", "Sek\u00fcndchen.", "", ("a", "b"), ("0.5", "1.0", "+Inf"))
    count(ledger, seconds, ("\ue000", ""), 1e300, 1, 2, 3)
    count(ledger, seconds, ("gone", ""), 1, 1, 1, 1)
    ledger.forget(seconds, ("gone", ""))
    gone = add_counter(ledger, "gone")
    count(ledger, gone, ("x",))
    ledger.forget(gone)
    return read(ledger)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged")


@pytest.mark.parametrize("seal", [True, False], ids=["closed", "killed"])
def test_the_next_holder_goes_on_counting(seal: bool, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(path, seal=seal) as ledger:
        counted = fill(ledger)

    with opened(path, seal=seal) as ledger:
        found, families = read(ledger), [family.record for family in ledger.families.values()]
        count(ledger, ledger.families["apples"], ("kind 1",), 10)
        count(ledger, ledger.families["apples"], ("new",), 1)

    assert found == counted
    assert families == [
        (0, "apples", "counter", "Apples eaten.", "", ("kind",), (), ""),
        (1, "sizes_bytes", "summary", 'Of "pears"\n.', "bytes", (), (), ""),
        (2, "seconds", "histogram", "Sek\u00fcndchen.", "", ("a", "b"), ("0.5", "1.0", "+Inf"), ""),
    ]
    with opened(path) as ledger:
        assert read(ledger) == counted | {
            ("apples", ("kind 1",)): [1.5, 11.5],
            ("apples", ("new",)): [1.5, 1.0],
        }
    assert not warnings(caplog)


def test_a_new_ledger_is_empty_and_for_this_user_only(path: Path) -> None:
    with opened(path) as ledger:
        assert ledger.families == {}
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_blocks * 512 < 100_000


def test_a_descriptor_of_a_ledger_is_not_inherited_by_programs(path: Path) -> None:
    with opened(path):
        done = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, timeout=30, check=True)

    assert path.name not in done.stdout


# The writers add series, count in them, and forget old ones, so that there is something to renew at the next claim;
# what they finished they note in memory that they share with the process that kills them.
KILL = """
import mmap, os, random, signal, sys, time
from pathlib import Path
from django_promports.ledger import Ledger

path, rounds, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
shared = memoryview(mmap.mmap(-1, 8 * 200_000)).cast("Q")
MADE, FORGOTTEN, COUNTS = 0, 1, 2    # how many were made; how many of those were forgotten; the counts of each
PAD = "x" * 100

def open_family():
    ledger = Ledger(path, "site")
    return ledger, ledger.add_family("events", "histogram", "Events.", "", ("number", "pad"), ("+Inf",))

def write():
    ledger, family = open_family()
    while True:
        number = shared[MADE]
        labels = (str(number), PAD)
        first = family.series.get(labels)
        if first is None:
            first = ledger.add_series(family, labels, 1.0)
        for _ in range(5):
            ledger.cells[first + 1] += 1.0
            shared[COUNTS + number] = int(ledger.cells[first + 1])
        shared[MADE] = number + 1
        if number - shared[FORGOTTEN] > 40:
            ledger.forget(family, (str(shared[FORGOTTEN]), PAD))
            shared[FORGOTTEN] += 1

for round in range(rounds):
    pid = os.fork()
    if pid == 0:
        try:
            write()
        finally:
            os._exit(1)
    time.sleep(rng.random() * 0.012)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"round {round}: the writer failed"
    ledger, family = open_family()
    values = {int(labels[0]): ledger.cells[first + 1] for labels, first in family.series.items()}
    made, forgotten = shared[MADE], shared[FORGOTTEN]
    assert set(family.read_created(family.series.values())) <= {1.0}, round
    assert set(values) <= set(range(forgotten, made + 1)), (round, forgotten, made, sorted(values))
    for number in range(forgotten, made + 1):
        if number not in values:
            # In flight: the one to be forgotten next, and the one to be made.
            assert number == forgotten or shared[COUNTS + number] == 0, (round, number, forgotten, made)
        else:
            assert 0 <= values[number] - shared[COUNTS + number] <= 1, (round, number)
    if forgotten not in values and forgotten < made:
        shared[FORGOTTEN] += 1
    ledger.close(seal=rng.random() < 0.5)
print(shared[MADE], shared[FORGOTTEN])
"""


def test_a_writer_killed_at_any_instant_loses_at_most_what_is_in_flight(path: Path) -> None:
    done = run_python(KILL, str(path), "120", str(random.randrange(2**32)))

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    made, forgotten = map(int, done.stdout.split())
    assert made > 120
    assert forgotten > 40
    assert not aside(path).exists()


# Processes that each add 1 to a cell again and again; claims of ports are part of it if there is a range.
RACE = """
import os, random, sys, time
from pathlib import Path
from django_promports import ports
from django_promports.ledger import Ledger, LedgerLocked

folder, first_port, end_port, processes, claims = Path(sys.argv[1]), *map(int, sys.argv[2:])
deadline = time.monotonic() + 50

def hold(path):
    ledger = Ledger(path, "site")
    family = ledger.add_family("events", "counter", "Events.", "", (), ())
    first = family.series[()] if family.series else ledger.add_series(family, (), 1.0)
    for _ in range(5):
        value = ledger.cells[first]
        if random.random() < 0.1:
            time.sleep(0)    # another process's turn, in the middle of an increment
        ledger.cells[first] = value + 1
    ledger.close(seal=random.random() < 0.5)

def work():
    done = 0
    while done < claims:
        assert time.monotonic() < deadline
        try:
            if first_port == end_port:
                hold(folder / "one.ledger")
            else:
                claim = ports.claim("127.0.0.1", range(first_port, end_port))
                try:
                    hold(folder / f"{claim.port}.ledger")
                finally:
                    claim.listener.close()
        except LedgerLocked:
            continue
        done += 1

pids = []
for _ in range(processes):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    pids.append(pid)
for pid in pids:
    os.waitpid(pid, 0)
total = 0
for path in folder.glob("*.ledger"):
    ledger = Ledger(path, "site")
    total += ledger.cells[ledger.families["events"].series[()]]
    ledger.close()
print(int(total))
"""


def test_two_processes_never_write_one_ledger(tmp_path: Path) -> None:
    done = run_python(RACE, str(tmp_path), "0", "0", "8", "25")

    assert done.stderr == ""
    assert done.stdout.split() == [str(8 * 25 * 5)]
    assert os.listdir(tmp_path) == ["one.ledger"]


def test_a_thousand_claims_in_parallel_processes_lose_no_increment(tmp_path: Path, free_ports: range) -> None:
    done = run_python(RACE, str(tmp_path), str(free_ports[0]), str(free_ports[-1] + 1), "8", "125")

    assert done.stderr == ""
    assert done.stdout.split() == [str(8 * 125 * 5)]
    assert len(os.listdir(tmp_path)) <= 8


OPEN = """
import sys
from pathlib import Path
from django_promports.ledger import Ledger, LedgerLocked
try:
    Ledger(Path(sys.argv[1]), "site").close()
    print("open")
except LedgerLocked as locked:
    print(locked)
"""


def test_a_ledger_that_another_process_has_open_is_locked_until_it_closes(path: Path) -> None:
    with opened(path) as ledger:
        counted = fill(ledger)

        locked = run_python(OPEN, str(path))

        assert locked.stdout == f"Another process has {path} open\n", locked.stderr
        assert read(ledger) == counted
    assert run_python(OPEN, str(path)).stdout == "open\n"


def test_a_holder_that_is_just_ending_is_waited_for(path: Path) -> None:
    former = Ledger(path, "site")
    counted = fill(former)
    ending = threading.Timer(0.1, former.close)
    ending.start()

    with opened(path) as ledger:
        assert read(ledger) == counted
    ending.join(10)


def test_whoever_locked_a_file_that_was_just_renewed_opens_the_new_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as ledger:
        count(ledger, add_counter(ledger), ("old",))
    with opened(path.with_name("new")) as ledger:
        count(ledger, add_counter(ledger), ("new",))
    lock = fcntl.flock

    def lock_too_late(file: int, operation: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.with_name("new").replace(path)
        lock(file, operation)

    # The moment between opening and locking is too short to be hit by another process.
    monkeypatch.setattr(fcntl, "flock", lock_too_late)

    with opened(path) as ledger:
        assert read(ledger) == {("apples", ("new",)): [1.5, 1.0]}


def test_what_lies_behind_the_index_of_a_killed_holder_is_no_record(path: Path) -> None:
    with opened(path, layout=SMALL, seal=False) as ledger:
        fill(ledger)
    with path.open("r+b") as file:
        file.seek(END_AT)
        (end,) = struct.unpack("=Q", file.read(8))
        file.seek(end + SLOT.size)
        file.write(b"\xff" * (SMALL.size - file.tell()))

    with opened(path, layout=SMALL, seal=False) as ledger:
        count(ledger, ledger.families["apples"], ("new",))
        expected = read(ledger)

    with opened(path, layout=SMALL) as ledger:
        assert read(ledger) == expected


_positions = st.one_of(
    st.integers(0, SMALL.size - 1),
    st.integers(0, 64),
    st.integers(SEAL_AT, SEAL_AT + 16),
    st.integers(SMALL.index_at, SMALL.index_at + 2500),
)
_lengths = st.one_of(st.integers(1, 64), st.integers(1, SMALL.size))
_scrambles = st.tuples(st.just("scramble"), _positions, st.binary(min_size=1, max_size=64))
_tears = st.tuples(st.just("tear"), _positions, _lengths)
_truncations = st.tuples(st.just("truncate"), st.integers(1, SMALL.size - 1), st.just(0))
_appendices = st.tuples(st.just("append"), st.just(0), st.binary(min_size=1, max_size=64))


@settings(
    max_examples=examples(400),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sealed=st.booleans(),
    damages=st.lists(st.one_of(_scrambles, _tears, _truncations, _appendices), min_size=1, max_size=3),
)
def test_a_damaged_file_gives_what_was_counted_or_is_set_aside(
    sealed: bool,
    damages: list[tuple[str, int, bytes | int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "19100.ledger"
    for former in tmp_path.iterdir():
        former.unlink()
    caplog.clear()
    with opened(path, layout=SMALL, seal=sealed) as ledger:
        counted = fill(ledger)
    whole = content = path.read_bytes()
    for what, position, data in damages:
        if what == "truncate":
            content = content[:position]
        elif what == "append":
            content += bytes(data)
        else:
            written = data if isinstance(data, bytes) else bytes(data)
            content = (content[:position] + written + content[position + len(written) :])[: len(content)]
    if not sealed and len(content) == len(whole):  # nothing tells whether the cells of a killed holder are right
        content = content[:CELLS_AT] + whole[CELLS_AT : SMALL.index_at] + content[SMALL.index_at :]
    path.write_bytes(content)

    with opened(path, layout=SMALL) as ledger:
        found = read(ledger)
        count(ledger, add_counter(ledger, "later"), ("x",))
        expected = read(ledger)

    if aside(path).exists():
        assert found == {}
        assert aside(path).read_bytes() == content
        assert len(warnings(caplog)) == 1
    else:
        assert found == counted
        assert not warnings(caplog)
    with opened(path, layout=SMALL) as ledger:
        assert read(ledger) == expected


def test_an_empty_file_is_a_new_ledger(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.touch()

    with opened(path) as ledger:
        assert ledger.families == {}

    assert not warnings(caplog)


def _write_other_site(path: Path) -> None:
    with opened(path, application="another") as ledger:
        fill(ledger)


def _write_header(path: Path, header: bytes) -> None:
    with opened(path) as ledger:
        fill(ledger)
    with path.open("r+b") as file:
        file.write(header + WORD.pack(zlib.crc32(header)))


def _write_other_version(path: Path) -> None:
    _write_header(path, HEADER.pack(MAGIC, VERSION + 1, BYTE_ORDER, LAYOUT.size, hash_site("site")))


def _write_other_byte_order(path: Path) -> None:
    swapped = {"little": ">", "big": "<"}[sys.byteorder]
    _write_header(path, struct.pack(f"{swapped}8sIIQ32s", MAGIC, VERSION, BYTE_ORDER, LAYOUT.size, bytes(32)))


def _write_text(path: Path) -> None:
    path.write_text("Dear diary, ...\n")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_write_other_site, "it belongs to another site"),
        (_write_other_version, "another version of django_promports wrote it"),
        (_write_other_byte_order, "another version of django_promports wrote it"),
        (_write_text, "it has 16 bytes instead of 67108864"),
    ],
)
def test_what_another_wrote_is_set_aside(
    write: object, reason: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(write)
    write(path)
    inode = path.stat().st_ino

    with opened(path) as ledger:
        found = read(ledger)
        counted = fill(ledger)

    assert found == {}
    assert aside(path).stat().st_ino == inode
    assert warnings(caplog) == [
        f"{path} cannot be continued: {reason}. It is {aside(path)} now; its counts begin at zero."
    ]
    with opened(path) as ledger:
        assert read(ledger) == counted


def test_only_the_latest_damaged_file_is_kept(path: Path) -> None:
    for text in ("one", "two", "three"):
        path.write_text(text)
        with opened(path):
            pass
        assert aside(path).read_text() == text

    assert sorted(os.listdir(path.parent)) == [path.name, aside(path).name]


@needs_root
def test_another_users_file_is_refused_and_left_alone(path: Path) -> None:
    with opened(path) as ledger:
        fill(ledger)
    os.chown(path, 65534, 65534)
    content = path.read_bytes()

    with pytest.raises(PermissionError, match="not a file of this user"):
        Ledger(path, "site")

    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "folder", "pipe"])
def test_what_is_no_file_is_refused(kind: str, path: Path) -> None:
    target = path.with_name("target")
    if kind == "symlink":
        target.write_text("precious")
    if kind.endswith("symlink"):
        path.symlink_to(target)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    descriptors = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match=path.name):
        Ledger(path, "site")

    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert target.exists() == (kind == "symlink")
    assert kind != "symlink" or target.read_text() == "precious"


@pytest.mark.parametrize("label", ["x", "x" * 300], ids=["cells", "index"])
def test_a_full_ledger_says_so_and_keeps_what_it_has(label: str, path: Path) -> None:
    with opened(path, layout=SMALL) as ledger:
        family = add_counter(ledger)
        with pytest.raises(LedgerFull, match=path.name):  # noqa: PT012
            for number in range(SMALL.cells):
                count(ledger, family, (f"{label}{number}",), number + 1)
        counted = read(ledger)
        with pytest.raises(LedgerFull):
            count(ledger, family, ("y" * 300,))
        assert read(ledger) == counted
        count(ledger, family, (f"{label}0",), 1)

    assert len(counted) > 20
    with opened(path, layout=SMALL) as ledger:
        assert read(ledger) == counted | {("apples", (f"{label}0",)): [1.5, 2.0]}


def test_space_is_reserved_where_nothing_was_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reserving writes to the file, so it would undo what another thread counts there at this moment. That moment is too
    # short to be hit: instead, look at what each write is about to replace.
    write, replaced = os.pwrite, []

    def look_and_write(file: int, data: bytes, offset: int) -> int:
        replaced.append(os.pread(file, len(data), offset))
        return write(file, data, offset)

    with opened(path) as ledger:
        fill(ledger)
    for round_ in range(3):  # the first piece is reserved again each time the ledger is opened
        with opened(path) as ledger:
            monkeypatch.setattr(os, "pwrite", look_and_write)
            for number in range(2000):
                count(ledger, ledger.families["apples"], (f"{round_} {number}",), 1.5)
            monkeypatch.undo()

    assert len(replaced) > 10
    assert not any(data.strip(b"\0") for data in replaced)


# However many pages are free: a ledger opens or says that it is full, and what it took it keeps. SIGBUS kills.
CROWDED = """
import mmap, os, sys
from pathlib import Path
from django_promports.ledger import Ledger, LedgerFull

folder = Path(sys.argv[1])
space = os.statvfs(folder)
total = space.f_bavail * space.f_frsize

def values(ledger):
    return {
        (family.record.name, labels): ledger.cells[first]
        for family in ledger.families.values() for labels, first in family.series.items()
    }

taken = []
for pages in [*range(40), 60, 80, 120]:
    for name in os.listdir(folder):
        (folder / name).unlink()
    with open(folder / "filler", "wb") as filler:
        if size := total - pages * mmap.PAGESIZE:
            os.posix_fallocate(filler.fileno(), 0, size)
    counted = {}
    for attempt in range(3):
        try:
            ledger = Ledger(folder / "19100.ledger", "site")
        except LedgerFull:
            continue
        assert values(ledger) == counted, pages
        back = {}
        try:
            family = ledger.add_family("events", "counter", "Events.", "", ("number",), ())
            for labels in list(family.series)[: len(family.series) // 2]:    # the next one has to renew the file
                back["events", labels] = ledger.cells[family.series[labels]]    # if there is no room for that
                ledger.forget(family, labels)
                back = {}
            for number in range(10_000):
                name = f"{attempt} {number}"
                ledger.cells[ledger.add_series(family, (name,), 1.0)] = number
        except LedgerFull:
            pass
        counted = values(ledger) | back
        ledger.close()
    taken.append(len(counted))
    (folder / "filler").unlink()
    ledger = Ledger(folder / "19100.ledger", "site")
    assert values(ledger) == counted, pages
    ledger.close()
    assert not list(folder.glob("*.damaged")), pages
    assert sum(path.stat().st_blocks for path in folder.glob(".*")) == 0, pages
print(taken[0], taken[-1])
"""


@needs_linux
@needs_root
def test_a_full_file_system_never_kills_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", folder], timeout=30).returncode:
        pytest.skip("mount is not permitted here")
    try:
        done = run_python(CROWDED, str(folder))
    finally:
        subprocess.run(["umount", folder], timeout=30, check=True)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    none, some = map(int, done.stdout.split())
    assert none == 0
    assert some > 1000


def test_a_limit_on_file_sizes_is_an_error_and_no_signal(path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from django_promports.ledger import Ledger, LedgerFull\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n    Ledger(Path(sys.argv[1]), 'site')\nexcept (OSError, LedgerFull) as error:\n    print('refused')\n"
    )

    done = run_python(script, str(path))

    assert done.stdout == "refused\n", done.stderr


def _skip_a_day(path: Path, clock: Clock, *, scrape: bool = True) -> None:
    """Hold the ledger once, without counting, so that the next claim knows what is idle; a day later."""
    clock.now += HOUR
    with opened(path) as ledger:
        clock.now += HOUR
        if scrape:
            ledger.note_scrape(clock.now)
    clock.now += 25 * HOUR


def test_a_series_that_nobody_touches_is_dropped_once_it_was_scraped(path: Path, clock: Clock) -> None:
    with opened(path) as ledger:
        apples = add_counter(ledger)
        for kind in ("idle", "touched"):
            count(ledger, apples, (kind,), 2)
    _skip_a_day(path, clock)
    with opened(path) as ledger:
        known = set(read(ledger))
    with opened(path) as ledger:
        count(ledger, add_counter(ledger), ("touched",), 3)

    assert known == set()
    with opened(path) as ledger:
        assert read(ledger) == {("apples", ("touched",)): [1.5, 3.0]}


def test_a_series_that_is_touched_now_and_then_stays(path: Path, clock: Clock) -> None:
    for _ in range(10):
        with opened(path) as ledger:
            count(ledger, add_counter(ledger), ("daily",), 1)
            clock.now += 30 * HOUR
            ledger.note_scrape(clock.now)

    with opened(path) as ledger:
        assert read(ledger) == {("apples", ("daily",)): [1.5, 10.0]}


@pytest.mark.parametrize(("type_", "bounds"), [("summary", ()), ("histogram", ("0.0", "+Inf"))])
def test_observations_that_sum_up_to_nothing_are_activity(
    type_: str, bounds: tuple[str, ...], path: Path, clock: Clock
) -> None:
    for _ in range(4):
        with opened(path) as ledger:
            family = ledger.add_family("degrees", type_, "Temperatures.", "", (), bounds)
            amounts = (1.0, -1.0) if type_ == "summary" else (-1.0, 1.0)  # observe(-1)
            count(ledger, family, (), *amounts)
            clock.now += 30 * HOUR
            ledger.note_scrape(clock.now)

    with opened(path) as ledger:
        assert [max(values[1:]) for values in read(ledger).values()] == [4.0]


@pytest.mark.parametrize("hours", [1.0, 23.0])
def test_a_series_that_was_touched_lately_stays(hours: float, path: Path, clock: Clock) -> None:
    with opened(path) as ledger:
        count(ledger, add_counter(ledger), ("x",))
    with opened(path):
        pass
    clock.now += hours * HOUR
    with opened(path) as ledger:
        ledger.note_scrape(clock.now)

    with opened(path) as ledger:
        assert read(ledger) == {("apples", ("x",)): [1.5, 1.0]}


def test_a_series_that_was_not_scraped_since_stays(path: Path, clock: Clock) -> None:
    with opened(path) as ledger:
        ledger.note_scrape(clock.now)
        count(ledger, add_counter(ledger), ("x",))
    for _ in range(3):
        _skip_a_day(path, clock, scrape=False)

    with opened(path) as ledger:
        assert read(ledger) == {("apples", ("x",)): [1.5, 1.0]}


def test_the_time_of_the_scrape_survives_a_renewal(path: Path, clock: Clock) -> None:
    with opened(path) as ledger:
        apples = add_counter(ledger)
        count(ledger, apples, ("idle",))
        count(ledger, apples, ("forgotten",))
    with opened(path) as ledger:
        clock.now += HOUR
        ledger.note_scrape(clock.now)
        ledger.forget(ledger.families["apples"], ("forgotten",))
    inode = path.stat().st_ino
    with opened(path):
        assert path.stat().st_ino != inode
    clock.now += 25 * HOUR

    with opened(path) as ledger:
        assert read(ledger) == {}


def test_a_file_stays_small_under_changing_labels(path: Path, clock: Clock) -> None:
    sizes = []
    for day in range(60):
        with opened(path) as ledger:
            family = ledger.add_family("seconds", "histogram", "Seconds.", "", ("path",), ("1.0", "+Inf"))
            for number in range(50):
                count(ledger, family, (f"/{'x' * 200}/{day}/{number}",), 1, 1, 1)
            count(ledger, family, ("always",), 1, 1, 0)
            ledger.note_scrape(clock.now)
        clock.now += 25 * HOUR
        sizes.append(path.stat().st_blocks * 512)

    assert max(sizes[30:]) <= max(sizes[:30]) < 500_000
    with opened(path) as ledger:
        assert read(ledger)["seconds", ("always",)] == [1.5, 60.0, 60.0, 0.0]


@pytest.mark.parametrize("how", ["idle", "forgotten"])
def test_a_file_stays_small_though_a_series_comes_and_goes(how: str, path: Path, clock: Clock) -> None:
    for day in range(450):
        with opened(path) as ledger:
            apples = add_counter(ledger)
            for number in range(10):
                count(ledger, apples, (f"always {number}",))
            if day % 3 == 0:
                count(ledger, apples, ("x" * 2000,))
            elif how == "forgotten":
                ledger.forget(apples, ("x" * 2000,))
            ledger.note_scrape(clock.now)
        clock.now += 25 * HOUR

    assert path.stat().st_blocks * 512 < 250_000  # 450 / 3 records of 2000 bytes would be more
    with opened(path) as ledger:
        assert read(ledger)["apples", ("always 1",)] == [1.5, 450.0]


@pytest.mark.parametrize(
    ("type_", "labelnames", "bounds"),
    [
        ("histogram", ("path",), ("2.0", "+Inf")),
        ("histogram", ("path",), ("+Inf",)),
        ("histogram", ("route",), ("1.0", "+Inf")),
        ("histogram", (), ("1.0", "+Inf")),
        ("summary", ("path",), ()),
    ],
)
def test_a_family_of_another_shape_begins_at_zero(
    type_: str, labelnames: tuple[str, ...], bounds: tuple[str, ...], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as ledger:
        seconds = ledger.add_family("seconds", "histogram", "Seconds.", "", ("path",), ("1.0", "+Inf"))
        count(ledger, seconds, ("/",), 1, 2, 3)
        count(ledger, add_counter(ledger), ("x",))

    with opened(path) as ledger:
        family = ledger.add_family("seconds", type_, "Seconds.", "", labelnames, bounds)
        count(ledger, family, ("y",) * len(labelnames), 1)

    assert warnings(caplog) == ["seconds has other labels or buckets than before; its counts begin at zero."]
    with opened(path) as ledger:
        assert read(ledger) == {
            ("apples", ("x",)): [1.5, 1.0],
            ("seconds", ("y",) * len(labelnames)): [1.5, 1.0] + [0.0] * (family.width - 1),
        }


def test_another_help_text_is_the_same_family(path: Path) -> None:
    with opened(path) as ledger:
        count(ledger, add_counter(ledger), ("x",))

    with opened(path) as ledger:
        family = ledger.add_family("apples", "counter", "Something else.", "", ("kind",), ())

        assert list(family.series) == [("x",)]


def test_the_folder_is_made_for_this_user_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "ledgers"
    before = os.umask(0)
    try:
        make_folder(folder)
    finally:
        os.umask(before)
    make_folder(folder)

    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["symlink", "file", "missing", "group-writable", "world-writable"])
def test_a_folder_that_is_not_safe_is_refused(kind: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "ledgers", tmp_path / "target"
    if kind == "symlink":
        target.mkdir(0o700)
        folder.symlink_to(target)
    elif kind == "file":
        folder.touch()
    elif kind != "missing":
        folder.mkdir()
        folder.chmod(0o770 if kind == "group-writable" else 0o703)

    with pytest.raises(FileNotFoundError if kind == "missing" else PermissionError, match="ledgers"):
        check_folder(folder)
    if kind != "missing":
        with pytest.raises(PermissionError):
            make_folder(folder)


@needs_root
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ledgers"
    folder.mkdir(0o700)
    os.chown(folder, 65534, 65534)

    with pytest.raises(PermissionError, match="belongs to user 65534, not to 0"):
        make_folder(folder)


@needs_linux
@pytest.mark.parametrize(
    ("path", "type_"),
    [("/proc", "proc"), ("/proc/self/status", "proc"), ("/dev/shm", "tmpfs"), ("/dev/shm/a/b/c", "tmpfs")],
)
def test_the_file_system_of_a_path_is_found(path: str, type_: str) -> None:
    assert find_filesystem(Path(path)) == type_


def test_scraped_is_kept_where_the_format_says(path: Path, clock: Clock) -> None:
    with opened(path) as ledger:
        ledger.note_scrape(clock.now)

    with path.open("rb") as file:
        file.seek(SCRAPED_AT)
        assert struct.unpack("=d", file.read(8)) == (clock.now,)
