"""The HTML pages: their content, who may see them, and how a browser renders them."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.test import RequestFactory
from django.urls import include, path
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from pytest_django import Settings
from selenium.common import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from django_promports import views
from django_promports.activity import KEPT_SECONDS, SAMPLE_SECONDS, Sample
from django_promports.page import html, rates
from django_promports.page.overview import Overview
from django_promports.page.rates import Rate
from django_promports.probe import Answer, Role, Scraped, Seen, State, count_samples, read
from django_promports.proof import UNSIGNED
from tests.browser import DESKTOP, PHONE, chromium, fill_in_login, measure_widths, resize
from tests.commands import DEMO, answering, run_python
from tests.examples import examples
from tests.servers import Site, database, describe, get, gunicorn, log_in, manage, request, wait_until

PAGE = "/metrics/"
PASSWORD = "correct horse"
ABOUT = {"application": "django_promports", "project": "site", "site": "site"}
STEADY = [Sample(ago, (60.0 - ago) * 7, (60.0 - ago) * 7, (60.0 - ago) * 0.07) for ago in range(60, -1, -5)]


def render(found: Overview, own: Mapping[str, object] | None = None) -> bytes:
    return html.encode(html.draw(found, own))


class Elements(HTMLParser):
    """The start tags of a page with their attributes, and the text outside style and script elements."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1][0] not in ("style", "script"):
            self.text += data

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]

    def links(self) -> list[str]:
        return [str(attributes["href"]) for tag, attributes in self.tags if tag == "a"]


def seen(port: int, state: str, reason: str = "", **more: Any) -> Seen:
    return Seen("127.0.0.1", port, State(state), reason, **more)


def find(*workers: Seen, project: str = "site", waiting: int = 0, origin: str | None = "http://web1") -> Overview:
    return Overview(project, range(19100, 19108), workers, waiting, origin)


def live(**about: Any) -> Seen:
    return read("127.0.0.1", 19100, Answer(State.LIVE, {**ABOUT, **about}))


@hypothesis(deadline=None, max_examples=examples(100))
@given(text=st.text(st.characters(exclude_characters="\r\0"), min_size=1, max_size=30) | st.just("'\"><script>&lt;{x}"))
def test_what_is_said_to_the_page_is_text_and_nothing_else(text: str) -> None:
    def draw(text: str) -> Elements:
        said = [live(command=text), seen(19101, "other", text), seen(19102, "live", samples=STEADY)]
        return Elements(render(find(*said, project=text, origin=f"http://{text}"), {f"-{text}": text, "port": 1}))

    drawn = draw(text)

    assert drawn.names() == draw("x").names()
    assert [sorted(attributes) for _, attributes in drawn.tags] == [sorted(a) for _, a in draw("x").tags]
    assert drawn.text.count(text.encode(errors="replace").decode()) >= 4


@hypothesis(deadline=None, max_examples=examples(100), suppress_health_check=[HealthCheck.too_slow])
@given(
    about=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ["pid", "command", "uptime_seconds", "series", "activity", "role", "scrapes"],
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats()
                | st.text()
                | st.sampled_from([10**400, "\ud800"]),
                lambda some: st.lists(some, max_size=4) | st.dictionaries(st.text(), some, max_size=2),
            ),
        ),
    )
)
def test_no_answer_of_another_program_breaks_the_page(about: dict[str, Any]) -> None:
    worker = live(**about)

    assert b"</html>" in render(find(worker), {"port": 19100})
    assert worker.scraped in (None, Scraped(0))
    assert all(map(math.isfinite, [worker.uptime or 0, worker.series or 0, *(n for s in worker.samples for n in s)]))


