"""Views of different speed, and one that always fails."""

from __future__ import annotations

import random
import time

from django.core.cache import cache
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.http import require_POST

from demo_site.metrics import ORDERED_GRAMS, ORDERS, SEARCH_SECONDS
from demo_site.models import Order, Tea


def index(request: HttpRequest) -> HttpResponse:
    """Fast: usually answered from the cache."""
    teas = cache.get_or_set("teas", lambda: list(Tea.objects.values("id", "name", "cents")), timeout=5)
    return JsonResponse({"teas": teas})


def tea(request: HttpRequest, pk: int) -> HttpResponse:
    """One query."""
    found = get_object_or_404(Tea, pk=pk)
    return JsonResponse({"name": found.name, "cents": found.cents})


@require_POST
def order(request: HttpRequest, pk: int) -> HttpResponse:
    """A query and a write."""
    made = Order.objects.create(tea=get_object_or_404(Tea, pk=pk), grams=random.choice([50, 100, 250]))
    ORDERS.labels(tea=made.tea.name).inc()
    ORDERED_GRAMS.observe(made.grams)
    return JsonResponse({"order": made.pk}, status=201)


@SEARCH_SECONDS.time()
def search(request: HttpRequest) -> HttpResponse:
    """Slow, like a real search."""
    time.sleep(random.uniform(0.005, 0.06))
    return JsonResponse({"teas": list(Tea.objects.filter(name__icontains=request.GET.get("q", "")).values("name"))})


def broken(request: HttpRequest) -> HttpResponse:
    """Raises, so that the demo has errors to show."""
    raise RuntimeError("The kettle is empty.")
