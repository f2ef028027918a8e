"""Checks never raise, whatever the settings and the environment contain: an exception would end every command."""

from __future__ import annotations

import decimal
import enum
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from django.core import checks as django_checks
from django.test import override_settings
from django.utils.functional import SimpleLazyObject, lazystr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from django_promports import checks
from django_promports.conf import MAX_SHOWN, Conf, conf
from tests.examples import examples

PROMPORTS = sorted(name for name in vars(Conf) if name.startswith("PROMPORTS_"))
# Other settings and variables that the checks look at.
OTHERS = ["MIDDLEWARE", "ROOT_URLCONF"]
OTHERS += [f"PROMETHEUS_METRICS_EXPORT_{name}" for name in ("PORT", "PORT_RANGE", "ADDRESS")]
VARIABLES = ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir", "TMPDIR", "HOME", "RUNTIME_DIRECTORY"]
UNSET = object()


class Made(NamedTuple):
    """A function that makes a value, for values whose repr() raises, which Hypothesis could not show."""

    make: Callable[[], object]


class Hostile:
    """An object whose every method raises."""

    def _raise(self, *arguments: object) -> Any:
        raise RuntimeError("not today")

    __repr__ = __str__ = __bool__ = __len__ = __iter__ = __getitem__ = __fspath__ = __hash__ = __eq__ = _raise
    __int__ = __index__ = __float__ = __contains__ = __call__ = __lt__ = __format__ = _raise


class HostileText(str):
    """A string whose comparison, hash and repr() raise."""

    def __repr__(self) -> str:
        raise RuntimeError("not today")

    __hash__ = __eq__ = __format__ = __repr__  # type: ignore[assignment]


class HostileList(list[object]):
    def __len__(self) -> int:
        raise RuntimeError("not today")


class HostileDict(dict[object, object]):
    def items(self) -> Any:
        raise RuntimeError("not today")

    keys = __iter__ = items


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"/\xff"


class Colour(enum.IntEnum):
    RED = 19100


def nested() -> list[object]:
    """A list that is nested too deeply for repr()."""
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


ODD_TEXTS = ["", ".", "/", "~", "/proc/self", "a\0b", "/a\0b", "\ud800", "/\ud800", "/" + "x" * 5000, "/" * 5000, "-"]
ODD_TEXTS += [
    "0.0.0.0",
    "::",
    "::1%lo",
    "127.0.0.1",
    "localhost",
    "web1",
    "[::1]",
    "19100-19131",
    "1-99999",
    "9" * 5000,
]
texts = st.text() | st.sampled_from(ODD_TEXTS)
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | texts
    | st.binary()
    | st.builds(range, st.integers(), st.integers(), st.integers().filter(bool))
    | st.sampled_from(
        [10**30, range(10**30), range(10**30, 0, -1), decimal.Decimal("NaN"), Colour.RED, ..., object, print]
    )
)
made = st.sampled_from(
    [
        Hostile,
        lambda: HostileText("127.0.0.1"),
        lambda: HostileText("0.0.0.0"),
        lambda: HostileText("/tmp"),
        lambda: HostileList([19100]),
        lambda: HostileDict(site="shop"),
        lambda: {"site": Hostile()},
        lambda: {Hostile: Hostile()},
        lambda: [Hostile()],
        lambda: PurePosixPath("/run/shop"),
        lambda: Path("a\0b"),
        BytesPath,
        nested,
        lambda: iter([19100]),
        lambda: (port for port in [19100]),
        lambda: bytearray(b"/tmp"),
        lambda: memoryview(b"19100"),
        lambda: list(range(19100, 19100 + 10**5)),
        lambda: lazystr("127.0.0.1"),
        lambda: SimpleLazyObject(lambda: "127.0.0.1"),
        lambda: SimpleLazyObject(lambda: {"site": "shop"}),
        lambda: SimpleLazyObject(lambda: 1 / 0),
        lambda: SimpleNamespace(),
    ]
).map(Made)
values = (
    plain | made | st.lists(plain, max_size=4) | st.dictionaries(texts, plain, max_size=4) | st.sets(texts, max_size=3)
)
odd = st.just(UNSET) | values


@pytest.fixture
def temporary_again() -> Iterator[None]:
    """Make tempfile choose its directory again, before and after the test."""
    before, tempfile.tempdir = tempfile.tempdir, None
    yield
    tempfile.tempdir = before


