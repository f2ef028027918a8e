"""The live targets through the site itself, as http_sd.

The site may be open to everybody where the endpoints are not, and each answer asks every port: so only who has the
token is answered, and nobody where there is none.
"""

from __future__ import annotations

import contextlib

from django.contrib.auth.decorators import login_not_required
from django.http import HttpRequest, HttpResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from django_promports.conf import conf
from django_promports.endpoint import is_authorized
from django_promports.loop import Loop
from django_promports.worker import find_targets


@login_not_required
@never_cache
@require_safe
def targets(request: HttpRequest) -> HttpResponse:
    """Return the ports of this machine at which a worker answers now."""
    token = conf.read_token()
    if token is None:
        text = "The targets are told to who has the token; set PROMPORTS_BEARER_TOKEN_FILE.\n"
        return HttpResponse(text, "text/plain", 403)
    if not is_authorized(request.headers.get("Authorization", ""), token):
        text = "This page requires the bearer token of the endpoints.\n"
        return HttpResponse(text, "text/plain", 401, headers={"WWW-Authenticate": "Bearer"})
    with contextlib.closing(Loop()) as loop:
        return HttpResponse(loop.complete(find_targets(loop)), "application/json")
