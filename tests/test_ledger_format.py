"""The file format: docs/ledger-format.md is enough to read it, old files are continued, and readers see no wrong number."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_promports import ledger as ledger_module
from django_promports import space, storage
from django_promports.layout import CELLS_AT, LAYOUT, STATE, Layout, LedgerDamaged, hash_site
from django_promports.ledger import Ledger, LedgerFull
from django_promports.reading import Reader, is_sealed, read_opening
from tests.commands import run_python
from tests.data.ledgers.freeze import thaw

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
        (name, labels): [ledger.cells[first], *ledger.cells[first + STATE : first + STATE + family.width]]
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
        st.integers(0, 4),
        st.integers(0, 6),
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
                self.ledger.cells[family.series[labels] + STATE + cell] += cell + 1
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


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(steps=_steps)
def test_two_readers_and_the_holder_agree_on_any_file(steps: list[tuple[str, int, int]], path: Path, clock: Clock) -> None:
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


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(steps=_steps, last=st.lists(_steps.flatmap(st.just), min_size=1, max_size=1))
def test_a_kill_between_any_two_stores_leaves_a_file_that_is_continued(
    steps: list[tuple[str, int, int]], last: list[list[tuple[str, int, int]]], path: Path, clock: Clock
) -> None:
    """Each line of the storage is a moment at which the file is looked at, as a kill would leave it."""
    path.unlink(missing_ok=True)
    doer = Doer(path, SMALL, clock)
    for step in steps:
        doer.do(*step)
    for step in [step for step in last[0] if step[0] not in ("reopen", "kill")][:3]:
        before = read_ledger(doer.ledger)
        moments: list[bytes] = []
        _trace(lambda step=step: doer.do(*step), lambda: moments.append(path.read_bytes()))  # type: ignore[misc]
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
            # What is not concerned is as it was; what is, was, will be, or is just made.
            for key in before.keys() | after.keys() | found.keys():
                allowed = [before.get(key), after.get(key)]
                if step[0] == "count":
                    continue
                assert read.get(key) in allowed, (step, key)
                assert key[0] == "temperature" or found.get(key) in allowed, (step, key)
            assert read.keys() <= before.keys() | after.keys()
    doer.ledger.close()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(steps=_steps, more=_steps, moment=st.integers(0, 60))
def test_an_exception_between_any_two_stores_costs_only_what_was_interrupted(
    steps: list[tuple[str, int, int]], more: list[tuple[str, int, int]], moment: int, path: Path, clock: Clock
) -> None:
    """A signal handler may raise anywhere."""

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

    first, *rest = [step for step in more if step[0] not in ("reopen", "kill")] or [("add", 0, 0)]
    name, labels = SHAPES[first[1]][0], (f"{first[2]}" * (1 + first[2] * 9),)
    try:
        _trace(lambda: doer.do(*first), interrupt)
    except Interrupted:
        # One of the two; which, the holder knows.
        known = read_ledger(doer.ledger)
        concerned = {key for key in doer.expected.keys() | known.keys() if key[0] == name}
        for key in concerned:
            doer.expected.pop(key, None)
            family = doer.ledger.families.get(name)
            if family is not None and first[0] != "count":
                doer.ledger.forget(family, key[1])
        if (name, labels) in doer.expected:
            del doer.expected[name, labels]
        if (family := doer.ledger.families.get(name)) is not None:
            doer.ledger.forget(family)
    for step in rest:
        doer.do(*step)
    expected = doer.expected
    assert read_ledger(doer.ledger) == expected
    doer.do("reopen", 0, 0)
    assert {key: value for key, value in read_ledger(doer.ledger).items() if key in doer.expected} == doer.expected
    doer.ledger.close()
    assert not aside(path).exists()


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
