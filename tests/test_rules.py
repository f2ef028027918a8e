"""Rules, alerts and dashboards: tested by promtool, with series that exist, and in a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.urls import URLPattern

from demo_site.management.commands.demo import REQUESTS
from demo_site.urls import urlpatterns
from tests.servers import (
    ROOT,
    Prometheus,
    Site,
    export_targets,
    gunicorn,
    prometheus,
    scrape,
    send_requests,
    wait_until,
)

pytestmark = pytest.mark.rules

FOLDER = ROOT / "prometheus"
RULE_FILES = sorted(FOLDER.glob("rules/*.yml"))
TEST_FILES = sorted(FOLDER.glob("tests/*.yml"))
RULES: list[dict[str, Any]] = [
    rule for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
UNIT_TESTS: list[dict[str, Any]] = [test for path in TEST_FILES for test in yaml.safe_load(path.read_text())["tests"]]
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("dashboards/*.json")}
README = (FOLDER / "README.md").read_text()
# Series that Prometheus makes of each scrape: https://prometheus.io/docs/concepts/jobs_instances/
MADE_BY_PROMETHEUS = {"up", "scrape_duration_seconds", "scrape_samples_scraped", "ALERTS"}
NO_METRICS = {"and", "or", "unless", "offset", "bool", "group_left"}
COUNTER = "django_http_requests_before_middlewares_total"


def metric_names(expression: str) -> set[str]:
    """Return the names of the metrics in a PromQL expression."""
    text = re.sub(r'"[^"]*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", text)
    text = re.sub(r"\b(by|without|on|ignoring) \([^)]*\)", "", text)
    return set(re.findall(r"(?<![\w:$])[a-zA-Z_][\w:]*\b(?!\s*\()", text)) - NO_METRICS


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def variables(dashboard: dict[str, Any]) -> dict[str, str]:
    """Return the queries of the variables of a dashboard."""
    return {
        variable["name"]: variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    }


def fill_in(expression: str) -> str:
    """Replace the variables of a dashboard expression by values for the demo, as Grafana does."""
    values = {"$job": "django", "$instance": ".+", "$__rate_interval": "20s"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


@pytest.mark.parametrize(
    "arguments",
    [["check", "config", FOLDER / "prometheus.yml"], ["check", "rules", *RULE_FILES], ["test", "rules", *TEST_FILES]],
    ids=["config", "rules", "tests"],
)
def test_promtool_is_content(arguments: list[Any], program: Callable[[str], str]) -> None:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_unit_test_that_fires_it_and_one_that_does_not(alert: str) -> None:
    tests = [one for test in UNIT_TESTS for one in test.get("alert_rule_test", []) if one["alertname"] == alert]

    assert [one for one in tests if one["exp_alerts"]]
    assert [one for one in tests if not one["exp_alerts"]]


def test_each_recording_rule_has_a_unit_test() -> None:
    tested = {
        name
        for test in UNIT_TESTS
        for one in test.get("promql_expr_test", [])
        if one["exp_samples"]
        for name in metric_names(one["expr"])
    }

    assert tested >= RECORDED


def test_names_and_annotations_are_as_prometheus_users_expect() -> None:
    for name in RECORDED:
        assert re.fullmatch(r"(instance|job)(_[a-z]+)*:[a-z_]+:[a-z]+(_?[a-z0-9]+)*", name)
    for name, alert in ALERTS.items():
        assert name.startswith("Promports")
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        summary, description = alert["annotations"]["summary"], alert["annotations"]["description"]
        assert summary.endswith(".")
        assert "{{" not in summary
        assert "{{ $labels.job }}" in description


def test_each_rule_and_alert_is_in_the_readme_and_the_other_way_round() -> None:
    assert set(re.findall(r"^\| `([\w]+:[\w:]+)` \|", README, re.MULTILINE)) == RECORDED
    assert re.findall(r"^### (\w+)$", README, re.MULTILINE) == list(ALERTS)


def test_each_recorded_name_is_used_by_a_dashboard_or_an_alert() -> None:
    used = {name for board in DASHBOARDS.values() for expr in expressions(board) for name in metric_names(expr)}
    for rule in RULES:
        used |= metric_names(rule["expr"])

    assert used >= RECORDED


def test_dashboards_can_be_imported_beside_each_other() -> None:
    assert len({board["uid"] for board in DASHBOARDS.values()}) == len(DASHBOARDS) == 2
    for board in DASHBOARDS.values():
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
        assert {"datasource", "job"} <= {variable["name"] for variable in board["templating"]["list"]}
        for panel in board["panels"]:
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
            covered = {(x, y) for other in board["panels"] if other is not panel for x, y in cells(other)}
            assert not covered & cells(panel), f"{panel['title']} lies on another panel"


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    at = panel["gridPos"]
    return {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}


def test_every_metric_that_is_named_here_occurs_in_a_real_scrape(free_ports: range, tmp_path: Path) -> None:
    named = {name for rule in RULES for name in metric_names(rule["expr"])}
    for board in DASHBOARDS.values():
        named |= {name for expr in expressions(board) for name in metric_names(expr)}
        named |= {name for query in variables(board).values() for name in re.findall(r"^label_values\((\w+)", query)}
    for test in UNIT_TESTS:
        named |= {name for series in test["input_series"] for name in metric_names(series["series"])}
        named |= {name for one in test.get("promql_expr_test", []) for name in metric_names(one["expr"])}
    named |= set(re.findall(r"\b(?:django|shop|promports|process|python|scrape)_\w+\b", re.sub(r"\w+:\S+", "", README)))
    named -= {"django_promports", "django_prometheus", "scrape_timeout"}  # in the prose

    with gunicorn(tmp_path, free_ports, workers=2) as site:
        site.wait_for_workers(2)
        visit_all_views(site)
        exposed = {sample.partition("{")[0] for port in site.live() for sample in scrape(port)}
    exposed |= {name.removesuffix("_bucket") for name in exposed}  # the name of a histogram in prose

    assert named >= {COUNTER, "up", "promports_port", *RECORDED}
    assert named - exposed - RECORDED - MADE_BY_PROMETHEUS == set()


def visit_all_views(site: Site, times: int = 10) -> None:
    names = {pattern.name for pattern in urlpatterns if isinstance(pattern, URLPattern)}
    assert names - {"login"} == set(REQUESTS)
    for number in range(times):
        for method, path, expected, _ in REQUESTS.values():
            assert site.request(path.format(number % 6 + 1), method) == expected, site.child.output()


@contextlib.contextmanager
def visitors(ask: Callable[[], object]) -> Iterator[None]:
    """Call `ask` repeatedly in a thread."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(0.05):
            ask()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.long
