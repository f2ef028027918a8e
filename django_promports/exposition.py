"""A registry to bytes, scrape after scrape: what does not change in between is kept, only what changed is made anew.

The children of a metric stand in blocks. A block has a template for each child (its lines without the numbers), the
numbers of the last scrape and the text that they made. The templates come from prometheus_client, which is asked to
expose a child that stands in for the others; filling them in must give the same text again. Where it does not, and
for every collector of another kind, prometheus_client does it all.
"""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from io import BytesIO
from itertools import accumulate, chain
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, metrics, values
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from prometheus_client.values import MutexValue

from django_promports.ledger import STATE, Family, Ledger
from django_promports.values import Book, CellValue, _list_samples

logger = logging.getLogger("django_promports")

# A request waits this long for the interpreter at most: little beside the 5 ms of sys.getswitchinterval(), and enough
# that passing the interpreter on, some 20 us, is no part of the cost.
SLICE_SECONDS = 0.0005
# Bytes of text that are kept, compared and compressed together. Smaller: compression begins anew more often; larger:
# more is done again for one number that changed.
BLOCK_BYTES = 16384
# A piece of text smaller than this is compressed together with its neighbours.
SMALL_BYTES = 2048
# Two Prometheis may ask for two formats; a person's browser must not leave a third of everything behind for good.
MAX_FORMATS, MAX_IDLE_SCRAPES = 2, 8
# Prometheus reads it in chunks anyway: 1 is seven times faster than 9 on this text and makes it a third larger.
LEVEL = 1
GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\x04\xff"
LAST_BLOCK = b"\x03\0"  # of a deflate stream: empty, final
MAX_COUNTS = 4096
# Samples that prometheus_client exposes in half a slice.
FEW_SAMPLES = 16

Steps = Generator[None, None, Any]


class _Unknown(Exception):
    """prometheus_client has to expose this collector itself."""


class _Kind(NamedTuple):
    """What children of one class are made of. values: in the order of their cells. fill: templates with numbers."""

    values: Callable[[list[Any]], list[Any]]
    fill: Callable[[list[bytes], list[Any], int, _Counts], list[bytes]]
    exercise: Callable[[Any], object]
    has_exemplars: bool = False


class _Counts(dict[float, bytes]):
    """The texts of bucket counts: most buckets have the count of another one. None is -0.0, which equals 0.0."""

    def __missing__(self, count: float) -> bytes:
        if len(self) >= MAX_COUNTS:
            self.clear()
        text = self[count] = _text(count)
        return text


def _text(number: Any) -> bytes:
    number = float(number)
    # Go's notation differs from Python's in large numbers only.
    return (repr(number) if number < 1e6 and number != -INF else floatToGoString(number)).encode()  # type: ignore[no-untyped-call]


INF = float("inf")


def _fill_one(templates: list[bytes], numbers: list[Any], slots: int, counts: _Counts) -> list[bytes]:
    return [template % _text(number) for template, number in zip(templates, numbers, strict=True)]


def _fill_summaries(templates: list[bytes], numbers: list[Any], slots: int, counts: _Counts) -> list[bytes]:
    texts = map(_text, numbers)
    return [template % pair for template, pair in zip(templates, zip(texts, texts, strict=True), strict=True)]


def _fill_histograms(templates: list[bytes], numbers: list[Any], slots: int, counts: _Counts) -> list[bytes]:
    width = len(numbers) // len(templates)
    rows = []
    for first, template in zip(range(0, len(numbers), width), templates, strict=True):
        row = numbers[first : first + width]
        total, row[0] = row[0], 0.0
        texts = [counts[count] for count in accumulate(row)]
        texts += (texts[-1], _text(total))  # _count is what the last bucket says; there may be no slot for _sum
        rows.append(template % tuple(texts[1 : slots + 1]))
    return rows


def _observe(child: Any) -> None:
    child.observe(0.5)
    child.observe(7)


