"""The random walk finds no fault in the code, and finds each of these planted faults."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from django_promports.binding import Binding
from django_promports.ledger import Family
from django_promports.scrape.exposition import Exposition
from django_promports.scrape.templates import Section
from django_promports.unmade import Unmade
from django_promports.values import CellValue
from tests.walk import Fault, walk


def test_walks_find_no_fault() -> None:
    first = random.randrange(10**9)  # different in each run; a fault names it
    for seed in range(first, first + 40):
        walk(seed)


def look_families_up_by_name(patch: pytest.MonkeyPatch) -> None:
    """Listed series are rendered with the family that has their name in the ledger by then."""
    expose = Exposition._expose_unmade

    def expose_by_name(self: Exposition, scrape: Any, family: Family) -> Iterator[None]:
        ledger = self._binding.ledger
        now = ledger.families.get(family.record.name, family) if ledger else family
        yield from expose(self, scrape, dataclasses.replace(now, series=family.series))

    patch.setattr(Exposition, "_expose_unmade", expose_by_name)


def trust_the_created_times_of_a_block(patch: pytest.MonkeyPatch) -> None:
    """A rebuilt block has new created times, but its templates have the old ones."""
    put = Section._put

    def put_and_guess(section: Any, blocks: list[Any], child: Any, template: bytes, created: Any) -> None:
        put(section, blocks, child, template, getattr(child, "_created", created) if created else created)

    patch.setattr(Section, "_put", put_and_guess)


def take_set_for_a_reset(patch: pytest.MonkeyPatch) -> None:
    """Treat every set() as the reset of a counter."""
    set_ = CellValue.set

    def set_and_begin(value: CellValue, number: float, timestamp: float | None = None) -> None:
        set_(value, number)
        value.set_created(time.time())

    patch.setattr(CellValue, "set", set_and_begin)


def expose_what_came_meanwhile(patch: pytest.MonkeyPatch) -> None:
    """Also render metrics that were created since the scrape began."""
    expose = Exposition._expose_collector

    def expose_both(self: Exposition, scrape: Any, collector: Any) -> Iterator[None]:
        yield from expose(self, scrape, collector)
        now = [one for one in self._binding.registry._collector_to_names if one._name == collector._name]  # type: ignore[attr-defined]
        if now and now[0] is not collector:
            yield from expose(self, scrape, now[0])

    patch.setattr(Exposition, "_expose_collector", expose_both)


def keep_what_only_the_ledger_has(patch: pytest.MonkeyPatch) -> None:
    """Removing a series forgets only series that this process has created."""
    patch.setattr(Binding, "forget_unmade", lambda self, metric, concerns: None)


def keep_the_created_time_in_memory(patch: pytest.MonkeyPatch) -> None:
    """Keep the time of a reset only in memory."""
    patch.setattr(CellValue, "set_created", lambda self, moment: None)


def list_a_series_that_was_made_as_unmade_too(patch: pytest.MonkeyPatch) -> None:
    attach = Binding._attach

    def attach_and_keep(self: Binding, metric: Any, help_: str, labelvalues: Any, child: Any) -> None:
        unmade = self._unmade.get(metric._name)
        kept = dict(unmade.series) if unmade else {}
        attach(self, metric, help_, labelvalues, child)
        if unmade and labelvalues in kept and self._families[metric] is unmade.family:
            self._unmade[metric._name] = Unmade(unmade.family, kept)

    patch.setattr(Binding, "_attach", attach_and_keep)
    patch.setattr(Exposition, "_list", _list_both)


def _list_both(self: Exposition, metric: Any, unmade: Any) -> tuple[list[Any], list[Any]]:
    made = metric._metrics if metric._labelnames else {(): metric}
    return list(made.values()), list(unmade.series.items()) if unmade else []


@pytest.mark.parametrize(
    ("plant", "first"),
    [
        (look_families_up_by_name, 90),
        (trust_the_created_times_of_a_block, 0),
        (take_set_for_a_reset, 0),
        (expose_what_came_meanwhile, 0),
        (keep_what_only_the_ledger_has, 0),
        (keep_the_created_time_in_memory, 0),
        (list_a_series_that_was_made_as_unmade_too, 0),
    ],
)
def test_a_planted_fault_is_found(plant: Any, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds are chosen to be fast: of 120 walks, 2 find the rarest of these faults, and 57 the most common."""
    plant(monkeypatch)
    with pytest.raises(Fault):
        walk_on(first)


def walk_on(first: int) -> None:
    for seed in range(first, first + 200):
        walk(seed)
