"""The heir: a live process that serves the ports of ended ones until their last counts were scraped.

A port is owed while its ledger was opened after it was settled: its holder may have counted after the last scrape. No
other process of the site may need the port again, for example after a reload or with fewer workers. An heir exports
what the ledger holds, and writes nothing to it but when it was scraped and settled. It is not a worker. A process that
needs the port asks for it, and receives the listening socket and the locked ledger (presence.py).
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic

from prometheus_client import CollectorRegistry

from django_promports import ports, presence
from django_promports.binding import Binding
from django_promports.endpoint import Endpoint, Service
from django_promports.layout import NUMBER, SCRAPED_AT, SETTLED_AT, LedgerDamaged, hash_site
from django_promports.ledger import LedgerLocked, open_locked
from django_promports.loop import NEXT_TURN, READ, Conversation, Loop, Steps
from django_promports.reading import Reading, Status, find_damage, read_locked, read_status
from django_promports.routes import Routes
from django_promports.scrapes import Scrapes
from django_promports.snapshot import keep
from django_promports.terms import Terms

logger = logging.getLogger("django_promports")

# Seconds between two looks at the ledgers. What is orphaned at two of them is adopted, so that a worker that is being
# replaced can have its port.
LOOK_SECONDS = 2.0
# After a complete scrape a port is served for this time, and for two intervals of the slowest scraper, as there may be
# a second one.
CHANCE_SECONDS = 60.0
MAX_SECONDS = 3600.0
# If no one has ever scraped this process, no one may: it frees the port, and adopts others only after a scrape.
UNSCRAPED_SECONDS = 10.0
# Looks after which a port that is still taken belongs to another program: a process of the site would have written to
# its ledger by then.
TAKEN_LOOKS = 3
# The process or the machine has too many open files.
TRANSIENT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


@dataclass(eq=False)
class Adopted:
    """A port that is served for an ended process.

    status, file: of its ledger, which is locked. adopted_at, scraped_at: seconds of time.monotonic(); the latter is the
    first complete scrape. awaiting: waits for a process that asks for the port; None where that is not possible.
    """

    port: int
    status: Status
    file: int
    adopted_at: float = field(default_factory=monotonic, init=False)
    scraped_at: float | None = field(default=None, init=False)
    service: Service | None = field(default=None, init=False)
    awaiting: Conversation | None = field(default=None, init=False)


class Heir:
    """The ports that this process serves for ended ones.

    terms: of its own claim. make_routes: returns what an adopted port answers; it is given the port, what is exported
    there, and what to call after a complete scrape. scrapes: those of this process.
    """

    def __init__(
        self,
        folder: Path,
        terms: Terms,
        endpoint: Endpoint,
        scrapes: Scrapes,
        make_routes: Callable[[int, Binding, Callable[[float], None]], Routes],
    ) -> None:
        self._folder, self._terms, self._endpoint = folder, terms, endpoint
        self._scrapes, self._make_routes = scrapes, make_routes
        self._sites = {hash_site(site) for site in (terms.site, *terms.former_sites)}
        self._adopted: dict[int, Adopted] = {}
        self._is_closed = False
        # Ports that were adopted in vain: which opening, and whether another attempt is useless until the next one.
        self._in_vain: dict[int, tuple[float, bool]] = {}
        # How often, one after the other, an orphaned port was found to be taken.
        self._taken: Counter[int] = Counter()

    def watch(self, loop: Loop) -> Steps[None]:
        """Adopt orphaned ports and free settled ones, forever."""
        for adopted in self._adopted.values():  # in a loop that replaces another
            self._open_hand_over(loop, adopted)
        orphans: dict[int, Status] = {}
        while True:
            yield from loop.sleep(LOOK_SECONDS)
            for adopted in list(self._adopted.values()):
                if self._is_over(adopted):
                    self._free(loop, adopted)
            found = {}
            for port in self._terms.ports:
                status = self._find_orphan(port)
                if status is not None:
                    found[port] = status
                    if orphans.get(port) == status:
                        self._adopt(loop, port, status)
                yield NEXT_TURN
            orphans = found
            for port in self._taken.keys() - found.keys():
                del self._taken[port]

    def close_ledgers(self) -> None:
        """Close the adopted ledgers, before the endpoint frees their ports; also in a forked child."""
        self._is_closed = True
        for adopted in self._adopted.values():
            os.close(adopted.file)
        self._adopted.clear()

    def _find_path(self, port: int) -> Path:
        return self._folder / f"{port}.ledger"

    def _find_orphan(self, port: int) -> Status | None:
        """Return the status of a port's ledger if the port is owed and its holder has ended."""
        if port in self._adopted or self._is_closed:
            return None
        path = self._find_path(port)
        status = read_status(path)
        if status is None and port not in self._in_vain and (damage := find_damage(path)):
            self._give_up(port, 0.0, damage)
        if status is None or status.site not in self._sites or not status.is_owed or status.is_held:
            return None
        opened_at, is_useless = self._in_vain.get(port, (0.0, False))
        if opened_at == status.opened_at and (is_useless or not self._scrapes.count):
            return None
        return status

    def _adopt(self, loop: Loop, port: int, status: Status) -> None:
        """Serve an orphaned port, unless another process has it or its ledger."""
        path = self._find_path(port)
        with ExitStack() as stack:  # it closes the ledger before the port
            try:
                listener = ports.listen(self._terms.address, port)
                if listener is None:
                    self._note_taken(port)
                    return
                stack.callback(listener.close)
                file = open_locked(path, seconds=0, create=False)
                stack.callback(os.close, file)
                reading = read_locked(path, file)
            except (LedgerLocked, FileNotFoundError):  # a process of another container has it, for example
                return
            except Exception as error:
                if not isinstance(error, OSError) or error.errno not in TRANSIENT:
                    self._give_up(port, status.opened_at, str(error), error)
                return
            if reading.status != status:
                return
            stack.pop_all()
        self._serve(loop, Adopted(port, status, file), listener, reading)

    def _serve(self, loop: Loop, adopted: Adopted, listener: socket.socket, reading: Reading) -> None:
        binding = Binding(CollectorRegistry())
        binding.show(keep(reading.families))
        routes = self._make_routes(adopted.port, binding, partial(self._note_scrape, adopted))
        adopted.service = self._endpoint.add(listener, routes)
        self._adopted[adopted.port] = adopted
        self._open_hand_over(loop, adopted)
        logger.info("Serving the last counts of a process that has ended. port=%s pid=%s", adopted.port, os.getpid())

    def _open_hand_over(self, loop: Loop, adopted: Adopted) -> None:
        sock = presence.open_hand_over(self._terms.key, adopted.port)
        adopted.awaiting = None if sock is None else loop.spawn(self._await_claimer(adopted, sock), sock=sock)

    def _give_up(self, port: int, opened_at: float, reason: str, error: Exception | None = None) -> None:
        """Log once that a port cannot be served, and leave it to the next process that claims it."""
        self._in_vain[port] = opened_at, True
        logger.warning(
            "The last counts of port %s cannot be served: %s (%s). The next process that claims the port tries again.",
            port,
            reason,
            self._find_path(port),
            exc_info=None if isinstance(error, OSError | LedgerDamaged) else error,
        )

    def _note_taken(self, port: int) -> None:
        """Log it if neither a process of the site nor another heir can be the one that has the port."""
        self._taken[port] += 1
        if self._taken[port] == TAKEN_LOOKS and not presence.may_have_heir(self._terms.key, port):
            logger.warning(
                "The last counts of port %s cannot be scraped while another program has the port. End that program, or "
                "give it another port.",
                port,
            )

    def _note_scrape(self, adopted: Adopted, began: float) -> None:
        if self._adopted.get(adopted.port) is adopted:
            adopted.scraped_at = adopted.scraped_at or monotonic()
            os.pwrite(adopted.file, NUMBER.pack(began), SCRAPED_AT)

    def _is_over(self, adopted: Adopted) -> bool:
        if adopted.scraped_at is not None:
            if adopted.awaiting is None:  # a process that needs the port cannot ask for it
                return True
            chance = min(max(CHANCE_SECONDS, 2 * self._scrapes.longest_interval), MAX_SECONDS)
            return monotonic() - adopted.scraped_at > chance
        return monotonic() - adopted.adopted_at > (MAX_SECONDS if self._scrapes.count else UNSCRAPED_SECONDS)

    def _free(self, loop: Loop, adopted: Adopted) -> None:
        """Stop serving a port: its counts are settled, or nobody has scraped them."""
        if adopted.scraped_at is None:
            self._in_vain[adopted.port] = adopted.status.opened_at, self._scrapes.count > 0
        else:  # whatever the clock does
            settled_at = max(time.time(), math.nextafter(adopted.status.opened_at, math.inf))
            os.pwrite(adopted.file, NUMBER.pack(settled_at), SETTLED_AT)
        if adopted.awaiting is not None:
            loop.drop(adopted.awaiting)
        listener = self._let_go(adopted)
        os.close(adopted.file)
        listener.close()

    def _let_go(self, adopted: Adopted) -> socket.socket:
        """Stop serving a port; return its listening socket."""
        del self._adopted[adopted.port]
        assert adopted.service is not None
        return self._endpoint.remove(adopted.service)

    def _await_claimer(self, adopted: Adopted, sock: socket.socket) -> Steps[None]:
        """Hand a port over to the first process of this user that asks for it."""
        while True:
            yield sock, READ
            try:
                peer, _ = sock.accept()
            except OSError:
                continue
            if presence.is_same_user(peer):
                break
            peer.close()
        sock.close()
        with peer, self._let_go(adopted) as listener:
            try:
                socket.send_fds(peer, [b"."], [listener.fileno(), adopted.file])
            except OSError:  # the peer has given up; the port is still owed
                pass
            os.close(adopted.file)
        logger.info("Handed a port over. port=%s pid=%s", adopted.port, os.getpid())