@pytest.mark.parametrize(
    ("scrapes", "read"),
    [
        ({"total": 0}, Scraped(0)),
        ({"total": 0, "by": "<b>", "seconds_ago": 1}, Scraped(0)),
        ({"total": 2, "by": "10.0.0.7", "seconds_ago": 3}, Scraped(2, "10.0.0.7", 3.0)),
        (
            {"total": 2, "by": "fe80::1%eth0", "seconds_ago": 3, "interval_seconds": 15.2},
            Scraped(2, "fe80::1%eth0", 3.0, 15.2),
        ),
        ({"total": 2, "by": "::1", "seconds_ago": 0, "interval_seconds": 0}, Scraped(2, "::1", 0.0)),
        ({"total": 2, "by": "::1", "seconds_ago": 1, "interval_seconds": "15"}, Scraped(2, "::1", 1.0)),
        ({"total": 2, "by": "the\x1b[31mred one", "seconds_ago": 1}, None),
        ({"total": 2, "by": "1" * 65, "seconds_ago": 1}, None),
        ({"total": 2, "by": ["::1"], "seconds_ago": 1}, None),
        ({"total": 2, "by": "::1", "seconds_ago": -1}, None),
        ({"total": 2, "by": "::1", "seconds_ago": math.nan}, None),
        ({"total": 2, "by": "::1", "seconds_ago": True}, None),
        ({"total": 2}, None),
        ({"total": -1}, None),
        ({"total": "2"}, None),
        ({"total": 10**400}, None),
        ({}, None),
        ([], None),
        ("never", None),
        (None, None),
    ],
    ids=str,
)
def test_only_plausible_scrapes_are_believed(scrapes: object, read: Scraped | None) -> None:
    assert live(scrapes=scrapes).scraped == read


@pytest.mark.parametrize(
    ("role", "is_worker"),
    [("worker", True), ("heir", False), (None, True), ("master", True), (["heir"], True), (7, True)],
    ids=str,
)
def test_only_an_heir_is_not_a_worker(role: object, is_worker: bool) -> None:
    assert live(role=role).is_worker == is_worker
    assert not seen(19100, "silent").is_worker


@pytest.mark.parametrize(
    ("scraped", "shown"),
    [
        (Scraped(0), "never"),
        (Scraped(1, "10.0.0.7", 3.2), "3 s ago by 10.0.0.7"),
        (Scraped(2, "10.0.0.7", 3.2, 15.01), "3 s ago by 10.0.0.7, every 15 s"),
        (Scraped(2, "10.0.0.7", 3.2, 59.98), "3 s ago by 10.0.0.7, every 1 m 0 s"),
        (Scraped(2, "::1", 400.0, 0.998), "6 m 40 s ago by ::1, every 1 s"),
    ],
    ids=str,
)
def test_the_last_scrape_is_shown_in_words(scraped: Scraped, shown: str) -> None:
    assert html.format_scraped(scraped) == shown
    drawn = Elements(render(find(seen(19100, "live", role=Role.WORKER, scraped=scraped))))
    assert f"scraped: {shown}" in drawn.text.replace("\N{NO-BREAK SPACE}", " ")
    assert ("small", {"class": "warning"}) in drawn.tags or shown != "never"


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("127.0.0.1", "1 of 2 workers were never scraped. PROMPORTS_ADDRESS is 127.0.0.1: a Prometheus on another"),
        ("::1", "1 of 2 workers were never scraped. PROMPORTS_ADDRESS is ::1: a Prometheus on another"),
        ("0.0.0.0", "1 of 2 workers were never scraped.\n"),
        ("", "1 of 2 workers were never scraped.\n"),
    ],
)
def test_workers_that_were_never_scraped_stand_out_with_the_usual_reason(address: str, hint: str) -> None:
    workers = [
        seen(19100, "live", role=Role.WORKER, scraped=Scraped(3, "::1", 1.0)),
        seen(19101, "live", role=Role.WORKER, scraped=Scraped(0)),
        seen(19102, "live", role=Role.HEIR, scraped=Scraped(0)),
    ]

    text = Elements(render(find(*workers)._replace(address=address))).text

    assert hint in text
    assert "3 live (1 for workers that have ended), 5 of 8 ports free" in text
    assert "live, heir" in text


def test_the_page_of_an_heir_says_so_and_who_has_scraped_it() -> None:
    own = {"port": 19102, "role": "heir", "scrapes": {"total": 1, "by": "10.0.0.7", "seconds_ago": 3.5}}

    text = Elements(render(find(), own)).text

    assert "Heir on port 19102" in text
    assert "scraped3 s ago by 10.0.0.7\n" in text


def test_an_heir_alone_is_not_a_running_site() -> None:
    text = Elements(render(find(seen(19102, "live", role=Role.HEIR, scraped=Scraped(0))))).text

    assert "No worker of this site holds a port" in text


