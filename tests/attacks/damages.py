"""Seeded damages of a file of a folder: what a disk, a copy that broke off, another program or an attacker does."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 10**12, 2**63, 10**30, 0.5, 1.5, -0.0, 1e308, 1e-308),
    *("", "x", "\0", "\x1b[31m", "../../x", "http://127.0.0.1:9/x", "nan", "0" * 64),
    *([], [[]], {}, ["x"], [0], [None], {"x": 1}, [0] * 1000, ["x"] * 1000),
]
"""Values of every type, for any place in a JSON file."""

RAW_VALUES = [
    *(b"1" + b"0" * 400, b"1e400", b"NaN", b"-Infinity", b'"\\ud800"', b'"\xff"', b"", b"\xef\xbb\xbf1"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 60 + b"]" * 60),
]
"""Values that are no JSON, or only just."""

CELLS = ["", "x", "nan", "inf", "-1", "1e400", "9" * 500, "\xff", '"', "\0", "1,2", "=1+1", " ", "0x10", "1_0"]

Damage = Callable[[Path, random.Random, Path], None]
"""Takes the file, the source of randomness and the same file of another folder."""


def truncate(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def flip(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)


def zero(path: Path, rng: random.Random, other: Path) -> None:
    data, length = path.read_bytes(), rng.choice((1, 4, 8, 16, 64, 512))
    start = rng.randrange(len(data)) // 8 * 8
    path.write_bytes((data[:start] + bytes(length) + data[start + length :])[: len(data)])


def insert(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    start = rng.randrange(len(data) + 1)
    path.write_bytes(data[:start] + rng.randbytes(rng.choice((1, 8, 100))) + data[start:])


def repeat(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def empty(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path, rng: random.Random, other: Path) -> None:
    os.truncate(path, 1 << rng.choice((20, 36, 43)))  # a file with a hole, which takes no room


def delete(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def swap(path: Path, rng: random.Random, other: Path) -> None:
    shutil.copyfile(other, path)


def pipe(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()
    path.symlink_to(rng.choice([other, path, Path("/dev/zero"), Path("/dev/tty"), path.with_name("nowhere")]))


DAMAGES: list[Damage] = [truncate, flip, flip, zero, insert, repeat, empty, delete, swap, pipe, folder, link]
"""For a file of any kind; `grow` only where no digest is computed of what is read."""


def change_json(path: Path, rng: random.Random, other: Path) -> None:
    """One value anywhere gets another value, goes, or is moved."""
    content = json.loads(path.read_bytes())
    positions: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            positions.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(content)
    node, key = rng.choice(positions)
    marker, change = "the value that is replaced", rng.randrange(8)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node[key], list):
        node[key] = node[key][::-1] + node[key][:1]
    elif change == 2:
        other_node, other_key = rng.choice(positions)
        node[key] = json.loads(json.dumps(other_node[other_key]))
    elif change < 5:
        node[key] = marker
    else:
        node[key] = rng.choice(VALUES)
    data = json.dumps(content, indent=2, sort_keys=True).encode()
    path.write_bytes(data.replace(json.dumps(marker).encode(), rng.choice(RAW_VALUES)))


def change_csv(path: Path, rng: random.Random, other: Path) -> None:
    """One cell gets another text, or a row goes, comes twice or loses its end."""
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    row = rng.randrange(len(rows))
    change = rng.randrange(6)
    if change == 0:
        del rows[row]
    elif change == 1:
        rows.insert(row, rows[row])
    elif change == 2:
        rows[row] = rows[row][: rng.randrange(len(rows[row]))]
    else:
        rows[row][rng.randrange(len(rows[row]))] = rng.choice(CELLS)
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    path.write_bytes(buffer.getvalue().encode("latin-1"))


def of_kind(path: Path) -> list[Damage]:
    """Damages for a file of this name, those of its own kind as often as all others together."""
    own: dict[str, list[Damage]] = {".json": [change_json], ".csv": [change_csv]}
    return [*DAMAGES, *own.get(path.suffix, []) * len(DAMAGES)]


def write_files(target: Path, files: dict[str, bytes]) -> None:
    """Make a folder of these files, which replace what is there."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name, data in files.items():
        (target / name).write_bytes(data)


def is_sentence(text: str) -> bool:
    """Whether a text is one line, and no traceback."""
    return bool(text.strip()) and "\n" not in text.strip() and "Traceback" not in text
