"""gevent, which replaces threads, locks, sockets and selectors ("patches" them), maybe after this app has started.

A native lock that is held while greenlets switch blocks the process for good, and so may a native thread that uses
patched locks. So the threads of this package end before gevent patches anything, and new ones start afterwards, with
new locks.
"""

from __future__ import annotations

import selectors
import sys
from collections.abc import Callable


def are_threads_greenlets() -> bool:
    """Return whether a new thread is a greenlet."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def make_selector() -> selectors.BaseSelector:
    """Return a selector for the kind of threads that this process has.

    A native selector in a greenlet would block the hub, and gevent's belongs to the hub of the thread that made it. So
    which modules are patched does not matter, except threading.
    """
    if are_threads_greenlets():
        from gevent.selectors import GeventSelector

        return GeventSelector()  # type: ignore[no-any-return]
    monkey = sys.modules.get("gevent.monkey")
    native = selectors.DefaultSelector if monkey is None else monkey.get_original("selectors", "DefaultSelector")
    return native()


def begin_in_child() -> None:
    """Make threads work in a forked child before the fork hooks have all run.

    gevent sets up the hub of a child after these hooks, and until then none of its greenlets can start. Calling
    reinit() twice is allowed: https://www.gevent.org/api/gevent.html#gevent.reinit
    """
    if "gevent.hub" in sys.modules:
        sys.modules["gevent.hub"].reinit()


def watch_patching(before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call these before and after gevent patches modules: once for patch_all(), else once for each function.

    https://www.gevent.org/api/gevent.events.html
    """
    try:
        from zope.event import subscribers  # the list that gevent.events uses; gevent itself need not be imported
    except ImportError:  # gevent requires it, so gevent is not installed
        return
    subscribers.append(Patching(before, after).notice)


class Patching:
    """Turns gevent's events into one call before it patches and one call afterwards."""

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before, self._after = before, after
        self._is_patching = self._is_patching_all = False

    def notice(self, event: object) -> None:
        events = sys.modules.get("gevent.events")
        if events is None:  # another user of zope.event
            return
        if isinstance(event, events.GeventWillPatchEvent):
            self._is_patching_all |= isinstance(event, events.GeventWillPatchAllEvent)
            if not self._is_patching:
                self._is_patching = True
                self._before()
        elif isinstance(event, events.GeventDidPatchEvent):
            self._is_patching_all &= not isinstance(event, events.GeventDidPatchAllEvent)
            if self._is_patching and not self._is_patching_all:
                self._is_patching = False
                self._after()
