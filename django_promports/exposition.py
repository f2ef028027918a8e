"""A registry to bytes, scrape after scrape: what does not change in between is kept.

The children of a metric stand in blocks. A block has a template for each child (its lines without the numbers), the
numbers of the last scrape and the text that they made. The templates come from prometheus_client, which is asked to
expose a child that stands in for the others; filling them in must give the same text again. Where it does not, and
for every collector of another kind, prometheus_client does it all.

A scrape gives the interpreter up again and again, and the site goes on making, removing and registering meanwhile. So
it decides at its beginning which metrics it shows, and reads each from the family that the metric has then.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import accumulate, chain, pairwise
from threading import Lock
from time import monotonic, perf_counter
from typing import Any, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, metrics, values
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString
from prometheus_client.values import MutexValue

from django_promports.layout import QUARANTINE_SECONDS
from django_promports.ledger import Family, Ledger
from django_promports.values import Book, CellValue, Unmade, add_samples, is_known, make_metric

logger = logging.getLogger("django_promports")

# A request waits this long for the interpreter at most: little beside the 5 ms of sys.getswitchinterval(), and enough
# that passing the interpreter on, some 20 us, is no part of the cost.
SLICE_SECONDS = 0.0005
# Bytes of text that are kept, compared and compressed together. Smaller: compression begins anew more often; larger:
# more of it is done again for one number that changed.
BLOCK_BYTES = 16384
# Text shorter than this is compressed together with its neighbours.
SMALL_BYTES = 2048
# Two Prometheis may ask for two formats; a person's browser must not leave a third of everything behind for good.
MAX_FORMATS, MAX_IDLE_SCRAPES = 2, 8
# 9, as prometheus_client has it, takes ten times as long for two thirds of the bytes.
LEVEL = 1
GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\x04\xff"
LAST_BLOCK = b"\x03\0"  # of a deflate stream: empty, final
MAX_COUNTS = 1024
MANY_CHILDREN = 500
# Samples that prometheus_client exposes in a slice.
FEW_SAMPLES = 16
# What makes a metric's samples; a class or an object that has its own is not the one this module knows.
METHODS = ("collect", "_samples", "_multi_samples", "_child_samples")
# In the place of a number whose child cannot be shown: it makes no text.
SILENCE = b"%.0b"
VERSION = re.compile(r"(?<=version=)[^;,]+")

T = TypeVar("T")
Steps = Generator[None, None, None]
# The numbers of a block's children, one child after the other: as objects, or as the bytes of their cells.
_State = list[Any] | bytes


class _Unknown(Exception):
    """prometheus_client has to expose this collector itself."""


class _Failed(Exception):
    """Code of the site raised what is no Exception, like SystemExit or gevent's Timeout."""


def _call(function: Callable[..., T], *arguments: Any) -> T:
    """Call what may run code of the site: whatever that raises is an Exception here, and no end of this thread."""
    try:
        return function(*arguments)
    except Exception:
        raise
    except BaseException as error:
        raise _Failed(type(error).__name__) from error


def bound_versions(accept: str) -> str:
    """Return an Accept header that asks for no newer version than prometheus_client writes, whatever it asked for.

    prometheus_client calls its text by the version that was asked for, and takes none that is no number.
    """

    def bound(version: re.Match[str]) -> str:
        numbers = version[0].strip().split(".")
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            return "0"
        return version[0] if tuple(map(int, numbers)) < (1, 0, 0) else "1.0.0"

    return VERSION.sub(bound, accept)


class _Turn:
    """How long this thread has had the interpreter."""

    def __init__(self) -> None:
        self._end = perf_counter() + SLICE_SECONDS / 2

    def is_over(self) -> bool:
        return perf_counter() >= self._end

    def rest(self) -> Steps:
        """Give the interpreter up, and begin another turn."""
        yield
        self._end = perf_counter() + SLICE_SECONDS / 2


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
    return (repr(number) if -1e300 < number < 1e6 else floatToGoString(number)).encode()  # type: ignore[no-untyped-call]


def _escape(label: str) -> bytes:
    label = str.__str__(label)  # not what a subclass makes of it
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"").encode()


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


