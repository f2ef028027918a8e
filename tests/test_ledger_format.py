"""The file format: its page is enough to read it, old files are continued, and readers never see a wrong number."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import struct
import sys
import threading
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_promports import ledger as ledger_module
from django_promports import space, storage
from django_promports.binding import Binding
from django_promports.layout import CELLS_AT, Layout, LedgerDamaged, hash_site
from django_promports.ledger import Ledger, LedgerFull
from django_promports.reading import Reader, read_status
from tests.commands import run_python
from tests.data.ledgers.freeze import describe, describe_rows, thaw

DATA = Path(__file__).parent / "data" / "ledgers"
SMALL = Layout(size=CELLS_AT + 8 * 512 + 8192, cells=512)
little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="the frozen files are of a little-endian machine")

Values = dict[tuple[str, tuple[str, ...]], list[float]]  # created and values, by family and label values


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "19100.ledger"


def read_by_the_page(path: Path) -> Values:
    """Read a ledger as docs/ledger-format.md says, and nothing else does."""
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        def records(begin: int, end: int) -> dict[int, Any]:
            index, at, found = read(begin, end - begin), 0, {}
            while at + 8 <= len(index):
                size, state = struct.unpack_from("=II", index, at)
                if size == 0 or size % 8 or at + size > len(index):
                    break
                payload = index[at + 8 : at + size]
                checksum = zlib.crc32(payload, size)
                if state == (1 if checksum in (0, 0xFFFFFFFF) else checksum):
                    found[at] = json.loads(payload)
                at += size
            return found

        while True:
            header = read(0, 72)
            magic, version, order = struct.unpack_from("=8sII", header)
            assert (magic, version, order) == (b"promport", 3, 0x01020304)
            assert struct.unpack_from("=I", header, 56)[0] == zlib.crc32(header[:56])
            began = time.monotonic()
            (begin,), (end,) = struct.unpack_from("=Q", header, 64), struct.unpack("=Q", read(1032, 8))
            before = records(begin, end)
            cells = read(4096, begin - 4096)
            after = records(begin, end)
            if time.monotonic() - began > 10:
                continue
            kept = [record for at, record in before.items() if after.get(at) == record]
            families = {number: rest for what, number, *rest in kept if what == "family"}
            newest = {rest[0]: number for number, rest in sorted(families.items())}
            values: Values = {}
            for what, number, *rest in kept:
                if what != "series" or number not in families or newest[families[number][0]] != number:
                    continue
                labelvalues, first = rest
                name, type_, _, _, _, bounds, _ = families[number]
                width = {"counter": 1, "gauge": 1, "summary": 2, "histogram": 1 + len(bounds)}[type_]
                if 8 * (first + 3 + width) <= len(cells):
                    row = struct.unpack_from(f"={3 + width}d", cells, 8 * first)
                    values[name, tuple(labelvalues)] = [row[0], *row[3:]]
            return values


def read_with_reader(path: Path) -> Values:
    reader = Reader(path)
    reading = reader.read()
    reader.close()
    assert reading is not None
    return {
        (name, labels): values for name, (_, series) in reading.families.items() for labels, values in series.items()
    }


def read_ledger(ledger: Ledger) -> Values:
    return {
        (name, labels): [*family.read_created([first]), *ledger.cells[first : first + family.width]]
        for name, family in ledger.families.items()
        for labels, first in family.series.items()
    }


def aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged")


class Clock:
    """Stands in for the module `time` in space.py and ledger.py: no machine lets ten seconds pass within a moment."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(space, "time", clock)
    monkeypatch.setattr(ledger_module, "time", clock)
    return clock


# What a process may do, with the numbers of a family and a series; "wait" lets the quarantine pass.
_steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "count", "forget", "forget", "forget family", "wait", "reopen", "kill"]),
        st.sampled_from([0, 0, 0, 1, 2, 3, 4]),
        st.sampled_from([0, 0, 1, 1, 2, 3, 4, 5, 6]),
    ),
    max_size=60,
)
SHAPES: list[tuple[str, str, tuple[str, ...]]] = [
    ("apples", "counter", ()),
    ("sizes", "summary", ()),
    ("seconds", "histogram", ("1.0", "+Inf")),
    ("temperature", "gauge", ()),
    ("hours", "histogram", ("1.0", "2.0", "3.0", "4.0", "5.0", "+Inf")),
]


