"""Text that is kept from scrape to scrape: only the numbers in it change.

The children of a metric stand in blocks. A block has a template for each child (its lines without the numbers), the
numbers of the last scrape and the text that they made. The templates come from prometheus_client, which exposes an
example child once. Filling its template must give the same text again, or the metric is not rendered from templates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from itertools import accumulate, chain, pairwise
from threading import Lock
from typing import Any

from prometheus_client import values as prometheus_values
from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString
from prometheus_client.values import MutexValue

from django_promports.kinds import Kind
from django_promports.ledger import Family
from django_promports.scrape import packing
from django_promports.scrape.encoding import Encoder
from django_promports.scrape.pace import Slices, Turn
from django_promports.scrape.packing import Body, Piece
from django_promports.scrape.sources import Made, Source, State, Unknown

MAX_COUNTS = 1024
# Takes the place of each number of a child that cannot be shown: it produces no text.
SILENCE = b"%.0b"


def _format(number: Any) -> bytes:
    number = float(number)
    # Go's notation differs from Python's in large numbers only.
    return (repr(number) if -1e300 < number < 1e6 else floatToGoString(number)).encode()  # type: ignore[no-untyped-call]


class Texts(dict[float, bytes]):
    """The texts of numbers. The dict is a cache for counts: many buckets have equal counts, none is -0.0."""

    def __missing__(self, count: float) -> bytes:
        if len(self) >= MAX_COUNTS:
            self.clear()
        text = self[count] = _format(count)
        return text

    format = staticmethod(_format)


def _escape(label: str) -> bytes:
    label = str.__str__(label)  # not what a subclass makes of it
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"").encode()


class Block(Piece):
    """Some children of a metric, in the metric's order, and their text."""

    __slots__ = ("children", "created", "firsts", "lengths", "silent", "size", "state", "templates")

    def __init__(self) -> None:
        self.children: list[Any] = []
        self.templates: list[bytes] = []
        self.created: list[float | None] = []  # in the templates
        self.size = 0  # of the templates
        self.silent = 0  # children that cannot be shown
        self.set_rows([])
        self.firsts: list[int] = []  # cells of the children, while they are read from the ledger
        self.state: State | None = None

    def set_rows(self, rows: Sequence[bytes | bytearray]) -> None:
        """Set each child's part of the text."""
        self.plain = bytearray().join(rows)
        self.lengths = list(map(len, rows))
        self.packed = None

    def rows(self) -> list[bytes | bytearray]:
        """Return each child's part of the text."""
        ends = list(accumulate(self.lengths, initial=0))
        return [self.plain[begin:end] for begin, end in pairwise(ends)]

    def update_rows(self, changed: Sequence[int], rows: Sequence[bytes]) -> None:
        """Replace the parts of some children, given in their order."""
        begins = list(accumulate(self.lengths, initial=0))
        for i, row in zip(reversed(changed), reversed(rows), strict=True):  # from the end: begins stay right
            self.plain[begins[i] : begins[i + 1]] = row
            self.lengths[i] = len(row)
        self.packed = None


class Form:
    """What is kept of a registry in one format. used: the number of the last scrape that used it."""

    def __init__(self, encode: Callable[[Any], bytes], *, with_created: bool) -> None:
        self.encoder = Encoder(encode, with_created=with_created)
        self.metrics: dict[int, KeptMetric] = {}  # by id() of what they are kept of
        self.packed: dict[bytes, bytes] = {}
        self.texts = Texts()
        self.used = 0


class Section:
    """Lines of a metric under one header. In the classic format its _created series have a section of their own."""

    def __init__(self) -> None:
        self.header = b""
        self.skeleton = b""  # of each child's template
        self.slots = 0  # for numbers
        self.has_created = False
        self.blocks: list[list[Block]] = [[]]  # of each source

    def align(self, which: int, turn: Turn, source: Source, current: list[Any]) -> Slices:
        """Make the blocks hold the current children. Those that stay keep their order, and new ones come last."""
        old = self.blocks[which]
        new: list[Block] = []
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
        finally:  # also where the scrape is abandoned before its end
            self.blocks[which] = new + old[seen:]

    def add(self, blocks: list[Block], source: Source, child: Any) -> None:
        created = source.get_created([child])[0] if self.has_created else None
        self._put(blocks, child, self._make_template(source.get_labels(child), created), created)

    def refresh(self, form: Form, turn: Turn, block: Block, source: Source, kind: Kind) -> Slices:
        """Bring the text of a block up to date if anything in it changed."""
        if turn.is_over():
            yield from turn.rest()
        children = block.children
        if block.state is None:
            block.firsts = source.find_cells(children)
        if self.has_created and block.created != (created := source.get_created(children)):  # Counter.reset()
            for i, moment in enumerate(created):
                if block.created[i] != moment:
                    block.templates[i] = self._make_template(source.get_labels(children[i]), moment)
            block.created, block.state = created, None
        state, exemplars = source.read(children, block.firsts) if self.slots else ([], [])
        if state == block.state:
            return
        if self.slots:
            self._fill(block, state[: len(state) - len(exemplars)], kind, form.texts)
        else:
            block.set_rows([template % () for template in block.templates])
        if exemplars:
            yield from self._add_exemplars(form.encoder, turn, block, source, exemplars)
        block.state = state

    def _put(self, blocks: list[Block], child: Any, template: bytes, created: float | None) -> None:
        if not blocks or blocks[-1].size + len(template) > packing.BLOCK_BYTES:
            blocks.append(Block())
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
            texts[b"created"] = _format(created)
        return self.skeleton % texts

    def _fill(self, block: Block, state: State, kind: Kind, texts: Texts) -> None:
        """Make the text of those children whose numbers changed."""
        templates, old = block.templates, block.state
        width = len(state) // len(templates)
        changed: Sequence[int] = range(len(templates))
        if type(old) is type(state) and len(old) == len(state):
            firsts = range(0, len(state), width)
            changed = [i for i, at in enumerate(firsts) if state[at : at + width] != old[at : at + width]]
        if 2 * len(changed) > len(templates):
            block.set_rows(kind.fill(templates, _decode([state]), self.slots, texts))
        elif changed:
            numbers = _decode([state[i * width : (i + 1) * width] for i in changed])
            block.update_rows(changed, kind.fill([templates[i] for i in changed], numbers, self.slots, texts))

    def _add_exemplars(
        self, encoder: Encoder, turn: Turn, block: Block, source: Source, exemplars: list[Any]
    ) -> Slices:
        """Let prometheus_client make the rows of those children that have exemplars."""
        rows = block.rows()
        width = len(exemplars) // len(rows)
        for i, child in enumerate(block.children):
            if rows[i] and any(exemplars[i * width : (i + 1) * width]):
                yield from turn.rest()
                with suppress(UnicodeEncodeError):  # else the row has no exemplar
                    rows[i] = encoder.encode(encoder.drop_created(source.collect(child)))[len(self.header) :]
        block.set_rows(rows)


