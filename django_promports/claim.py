"""Claim: a port together with its ledger; how a process claims both, waits for them in a reload, and releases them.

A process claims the lowest free port whose ledger is free too. If it has to wait for one, a retry thread tries again.
At the end the ledger is released before the port, so that the next process to claim the port finds its ledger free.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from django_promports import ports, presence
from django_promports.binding import Binding
from django_promports.endpoint import Endpoint
from django_promports.folders import make_folder
from django_promports.ledger import Ledger, LedgerFull, LedgerLocked
from django_promports.reading import read_opening
from django_promports.secret import make_secret, remove_secret
from django_promports.thread import PAUSE_SECONDS

logger = logging.getLogger("django_promports")

# Seconds between two attempts of the retry thread. gunicorn's HUP frees the old workers' ports within a second.
RETRY_SECONDS = 0.5
# In a reload the new workers start before the old ones stop. They wait for the ports that the site already uses instead
# of claiming new ones: the instances stay the same, and the last counts of the old workers are scraped, not left behind
# in ledgers of ports that no process holds. They wait PATIENCE_SECONDS, and as long again after each port that changed
# hands (some servers replace one worker after the other), but at most MAX_PATIENCE_SECONDS in all. It is a reload, and
# not a start, if another worker has held its port for more than SETTLED_SECONDS.
PATIENCE_SECONDS = 5.0
MAX_PATIENCE_SECONDS = 30.0
SETTLED_SECONDS = 5.0


class Undecided(Exception):
    """It is too early to claim: the old workers of a reload still hold their ports, or the user may yet change."""


class Terms(NamedTuple):
    """The settings of a claim.

    folder: where the ledgers are; None: count in memory. no_folder: why there is none, unless the settings ask for
    that. site: the site to which the ledgers belong.
    """

    address: str
    ports: Sequence[int]
    folder: Path | None
    no_folder: str
    site: str


class Holder:
    """One process as the holder of a port and its ledger. A forked child gets a new one.

    binding: the metrics that count in the ledger. read_terms: returns the current settings. make_endpoint: returns the
    endpoint of a claimed port. port, endpoint: None without a port. claimed_at: when the port was claimed, in seconds
    of time.monotonic(). is_worker: whether the process is known to be a worker; until then it may be a master, whose
    children are the workers. is_broken: whether it failed in a way that waiting does not fix.
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
        self.is_worker = False
        self.is_broken = False
        self.is_waiting = False
        self.waiting_sign: Any = None
        self._binding, self._read_terms, self._make_endpoint = binding, read_terms, make_endpoint
        self._retry: threading.Thread | None = None
        self._stopping = threading.Event()
        self._retrying_since = 0.0
        self._made_folder: Path | None = None
        self._made_secret: tuple[Path, bytes] | None = None
        self._has_warned_of_secret = False
        self.claimed_at = 0.0
        self._held_back = ""  # an error that is logged once this process is known to be a worker

    def claim(self, *, at_once: bool = True) -> None:
        """Claim a port, or start a thread that claims one as soon as it can. Raises OSError if waiting is useless."""
        with self.lock:
            if self.endpoint is not None or self.is_waiting:
                return
            try:
                if not at_once:
                    raise Undecided
                self._serve(waited=0.0)
            except (ports.RangeFull, Undecided) as reason:
                if isinstance(reason, ports.RangeFull):
                    self._log_range_full(reason)
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
            self.endpoint = self.port = None
            self._retrying_since, self.is_waiting = 0.0, False
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
        self._retrying_since = self._retrying_since or time.monotonic()
        self._retry = threading.Thread(target=self._wait_for_port, name="promports-retry", daemon=True)
        self._retry.start()

    def _serve(self, *, waited: float) -> None:
        claim, ledger = self._claim_with_ledger(self._read_terms(), waited)
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

    def _claim_with_ledger(self, terms: Terms, waited: float) -> tuple[ports.Claim, Ledger | None]:
        """Claim the lowest free port whose ledger is free too; if no ledger is free, the lowest free port."""
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
            while True:
                others = {claim.port for claim in passed}
                claim = ports.claim(terms.address, [number for number in terms.ports if number not in others])
                self.claimed_at = time.monotonic()
                try:
                    if make_folder(folder):
                        self._made_folder = folder
                    self._make_secret(folder)
                    if _is_reload(folder, terms.ports, claim.port, waited):
                        passed.append(claim)
                        raise Undecided
                    return claim, Ledger(folder / f"{claim.port}.ledger", terms.site)
                except LedgerLocked:
                    passed.append(claim)
                except (OSError, LedgerFull) as error:
                    reason = str(error)
                    break
        except ports.RangeFull:
            if not passed:
                raise
            # claimed_at is the time of a later attempt, which is as safe.
            claim, reason = passed.pop(0), f"other processes have the ledgers of all free ports in {folder} open"
        finally:
            for other in passed:
                other.listener.close()
        self._log_in_memory(reason)
        return claim, None

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

    def _log_range_full(self, full: ports.RangeFull) -> None:
        logger.error(
            "%s The site is served, but this process (pid %s) is not metered until a port comes free. "
            "Widen PROMPORTS_PORT_RANGE beyond the number of workers. If a worker forks helpers with os.fork() before "
            "its first request, they take its port: call django_promports.start() before that fork.",
            full,
            os.getpid(),
        )
        self.is_waiting = True

    def _wait_for_port(self) -> None:
        try:
            while True:
                if self.is_waiting and self.waiting_sign is None:
                    self.waiting_sign = presence.announce_waiting(self._read_terms().ports)
                if self._stopping.wait(RETRY_SECONDS):
                    return
                with self.lock:
                    if self._stopping.is_set() or self.endpoint is not None:
                        return
                    try:
                        self._serve(waited=time.monotonic() - self._retrying_since)
                    except Undecided:
                        continue
                    except ports.RangeFull as full:
                        if not self.is_waiting:
                            self._log_range_full(full)
                        continue
                    self.is_waiting = False
                    return
        except Exception:
            self.is_broken = True
            logger.exception("This process (pid %s) serves no metrics.", os.getpid())
        finally:
            if self.waiting_sign is not None:
                self.waiting_sign.close()
                self.waiting_sign = None


def _is_reload(folder: Path, port_range: Sequence[int], port: int, waited: float) -> bool:
    """Whether this is a reload: the port is new to the site, and another one will soon come free."""
    if read_opening(folder / f"{port}.ledger") is not None:
        return False
    openings = [read_opening(folder / f"{lower}.ledger") for lower in port_range if lower < port]
    ages = [time.time() - opening for opening in openings if opening is not None]
    if waited < PATIENCE_SECONDS:
        return any(age > SETTLED_SECONDS for age in ages)
    return waited < MAX_PATIENCE_SECONDS and any(age < PATIENCE_SECONDS for age in ages)