class _Kind(NamedTuple):
    """What this module knows of the children of one class; their numbers come in the order of their cells."""

    cells: Callable[[Any], list[Any]]
    numbers: Callable[[list[Any]], list[Any]]
    fill: Callable[[list[bytes], list[Any], int, _Counts], list[bytes]]
    exercise: Callable[[Any], object]
    exemplars: Callable[[list[Any]], list[Any]] | None = None


KINDS: dict[type, _Kind] = {
    Counter: _Kind(
        cells=lambda child: [child._value],
        numbers=lambda children: [child._value._value for child in children],
        fill=_fill_one,
        exercise=lambda child: child.inc(7),
        exemplars=lambda children: [child._value._exemplar for child in children],
    ),
    Gauge: _Kind(
        cells=lambda child: [child._value],
        numbers=lambda children: [child._value._value for child in children],
        fill=_fill_one,
        exercise=lambda child: child.set(7),
    ),
    Summary: _Kind(
        cells=lambda child: [child._count, child._sum],
        numbers=lambda children: [cell._value for child in children for cell in (child._count, child._sum)],
        fill=_fill_summaries,
        exercise=_observe,
    ),
    Histogram: _Kind(
        cells=lambda child: [child._sum, *child._buckets],
        numbers=lambda children: [
            cell._value for child in children for part in ((child._sum,), child._buckets) for cell in part
        ],
        fill=_fill_histograms,
        exercise=_observe,
        exemplars=lambda children: [cell._exemplar for child in children for cell in child._buckets],
    ),
}
TYPES: dict[str, type] = {"counter": Counter, "summary": Summary, "histogram": Histogram}


class _Made:
    """Reads the children that this process has made."""

    def __init__(self, collector: Any, family: Family | None = None, *, with_exemplars: bool) -> None:
        self.collector, self.kind = collector, KINDS[type(collector)]
        self.family = family
        self._exemplars = self.kind.exemplars if with_exemplars else None
        self._is_gauge = isinstance(collector, Gauge)
        self._function = type(collector)._child_samples

    def labels(self, child: Any) -> tuple[str, ...]:
        if type(child) is not type(self.collector) or child._child_samples.__func__ is not self._function:
            raise _Unknown
        if any(type(cell) not in (MutexValue, CellValue) for cell in self.kind.cells(child)):
            raise _Unknown
        return tuple(child._labelvalues)

    def created(self, children: list[Any]) -> list[float]:
        return [child._created for child in children]

    def find(self, children: list[Any]) -> list[int]:
        """Return the first cell of each child in the ledger; none if one of them is not there."""
        series = self.family.series if self.family else {}
        firsts = [series.get(tuple(child._labelvalues), -1) for child in children if series]
        return [] if -1 in firsts else firsts

    def read(self, block: _Block) -> tuple[_State, list[Any]]:
        """Return numbers, followed by exemplars if there are any, and those once more."""
        if block.firsts and self.family and not (self._exemplars and CellValue.has_exemplars):
            return self.family.read(block.firsts), []
        children = block.children
        numbers = self.kind.numbers(children)
        if self._is_gauge:
            if any(child._child_samples.__func__ is not self._function for child in children):  # set_function()
                raise _Unknown
            # 0.0 equals -0.0 and does not look like it. Only gauges get there.
            numbers = [number or repr(number) for number in numbers]
        if self._exemplars is not None and any(exemplars := self._exemplars(children)):
            return numbers + exemplars, exemplars
        return numbers, []

    def collect(self, child: Any) -> Metric:
        """Return the metric as if it had this child only."""
        single = self.collector
        if single._labelnames:
            single = copy.copy(single)
            single._metrics = {tuple(child._labelvalues): child}
        (metric,) = single.collect()
        return metric  # type: ignore[no-any-return]