class Doer:
    """Does such steps, and knows what must be found."""

    def __init__(self, path: Path, layout: Layout, clock: Clock) -> None:
        self.path, self.layout, self.clock = path, layout, clock
        self.expected: Values = {}
        self.ledger = Ledger(path, "site", layout)

    def do(self, what: str, kind: int, number: int) -> None:
        name, type_, bounds = SHAPES[kind]
        labels = (f"{number}" * (1 + number * 9),)
        family = self.ledger.families.get(name)
        if what == "add":
            with contextlib.suppress(LedgerFull):
                family = self.ledger.add_family(name, type_, "Help.", "", ("x",), bounds)
                if labels not in family.series:
                    self.ledger.add_series(family, labels, 2.0 + number)
                    self.expected[name, labels] = [2.0 + number] + [0.0] * family.width
        elif what == "count" and family is not None and labels in family.series:
            for cell in range(family.width):
                self.ledger.cells[family.series[labels] + cell] += cell + 1
                self.expected[name, labels][1 + cell] += cell + 1
        elif what == "forget" and family is not None:
            self.ledger.forget(family, labels)
            self.expected.pop((name, labels), None)
        elif what == "forget family" and family is not None:
            self.ledger.forget(family)
            self.drop(name)
        elif what == "wait":
            self.clock.now += 10.0
        elif what in ("reopen", "kill"):
            self.ledger.close(seal=what == "reopen")
            self.ledger = Ledger(self.path, "site", self.layout)
            self.drop("temperature")

    def drop(self, name: str) -> None:
        self.expected = {key: values for key, values in self.expected.items() if key[0] != name}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(steps=_steps)
def test_two_readers_and_the_holder_agree_on_any_file(
    steps: list[tuple[str, int, int]], path: Path, clock: Clock
) -> None:
    path.unlink(missing_ok=True)
    doer = Doer(path, SMALL, clock)
    for step in steps:
        doer.do(*step)

    assert read_ledger(doer.ledger) == doer.expected
    assert read_with_reader(path) == doer.expected
    assert read_by_the_page(path) == doer.expected
    doer.ledger.close()
    assert read_by_the_page(path) == doer.expected
    assert not aside(path).exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(steps=_steps, more=_steps)
def test_a_kill_between_any_two_stores_leaves_a_file_that_is_continued(
    steps: list[tuple[str, int, int]], more: list[tuple[str, int, int]], path: Path, clock: Clock
) -> None:
    """Each line of the storage is a moment at which the file is looked at, as a kill would leave it."""
    path.unlink(missing_ok=True)
    doer = Doer(path, SMALL, clock)
    for step in steps:
        doer.do(*step)
    for step in [step for step in more if step[0] in ("add", "forget", "forget family")][:3]:
        before = read_ledger(doer.ledger)
        moments: list[bytes] = []
        _trace(partial(doer.do, *step), partial(_append_content, path, moments))
        after = read_ledger(doer.ledger)
        for number, content in enumerate(dict.fromkeys(moments)):
            killed = path.with_name(f"killed {number}")
            killed.write_bytes(content)
            read = read_by_the_page(killed)
            ledger = Ledger(killed, "site", SMALL)
            found = read_ledger(ledger)
            ledger.close()
            assert not aside(killed).exists(), step
            killed.unlink()
            for key in before.keys() | after.keys() | read.keys() | found.keys():
                allowed = [before.get(key), after.get(key)]
                assert read.get(key) in allowed, (step, key)
                assert key[0] == "temperature" or found.get(key) in allowed, (step, key)
    doer.ledger.close()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(steps=_steps, more=_steps, moment=st.integers(0, 45))
def test_an_exception_between_any_two_stores_costs_only_what_was_interrupted(
    steps: list[tuple[str, int, int]], more: list[tuple[str, int, int]], moment: int, path: Path, clock: Clock
) -> None:
    """A signal handler may raise anywhere."""
    first, *rest = [step for step in more if step[0] not in ("reopen", "kill")] or [("add", 0, 0)]
    _interrupt(path, clock, steps, first, rest, moment)


@pytest.mark.parametrize(
    "step", [("add", 0, 0), ("add", 0, 2), ("add", 1, 0), ("forget", 0, 1), ("forget family", 0, 0)]
)
def test_an_exception_at_any_moment_leaves_a_ledger_that_goes_on(
    step: tuple[str, int, int], path: Path, clock: Clock
) -> None:
    steps = [("add", 0, 1), ("add", 2, 1), ("add", 0, 0), ("forget", 0, 0), ("forget", 2, 1), ("wait", 0, 0)]
    for moment in range(70):
        _interrupt(path, clock, steps, step, [("add", 2, 2), ("count", 2, 2), ("add", 1, 1), ("add", 3, 1)], moment)