KINDS: dict[type, _Kind] = {
    Counter: _Kind(lambda cs: [c._value for c in cs], _fill_one, lambda child: child.inc(7), True),
    Gauge: _Kind(lambda cs: [c._value for c in cs], _fill_one, lambda child: child.set(7)),
    Summary: _Kind(lambda cs: [v for c in cs for v in (c._count, c._sum)], _fill_summaries, _observe),
    Histogram: _Kind(
        lambda cs: [*chain.from_iterable([part for c in cs for part in ((c._sum,), c._buckets)])],
        _fill_histograms,
        _observe,
        True,
    ),
}
TYPES: dict[str, type] = {"counter": Counter, "summary": Summary, "histogram": Histogram}
# What makes a metric's samples; a class or an object that has its own is not the one this module knows.
METHODS = ("collect", "_samples", "_multi_samples", "_child_samples")


class _Block:
    """Some children of a metric, in the metric's order."""

    __slots__ = ("children", "created", "lengths", "plain", "size", "state", "templates")

    def __init__(self) -> None:
        self.children: list[Any] = []
        self.templates: list[bytes] = []
        self.size = 0
        self.plain = b""
        self.lengths: list[int] = []  # of each child's part of it
        self.forget()

    def set_rows(self, rows: list[bytes]) -> None:
        self.plain, self.lengths = b"".join(rows), list(map(len, rows))

    def forget(self) -> None:
        self.state: list[Any] | None = None
        self.created: list[float] | None = None


class _Made:
    """The children that this process has made."""

    def __init__(self, collector: Any, kind: _Kind, with_exemplars: bool) -> None:
        self.collector, self.kind = collector, kind
        self._with_exemplars = with_exemplars and kind.has_exemplars
        self._signed = isinstance(collector, Gauge)
        self._function = type(collector)._child_samples

    def labels(self, child: Any) -> tuple[str, ...]:
        if type(child) is not type(self.collector) or child._child_samples.__func__ is not self._function:
            raise _Unknown
        if any(type(value) not in (MutexValue, CellValue) for value in self.kind.values([child])):
            raise _Unknown
        return tuple(child._labelvalues)

    def read(self, children: list[Any]) -> tuple[list[Any], list[Any]]:
        cells = self.kind.values(children)
        numbers: list[Any] = [value._value for value in cells]
        if self._signed:
            if any(child._child_samples.__func__ is not self._function for child in children):  # set_function()
                raise _Unknown
            # 0.0 equals -0.0 and does not look like it. Only gauges get there.
            numbers = [number or repr(number) for number in numbers]
        if self._with_exemplars:
            exemplars = [value._exemplar for value in cells]
            if any(exemplars):
                return numbers, exemplars
        return numbers, []

    def created(self, children: list[Any]) -> list[float]:
        return [child._created for child in children]

    def single(self, child: Any) -> Metric:
        """Return the metric as if it had this one child."""
        if not self.collector._labelnames:
            return _collect_one(self.collector)
        single = copy.copy(self.collector)
        single._metrics = {tuple(child._labelvalues): child}
        return _collect_one(single)


class _Unmade:
    """The series that are in the ledger only, as pairs of label values and first cell."""

    def __init__(self, ledger: Ledger, family: Family) -> None:
        self._cells, self._width = ledger.cells, family.width

    def labels(self, series: Any) -> tuple[str, ...]:
        return tuple(series[0])

    def read(self, many: list[Any]) -> tuple[list[Any], list[Any]]:
        width = STATE + self._width
        return [number for _, first in many for number in self._cells[first + STATE : first + width]], []

    def created(self, many: list[Any]) -> list[float]:
        return [self._cells[first] for _, first in many]

    def single(self, series: Any) -> Metric:
        raise _Unknown


