"""Chromium, driven by its own chromedriver, with a temporary profile."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.servers import SECONDS

QUIET = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"]
DESKTOP = (1280, 600)
PHONE = (360, 740)


@contextlib.contextmanager
def chromium(find: Callable[[str], str], profile: Path, *, javascript: bool = True) -> Iterator[Chrome]:
    """Run a browser. find: returns the path of a program."""
    options = ChromeOptions()
    options.binary_location = find("chromium")
    for option in ("headless", "no-sandbox", "disable-gpu", *QUIET, f"user-data-dir={profile}"):
        options.add_argument(f"--{option}")
    if not javascript:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, Service(find("chromedriver")))
    try:
        browser.set_page_load_timeout(SECONDS)
        yield browser
    finally:
        browser.quit()


def resize(browser: Chrome, size: tuple[int, int], scale: float = 1, *, dark: bool = False) -> None:
    """Give the page the size of a screen. A real window cannot be as narrow as a phone."""
    width, height = size
    screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def measure_widths(browser: Chrome) -> tuple[int, int, int]:
    """Return the widths of the content, of the viewport without its scroll bar, and of the window, in CSS pixels."""
    script = "const root = document.documentElement; return [root.scrollWidth, root.clientWidth, innerWidth]"
    content, room, window = browser.execute_script(script)
    return content, room, window


def take_picture(browser: Chrome, path: Path, height: int | None = None) -> None:
    """Write a PNG of the page, down to its end or to a height."""
    sizes = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": sizes["width"], "height": min(sizes["height"], height or 10000), "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    path.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))


def fill_in_login(browser: Chrome, name: str, password: str) -> None:
    """Fill in Django's login form."""
    browser.find_element(By.NAME, "username").send_keys(name)
    browser.find_element(By.NAME, "password").send_keys(password)
    browser.find_element(By.TAG_NAME, "button").click()
