"""SHA-256 of files, and of a file within itself: a header that names its own digest cannot be changed unseen."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ulfine_fast.cache.io.files import opened_regular_file

BLANK = "0" * 64
"""What the field "digest" of a JSON object holds before it is sealed."""

# quotes within a JSON text are escaped, so that only a key of an object matches
_FIELD = re.compile(rb'"digest": ?"([0-9a-f]{64})"')
_CHUNK = 1 << 20
_MAX_HEADER = 256 << 20


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a regular file.

    Raises:
        OSError: no such file, or not a regular one.
    """
    digest = hashlib.sha256()
    with opened_regular_file(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sealed(data: bytes, end: int | None = None) -> bytes:
    """The same bytes with their digest in the field "digest" of the JSON in them.

    Args:
        data: with one field "digest" that holds `BLANK`.
        end: of the JSON; None where all of `data` is JSON.
    """
    start, stop, _ = _only_field(data, end)
    return data[:start] + _blank_digest(data, start, stop).encode() + data[stop:]


def is_sealed(data: bytes, end: int | None = None) -> bool:
    """Whether bytes that :func:`sealed` returned are unchanged; False too where there is no such field.

    Args:
        data: the whole file.
        end: of the JSON in it, as it was for `sealed`.
    """
    try:
        start, stop, digest = _only_field(data, end)
    except ValueError:
        return False
    return _blank_digest(data, start, stop) == digest


def safetensors_header_end(data: bytes) -> int:
    """Where the JSON at the beginning of a safetensors file ends.

    Raises:
        ValueError: the file is cut.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 8 < end <= min(len(data), _MAX_HEADER):
        raise ValueError("its header is cut")
    return end


def _only_field(data: bytes, end: int | None) -> tuple[int, int, str]:
    matches = list(_FIELD.finditer(data, 0, len(data) if end is None else end))
    if len(matches) != 1:
        raise ValueError(f"one field 'digest' is needed, there are {len(matches)}")
    start, stop = matches[0].span(1)
    return start, stop, matches[0][1].decode()


def _blank_digest(data: bytes, start: int, stop: int) -> str:
    """The digest of the bytes with `BLANK` from `start` to `stop`."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:start])
    digest.update(BLANK.encode())
    digest.update(view[stop:])
    return digest.hexdigest()
