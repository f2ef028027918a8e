"""Unmade series: those that the ledger has from a predecessor and that this process has not made yet.

They are exposed all the same. Django imports most metrics at the first request, and a worker may never get one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, metrics
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from django_promports.children import Labels
from django_promports.kinds import KINDS, Kind, find_counted
from django_promports.ledger import Family


class Unmade(NamedTuple):
    """The unmade series of a family: the cell of the first value of each, by label values.

    A series leaves once this process has made it and the child has all of its number. So a reader that lists these
    first and the metric's children afterwards finds each series at least once. Where it finds it twice, this entry is
    the one with all of the number.
    """

    family: Family
    series: dict[Labels, int]

    def are_of(self, collector: Any) -> bool:
        """Whether they are series of this collector, not of another one of its name."""
        kind = find_counted(collector)
        return kind is not None and read_shape(kind, collector) == self.family.record.shape

    def fit(self, owners: dict[str, Any]) -> bool:
        """Whether no other collector has a name of theirs."""
        return all(name not in owners or self.are_of(owners[name]) for name in sample_names(self.family))


def read_shape(kind: Kind, metric: Any) -> tuple[str, Labels, Labels]:
    """Return the shape that the family of a metric must have."""
    return metric._type, tuple(metric._labelnames), kind.read_bounds(metric)


def sample_names(family: Family) -> set[str]:
    """Return the names that a family's metric takes in a registry."""
    return {family.record.name + suffix for suffix in KINDS[family.record.type].suffixes}


def make_metric(family: Family) -> Metric:
    """Return a metric for the samples of a family's series."""
    record = family.record
    return Metric(record.name, record.help, record.type, record.unit)


def add_samples(metric: Metric, family: Family, series: dict[Labels, int], names: frozenset[str] | None) -> None:
    """Give a metric the samples of unmade series, in the place of those that it has of them already.

    names: of the samples that are wanted, if not all are.
    """
    try:
        samples = _list_samples(family, series, names)
    except ValueError:  # the ledger was closed, or the family forgotten
        return
    if samples:
        metric.samples = [
            sample
            for sample in metric.samples
            if tuple(sample.labels.get(name, "") for name in family.record.labelnames) not in series
        ]
        metric.samples += samples


def merge(
    registry: CollectorRegistry,
    unmade_by_name: dict[str, Unmade],
    collect: Callable[[], Iterable[Metric]],
    names: frozenset[str] | None,
) -> Iterator[Metric]:
    """Yield the metrics that are collected from a registry, and unmade series.

    names: of the samples that are wanted, if not all are.
    """
    left = {name: unmade._replace(series=unmade.series.copy()) for name, unmade in unmade_by_name.items()}
    taken = registry._names_to_collectors.copy()
    for metric in collect():
        unmade = left.pop(metric.name, None)
        if unmade is not None and unmade.are_of(registry._names_to_collectors.get(metric.name)):
            add_samples(metric, *unmade, names)
        yield metric
    for unmade in left.values():
        if unmade.fit(taken):
            metric = make_metric(unmade.family)
            add_samples(metric, *unmade, names)
            if metric.samples:
                yield metric


def _list_samples(family: Family, series: dict[Labels, int], names: frozenset[str] | None) -> list[Sample]:
    record = family.record
    kind, samples = KINDS[record.type], []
    for labelvalues, first in series.items():
        labels = dict(zip(record.labelnames, labelvalues, strict=True))
        values, (created,) = memoryview(family.read([first])).cast("d").tolist(), family.read_created([first])
        if family.series.get(labelvalues) != first:  # removed since, and its cells may belong to another series by now
            continue
        numbers = kind.list_numbers(values, record.bounds)
        if kind.has_created and metrics._use_created:
            numbers.append(("_created", {}, created))
        samples += [
            Sample(record.name + suffix, {**labels, **more}, value)
            for suffix, more, value in numbers
            if not names or record.name + suffix in names
        ]
    return samples