class _Unmade:
    """Reads series that are in the ledger only: pairs of label values and first cell."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def labels(self, series: Any) -> tuple[str, ...]:
        return tuple(series[0])

    def created(self, many: list[Any]) -> list[float]:
        return [self._family.cells[first] for _, first in many]

    def find(self, many: list[Any]) -> list[int]:
        return [first for _, first in many]

    def read(self, block: _Block) -> tuple[_State, list[Any]]:
        return self._family.read(block.firsts), []

    def collect(self, series: Any) -> Metric:
        raise _Unknown


class _Block:
    """Some children of a metric, in the metric's order."""

    __slots__ = ("children", "created", "firsts", "lengths", "packed", "plain", "silent", "size", "state", "templates")

    def __init__(self) -> None:
        self.children: list[Any] = []
        self.templates: list[bytes] = []
        self.created: list[float | None] = []  # what the templates say
        self.size = 0  # of the templates
        self.silent = 0  # children that cannot be shown
        self.set_rows([])
        self.firsts: list[int] = []  # cells of the children, while they are read from the ledger
        self.state: _State | None = None

    def set_rows(self, rows: Sequence[bytes | bytearray]) -> None:
        self.plain = bytearray().join(rows)
        self.lengths = list(map(len, rows))  # of each child's part
        self.packed: bytes | None = None

    def rows(self) -> list[bytes | bytearray]:
        """Return each child's part of the text."""
        ends = list(accumulate(self.lengths, initial=0))
        return [self.plain[begin:end] for begin, end in pairwise(ends)]


class _Form:
    """What is kept of a registry in one format."""

    def __init__(self, encoder: Callable[[Any], bytes], *, with_created: bool) -> None:
        self._encoder, self._with_created = encoder, with_created
        self.end = encoder(_Collected([]))
        self.is_openmetrics = bool(self.end)
        self.families: dict[int, _Family] = {}  # by id() of what they are kept of
        self.packed: dict[bytes, bytes] = {}
        self.counts = _Counts()
        self.used = 0

    def encode(self, metric: Metric) -> bytes:
        return _call(self._encoder, _Collected([metric])).removesuffix(self.end)

    def drop_created(self, metric: Metric) -> Metric:
        """Leave the _created series out if they are not wanted."""
        if self._with_created or metric.type not in TYPES:
            return metric
        metric, samples = copy.copy(metric), metric.samples
        metric.samples = [sample for sample in samples if sample.name != f"{metric.name}_created"]
        return metric


class _Collected(Collector):
    """Metrics that were collected, for prometheus_client's encoders."""

    def __init__(self, collected: Iterable[Metric]) -> None:
        self._collected = collected

    def collect(self) -> Iterable[Metric]:
        return self._collected


