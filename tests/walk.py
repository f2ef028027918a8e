"""A random walk over the operations of a site and its scrapers: python -m tests.walk [SEED [WALKS]]

Processes of the site count in a ledger, one after the other. The same operations are applied to a twin: a plain
prometheus_client registry that outlives them. A scrape must show what the twin shows; a scrape with operations in its
middle must show what the twin showed at some moment meanwhile. Names, labels and blocks are few and small, so that
operations collide, and each walk prefers some of them. A walk is determined by its seed: it fails at the same step.
"""

from __future__ import annotations

import contextlib
import gzip
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client import metrics as prometheus_metrics
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from django_promports.binding import Binding
from django_promports.ledger import Ledger
from django_promports.scrape import encoding, pace, packing
from django_promports.scrape.exposition import Exposition
from django_promports.values import CellValue

STEPS = 200
NAMES = ("a", "b", "c")
VALUES = ("p", "q", "r", "s", "t")
SHAPES: list[tuple[type, list[str], dict[str, Any]]] = [
    (Counter, [], {}),
    (Counter, ["x"], {}),
    (Counter, ["x"], {}),
    (Counter, ["x"], {}),
    (Counter, ["y"], {}),
    (Counter, ["x", "y"], {}),
    (Summary, ["x"], {}),
    (Histogram, [], {"buckets": [1, 2]}),
    (Histogram, ["x"], {"buckets": [1, 2]}),
    (Histogram, ["x"], {"buckets": [1, 3]}),
    (Histogram, ["x"], {"buckets": [-1, 1, 2, 3]}),
    (Gauge, ["x"], {}),
]
FORMATS = ("", "application/openmetrics-text;version=1.0.0")
Samples = dict[str, str]  # texts of values and exemplars, by names and labels


class Fault(AssertionError):
    """A scrape differs from the twin."""


class Clock:
    now = 1e9

    def time(self) -> float:
        return self.now


class Made(NamedTuple):
    """A metric of the site, with its twin."""

    ours: Any
    twin: Any


class Scrape(NamedTuple):
    """A scrape that has begun, and what the twin has shown since."""

    steps: Generator[None, None, tuple[list[tuple[str, str]], bytes]]
    accept: str
    moments: list[Samples]


