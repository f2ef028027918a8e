"""path("metrics/", include("django_promports.urls")): a page for staff at metrics/, http_sd at metrics/targets."""

from __future__ import annotations

from django.urls import path

from django_promports import views

app_name = "promports"
urlpatterns = [path("", views.page, name="page"), path("targets", views.targets, name="targets")]
