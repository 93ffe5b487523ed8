"""Takes the screenshots of the documentation: `python docs/screenshots.py demo-output`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from ulfine_fast.review.app import make_server
from ulfine_fast.review.session import Session

IMAGES = Path(__file__).with_name("images")
WIDE, PHONE = (1100, 800), (390, 844)


@contextmanager
def open_page(browser: Browser, address: str, size: tuple[int, int], scheme: str) -> Iterator[Page]:
    """Opens the page at an address in a window with this size in pixels and colour scheme."""
    context = browser.new_context(
        color_scheme="dark" if scheme == "dark" else "light", viewport={"width": size[0], "height": size[1]}
    )
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


def take_review(browser: Browser, run: Path) -> None:
    """Takes the page of the review: wide and light, narrow and dark."""
    with tempfile.TemporaryDirectory() as scratch:
        # the page shows the paths of its files
        os.chdir(scratch)
        session = Session(run, Path("labels.csv"), Path("runs") / "reviewed")
        server = make_server(session, "screenshot")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, size, scheme in (("review-light", WIDE, "light"), ("review-dark", PHONE, "dark")):
            with open_page(browser, f"http://127.0.0.1:{server.port}/screenshot/", size, scheme) as page:
                page.locator("#accept").wait_for()
                page.wait_for_load_state("networkidle")
                page.screenshot(path=IMAGES / f"{name}.png")
        server.shutdown()
        os.chdir(run)


def take_report(browser: Browser, report: Path) -> None:
    """Takes the top of the report: wide and light, narrow and dark."""
    for name, size, scheme in (("report-light", WIDE, "light"), ("report-dark", PHONE, "dark")):
        with open_page(browser, report.resolve().as_uri(), size, scheme) as page:
            page.screenshot(path=IMAGES / f"{name}.png")


def main(demo: Path) -> None:
    """Takes all screenshots from the folder that `ulfine-fast demo` wrote."""
    IMAGES.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        take_report(browser, demo / "report.html")
        take_review(browser, demo / "runs" / "ulfine_plus" / "seed-0")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
