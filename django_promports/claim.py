"""Claim: a port together with its ledger; how a process claims both, waits for them in a reload, and releases them.

A process claims the lowest free port whose ledger is free too. If it has to wait for one, a retry thread tries again.
At the end the ledger is released before the port, so that the next process to claim the port finds its ledger free.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from django_promports import ports, presence
from django_promports.binding import Binding
from django_promports.endpoint import Endpoint
from django_promports.folders import make_folder
from django_promports.heir import Heir
from django_promports.ledger import Ledger, LedgerFull, LedgerLocked
from django_promports.own import RANGE_FULL, RELOAD, own_metrics
from django_promports.processes import find_start
from django_promports.reading import read_status
from django_promports.secret import make_secret, remove_secret
from django_promports.terms import Terms
from django_promports.thread import PAUSE_SECONDS

logger = logging.getLogger("django_promports")

# Seconds between two attempts of the retry thread: in a reload the old workers are about to free their ports.
RETRY_SECONDS, RELOAD_RETRY_SECONDS = 0.5, 0.2
# In a reload the new workers start before the old ones stop. So that the instances stay the same, a new worker waits
# this long for a port that an older one holds. A worker that claimed less than this before the new one started is not
# an older one: a server starts its workers one after the other.
RELOAD_SECONDS = 2.0
# Seconds for an heir to hand a port over. It takes a millisecond, unless a collector of the site delays it.
HAND_OVER_SECONDS = 0.5
# Seconds between two looks at a port that an heir is about to serve or to free.
CHANGE_SECONDS = 0.01


class Undecided(Exception):
    """It is too early: the old workers of a reload hold their ports, or this process may yet change its user."""


class Holder:
    """One process as the holder of a port and its ledger. A forked child gets a new one.

    binding: the metrics that count in the ledger. read_terms: returns the current settings. make_endpoint: returns the
    endpoint of a claimed port. port, endpoint: None without a port. claimed_at: when the port was claimed, in seconds
    of time.monotonic(). is_worker: whether the process is known to be a worker; until then it may be a master, whose
    children are the workers. is_broken: whether it failed in a way that waiting does not fix. heir: what it serves for
    ended processes.
    """

    def __init__(
        self,
        binding: Binding,
        read_terms: Callable[[], Terms],
        make_endpoint: Callable[[Holder, ports.Claim], Endpoint],
    ) -> None:
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.port: int | None = None
        self.endpoint: Endpoint | None = None
        self.heir: Heir | None = None
        self.is_worker = False
        self.is_broken = False
        self.waiting_for = ""  # why it waits for a port
        self.waiting_sign: Any = None
        self._binding, self._read_terms, self._make_endpoint = binding, read_terms, make_endpoint
        self._retry: threading.Thread | None = None
        self._stopping = threading.Event()
        self._started_at = find_start()
        self._first_tried_at: float | None = None
        self._made_folder: Path | None = None
        self._made_secret: tuple[Path, bytes] | None = None
        self._has_warned_of_secret = False
        self.claimed_at = 0.0
        self._held_back = ""  # an error that is logged once this process is known to be a worker

    def claim(self, *, at_once: bool = True) -> None:
        """Claim a port, or start a thread that claims one as soon as it can. Raises OSError if waiting is useless."""
        with self.lock:
            if self.endpoint is not None or self.waiting_for:
                return
            try:
                if not at_once:
                    raise Undecided
                self._serve()
            except (ports.RangeFull, Undecided) as reason:
                self._wait(reason)
                if self._retry is None:
                    self.start_retry()

    def release(self, *, undo: bool = False, seconds: float = PAUSE_SECONDS) -> None:
        """Release the ledger and then the port, and stop waiting for a port.

        undo: remove the ledger, the site secret and the folder if this process created them. seconds: how long to wait
        for a thread of ours that is busy, for example with a collector of the site.
        """
        self.stop_retry(seconds)
        if not self.lock.acquire(timeout=seconds):
            return
        try:
            if self.endpoint is not None:
                self.endpoint.pause(seconds)
                try:
                    if self.heir is not None:
                        self.heir.close_ledgers()
                    self._binding.close(undo=undo)
                finally:
                    self.endpoint.stop()
                logger.info("Freed the metrics port. port=%s pid=%s", self.port, os.getpid())
                if undo and self._made_secret is not None:
                    with suppress(OSError):
                        remove_secret(*self._made_secret)
                if undo and self._made_folder is not None:
                    with suppress(OSError):  # not empty: other processes have their ledgers there
                        self._made_folder.rmdir()
            self.endpoint = self.heir = self.port = None
            self._first_tried_at, self.waiting_for = None, ""
        finally:
            self.lock.release()

    def become_worker(self) -> None:
        """Mark this process as a worker, and log the error that was held back while it could have been a master."""
        self.is_worker = True
        message, self._held_back = self._held_back, ""
        if message:
            logger.error(message)

    def stop_retry(self, seconds: float | None = None) -> bool:
        """Stop the retry thread. Return False if there is none."""
        self._stopping.set()
        retry = self._retry
        if retry is not None and retry is not threading.current_thread():
            retry.join(seconds)
        self._stopping = threading.Event()
        self._retry = None
        return retry is not None

    def start_retry(self) -> None:
        """Start the retry thread, which claims a port as soon as it can."""
        self._retry = threading.Thread(target=self._wait_for_port, name="promports-retry", daemon=True)
        self._retry.start()

    def _serve(self) -> None:
        claim, ledger = self._claim_with_ledger(self._read_terms())
        try:
            if ledger is not None:
                self._binding.open(ledger)
            endpoint = self._make_endpoint(self, claim)
        except BaseException:
            self._binding.close()
            claim.listener.close()
            raise
        endpoint.start()
        self.endpoint, self.port = endpoint, claim.port
        logger.info("Serving metrics. port=%s pid=%s", claim.port, os.getpid())

    def _claim_with_ledger(self, terms: Terms) -> tuple[ports.Claim, Ledger | None]:
        """Claim the lowest port that is free or served by an heir, and its ledger.

        A port whose ledger is locked is passed over. If there are only such ports, the lowest is claimed without it.
        """
        folder = terms.folder
        self._held_back = ""
        if folder is None:
            claim = ports.claim(terms.address, terms.ports)
            self.claimed_at = time.monotonic()
            if terms.no_folder:
                self._log_in_memory(terms.no_folder)
            return claim, None
        passed: list[ports.Claim] = []
        try:
            for claim, file in _find_ports(terms, folder):
                self.claimed_at = time.monotonic()
                passed.append(claim)
                try:
                    ledger = self._open_ledger(terms, folder, claim.port, file)
                    return passed.pop(), ledger
                except LedgerLocked:
                    pass
                except (OSError, LedgerFull) as error:
                    self._log_in_memory(str(error))
                    return passed.pop(), None
            if not passed:
                raise ports.RangeFull(terms.address, terms.ports)
            # claimed_at is the time of a later attempt, which is as safe.
            claim = passed.pop(0)
        finally:
            for other in passed:
                other.listener.close()
        self._log_in_memory(f"other processes have the ledgers of all free ports in {folder} open")
        return claim, None

    def _open_ledger(self, terms: Terms, folder: Path, port: int, file: int | None) -> Ledger:
        """Open the ledger of a claimed port. file: open and locked, if an heir has handed it over; it is closed."""
        try:
            if make_folder(folder, terms.former_folders):
                self._made_folder = folder
            self._make_secret(folder)
            if file is None and self._must_wait(folder, terms.ports, port):
                raise Undecided
        except BaseException:
            if file is not None:
                os.close(file)
            raise
        return Ledger(folder / f"{port}.ledger", terms.site, file=file, former=terms.former_sites)

    def _must_wait(self, folder: Path, port_range: Sequence[int], port: int) -> bool:
        """Whether to wait for a lower port than this one, which holds no counts that a process has to take over."""
        now = time.monotonic()
        self._first_tried_at = now if self._first_tried_at is None else self._first_tried_at
        offered = read_status(folder / f"{port}.ledger")
        if now - self._first_tried_at > RELOAD_SECONDS or (offered is not None and offered.is_owed):
            return False
        lower = [read_status(folder / f"{number}.ledger") for number in port_range if number < port]
        return any(
            one is not None and one.opened_at < self._started_at - RELOAD_SECONDS and one.is_held for one in lower
        )

    def _make_secret(self, folder: Path) -> None:
        """Create the site secret in a folder that belongs to this user, unless it exists."""
        try:
            if secret := make_secret(folder):
                self._made_secret = folder, secret
        except OSError as error:
            if not self._has_warned_of_secret:
                self._has_warned_of_secret = True
                logger.warning(
                    "There is no usable site secret: %s. Processes of the site recognise each other by the bearer "
                    "token or SECRET_KEY instead.",
                    error,
                )

    def _log_in_memory(self, reason: str) -> None:
        message = f"Counting in memory: {reason}. What pid {os.getpid()} counts is lost when it ends."
        # A master that is root may have workers that run as the owner of the folder.
        if os.geteuid() == 0 and not self.is_worker:
            self._held_back = message
        else:
            logger.error(message)

    def _wait(self, reason: Exception) -> None:
        """Log and count why this process waits for a port, unless it waits already."""
        if isinstance(reason, ports.RangeFull) and self.waiting_for != RANGE_FULL:
            self.waiting_for = RANGE_FULL
            logger.error(
                "%s The site is served, but this process (pid %s) is not metered until a port comes free. "
                "Widen PROMPORTS_PORT_RANGE beyond the number of workers. If a worker forks helpers with os.fork() "
                "before its first request, they take its port: call django_promports.start() before that fork.",
                reason,
                os.getpid(),
            )
        elif not self.waiting_for and self._first_tried_at is not None:
            self.waiting_for = RELOAD
            logger.info(
                "This process (pid %s) waits up to %g s for a port that an older process of the site may free.",
                os.getpid(),
                RELOAD_SECONDS,
            )
        else:
            return
        own_metrics().waits.labels(self.waiting_for).inc()

    def _wait_for_port(self) -> None:
        try:
            while True:
                if self.waiting_for and self.waiting_sign is None:
                    self.waiting_sign = presence.announce_waiting(self._read_terms().ports)
                if self._stopping.wait(RELOAD_RETRY_SECONDS if self.waiting_for == RELOAD else RETRY_SECONDS):
                    return
                with self.lock:
                    if self._stopping.is_set() or self.endpoint is not None:
                        return
                    try:
                        self._serve()
                    except (ports.RangeFull, Undecided) as reason:
                        self._wait(reason)
                        continue
                    self.waiting_for = ""
                    return
        except Exception:
            self.is_broken = True
            logger.exception("This process (pid %s) serves no metrics.", os.getpid())
        finally:
            if self.waiting_sign is not None:
                self.waiting_sign.close()
                self.waiting_sign = None


def _find_ports(terms: Terms, folder: Path) -> Iterator[tuple[ports.Claim, int | None]]:
    """Yield each port that this process can have, lowest first, and its ledger if an heir has handed it over."""
    silent: set[int] = set()
    deadline = time.monotonic() + HAND_OVER_SECONDS
    for port in terms.ports:
        while True:
            if (listener := ports.listen(terms.address, port)) is not None:
                yield ports.Claim(port, listener), None
                break
            if (taken := presence.take_over(terms.key, port, HAND_OVER_SECONDS, silent)) is not None:
                listener, file = taken
                if listener.getsockname() == ports.resolve(terms.address, port)[1]:
                    yield ports.Claim(port, listener), file
                else:  # the settings have changed since the heir read them
                    listener.close()
                    os.close(file)
                break
            if not _is_changing_hands(folder, port) or time.monotonic() > deadline:
                break
            time.sleep(CHANGE_SECONDS)


def _is_changing_hands(folder: Path, port: int) -> bool:
    """Whether a port that is in use is owed, but not by a living process: an heir is about to serve or to free it."""
    status = read_status(folder / f"{port}.ledger")
    return status is not None and status.is_owed and not status.is_held
