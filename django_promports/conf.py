"""The settings: one typed property each, read at use, so that override_settings() works.

What follows from the settings is here too: the name of the site, its keys, the address of its endpoints. A property
raises ImproperlyConfigured for a value that cannot be used; checks.py turns it into a system check error.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.encoding import force_bytes

from django_promports import folders, unix
from django_promports.ports import check_address, parse_ports
from django_promports.probe import Site
from django_promports.secret import derive_key, read_secret
from django_promports.targets import check_host, check_label
from django_promports.tls import UnusableFile, client_context, server_context

T = TypeVar("T")
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# Characters of a value in a message. A setting may be a list of a million items.
MAX_SHOWN = 200
# Bytes of PROMPORTS_SITE: it is part of the name of a folder.
MAX_SITE = 100


MISSING = object()


class Conf:
    @property
    def PROMPORTS_ENABLED(self) -> bool:
        return self._read("PROMPORTS_ENABLED", _instance(bool), lambda: True)

    @property
    def PROMPORTS_PORT_RANGE(self) -> tuple[int, ...]:
        return self._read("PROMPORTS_PORT_RANGE", parse_ports, lambda: range(19100, 19132))

    @property
    def PROMPORTS_ADDRESS(self) -> str:
        return self._read("PROMPORTS_ADDRESS", _parse_address, lambda: "127.0.0.1")

    @property
    def PROMPORTS_CREATED_SERIES(self) -> bool:
        return self._read("PROMPORTS_CREATED_SERIES", _instance(bool), lambda: True)

    @property
    def PROMPORTS_LEDGER_DIR(self) -> Path | None:
        """None: count in memory. Unless the setting asks for that, no_ledger_dir has the reason."""
        if not unix.SUPPORTED:
            return None
        return self._read("PROMPORTS_LEDGER_DIR", _parse_folder, self._default_ledger_dir)

    @property
    def PROMPORTS_SITE(self) -> str:
        """What tells this site from another one on the machine. Its default changes with SECRET_KEY."""
        if not hasattr(settings, "PROMPORTS_SITE"):
            return self._name_site(self._secret_key())
        return self._read("PROMPORTS_SITE", _parse_site, str)

    @property
    def has_default_ledger_dir(self) -> bool:
        return not hasattr(settings, "PROMPORTS_LEDGER_DIR")

    @property
    def no_ledger_dir(self) -> str:
        """The reason why PROMPORTS_LEDGER_DIR has no default; empty if it has one, or the setting is set."""
        if not self.has_default_ledger_dir:
            return ""
        try:
            folders.find_base()
        except OSError as error:
            return f"PROMPORTS_LEDGER_DIR is not set, and there is no default for it ({error.strerror})"
        return ""

    @property
    def PROMPORTS_TARGET_HOST(self) -> str:
        def default() -> str:
            address = self.PROMPORTS_ADDRESS
            return socket.gethostname() if address in WILDCARDS else address

        return self._read("PROMPORTS_TARGET_HOST", lambda value: check_host(_instance(str)(value)), default)

    @property
    def PROMPORTS_TARGET_LABELS(self) -> dict[str, str]:
        return self._read("PROMPORTS_TARGET_LABELS", _parse_labels, dict)

    @property
    def PROMPORTS_TLS_CERTFILE(self) -> str | None:
        return self._file("PROMPORTS_TLS_CERTFILE")

    @property
    def PROMPORTS_TLS_KEYFILE(self) -> str | None:
        return self._file("PROMPORTS_TLS_KEYFILE")

    @property
    def PROMPORTS_TLS_CLIENT_CAFILE(self) -> str | None:
        return self._file("PROMPORTS_TLS_CLIENT_CAFILE")

    @property
    def PROMPORTS_BEARER_TOKEN_FILE(self) -> str | None:
        return self._file("PROMPORTS_BEARER_TOKEN_FILE")

    def django_prometheus(self, name: str) -> Any:
        """Return a setting of django-prometheus' own ports; None if it is not set."""
        return getattr(settings, f"PROMETHEUS_METRICS_EXPORT_{name}", None)

    @property
    def middleware(self) -> list[str]:
        """The dotted paths of the site's middleware; none where the setting is not a list or a tuple."""
        value = settings.MIDDLEWARE
        return list(value) if isinstance(value, list | tuple) else []  # Django itself reports it

    @property
    def metric_namespace(self) -> str:
        """The namespace of django-prometheus' metrics; empty by default."""
        return str(getattr(settings, "PROMETHEUS_METRIC_NAMESPACE", "") or "")

    @property
    def project(self) -> str:
        """The name of the site for people. Several sites of a machine may have the same: see PROMPORTS_SITE."""
        return str(settings.SETTINGS_MODULE or getattr(settings, "ROOT_URLCONF", None) or "django")

    @property
    def former_sites(self) -> tuple[str, ...]:
        """What the site may have been called when it made its ledgers: with an older SECRET_KEY, or in version 0.1."""
        former: list[str] = []
        if not hasattr(settings, "PROMPORTS_SITE"):
            keys = getattr(settings, "SECRET_KEY_FALLBACKS", ())
            keys = keys if isinstance(keys, list | tuple) else ()
            former = [self._name_site(force_bytes(key)) for key in keys if isinstance(key, str | bytes)]
        return (*former, self.project)

    @property
    def former_folders(self) -> list[Path]:
        """The default folders of the former sites."""
        folder = self.PROMPORTS_LEDGER_DIR
        if folder is None or not self.has_default_ledger_dir:
            return []
        return [folder.with_name(folders.name_folder(site)) for site in self.former_sites]

    @property
    def place(self) -> str:
        """The folder of the site's code: BASE_DIR, or the folder of the settings module; empty if there is neither."""
        base = getattr(settings, "BASE_DIR", None)
        if not isinstance(base, str | Path):
            module = sys.modules.get(str(settings.SETTINGS_MODULE))
            base = os.path.dirname(getattr(module, "__file__", None) or "")
        return os.path.realpath(base) if base else ""

    @property
    def slug(self) -> str:
        """The name of the project as a Kubernetes name (RFC 1123)."""
        return re.sub(r"[^a-z0-9]+", "-", self.project.partition(".")[0].lower()).strip("-")[:40] or "django"

    @property
    def local_address(self) -> str:
        """The address at which this machine reaches its own endpoints."""
        return WILDCARDS.get(self.PROMPORTS_ADDRESS, self.PROMPORTS_ADDRESS)

    @property
    def scheme(self) -> str:
        return "https" if self.PROMPORTS_TLS_CERTFILE else "http"

    @property
    def site(self) -> Site:
        self.server_tls()  # raises if the files cannot be used
        certfile = self.PROMPORTS_TLS_CERTFILE
        tls = client_context(certfile, self.PROMPORTS_TLS_KEYFILE) if certfile else None
        return Site(self.PROMPORTS_SITE, tls, tuple(self.read_keys(asking=True)))

    def read_keys(self, *, asking: bool = False) -> Iterator[bytes]:
        """Yield the keys that the processes of this site share, preferred one first. They are read at each call.

        The first is the secret in the ledger folder. Processes that share no folder (other hosts, containers, counting
        in memory) use a key derived from the token, or from SECRET_KEY if there is no token. asking: the key signs a
        probe, for which root may read the folder of another user. Incoming probes are never checked with such a key.
        """
        folder = self.PROMPORTS_LEDGER_DIR
        if folder is not None and (secret := read_secret(folder, foreign=asking)):
            yield secret
        token = self.read_token()
        if token is not None:
            yield derive_key(token.encode(), "token")
        elif key := self._secret_key():
            yield derive_key(key, "SECRET_KEY")

    def _secret_key(self) -> bytes:
        try:
            return force_bytes(settings.SECRET_KEY)
        except Exception:  # it is empty, or an object that cannot be converted
            return b""

    def _name_site(self, secret_key: bytes) -> str:
        # Deriving a key is slow, so the digest does not help to guess SECRET_KEY.
        return f"{self.project}-{derive_key(secret_key, 'site').hex()[:8]}" if secret_key else self.project

    def read_token(self) -> str | None:
        """Return the bearer token. It is read at each call, so that it can be replaced while the site runs."""
        path = self.PROMPORTS_BEARER_TOKEN_FILE
        if path is None:
            return None
        try:
            token = Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise unusable("PROMPORTS_BEARER_TOKEN_FILE", path, error) from None
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise unusable(
                "PROMPORTS_BEARER_TOKEN_FILE", path, "it does not contain a token of printable ASCII characters"
            )
        return token

    def server_tls(self) -> ssl.SSLContext | None:
        """Return the TLS context of the endpoints; None for HTTP."""
        certfile, cafile = self.PROMPORTS_TLS_CERTFILE, self.PROMPORTS_TLS_CLIENT_CAFILE
        if certfile is None:
            for name in ("PROMPORTS_TLS_KEYFILE", "PROMPORTS_TLS_CLIENT_CAFILE"):
                if (value := self._file(name)) is not None:
                    raise unusable(name, value, "PROMPORTS_TLS_CERTFILE is not set")
            return None
        try:
            return server_context(certfile, self.PROMPORTS_TLS_KEYFILE, cafile)
        except UnusableFile as error:
            name = {"certfile": "CERTFILE", "keyfile": "KEYFILE", "cafile": "CLIENT_CAFILE"}[error.kind]
            raise unusable(f"PROMPORTS_TLS_{name}", self._file(f"PROMPORTS_TLS_{name}"), error) from None

    def _read(self, name: str, parse: Callable[[Any], T], default: Callable[[], object]) -> T:
        """Return a parsed setting. `default` is called only if the setting is not set."""
        value = getattr(settings, name, MISSING)
        if value is MISSING:
            value = default()
        try:
            return parse(value)
        except ValueError as error:
            raise unusable(name, value, error) from None
        except Exception as error:  # the value may be any object, with methods that raise
            raise unusable(name, value, show(error)) from None

    def _file(self, name: str) -> str | None:
        return self._read(name, _parse_path, lambda: None)

    def _default_ledger_dir(self) -> Path | None:
        try:
            return folders.find_default(self.PROMPORTS_SITE, self.project)
        except OSError:  # no_ledger_dir has the reason
            return None