def test_every_dashboard_expression_and_every_rule_returns_data(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    *ports, prometheus_port = free_ports
    asked = {f"{name}: {expr}": fill_in(expr) for name, board in DASHBOARDS.items() for expr in expressions(board)}
    asked |= {name: name for name in RECORDED}
    asked |= {query: query for query in re.findall(r"^\|.*\| `(.+)` \|$", README, re.MULTILINE)}
    with prometheus(program("prometheus"), tmp_path, prometheus_port) as server:
        export_targets(tmp_path / "targets/django.json", ports[:-1])
        with contextlib.ExitStack() as stack:
            site = stack.enter_context(gunicorn(tmp_path, ports))
            live = site.wait_for_workers()
            stack.enter_context(visitors(lambda: visit_all_views(site, 1)))
            missing: dict[str, str] = {}

            def all_have_data() -> bool:
                missing.clear()
                missing.update((name, expr) for name, expr in asked.items() if not has_data(server, expr))
                return not missing

            wait_until(
                all_have_data, "every expression returns data", 60, lambda: f"{missing}\n{server.child.output()}"
            )
            rules = [rule for group in server.ask("rules")["groups"] for rule in group["rules"]]

            assert len(rules) == len(RULES)
            assert {rule["health"] for rule in rules} == {"ok"}
            assert server.ask("label/job/values", **{"match[]": "promports_port"}) == ["django"]
            workers = server.ask("label/instance/values", **{"match[]": 'promports_port{job="django"}'})
            assert workers == [f"127.0.0.1:{port}" for port in live]


def has_data(server: Prometheus, expression: str) -> bool:
    result = server.ask("query", query=expression)["result"]
    return any(not math.isnan(float(series["value"][1])) for series in result)


@pytest.mark.long
def test_recorded_requests_per_second_are_the_sum_of_the_workers_through_kills(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    window = 45  # seconds, in which the requests and the kills have to fit
    name = "job:django_http_requests:rate5m"
    (expression,) = (rule["expr"] for rule in RULES if rule.get("record") == name)
    *ports, prometheus_port = free_ports

    def shorten(text: str) -> str:
        return text.replace("[5m]", f"[{window}s]")

    with prometheus(program("prometheus"), tmp_path, prometheus_port, change_rules=shorten) as server:
        export_targets(tmp_path / "targets/django.json", ports[:-1])
        with gunicorn(tmp_path, ports) as site:
            site.wait_for_workers()

            def counts() -> dict[str, float]:
                return {f"127.0.0.1:{port}": scrape(port)[COUNTER] for port in site.live()}

            def ask(number: int) -> int:
                return site.request("/search/?q=g")

            # rate() extrapolates a series to the edges of the window, but not below zero: begin well above.
            site.child.wait_until(
                lambda: send_requests(50, ask) and min(counts().values()) >= 20, "each worker had requests"
            )
            before = counts()
            # A window has to start there later, so wait for some scrapes.
            steady = f"min_over_time({COUNTER}[6s]) and count_over_time({COUNTER}[6s]) >= 5"
            server.child.wait_until(lambda: server.query(steady) == before, "Prometheus has the counts before")
            for port in ports[:3]:
                assert send_requests(60, ask).count(200) == 60
                pid = site.live()[port]
                os.kill(pid, signal.SIGKILL)

                def is_gone(pid: int = pid) -> bool:
                    return pid not in site.live().values()

                site.child.wait_until(is_gone, "the worker is gone")
                site.wait_for_workers()
            after = counts()
            assert sum(after.values()) - sum(before.values()) == 180

            seen: list[object] = []

            def by_hand() -> tuple[float, ...]:
                """Return the last recorded value, that of its expression at that time, and the sum computed by hand."""
                at, recorded = server.ask("query", query=f"{name}[30s]")["result"][0]["values"][-1]

                def ask_for_value() -> str:
                    return str(server.ask("query", query=shorten(expression), time=at)["result"][0]["value"][1])

                value = ask_for_value()
                workers = server.ask("query", query=f"{COUNTER}[{window}s]", time=at)["result"]
                assert len(workers) == len(after)
                seen[:] = [at, before, after]
                total = 0.0
                for series in workers:
                    instance, values = series["metric"]["instance"], series["values"]
                    (first, count), (last, last_count) = values[0], values[-1]
                    seen.append((instance, len(values), first, count, last, last_count))
                    # Where the next scrape beyond an edge is missing, rate() does not extrapolate to the edge.
                    reach = 1.05 * (last - first) / (len(values) - 1)
                    if first - (at - window) > reach or at - last > reach:
                        return ()
                    if (float(count), float(last_count)) != (before[instance], after[instance]):
                        return ()
                    total += (after[instance] - before[instance]) / (last - first)
                # A scrape is stored when it ends, under the time when it began.
                if value != ask_for_value():
                    return ()
                return float(recorded), float(value), total

            recorded, value, total = wait_until(by_hand, "the window holds all of it", 2 * window, lambda: f"{seen}")
            assert value == pytest.approx(total, rel=1e-6)
            # The rule may have been evaluated before the scrape of that second was stored.
            assert recorded == pytest.approx(total, rel=1.5 / window)


def hurry(text: str) -> str:
    """Shorten the durations in a rule file: a minute becomes two seconds."""
    seconds = {"m": 2, "h": 120}
    return re.sub(r"\b(\d+)([mh])\b", lambda match: f"{int(match[1]) * seconds[match[2]]}s", text)


LONGEST_FOR = 2 * 15  # seconds, for alerts with shortened durations


def firing(server: Prometheus) -> set[str]:
    return {alert["labels"]["alertname"] for alert in server.ask("alerts")["alerts"] if alert["state"] == "firing"}


def fired(server: Prometheus) -> set[str]:
    """Return the alerts that have fired since Prometheus started."""
    result = server.ask("query", query='count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[1h]))')
    return {series["metric"]["alertname"] for series in result["result"]}


def wait_for_scrapes(server: Prometheus, port: int, count: int) -> None:
    """Wait until Prometheus has scraped a port this many times."""
    tried = f'count_over_time(up{{instance="127.0.0.1:{port}"}}[1h]) >= {count}'
    server.child.wait_until(lambda: server.query(tried), f"{count} scrapes", 3 * count + 30)


@pytest.mark.long
def test_a_worker_that_is_killed_for_good_fires_the_alert_that_says_so_and_28_spare_ports_none(
    program: Callable[[str], str], many_free_ports: range, tmp_path: Path
) -> None:
    *ports, prometheus_port = many_free_ports[:34]
    spare = ports[4:-1]
    assert len(spare) == 28
    with prometheus(program("prometheus"), tmp_path, prometheus_port, change_rules=hurry) as server:
        export_targets(tmp_path / "targets/django.json", ports[:-1])
        with contextlib.ExitStack() as stack:
            site = stack.enter_context(gunicorn(tmp_path, ports))
            live = site.wait_for_workers()
            stack.enter_context(visitors(lambda: site.request("/teas/1/")))
            server.child.wait_until(lambda: server.query("job:promports_ports:count") == {"": 32}, "32 ports")
            server.child.wait_until(lambda: server.query("job:promports_workers:quantile1h") == {"": 4}, "4 workers")
            wait_for_scrapes(server, spare[-1], LONGEST_FOR + 10)
            assert fired(server) == set()

            # A stopped master does not replace its workers.
            os.kill(site.child.pid, signal.SIGSTOP)
            stack.callback(os.kill, site.child.pid, signal.SIGCONT)
            os.kill(live[ports[3]], signal.SIGKILL)
            server.child.wait_until(lambda: firing(server), "an alert fires", 60)

            wait_for_scrapes(server, spare[-1], 2 * LONGEST_FOR + 25)
            assert firing(server) == fired(server) == {"PromportsWorkersMissing"}
        server.child.wait_until(lambda: "PromportsNoWorkers" in firing(server), "an alert says that nobody is left", 60)
        server.child.wait_until(lambda: firing(server) == {"PromportsNoWorkers"}, "that is all that it says")
        assert server.query("up") == {f"127.0.0.1:{port}": 0 for port in ports[:-1]}


@pytest.mark.long
def test_a_process_that_waits_for_a_port_and_a_full_range_fire_the_alerts_that_say_so(
    program: Callable[[str], str], free_ports: range, tmp_path: Path
) -> None:
    first, second, site_port, prometheus_port = free_ports[:4]
    with prometheus(program("prometheus"), tmp_path, prometheus_port, change_rules=hurry) as server:
        export_targets(tmp_path / "targets/django.json", [first, second])
        with gunicorn(tmp_path, [first, second, site_port], workers=3) as site:
            site.wait_for_workers(2)
            expected = {"PromportsProcessesWaiting", "PromportsRangeNearlyFull"}
            server.child.wait_until(lambda: firing(server) == expected, "both alerts fire", 90)

            assert fired(server) == expected