class Walk:
    def __init__(self, seed: int, folder: Path, clock: Clock) -> None:
        self.chance = random.Random(seed)
        self.names = NAMES[: self.chance.randrange(1, 4)]
        self.shapes = self.chance.choices(SHAPES, k=self.chance.randrange(1, 5))
        self.path = folder / "1.ledger"
        self.clock = clock
        self.twins = CollectorRegistry()
        self.scrapes: list[Scrape] = []
        self.log: list[str] = []
        self.start()

    def start(self) -> None:
        self.registry = CollectorRegistry()
        self.binding = Binding(self.registry)
        self.binding.open(Ledger(self.path, "walk"))
        self.ours = Exposition(self.binding)
        self.made: dict[str, Made] = {}
        self.dropped: list[Made] = []

    def run(self, steps: int) -> None:
        operations: dict[Callable[[], object], int] = {
            self.make: 12,
            self.count: 20,
            self.put: 4,
            self.reset: 8,
            self.remove: 8,
            self.remove_by_labels: 2,
            self.clear: 2,
            self.unregister: 4,
            self.register_again: 3,
            self.scrape: 15,
            self.scrape_some: 3,
            self.begin: 8,
            self.go_on: 20,
            self.end: 5,
            self.restart: 4,
            self.stop_and_start: 2,
        }
        for operation in list(operations)[2:]:
            operations[operation] *= self.chance.choice([0, 1, 1, 4])
        try:
            for operation in self.chance.choices(list(operations), list(operations.values()), k=steps):
                self.clock.now += 1
                self.log.append(operation.__name__)
                operation()
                moment = show(self.twins, FORMATS[1])
                for scrape in self.scrapes:
                    scrape.moments.append(moment)
            while self.scrapes:
                self.end()
        finally:
            self.abandon()
            self.binding.close()

    # --- what the site does

    def make(self) -> None:
        name = self.chance.choice(self.names)
        if name in self.made:
            return
        cls, labelnames, more = shape = self.chance.choice(self.shapes)
        self.log[-1] += f" {name} {cls.__name__} {labelnames} {more}"
        twins: list[Any] = list(self.twins._collector_to_names)
        twin = next((twin for twin in twins if twin._name == name), None)
        if twin is not None and twin.shape != shape:
            self.twins.unregister(twin)
            twin = None
        ours = cls(name, "Help.", labelnames, registry=self.registry, **more)
        if twin is None:
            twin = cls(name, "Help.", labelnames, registry=self.twins, **more)
            twin.shape = shape
        self.made[name] = Made(ours, twin)

    def pick(self, *classes: type) -> tuple[Any, ...] | None:
        """Return a random child with its twin."""
        fitting = [made for made in self.made.values() if not classes or isinstance(made.ours, classes)]
        if not fitting:
            return None
        made = self.chance.choice(fitting)
        labels = self.pick_labels(made)
        return tuple(metric.labels(*labels) if labels else metric for metric in made)

    def pick_labels(self, made: Made) -> list[str]:
        labels = [self.chance.choice(VALUES) for _ in made.ours._labelnames]
        self.log[-1] += f" {made.ours._name} {labels}"
        return labels

    def pick_labelled(self) -> Made | None:
        labelled = [made for made in self.made.values() if made.ours._labelnames]
        return self.chance.choice(labelled) if labelled else None

    def count(self) -> None:
        amount = self.chance.choice([0, 0.5, 1, 1.5, 2.5, 7])
        exemplar = {"trace_id": str(amount)} if self.chance.random() < 0.1 else None
        for child in self.pick() or ():
            if isinstance(child, Counter):
                child.inc(amount, exemplar)
            elif isinstance(child, Gauge):
                child.set(amount)
            elif isinstance(child, Histogram):
                child.observe(amount, exemplar)
            else:
                child.observe(amount)

    def put(self) -> None:
        """Copy numbers from elsewhere into a metric, through private attributes of prometheus_client."""
        number = self.chance.choice([0, 0, 1, 2, 123])
        which = self.chance.randrange(4)
        for child in self.pick() or ():
            if isinstance(child, Histogram):
                for value in (child._sum, *child._buckets)[which : which + 3]:
                    value.set(number)
            elif isinstance(child, Summary):
                (child._sum, child._count)[which % 2].set(number)
            else:
                child._value.set(number)

    def reset(self) -> None:
        for child in self.pick(Counter) or ():
            child.reset()

    def remove(self) -> None:
        if made := self.pick_labelled():
            labels = self.pick_labels(made)
            for metric in made:
                metric.remove(*labels)

    def remove_by_labels(self) -> None:
        if made := self.pick_labelled():
            labels = dict(zip(made.ours._labelnames[:1], self.pick_labels(made), strict=False))
            for metric in made:
                metric.remove_by_labels(labels)

    def clear(self) -> None:
        if made := self.pick_labelled():
            for metric in made:
                metric.clear()

    def unregister(self) -> None:
        if self.made:
            made = self.made.pop(self.chance.choice(list(self.made)))
            self.log[-1] += f" {made.ours._name}"
            self.registry.unregister(made.ours)
            self.twins.unregister(made.twin)
            for labels in set(getattr(made.twin, "_metrics", ())) - set(getattr(made.ours, "_metrics", ())):
                made.twin.remove(*labels)  # which only the ledger had
            self.dropped.append(made)

    def register_again(self) -> None:
        if self.dropped and self.dropped[-1].ours._name not in self.made:
            made = self.dropped.pop()
            name = made.ours._name
            for twin in list(self.twins._collector_to_names):
                if twin._name == name:  # type: ignore[attr-defined]
                    return  # which the ledger still has: then the numbers of both would be one
            self.log[-1] += f" {name}"
            self.registry.register(made.ours)
            self.twins.register(made.twin)
            self.made[name] = made

    def restart(self) -> None:
        is_killed = self.chance.random() < 0.5
        self.log[-1] += " after a kill" * is_killed
        self.abandon()
        if is_killed and self.binding.ledger is not None:
            self.binding.ledger.close(seal=False)
        else:
            self.binding.close()
        twins: list[Any] = list(self.twins._collector_to_names)
        for twin in twins:
            if isinstance(twin, Gauge):
                self.twins.unregister(twin)
                continue
            for child in twin._metrics.values() if twin._labelnames else [twin]:
                for value in [child._value] if isinstance(child, Counter) else getattr(child, "_buckets", ()):
                    value._exemplar = None
        self.start()
        if self.chance.random() < 0.5:
            self.begin()

    def stop_and_start(self) -> None:
        self.binding.close()
        for scrape in self.scrapes:
            check_form(drain(scrape.steps), scrape.accept)  # its numbers cannot be compared: the ledger was closed
        self.scrapes.clear()
        self.binding.open(Ledger(self.path, "walk"))

    # --- what scrapers do

    def scrape(self) -> None:
        accept, encoding = self.chance.choice(FORMATS), self.chance.choice(["", "gzip"])
        text = drain(self.ours.render(accept, encoding, ()))
        check_form(text, accept)
        compare(read(text), [show(self.twins, accept)])

    def scrape_some(self) -> None:
        accept = self.chance.choice(FORMATS)
        names = {
            f"{self.chance.choice(NAMES)}{suffix}"
            for suffix in self.chance.sample(["", "_total", "_created", "_bucket", "_sum", "_count"], 3)
        }
        found = read(drain(self.ours.render(accept, "", sorted(names))))
        shown = show(self.twins, accept)
        compare(found, [{key: value for key, value in shown.items() if key.partition("{")[0] in names}])

    def begin(self) -> None:
        accept = self.chance.choice(FORMATS)
        steps = self.ours.render(accept, self.chance.choice(["", "gzip"]), ())
        self.scrapes.append(Scrape(steps, accept, [show(self.twins, FORMATS[1])]))
        self.advance(self.scrapes[-1], 1)

    def go_on(self) -> None:
        if self.scrapes:
            self.advance(self.chance.choice(self.scrapes), self.chance.choice([1, 1, 2, 5]))

    def end(self) -> None:
        if self.scrapes:
            self.advance(self.scrapes[0], 10**6)

    def advance(self, scrape: Scrape, steps: int) -> None:
        for _ in range(steps):
            try:
                next(scrape.steps)
            except StopIteration as stop:
                self.scrapes.remove(scrape)
                self.check(scrape, stop.value)
                return

    def abandon(self) -> None:
        for scrape in self.scrapes:
            scrape.steps.close()
        self.scrapes.clear()

    def check(self, scrape: Scrape, answer: tuple[list[tuple[str, str]], bytes]) -> None:
        text = decode(answer)
        check_form(text, scrape.accept)
        bare = [{key: value.partition(" # ")[0] for key, value in moment.items()} for moment in scrape.moments]
        # An exemplar may be missing: that of a series which the ledger alone had when the scrape began.
        compare(read(text), bare + scrape.moments if scrape.accept else bare)


