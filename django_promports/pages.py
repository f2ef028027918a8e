"""The page for people: what each port of a site does now, and its requests and latency over the last minutes.

From data to HTML, everything escaped. The page needs no script and fetches nothing from anywhere: a browser draws it
anew every few seconds by itself, or in place with its script. What the other ports answered is not trusted: another
program may have a port.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from itertools import chain, pairwise
from math import floor, log10
from time import gmtime, strftime
from typing import Any, NamedTuple

from django_promports.activity import KEPT_SECONDS, SAMPLE_SECONDS, Sample
from django_promports.loop import Loop, Steps
from django_promports.ports import count_waiting, format_ports, format_waiting
from django_promports.targets import Answer, Site, ask_all, format_target

REFRESH_SECONDS = 5
# "Now" is the mean over so many seconds, and what is shorter than a moment has no mean.
NOW_SECONDS = 10.0
MOMENT_SECONDS = 1.0
# What a worker says of itself is a few kB; of what another program says no more than this is kept or shown.
MAX_SAMPLES = 4 * int(KEPT_SECONDS / SAMPLE_SECONDS)
MAX_TEXT = 200
MAX_NUMBER = 1e15
NOTHING = "\N{EN DASH}"

# Each state as a shape too: not everybody sees colours.
STATES = {
    "live": ("\N{BLACK CIRCLE}", "a worker of this site answers"),
    "silent": ("\N{WHITE CIRCLE}", "it is connected, and does not answer in time"),
    "other": ("\N{BLACK UP-POINTING TRIANGLE}", "another program or site has the port"),
}

STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#f5f7f9;--text:#1b2127;--soft:#55606b;--rule:#d8dee4;--line:#0a63c2;
--area:#0a63c21f;--second:#7a3fb5;--second-area:#7a3fb51f;--live:#17703a;--silent:#875400;--other:#b3261e}
@media (prefers-color-scheme:dark){:root{--back:#12161b;--card:#1b2128;--text:#e8ebee;--soft:#a7b1bb;--rule:#343c45;
--line:#6fb5ff;--area:#6fb5ff29;--second:#c9a2f2;--second-area:#c9a2f229;--live:#5fd38a;--silent:#e8b54d;--other:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);
font:15px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:72rem;margin:0 auto;padding:1.75rem 1.25rem 2.5rem}
h1{font-size:1.5rem;line-height:1.2;margin:0 0 .25rem}
h2{font-size:1.05rem;margin:2rem 0 .5rem}
p{margin:.25rem 0 0}
h1,p,dd,td.what{overflow-wrap:anywhere}
a{color:var(--line);text-underline-offset:.15em}
a:focus-visible{outline:2px solid var(--line);outline-offset:2px}
.soft,small{color:var(--soft)}
small{font-size:.8125rem}
.warning{color:var(--other);font-weight:600}
.sums{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1rem;margin:1.25rem 0}
figure{margin:0;padding:.85rem 1rem .7rem;background:var(--card);border:1px solid var(--rule);border-radius:.6rem}
figcaption{display:flex;justify-content:space-between;align-items:baseline;gap:1rem;margin-bottom:.5rem}
figcaption b{font-size:1.5rem;line-height:1.1;font-variant-numeric:tabular-nums;white-space:nowrap}
.axis{display:flex;justify-content:space-between}
svg{display:block;width:100%;height:5.5rem;overflow:visible}
svg line{stroke:var(--rule);stroke-width:1;vector-effect:non-scaling-stroke}
svg path{fill:none;stroke:var(--line);stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round;
vector-effect:non-scaling-stroke}
svg polygon{fill:var(--area)}
svg.second path{stroke:var(--second)}
svg.second polygon{fill:var(--second-area)}
table{width:100%;border-collapse:collapse;margin-top:.5rem}
caption{text-align:left;color:var(--soft);font-size:.8125rem;padding-bottom:.4rem}
th,td{padding:.5rem .6rem;text-align:left;vertical-align:middle;border-bottom:1px solid var(--rule)}
thead th{font-size:.8125rem;font-weight:600;color:var(--soft);white-space:nowrap}
tbody th{font-weight:600}
.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.state{font-weight:600;white-space:nowrap}
.live{color:var(--live)}.silent{color:var(--silent)}.other{color:var(--other)}
.plotted>div{display:grid;grid-template-columns:4.5rem minmax(5rem,1fr);gap:.75rem;align-items:center}
.plotted svg{height:2rem}
tr[aria-current]{background:var(--card)}
td.links{white-space:nowrap}
td.links a+a{margin-left:.6rem}
td.what{min-width:9rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.5rem;margin:.5rem 0 0}
dt{color:var(--soft)}
dd{margin:0;min-width:0}
footer{margin-top:1.5rem}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media (max-width:62rem){
main{padding:1.1rem .9rem 2rem}
.sums{gap:.7rem;margin:1rem 0}
table,caption,tbody,tr,th,td{display:block}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
tbody{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(19rem,100%),1fr));gap:.7rem}
tbody tr{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:.5rem .75rem;padding:.75rem .9rem .8rem;
align-content:start;background:var(--card);border:1px solid var(--rule);border-radius:.6rem}
tr[aria-current]{border-color:var(--line)}
th,td,.number{padding:0;border:0;text-align:left;white-space:normal}
tbody th,td.what,td.plotted{grid-column:span 3}
td.number{grid-column:span 2}
td.what{min-width:0}
td.links{grid-column:span 6}
tbody th a{font-size:1.1rem}
td[data-name]::before{content:attr(data-name);display:block;color:var(--soft);font-size:.8125rem}
.plotted>div{grid-template-columns:1fr;gap:.3rem}
}
"""

