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
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Row, sorted_rows

LAYOUT = "expected CLASS/image, or train/CLASS/image beside unlabeled/, val/CLASS/ and test/CLASS/"
# Other names of splits; taken for classes they would spoil a run without a warning.
_MISNAMED_SPLITS = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
    "unlabelled": "unlabeled",
}


class FolderSource:
    """A folder with one folder per class, or with `train`, `unlabeled`, `val`, `test` folders above those.

    The class is the first folder below the root (or below the split); images nested deeper belong to it. Under
    `unlabeled` images may be at any depth. Hidden files and files without an image's suffix do not count. Without split
    folders every row is in "train". The classes are the union over the splits, sorted by name.

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

        # Images, sorted because file systems list in any order
        images = sorted(_images(self.path))
        has_splits = _has_splits(self.path)
        split_and_class = [_split_and_class(relative, has_splits) for relative, _ in images]

        # Classes
        folders = sorted({name for _, name in split_and_class if name is not None})
        if not folders:
            raise InputError(f"no images in class folders under {path}; {LAYOUT}")
        indices: dict[str | None, int] = {name: index for index, name in enumerate(folders)}
        indices[None] = UNKNOWN
        self.class_names = [_as_utf8(name) for name in folders]
        if class_names_file is not None:
            self.class_names = read_class_names(class_names_file, self.class_names)

        self.rows = sorted_rows(
            Row(_as_utf8(relative), indices[name], split, str(self.path / relative), size)
            for (relative, size), (split, name) in zip(images, split_and_class, strict=True)
        )

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
            InputError: no such folder or image, or no images in the folder.
        """
        self.path = root = path.absolute()
        if os.path.isfile(self.path):
            root = self.path.parent
            images = [(self.path.name, self.path.stat().st_size)]
        elif os.path.isdir(self.path):
            images = list(_images(self.path))
        else:
            raise InputError(f"no such folder or image: {path}")
        if not images:
            raise InputError(f"no images under {path}")
        self.rows = sorted_rows(Row(_as_utf8(name), UNKNOWN, "test", str(root / name), size) for name, size in images)
        self.class_names: list[str] = []

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return load_image(row.location)

    def describe(self) -> dict[str, Any]:
        """Kind and path."""
        return {"kind": self.kind, "path": str(self.path)}


def _has_splits(root: Path) -> bool:
    """Whether every folder at the top is named like a split; refuses names that only look like one."""
    folders = {entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith(".")}
    misnamed = sorted(name for name in folders if name.lower() in _MISNAMED_SPLITS)
    if misnamed and folders & set(SPLITS):
        raise InputError(
            f"{root} holds a folder {misnamed[0]} beside {', '.join(sorted(folders & set(SPLITS)))}; "
            f"rename it to {_MISNAMED_SPLITS[misnamed[0].lower()]}"
        )
    return bool(folders) and folders <= set(SPLITS)


def _split_and_class(relative: str, has_splits: bool) -> tuple[str, str | None]:
    """Split and class of a path below the root; the class is None where images are unlabelled."""
    parts = relative.split("/")
    split = parts[0] if has_splits and len(parts) > 1 else "train"
    if has_splits and split == "unlabeled":
        return split, None
    # The class is the folder after the split, and an image must be below it.
    depth = 1 if has_splits else 0
    if len(parts) < depth + 2:
        raise InputError(f"the image {_as_utf8(relative)} is in no class folder; {LAYOUT}")
    return split, parts[depth]


def _images(root: Path) -> Iterator[tuple[str, int]]:
    """Path below the root, with forward slashes, and size of every image; never enters a folder inside itself."""
    suffixes = image_suffixes()
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while stack:
        below, ancestors = stack.pop()
        folder = root / below
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        # Links to folders are followed, but one that leads back above itself would never end.
        if identity in ancestors:
            continue
        for entry in _entries(folder):
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                # Only the ancestors, not all folders seen: two links to one folder are two classes.
                stack.append((name, ancestors | {identity}))
            elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in suffixes:
                yield name, entry.stat().st_size


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, without links to nothing or to themselves, which can be neither followed nor read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)]
    except OSError as error:
        # A folder that is left out in silence would change the classes.
        raise InputError(f"the folder {folder} cannot be listed: {error.strerror}") from error


def _as_utf8(name: str) -> str:
    """A file name as UTF-8 text; bytes that are no UTF-8 become escapes, since an id is stored as UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
