from __future__ import annotations

from django.contrib.auth.views import LoginView
from django.urls import include, path

from demo_site import views

urlpatterns = [
    path("", views.index, name="index"),
    path("teas/<int:pk>/", views.tea, name="tea"),
    path("teas/<int:pk>/order/", views.order, name="order"),
    path("search/", views.search, name="search"),
    path("broken/", views.broken, name="broken"),
    path("login/", LoginView.as_view(template_name="login.html"), name="login"),
    path("metrics/", include("django_promports.urls")),
]
