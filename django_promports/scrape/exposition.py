"""The exposition of a registry: one scrape after the other, in the format that is asked for.

Metrics that `kinds` knows are rendered from kept text, everything else by prometheus_client itself. If a collector
raises, only its own metrics are missing; each failure is counted, and the first one logged.

A scrape gives the interpreter up again and again, and the site makes, removes and registers metrics meanwhile. So it
decides at its start which metrics it shows, and reads each from the family that the metric has then.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, metrics
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted

from django_promports.binding import Binding
from django_promports.kinds import KINDS, find_counted, find_kind
from django_promports.layout import QUARANTINE_SECONDS
from django_promports.ledger import Family, Ledger
from django_promports.scrape.encoding import bound_versions, call
from django_promports.scrape.pace import Slices, Turn
from django_promports.scrape.packing import Body
from django_promports.scrape.sources import InLedger, Made, Source, Unknown
from django_promports.scrape.templates import Form, KeptMetric
from django_promports.unmade import Unmade, add_samples, make_metric

logger = logging.getLogger("django_promports")

# Two Prometheus servers may ask for two formats. What a browser asked for once is not kept for long.
MAX_FORMATS, MAX_IDLE_SCRAPES = 2, 8
MANY_CHILDREN = 500
# If the process was stopped while it read the numbers of a metric, the cells of removed series may belong to others by
# then, and the numbers are read again. This is how often they are read at most.
LISTINGS = 3
# What makes a metric's samples. A class or an object that overrides one is not rendered from templates.
METHODS = ("collect", "_samples", "_multi_samples", "_child_samples")


class _Scrape(NamedTuple):
    """One scrape."""

    form: Form
    body: Body
    names: frozenset[str]
    turn: Turn
    ledger: Ledger | None
    unmade: dict[str, Unmade]  # at its beginning, by metric
    shown: set[str]  # metrics that were written


class Exposition:
    """Renders a registry to bytes, and keeps the text that does not change between two scrapes.

    created: False leaves the _created series out. failures: how often a collector or a series was missing because it
    raised or was invalid. series: how many samples the last exposition of everything had; None before the first. forms:
    what is kept, by content type and whether it has _created series.
    """

    def __init__(self, binding: Binding, *, created: bool = True) -> None:
        self.failures = 0
        self.series: int | None = None
        self._binding = binding
        self._with_created = created
        self.forms: dict[tuple[str, bool], Form] = {}
        self._scrapes = 0
        # By id(), here and below: __hash__ and __eq__ of a collector are code of the site, and may raise.
        self._failing: dict[int, object] = {}
        self._warned = False

    def render(
        self, accept: str, accept_encoding: str, names: Sequence[str]
    ) -> Generator[None, None, tuple[list[tuple[str, str]], bytes]]:
        """Return headers and body as prometheus_client would, restricted to samples of these names if there are any.

        It yields wherever it gives up the interpreter, at most SLICE_SECONDS of work apart.
        """
        encoder, content_type = choose_encoder(bound_versions(accept))
        headers = [("Content-Type", content_type)]
        gzipped = gzip_accepted(accept_encoding)
        if gzipped:
            headers.append(("Content-Encoding", "gzip"))
        wanted = frozenset(names)
        ledger = self._binding.ledger
        try:
            key = (content_type, bool(metrics._use_created and self._with_created))
            # A concurrent scrape in the same format starts afresh: it must not use text that is not complete.
            kept = None if wanted else self.forms.pop(key, None)
            form = kept or Form(encoder, with_created=self._with_created)
            body = Body(form.packed if gzipped else None)
            scrape = _Scrape(form, body, wanted, Turn(), ledger, self._binding.list_unmade(), set())
            try:
                yield from self._expose(scrape)
                form.packed = body.packed
            finally:
                if not wanted:
                    self._keep(key, form)
        except Exception as error:
            body = Body({} if gzipped else None)
            scrape = _Scrape(Form(encoder, with_created=self._with_created), body, wanted, Turn(), ledger, {}, set())
            binding = self._binding.restricted_registry(wanted) if wanted else self._binding
            collected: list[Metric] = call(list, binding.collect())
            for metric in collected:
                yield from self._write(scrape, binding, [metric], error)
            body.write(scrape.form.encoder.end)
        if not wanted:
            self.series = body.samples
        return headers, body.close()

    def _keep(self, key: tuple[str, bool], form: Form) -> None:
        self._scrapes += 1
        form.used = self._scrapes
        self.forms = {k: f for k, f in self.forms.items() if k != key and self._scrapes - f.used < MAX_IDLE_SCRAPES}
        while len(self.forms) >= MAX_FORMATS:
            del self.forms[min(self.forms, key=lambda other: self.forms[other].used)]
        self.forms[key] = form

    def _expose(self, scrape: _Scrape) -> Slices:
        form, body, names, turn, *_ = scrape
        registry = self._binding.registry
        if type(registry).collect is not CollectorRegistry.collect or "collect" in vars(registry):
            raise Unknown
        # After the unmade series: a metric that is made in between has its series in one of the two.
        collectors, taken = list(registry._collector_to_names), registry._names_to_collectors.copy()
        if registry.get_target_info() and (not names or "target_info" in names):
            yield from self._write(scrape, registry, [registry._target_info_metric()])  # type: ignore[no-untyped-call]
        if names:
            named = {id(taken.get(name)) for name in names - {"target_info"}}
            named.update(map(id, registry._collectors_without_names))
            collectors = [collector for collector in collectors if id(collector) in named]
        for collector in collectors:
            if turn.is_over():
                yield from turn.rest()
            yield from self._expose_collector(scrape, collector)
        left = [unmade for name, unmade in scrape.unmade.items() if name not in scrape.shown and unmade.fit(taken)]
        for unmade in left:
            yield from self._expose_unmade(scrape, unmade.family)
        body.write(form.encoder.end)
        if not names:
            done = {id(one) for one in (registry, *collectors, *(unmade.family for unmade in left))}
            form.metrics = {key: kept for key, kept in form.metrics.items() if key in done}
            self._failing = {key: one for key, one in self._failing.items() if key in done}

    def _expose_collector(self, scrape: _Scrape, collector: Any) -> Slices:
        unmade = scrape.unmade.get(collector._name) if find_counted(collector) else None
        if unmade is not None and not unmade.are_of(collector):
            unmade = None
        doubt = None
        kind = find_kind(collector)
        if not scrape.names and kind is not None and type(collector) is kind.cls:
            family = self._binding.find_family(collector)
            made = Made(collector, kind, family, with_exemplars=scrape.form.encoder.is_openmetrics)
            try:
                yield from self._expose_known(
                    scrape, collector, made, partial(self._list, collector, unmade), unmade and unmade.family
                )
                return
            except Unknown as unknown:
                doubt = unknown.__cause__

        def collect() -> list[Metric]:
            series = unmade and unmade.series.copy()  # first, as in list_unmade()
            collected = list(collector.collect())
            if scrape.names:
                restricted = (metric._restricted_metric(scrape.names) for metric in collected)
                collected = [metric for metric in restricted if metric is not None]
            for metric in collected:
                scrape.shown.add(metric.name)
                if unmade and series and metric.name == unmade.family.record.name:
                    add_samples(metric, unmade.family, series, scrape.names)
            return collected

        try:
            collected = call(collect)
        except Exception:
            self._fail(collector, "The collector %s failed; its metrics are missing, the others are served.")
        else:
            yield from self._write(scrape, collector, collected, doubt)

    def _expose_unmade(self, scrape: _Scrape, family: Family) -> Slices:
        """Expose a metric that only the ledger has, or had when the scrape began."""
        try:
            metric, record = make_metric(family), family.record
            kind = KINDS[record.type]
            collector = kind.make(record.name, record.help, record.unit, record.labelnames, record.bounds)
            made = Made(collector, kind, with_exemplars=False)
        except Exception:
            self._fail(family, "%s, which the ledger has, is not a valid metric; it is missing, the others are served.")
            return
        doubt = None
        if not scrape.names:
            series = family.series.copy()
            try:
                yield from self._expose_known(scrape, family, made, lambda: ([], list(series.items())), family)
                return
            except Unknown as unknown:
                doubt = unknown.__cause__
        add_samples(metric, family, family.series.copy(), scrape.names)
        if metric.samples:
            yield from self._write(scrape, family, [metric], doubt)

    def _expose_known(
        self,
        scrape: _Scrape,
        key: object,
        made: Made,
        list_series: Callable[[], tuple[list[Any], list[Any]]],
        unmade: Family | None,
    ) -> Slices:
        """Expose a metric from its kept text.

        list_series: returns the children that are made, and the series of `unmade` that are not. Raises Unknown if
        prometheus_client has to expose it; the cause is what was not expected, if that is the reason.
        """
        form, turn, metric = scrape.form, scrape.turn, made.collector
        kept = yield from self._find_kept(scrape, key, made)
        if not kept.sections or not vars(metric).keys().isdisjoint(METHODS):
            raise Unknown
        try:
            if len(vars(metric).get("_metrics", ())) > MANY_CHILDREN:  # to list them takes a while
                yield from turn.rest()
            for _ in range(LISTINGS):
                listed = monotonic()
                children, series = list_series()
                kept.count_in(made.family)
                sources: list[tuple[Source, list[Any]]] = [(made, children)]
                if unmade is not None:
                    sources.append((InLedger(unmade), series))
                yield from kept.update(form, turn, sources, made.kind)
                if monotonic() - listed < QUARANTINE_SECONDS:
                    break
            else:
                raise Unknown
        except Unknown:
            kept.sections = []
            raise
        except Exception as error:
            if self._binding.ledger is not scrape.ledger:  # it was closed meanwhile
                raise Unknown from None
            kept.sections = []
            raise Unknown from error
        is_whole = yield from kept.write(scrape.body, turn)  # last, when nothing can fail any more
        scrape.shown.add(metric._name)
        if not is_whole:
            self._fail(key, "%s has series whose labels UTF-8 cannot encode; they are left out, the others are served.")

    def _find_kept(self, scrape: _Scrape, key: object, made: Made) -> Generator[None, None, KeptMetric]:
        """Return what is kept of a metric. Where its class has changed, the text is learned again."""
        metric = made.collector
        methods = tuple(getattr(type(metric), name) for name in METHODS)
        kept = scrape.form.metrics.get(id(key))
        if kept is None or kept.methods != methods:
            kept = scrape.form.metrics[id(key)] = KeptMetric(key, methods)
            yield from scrape.turn.rest()
            try:
                if vars(metric).keys().isdisjoint(METHODS):
                    kept.learn(scrape.form, metric, made.kind)
            except Unknown:
                pass
            except Exception as error:
                raise Unknown from error
        return kept

    def _list(self, metric: Any, unmade: Unmade | None) -> tuple[list[Any], list[Any]]:
        """Return the children of a metric, and its series that only the ledger has; each is one or the other."""
        series = unmade.series.copy() if unmade is not None else {}
        made = metric._metrics if metric._labelnames else {(): metric}
        if series and not series.keys().isdisjoint(made := made.copy()):  # these are not adopted yet
            made = {labelvalues: child for labelvalues, child in made.items() if labelvalues not in series}
        return list(made.values()), list(series.items())

    def _write(
        self, scrape: _Scrape, key: object, collected: list[Metric], doubt: BaseException | None = None
    ) -> Slices:
        """Let prometheus_client encode metrics.

        doubt: why it has to, if that is worth a warning once it has succeeded.
        """
        encoder = scrape.form.encoder
        pieces: list[bytes] = []
        try:
            is_whole = True
            for metric in collected:
                wanted = encoder.drop_created(metric)
                is_whole &= yield from encoder.encode_slowly(scrape.turn, wanted, pieces)
        except Exception:
            self._fail(key, "The metrics of %s cannot be encoded; they are missing, the others are served.")
            return
        for piece in pieces:
            scrape.body.write(piece)
            if scrape.turn.is_over():
                yield from scrape.turn.rest()
        if not is_whole:
            self._fail(key, "%s has text or numbers that cannot be encoded; those are left out, the others are served.")
        elif doubt is not None:
            self._warn(key, doubt)

    def _fail(self, key: object, message: str) -> None:
        self.failures += 1
        if id(key) not in self._failing:
            self._failing[id(key)] = key
            logger.error(message, _describe(key), exc_info=sys.exc_info()[0] is not None)

    def _warn(self, key: object, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s differs from what django_promports knows of prometheus_client. Scrapes are correct, but slower.",
                _describe(key),
                exc_info=error,
            )


def _describe(what: object) -> str:
    try:
        return call(repr, what)
    except Exception:
        return f"A {type(what).__qualname__}"