def _decode(states: Sequence[Any]) -> list[Any]:
    """Return the numbers in several pieces of a state."""
    if isinstance(states[0], bytes):
        return memoryview(b"".join(states)).cast("d").tolist()
    return list(chain.from_iterable(states))


class KeptMetric:
    """What is kept of a metric: its sections, or none if prometheus_client has to expose it.

    key: what it is kept of; while it is referenced here, nothing else has its id(). methods: those of the metric's
    class when its text was learned.
    """

    def __init__(self, key: object, methods: tuple[object, ...]) -> None:
        self.key, self.methods = key, methods
        self.sections: list[Section] = []
        self._counted_in: Family | None = None

    def learn(self, form: Form, collector: Any, kind: Kind) -> None:
        """Find the text that the children of a metric have in common, and prove that it is understood.

        Raises Unknown if the metric cannot be rendered from templates, another error if its text is not as expected.
        """
        if prometheus_values.ValueClass is not MutexValue or collector._labelvalues:
            raise Unknown
        parent = child = copy.copy(collector)
        labels = [f'\\"\n\ue000{i}\ue000' for i in range(len(collector._labelnames))]
        if labels:
            parent._metrics, parent._lock = {}, Lock()
            child = parent.labels(*labels)
        else:
            child._metric_init()
        encoder = form.encoder
        source = Made(parent, kind, with_exemplars=encoder.is_openmetrics)
        kind.exercise(child)
        metric = encoder.drop_created(source.collect(child))
        text = encoder.encode(metric)
        sections = _dissect(text, labels, metric)
        proof = b""
        for section in sections:
            blocks: list[Block] = []
            section.add(blocks, source, child)
            for _ in section.refresh(form, Turn(), blocks[0], source, kind):
                pass
            proof += section.header + blocks[0].plain
        if proof != text:
            raise ValueError(f"It exposes {text!r}, not {proof!r}.")
        self.sections = sections

    def count_in(self, family: Family | None) -> None:
        """Look up the children's cells again if they are in another ledger, or in other cells, than before."""
        if family is not self._counted_in:
            self._counted_in = family
            for section in self.sections:
                for block in chain(*section.blocks):
                    block.state = None

    def update(self, form: Form, turn: Turn, sources: list[tuple[Source, list[Any]]], kind: Kind) -> Slices:
        """Bring the text up to date with the current children of each source."""
        for section in self.sections:
            del section.blocks[len(sources) :]
            section.blocks += [[] for _ in sources[len(section.blocks) :]]
            for which, (source, current) in enumerate(sources):
                yield from section.align(which, turn, source, current)
                for block in section.blocks[which]:
                    yield from section.refresh(form, turn, block, source, kind)

    def write(self, body: Body, turn: Turn) -> Generator[None, None, bool]:
        """Write the text; return whether every child could be shown."""
        silent = 0
        for section in self.sections:
            if section is self.sections[0] or any(section.blocks):
                body.write(section.header)
            for block in chain(*section.blocks):
                silent += block.silent
                shown = len(block.children) - block.silent
                body.write_piece(block, shown * (section.slots + section.has_created))
                if turn.is_over():
                    yield from turn.rest()
        return not silent


def _dissect(text: bytes, labels: list[str], metric: Metric) -> list[Section]:
    """Return the sections of an exposed example child, whose label values are these, with empty blocks."""
    sections: list[Section] = []
    remaining = len(metric.samples)
    for line in text.split(b"\n")[:-1]:
        if line.startswith(b"#"):
            if not sections or sections[-1].skeleton:
                sections.append(Section())
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
