"""JSON against a schema: what is damaged or hostile is one sentence, and nothing is waited for."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.json_files import MAX_DEPTH, check_schema, parse_json, read_json

FIX = "make it again"


@dataclass(frozen=True)
class Content:
    name: str
    rows: Annotated[int, msgspec.Meta(ge=0, le=10**9)]
    scale: float = 1.0
    classes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "content.json"


def refusal(file, data, schema=Content):
    file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_json(file, schema, fix=FIX)
    sentence = str(caught.value)
    assert sentence.startswith(f"{file} cannot be read (")
    assert sentence.endswith(f"); {FIX}")
    assert "\n" not in sentence
    return sentence


def test_content_has_the_type_of_the_schema(file):
    file.write_text('{"name": "a", "rows": 3, "classes": ["ä", "[[[["], "later": [1], "more": {"x": [1.5, null]}}')
    assert read_json(file, Content, fix=FIX) == Content("a", 3, 1.0, ["ä", "[[[["], {"x": [1.5, None]})
    assert read_json(file, dict[str, Any], fix=FIX)["later"] == [1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b'{"name": "a", "row', "truncated"),
        (b'{"name": "a"}', "missing required field rows"),
        (b'{"name": 3, "rows": 3}', "Expected str, got int at name"),
        (b'{"name": "a", "rows": "x"}', "Expected int, got str at rows"),
        (b'{"name": "a", "rows": true}', "Expected int, got bool at rows"),
        (b'{"name": "a", "rows": -1}', "at rows"),
        (b'{"name": "a", "rows": 1000000000000}', "at rows"),
        (b'{"name": "a", "rows": 1, "classes": ["x", 4]}', r"Expected str, got int at classes\[1\]"),
        (b'{"name": "a", "rows": 1, "scale": 1' + b"0" * 400 + b"}", "a number has more than 40 digits"),
        (b'{"name": "a", "rows": 1, "scale": 1e400}', "out of range at scale"),
        (b'{"name": "a", "rows": 1, "scale": NaN}', "malformed"),
        (b'{"name": "a", "rows": 1, "more": {"x": 1' + b"0" * 400 + b"}}", "a number has more than 40 digits"),
        (b'{"name": "\\ud800", "rows": 1}', "surrogate"),
        (b'{"name": "\xff", "rows": 1}', "can't decode byte 0xff"),
        (b"[1, 2]", "Expected object, got array"),
        (b'{"name": "a", "rows": 1, "more": ' + b"[" * 100_000, "nested more than 64"),
        (b'{"a":' * 100_000, "nested more than 64"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than 64"),
        (b'["' + b'\\"[' * 100_000, "Expected object|truncated"),
    ],
)
def test_damage_is_one_sentence(file, data, reason):
    assert re.search(reason, refusal(file, data))


def test_texts_may_hold_brackets_digits_and_escapes(file):
    text = '[{\\"' * 200 + "1" * 500
    file.write_text(json.dumps({"name": text, "rows": 1, "classes": [text] * 3}))
    assert read_json(file, Content, fix=FIX).classes == [text] * 3
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(deep, list[Any], name="deep", fix=FIX)


def test_what_is_no_file_is_refused_without_waiting(tmp_path, file):
    with pytest.raises(InputError, match=r"there is no file .*content\.json; make it again"):
        read_json(file, Content, fix=FIX)
    with pytest.raises(InputError, match=r"^nothing here$"):
        read_json(file, Content, fix=FIX, missing="nothing here")
    os.mkfifo(file)
    with pytest.raises(InputError, match="not a regular file"):
        read_json(file, Content, fix=FIX)
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); make it again"):
        read_json(tmp_path, Content, fix=FIX)
    link = tmp_path / "link.json"
    link.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        read_json(link, Content, fix=FIX)


def test_a_file_that_is_too_large_is_not_read(file):
    with file.open("wb") as stream:
        stream.truncate(10**12)
    with pytest.raises(InputError, match="1000000000000 bytes, at most 67108864 are read"):
        read_json(file, Content, fix=FIX)
    file.write_text('{"name": "a", "rows": 1}')
    with pytest.raises(InputError, match="24 bytes, at most 20"):
        read_json(file, Content, fix=FIX, max_bytes=20)


def test_content_in_memory_is_checked_as_well():
    assert check_schema({"name": "a", "rows": 2}, Content, name="row 3", fix=FIX) == Content("a", 2)
    with pytest.raises(InputError, match=r"^row 3 cannot be read \(Expected int, got str at rows\); make it again$"):
        check_schema({"name": "a", "rows": "2"}, Content, name="row 3", fix=FIX)
    with pytest.raises(InputError, match="row 3 cannot be read"):
        check_schema({"name": "a", "rows": 2, "scale": 10**400}, Content, name="row 3", fix=FIX)
