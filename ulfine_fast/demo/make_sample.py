"""Make `fashion-mnist-sample.zip` from the whole data set: `python -m ulfine_fast.demo.make_sample [IDX_FOLDER]`.

Fashion-MNIST: Xiao, Rasul and Vollgraf, 2017, Expat licence; Debian's package `dataset-fashion-mnist` installs it.
"""

from __future__ import annotations

import gzip
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ulfine_fast.demo import ARCHIVE

CLASS_FOLDERS = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle_boot",
)
PER_CLASS = {"train": 250, "test": 50}
_IDX_NAMES = {"train": "train", "test": "t10k"}
_DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_EARLIEST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # fixed, so that the same images give the same bytes


def make_sample(source: Path = _DEFAULT_FOLDER, target: Path = ARCHIVE) -> int:
    """Write the archive: the first images of every class in the order of the data set, sorted by name.

    Args:
        source: folder with the four IDX files, gzipped.
        target: the archive to write.

    Returns:
        Its size in bytes; the same images and zlib give the same bytes.
    """
    entries = {name: data for split in PER_CLASS for name, data in _images(source, split)}
    with zipfile.ZipFile(target, "w") as archive:
        for name in sorted(entries):
            entry = zipfile.ZipInfo(name, date_time=_EARLIEST_ZIP_DATE)
            entry.external_attr = 0o644 << 16
            # PNG is compressed already: compressing again saves a few bytes and slows down every unpacking
            archive.writestr(entry, entries[name], compress_type=zipfile.ZIP_STORED)
    return target.stat().st_size


def _images(source: Path, split: str) -> list[tuple[str, bytes]]:
    """Archive names and PNG bytes of one split's sample."""
    prefix = source / _IDX_NAMES[split]
    pixels = _idx(Path(f"{prefix}-images-idx3-ubyte.gz"), header=16).reshape(-1, 28, 28)  # (n, 28, 28)
    labels = _idx(Path(f"{prefix}-labels-idx1-ubyte.gz"), header=8)  # (n,)
    entries = []
    for label, name in enumerate(CLASS_FOLDERS):
        rows = np.flatnonzero(labels == label)[: PER_CLASS[split]]
        for number, row in enumerate(rows, start=1):
            data = io.BytesIO()
            Image.fromarray(pixels[row]).save(data, format="PNG", optimize=True)
            entries.append((f"{split}/{name}/{number:05d}.png", data.getvalue()))
    return entries


def _idx(path: Path, *, header: int) -> np.ndarray:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), dtype=np.uint8, offset=header)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else _DEFAULT_FOLDER
    print(f"{ARCHIVE}: {make_sample(folder)} bytes")