@pytest.mark.parametrize(
    "activity",
    [
        [[5, 1, 1]],
        [[0, 1, 1, 1], [5, 1, 1, 1]],
        [[5, 1, 1, float("nan")]],
        [[5, 1, 1, True]],
        [[5, -1, 1, 1]],
        [[1, 1, 1, 1]] * 10_000,
        {"0": 1},
        "text",
    ],
    ids=["short", "backwards", "nan", "bool", "negative", "many", "dict", "text"],
)
def test_odd_samples_are_no_samples(activity: object) -> None:
    assert live(activity=activity).samples == []


def test_json_may_bring_what_no_page_can_hold() -> None:
    assert b"<small>?</small>" in render(find(live(command=json.loads('"\\ud800"'))))


def test_each_target_has_its_numbers_in_a_row() -> None:
    worker = live(
        pid=417, command="gunicorn", uptime_seconds=125.4, series=164, activity=[list(sample) for sample in STEADY]
    )

    said = " ".join(Elements(render(find(worker))).text.split())

    assert "1 live, 7 of 8 ports free in 19100-19107" in said
    assert "417 2 m 5 s 164 7.0" in said
    assert "10 ms" in said
    assert "Between 7.0 and 7.0, last 7.0." in said


def test_what_is_not_known_is_a_dash() -> None:
    said = Elements(render(find(live())))

    assert said.text.count(html.NOTHING) == 5
    assert "svg" not in said.names()


@pytest.mark.parametrize(
    ("state", "reason"), [("silent", "no answer in 3 s"), ("other", "another program has the port")]
)
def test_a_state_is_told_by_word_and_shape_and_with_its_reason(state: str, reason: str) -> None:
    said = Elements(render(find(seen(19100, state, reason)))).text

    assert f"{html.STATES[State(state)][0]} {state}" in said
    assert reason in said
    assert ("is the server running" in said) == (state == "other")  # a silent one may be a worker that hangs
    assert len({shape for shape, _ in html.STATES.values()}) == len(html.STATES)


def test_processes_that_wait_and_workers_that_are_missing_are_told() -> None:
    said = Elements(render(find(waiting=2))).text

    assert "2 processes wait for a port and are not metered; widen PROMPORTS_PORT_RANGE." in said
    assert "No worker of this site holds a port" in said


def test_the_page_fetches_nothing_and_its_policy_allows_nothing_else() -> None:
    page = render(find(seen(19100, "live", samples=STEADY)), {"port": 19100})
    elements = Elements(page)
    attributes = {name for _, attributes in elements.tags for name in attributes}

    assert not attributes & {"src", "srcset", "style", "background", "action"}
    assert not [name for name in attributes if name.startswith("on")]
    assert {link for tag, a in elements.tags if tag == "link" for link in [a["href"]]} == {"data:,"}
    assert not re.search(rb"url\(|@import|xlink", page)
    assert set(re.findall(rb"https?://[^/\"]*", page)) == {b"http://web1:19100"}
    assert "default-src 'none'" in dict(html.HEADERS)["Content-Security-Policy"]


def test_table_and_plots_speak_to_who_cannot_see_them() -> None:
    elements = Elements(render(find(seen(19100, "live", samples=STEADY))))
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    plots = [attributes for tag, attributes in elements.tags if tag == "svg"]

    assert len(ids) == len(set(ids))
    assert len(plots) == 4
    for plot in plots:
        assert plot["role"] == "img"
        assert set(str(plot["aria-labelledby"]).split()) <= set(ids)
    assert {a.get("scope") for tag, a in elements.tags if tag == "th"} == {"col", "row"}
    assert "caption" in elements.names()


def test_links_are_left_out_where_a_browser_would_be_refused() -> None:
    assert Elements(render(find(live(), origin=None))).links() == []
    assert Elements(render(find(seen(19100, "other")))).links() == []
    assert len(Elements(render(find(live()))).links()) == 3


