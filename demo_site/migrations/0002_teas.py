from __future__ import annotations

from django.apps.registry import Apps
from django.db import migrations
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

TEAS = {"Assam": 690, "Darjeeling": 1290, "Dragon Well": 1890, "Earl Grey": 750, "Gunpowder": 590, "Lapsang": 990}


def stock(apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    tea = apps.get_model("demo_site", "Tea")
    tea.objects.bulk_create(tea(name=name, cents=cents) for name, cents in TEAS.items())


class Migration(migrations.Migration):
    dependencies = [("demo_site", "0001_initial")]
    operations = [migrations.RunPython(stock, migrations.RunPython.noop)]
