"""The page in a real browser: keys, two tabs, narrow and wide, light and dark, names as text."""

from __future__ import annotations

import threading

import pytest

from tests.conftest import needs_chromium
from tests.review.conftest import BAD
from ulfine_fast.data.corrections import read_corrections
from ulfine_fast.review.app import make_server

pytestmark = needs_chromium


@pytest.fixture
def address(session):
    server = make_server(session, "token")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/token/"
    server.shutdown()
    thread.join()
    server.server_close()


def opened(browser, address, width=1100, scheme="light"):
    """The page, and its console messages, dialogs and requests to other servers."""
    page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}).new_page()
    events = []
    page.on("console", lambda message: events.append(message.text))
    page.on("dialog", lambda dialog: events.append(dialog.message))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or events.append(request.url))
    page.goto(address)
    page.locator("#accept").wait_for()
    return page, events


def press(page, key, saved):
    """Press a key, and wait until the server has answered: `saved` labels are saved."""
    page.keyboard.press(key)
    page.get_by_text(f", {saved} labels saved").wait_for()


def test_keys_save_labels(browser, address, session):
    page, events = opened(browser, address)
    items = session.state()["items"]
    press(page, "Enter", 1)
    press(page, "2", 2)
    press(page, "x", 3)
    corrections = read_corrections(session.labels)
    kept = session.cache.class_names[items[0]["label"] if items[0]["label"] >= 0 else items[0]["suggested"]]
    assert [corrections[item["id"]] for item in items[:3]] == [kept, session.cache.class_names[1], ""]
    press(page, "u", 2)
    assert items[2]["id"] not in read_corrections(session.labels)
    page.keyboard.press("/")
    page.keyboard.type(BAD)
    press(page, "Enter", 3)
    assert read_corrections(session.labels)[items[2]["id"]] == BAD
    assert events == []


def test_two_tabs_lose_nothing(browser, address, session):
    (one, _), (other, events) = opened(browser, address), opened(browser, address)
    first, second = (item["id"] for item in session.state()["items"][:2])
    press(one, "1", 1)
    other.keyboard.press("2")
    other.get_by_text("Another page has changed this label").wait_for()
    assert read_corrections(session.labels)[first] == session.cache.class_names[0]
    other.keyboard.press("2")
    other.locator("#name").get_by_text(second, exact=True).wait_for()
    other.keyboard.press("ArrowLeft")
    other.get_by_text(f"Saved: {session.cache.class_names[1]}").wait_for()
    assert read_corrections(session.labels)[first] == session.cache.class_names[1]
    assert [text for text in events if "409" not in text] == []


def test_a_fit_from_the_page(browser, address, session):
    page, _ = opened(browser, address)
    press(page, "Enter", 1)
    page.keyboard.press("f")
    page.locator("#fits tr").nth(1).wait_for()
    page.get_by_role("button", name="Fit again").wait_for()
    assert session.out.is_dir()


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")])
def test_the_page_fits_its_window_and_shows_names_as_text(browser, address, session, width, scheme):
    page, events = opened(browser, address, width, scheme)
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.get_by_role("button", name=BAD).count() >= 1
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    assert dark == (scheme == "dark")
    assert events == []


def test_every_button_is_reached_by_the_tab_key(browser, address):
    page, _ = opened(browser, address)
    wanted = page.evaluate("[...document.querySelectorAll('button:not(:disabled), input')].length")
    seen = set()
    for _ in range(wanted + 2):
        page.keyboard.press("Tab")
        index = page.evaluate(
            "[...document.querySelectorAll('button:not(:disabled), input')].indexOf(document.activeElement)"
        )
        seen.add(index)
    assert set(range(wanted)) <= seen