class _Section:
    """Lines of a metric under one header. In the classic format its _created series have a section of their own."""

    def __init__(self) -> None:
        self.header = b""
        self.skeleton = b""  # of each child's template
        self.slots = 0  # for numbers
        self.has_created = False
        self.blocks: list[list[_Block]] = [[], []]  # of children made, and of series unmade

    def align(self, which: int, turn: _Turn, source: Any, current: list[Any]) -> Steps:
        """Make the blocks hold the current children. Those that stay keep their order, and new ones come last."""
        old = self.blocks[which]
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
                    for child, template, created in zip(block.children, block.templates, block.created, strict=True):
                        if position < len(current) and current[position] == child:
                            position += 1
                            self._put(new, child, template, created)
                if turn.is_over():
                    yield from turn.rest()
            for child in current[position:]:
                self.add(new, source, child)
                if turn.is_over():
                    yield from turn.rest()
        finally:  # also where the scrape is given up half-way
            self.blocks[which] = new + old[seen:]

    def add(self, blocks: list[_Block], source: Any, child: Any) -> None:
        created = source.created([child])[0] if self.has_created else None
        self._put(blocks, child, self._make_template(source.labels(child), created), created)

    def _put(self, blocks: list[_Block], child: Any, template: bytes, created: float | None) -> None:
        if not blocks or blocks[-1].size + len(template) > BLOCK_BYTES:
            blocks.append(_Block())
        block = blocks[-1]
        block.state = None
        block.children.append(child)
        block.templates.append(template)
        block.created.append(created)
        block.size += len(template)
        block.silent += template == self._silence

    @property
    def _silence(self) -> bytes:
        return SILENCE * self.slots

    def _make_template(self, labels: Sequence[str], created: float | None) -> bytes:
        try:
            texts = {b"%d" % i: _escape(label).replace(b"%", b"%%") for i, label in enumerate(labels)}
        except UnicodeEncodeError:  # a lone surrogate
            return self._silence
        if created is not None:
            texts[b"created"] = _text(created)
        return self.skeleton % texts

    def refresh(self, form: _Form, turn: _Turn, block: _Block, source: Any, kind: _Kind) -> Steps:
        """Bring the text of a block up to date if anything in it changed."""
        if turn.is_over():
            yield from turn.rest()
        children = block.children
        if block.state is None:
            block.firsts = source.find(children)
        if self.has_created and block.created != (created := source.created(children)):  # Counter.reset()
            for i, moment in enumerate(created):
                if block.created[i] != moment:
                    block.templates[i] = self._make_template(source.labels(children[i]), moment)
            block.created, block.state = created, None
        state, exemplars = source.read(block) if self.slots else ([], [])
        if state == block.state:
            return
        if self.slots:
            self._fill(block, state[: len(state) - len(exemplars)], kind, form.counts)
        else:
            block.set_rows([template % () for template in block.templates])
        if exemplars:
            yield from self._add_exemplars(form, turn, block, source, exemplars)
        block.state = state

    def _add_exemplars(self, form: _Form, turn: _Turn, block: _Block, source: Any, exemplars: list[Any]) -> Steps:
        """Let prometheus_client make the rows of those children that have exemplars."""
        rows = block.rows()
        width = len(exemplars) // len(rows)
        for i, child in enumerate(block.children):
            if rows[i] and any(exemplars[i * width : (i + 1) * width]):
                yield from turn.rest()
                with suppress(UnicodeEncodeError):  # else the row goes without
                    rows[i] = form.encode(form.drop_created(source.collect(child)))[len(self.header) :]
        block.set_rows(rows)

    def _fill(self, block: _Block, state: _State, kind: _Kind, counts: _Counts) -> None:
        """Make the text of those children anew whose numbers changed."""
        templates, old = block.templates, block.state
        width = len(state) // len(templates)
        changed: Sequence[int] = range(len(templates))
        if type(old) is type(state) and len(old) == len(state):
            firsts = range(0, len(state), width)
            changed = [i for i, at in enumerate(firsts) if state[at : at + width] != old[at : at + width]]
        if 2 * len(changed) > len(templates):
            block.set_rows(kind.fill(templates, _decode([state]), self.slots, counts))
            return
        if not changed:
            return
        numbers = _decode([state[i * width : (i + 1) * width] for i in changed])
        rows = kind.fill([templates[i] for i in changed], numbers, self.slots, counts)
        begins = list(accumulate(block.lengths, initial=0))
        for i, row in zip(reversed(changed), reversed(rows), strict=True):  # from the end, so that the rest stays
            block.plain[begins[i] : begins[i + 1]] = row
            block.lengths[i] = len(row)
        block.packed = None


def _decode(states: Sequence[Any]) -> list[Any]:
    """Return the numbers in several pieces of a state."""
    if isinstance(states[0], bytes):
        return memoryview(b"".join(states)).cast("d").tolist()
    return list(chain.from_iterable(states))