def test_rates_are_differences_within_one_process() -> None:
    samples = [Sample(ago, 1e6 + requests, 1e6 + requests, 5e3 + requests / 4) for ago, requests in ((20, 0), (8, 60))]

    assert rates.measure(*samples) == Rate(20, 8, 5.0, 5.0, 0.25)
    assert rates.measure_now(samples) == Rate(20, 8, 5.0, 5.0, 0.25)
    assert rates.measure_now(samples[:1]) is None
    assert rates.measure_now([]) is None
    assert rates.measure(samples[1]._replace(ago=20), samples[0]._replace(ago=8)) is None  # the counter was reset
    idle = rates.measure(samples[0], samples[0]._replace(ago=0))
    assert idle == Rate(20, 0, 0.0, 0.0, None)


def test_the_workers_add_up_and_who_answers_more_weighs_more() -> None:
    many = [[Rate(60, 0, 30.0, 30.0, 0.1)], [Rate(30, 0, 12.0, 10.0, 0.5)], [Rate(60, 0, 0.0, 0.0, None)]]

    total = rates.add_up(many)

    assert total[0] == Rate(60, 55, 30.0, 30.0, 0.1)
    assert total[-1].requests == 42
    assert total[-1].latency == pytest.approx(0.2)
    assert len(total) == 60 / SAMPLE_SECONDS


def test_a_plot_stays_within_its_frame() -> None:
    samples = [Sample(KEPT_SECONDS + 100 - i, i * i, i * i, i * 3) for i in range(0, 400, 5)]
    page = render(find(seen(19100, "live", samples=samples))).decode()

    points = re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'(?:points|d)="M?([^"]+)"', page)))

    assert len(points) > 100
    assert all(0 <= float(x) <= KEPT_SECONDS and 0 <= float(y) <= 100 for x, y in points)


def ask(user: object = None) -> HttpRequest:
    asked = RequestFactory().get(PAGE)
    if user is not None:
        asked.user = user  # type: ignore[assignment]
    return asked


def test_who_is_not_logged_in_is_led_to_the_login(settings: Settings) -> None:
    answer = views.page(ask(AnonymousUser()))

    assert (answer.status_code, answer["Location"]) == (302, "/login/?next=/metrics/")

    settings.ROOT_URLCONF = (path("admin/", include(([path("in", views.page, name="login")], "admin"))),)
    assert views.page(ask(AnonymousUser()))["Location"] == "/admin/in?next=/metrics/"


@pytest.mark.parametrize("user", [User(), User(is_staff=True, is_active=False)], ids=["no-staff", "inactive"])
def test_who_is_no_staff_is_refused(user: User) -> None:
    with pytest.raises(PermissionDenied):
        views.page(ask(user))


def test_staff_is_shown_the_page_and_nobody_keeps_it(settings: Settings, free_ports: range) -> None:
    settings.PROMPORTS_PORT_RANGE = free_ports

    answer = views.page(ask(User(is_staff=True)))

    assert answer.status_code == 200
    assert f"{len(free_ports)} of {len(free_ports)} ports free" in answer.content.decode()
    assert answer["Content-Type"] == "text/html; charset=utf-8"
    assert "no-store" in answer["Cache-Control"]
    assert dict(html.HEADERS).items() <= dict(answer.items()).items() | {("Cache-Control", "no-store")}


def test_a_site_without_users_says_so() -> None:
    code = """
import sys, django
from django.conf import settings
from django.urls import include, path
urlpatterns = [path("metrics/", include("django_promports.urls"))]
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], INSTALLED_APPS=["django_promports"])
django.setup()
from django.test import Client
answer = Client().get("/metrics/")
print(answer.status_code, answer.content.decode())
"""
    done = run_python(code)

    assert done.stdout.startswith("403 "), done.stderr
    assert "django.contrib.auth" in done.stdout


@contextlib.contextmanager
def traffic(site: Site, pause: float = 0.05) -> Iterator[list[float]]:
    """Send requests at a constant rate, and record when each was answered."""
    answered: list[float] = []
    over = threading.Event()

    def send() -> None:
        while not over.wait(pause):
            if site.request() == 200:
                answered.append(time.monotonic())

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield answered
    finally:
        over.set()
        thread.join()


def make_users(tmp_path: Path) -> None:
    """Create the users `staff` and `guest` in the demo site of this test."""
    code = (
        "from django.contrib.auth.models import User\n"
        f"for name in ('staff', 'guest'): User.objects.create_user(name, '', {PASSWORD!r}, is_staff=name == 'staff')"
    )
    done = manage("shell", "--verbosity=0", "--command", code, DEMO_DATABASE=str(database(tmp_path)))
    assert done.returncode == 0, done.stderr


