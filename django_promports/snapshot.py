"""Snapshots: series that were read from ledgers, in the form in which an open ledger has them, to be exposed."""

from __future__ import annotations

import math
from array import array

from django_promports.family import Family
from django_promports.layout import STATE, FamilyRecord, Labels
from django_promports.reading import Families


def keep(families: Families) -> dict[str, Family]:
    """Return families with these series, by name. Gauges are left out: they describe a process that has ended.

    Numbers that are not finite are zero, as for the next holder of the ledger.
    """
    return {name: _keep(*family) for name, family in families.items() if family[0].type != "gauge"}


def _keep(record: FamilyRecord, series: dict[Labels, list[float]]) -> Family:
    cells, firsts = array("d"), {}
    for labelvalues, (created, *values) in series.items():
        cells.extend([created, *[0.0] * (STATE - 1)])
        firsts[labelvalues] = len(cells)
        cells.extend(value if math.isfinite(value) else 0.0 for value in values)
    return Family(record, firsts, memoryview(cells), 0)