class _Family:
    """What is kept of a metric: its sections, or none if prometheus_client has to expose it."""

    def __init__(self, key: object, methods: tuple[object, ...]) -> None:
        self.key, self.methods = key, methods  # held: while it lives, nothing else has its id()
        self.sections: list[_Section] = []
        self._counted_in: Family | None = None

    def learn(self, form: _Form, collector: Any) -> None:
        """Find the text that the children of a metric have in common, and prove that it is understood.

        Raises _Unknown if this is no metric for this module, and anything if it should be one.
        """
        if values.ValueClass is not MutexValue or collector._labelvalues:
            raise _Unknown
        parent = child = copy.copy(collector)
        labels = [f'\\"\n\ue000{i}\ue000' for i in range(len(collector._labelnames))]
        if labels:
            parent._metrics, parent._lock = {}, Lock()
            child = parent.labels(*labels)
        else:
            child._metric_init()
        source = _Made(parent, with_exemplars=form.is_openmetrics)
        source.kind.exercise(child)
        metric = form.drop_created(source.collect(child))
        text = form.encode(metric)
        sections = self._dissect(text, labels, metric)
        proof = b""
        for section in sections:
            blocks: list[_Block] = []
            section.add(blocks, source, child)
            for _ in section.refresh(form, _Turn(), blocks[0], source, source.kind):
                pass
            proof += section.header + blocks[0].plain
        if proof != text:
            raise ValueError(f"It exposes {text!r}, not {proof!r}.")
        self.sections = sections

    def _dissect(self, text: bytes, labels: list[str], metric: Metric) -> list[_Section]:
        sections: list[_Section] = []
        remaining = len(metric.samples)
        for line in text.split(b"\n")[:-1]:
            if line.startswith(b"#"):
                if not sections or sections[-1].skeleton:
                    sections.append(_Section())
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
        return sections

    def count_in(self, family: Family | None) -> None:
        """Look up the children's cells again if they are in another ledger, or in other cells, than before."""
        if family is not self._counted_in:
            self._counted_in = family
            for section in self.sections:
                for block in chain(*section.blocks):
                    block.state = None

    def update(self, form: _Form, turn: _Turn, sources: list[tuple[Any, list[Any]]], kind: _Kind) -> Steps:
        for section in self.sections:
            del section.blocks[len(sources) :]
            section.blocks += [[] for _ in sources[len(section.blocks) :]]
            for which, (source, current) in enumerate(sources):
                yield from section.align(which, turn, source, current)
                for block in section.blocks[which]:
                    yield from section.refresh(form, turn, block, source, kind)

    def write(self, body: _Body, turn: _Turn) -> Generator[None, None, bool]:
        """Write it; return whether every child could be shown."""
        silent = 0
        for section in self.sections:
            if section is self.sections[0] or any(section.blocks):
                body.write(section.header)
            for blocks in section.blocks:
                for block in blocks:
                    silent += block.silent
                    shown = len(block.children) - block.silent
                    body.write_block(block, shown * (section.slots + section.has_created))
                    if turn.is_over():
                        yield from turn.rest()
        return not silent


class _Body:
    """The text on its way out, compressed piece by piece, each by itself, so that what stays needs it only once.

    known: short pieces that were compressed for the last scrape; None if it is not to be compressed.
    """

    def __init__(self, known: dict[bytes, bytes] | None) -> None:
        self._known = known
        self.packed: dict[bytes, bytes] = {}
        self.samples = 0
        self._buffer = BytesIO()
        self._short: list[bytes | bytearray] = []
        self._short_size = self._size = self._crc = 0
        if known is not None:
            # As large a window as a block, and a small table, as it has to be cleared for each.
            self._compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -14, 5)
            self._buffer.write(GZIP_HEADER)

    def write(self, piece: bytes | bytearray) -> None:
        """Add a short piece of whole lines, to be compressed with its neighbours."""
        self.samples += piece.count(b"\n") - piece.count(b"\n#") - piece.startswith(b"#")
        self._write(piece)

    def _write(self, piece: bytes | bytearray) -> None:
        if self._known is None:
            self._buffer.write(piece)
            return
        self._short.append(piece)
        self._short_size += len(piece)
        if self._short_size >= BLOCK_BYTES:
            self._flush(self._known)

    def write_block(self, block: _Block, samples: int) -> None:
        self.samples += samples
        if self._known is None or len(block.plain) < SMALL_BYTES:
            self._write(block.plain)
        else:
            self._flush(self._known)
            if block.packed is None:
                block.packed = self._compress(block.plain)
            self._add(block.plain, block.packed)

    def close(self) -> bytes:
        if self._known is not None:
            self._flush(self._known)
            self._buffer.write(LAST_BLOCK + self._crc.to_bytes(4, "little"))
            self._buffer.write((self._size & 0xFFFFFFFF).to_bytes(4, "little"))
        return self._buffer.getvalue()  # without a copy: the buffer itself becomes the bytes

    def _flush(self, known: dict[bytes, bytes]) -> None:
        if self._short:
            plain = b"".join(self._short)
            self._short, self._short_size = [], 0
            packed = self.packed[plain] = known.get(plain) or self._compress(plain)
            self._add(plain, packed)

    def _compress(self, plain: bytes | bytearray) -> bytes:
        # A full flush ends on a byte, and nothing after it refers to anything before.
        return self._compressor.compress(plain) + self._compressor.flush(zlib.Z_FULL_FLUSH)

    def _add(self, plain: bytes | bytearray, packed: bytes) -> None:
        self._crc = zlib.crc32(plain, self._crc)
        self._size += len(plain)
        self._buffer.write(packed)


