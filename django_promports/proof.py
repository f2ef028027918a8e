"""Proof: how a probe and its answer prove that they come from processes of one site, without sending the bearer token.

A probe carries a MAC for each key of the site, over what it asks (the address and port that were dialled, path and
Host), the time and a nonce, so that a recorded probe cannot be used elsewhere, nor for long. Its answer carries a MAC
over the nonce, the port, the path, the status and the body, so that no other program's answer is believed.

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
# Seconds for which a probe is valid: the clocks of a fleet may be that far apart.
MAX_AGE_SECONDS = 60.0

UNSIGNED = (
    "its answer has no known signature: an older version of django_promports has the port, or another program that "
    "pretends to be one"
)
FORGED = "its answer is signed with a key that this site does not have: another program has the port"
# Why an endpoint refuses a probe: the word in its answer, and the reason that is shown.
REFUSALS = {
    "key": "it has none of our keys: it belongs to another site, or to one with another PROMPORTS_LEDGER_DIR, token or "
    "SECRET_KEY",
    "time": f"our probe is older than its claim of the port, or its clock and ours are more than {MAX_AGE_SECONDS:g} s "
    "apart: synchronise them",
    "address": "we reach it at an address that it does not have: set its PROMPORTS_TARGET_HOST to the host that we ask",
}


class Asked(NamedTuple):
    """What a probe asks, and where: IP address and port, the path with its query, and the Host header."""

    address: str
    port: int
    path: str
    host: str


class Probe(NamedTuple):
    """A probe, with what its answer is checked against."""

    asked: Asked
    keys: Sequence[bytes]
    nonce: str
    header: str


class Proof(NamedTuple):
    """The proof that a probe comes from a process of this site: the shared key, and what was asked."""

    asked: Asked
    key: bytes
    nonce: str


def make_probe(keys: Sequence[bytes], asked: Asked) -> Probe:
    """Return a probe that proves that it comes from this site."""
    nonce, at = secrets.token_hex(16), f"{time.time():.6f}"
    address = _normalize(asked.address)
    macs = [_sign_probe(key, at, nonce, address, asked) for key in keys]
    return Probe(asked, keys, nonce, " ".join([VERSION, at, nonce, address, ",".join(macs)]))


def check_probe(header: str, keys: Iterable[bytes], asked: Asked, *, host: str, age: float) -> Proof | str:
    """Return the proof in a probe, or the reason why it is refused, which is a key of REFUSALS.

    asked: what the endpoint itself knows of the request: the address and port at which it arrived, path and Host. host:
    under which the endpoint is known. If Host names it, the dialled address may belong to a machine that forwards
    connections to this one. age: of the claim, in seconds. An older probe may have been recorded by a previous holder
    of the port.
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
    """Return the header value that proves that an answer comes from this site. digest: SHA-256 of its body."""
    return f"{VERSION} {_sign_answer(proof.key, proof.nonce, proof.asked, status, digest)}"


def check_answer(probe: Probe, header: str, status: int, body: bytes) -> str:
    """Return why an answer is not believed; empty if it is, or if this site has no key to check it with."""
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
    # No field contains a line break: each is a word of a header, or one of ours.
    return hmac.new(key, "\n".join([f"django_promports {VERSION}", *map(str, fields)]).encode(), "sha256").hexdigest()


def _normalize(address: str) -> str:
    """Return an IP address in canonical form: a socket for both families has IPv4 addresses mapped to IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def _is_forwarded(address: str) -> bool:
    """Whether a machine that forwards to this one may have the address. Not loopback: another user may listen there."""
    try:
        return not ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """Return the host of a Host header, without port and brackets."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()
