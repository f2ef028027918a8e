"""The pictures of the pages in docs/: `tox run -e pictures` takes them anew, from the demo and its traffic."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from tests.browser import DESKTOP, PHONE, chromium, log_in, resize, take_picture
from tests.servers import ROOT, running

# Traffic that is left when the first picture is taken.
SECONDS_LEFT = 15


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=int, default=330, metavar="SECONDS", help="Of the traffic. Default: 330.")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="Default: docs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        take_pictures(Path(folder), arguments.folder, arguments.duration)


def take_pictures(scratch: Path, folder: Path, duration: int) -> None:
    command = [sys.executable, "manage.py", "demo", "--keep", "--duration", str(duration)]
    with running(*command, log=scratch / "demo.log", TMPDIR=str(scratch)) as demo:

        def is_nearly_over() -> bool:
            left = re.findall(r"answered, (\d+) s to go", demo.output())
            return bool(left) and int(left[-1]) <= SECONDS_LEFT

        demo.wait_until(is_nearly_over, "there was traffic", duration + 60)
        found = re.search(r"page +(http:\S+) +\(log in as (\w+) with (\S+)\)\n +worker page (http:\S+)", demo.output())
        assert found, demo.output()
        site, name, password, worker = found.groups()
        with chromium(_find, scratch / "profile") as browser:
            resize(browser, DESKTOP)
            browser.get(site)
            log_in(browser, name, password)
            take_picture(browser, folder / "page-site.png")
            resize(browser, DESKTOP, dark=True)
            browser.get(worker)
            take_picture(browser, folder / "page-worker.png")
            resize(browser, PHONE, 2)
            browser.get(site)
            take_picture(browser, folder / "page-phone.png", 2 * PHONE[1])


def _find(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is not installed: apt-get install chromium chromium-driver")
    return path


if __name__ == "__main__":
    main()
