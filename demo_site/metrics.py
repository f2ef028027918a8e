"""The metrics of the shop. Any module may create metrics; they need no code for worker processes."""

from __future__ import annotations

from prometheus_client import Counter, Histogram, Summary

ORDERS = Counter("shop_orders_total", "Orders taken.", ["tea"])
ORDERED_GRAMS = Summary("shop_ordered_grams", "Weight of the orders, in grams.")
SEARCH_SECONDS = Histogram("shop_search_seconds", "Time that a search takes.", buckets=[0.01, 0.025, 0.05, 0.1, 0.25])
