"""path("metrics/", include("django_promports.urls")): http_sd at metrics/targets."""

from __future__ import annotations

from django.urls import path

from django_promports import views

app_name = "promports"
urlpatterns = [path("targets", views.targets, name="targets")]
