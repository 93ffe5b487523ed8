from __future__ import annotations

import hashlib
import json
import os

import pytest

from ulfine_fast.cache.io.digests import BLANK, file_digest, is_sealed, sealed


def test_a_files_digest_is_its_sha256(tmp_path):
    data = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "none", "."):
        with pytest.raises(OSError, match=r"pipe|none|regular|directory"):
            file_digest(tmp_path / name)


@pytest.mark.parametrize("name", ["a", BLANK, f'"digest": "{BLANK}"', "digest"])
def test_every_changed_byte_breaks_the_seal(name):
    data = sealed(json.dumps({"name": name, "digest": BLANK, "rows": 3}, indent=2).encode())
    content = json.loads(data)
    blank = data.replace(content["digest"].encode(), BLANK.encode())
    assert content["digest"] == hashlib.sha256(blank).hexdigest()
    assert is_sealed(data)
    for position in range(len(data)):
        for flip in (1, 32, 128):
            changed = bytearray(data)
            changed[position] ^= flip
            assert not is_sealed(bytes(changed)), position
    assert not is_sealed(data[:-1])
    assert not is_sealed(data + b"\n")
    assert not is_sealed(b"")


def test_bytes_behind_the_json_are_sealed_as_well():
    head = json.dumps({"digest": BLANK}).encode()
    data = sealed(head + b'"digest": "' + BLANK.encode() + b'"\0\1', len(head))
    assert is_sealed(data, len(head))
    assert not is_sealed(data[:-1] + b"\2", len(head))


def test_a_second_field_is_refused():
    with pytest.raises(ValueError, match="there are 2"):
        sealed(json.dumps({"digest": BLANK, "config": {"digest": BLANK}}).encode())
    with pytest.raises(ValueError, match="there are 0"):
        sealed(b"{}")
