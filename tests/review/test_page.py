"""The page in a real browser: keys, mouse, two tabs, narrow and wide, light and dark, names as text."""

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
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("dialog", lambda dialog: events.append(dialog.message))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or events.append(request.url))
    page.goto(address)
    page.locator(".tile").first.wait_for()
    return page, events


def press(page, key, saved):
    """Press a key, and wait until the server has answered: `saved` labels are saved."""
    page.keyboard.press(key)
    page.get_by_text(f"{saved} label{'' if saved == 1 else 's'} saved", exact=True).wait_for()


def selected(page):
    """Positions of the selected images."""
    return page.evaluate(
        "[...document.querySelectorAll('.tile')].flatMap((t, i) => t.ariaSelected === 'true' ? [i] : [])"
    )


def test_single_images_are_answered_by_keys(browser, address, session):
    page, events = opened(browser, address)
    items = session.page("proposed", 0, 0)["items"]
    names = session.cache.class_names
    assert selected(page) == []
    press(page, "Enter", 1)
    press(page, "2", 2)
    press(page, "x", 3)
    corrections = read_corrections(session.labels)
    wanted = [names[items[0]["suggested"]], names[1], ""]
    assert [corrections[item["id"]] for item in items[:3]] == wanted
    press(page, "u", 2)
    assert items[2]["id"] not in read_corrections(session.labels)
    page.keyboard.press("/")
    page.keyboard.type(BAD)
    press(page, "Enter", 3)
    assert read_corrections(session.labels)[items[2]["id"]] == BAD
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("v")
    page.locator("#closer img").first.wait_for()
    assert events == []


def test_a_cluster_is_answered_by_one_key(browser, address, session):
    page, events = opened(browser, address)
    page.keyboard.press("t")
    sizes = [group["images"] for group in session.state()["tabs"]["cluster"]]
    for _ in range(sizes.index(max(sizes))):
        page.keyboard.press(".")
    shown = session.page("cluster", sizes.index(max(sizes)), 0)["items"]
    page.locator(f".tile[title='{shown[0]['id']}']").wait_for()
    assert len(shown) >= 4
    assert selected(page) == list(range(len(shown)))
    # one image is taken out by a click, another by the keyboard alone, and one comes back
    page.locator(".tile").nth(1).click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert selected(page) == [0, *range(3, len(shown))]
    page.locator(".tile").nth(1).click()
    assert selected(page) == [0, 1, *range(3, len(shown))]
    press(page, "1", len(shown) - 1)
    corrections = read_corrections(session.labels)
    assert shown[2]["id"] not in corrections
    assert set(corrections.values()) == {session.cache.class_names[0]}
    # what was left out is in focus, and undo takes the answer of all others back
    assert page.evaluate("[...document.querySelectorAll('.tile')].indexOf(document.activeElement)") == 2
    press(page, "u", 0)
    assert read_corrections(session.labels) == {}
    assert selected(page) == [0, 1, *range(3, len(shown))]
    assert events == []


def test_a_drag_selects_and_arrows_with_shift_do(browser, address):
    page, events = opened(browser, address)
    boxes = [page.locator(".tile").nth(i).bounding_box() for i in range(3)]
    page.mouse.move(boxes[0]["x"] + boxes[0]["width"] * 0.7, boxes[0]["y"] + 20)
    page.mouse.down()
    page.mouse.move(boxes[2]["x"] + 10, boxes[2]["y"] + 60, steps=4)
    assert page.locator("#drag").is_visible()
    page.mouse.up()
    assert selected(page) == [0, 1, 2]
    # a click after the drag is a click again
    page.locator(".tile").nth(0).click()
    assert selected(page) == [1, 2]
    page.keyboard.press("a")
    assert selected(page) == []
    page.locator(".tile").nth(0).focus()
    page.keyboard.press("Shift+ArrowRight")
    assert selected(page) == [0, 1]
    assert events == []


def test_the_page_says_what_answers_brought(browser, address, session):
    page, events = opened(browser, address)
    count = session.state()["proposal"]["images"]
    page.keyboard.press("a")
    press(page, "Enter", count)
    page.get_by_text("Last round expected").wait_for()
    assert "came" in page.locator("#came").inner_text()
    page.get_by_text("by the last answers").wait_for()
    assert session.state()["outcome"]["images"] == count
    assert events == []


def test_one_label_is_unknown_on_the_page(browser, address, session):
    from ulfine_fast.review.session import Change

    index = session.cache.class_names.index(BAD)
    rows = [int(row) for row in [*session.split.labeled, *session.split.val] if session.cache.labels[row] == index]
    session.put([Change(row, "", None) for row in rows[1:]])
    session.wait()
    page, _ = opened(browser, address)
    assert page.locator("#recalls tr", has_text=BAD).locator("td").last.inner_text() == "unknown"
    page.get_by_text("1 of 3 classes still unknown").wait_for()


def test_two_tabs_lose_nothing(browser, address, session):
    (one, _), (other, events) = opened(browser, address), opened(browser, address)
    first = session.page("proposed", 0, 0)["items"][0]["id"]
    press(one, "1", 1)
    other.keyboard.press("2")
    other.get_by_text("Another page has changed these labels").wait_for()
    assert read_corrections(session.labels)[first] == session.cache.class_names[0]
    # the other page shows that label now, and may change it
    assert other.locator(".tile.answered").count() == 1
    other.keyboard.press("2")
    other.locator(".tile.answered", has_text=session.cache.class_names[1]).wait_for()
    assert read_corrections(session.labels)[first] == session.cache.class_names[1]
    assert [text for text in events if "409" not in text] == []


def test_a_fit_from_the_page(browser, address, session):
    page, _ = opened(browser, address)
    press(page, "Enter", 1)
    page.keyboard.press("f")
    page.locator("#fits tr").nth(1).wait_for()
    page.get_by_role("button", name="Fit and save").wait_for()
    assert session.out.is_dir()


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_the_page_fits_its_window_and_shows_names_as_text(browser, address, session, width, scheme):
    page, events = opened(browser, address, width, scheme)
    for _ in range(5):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.keyboard.press("t")
    page.get_by_role("button", name=BAD).first.wait_for()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    assert dark == (scheme == "dark")
    assert events == []


def test_every_button_is_reached_by_the_tab_key(browser, address):
    page, _ = opened(browser, address)
    candidates = "[...document.querySelectorAll('button, input, select, .tile')]"
    reachable = f"{candidates}.filter(e => !e.disabled && e.checkVisibility() && e.tabIndex >= 0)"
    wanted = page.evaluate(f"{reachable}.length")
    seen = set()
    for _ in range(wanted + 4):
        page.keyboard.press("Tab")
        seen.add(page.evaluate(f"{reachable}.indexOf(document.activeElement)"))
    assert set(range(wanted)) <= seen


def test_images_come_when_they_are_seen(browser, address):
    """Thumbnails of the page, and of the next one, are all that is asked for."""
    page, _ = opened(browser, address)
    assert page.locator(".tile img[loading=lazy]").count() == page.locator(".tile").count() <= 30
