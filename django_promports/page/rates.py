"""Rates: requests per second and latency between two samples; the arithmetic of the page's plots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from django_promports.activity import KEPT_SECONDS, SAMPLE_SECONDS, Sample

# "Now" is the mean over NOW_SECONDS. Less than MOMENT_SECONDS is too short for a mean.
NOW_SECONDS = 10.0
MOMENT_SECONDS = 1.0


class Rate(NamedTuple):
    """Means between two samples, per second. latency: in seconds; None if nothing was answered."""

    ago: float
    until: float
    requests: float
    answered: float
    latency: float | None


def measure(older: Sample, newer: Sample) -> Rate | None:
    """Return the rate between two samples; None if they are too close, or if a count fell in between."""
    seconds, requests = older.ago - newer.ago, newer.requests - older.requests
    answered, spent = newer.answered - older.answered, newer.seconds - older.seconds
    if seconds < MOMENT_SECONDS or requests < 0 or answered < 0 or spent < 0:
        return None
    latency = spent / answered if answered else None
    return Rate(older.ago, newer.ago, requests / seconds, answered / seconds, latency)


def measure_now(samples: Sequence[Sample]) -> Rate | None:
    """Return the current rate of a process: over NOW_SECONDS, or over as many seconds as there are samples of."""
    for older in reversed(samples):
        if older.ago - samples[-1].ago >= NOW_SECONDS:
            return measure(older, samples[-1])
    return measure(samples[0], samples[-1]) if samples else None


def measure_all(samples: Sequence[Sample]) -> list[Rate]:
    """Return the rates of a process from sample to sample, oldest first."""
    # The last step is incomplete: a few requests more or less would show as a peak.
    steps = [pair for pair in pairwise(samples) if pair[0].ago - pair[1].ago > SAMPLE_SECONDS / 2]
    return [rate for older, newer in steps if (rate := measure(older, newer))]


def add_up(many: Sequence[Sequence[Rate]]) -> list[Rate]:
    """Return the rates of all processes together, one for each sample interval."""
    steps = int(KEPT_SECONDS / SAMPLE_SECONDS)
    current: dict[int, list[Rate]] = {}  # by step: the rates that cover its beginning
    for rate in chain(*many):
        for step in range(int(rate.until / SAMPLE_SECONDS) + 1, min(int(rate.ago / SAMPLE_SECONDS), steps) + 1):
            current.setdefault(step, []).append(rate)
    return [
        Rate(step * SAMPLE_SECONDS, (step - 1) * SAMPLE_SECONDS, *mean(current[step]))
        for step in sorted(current, reverse=True)
    ]


def mean(rates: Sequence[Rate]) -> tuple[float, float, float | None]:
    """Return the sums of requests and answers per second, and the mean latency, weighted by answers."""
    answered = sum(rate.answered for rate in rates)
    spent = sum(rate.answered * (rate.latency or 0.0) for rate in rates)
    return sum(rate.requests for rate in rates), answered, spent / answered if answered else None
