"""Freeze ledgers of the django_promports that is imported: python tests/data/ledgers/freeze.py VERSION FOLDER

The frozen files are small: the size, and then offset, length and bytes of each page that is not zero, compressed.
What they hold is written to a JSON file next to them. Run it with the code of the version to be frozen.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

PAGE = 4096


def freeze(path: Path) -> bytes:
    content = path.read_bytes()
    parts = [struct.pack("<Q", len(content))]
    for offset in range(0, len(content), PAGE):
        page = content[offset : offset + PAGE]
        if page.strip(b"\0"):
            parts.append(struct.pack("<QQ", offset, len(page)) + page)
    return zlib.compress(b"".join(parts), 9)


def thaw(frozen: Path, path: Path) -> None:
    data = zlib.decompress(frozen.read_bytes())
    with path.open("wb") as file:
        file.truncate(*struct.unpack_from("<Q", data))
        position = 8
        while position < len(data):
            offset, length = struct.unpack_from("<QQ", data, position)
            file.seek(offset)
            file.write(data[position + 16 : position + 16 + length])
            position += 16 + length


def fill(ledger: Any) -> None:
    """Count in every type of family; forget a series and a family."""
    apples = ledger.add_family("apples", "counter", 'Apples "eaten".\n\\', "", ("kind",), ())
    for number in range(12):
        first = ledger.add_series(apples, (f"kind {number} \u00fc\U0001f34e",), 1_700_000_000.25 + number)
        # What did not change since the last claim keeps its activity and its time, if that is not long ago.
        for cell, value in enumerate((number / 3, 4e9 + number, number / 3), first - 2):
            ledger.cells[cell] = value
    sizes = ledger.add_family("sizes_bytes", "summary", "", "bytes", (), ())
    first = ledger.add_series(sizes, (), 1.5)
    ledger.cells[first], ledger.cells[first + 1] = 3.0, -7.25
    seconds = ledger.add_family("seconds", "histogram", "Of jobs.", "", ("a", "b"), ("0.5", "1.0", "+Inf"))
    for labels in (("x", ""), ("gone", "")):
        first = ledger.add_series(seconds, labels, 2.5)
        for cell, value in enumerate((1e300, 1.0, 2.0, 3.0), first):
            ledger.cells[cell] = value
    ledger.forget(seconds, ("gone", ""))
    gone = ledger.add_family("gone", "counter", "Gone.", "", (), ())
    ledger.add_series(gone, (), 1.0)
    ledger.forget(gone)
    ledger.add_series(apples, ("later",), 3.5)


def describe(families: Any) -> Any:
    """Return what families hold, as in the JSON files: by name, the record of each and numbers by label values."""
    return {
        name: {
            "family": [
                record.type,
                record.help,
                record.unit,
                list(record.labelnames),
                list(record.bounds),
                record.mode,
            ],
            "series": sorted([list(labels), list(numbers)] for labels, numbers in series.items()),
        }
        for name, (record, series) in families.items()
    }


def describe_rows(ledger: Any) -> Any:
    """Return what an open ledger holds, with every cell of every series."""
    cells = ledger.cells
    return describe(
        {
            name: (family.record, {labels: cells[family.find_row(first)] for labels, first in family.series.items()})
            for name, family in ledger.families.items()
        }
    )


def main(version: str, folder: Path) -> None:
    from django_promports import ledger as module

    for ending in ("closed", "killed"):
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "19100.ledger"
            ledger = module.Ledger(path, "site")
            fill(ledger)
            ledger.note_scrape(time.time())
            held = describe_rows(ledger)
            ledger.close(seal=ending == "closed")
            content = path.read_bytes()
            name = f"version-{version}-{ending}"
            (folder / f"{name}.frozen").write_bytes(freeze(path))
            settled_at, opened_at = struct.unpack_from("=dd", content, 2048)
            (folder / f"{name}.json").write_text(
                json.dumps({"settled_at": settled_at, "opened_at": opened_at, "families": held}, indent=1) + "\n"
            )
            end = struct.unpack_from("=Q", content, 1032)[0]
            for what, position in {"cell": 4096 + 8 * 3, "index": end - 20, "header": 20}.items():
                with path.open("wb") as file:
                    file.write(content)
                    file.seek(position)
                    file.write(bytes([content[position] ^ 1]))
                if what != "cell" or ending == "closed":  # nothing tells whether the cells of a killed holder are right
                    (folder / f"{name}-damaged-{what}.frozen").write_bytes(freeze(path))
            path.write_bytes(content[: len(content) // 2])
            (folder / f"{name}-truncated.frozen").write_bytes(freeze(path))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
