"""Images in class folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.tables import label_key, whole_number
from ulfine_fast.cache.sources.image import image_suffixes, load_image
from ulfine_fast.cache.sources.labels import name_classes
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Row, sorted_rows
from ulfine_fast.cache.sources.streams import is_hidden, split_named

LAYOUT = "expected CLASS/image, or train/CLASS/image beside unlabeled/, val/CLASS/ and test/CLASS/"
# Archives and tables of images, which are sources of their own.
_ARCHIVES = (".tar", ".tgz", ".gz", ".zip", ".parquet", ".7z", ".rar")
# Images that PIL, or this build of it, may be unable to decode.
_UNDECODED = {
    **dict.fromkeys((".heic", ".heif", ".hif"), 'pip install "ulfine-fast[heif]" reads them'),
    **dict.fromkeys((".avif", ".avifs"), "a newer Pillow reads them"),
    **dict.fromkeys((".jxl", ".svg", ".eps", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"), ""),
}


class FolderSource:
    """A folder with one folder per class, or with `train`, `unlabeled`, `val`, `test` folders above those.

    The class is the first folder below the root (or below the split); images nested deeper belong to it. Under
    `unlabeled` images may be at any depth. Hidden files, folders without images and files without an image's suffix do
    not count. Without split folders every row is in "train". The classes are the union over the splits, sorted by name.

    Attributes:
        kind: "folder".
        path: the root, absolute.
        class_names: names for the text tower; the folders' names unless a file gives others.
        rows: see `Source`; a row's id is its path below the root with forward slashes.
        notes: see `Source`.
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
        passed_over: list[str] = []
        images = sorted(_images(self.path, passed_over))
        tops = {relative.partition("/")[0] for relative, _ in images if "/" in relative}
        deep = {relative.partition("/")[0] for relative, _ in images if relative.count("/") > 1}
        self.notes: list[str] = []
        has_splits = _has_splits(self.path, tops, deep, self.notes)
        split_and_class = [_split_and_class(relative, has_splits) for relative, _ in images]

        # Classes; one name in two forms of Unicode is one class
        folders = sorted({name for _, name in split_and_class if name is not None})
        if not folders:
            raise InputError(f"no images in class folders under {path}{_in_brackets(passed_over)}; {LAYOUT}")
        if class_names_file is not None and all(whole_number(name) is not None for name in folders):
            # As text 10 would come before 9.
            folders.sort(key=int)
        classes, indices = name_classes(folders, class_names_file)
        self.class_names = classes.names
        self.notes += [classes.note] if classes.note else []
        self.notes += passed_over_notes(passed_over)
        shown = {entry.name for entry in _entries(self.path) if entry.is_dir() and not is_hidden(entry.name)}
        if shown - tops:
            self.notes.append(f"folders without images are passed over: {_first(sorted(shown - tops))}")

        self.rows = sorted_rows(
            Row(_as_utf8(relative), UNKNOWN if name is None else indices[name], split, str(self.path / relative), size)
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
        notes: see `Source`.
    """

    kind = "pictures"

    def __init__(self, path: Path) -> None:
        """Lists the folder; no image is opened.

        Raises:
            InputError: no such folder or image, or no images in the folder.
        """
        self.path = root = path.absolute()
        passed_over: list[str] = []
        if os.path.isfile(self.path):
            root = self.path.parent
            images = [(self.path.name, self.path.stat().st_size)]
        elif os.path.isdir(self.path):
            images = list(_images(self.path, passed_over))
        else:
            raise InputError(f"no such folder or image: {path}")
        self.notes = passed_over_notes(passed_over)
        if not images:
            raise InputError(f"no images under {path}{_in_brackets(passed_over)}")
        self.rows = sorted_rows(Row(_as_utf8(name), UNKNOWN, "test", str(root / name), size) for name, size in images)
        self.class_names: list[str] = []

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return load_image(row.location)

    def describe(self) -> dict[str, Any]:
        """Kind and path."""
        return {"kind": self.kind, "path": str(self.path)}


def holds_labelled_images(root: Path) -> bool:
    """Whether a folder has an image in a class folder, as `FolderSource` takes it."""
    for relative, _ in _images(root):
        parts = relative.split("/")
        if len(parts) > 1 + (parts[0] in SPLITS):
            return True
    return False


def _has_splits(root: Path, folders: set[str], deep: set[str], notes: list[str]) -> bool:
    """Whether the folders at the top are splits; refuses names that only look like ones.

    Args:
        root: the folder, for messages.
        folders: at the top, that hold images.
        deep: those of them that hold images in folders.
        notes: gets a line where a class is called like a split.
    """
    meanings = {name: split for name in sorted(folders) if (split := split_named(name)) is not None}
    classes = sorted(folders - set(meanings))
    right = sorted(folders & set(SPLITS))
    for name, split in meanings.items():
        if name != split and right:
            raise InputError(f"{root} holds a folder {name} beside {', '.join(right)}; rename it to {split}")
    if meanings and classes and not deep & set(meanings):
        names = " and ".join(meanings)
        notes.append(f"{names} beside {_first(classes)}: taken as a class, since there is no class folder in it")
        return False
    if meanings and classes:
        raise InputError(
            f"{root} mixes splits ({', '.join(meanings)}) with other folders of images ({_first(classes)}); put class "
            "folders below train/, and remove what is none"
        )
    for name, split in meanings.items():
        if name != split:
            raise InputError(f"{root} holds {', '.join(meanings)}, which look like splits; rename {name} to {split}")
    return bool(meanings)


def passed_over_notes(names: Sequence[str]) -> list[str]:
    """Notes on archives and images that were passed over, a line for each suffix."""
    by_suffix: dict[str, list[str]] = {}
    for name in sorted(names):
        by_suffix.setdefault(os.path.splitext(name)[1].lower(), []).append(name)
    notes = []
    for suffix, files in sorted(by_suffix.items()):
        fix = f"; {_UNDECODED[suffix]}" if _UNDECODED.get(suffix) else ""
        count = f"{len(files)} {suffix} file{'s' * (len(files) > 1)}"
        notes.append(f"{count} passed over beside the images: {_first(files)}{fix}")
    return notes


def _in_brackets(passed_over: Sequence[str]) -> str:
    """The notes on what was passed over, for a message; empty where nothing was."""
    notes = passed_over_notes(passed_over)
    return f" ({'; '.join(notes)})" if notes else ""


def _first(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(map(_as_utf8, names[:most])) + (", ..." if len(names) > most else "")


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
    return split, label_key(_as_utf8(parts[depth]))


def _images(root: Path, passed_over: list[str] | None = None) -> Iterator[tuple[str, int]]:
    """Path below the root, with forward slashes, and size of every image; never enters a folder inside itself.

    Args:
        root: the folder.
        passed_over: gets the paths of archives and of images that cannot be decoded.
    """
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
            if is_hidden(entry.name):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                # Only the ancestors, not all folders seen: two links to one folder are two classes.
                stack.append((name, ancestors | {identity}))
            elif entry.is_file() and suffix in suffixes:
                yield name, entry.stat().st_size
            elif passed_over is not None and (suffix in _ARCHIVES or suffix in _UNDECODED):
                passed_over.append(name)


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
