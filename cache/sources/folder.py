"""Images in class folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.prompts import read_class_names
from ulfine_fast.cache.sources.image import image_suffixes, load_image
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Row, in_order

LAYOUT = "expected CLASS/image, or train/CLASS/image beside unlabeled/, val/CLASS/ and test/CLASS/"
# Names people give to splits; taken for classes they would spoil a run without a word.
_MISNAMED = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_MISNAMED |= {"unlabelled": "unlabeled"}


class FolderSource:
    """A folder with one folder per class, or with `train`, `unlabeled`, `val`, `test` folders above those.

    The class is the first folder below the root (or below the split); images nested deeper belong to it. Under
    `unlabeled` images lie at any depth. Hidden files and files that are not images by their suffix do not count.
    Without split folders every row is in "train". The classes are the union over the splits, sorted by name.

    Attributes:
        kind: "folder".
        path: the root, absolute.
        class_names: names for the text tower; the folders' names unless a file gives others.
        rows: see `Source`; a row's id is its path below the root with forward slashes.
    """

    kind = "folder"

    def __init__(self, path: Path, *, class_names_file: Path | None = None) -> None:
        """Lists the folder; no image is opened.

        Raises:
            InputError: no such folder, no images, an image outside of the class folders, a misnamed split folder.
        """
        self.path = path.absolute()
        if not os.path.isdir(self.path):
            raise InputError(f"no such folder: {path}")
        # File systems list in any order.
        found = sorted(_images(self.path))
        splits = _has_splits(self.path)
        placed = [_place(relative, splits) for relative, _ in found]
        classes = sorted({name for _, name in placed if name is not None})
        if not classes:
            raise InputError(f"no images in class folders under {path}; {LAYOUT}")
        # By table, since a search in the list for every image grows with classes times images.
        index = {name: place for place, name in enumerate(classes)} | {None: UNKNOWN}
        self.rows = in_order(
            Row(_text(relative), index[name], split, str(self.path / relative), size)
            for (relative, size), (split, name) in zip(found, placed, strict=True)
        )
        classes = [_text(name) for name in classes]
        self.class_names = classes if class_names_file is None else read_class_names(class_names_file, classes)

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return load_image(row.location)

    def describe(self) -> dict[str, Any]:
        """Kind and path, for the manifest."""
        return {"kind": self.kind, "path": str(self.path)}


class ImageFolder:
    """Images without labels, at any depth of a folder, or a single image: what `predict` reads.

    Attributes:
        kind: "pictures".
        path: the folder or the image, absolute.
        class_names: always empty.
        rows: all in the split "test" with label -1; a row's id is its path below the folder.
    """

    kind = "pictures"

    def __init__(self, path: Path) -> None:
        """Lists the folder; no image is opened.

        Raises:
            InputError: nothing there, or no images in it.
        """
        self.path = path.absolute()
        if os.path.isfile(self.path):
            found = [(self.path.name, self.path.stat().st_size)]
        elif os.path.isdir(self.path):
            found = list(_images(self.path))
        else:
            raise InputError(f"no such folder or image: {path}")
        if not found:
            raise InputError(f"no images under {path}")
        root = self.path.parent if self.path.is_file() else self.path
        self.rows = in_order(Row(_text(name), UNKNOWN, "test", str(root / name), size) for name, size in found)
        self.class_names: list[str] = []

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return load_image(row.location)

    def describe(self) -> dict[str, Any]:
        """Kind and path."""
        return {"kind": self.kind, "path": str(self.path)}


def _has_splits(root: Path) -> bool:
    """Whether every folder at the top is named like a split; refuses names that only look like one."""
    tops = {entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith(".")}
    misnamed = sorted(name for name in tops if _MISNAMED.get(name.lower()))
    if misnamed and tops & set(SPLITS):
        raise InputError(
            f"{root} holds a folder {misnamed[0]} beside {', '.join(sorted(tops & set(SPLITS)))}; "
            f"rename it to {_MISNAMED[misnamed[0].lower()]}"
        )
    return bool(tops) and tops <= set(SPLITS)


def _place(relative: str, splits: bool) -> tuple[str, str | None]:
    """Split and class of a path below the root; the class is None where images are unlabelled."""
    parts = relative.split("/")
    split = parts[0] if splits and len(parts) > 1 else "train"
    if splits and split == "unlabeled":
        return split, None
    # The class is the part after the split, and an image must lie below it.
    depth = 1 if splits else 0
    if len(parts) < depth + 2:
        raise InputError(f"the image {_text(relative)} lies in no class folder; {LAYOUT}")
    return split, parts[depth]


def _images(root: Path) -> Iterator[tuple[str, int]]:
    """Path below the root, with forward slashes, and size of every image; never enters a folder inside itself."""
    suffixes = image_suffixes()
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while stack:
        below, above = stack.pop()
        folder = root / below
        here = folder.stat()
        # Links to folders are followed, but one that leads back above itself would never end.
        if (here.st_dev, here.st_ino) in above:
            continue
        # The way down alone, not all folders seen: two links to one folder are two classes, and rightly so.
        inside = above | {(here.st_dev, here.st_ino)}
        for entry in _entries(folder):
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                stack.append((name, inside))
            elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in suffixes:
                yield name, entry.stat().st_size


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            # Links to nothing or to themselves can be neither followed nor read.
            return [entry for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)]
    except OSError as error:
        # A folder that is left out in silence would change the classes.
        raise InputError(f"the folder {folder} cannot be listed: {error.strerror}") from error


def _text(name: str) -> str:
    """A file name as UTF-8 text; bytes that are no UTF-8 become escapes, since an id is stored as UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
