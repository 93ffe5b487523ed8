"""Texts from files, as a terminal may show them."""

from __future__ import annotations

import unicodedata

# they reorder the text around them, so that a name can look like another one
_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
# control characters, halves of surrogate pairs, and separators of lines and paragraphs
_ESCAPED = {"Cc", "Cs", "Zl", "Zp"}


def printable(text: object) -> str:
    r"""A text on one line, with what would steer a terminal written as an escape such as \x1b.

    Names of classes, images and models come from files of other people: an escape code in one could hide lines, change
    the window's title or answer a prompt.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _ESCAPED or ord(char) in _REORDERING
        else char
        for char in str(text)
    )
