"""TLS: the SSL contexts with which endpoints serve HTTPS, and those with which they are probed."""

from __future__ import annotations

import ssl
from pathlib import Path


class UnusableFile(ValueError):
    """A file cannot be used. kind: which one, as the name of an argument of server_context()."""

    def __init__(self, kind: str, reason: object) -> None:
        super().__init__(str(reason))
        self.kind = kind


def server_context(certfile: str, keyfile: str | None, cafile: str | None) -> ssl.SSLContext:
    """Return a context that serves with this certificate. cafile: require client certificates of these authorities.

    Raises UnusableFile.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for kind, path in (("certfile", certfile), ("keyfile", keyfile)):
        if path is not None:
            try:
                Path(path).open("rb").close()
            except OSError as error:
                raise UnusableFile(kind, error.strerror) from None
    try:
        # Without a password OpenSSL would prompt for the one of an encrypted key, and the worker would hang.
        context.load_cert_chain(certfile, keyfile, password="")
    except OSError as error:  # ssl.SSLError included
        reason = f"PROMPORTS_TLS_CERTFILE and its key are not a matching pair in PEM format ({error})"
        raise UnusableFile("keyfile" if keyfile else "certfile", reason) from None
    if cafile is not None:
        try:
            context.load_verify_locations(cafile)
        except OSError as error:
            raise UnusableFile("cafile", error) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """Return a context for probing this site's endpoints, with the site's own certificate for those that require one.

    The endpoints' certificate is not verified: it names the host for Prometheus, and a signed answer proves the site.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(certfile, keyfile, password="")  # never a prompt
    return context
