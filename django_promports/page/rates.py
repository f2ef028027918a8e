"""Rates: what workers did per second, from the counts of two moments; the arithmetic under the plots of the page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from django_promports.activity import KEPT_SECONDS, SAMPLE_SECONDS, Sample

# "Now" is the mean over so many seconds, and what is shorter than a moment has no mean.
NOW_SECONDS = 10.0
MOMENT_SECONDS = 1.0


class Rate(NamedTuple):
    """Means of the time between two moments, per second; latency is in seconds, and None where nothing was answered."""

    ago: float
    until: float
    requests: float
    answered: float
    latency: float | None


def measure(older: Sample, newer: Sample) -> Rate | None:
    """Return what happened between two samples; None if they are too close, or of different counts."""
    seconds, requests = older.ago - newer.ago, newer.requests - older.requests
    answered, spent = newer.answered - older.answered, newer.seconds - older.seconds
    if seconds < MOMENT_SECONDS or requests < 0 or answered < 0 or spent < 0:
        return None
    latency = spent / answered if answered else None
    return Rate(older.ago, newer.ago, requests / seconds, answered / seconds, latency)


def measure_now(samples: Sequence[Sample]) -> Rate | None:
    """Return what a process does now: the mean of the last seconds, or of as many as it has."""
    for older in reversed(samples):
        if older.ago - samples[-1].ago >= NOW_SECONDS:
            return measure(older, samples[-1])
    return measure(samples[0], samples[-1]) if samples else None


def measure_all(samples: Sequence[Sample]) -> list[Rate]:
    """Return what a process did from sample to sample, oldest first."""
    # The last step has only begun: a few requests more or less would make a peak of it.
    steps = [pair for pair in pairwise(samples) if pair[0].ago - pair[1].ago > SAMPLE_SECONDS / 2]
    return [rate for older, newer in steps if (rate := measure(older, newer))]


def add_up(many: Sequence[Sequence[Rate]]) -> list[Rate]:
    """Return what all processes did together, in the steps of the samples."""
    steps = int(KEPT_SECONDS / SAMPLE_SECONDS)
    current: dict[int, list[Rate]] = {}  # by the step in whose beginning they were
    for rate in chain(*many):
        for step in range(int(rate.until / SAMPLE_SECONDS) + 1, min(int(rate.ago / SAMPLE_SECONDS), steps) + 1):
            current.setdefault(step, []).append(rate)
    return [
        Rate(step * SAMPLE_SECONDS, (step - 1) * SAMPLE_SECONDS, *mean(current[step]))
        for step in sorted(current, reverse=True)
    ]


def mean(rates: Sequence[Rate]) -> tuple[float, float, float | None]:
    """Return the requests and answers per second of all, and the latency, to which each adds as much as it answers."""
    answered = sum(rate.answered for rate in rates)
    spent = sum(rate.answered * (rate.latency or 0.0) for rate in rates)
    return sum(rate.requests for rate in rates), answered, spent / answered if answered else None
