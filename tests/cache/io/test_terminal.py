from __future__ import annotations

import pytest

from ulfine_fast.cache.io.terminal import printable


@pytest.mark.parametrize("text", ["cat", "Ärger & co", "日本語", "می‌خواهم", "👩‍🔬", "a b", ""])
def test_what_people_write_stays(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m", r"\x9b31m"),
        ("\x7f\x00", r"\x7f\x00"),
        ("d\udcffog", r"d\udcffog"),
        ("cat\u202egod", r"cat\u202egod"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_what_steers_a_terminal_is_written_out(text, shown):
    assert printable(text) == shown
    printable(text).encode()