class _Section:
    """Lines under one header. In the classic format a family's _created series have a section of their own."""

    def __init__(self, header: bytes) -> None:
        self.header = header
        self.skeleton = b""  # of each child's template
        self.slots = 0  # for numbers
        self.has_created = False
        self.blocks: list[list[_Block]] = [[], []]  # of the children made, and of the series unmade

    def make_template(self, labels: Sequence[str], created: float | None) -> bytes:
        texts = {b"%d" % i: _escape(label).replace(b"%", b"%%") for i, label in enumerate(labels)}
        if created is not None:
            texts[b"created"] = _text(created)
        return self.skeleton % texts


class _Family:
    """What is kept of a metric: sections, or none if prometheus_client has to expose it."""

    def __init__(self, methods: tuple[object, ...]) -> None:
        self.methods = methods
        self.sections: list[_Section] | None = None


class _Form:
    """What is kept of a registry in one format."""

    def __init__(self, encoder: Callable[[Any], bytes]) -> None:
        self._encoder = encoder
        self.end = encoder(_Collected([]))
        self.is_openmetrics = bool(self.end)
        self.families: dict[Any, _Family] = {}
        self.packed: dict[bytes, bytes] = {}
        self.used = 0

    def encode(self, metric: Metric) -> bytes:
        return self._encoder(_Collected([metric])).removesuffix(self.end)


class _Collected(Collector):
    """Metrics that were collected, for prometheus_client's encoders."""

    def __init__(self, collected: Iterable[Metric]) -> None:
        self._collected = collected

    def collect(self) -> Iterable[Metric]:
        return self._collected


class _Turn:
    """How long this thread has had the interpreter."""

    def __init__(self) -> None:
        self._begin = perf_counter()

    def rest(self, limit: float = SLICE_SECONDS / 2) -> Steps:
        """Give the interpreter up if the turn has lasted that long."""
        if perf_counter() - self._begin >= limit:
            yield
            self._begin = perf_counter()


class _Body:
    """The text on its way out: compressed piece by piece, each by itself, so that equal pieces need it only once."""

    def __init__(self, known: dict[bytes, bytes] | None) -> None:
        self._known = known
        self.packed: dict[bytes, bytes] = {}
        self._buffer = BytesIO()
        self._small: list[bytes] = []
        self._small_size = self._size = self._crc = 0
        if known is not None:
            self._compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
            self._buffer.write(GZIP_HEADER)

    def write(self, piece: bytes) -> None:
        if self._known is None:
            self._buffer.write(piece)
        elif len(piece) < SMALL_BYTES:
            self._small.append(piece)
            self._small_size += len(piece)
            if self._small_size >= BLOCK_BYTES:
                self._flush()
        else:
            self._flush()
            self._pack(self._known, piece)

    def close(self) -> bytes:
        if self._known is not None:
            self._flush()
            self._buffer.write(LAST_BLOCK + self._crc.to_bytes(4, "little"))
            self._buffer.write((self._size & 0xFFFFFFFF).to_bytes(4, "little"))
        return self._buffer.getvalue()  # without a copy: the buffer itself becomes the bytes

    def _flush(self) -> None:
        if self._small and self._known is not None:
            self._pack(self._known, b"".join(self._small))
            self._small, self._small_size = [], 0

    def _pack(self, known: dict[bytes, bytes], plain: bytes) -> None:
        packed = known.get(plain)
        if packed is None:
            # A full flush ends on a byte, and nothing after it refers to anything before.
            packed = self._compressor.compress(plain) + self._compressor.flush(zlib.Z_FULL_FLUSH)
        self.packed[plain] = packed
        self._crc = zlib.crc32(plain, self._crc)
        self._size += len(plain)
        self._buffer.write(packed)