class _Scrape(NamedTuple):
    """What one scrape is about."""

    form: _Form
    body: _Body
    names: frozenset[str]
    turn: _Turn
    ledger: Ledger | None
    unmade: dict[str, Unmade]  # at its beginning, by metric
    shown: set[str]  # metrics that are out


class Exposition:
    """Renders a registry to bytes, again and again, and keeps what does not change between two scrapes.

    created: False leaves the _created series out. failures: how often a collector or a series was missing because it
    raised, or made no sense. series: how many samples the last exposition of everything had; None before the first.
    """

    def __init__(self, book: Book, *, created: bool = True) -> None:
        self.failures = 0
        self.series: int | None = None
        self._book = book
        self._with_created = created
        self._forms: dict[tuple[str, bool], _Form] = {}
        self._scrapes = 0
        # By id(), here and below: what the site has written may not even be hashable when it is asked again.
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
        ledger = self._book.ledger
        try:
            key = (content_type, bool(metrics._use_created and self._with_created))
            # A concurrent scrape in the same format starts afresh, rather than to share what is not complete.
            kept = None if wanted else self._forms.pop(key, None)
            form = kept or _Form(encoder, with_created=self._with_created)
            body = _Body(form.packed if gzipped else None)
            scrape = _Scrape(form, body, wanted, _Turn(), ledger, self._book.list_unmade(), set())
            try:
                yield from self._expose(scrape)
                form.packed = body.packed
            finally:
                if not wanted:
                    self._keep(key, form)
        except Exception as error:
            body = _Body({} if gzipped else None)
            scrape = _Scrape(_Form(encoder, with_created=self._with_created), body, wanted, _Turn(), ledger, {}, set())
            book = self._book.restricted_registry(wanted) if wanted else self._book
            collected: list[Metric] = _call(list, book.collect())
            for metric in collected:
                yield from self._write(scrape, book, [metric], error)
            body.write(scrape.form.end)
        else:
            if not wanted:
                self._book.note_scrape(ledger)
        if not wanted:
            self.series = body.samples
        return headers, body.close()

    def _keep(self, key: tuple[str, bool], form: _Form) -> None:
        self._scrapes += 1
        form.used = self._scrapes
        self._forms = {k: f for k, f in self._forms.items() if k != key and self._scrapes - f.used < MAX_IDLE_SCRAPES}
        while len(self._forms) >= MAX_FORMATS:
            del self._forms[min(self._forms, key=lambda other: self._forms[other].used)]
        self._forms[key] = form

    def _expose(self, scrape: _Scrape) -> Steps:
        form, body, names, turn, *_ = scrape
        registry = self._book.registry
        if type(registry).collect is not CollectorRegistry.collect or "collect" in vars(registry):
            raise _Unknown
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
        body.write(form.end)
        if not names:
            done = {id(one) for one in (registry, *collectors, *(unmade.family for unmade in left))}
            form.families = {key: family for key, family in form.families.items() if key in done}
            self._failing = {key: one for key, one in self._failing.items() if key in done}

    def _expose_collector(self, scrape: _Scrape, collector: Any) -> Steps:
        unmade = scrape.unmade.get(collector._name) if is_known(collector) else None
        if unmade is not None and not unmade.are_of(collector):
            unmade = None
        doubt = None
        if not scrape.names and type(collector) in KINDS:
            made = _Made(collector, self._book.find_family(collector), with_exemplars=scrape.form.is_openmetrics)
            try:
                yield from self._expose_known(
                    scrape, collector, made, partial(self._list, collector, unmade), unmade and unmade.family
                )
                return
            except _Unknown as unknown:
                doubt = unknown.__cause__

        def collect() -> list[Metric]:
            series = unmade and unmade.series.copy()  # first, as in list_unmade()
            collected = list(collector.collect())
            if scrape.names:
                restricted = (metric._restricted_metric(scrape.names) for metric in collected)
                collected = [metric for metric in restricted if metric is not None]
            for metric in collected:
                scrape.shown.add(metric.name)
                if unmade and series and metric.name == unmade.family.name:
                    add_samples(metric, unmade.family, series, scrape.names)
            return collected

        try:
            collected = _call(collect)
        except Exception:
            self._fail(collector, "The collector %s failed; its metrics are missing, the others are served.")
        else:
            yield from self._write(scrape, collector, collected, doubt)

    def _expose_unmade(self, scrape: _Scrape, family: Family) -> Steps:
        """Expose a metric that only the ledger has, or had when the scrape began."""
        try:
            metric = make_metric(family)
            buckets = {"buckets": family.bounds} if family.type == "histogram" else {}
            name = f"{family.name}_total" if family.type == "counter" else family.name
            cls, more = TYPES[family.type], {"unit": family.unit, "registry": None, **buckets}
            made = _Made(cls(name, family.help, family.labelnames, **more), with_exemplars=False)
        except Exception:
            self._fail(family, "%s, which the ledger has, is no metric; it is missing, the others are served.")
            return
        doubt = None
        if not scrape.names:
            series = family.series.copy()
            try:
                yield from self._expose_known(scrape, family, made, lambda: ([], list(series.items())), family)
                return
            except _Unknown as unknown:
                doubt = unknown.__cause__
        add_samples(metric, family, family.series.copy(), scrape.names)
        if metric.samples:
            yield from self._write(scrape, family, [metric], doubt)

    def _expose_known(
        self,
        scrape: _Scrape,
        key: object,
        made: _Made,
        list_series: Callable[[], tuple[list[Any], list[Any]]],
        unmade: Family | None,
    ) -> Steps:
        """Expose a metric from what is kept of it.

        list_series: returns the children that are made, and the series of `unmade` that are not. Raises _Unknown if
        prometheus_client has to expose it; its cause is what this module did not expect.
        """
        form, turn, metric = scrape.form, scrape.turn, made.collector
        family = yield from self._find_family(scrape, key, metric)
        if not family.sections or not vars(metric).keys().isdisjoint(METHODS):
            raise _Unknown
        try:
            if len(vars(metric).get("_metrics", ())) > MANY_CHILDREN:  # to list them takes a while
                yield from turn.rest()
            is_recent = False
            while not is_recent:  # if the process was stopped meanwhile, removed series' cells may be others' by now
                listed = monotonic()
                children, series = list_series()
                family.count_in(made.family)
                sources: list[tuple[Any, list[Any]]] = [(made, children)]
                if unmade is not None:
                    sources.append((_Unmade(unmade), series))
                yield from family.update(form, turn, sources, made.kind)
                is_recent = monotonic() - listed < QUARANTINE_SECONDS
        except _Unknown:
            family.sections = []
            raise
        except Exception as error:
            if self._book.ledger is not scrape.ledger:  # it was closed meanwhile
                raise _Unknown from None
            family.sections = []
            raise _Unknown from error
        is_whole = yield from family.write(scrape.body, turn)  # only now, when nothing can fail any more
        scrape.shown.add(metric._name)
        if not is_whole:
            self._fail(key, "%s has series whose labels UTF-8 cannot encode; they are left out, the others are served.")

    def _find_family(self, scrape: _Scrape, key: object, metric: Any) -> Generator[None, None, _Family]:
        """Return what is kept of a metric, after a look whether it still is what this module knows."""
        methods = tuple(getattr(type(metric), name) for name in METHODS)
        family = scrape.form.families.get(id(key))
        if family is None or family.methods != methods:
            family = scrape.form.families[id(key)] = _Family(key, methods)
            yield from scrape.turn.rest()
            try:
                if vars(metric).keys().isdisjoint(METHODS):
                    family.learn(scrape.form, metric)
            except _Unknown:
                pass
            except Exception as error:
                raise _Unknown from error
        return family

    def _list(self, metric: Any, unmade: Unmade | None) -> tuple[list[Any], list[Any]]:
        """Return the children of a metric, and its series that only the ledger has; each is one or the other."""
        series = unmade.series.copy() if unmade is not None else {}
        made = metric._metrics if metric._labelnames else {(): metric}
        if series and not series.keys().isdisjoint(made := made.copy()):  # these are not adopted yet
            made = {labelvalues: child for labelvalues, child in made.items() if labelvalues not in series}
        return list(made.values()), list(series.items())

    def _write(
        self, scrape: _Scrape, key: object, collected: list[Metric], doubt: BaseException | None = None
    ) -> Steps:
        """Let prometheus_client encode metrics.

        doubt: why it has to, if that is worth a warning once all is well.
        """
        pieces: list[bytes] = []
        try:
            is_whole = True
            for metric in collected:
                is_whole &= yield from self._encode(scrape, scrape.form.drop_created(metric), pieces)
        except Exception:
            self._fail(key, "The metrics of %s cannot be encoded; they are missing, the others are served.")
            return
        for piece in pieces:
            scrape.body.write(piece)
            if scrape.turn.is_over():
                yield from scrape.turn.rest()
        if not is_whole:
            self._fail(key, "%s has text or numbers that make no sense; those are left out, the others are served.")
        elif doubt is not None:
            self._warn(key, doubt)

    def _encode(self, scrape: _Scrape, metric: Metric, pieces: list[bytes]) -> Generator[None, None, bool]:
        """Encode a metric, in pieces where the format allows it; return whether all of it could be."""
        form, turn = scrape.form, scrape.turn
        first, samples = len(pieces), metric.samples
        size = FEW_SAMPLES if form.is_openmetrics else len(samples)
        part = copy.copy(metric)
        try:
            yield from turn.rest()
            part.samples = samples if size == len(samples) else []
            pieces.append(form.encode(part))
            header = len(pieces[-1])
            for begin in range(0, len(samples) if part.samples is not samples else 0, FEW_SAMPLES):
                part.samples = samples[begin : begin + FEW_SAMPLES]
                pieces.append(form.encode(part)[header:])
                yield from turn.rest()
            return True
        except Exception:
            del pieces[first:]
        clean = yield from self._clean(scrape, metric)
        pieces.append(form.encode(clean))
        return False

    def _clean(self, scrape: _Scrape, metric: Metric) -> Generator[None, None, Metric]:
        """Return a metric without the series that cannot be encoded. Help and exemplars give way before that."""
        clean = copy.copy(metric)
        clean.documentation = _call(str, metric.documentation).encode(errors="replace").decode()
        good: list[Sample] = []
        bad: set[Any] = set()
        for sample in metric.samples:
            for attempt in (sample, sample._replace(exemplar=None)):
                clean.samples = [attempt]
                with suppress(Exception):
                    scrape.form.encode(clean)
                    good.append(attempt)
                    break
            else:
                bad.add(_find_series(sample))
            if scrape.turn.is_over():
                yield from scrape.turn.rest()
        clean.samples = [sample for sample in good if not bad or _find_series(sample) not in bad]
        return clean

    def _fail(self, key: object, message: str) -> None:
        self.failures += 1
        if id(key) not in self._failing:
            self._failing[id(key)] = key
            logger.error(message, _describe(key), exc_info=sys.exc_info()[0] is not None)

    def _warn(self, key: object, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s is not what django_promports knows of prometheus_client. Scrapes are right, but slower.",
                _describe(key),
                exc_info=error,
            )


def _find_series(sample: Sample) -> Any:
    """Return what the samples of one series have in common, a histogram's buckets included."""
    return frozenset(item for item in sample.labels.items() if item[0] not in ("le", "quantile"))


def _describe(what: object) -> str:
    try:
        return _call(repr, what)
    except Exception:
        return f"A {type(what).__qualname__}"