# In place of the browser's own refresh: what is focused stays so, and a hidden page asks nobody.
SCRIPT = """
const note = document.querySelector('[role=status]');
setInterval(async () => {
  if (document.hidden || String(getSelection())) return;
  try {
    const answer = await fetch(location.href, {cache: 'no-store'});
    const page = new DOMParser().parseFromString(await answer.text(), 'text/html').querySelector('#workers');
    if (!answer.ok || !page) throw new Error('another page');
    const focused = document.activeElement && document.activeElement.getAttribute('href');
    document.querySelector('#workers').replaceWith(document.adoptNode(page));
    const link = focused && document.querySelector(`a[href="${CSS.escape(focused)}"]`);
    if (link) link.focus({preventScroll: true});
    note.textContent = '';
  } catch {
    note.textContent = 'The page cannot be refreshed: what it shows is old.';
  }
}, SECONDS * 1000);
""".replace("SECONDS", str(REFRESH_SECONDS))


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


# For whoever serves the page: nothing but this style and this script, whatever else gets into it.
POLICY = {
    "default-src": "'none'",
    "style-src": _hash(STYLE),
    "script-src": _hash(SCRIPT),
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = (
    ("Content-Security-Policy", "; ".join(map(" ".join, POLICY.items()))),
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
)

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<link rel="icon" href="data:,">
<noscript><meta http-equiv="refresh" content="{refresh}"></noscript>
<title>{title} \N{MIDDLE DOT} {project}</title>
<style>{style}</style>
</head>
<body>
<main id="workers">
<h1>{title}</h1>
"""
FOOT = """<footer><small>Drawn at {time} UTC, and anew every {refresh} s. The numbers are means of the last {now:g} s.
A new process begins a new plot, and goes on with the counts of the one before.</small></footer>
</main>
<p role="status" class="warning"></p>
<script>{script}</script>
</body>
</html>
"""


class Worker(NamedTuple):
    """What a port that is not free says; None or nothing where it says nothing that can be believed."""

    port: int
    state: str
    reason: str = ""
    pid: int | None = None
    command: str = ""
    uptime: float | None = None
    series: int | None = None
    samples: Sequence[Sample] = ()


class Look(NamedTuple):
    """What a look at the ports of one machine found.

    origin: scheme and host of links to the workers, as in "http://[::1]"; None where a browser cannot open them.
    """

    project: str
    ports: Sequence[int]
    workers: Sequence[Worker]
    waiting: int
    origin: str | None


class Rate(NamedTuple):
    """Means of the time between two moments, per second; latency is in seconds, and None where nothing was answered."""

    ago: float
    until: float
    requests: float
    answered: float
    latency: float | None


def look(loop: Loop, site: Site, address: str, ports: Sequence[int], origin: str | None) -> Steps[Look]:
    """Ask each port what it does."""
    answers = yield from ask_all(loop, site, [(address, port) for port in ports], "/?activity")
    workers = [read(port, answer) for port, answer in zip(ports, answers, strict=True) if answer.state != "free"]
    return Look(site.project, ports, workers, count_waiting(ports), origin)


def make_origin(scheme: str, host: str) -> str:
    """Return what an address begins with, up to the port."""
    return f"{scheme}://{format_target(host, 0).removesuffix(':0')}"


def read(port: int, answer: Answer) -> Worker:
    """Return what a port said, as far as it makes sense."""
    about = answer.about
    command, uptime = about.get("command"), _number(about.get("uptime_seconds"))
    return Worker(
        port,
        answer.state,
        answer.reason[:MAX_TEXT],
        _whole(about.get("pid")),
        command[:MAX_TEXT] if isinstance(command, str) else "",
        uptime,
        _whole(about.get("series")),
        _read_samples(about.get("activity")),
    )


def render(found: Look) -> bytes:
    """Return the page of a site."""
    return encode(draw(found))


def encode(pieces: Iterable[str]) -> bytes:
    """Return the bytes of a page; JSON may have brought what UTF-8 does not know."""
    return "".join(pieces).encode(errors="replace")


def draw(found: Look, own: Mapping[str, object] | None = None) -> Iterator[str]:
    """Yield the page in pieces that take a millisecond or so to make, and more in a large site.

    own: what the worker that serves it says of itself; None if the site serves it.
    """
    port = own.get("port") if own else None
    title = "Workers" if own is None else escape(f"Worker on port {port}")
    yield HEAD.format(title=title, project=escape(found.project), style=STYLE, refresh=REFRESH_SECONDS)
    yield from _draw_summary(found)
    many = [measure_all(worker.samples) for worker in found.workers]
    if any(many):
        yield from _draw_sums(found.workers, many)
    if found.workers:
        yield from _draw_table(found, many, port)
    if own:
        yield from _draw_own(own)
    time = strftime("%H:%M:%S", gmtime())
    yield FOOT.format(time=time, script=SCRIPT, refresh=REFRESH_SECONDS, now=NOW_SECONDS)


def format_duration(seconds: float) -> str:
    """Return a time as a person says it: 2 d 3 h, 4 h 5 m, 6 m 7 s or 8 s."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    for amount, unit, smaller, smaller_unit in ((days, "d", hours, "h"), (hours, "h", minutes, "m")):
        if amount:
            return f"{amount} {unit} {smaller} {smaller_unit}"
    return f"{minutes} m {rest} s" if minutes else f"{rest} s"


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
        Rate(step * SAMPLE_SECONDS, (step - 1) * SAMPLE_SECONDS, *_mean(current[step]))
        for step in sorted(current, reverse=True)
    ]


