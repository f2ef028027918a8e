"""Rate-limited logging of what a peer or a loop can cause: one line of a kind per minute, counting those left out."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from time import monotonic

logger = logging.getLogger("django_promports")

LIMIT_SECONDS = 60.0


class LimitedLog:
    """Logs errors, at most one of a kind per minute. Kinds are few: none is derived from what a peer sends."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, tuple[float, int]] = {}  # time of the last line, and how many were left out since

    def error(self, kind: Hashable, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        now = monotonic()
        logged_at, left_out = self._kinds.get(kind, (now - LIMIT_SECONDS, 0))
        if now - logged_at < LIMIT_SECONDS:
            self._kinds[kind] = logged_at, left_out + 1
            return
        self._kinds[kind] = now, 0
        if left_out:
            message, args = f"{message} (%s more like this since the last such line.)", (*args, left_out)
        logger.error(message, *args, exc_info=exc_info)