def decode(answer: tuple[list[tuple[str, str]], bytes]) -> str:
    headers, body = answer
    return (gzip.decompress(body) if ("Content-Encoding", "gzip") in headers else body).decode()


def drain(steps: Generator[None, None, tuple[list[tuple[str, str]], bytes]]) -> str:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return decode(stop.value)


def show(registry: CollectorRegistry, accept: str) -> Samples:
    encode = generate_openmetrics if accept else generate_latest
    return read(encode(registry).decode())


def read(text: str) -> Samples:
    """Return the samples; raise Fault if one occurs twice."""
    samples: Samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            key, _, value = re.fullmatch(r"([^ {]*({[^}]*})?) (.*)", line).groups()  # type: ignore[union-attr]
            if key in samples:
                raise Fault(f"{key} is there twice")
            samples[key] = value
    return samples


def check_form(text: str, accept: str) -> None:
    """Raise Fault if the exposition is not valid, or has a metric twice."""
    headers = re.findall("(?m)^# TYPE ([^ ]*) ", text)
    if len(headers) != len(set(headers)):
        raise Fault(f"A metric is there twice: {headers}")
    try:
        list((parse_openmetrics if accept else parse_classic)(text))
    except ValueError as error:
        # Invalid buckets and the like come from the site; prometheus_client shows them too.
        if "HELP" in str(error) or "TYPE" in str(error) or "Clashing" in str(error) or "Duplicate" in str(error):
            raise Fault(f"It is not valid: {error}\n{text}") from None


def compare(found: Samples, moments: list[Samples]) -> None:
    """Raise Fault unless each sample was shown at one of these moments, and none is missing that was always shown."""
    for key, value in found.items():
        held = {moment.get(key) for moment in moments}
        if value not in held:
            raise Fault(f"{key} is {value}, and was {held}")
    for key in set.intersection(*(set(moment) for moment in moments)):
        if key not in found:
            raise Fault(f"{key} is missing")


@contextlib.contextmanager
def small_blocks() -> Iterator[Clock]:
    """Use blocks of a few children, pieces of a few samples, a pause after each, and a clock that stands still."""
    clock = Clock()
    with (
        mock.patch.multiple(packing, BLOCK_BYTES=150, SMALL_BYTES=60),
        mock.patch.object(pace, "SLICE_SECONDS", 0.0),
        mock.patch.object(encoding, "FEW_SAMPLES", 3),
        mock.patch.object(prometheus_metrics, "time", clock),  # both of a pair have the same created time
        mock.patch.object(CellValue, "has_exemplars", False),
    ):
        yield clock


def walk(seed: int, steps: int = STEPS) -> None:
    """Take a walk. Raises Fault, or RuntimeError if an operation raised, with the command that repeats the walk."""
    with small_blocks() as clock, tempfile.TemporaryDirectory() as folder:
        one = Walk(seed, Path(folder), clock)
        try:
            one.run(steps)
        except Exception as error:
            last = "\n  ".join(f"{number} {what}" for number, what in enumerate(one.log))
            cls = Fault if isinstance(error, Fault) else RuntimeError
            raise cls(f"python -m tests.walk {seed}: {error!r} at the last of\n  {last}") from error


if __name__ == "__main__":
    first, walks = [*map(int, sys.argv[1:]), *[random.randrange(10**9), 1][len(sys.argv) - 1 :]][:2]
    began = time.monotonic()
    for seed in range(first, first + walks):
        walk(seed)
    seconds = time.monotonic() - began
    sys.stdout.write(f"{walks} walks of {STEPS} steps from seed {first}: no fault, {seconds:.0f} s\n")
