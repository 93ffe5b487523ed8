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
WIDE, GRID, PHONE = (1100, 800), (1280, 860), (390, 844)


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


def take_out_others(page: Page) -> None:
    """Takes the images out that are not of the class which the page suggests, as their folder says."""
    suggested = page.locator(".tile p span:first-child").first.inner_text()
    for tile in page.locator(".tile:not(.answered)").all():
        if f"/{suggested}/" not in str(tile.get_attribute("title")):
            tile.click()


def answer_some(page: Page) -> None:
    """Answers rightly for two pages of rare classes, and takes what does not fit out of the largest cluster."""
    page.locator(".tile").first.wait_for()
    for _ in range(3):
        page.keyboard.press("t")
    page.get_by_text("the likeliest first").wait_for()
    for _ in range(2):
        take_out_others(page)
        page.keyboard.press("Enter")
        page.locator(".tile.answered").first.wait_for()
        page.keyboard.press(".")
        page.locator(".tile.answered").first.wait_for(state="detached")
    page.locator("#changed b").wait_for()
    page.locator("#busy").wait_for(state="hidden")
    page.get_by_role("tab", name="One cluster").click()
    page.get_by_text("Images that are alike").wait_for()
    sizes = page.locator("#group option").evaluate_all(
        "all => all.map(one => Number(one.text.match(/\\d+(?=\\)$)/)[0]))"
    )
    page.locator("#group").select_option(index=sizes.index(max(sizes)))
    page.get_by_text(f"group {sizes.index(max(sizes)) + 1} of").wait_for()
    page.wait_for_load_state("networkidle")
    take_out_others(page)


def take_review(browser: Browser, run: Path) -> None:
    """Takes the page of the review: wide and light, narrow and dark."""
    with tempfile.TemporaryDirectory() as scratch:
        # the page shows the paths of its files
        os.chdir(scratch)
        session = Session(run, Path("labels.csv"), Path("runs") / "reviewed")
        server = make_server(session, "screenshot")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, size, scheme in (("review-light", GRID, "light"), ("review-dark", PHONE, "dark")):
            with open_page(browser, f"http://127.0.0.1:{server.port}/screenshot/", size, scheme) as page:
                answer_some(page)
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