def _mean(rates: Sequence[Rate]) -> tuple[float, float, float | None]:
    """Return the requests and answers per second of all, and the latency, to which each adds as much as it answers."""
    answered = sum(rate.answered for rate in rates)
    spent = sum(rate.answered * (rate.latency or 0.0) for rate in rates)
    return sum(rate.requests for rate in rates), answered, spent / answered if answered else None


def _number(value: Any) -> float | None:
    # The comparison says no to NaN, and to whole numbers that no float holds.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_NUMBER:
        return float(value)
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and _number(value) is not None else None


def _read_samples(value: Any) -> list[Sample]:
    """Return the samples of an answer; none if anything about them is odd."""
    if not isinstance(value, list) or len(value) > MAX_SAMPLES:
        return []
    samples: list[Sample] = []
    for row in value:
        numbers = [number for number in map(_number, row) if number is not None] if isinstance(row, list) else []
        if len(numbers) != 4 or len(row) != 4 or (samples and numbers[0] > samples[-1].ago):
            return []
        samples.append(Sample(*numbers))
    return samples


def _draw_summary(found: Look) -> Iterator[str]:
    states = Counter(worker.state for worker in found.workers)
    free = len(found.ports) - len(found.workers)
    ports = f" in {format_ports(found.ports)}" if found.ports else ""
    said = [f"{states[state]} {state}" for state in STATES if states[state] or state == "live"]
    yield f"<p>{', '.join(said)}, {free} of {len(found.ports)} ports free{escape(ports)} "
    yield f'<span class="soft">\N{MIDDLE DOT} {escape(found.project)}</span></p>\n'
    if found.waiting:
        yield f'<p class="warning">{escape(format_waiting(found.waiting))}; widen PROMPORTS_PORT_RANGE.</p>\n'
    if found.ports and not states["live"] + states["silent"]:
        yield '<p class="soft">No worker of this site holds a port: is the server running?</p>\n'


