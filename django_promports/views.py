"""Views that the site serves: the live targets as http_sd, and the page about the workers.

The site may be public where the endpoints are not, and each response asks every port. So the targets require the bearer
token of the endpoints, and are not served without one; the page is for staff.
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
from django_promports.discovery import find_targets, survey
from django_promports.http import is_authorized
from django_promports.loop import Loop
from django_promports.page import html


@login_not_required
@never_cache
@require_safe
def targets(request: HttpRequest) -> HttpResponse:
    """Return the http_sd list of the ports of this machine at which a worker answers now."""
    token = conf.read_token()
    if token is None:
        text = "The targets require the bearer token of the endpoints; set PROMPORTS_BEARER_TOKEN_FILE.\n"
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
            "This page is for staff, but this site cannot identify users: django.contrib.auth and its "
            "AuthenticationMiddleware are not installed. Each worker has such a page on its own port.\n"
        )
        return HttpResponse(text, "text/plain", 403)
    try:
        login: str | None = reverse("admin:login")
    except NoReverseMatch:
        login = None  # then user_passes_test() uses LOGIN_URL
    return user_passes_test(_is_staff, login)(_draw)(request)


def _is_staff(user: Any) -> bool:
    if user.is_authenticated and not (user.is_active and getattr(user, "is_staff", False)):
        raise PermissionDenied("This page is for staff.")  # another login would redirect here again
    return bool(user.is_authenticated)


def _draw(request: HttpRequest) -> HttpResponse:
    with contextlib.closing(Loop()) as loop:
        return HttpResponse(html.render(loop.complete(survey(loop))), headers=dict(html.HEADERS))
