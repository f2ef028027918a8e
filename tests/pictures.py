"""The pictures of the pages in docs/: `tox run -e pictures` takes them from the demo and its traffic."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from tests.browser import DESKTOP, PHONE, chromium, fill_in_login, resize, take_picture
from tests.servers import ROOT, running

# The line in which the demo prints the address of its page, with a user name and a password.
LOGIN = r"page +(http:\S+) +\(log in as (\w+) with (\S+)\)\n +worker page (http:\S+)"
# Seconds of traffic that remain when the first picture is taken.
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

        def find_pages() -> re.Match[str] | None:
            return re.search(
                r"page +(http:\S+) +\(log in as (\w+) with (\S+)\)\n +worker page (http:\S+)", demo.output()
            )

        def is_nearly_over() -> bool:
            left = re.findall(r"answered, (\d+) s to go", demo.output())
            return bool(left) and int(left[-1]) <= SECONDS_LEFT

        found = demo.wait_until(find_pages, "the demo tells where its pages are", 60)
        assert found
        site, name, password, worker = found.groups()
        # Starting a browser takes CPU time, which would show in the plots.
        with chromium(_find, scratch / "profile") as browser:
            resize(browser, DESKTOP)
            browser.get(site)
            fill_in_login(browser, name, password)
            browser.get("about:blank")
            demo.wait_until(is_nearly_over, "there was traffic", duration + 60)
            browser.get(site)
            take_picture(browser, folder / "page-site.png")
            browser.get(worker)
            take_picture(browser, folder / "page-worker.png")
            resize(browser, PHONE, 2, dark=True)
            browser.get(site)
            take_picture(browser, folder / "page-phone.png", 2 * PHONE[1])


def _find(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is not installed: apt-get install chromium chromium-driver")
    return path


if __name__ == "__main__":
    main()
