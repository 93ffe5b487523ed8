"""The images of `ulfine-fast demo`: a sample of Fashion-MNIST, 250 training and 50 test images a class."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from ulfine_fast.cache.io.digests import file_digest

ARCHIVE = Path(__file__).with_name("fashion-mnist-sample.zip")
_MARKER = ".unpacked"


def unpack_images(folder: Path) -> Path:
    """Unpack the sample as `train/CLASS/00001.png` and `test/CLASS/00001.png`; do nothing if it is there already.

    The images are unpacked beside `folder` and renamed in one step, so that a folder of that name is always complete,
    however often and by how many processes this is called.

    Args:
        folder: gets the `train` and `test` folders; created with its parents.

    Returns:
        `folder`.

    Raises:
        FileExistsError: `folder` has other content.
        OSError: it cannot be written.
    """
    digest = file_digest(ARCHIVE)
    if _is_unpacked(folder, digest):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with zipfile.ZipFile(ARCHIVE) as archive:
            archive.extractall(temporary)
        # written last, with the archive's digest, so that a later version of the sample is recognised
        (temporary / _MARKER).write_text(digest + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        _move_to(temporary, folder, digest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_unpacked(folder: Path, digest: str) -> bool:
    try:
        return (folder / _MARKER).read_text(encoding="utf-8").strip() == digest
    except OSError:
        return False


def _move_to(temporary: Path, folder: Path, digest: str) -> None:
    """Rename to `folder`, which may be missing or empty; another process that was faster wins."""
    if (folder / _MARKER).is_file() and not _is_unpacked(folder, digest):
        shutil.rmtree(folder)  # another version of the sample
    try:
        os.replace(temporary, folder)
    except OSError as error:
        # another process was faster
        if _is_unpacked(folder, digest):
            return
        if folder.exists():
            raise FileExistsError(f"{folder} holds something else than the demo's images") from error
        raise