def open_page(site: Site, name: str) -> bytes:
    return log_in(f"http://{site.address}{PAGE}", name, PASSWORD)


def shown_rate(page: bytes) -> float:
    """Return the requests per second of all workers."""
    (number,) = re.findall(r"Requests per second, all workers</span><b>([\d.,]+)</b>", page.decode())
    return float(number.replace(",", ""))


def is_near(shown: float, answered: list[float], now: float) -> bool:
    """Return whether this may be the request rate of the last 10 s, given the pause between samples and a busy host."""
    true = [sum(now - window < moment <= now for moment in answered) / window for window in (10.0, 12.5, 15.0, 17.5)]
    return min(true) * 0.8 <= shown <= max(true) * 1.2


@pytest.mark.long
def test_both_pages_show_the_requests_per_second_that_there_are(free_ports: range, tmp_path: Path) -> None:
    with gunicorn(tmp_path, free_ports, workers=2) as site:
        make_users(tmp_path)
        first, _ = site.wait_for_workers(2)
        with traffic(site) as answered:
            began = time.monotonic()

            def both() -> list[float]:
                if time.monotonic() < began + 20:  # then no window begins before the traffic
                    return []
                page = open_page(site, "staff")
                own = get(f"http://127.0.0.1:{first}/")
                now = time.monotonic()
                rates = [shown_rate(page), shown_rate(own)]
                return rates if all(is_near(rate, answered, now) for rate in rates) else []

            shown = site.child.wait_until(both, "both pages show the rate", 60)
            refused = open_page(site, "guest")

        scraped = get(f"http://127.0.0.1:{first}/metrics")
        series = json.loads(get(f"http://127.0.0.1:{first}/?activity", Accept="application/json"))["series"]

    assert min(shown) > 0
    assert b"403 Forbidden" in refused
    assert series == count_samples(scraped)


def test_without_a_login_the_site_tells_nothing(free_ports: range, tmp_path: Path) -> None:
    with gunicorn(tmp_path, free_ports, workers=1) as site:
        site.wait_for_workers(1)

        body = get(f"http://{site.address}{PAGE}")

    assert b"password" in body
    assert b"live" not in body


