"""How processes prove that they are of one site: what a probe carries in place of a token, and what its answer carries.

A probe has a MAC for each key of the site, over whom it asks (the address and port that were dialled, path and Host),
when, and a nonce; whoever records it can use it nowhere else, and not for long. The answer has one over the nonce, the
port, the path, the status and the body, so that nobody else's answer is believed.

    Promports-Probe: 1 <unix time> <nonce> <dialled address> <mac>[,<mac>...]
    Promports-Answer: 1 <mac>    or    Promports-Answer: refused <reason>
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PROBE, ANSWER = "Promports-Probe", "Promports-Answer"
VERSION = "1"
# Seconds for which a probe is good: the clocks of a fleet may be that far apart.
MAX_AGE_SECONDS = 60.0

UNSIGNED = (
    "its answer proves nothing: an older version of django_promports has the port, or another program that pretends to "
    "be one"
)
FORGED = "its answer is signed with a key that this site does not have: another program has the port"
# What an endpoint says of a probe that it does not accept, and what a person reads then.
REFUSALS = {
    "key": "it has none of our keys: it belongs to another site, or to one with another PROMPORTS_LEDGER_DIR, token or "
    "SECRET_KEY",
    "time": f"our question is from before it had the port, or its clock and ours are more than {MAX_AGE_SECONDS:g} s "
    "apart: set them",
    "address": "we reach it under another address than it has: set its PROMPORTS_TARGET_HOST to the one that we ask",
}


class Asked(NamedTuple):
    """Whom a probe asks for what: an IP address and a port, the path with its query, and the text of Host."""

    address: str
    port: int
    path: str
    host: str


class Probe(NamedTuple):
    """A probe that was sent, with what its answer is checked against."""

    asked: Asked
    keys: Sequence[bytes]
    nonce: str
    header: str


class Proof(NamedTuple):
    """That a probe comes from a process of this site: the key that it shares with us, and what it asked."""

    asked: Asked
    key: bytes
    nonce: str


def make_probe(keys: Sequence[bytes], asked: Asked) -> Probe:
    """Return what proves a question to be one of this site's."""
    nonce, at = secrets.token_hex(16), f"{time.time():.6f}"
    address = _normalize(asked.address)
    macs = [_sign_probe(key, at, nonce, address, asked) for key in keys]
    return Probe(asked, keys, nonce, " ".join([VERSION, at, nonce, address, ",".join(macs)]))


def check_probe(header: str, keys: Iterable[bytes], asked: Asked, *, host: str, age: float) -> Proof | str:
    """Return the proof in a probe, or the reason why it is none, which is a key of REFUSALS.

    asked: what the endpoint itself knows of the question: the address and port at which it arrived, and so on. host:
    under which the endpoint is known; then the address may be that of a machine which forwards connections to this
    one. age: of the endpoint, in seconds: an older probe may have been recorded by who had the port before.
    """
    match = re.fullmatch(rf"{VERSION} (\d{{1,12}}\.\d{{6}}) ([0-9a-f]{{32}}) ([0-9a-fA-F.:]+) ([0-9a-f,]+)", header)
    if not match:
        return "key"
    at, nonce, address, macs = match.groups()
    given = macs.encode().split(b",")
    for key in keys:
        expected = _sign_probe(key, at, nonce, address, asked).encode()
        if any(hmac.compare_digest(mac, expected) for mac in given):
            break
    else:
        return "key"
    if not -MAX_AGE_SECONDS <= time.time() - float(at) <= min(age, MAX_AGE_SECONDS):
        return "time"
    if address != _normalize(asked.address) and not (_is_forwarded(address) and _name(asked.host) == host.lower()):
        return "address"
    return Proof(asked, key, nonce)


def sign_answer(proof: Proof, status: int, digest: bytes) -> str:
    """Return what proves an answer to be this site's. digest: SHA-256 of its body."""
    return f"{VERSION} {_sign_answer(proof.key, proof.nonce, proof.asked, status, digest)}"


def check_answer(probe: Probe, header: str, status: int, body: bytes) -> str:
    """Return why an answer is not believed; nothing if it is, or if this site has no key to know its own by."""
    if not probe.keys:
        return ""
    version, _, mac = header.partition(" ")
    if version != VERSION:
        return REFUSALS.get(mac, UNSIGNED)
    digest = hashlib.sha256(body).digest()
    for key in probe.keys:
        expected = _sign_answer(key, probe.nonce, probe.asked, status, digest)
        if hmac.compare_digest(mac.encode(), expected.encode()):
            return ""
    return FORGED


def _sign_probe(key: bytes, at: str, nonce: str, address: str, asked: Asked) -> str:
    return _sign(key, "probe", at, nonce, address, asked.port, asked.path, asked.host)


def _sign_answer(key: bytes, nonce: str, asked: Asked, status: int, digest: bytes) -> str:
    return _sign(key, "answer", nonce, asked.port, asked.path, status, digest.hex())


def _sign(key: bytes, *fields: object) -> str:
    # No field has a line break in it: they are words of a header or of our own.
    return hmac.new(key, "\n".join([f"django_promports {VERSION}", *map(str, fields)]).encode(), "sha256").hexdigest()


def _normalize(address: str) -> str:
    """Return an IP address in one form: the one of a socket for both families may be an IPv4 address in disguise."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def _is_forwarded(address: str) -> bool:
    """Whether an address may be one that forwards to this machine; what another user has on loopback must not count."""
    try:
        return not ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """Return the host of a Host header, without port and brackets."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()