def show(value: object) -> str:
    """Return a short repr of any value, even of one whose repr() raises."""
    try:
        text = repr(value)
    except Exception:
        text = object.__repr__(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def unusable(name: str, value: object, reason: object) -> ImproperlyConfigured:
    return ImproperlyConfigured(f"{name} is {show(value)}, which cannot be used: {reason}.")


def _instance(kind: type[T]) -> Callable[[object], T]:
    def parse(value: object) -> T:
        if not isinstance(value, kind):
            raise ValueError(f"it is not a {kind.__name__}")
        return value

    return parse


def _parse_address(value: object) -> str:
    address = _instance(str)(value)
    try:
        check_address(address)
    except OSError as error:
        raise ValueError(f"this machine cannot bind it ({error.strerror})") from None
    return address


def _parse_site(value: object) -> str:
    site = _instance(str)(value)
    if not site or not site.isprintable():
        raise ValueError("it is empty, or has characters that cannot be printed")
    if len(site.encode()) > MAX_SITE:
        raise ValueError(f"it is longer than {MAX_SITE} bytes")
    return site


def _parse_labels(value: object) -> dict[str, str]:
    labels = dict(_instance(dict)(value))
    for name, text in labels.items():
        check_label(name, text)
    return labels


def _parse_path(value: object) -> str | None:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise ValueError("it is not a path")
    if b"\0" in os.fsencode(path):  # raises ValueError for text that no file system can store
        raise ValueError("it contains a null character")
    return path


def _parse_folder(value: object) -> Path | None:
    path = _parse_path(value)
    if path is not None and not os.path.isabs(path):
        raise ValueError("it is not an absolute path")
    return None if path is None else Path(path)


conf = Conf()