def test_the_page_of_a_worker_needs_the_token_and_then_has_no_links(free_ports: range, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret")
    with gunicorn(tmp_path, free_ports, workers=1, DEMO_TOKEN_FILE=str(token)) as site:
        (port,) = site.wait_for_workers(1)

        refused = request(f"http://127.0.0.1:{port}/")
        page = get(f"http://127.0.0.1:{port}/", Authorization="Bearer s3cret")

    assert refused == 401
    assert b"1 live" in page
    assert not [link for link in Elements(page).links() if "//" in link]


def test_another_program_on_a_port_is_shown_as_one_whatever_it_says(free_ports: range, tmp_path: Path) -> None:
    *ports, liar, _ = free_ports
    said = {**ABOUT, "site": DEMO, "command": "<script>alert(1)</script>", "activity": [[1, 2]]}
    head = b"HTTP/1.1 200 OK\r\nServer: django_promports\r\n\r\n"
    with (
        answering(liar, head + json.dumps(said).encode()),
        answering(ports[-1], b"HTTP/1.1 200 OK\r\n\r\nhello"),
        gunicorn(tmp_path, free_ports, workers=1) as site,
    ):
        site.child.wait_until(lambda: describe(ports[0]), "it is live")
        site.child.wait_until(lambda: site.request() == 200, "it has loaded the site")
        page = get(f"http://127.0.0.1:{ports[0]}/", Host='web1"><script>:80')

    elements = Elements(page)
    assert elements.names().count("script") == 1
    assert "alert(1)" not in elements.text
    assert UNSIGNED in elements.text  # it claims to belong to this site
    assert "another program has the port" in elements.text
    assert f"http://127.0.0.1:{ports[0]}/" in elements.links()


@pytest.fixture
def site(free_ports: range, tmp_path: Path) -> Iterator[Site]:
    """Two workers, and users who can log in."""
    with gunicorn(tmp_path, free_ports, workers=2) as site:
        make_users(tmp_path)
        site.wait_for_workers(2)
        yield site


def see(browser: Chrome, css: str, text: str = "") -> str:
    """Return the text of an element once it contains this; a page that is redrawn replaces its elements."""

    def look() -> str:
        with contextlib.suppress(WebDriverException):
            said = browser.find_element(By.CSS_SELECTOR, css).text
            return said if text in said else ""
        return ""

    return wait_until(look, f"{css} says {text!r}", output=lambda: browser.page_source[-5000:])


def click(browser: Chrome, css: str) -> None:
    def attempt() -> bool:
        with contextlib.suppress(WebDriverException):
            browser.find_element(By.CSS_SELECTOR, css).click()
            return True
        return False

    wait_until(attempt, f"{css} can be clicked", output=lambda: browser.page_source[-5000:])


def assert_fits(browser: Chrome, *, dark: bool) -> None:
    """Assert that the page is not wider than the window of a desktop and of a phone."""
    for size in (DESKTOP, PHONE):
        resize(browser, size, dark=dark)
        content, room, window = measure_widths(browser)
        assert content <= room
        assert window == size[0]


@pytest.mark.browser
def test_a_person_clicks_from_the_site_to_the_workers(
    site: Site, program: Callable[[str], str], tmp_path: Path
) -> None:
    first, second = site.live()
    with chromium(program, tmp_path / "profile") as browser:
        browser.get(f"http://{site.address}{PAGE}")
        fill_in_login(browser, "staff", PASSWORD)
        see(browser, "h1", "Workers")
        assert_fits(browser, dark=False)

        click(browser, f'a[href$=":{first}/"]')
        see(browser, "h1", f"Worker on port {first}")
        see(browser, "tr[aria-current]", str(first))
        assert_fits(browser, dark=True)
        click(browser, f'a[href$=":{second}/"]')
        see(browser, "h1", f"Worker on port {second}")
        click(browser, f'a[href$=":{first}/metrics"]')
        see(browser, "body", "django_http_requests_before_middlewares_total")
        browser.back()
        click(browser, f'a[href$=":{second}/targets"]')
        see(browser, "body", f'"127.0.0.1:{first}"')

        logged = [entry["message"] for entry in browser.get_log("browser")]  # type: ignore[no-untyped-call]
    assert not [message for message in logged if "Security Policy" in message or "Uncaught" in message], logged


@pytest.mark.browser
def test_a_page_is_drawn_anew_in_place_and_says_when_it_cannot_be(
    site: Site, program: Callable[[str], str], tmp_path: Path
) -> None:
    first, second = site.live()
    with chromium(program, tmp_path / "profile") as browser:
        browser.get(f"http://127.0.0.1:{first}/")
        browser.execute_script("window.isSamePage = true")
        drawn = see(browser, "footer", "Drawn at")
        link = f'a[href$=":{second}/metrics"]'
        browser.execute_script("document.querySelector(arguments[0]).focus()", link)

        wait_until(lambda: see(browser, "footer") != drawn, "it is drawn anew")

        assert browser.execute_script("return window.isSamePage")
        assert browser.execute_script("return document.activeElement.matches(arguments[0])", link)
        assert browser.find_element(By.CSS_SELECTOR, "[role=status]").text == ""

        site.child.stop()
        see(browser, "[role=status]", "cannot be refreshed")
        assert see(browser, "h1", f"Worker on port {first}")


@pytest.mark.browser
def test_without_javascript_the_page_is_whole_and_still_drawn_anew(
    site: Site, program: Callable[[str], str], tmp_path: Path
) -> None:
    first, second = site.live()
    with chromium(program, tmp_path / "profile", javascript=False) as browser:
        browser.get("data:text/html,<title>off</title><script>document.title='on'</script>")
        assert browser.title == "off"
        browser.get(f"http://{site.address}{PAGE}")
        fill_in_login(browser, "staff", PASSWORD)
        see(browser, "table", "live")
        drawn = see(browser, "footer", "Drawn at")

        wait_until(lambda: see(browser, "footer") != drawn, "it is drawn anew")
        click(browser, f'a[href$=":{first}/"]')
        see(browser, "h1", f"Worker on port {first}")
        click(browser, f'a[href$=":{second}/"]')
        see(browser, "h1", f"Worker on port {second}")
