"""Requests from several threads, and how many of them were answered."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import random
import threading
from collections import Counter
from collections.abc import Collection

Asked = tuple[str, str]  # method and path


class Traffic:
    """Requests until stop(): how many were answered, and how many others may have been counted."""

    def __init__(self, address: str, asked: Collection[Asked], threads: int = 4) -> None:
        # With all keys: they are read while the threads add to them.
        self.answered: Counter[Asked] = Counter(dict.fromkeys(asked, 0))
        self.unanswered: Counter[Asked] = Counter(dict.fromkeys(asked, 0))
        self.errors: Counter[int] = Counter()  # the statuses of responses that are errors; they count as unanswered
        self._address = address
        self._ended = threading.Event()
        self._lock = threading.Lock()
        orders = [random.sample(list(asked), len(asked)) for _ in range(threads)]
        self._threads = [threading.Thread(target=self._run, args=[order], daemon=True) for order in orders]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, order: list[Asked]) -> None:
        for asked in itertools.cycle(order):
            if self._ended.wait(0.02):
                return
            try:
                status = self._ask(*asked)
            except ConnectionRefusedError:
                continue  # it cannot have been counted
            with self._lock:
                (self.answered if status in (200, 201) else self.unanswered)[asked] += 1
                if status not in (0, 200, 201):
                    self.errors[status] += 1

    def _ask(self, method: str, path: str) -> int:
        with contextlib.closing(http.client.HTTPConnection(self._address, timeout=60)) as connection:
            connection.connect()
            try:
                connection.request(method, path)
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                return 0
            return response.status
