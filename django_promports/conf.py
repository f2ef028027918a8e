"""The settings: one typed property each, read at use, so that override_settings() works.

A property raises ImproperlyConfigured for a value that cannot be used; checks.py makes it a system check error.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.encoding import force_bytes

from django_promports.ports import check_address, parse_ports
from django_promports.secret import derive_key, read_secret
from django_promports.targets import Site, check_host, check_label, client_tls

T = TypeVar("T")
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Conf:
    @property
    def PROMPORTS_ENABLED(self) -> bool:
        return self._typed("PROMPORTS_ENABLED", bool, True)

    @property
    def PROMPORTS_PORT_RANGE(self) -> tuple[int, ...]:
        value = getattr(settings, "PROMPORTS_PORT_RANGE", range(19100, 19132))
        try:
            return parse_ports(value)
        except ValueError as error:
            raise _unusable("PROMPORTS_PORT_RANGE", value, error) from None

    @property
    def PROMPORTS_ADDRESS(self) -> str:
        value = self._typed("PROMPORTS_ADDRESS", str, "127.0.0.1")
        try:
            check_address(value)
        except ValueError as error:
            raise _unusable("PROMPORTS_ADDRESS", value, error) from None
        except OSError as error:
            reason = f"this machine cannot bind it ({error.strerror})"
            raise _unusable("PROMPORTS_ADDRESS", value, reason) from None
        return value

    @property
    def PROMPORTS_CREATED_SERIES(self) -> bool:
        return self._typed("PROMPORTS_CREATED_SERIES", bool, True)

    @property
    def PROMPORTS_LEDGER_DIR(self) -> Path | None:
        default = Path(tempfile.gettempdir(), f"django_promports-{os.geteuid()}-{self.project}")
        value = getattr(settings, "PROMPORTS_LEDGER_DIR", default)
        if value is None:
            return None
        if not isinstance(value, str | os.PathLike) or not Path(value).is_absolute():
            raise _unusable("PROMPORTS_LEDGER_DIR", value, "it is no absolute path")
        return Path(value)

    @property
    def PROMPORTS_TARGET_HOST(self) -> str:
        address = self.PROMPORTS_ADDRESS
        default = socket.gethostname() if address in WILDCARDS else address
        value = self._typed("PROMPORTS_TARGET_HOST", str, default)
        try:
            return check_host(value)
        except ValueError as error:
            raise _unusable("PROMPORTS_TARGET_HOST", value, error) from None

    @property
    def PROMPORTS_TARGET_LABELS(self) -> dict[str, str]:
        labels: dict[str, str] = self._typed("PROMPORTS_TARGET_LABELS", dict, {})
        try:
            for name, value in labels.items():
                check_label(name, value)
        except ValueError as error:
            raise _unusable("PROMPORTS_TARGET_LABELS", labels, error) from None
        return labels

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
    def metric_namespace(self) -> str:
        """What the names of django-prometheus' metrics begin with, if anything."""
        return str(getattr(settings, "PROMETHEUS_METRIC_NAMESPACE", "") or "")

    @property
    def project(self) -> str:
        """The name that tells the endpoints of this site from those of another on the same machine."""
        return settings.SETTINGS_MODULE or getattr(settings, "ROOT_URLCONF", None) or "django"

    @property
    def slug(self) -> str:
        """The project's name as Kubernetes wants names (RFC 1123)."""
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
        self.server_tls()  # says what is wrong with the files
        certfile = self.PROMPORTS_TLS_CERTFILE
        tls = client_tls(certfile, self.PROMPORTS_TLS_KEYFILE) if certfile else None
        return Site(self.project, tls, tuple(self.read_keys(asking=True)))

    def read_keys(self, *, asking: bool = False) -> Iterator[bytes]:
        """Yield the keys that the processes of this site share, best first, read anew like the token.

        The first is the secret in the ledger folder. Where processes share no folder (other hosts, a container, counts
        in memory), it is the token, or SECRET_KEY where there is none. asking: root may read another user's folder,
        but never believes who asks with what is in it.
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
        except ImproperlyConfigured:  # it is empty
            return b""

    def read_token(self) -> str | None:
        """Return the bearer token, read anew so that it can be replaced while the site runs."""
        path = self.PROMPORTS_BEARER_TOKEN_FILE
        if path is None:
            return None
        try:
            token = Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise _unusable("PROMPORTS_BEARER_TOKEN_FILE", path, error) from None
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise _unusable("PROMPORTS_BEARER_TOKEN_FILE", path, "it holds no token of printable ASCII characters")
        return token

    def server_tls(self) -> ssl.SSLContext | None:
        """Return the context that the endpoints serve HTTPS with; None for HTTP."""
        certfile, cafile = self.PROMPORTS_TLS_CERTFILE, self.PROMPORTS_TLS_CLIENT_CAFILE
        if certfile is None:
            for name in ("PROMPORTS_TLS_KEYFILE", "PROMPORTS_TLS_CLIENT_CAFILE"):
                if (value := self._file(name)) is not None:
                    raise _unusable(name, value, "PROMPORTS_TLS_CERTFILE is not set")
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        keyfile = self.PROMPORTS_TLS_KEYFILE
        for name, value in (("PROMPORTS_TLS_CERTFILE", certfile), ("PROMPORTS_TLS_KEYFILE", keyfile)):
            if value is not None:
                try:
                    Path(value).open("rb").close()
                except OSError as error:
                    raise _unusable(name, value, error.strerror) from None
        try:
            # Without a password OpenSSL would prompt for the one of an encrypted key, and the worker would hang.
            context.load_cert_chain(certfile, keyfile, password="")
        except OSError as error:  # ssl.SSLError is one
            name, value = ("PROMPORTS_TLS_KEYFILE", keyfile) if keyfile else ("PROMPORTS_TLS_CERTFILE", certfile)
            raise _unusable(name, value, f"PROMPORTS_TLS_CERTFILE and its key are no pair in PEM ({error})") from None
        if cafile is not None:
            try:
                context.load_verify_locations(cafile)
            except OSError as error:
                raise _unusable("PROMPORTS_TLS_CLIENT_CAFILE", cafile, error) from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _typed(self, name: str, kind: type[T], default: T) -> T:
        value = getattr(settings, name, default)
        if not isinstance(value, kind):
            raise _unusable(name, value, f"it is no {kind.__name__.lower()}")
        return value

    def _file(self, name: str) -> str | None:
        value = getattr(settings, name, None)
        if value is not None and not isinstance(value, str | os.PathLike):
            raise _unusable(name, value, "it is no path")
        return None if value is None else os.fspath(value)


def _unusable(name: str, value: object, reason: object) -> ImproperlyConfigured:
    return ImproperlyConfigured(f"{name} is {value!r}, which cannot be used: {reason}.")


conf = Conf()