def _draw_sums(workers: Sequence[Worker], many: Sequence[Sequence[Rate]]) -> Iterator[str]:
    rates = add_up(many)
    requests, _, latency = _mean([rate for worker in workers if (rate := measure_now(worker.samples))])
    yield '<section class="sums" aria-label="All workers">\n'
    for name, kind, format_, number, values in (
        ("Requests per second", "first", _format_rate, requests, [rate.requests for rate in rates]),
        ("Latency", "second", _format_seconds, latency, [rate.latency for rate in rates]),
    ):
        top = _round_up(max((value for value in values if value is not None), default=0.0))
        points = [(rate.ago, rate.until, value) for rate, value in zip(rates, values, strict=True)]
        drawn = _plot(f"{name} of all workers", f"all-{kind}", points, top, format_, kind)
        yield f"<figure><figcaption><span>{name}, all workers</span><b>{format_(number)}</b></figcaption>\n"
        yield f'<small class="axis" aria-hidden="true"><span>{_shorten(format_(top))}</span></small>\n{drawn}'
        yield f'<small class="axis" aria-hidden="true"><span>{KEPT_SECONDS / 60:g} minutes ago</span><span>now</span>'
        yield "</small></figure>\n"
    yield "</section>\n"


def _draw_table(found: Look, many: Sequence[Sequence[Rate]], own_port: object) -> Iterator[str]:
    top = max((rate.requests for rates in many for rate in rates), default=0.0)
    slow = max((rate.latency or 0.0 for rates in many for rate in rates), default=0.0)
    yield '<table role="table">\n'
    yield "<caption>What each port does now. The plots are of the last "
    yield f"{KEPT_SECONDS / 60:g} minutes, from zero to {_format_rate(top)} requests per second and "
    yield f"to {_format_seconds(slow)}.</caption>\n"
    yield '<thead role="rowgroup"><tr role="row">'
    for name, kind in (
        ("Port", ""),
        ("State", ""),
        ("Process", "number"),
        ("Uptime", "number"),
        ("Series", "number"),
        ("Requests per second", ""),
        ("Latency", ""),
        *([("Look at", "")] if found.origin else []),
    ):
        yield f'<th role="columnheader" scope="col" class="{kind}">{name}</th>'
    yield '</tr></thead>\n<tbody role="rowgroup">\n'
    for worker, rates in zip(found.workers, many, strict=True):
        yield from _draw_row(worker, rates, top, slow, found.origin, worker.port == own_port)
    yield "</tbody>\n</table>\n"


