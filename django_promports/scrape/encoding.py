"""prometheus_client's encoders: their versions, the _created series, and metrics that they cannot encode.

They run code of the site, and they fail as a whole if one label or number cannot be encoded. Here only the series that
has it is left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from django_promports.kinds import KINDS
from django_promports.scrape.pace import Turn

# Samples that prometheus_client encodes in a slice.
FEW_SAMPLES = 16
VERSION = re.compile(r"(?<=version=)[^;,]+")

T = TypeVar("T")


class _Failed(Exception):
    """Code of the site raised what is not an Exception, like SystemExit or gevent's Timeout."""


def call(function: Callable[..., T], *arguments: Any) -> T:
    """Call what may run code of the site. Whatever that raises is an Exception here, so it does not end the thread."""
    try:
        return function(*arguments)
    except Exception:
        raise
    except BaseException as error:
        raise _Failed(type(error).__name__) from error


def bound_versions(accept: str) -> str:
    """Return an Accept header that asks for no newer version than prometheus_client writes.

    prometheus_client labels its text with the version that was asked for, and fails on one that is not a number.
    """

    def bound(version: re.Match[str]) -> str:
        numbers = version[0].strip().split(".")
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            return "0"
        return version[0] if tuple(map(int, numbers)) < (1, 0, 0) else "1.0.0"

    return VERSION.sub(bound, accept)


class _Collected(Collector):
    """Metrics that were collected before."""

    def __init__(self, collected: Iterable[Metric]) -> None:
        self._collected = collected

    def collect(self) -> Iterable[Metric]:
        return self._collected


class Encoder:
    """One format. end: the text after all metrics."""

    def __init__(self, encode: Callable[[Any], bytes], *, with_created: bool) -> None:
        self._encode, self._with_created = encode, with_created
        self.end = encode(_Collected([]))
        self.is_openmetrics = bool(self.end)

    def encode(self, metric: Metric) -> bytes:
        return call(self._encode, _Collected([metric])).removesuffix(self.end)

    def drop_created(self, metric: Metric) -> Metric:
        """Leave the _created series out if they are not wanted."""
        if self._with_created or metric.type not in KINDS or not KINDS[metric.type].has_created:
            return metric
        metric, samples = copy.copy(metric), metric.samples
        metric.samples = [sample for sample in samples if sample.name != f"{metric.name}_created"]
        return metric

    def encode_slowly(self, turn: Turn, metric: Metric, pieces: list[bytes]) -> Generator[None, None, bool]:
        """Encode a metric, in pieces where the format allows it; return whether all of it could be."""
        first, samples = len(pieces), metric.samples
        size = FEW_SAMPLES if self.is_openmetrics else len(samples)
        part = copy.copy(metric)
        try:
            yield from turn.rest()
            part.samples = samples if size == len(samples) else []
            pieces.append(self.encode(part))
            header = len(pieces[-1])
            for begin in range(0, len(samples) if part.samples is not samples else 0, FEW_SAMPLES):
                part.samples = samples[begin : begin + FEW_SAMPLES]
                pieces.append(self.encode(part)[header:])
                yield from turn.rest()
            return True
        except Exception:
            del pieces[first:]
        clean = yield from self._clean(turn, metric)
        pieces.append(self.encode(clean))
        return False

    def _clean(self, turn: Turn, metric: Metric) -> Generator[None, None, Metric]:
        """Return a metric without the series and exemplars that cannot be encoded; its help text is repaired."""
        clean = copy.copy(metric)
        clean.documentation = call(str, metric.documentation).encode(errors="replace").decode()
        good: list[Sample] = []
        bad: set[Any] = set()
        for sample in metric.samples:
            for attempt in (sample, sample._replace(exemplar=None)):
                clean.samples = [attempt]
                with suppress(Exception):
                    self.encode(clean)
                    good.append(attempt)
                    break
            else:
                bad.add(_find_series(sample))
            if turn.is_over():
                yield from turn.rest()
        clean.samples = [sample for sample in good if not bad or _find_series(sample) not in bad]
        return clean


def _find_series(sample: Sample) -> Any:
    """Return what the samples of one series have in common, a histogram's buckets included."""
    return frozenset(item for item in sample.labels.items() if item[0] not in ("le", "quantile"))
