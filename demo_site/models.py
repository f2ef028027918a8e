from __future__ import annotations

from django.db import models


class Tea(models.Model):
    name = models.CharField(max_length=50, unique=True)
    cents = models.PositiveIntegerField()

    def __str__(self) -> str:
        return self.name


class Order(models.Model):
    tea = models.ForeignKey(Tea, on_delete=models.PROTECT)
    grams = models.PositiveIntegerField()
    made_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.grams} g of {self.tea}"
