"""The HTML page: what each port of a site does now, and its requests and latency over the last minutes.

All data is escaped. The page works without its script and loads nothing from other servers. The script replaces the
content every few seconds; without it, the browser reloads the page.
"""

from __future__ import annotations

import ipaddress
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from math import floor, log10
from pathlib import Path
from time import gmtime, strftime
from typing import Any

from django_promports.activity import KEPT_SECONDS, SAMPLE_SECONDS
from django_promports.page.overview import Overview
from django_promports.page.rates import NOW_SECONDS, Rate, add_up, mean, measure_all, measure_now
from django_promports.ports import format_ports
from django_promports.presence import format_waiting
from django_promports.probe import Role, Scraped, Seen, State, read_scraped

REFRESH_SECONDS = 5
NOTHING = "\N{EN DASH}"
NEVER = "never"

STYLE = Path(__file__).with_name("page.css").read_text("utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text("utf-8")

# Each state has a shape too: not everyone can distinguish the colours.
STATES = {
    State.LIVE: ("\N{BLACK CIRCLE}", "a worker of this site answers"),
    State.SILENT: ("\N{WHITE CIRCLE}", "it does not answer in time"),
    State.OTHER: ("\N{BLACK UP-POINTING TRIANGLE}", "another program or site has the port"),
}
HEIR = ("\N{FISHEYE}", "a process exports the last counts of a worker that has ended")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


# The headers of the page allow only this style and this script, whatever else gets into it.
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
FOOT = """<footer><small>Drawn at {time} UTC, refreshed every {refresh} s. The numbers are means over the last
{now:g} s. A new process starts a new plot, and continues the counts of its predecessor.</small></footer>
</main>
<p role="status" class="warning"></p>
<script data-refresh="{refresh}">{script}</script>
</body>
</html>
"""


def render(found: Overview) -> bytes:
    """Return the page of a site."""
    return encode(draw(found))


def encode(pieces: Iterable[str]) -> bytes:
    """Return the bytes of a page. Lone surrogates, which JSON may contain, are replaced."""
    return "".join(pieces).encode(errors="replace")


def draw(found: Overview, own: Mapping[str, object] | None = None) -> Iterator[str]:
    """Yield the page in pieces, each of which takes about a millisecond to make, and longer in a large site.

    own: the description of the worker that serves it; None if the site serves it.
    """
    port = own.get("port") if own else None
    role = "Heir" if own and own.get("role") == Role.HEIR else "Worker"
    title = "Workers" if own is None else escape(f"{role} on port {port}")
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
    """Return a duration as text: 2 d 3 h, 4 h 5 m, 6 m 7 s or 8 s."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    for amount, unit, smaller, smaller_unit in ((days, "d", hours, "h"), (hours, "h", minutes, "m")):
        if amount:
            return f"{amount} {unit} {smaller} {smaller_unit}"
    return f"{minutes} m {rest} s" if minutes else f"{rest} s"


def format_scraped(scraped: Scraped) -> str:
    """Return when a port was scraped, by whom and how often, as text: 3 s ago by 10.0.0.7, every 15 s."""
    if scraped.seconds_ago is None:
        return NEVER
    interval = scraped.interval_seconds
    every = "" if interval is None else f"{interval:.2g} s" if interval < 10 else format_duration(round(interval))
    return f"{format_duration(scraped.seconds_ago)} ago by {scraped.by}" + (f", every {every}" if every else "")


def format_live(live: int, heirs: int) -> str:
    """Return how many ports are live, and how many of these are served by an heir."""
    return f"{live} live" + (f" ({heirs} for workers that have ended)" if heirs else "")


def format_unscraped(number: int, workers: int, address: str) -> str:
    """Return a hint for workers that were never scraped. The most common reason is the address of their ports."""
    hint = "No worker was ever scraped." if number == workers else f"{number} of {workers} workers were never scraped."
    if address and ipaddress.ip_address(address).is_loopback:
        hint += f" PROMPORTS_ADDRESS is {address}: a Prometheus on another machine cannot reach this address."
    return hint


def _draw_summary(found: Overview) -> Iterator[str]:
    states = Counter(worker.state for worker in found.workers)
    free = len(found.ports) - len(found.workers)
    ports = f" in {format_ports(found.ports)}" if found.ports else ""
    others = (state for state in STATES if states[state] and state != State.LIVE)
    workers = [seen for seen in found.workers if seen.is_worker]
    counts = [
        format_live(states[State.LIVE], states[State.LIVE] - len(workers)),
        *(f"{states[state]} {state}" for state in others),
    ]
    yield f"<p>{', '.join(counts)}, {free} of {len(found.ports)} ports free{escape(ports)} "
    yield f'<span class="soft">\N{MIDDLE DOT} {escape(found.project)}</span></p>\n'
    if found.waiting:
        yield f'<p class="warning">{escape(format_waiting(found.waiting))}; widen PROMPORTS_PORT_RANGE.</p>\n'
    if never := sum(seen.is_never_scraped for seen in workers):
        yield f'<p class="warning">{escape(format_unscraped(never, len(workers), found.address))}</p>\n'
    if found.ports and not states[State.SILENT] and not workers:
        yield '<p class="soft">No worker of this site holds a port: is the server running?</p>\n'


def _draw_sums(workers: Sequence[Seen], many: Sequence[Sequence[Rate]]) -> Iterator[str]:
    rates = add_up(many)
    requests, _, latency = mean([rate for worker in workers if (rate := measure_now(worker.samples))])
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


def _draw_table(found: Overview, many: Sequence[Sequence[Rate]], own_port: object) -> Iterator[str]:
    top = max((rate.requests for rates in many for rate in rates), default=0.0)
    slow = max((rate.latency or 0.0 for rates in many for rate in rates), default=0.0)
    yield '<table role="table">\n'
    yield "<caption>What each port does now. The plots show the last "
    yield f"{KEPT_SECONDS / 60:g} minutes, from zero to {_format_rate(top)} requests per second and "
    yield f"from zero to {_format_seconds(slow)}.</caption>\n"
    yield '<thead role="rowgroup"><tr role="row">'
    for name, kind in (
        ("Port", ""),
        ("State", ""),
        ("Process", "number"),
        ("Uptime", "number"),
        ("Series", "number"),
        ("Requests per second", ""),
        ("Latency", ""),
        *([("Links", "")] if found.origin else []),
    ):
        yield f'<th role="columnheader" scope="col" class="{kind}">{name}</th>'
    yield '</tr></thead>\n<tbody role="rowgroup">\n'
    for worker, rates in zip(found.workers, many, strict=True):
        yield from _draw_row(worker, rates, top, slow, found.origin, worker.port == own_port)
    yield "</tbody>\n</table>\n"


def _draw_row(
    worker: Seen, rates: Sequence[Rate], top: float, slow: float, origin: str | None, is_own: bool
) -> Iterator[str]:
    port, now = worker.port, measure_now(worker.samples)
    is_live = worker.state == State.LIVE
    shape, meaning = HEIR if worker.role == Role.HEIR else STATES[worker.state]
    base = escape(f"{origin}:{port}")
    link = f'<a href="{base}/">{port}</a>' if origin and is_live else port
    current = ' aria-current="true"' if is_own else ""
    yield f'<tr role="row"{current}>'
    yield f'<th role="rowheader" scope="row">{link}'
    yield f"{' <small>this one</small>' if is_own else ''}</th>\n"
    yield f'<td role="cell" class="what"><span class="state {escape(worker.state)}" title="{escape(meaning)}">'
    role = ", heir" if worker.role == Role.HEIR else ""
    yield f'<span aria-hidden="true">{shape}</span> {escape(worker.state)}{role}</span>'
    note = worker.reason or worker.command
    yield f"<br><small>{escape(note)}</small>" if note else ""
    if worker.scraped is not None:
        kind = ' class="warning"' if worker.is_never_scraped else ""
        yield f"<br><small{kind}>scraped: {_keep_units(escape(format_scraped(worker.scraped)))}</small>"
    yield "</td>\n"
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
        if name == "scrapes" and (scraped := read_scraped(value)):
            name, value = "scraped", format_scraped(scraped)
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
    """Return an SVG of values from zero to `top` over the last minutes. A unit of x is a second, at any width."""
    runs: list[list[tuple[float, float]]] = [[]]
    for ago, until, value in points:
        if value is None:
            runs.append([])
        elif until < KEPT_SECONDS:
            height = 98 - 96 * min(value / top, 1.0) if top else 98.0
            runs[-1].append((max(KEPT_SECONDS - (ago + until) / 2, 0.0), height))
    if runs[-1] and points[-1][1] < 2 * SAMPLE_SECONDS:  # the newest value is the current one
        runs[-1].append((KEPT_SECONDS, runs[-1][-1][1]))
    shapes = []
    for run in filter(None, runs):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
        shapes.append(f'<polygon points="{run[0][0]:.1f},98 {line} {run[-1][0]:.1f},98"/>')
        shapes.append(f'<path d="M{line}{" h.01" if len(run) == 1 else ""}"/>')
    values = [value for *_, value in points if value is not None]
    text = f"Between {format_(min(values))} and {format_(max(values))}, last {format_(values[-1])}." if values else ""
    text = f"The last {KEPT_SECONDS / 60:g} minutes. {text or 'Nothing to show.'}"
    name = f"plot-{ident}"
    return (
        f'<svg role="img" viewBox="0 0 {KEPT_SECONDS:g} 100" preserveAspectRatio="none" class="{kind}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(text)}</desc><line x1="0" y1="98" x2="{KEPT_SECONDS:g}" y2="98"/>'
        f"{''.join(shapes)}</svg>\n"
    )


def _keep_units(text: str) -> str:
    """Let no line break separate a number from its unit."""
    return re.sub(r"(?<=\d) (?=[a-z])", "\N{NO-BREAK SPACE}", text)


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
    """Return the next round number, as for the label of an axis."""
    if value <= 0:
        return 0.0
    power = 10.0 ** floor(log10(value))
    return next(power * step for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 20) if power * step >= value)