class Exposition:
    """Renders a registry to bytes, again and again, and keeps what does not change between two scrapes.

    created: False leaves the _created series out. failures: how often a collector raised, which costs its own metrics
    only.
    """

    def __init__(self, book: Book, *, created: bool = True) -> None:
        self.failures = 0
        self._book = book
        self._with_created = created
        self._forms: dict[tuple[str, bool], _Form] = {}
        self._scrapes = 0
        self._failing: set[Any] = set()
        self._counts = _Counts()
        self._warned = False

    def render(
        self, accept: str, accept_encoding: str, names: Sequence[str]
    ) -> Generator[None, None, tuple[list[tuple[str, str]], bytes]]:
        """Return headers and body as prometheus_client would, restricted to samples of these names if there are any.

        It yields wherever it gives up the interpreter, at most SLICE_SECONDS of work apart.
        """
        encoder, content_type = choose_encoder(accept)
        headers = [("Content-Type", content_type)]
        compress = gzip_accepted(accept_encoding)
        if compress:
            headers.append(("Content-Encoding", "gzip"))
        turn = _Turn()
        wanted = frozenset(names)
        try:
            key = (content_type, bool(metrics._use_created and self._with_created))
            # Who comes while another still renders this format begins anew, rather than to share what is half done.
            form = self._forms.pop(key, None) or _Form(encoder)
            body = _Body(form.packed if compress else None)
            try:
                yield from self._expose(form, body, turn, wanted)
                if not wanted:
                    form.packed = body.packed
            finally:
                self._keep(key, form)
        except Exception:
            self._warn("Exposition of the registry")
            body = _Body({} if compress else None)
            body.write(encoder(self._book.restricted_registry(wanted) if wanted else self._book))
        else:
            if not wanted and self._book.ledger is not None:
                self._book.ledger.note_scrape()
        return headers, body.close()

    def _keep(self, key: tuple[str, bool], form: _Form) -> None:
        self._scrapes += 1
        form.used = self._scrapes
        self._counts.clear()
        forms = [(k, f) for k, f in self._forms.items() if k != key and f.used > self._scrapes - MAX_IDLE_SCRAPES]
        forms.sort(key=lambda pair: pair[1].used)
        self._forms = dict([*forms[1 - MAX_FORMATS :], (key, form)])

    def _expose(self, form: _Form, body: _Body, turn: _Turn, names: frozenset[str]) -> Steps:
        registry = self._book.registry
        if type(registry).collect is not CollectorRegistry.collect or "collect" in vars(registry):
            raise _Unknown
        if registry.get_target_info() and (not names or "target_info" in names):
            body.write(form.encode(registry._target_info_metric()))  # type: ignore[no-untyped-call]
        done: dict[Any, _Family | None] = {}
        shown: set[str] = set()  # metrics whose unmade series are out
        while True:
            # In this order: a metric that is made in between has its series in one of the two.
            unmade = {name: self._list_unmade(name) for name in list(self._book._unmade) if name not in shown}
            collectors = self._list_collectors(registry, names, done)
            if not collectors:
                break
            for collector in collectors:
                yield from turn.rest()
                done[collector] = yield from self._expose_collector(form, body, turn, collector, shown, names)
        for name, series in unmade.items():
            if series:
                done[name] = yield from self._expose_unmade(form, body, turn, name, series, names)
        body.write(form.end)
        if not names:
            form.families = {key: family for key, family in done.items() if family is not None}
            self._failing.intersection_update(done)

    def _list_collectors(
        self, registry: CollectorRegistry, names: frozenset[str], done: dict[Any, _Family | None]
    ) -> list[Any]:
        with registry._lock:
            collectors = list(registry._collector_to_names)
            if names:
                named = {registry._names_to_collectors.get(name) for name in names - {"target_info"}}
                named.update(registry._collectors_without_names)
                collectors = [collector for collector in collectors if collector in named]
        return [collector for collector in collectors if collector not in done]

    def _expose_collector(
        self, form: _Form, body: _Body, turn: _Turn, collector: Any, shown: set[str], names: frozenset[str]
    ) -> Steps:
        family = None
        if not names and type(collector) in KINDS:
            family = yield from self._find_family(form, turn, collector, collector)
            if family.sections is not None:
                try:
                    children, series = self._take_series(collector, shown)
                    yield from self._expose_family(form, body, turn, family, collector, children, series)
                    shown.add(collector._name)
                    return family
                except _Unknown:
                    family.sections = None
                except Exception:
                    family.sections = None
                    self._warn(collector)
        try:
            pieces: list[bytes] = []
            known = self._book.registry._collector_to_names.get(collector, ())
            unmade = {name: series for name in known if name not in shown and (series := self._list_unmade(name))}
            for metric in list(collector.collect()):
                if names:
                    metric = metric._restricted_metric(names)
                    if not metric:
                        continue
                shown.add(metric.name)
                metric = self._complete(metric, unmade.pop(metric.name, []), names)
                yield from self._encode(form, turn, metric, pieces)
            for piece in pieces:
                body.write(piece)
                yield from turn.rest()
        except Exception:
            self.failures += 1
            if collector not in self._failing:
                self._failing.add(collector)
                logger.exception("The collector %r failed; its metrics are missing, the others are served.", collector)
        return family

    def _expose_unmade(
        self, form: _Form, body: _Body, turn: _Turn, name: str, series: list[Any], names: frozenset[str]
    ) -> Steps:
        """Expose a metric that only the ledger has."""
        ledger = self._book.ledger
        if ledger is None:
            return None
        kept = ledger.families[name]
        metric = Metric(name, kept.help, kept.type, kept.unit)
        if not names:
            more = {"buckets": kept.bounds} if kept.type == "histogram" else {}
            made_name = f"{name}_total" if kept.type == "counter" else name
            stand_in = TYPES[kept.type](made_name, kept.help, kept.labelnames, unit=kept.unit, registry=None, **more)
            family = yield from self._find_family(form, turn, name, stand_in)
            if family.sections is not None:
                yield from self._expose_family(form, body, turn, family, stand_in, [], series)
                return family
        pieces: list[bytes] = []
        metric = self._complete(metric, series, names)
        if metric.samples:
            yield from self._encode(form, turn, metric, pieces)
        for piece in pieces:
            body.write(piece)
        return None

    def _find_family(self, form: _Form, turn: _Turn, key: Any, collector: Any) -> Steps:
        """Return what is kept of a metric, after a look whether it still is what this module knows."""
        methods = tuple(getattr(type(collector), name) for name in METHODS)
        family = form.families.get(key)
        if family is None or family.methods != methods:
            family = _Family(methods)
            yield from turn.rest(0.0)
            try:
                family.sections = self._learn(form, collector)
            except _Unknown:
                pass
            except Exception:
                self._warn(collector)
        elif not vars(collector).keys().isdisjoint(METHODS):
            family.sections = None
        return family

    def _learn(self, form: _Form, collector: Any) -> list[_Section]:
        """Find the text that the children of a metric have in common, and prove that it is understood."""
        kind = KINDS[type(collector)]
        if values.ValueClass is not MutexValue or collector._labelvalues:
            raise _Unknown
        if not vars(collector).keys().isdisjoint(METHODS):
            raise _Unknown
        parent = child = copy.copy(collector)
        labels = [f'\\"\n\ue000{i}\ue000' for i in range(len(collector._labelnames))]
        if labels:
            parent._metrics, parent._lock = {}, Lock()
            child = parent.labels(*labels)
        else:
            child._metric_init()
        kind.exercise(child)
        metric = self._without_created(_collect_one(parent))
        text = form.encode(metric)
        sections: list[_Section] = []
        lines = text.split(b"\n")[:-1]
        remaining = len(metric.samples)
        for line in lines:
            if line.startswith(b"#"):
                if not sections or sections[-1].skeleton:
                    sections.append(_Section(b""))
                sections[-1].header += line + b"\n"
                continue
            section = sections[-1]
            remaining -= 1
            prefix = line.rpartition(b" ")[0].replace(b"%", b"%%%%")
            for i, label in enumerate(labels):
                prefix = prefix.replace(_escape(label), b"%%(%d)b" % i)
            # Both formats have the samples in their order, and the _created one is the last.
            section.has_created = remaining == 0 and metric.samples[-1].name == f"{metric.name}_created"
            section.skeleton += prefix + (b" %(created)b\n" if section.has_created else b" %%b\n")
            section.slots += not section.has_created
        made = _Made(parent, kind, form.is_openmetrics)
        proof = b""
        for section in sections:
            block = _Block()
            self._add(section, [block], made, child)
            _ = list(self._refresh(form, _Turn(), section, block, made, kind))
            proof += section.header + block.plain
            if section.has_created and section.slots == 0 and not block.plain:
                raise ValueError
        if proof != text:
            raise ValueError("It exposes other text than expected.")
        return sections

    def _take_series(self, collector: Any, shown: set[str]) -> tuple[list[Any], list[Any]]:
        """Return the children of a metric, and its series that only the ledger has; each is one or the other."""
        if not collector._labelnames:
            return [collector], [] if collector._name in shown else self._list_unmade(collector._name)
        with collector._lock:
            children = list(collector._metrics.values())
            return children, [] if collector._name in shown else self._list_unmade(collector._name)

    def _list_unmade(self, name: str) -> list[Any]:
        if self._book.ledger is None:
            return []
        with self._book._lock:
            return list(self._book._unmade.get(name, {}).items())

    def _expose_family(
        self,
        form: _Form,
        body: _Body,
        turn: _Turn,
        family: _Family,
        collector: Any,
        children: list[Any],
        unmade: list[Any],
    ) -> Steps:
        kind = KINDS[type(collector)]
        sources: list[tuple[Any, list[Any]]] = [(_Made(collector, kind, form.is_openmetrics), children)]
        if unmade and self._book.ledger is not None:
            ledger = self._book.ledger
            sources.append((_Unmade(ledger, ledger.families[collector._name]), unmade))
        sections = family.sections or []
        for section in sections:
            for which, (source, current) in enumerate(sources):
                yield from self._align(section, which, turn, source, current)
                for block in section.blocks[which]:
                    yield from self._refresh(form, turn, section, block, source, kind)
            if not unmade:
                section.blocks[1] = []
        # Only now, when nothing can fail any more.
        for section in sections:
            if section is sections[0] or any(section.blocks):
                body.write(section.header)
            for blocks in section.blocks:
                for block in blocks:
                    body.write(block.plain)
                    yield from turn.rest()

    def _align(self, section: _Section, which: int, turn: _Turn, source: Any, current: list[Any]) -> Steps:
        """Make the blocks hold the current children. Those that stay keep their order, and new ones come last."""
        old = section.blocks[which]
        new: list[_Block] = []
        position = seen = 0
        try:
            for block in old:
                seen += 1
                end = position + len(block.children)
                if current[position:end] == block.children:
                    position = end
                    new.append(block)
                else:
                    for child, template in zip(block.children, block.templates, strict=True):
                        if position < len(current) and current[position] == child:
                            position += 1
                            self._put(new, child, template)
                yield from turn.rest()
            for child in current[position:]:
                self._add(section, new, source, child)
                yield from turn.rest()
        finally:  # also where the scrape is given up half-way
            section.blocks[which] = new + old[seen:]

    def _add(self, section: _Section, blocks: list[_Block], source: Any, child: Any) -> None:
        created = source.created([child])[0] if section.has_created else None
        self._put(blocks, child, section.make_template(source.labels(child), created))

    def _put(self, blocks: list[_Block], child: Any, template: bytes) -> None:
        if not blocks or blocks[-1].size + len(template) > BLOCK_BYTES:
            blocks.append(_Block())
        block = blocks[-1]
        block.forget()
        block.children.append(child)
        block.templates.append(template)
        block.size += len(template)

    def _refresh(self, form: _Form, turn: _Turn, section: _Section, block: _Block, source: Any, kind: _Kind) -> Steps:
        """Make the text of a block anew if anything in it changed."""
        yield from turn.rest()
        children = block.children
        numbers, exemplars = source.read(children) if section.slots else ([], [])
        created = source.created(children) if section.has_created else []
        state = numbers + exemplars
        if state == block.state and created == block.created:
            return
        if created != block.created and block.created is not None:  # Counter.reset(), or the ledger's
            block.state = None
            block.templates = [
                section.make_template(source.labels(child), moment)
                for child, moment in zip(children, created, strict=True)
            ]
        if exemplars:
            header = len(section.header)
            rows = []
            for child in children:
                rows.append(form.encode(self._without_created(source.single(child)))[header:])
                yield from turn.rest(0.0)
            block.set_rows(rows)
        elif section.slots:
            self._fill(section, block, numbers, kind)
        else:
            block.set_rows([template % () for template in block.templates])
        block.state, block.created = state, created

    def _fill(self, section: _Section, block: _Block, numbers: list[Any], kind: _Kind) -> None:
        """Make the text of those children anew whose numbers changed."""
        templates, state = block.templates, block.state
        width = len(numbers) // len(templates)
        changed: Sequence[int] = range(len(templates))
        if state is not None and len(state) == len(numbers):
            changed = [
                i for i in changed if numbers[i * width : i * width + width] != state[i * width : i * width + width]
            ]
        if 2 * len(changed) > len(templates):
            block.set_rows(kind.fill(templates, numbers, section.slots, self._counts))
            return
        numbers = [number for i in changed for number in numbers[i * width : i * width + width]]
        rows = kind.fill([templates[i] for i in changed], numbers, section.slots, self._counts)
        ends = list(accumulate(block.lengths))
        old, at = memoryview(block.plain), 0
        parts: list[Any] = []
        for i, row in zip(changed, rows, strict=True):
            parts += (old[at : ends[i] - block.lengths[i]], row)
            at = ends[i]
            block.lengths[i] = len(row)
        block.plain = b"".join([*parts, old[at:]])

    def _complete(self, metric: Metric, unmade: list[Any], names: frozenset[str]) -> Metric:
        """Add series that only the ledger has, and leave _created out if it is not wanted."""
        if self._book.ledger is not None and unmade:
            family = self._book.ledger.families[metric.name]
            made = {tuple(sample.labels.get(name, "") for name in family.labelnames) for sample in metric.samples}
            series = {labelvalues: first for labelvalues, first in unmade if labelvalues not in made}
            samples = _list_samples(self._book.ledger, family, series, names or None)
            metric, metric.samples = copy.copy(metric), metric.samples + samples
        return self._without_created(metric)

    def _without_created(self, metric: Metric) -> Metric:
        if self._with_created or metric.type not in TYPES:
            return metric
        metric, samples = copy.copy(metric), metric.samples
        metric.samples = [sample for sample in samples if sample.name != f"{metric.name}_created"]
        return metric

    def _encode(self, form: _Form, turn: _Turn, metric: Metric, pieces: list[bytes]) -> Steps:
        """Let prometheus_client encode a metric, a few samples at a time where the format allows it."""
        yield from turn.rest(0.0)
        if not form.is_openmetrics or len(metric.samples) <= FEW_SAMPLES:
            pieces.append(form.encode(metric))
            return
        part = copy.copy(metric)
        part.samples = []
        pieces.append(form.encode(part))
        header = len(pieces[-1])
        for first in range(0, len(metric.samples), FEW_SAMPLES):
            part.samples = metric.samples[first : first + FEW_SAMPLES]
            pieces.append(form.encode(part)[header:])
            yield from turn.rest(0.0)

    def _warn(self, what: object) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: prometheus_client is not the one that django_promports knows. Scrapes are right, but slower.",
                what,
                exc_info=True,
            )


def _collect_one(collector: Any) -> Metric:
    (metric,) = collector.collect()
    return metric  # type: ignore[no-any-return]


def _escape(label: str) -> bytes:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"").encode()