def _interrupt(path: Path, clock: Clock, steps: Any, first: Any, rest: Any, moment: int) -> None:
    class Interrupted(Exception):
        pass

    path.unlink(missing_ok=True)
    aside(path).unlink(missing_ok=True)
    doer = Doer(path, SMALL, clock)
    for step in steps:
        doer.do(*step)
    countdown = iter(range(moment))

    def interrupt() -> None:
        if next(countdown, None) is None:
            raise Interrupted

    name = SHAPES[first[1]][0]
    with contextlib.suppress(Interrupted):
        _trace(lambda: doer.do(*first), interrupt)
    if (family := doer.ledger.families.get(name)) is not None:
        doer.ledger.forget(family)
    doer.drop(name)
    for step in rest:
        doer.do(*step)

    def others(values: Values) -> Values:
        return {key: row for key, row in values.items() if key[0] != name}

    assert read_ledger(doer.ledger) == doer.expected
    assert others(read_by_the_page(path)) == others(doer.expected)
    doer.do("reopen", 0, 0)
    assert others(read_ledger(doer.ledger)) == others(doer.expected)
    doer.ledger.close()
    assert not aside(path).exists()


def _append_content(path: Path, moments: list[bytes]) -> None:
    moments.append(path.read_bytes())


def _trace(call: Any, look: Any) -> None:
    """Call, and look between any two lines of the storage."""

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != storage.__file__:
            return None
        if event == "line":
            look()
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(former)


VERSIONS = ("version-2", "version-3")
ENDINGS = ("closed", "killed")


@pytest.fixture
def thawed(path: Path) -> Any:
    def thaw_to(name: str) -> Path:
        thaw(DATA / f"{name}.frozen", path)
        return path

    return thaw_to


def _without_activity(families: dict[str, Any]) -> dict[str, Any]:
    """Leave out when a series was touched, of those that the last holder touched: the next one notes that."""
    for family in families.values():
        for _, cells in family["series"]:
            if cells[2] < 4e9:
                del cells[1:3]
    return families


def _load(name: str) -> Any:
    held = json.loads((DATA / f"{name}.json").read_text())
    for family in held["families"].values():
        family["series"].sort()
    return held