def check() -> list[django_checks.CheckMessage]:
    messages = [*checks.check_settings(), *checks.check_requests(), *checks.check_deployment()]
    for message in messages:
        assert isinstance(message, django_checks.CheckMessage)
        assert message.hint
        assert re.fullmatch(r"promports\.[EW]\d{3}", str(message.id))
        assert str(message)
        str(message).encode("utf-8")
        assert len(str(message)) < 50 * MAX_SHOWN  # a path is shown whole
    return messages


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(dict.fromkeys(PROMPORTS, Made(Hostile)), {})
@example({}, dict.fromkeys(OTHERS, Made(Hostile)))
@example(dict.fromkeys(PROMPORTS, UNSET), {})
@example({}, {"MIDDLEWARE": range(10**9)})  # too long to iterate over
@given(
    st.dictionaries(st.sampled_from(PROMPORTS), odd, max_size=len(PROMPORTS)),
    st.dictionaries(st.sampled_from(OTHERS), odd, max_size=2),
)
def test_no_value_of_any_setting_makes_a_check_raise(promports: dict[str, Any], others: dict[str, Any]) -> None:
    every = {
        name: value.make() if isinstance(value, Made) else value for name, value in {**promports, **others}.items()
    }

    with override_settings(**{name: value for name, value in every.items() if value is not UNSET}):
        from django.conf import settings as overridden

        for name in (name for name, value in every.items() if value is UNSET):
            if hasattr(overridden, name):
                delattr(overridden, name)
        check()


@pytest.mark.parametrize("name", PROMPORTS)
def test_what_cannot_be_read_at_all_is_an_error_that_names_the_setting(name: str) -> None:
    with override_settings(**{name: Hostile()}):
        messages = check()

    assert [message for message in messages if name in message.msg and message.level == django_checks.ERROR]
    assert "promports.W008" not in [message.id for message in messages]


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(VARIABLES),
        st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.just("\udcff"),
    )
)
def test_no_environment_makes_a_check_raise(temporary_again: None, variables: dict[str, str | None]) -> None:
    with pytest.MonkeyPatch.context() as patch, override_settings():
        from django.conf import settings as overridden

        if hasattr(overridden, "PROMPORTS_LEDGER_DIR"):
            del overridden.PROMPORTS_LEDGER_DIR
        patch.setattr(tempfile, "tempdir", None)
        for name, value in variables.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)

        messages = check()

        is_set = any(variables.get(name) is not None for name in VARIABLES[:2])
        assert ("promports.E003" in [message.id for message in messages]) == is_set


@pytest.mark.parametrize("options", [None, 8, Hostile(), {b"threads": 2}], ids=["none", "number", "hostile", "bytes"])
def test_no_version_of_uwsgi_makes_a_check_raise(options: object, monkeypatch: pytest.MonkeyPatch) -> None:
    # The module uwsgi exists only inside uWSGI.
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(opt=options))

    assert {"promports.W008", "promports.E014"} & {message.id for message in check()}


@pytest.mark.parametrize("content", ["", "1", "1 2 3", "x", "\n\n", "\xff"])
def test_no_kernel_makes_a_check_raise(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ip_unprivileged_port_start", "ip_local_port_range"):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    monkeypatch.setattr(checks, "KERNEL", tmp_path)

    with override_settings(PROMPORTS_PORT_RANGE=range(19100, 19104)):
        assert "promports.W008" not in [message.id for message in check()]


def test_a_check_that_cannot_be_made_is_a_warning_and_the_others_are_made() -> None:
    with override_settings(
        PROMETHEUS_METRICS_EXPORT_PORT_RANGE=Hostile(), PROMPORTS_PORT_RANGE="", PROMPORTS_LEDGER_DIR="x"
    ):
        messages = checks.check_settings()

    assert [message.id for message in messages] == ["promports.E001", "promports.E011", "promports.W008"]
    assert "_check_rivals() raised RuntimeError('not today')" in messages[-1].msg


def _refuse() -> Any:
    raise AssertionError("a default was asked for although the setting is there")


@pytest.mark.parametrize(
    ("module", "function", "setting", "value"),
    [
        (tempfile, "gettempdir", "PROMPORTS_LEDGER_DIR", "/run/shop"),
        (tempfile, "gettempdir", "PROMPORTS_LEDGER_DIR", None),
        (socket, "gethostname", "PROMPORTS_TARGET_HOST", "web1"),
    ],
    ids=["ledger-dir", "no-ledger-dir", "target-host"],
)
def test_a_default_is_computed_only_where_the_setting_is_missing(
    module: Any, function: str, setting: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # test_read_only.py has a machine without a temporary directory; here the call must not be made.
    monkeypatch.setattr(module, function, _refuse)

    with override_settings(PROMPORTS_ADDRESS="0.0.0.0", **{setting: value}):
        found = getattr(conf, setting)
        messages = checks.check_settings()

    assert found == (value and type(found)(value))
    assert "promports.W008" not in [message.id for message in messages]