def _draw_row(
    worker: Worker, rates: Sequence[Rate], top: float, slow: float, origin: str | None, is_own: bool
) -> Iterator[str]:
    port, now = worker.port, measure_now(worker.samples)
    is_live = worker.state == "live"
    shape, meaning = STATES.get(worker.state, STATES["other"])
    base = escape(f"{origin}:{port}")
    link = f'<a href="{base}/">{port}</a>' if origin and is_live else port
    current = ' aria-current="true"' if is_own else ""
    yield f'<tr role="row"{current}>'
    yield f'<th role="rowheader" scope="row">{link}'
    yield f"{' <small>this one</small>' if is_own else ''}</th>\n"
    yield f'<td role="cell" class="what"><span class="state {escape(worker.state)}" title="{escape(meaning)}">'
    yield f'<span aria-hidden="true">{shape}</span> {escape(worker.state)}</span>'
    note = worker.reason or worker.command
    yield f"<br><small>{escape(note)}</small></td>\n" if note else "</td>\n"
    for name, text in (
        ("Process", _or_nothing(worker.pid, str)),
        ("Uptime", _or_nothing(worker.uptime, format_duration)),
        ("Series", _or_nothing(worker.series, str)),
    ):
        yield f'<td role="cell" class="number" data-name="{name}">{escape(text)}</td>\n'
    for name, kind, format_, number, values, most in (
        ("Requests per second", "first", _format_rate, now and now.requests, [r.requests for r in rates], top),
        ("Latency", "second", _format_seconds, now and now.latency, [r.latency for r in rates], slow),
    ):
        points = [(rate.ago, rate.until, value) for rate, value in zip(rates, values, strict=True)]
        drawn = _plot(f"{name} of port {port}", f"{port}-{kind}", points, most, format_, kind) if points else ""
        yield f'<td role="cell" class="plotted" data-name="{name}"><div><span class="number">{format_(number)}</span>'
        yield f"{drawn}</div></td>\n"
    if origin:
        links = [
            f'<a href="{base}/{path}">{path}<span class="unseen"> of port {port}</span></a>'
            for path in ("metrics", "targets")
            if is_live
        ]
        yield f'<td role="cell" class="links">{"".join(links)}</td>'
    yield "</tr>\n"


def _draw_own(own: Mapping[str, object]) -> Iterator[str]:
    yield '<h2>This process</h2>\n<p>Prometheus scrapes it at <a href="/metrics">/metrics</a>. '
    yield 'The ports of all workers are listed at <a href="/targets">/targets</a>, as http_sd.</p>\n<dl>\n'
    for name, value in own.items():
        yield f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>\n"
    yield "</dl>\n"


def _plot(
    title: str,
    ident: str,
    points: Sequence[tuple[float, float, float | None]],
    top: float,
    format_: Callable[[float | None], str],
    kind: str,
) -> str:
    """Draw values from zero to `top` over the last minutes: one unit is a second wide, so that it fits any width."""
    runs: list[list[tuple[float, float]]] = [[]]
    for ago, until, value in points:
        if value is None:
            runs.append([])
        elif until < KEPT_SECONDS:
            height = 98 - 96 * min(value / top, 1.0) if top else 98.0
            runs[-1].append((max(KEPT_SECONDS - (ago + until) / 2, 0.0), height))
    if runs[-1] and points[-1][1] < 2 * SAMPLE_SECONDS:  # the newest is the value of now
        runs[-1].append((KEPT_SECONDS, runs[-1][-1][1]))
    shapes = []
    for run in filter(None, runs):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
        shapes.append(f'<polygon points="{run[0][0]:.1f},98 {line} {run[-1][0]:.1f},98"/>')
        shapes.append(f'<path d="M{line}{" h.01" if len(run) == 1 else ""}"/>')
    values = [value for *_, value in points if value is not None]
    said = f"Between {format_(min(values))} and {format_(max(values))}, last {format_(values[-1])}." if values else ""
    said = f"The last {KEPT_SECONDS / 60:g} minutes. {said or 'Nothing to show.'}"
    name = f"plot-{ident}"
    return (
        f'<svg role="img" viewBox="0 0 {KEPT_SECONDS:g} 100" preserveAspectRatio="none" class="{kind}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(said)}</desc><line x1="0" y1="98" x2="{KEPT_SECONDS:g}" y2="98"/>'
        f"{''.join(shapes)}</svg>\n"
    )


def _or_nothing(value: Any, format_: Callable[[Any], str]) -> str:
    return NOTHING if value is None else format_(value)


def _format_rate(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _format_seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    if value >= 1:
        return f"{value:,.1f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 or value == 0 else f"{1000 * value:.1f} ms"


def _shorten(number: str) -> str:
    return re.sub(r"\.0\b", "", number)


def _round_up(value: float) -> float:
    """Return the next number that a person would write at an axis."""
    if value <= 0:
        return 0.0
    power = 10.0 ** floor(log10(value))
    return next(power * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 20) if power * step >= value)