@little_endian
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_frozen_file_is_continued_with_every_number(
    version: str, ending: str, thawed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{version}-{ending}"
    path, held = thawed(name), _load(name)

    ledger = Ledger(path, "site")

    assert _without_activity(describe_rows(ledger)) == _without_activity(held["families"])
    assert ledger.scraped_at == held["settled_at"]
    ledger.close()
    assert not caplog.records
    assert read_by_the_page(path) == read_with_reader(path)
    assert os.listdir(path.parent) == [path.name]


@little_endian
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_reader_reads_a_frozen_file_and_leaves_it_alone(version: str, ending: str, thawed: Any) -> None:
    name = f"{version}-{ending}"
    path, held = thawed(name), _load(name)
    path.chmod(0o400)
    content = path.read_bytes()

    reader = Reader(path)
    reading = reader.read()
    reader.close()

    assert reading is not None
    assert reading.status.site == hash_site("site")
    assert (reading.status.scraped_at, reading.status.opened_at) == (held["settled_at"], held["opened_at"])
    assert read_status(path) == reading.status
    assert reading.status.is_sealed is (ending == "closed")
    assert (reading.status.holder.pid > 0) is (version == "version-3")
    assert describe(reading.families) == {
        name: {
            "family": family["family"],
            "series": [[labels, [cells[0], *cells[3:]]] for labels, cells in family["series"]],
        }
        for name, family in held["families"].items()
    }
    assert path.read_bytes() == content


@little_endian
@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*-damaged-*.frozen")))
def test_a_frozen_file_that_is_damaged_is_set_aside(name: str, thawed: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = thawed(name)
    content = path.read_bytes()

    ledger = Ledger(path, "site")

    assert ledger.families == {}
    ledger.close()
    assert aside(path).read_bytes() == content
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@little_endian
@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*-truncated.frozen")))
def test_a_frozen_file_that_is_cut_off_is_set_aside_and_not_read(
    name: str, thawed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = thawed(name)

    with pytest.raises(LedgerDamaged, match="another version"):
        read_with_reader(path)
    Ledger(path, "site").close()

    assert aside(path).exists()


@little_endian
def test_every_frozen_file_is_in_the_table() -> None:
    table = (DATA / "README.md").read_text()

    for path in DATA.glob("version-*"):
        assert f"`{path.name}`" in table


# A process that converts a file of version 2, and is killed while it does.
CONVERT = """
import sys
from pathlib import Path
from django_promports import storage
from django_promports.ledger import Ledger
import os, signal

lines = iter(range(int(sys.argv[2])))

def trace(frame, event, argument):
    if "django_promports" not in frame.f_code.co_filename:
        return None
    if event == "line" and next(lines, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace

sys.settrace(trace)
ledger = Ledger(Path(sys.argv[1]), "site")
sys.settrace(None)
ledger.close()
print("converted")
"""


@little_endian
def test_a_kill_during_the_conversion_leaves_the_old_file_or_the_new_one(thawed: Any) -> None:
    held = _load("version-2-killed")
    expected = {
        (name, tuple(labels)): [cells[0], *cells[3:]]
        for name, family in held["families"].items()
        for labels, cells in family["series"]
    }
    chance = random.Random(1)
    versions = set()
    for lines in [*sorted(chance.sample(range(1500), 22)), 100_000]:
        path = thawed("version-2-killed")
        done = run_python(CONVERT, str(path), str(lines))

        assert (done.returncode, done.stderr) in ((-9, ""), (0, "")), done.stderr
        versions.add(struct.unpack("=I", path.read_bytes()[8:12])[0])
        assert read_with_reader(path) == expected, lines
        ledger = Ledger(path, "site")
        assert read_ledger(ledger) == expected, lines
        assert ledger.scraped_at == held["settled_at"]
        ledger.close()
        assert os.listdir(path.parent) == [path.name]
    assert versions == {2, 3}


def test_the_holder_is_known_to_readers(path: Path) -> None:
    ledger = Ledger(path, "site")
    reader = Reader(path)
    reading = reader.read()
    ledger.close()

    assert reading is not None
    assert reading.status.holder.pid == os.getpid()
    if sys.platform == "linux":
        assert reading.status.holder.started == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        assert reading.status.holder.namespace == os.stat("/proc/self/ns/pid").st_ino
    assert not reading.status.is_sealed
    reading = reader.read()
    reader.close()
    assert reading is not None
    assert reading.status.is_sealed


def test_a_gauge_has_a_cell_and_its_mode_and_ends_with_its_process(path: Path) -> None:
    ledger = Ledger(path, "site")
    family = ledger.add_family("jobs", "gauge", "Jobs.", "", ("x",), (), "livesum")
    ledger.cells[ledger.add_series(family, ("a",), 1.0)] = 7.0
    reader = Reader(path)
    reading = reader.read()
    ledger.close()

    assert reading is not None
    record, series = reading.families["jobs"]
    assert (record.type, record.mode, series) == ("gauge", "livesum", {("a",): [1.0, 7.0]})
    Ledger(path, "site").close()
    reading = reader.read()
    reader.close()
    assert reading is not None
    assert reading.families == {}


def test_a_reader_follows_the_path_to_the_file_that_is_there(path: Path) -> None:
    reader = Reader(path)
    assert reader.read() is None
    path.touch()
    assert reader.read() is None
    for name in ("apples", "pears"):
        path.unlink()
        ledger = Ledger(path, "site")
        ledger.add_series(ledger.add_family(name, "counter", "", "", (), ()), (), 1.0)
        reading = reader.read()
        assert reading is not None
        assert list(reading.families) == [name]
        ledger.close()
    path.write_bytes(b"x" * 5000)
    with pytest.raises(LedgerDamaged):
        reader.read()
    path.unlink()
    assert reader.read() is None
    reader.close()


def test_a_reader_takes_a_bad_tail_as_not_written_yet(path: Path) -> None:
    ledger = Ledger(path, "site", SMALL)
    family = ledger.add_family("apples", "counter", "", "", ("x",), ())
    for number in range(5):
        ledger.add_series(family, (f"{number}",), 1.0)
    ledger.close(seal=False)
    content = bytearray(path.read_bytes())
    (end,) = struct.unpack_from("=Q", content, 1032)
    whole = read_by_the_page(path)
    assert len(whole) == 5
    for at in range(end - 24, end):
        torn = content.copy()
        torn[at:end] = os.urandom(end - at)
        path.write_bytes(torn)
        assert set(read_with_reader(path)) >= set(list(whole)[:4])
        assert read_with_reader(path).items() <= whole.items()


# A process that makes series, counts in them and forgets them as fast as it can. What a series' label says is what is
# counted there first, so that a reader sees whether a number is another's.
CHURN = """
import sys, time
from pathlib import Path
from django_promports import storage
from django_promports.ledger import Ledger

path, quarantine = Path(sys.argv[1]), float(sys.argv[2])
storage.QUARANTINE_SECONDS = quarantine
ledger = Ledger(path, "site")
end, number = time.monotonic() + float(sys.argv[3]), 0
living = []
while time.monotonic() < end:
    number += 1
    kind = number % 3
    type_, bounds = [("counter", ()), ("summary", ()), ("histogram", ("1.0", "+Inf"))][kind]
    family = ledger.add_family(f"family_{kind}_{number // 3000 % 2}", type_, "", "", ("x",), bounds)
    first = ledger.add_series(family, (f"{number}",), float(number))
    for _ in range(2):
        for cell in range(first, first + family.width):
            ledger.cells[cell] += number
    living.append((family, f"{number}"))
    if number % 3000 == 0:
        for name in [name for name in ledger.families if name.endswith(str((number // 3000 + 1) % 2))]:
            ledger.forget(ledger.families[name])
    elif number % 700 == 0 and quarantine < 1:
        ledger.close(seal=number % 2 == 0)
        ledger = Ledger(path, "site")
        living = []
        for family in list(ledger.families.values()):
            ledger.forget(family)
    elif len(living) > 20:
        family, label = living.pop(0)
        ledger.forget(family, (label,))
print(number)
"""


@pytest.mark.parametrize("read", [read_with_reader, read_by_the_page])
def test_a_reader_beside_a_writer_sees_no_number_of_another_series(read: Any, path: Path) -> None:
    ledger = Ledger(path, "site")
    ledger.close()
    done: list[Any] = []
    writer = threading.Thread(target=lambda: done.append(run_python(CHURN, str(path), "0.5", "6")))
    writer.start()
    readings = seen = 0
    while writer.is_alive():
        began = time.monotonic()
        values = read(path)
        if time.monotonic() - began > 0.5:  # the writer's quarantine is that short here, to have much used again
            continue
        readings += 1
        seen += len(values)
        for (_, (label,)), (created, *numbers) in values.items():
            assert created == float(label)
            assert {number / float(label) for number in numbers} <= {0.0, 1.0, 2.0}, (label, numbers)
    writer.join()

    assert done[0].returncode == 0, done[0].stderr
    assert int(done[0].stdout) > 5000
    assert readings > 50
    assert seen > 100


def test_cells_rest_before_they_are_used_again(path: Path, clock: Clock) -> None:
    ledger = Ledger(path, "site", SMALL)
    family = ledger.add_family("apples", "counter", "", "", ("x",), ())
    old = ledger.add_series(family, ("old",), 1.0)
    ledger.cells[old] = 5.0
    for number in range(20):  # enough for the file to stay when it is opened
        ledger.add_series(family, (f"{number}",), 1.0)
    ledger.forget(family, ("old",))
    for moment, label in ((1000.0, "a"), (1009.9, "b")):
        clock.now = moment
        assert ledger.add_series(family, (label,), 1.0) != old
        assert ledger.cells[old] == 5.0
    ledger.close()

    ledger = Ledger(path, "site", SMALL)  # what lies free then may have been forgotten a moment ago
    family = ledger.families["apples"]
    clock.now = 1019.8
    assert ledger.add_series(family, ("c",), 1.0) != old
    clock.now = 1020.0
    assert ledger.add_series(family, ("d",), 1.0) == old
    assert ledger.cells[old] == 0.0
    ledger.close()


def test_labels_that_come_and_go_do_not_fill_a_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fast:  # a second for each hundred removals
        now = 0.0

        @classmethod
        def monotonic(cls) -> float:
            cls.now += 0.01
            return cls.now

    monkeypatch.setattr(space, "time", Fast)
    ledger = Ledger(path, "site")
    family = ledger.add_family("seconds", "histogram", "", "", ("x",), tuple(f"{n}.0" for n in range(15)))
    for number in range(110_375):
        first = ledger.add_series(family, (f"{number}",), 1.0)
        ledger.cells[first] += 1
        ledger.forget(family, (f"{number}",))
    ledger.close()

    assert path.stat().st_blocks * 512 < 600_000
    assert read_by_the_page(path) == {}


def test_a_burst_of_removals_at_full_speed_fits(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from prometheus_client import CollectorRegistry, Histogram

    registry = CollectorRegistry()
    binding = Binding(registry)
    binding.open(Ledger(path, "site"))
    histogram = Histogram("seconds", "Seconds.", ["x"], registry=registry)
    for number in range(5_000):
        histogram.labels(f"{number}").observe(1)
        histogram.remove(f"{number}")
    histogram.labels("last").observe(1)
    binding.close()

    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert list(read_by_the_page(path)) == [("seconds", ("last",))]
