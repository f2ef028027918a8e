"""Views of the site: the live targets as http_sd, and the page with all workers.

The site may be public where the endpoints are not, and each answer queries every port. So the list of targets requires
the bearer token, and is refused if none is set; the page requires a staff user.
"""

from __future__ import annotations

import contextlib
from typing import Any

from django.contrib.auth.decorators import login_not_required, user_passes_test
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.urls import NoReverseMatch, reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from django_promports.conf import conf
from django_promports.discovery import find_targets, look
from django_promports.endpoint import is_authorized
from django_promports.loop import Loop
from django_promports.page import html


@login_not_required
@never_cache
@require_safe
def targets(request: HttpRequest) -> HttpResponse:
    """Return the http_sd list of the ports of this machine at which a worker answers now."""
    token = conf.read_token()
    if token is None:
        text = "This list requires a bearer token, and none is set. Set PROMPORTS_BEARER_TOKEN_FILE.\n"
        return HttpResponse(text, "text/plain", 403)
    if not is_authorized(request.headers.get("Authorization", ""), token):
        text = "This list requires the bearer token of the endpoints.\n"
        return HttpResponse(text, "text/plain", 401, headers={"WWW-Authenticate": "Bearer"})
    with contextlib.closing(Loop()) as loop:
        return HttpResponse(loop.complete(find_targets(loop)), "application/json")


@never_cache
@require_safe
def page(request: HttpRequest) -> HttpResponse:
    """Show staff what the workers of this machine do now."""
    if not hasattr(request, "user"):
        text = (
            "This page is for staff, but users cannot be identified: django.contrib.auth and its "
            "AuthenticationMiddleware are not installed. Each worker has the same page on its own port.\n"
        )
        return HttpResponse(text, "text/plain", 403)
    try:
        login: str | None = reverse("admin:login")
    except NoReverseMatch:
        login = None  # LOGIN_URL
    return user_passes_test(_is_staff, login)(_draw)(request)


def _is_staff(user: Any) -> bool:
    if user.is_authenticated and not (user.is_active and getattr(user, "is_staff", False)):
        raise PermissionDenied("This page is for staff.")  # a redirect to the login page would lead back here
    return bool(user.is_authenticated)


def _draw(request: HttpRequest) -> HttpResponse:
    with contextlib.closing(Loop()) as loop:
        return HttpResponse(html.render(loop.complete(look(loop))), headers=dict(html.HEADERS))
