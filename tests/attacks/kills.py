"""Kill a fit over a finished run at every write, one after the other, and say what each kill left.

    python -m tests.attacks.kills FOLDER SEEDS save|fit

FOLDER holds `cache`, a fit of it in `before`, and in `after.json` the options of the refit. A child of this process,
which has no threads that a fork would lose, saves the refit's runs, or runs the whole command, and ends at its n-th
operation:
before a file is opened for writing, after it was made, in the middle of each write, before and after each flush,
rename, removal, and new folder. Prints one JSON object.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import json
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import safetensors.torch
import torch
from typer.testing import CliRunner

from ulfine_fast import InputError, Run
from ulfine_fast.cli.main import app
from ulfine_fast.runs.files import load_runs
from ulfine_fast.runs.folder import locked
from ulfine_fast.runs.seeds import refuse_other_content, save_runs

KILLED = 99
HIDDEN = (".checkpoint", ".lock", ".saving")


class _Written:
    """A file that is written to in halves."""

    def __init__(self, file: Any, point: Callable[[], None]) -> None:
        self._file = file
        self._point = point

    def write(self, data: Any) -> int:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._point()
        self._file.write(data[len(data) // 2 :])
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def die_at(number: int, below: Path) -> None:
    """End this process at its n-th operation on a file below a folder."""
    passed = 0

    def point() -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            os._exit(KILLED)

    def concerns(path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(str(below))

    def around(module: Any, name: str) -> None:
        call = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            # a name within an open folder, or an open file, is of what is being written
            counts = concerns(arguments[0]) or options.get("dir_fd") is not None or isinstance(arguments[0], int)
            if counts:
                point()
            result = call(*arguments, **options)
            if counts:
                point()
            return result

        setattr(module, name, counted)

    def around_writer(module: Any, name: str) -> None:
        """A library that writes a file itself: not yet, half of it, all of it."""
        call = getattr(module, name)

        def counted(content: Any, path: Any, *arguments: Any) -> None:
            point()
            call(content, path, *arguments)
            data = Path(path).read_bytes()
            os.truncate(path, len(data) // 2)
            point()
            with real_open(path, "wb") as file:
                file.write(data)
            point()

        setattr(module, name, counted)

    real_open = builtins.open

    def counted_open(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not concerns(path) or not set(mode) & set("wax+"):
            return real_open(path, mode, *arguments, **options)
        point()
        file = real_open(path, mode, *arguments, **options)
        point()
        return _Written(file, point)

    builtins.open = io.open = counted_open  # type: ignore[assignment]
    for name in ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir"):
        around(os, name)
    around_writer(safetensors.torch, "save_file")
    around_writer(pq, "write_table")


def fit(folder: Path, out: Path) -> None:
    """The whole command."""
    options = json.loads((folder / "after.json").read_text())
    done = CliRunner().invoke(app, ["fit", str(folder / "cache"), "--out", str(out), *options])
    if done.exit_code != 0:
        raise RuntimeError(done.output)


def saver(folder: Path, seeds: int) -> Callable[[Path], None]:
    """The end of the command: its runs are fitted once, in this process."""
    fit(folder, folder / "fitted")
    folders = [folder / "fitted"] if seeds == 1 else [folder / "fitted" / f"seed-{seed}" for seed in range(seeds)]
    runs = [Run.load(run) for run in folders]

    def save(out: Path) -> None:
        refuse_other_content(out, list(range(seeds)))
        with locked(out):
            save_runs(runs, out)

    return save


def in_child(action: Callable[[], None]) -> int:
    """Exit code of an action in a child of this process."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(folder: Path) -> dict[str, bytes]:
    """Files by path, those of runs in the making left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not set(HIDDEN) & set(path.relative_to(folder).parts)
    }


def state(out: Path, seeds: int) -> tuple[str, set[str]]:
    """What a report says of the folder, and the methods of all runs that any command takes for one."""
    folders = [out] if seeds == 1 else [out / f"seed-{seed}" for seed in range(seeds)]
    methods = set()
    for folder in folders:
        with contextlib.suppress(InputError):
            methods.add(Run.load(folder).config.method)
    try:
        reported = load_runs([out])
    except InputError:
        return "refused", methods
    return "old" if {run.method for run in reported} == {"linear_probe"} else "new", methods


def main(folder: Path, seeds: int, what: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    replace = functools.partial(fit, folder) if what == "fit" else saver(folder, seeds)
    out, number = folder / "out", 0
    outcomes: Counter[str] = Counter()
    mixed, unfinished = [], []
    before = tree(folder / "before")
    while True:
        number += 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder / "before", out)

        def replaced_until(point: int = number) -> None:
            die_at(point, out)
            replace(out)

        code = in_child(replaced_until)
        if code == 0:
            break
        if code != KILLED:
            raise RuntimeError(f"the fit ended with {code} at point {number}")

        outcome, methods = state(out, seeds)
        outcomes[outcome] += 1
        same_as_before = tree(out) == before
        summary = out / "summary.json"
        summary_of = {json.loads(summary.read_bytes())["method"]} if summary.exists() else set()
        if len(methods | (summary_of if methods else set())) > 1 or (outcome == "old" and not same_as_before):
            mixed.append(number)
        # the same command finishes it
        if number % 7 == 0:
            code = in_child(lambda: replace(out))
            if code != 0 or state(out, seeds) != ("new", {"lightweight"}):
                unfinished.append(number)
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.name in HIDDEN)
    return {"points": number - 1, **outcomes, "mixed": mixed, "unfinished": unfinished, "left": left}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3])))
