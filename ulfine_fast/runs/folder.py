"""Run folders as sets of files: written by one process at a time, replaced whole, and never half old and half new."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import flush_folder

CONFIG, SUMMARY, CALIBRATION = "config.json", "summary.json", "calibration.parquet"
FILES = (
    CONFIG,
    SUMMARY,
    CALIBRATION,
    "heads.safetensors",
    "history.csv",
    "metrics.json",
    "predictions.parquet",
    "split.json",
)
"""Every file of a run folder; a save replaces these and touches no other."""

CHECKPOINT = ".checkpoint"
"""Folder inside a run's that an interrupted fit continues from."""

LOCK = ".lock"
STAGING = ".saving"
"""Folder inside a run's in which the files of a save are completed before any file of the earlier run goes."""

HIDDEN = (CHECKPOINT, LOCK, STAGING)

# without these two no command takes a folder for a run, or runs of several seeds for one fit
_FIRST_TO_GO = (CONFIG, SUMMARY)


@contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Hold run folders for writing; missing ones are made, and removed again where they stay empty.

    The system releases the locks when the process ends, however that happens. A thread may hold a folder several times.

    Raises:
        InputError: another process or thread writes there, or the folder cannot be made.
    """
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_locked(folder))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / LOCK, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another process writes to {folder}; wait for it or end it, or name another folder with --out"
        ) from error
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            # a process that opened this file and gets its lock later sees that it is gone, and opens another
            with suppress(OSError):
                (folder / LOCK).unlink()
        lock.release()
        if made and not lock.is_locked:
            with suppress(OSError):
                folder.rmdir()


def write_error(folder: Path, error: OSError) -> InputError:
    """The sentence for a write that the system refused."""
    return InputError(f"cannot write the run to {folder}: {error.strerror or error}")


def staged(folder: Path) -> Path:
    """A new, empty folder for the files of a save; the lock of `folder` is held.

    Raises:
        OSError: it cannot be made.
    """
    staging = folder / STAGING
    # what a killed save left
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def discard_staged(folders: Sequence[Path]) -> None:
    """Remove what was staged, and keep the runs there as they are."""
    for folder in folders:
        shutil.rmtree(folder / STAGING, ignore_errors=True)


def swap_in(folders: Sequence[Path], emptied: Sequence[Path] = ()) -> None:
    """Replace the runs in several folders by the staged files there, all of one fit.

    First the files go that make the folders runs, so that no moment has old and new files, or old and new seeds,
    of which a command would take the whole for a run; the new ones of these files come last. A save that is killed
    leaves the old runs, the new runs, or folders that are refused as unfinished and that the same fit writes again.

    Args:
        folders: each with a complete staging folder.
        emptied: folders whose runs go without new ones.

    Raises:
        OSError: the file system refused.
    """
    for folder in (*folders, *emptied):
        for name in _FIRST_TO_GO:
            (folder / name).unlink(missing_ok=True)
        flush_folder(folder)
    for folder in emptied:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds something else
            folder.rmdir()
    for folder in folders:
        staging = folder / STAGING
        names = {path.name for path in staging.iterdir()}
        if CONFIG in names:
            # a file that the earlier run had and this one has not
            for name in sorted(set(FILES) - names):
                (folder / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: (name in _FIRST_TO_GO, name)):
            if name in _FIRST_TO_GO:
                flush_folder(folder)
            os.replace(staging / name, folder / name)
        flush_folder(folder)
        staging.rmdir()


def flush_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
