"""The children of a labelled metric, in a dict that notifies a listener when one is made or removed.

prometheus_client holds the metric's lock while it makes a child. A finalizer that runs meanwhile may want that lock
too, or another metric's, whose holder may be in the same situation. Each step here is one operation of a dict, so that
no lock is needed.
"""

from __future__ import annotations

from typing import Any, Protocol

Labels = tuple[str, ...]


class Listener(Protocol):
    """Is notified of each child that is made or removed."""

    def adopt_child(self, metric: Any, labelvalues: Labels, child: Any) -> None: ...

    def forget_child(self, metric: Any, labelvalues: Labels, child: Any) -> None: ...


class NoLock:
    """Takes the place of a metric's lock, and locks nothing.

    Each labels() call enters it, so both methods are a C function that takes any arguments and returns a false value.
    """

    __enter__ = __exit__ = staticmethod("".format)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return True

    def release(self) -> None:
        pass


class Children(dict[Labels, Any]):
    """The children of a labelled metric, by label values. Setting one that exists keeps the one that exists."""

    def __init__(self, listener: Listener, metric: Any) -> None:
        super().__init__(metric._metrics)
        self.listener, self.metric = listener, metric

    def __setitem__(self, labelvalues: Labels, child: Any) -> None:
        if self.setdefault(labelvalues, child) is child:
            self.listener.adopt_child(self.metric, labelvalues, child)

    def __missing__(self, labelvalues: Labels) -> Any:
        return self.metric.labels(*labelvalues)  # removed since labels() made it

    def __delitem__(self, labelvalues: Labels) -> None:
        self.pop(labelvalues)

    def pop(self, labelvalues: Labels, default: Any = None) -> Any:
        child = super().pop(labelvalues, None)
        if child is None:
            return default
        self.listener.forget_child(self.metric, labelvalues, child)
        return child

    def clear(self) -> None:
        for labelvalues in list(self):
            self.pop(labelvalues)
