"""Parts of a measurement, each in a child process with a time limit, so that no part can end another.

A part reports rows as it goes; what it has reported counts, however it ends.
"""

from __future__ import annotations

import faulthandler
import json
import math
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.results import Row

_LAST_LINES = 12
# before its limit a part writes down where it is
_NOTICE_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    """What all parts read.

    Attributes:
        device: "cuda", "cuda:N" or "cpu".
        tiny: whether sizes are those of a test of the script itself.
    """

    device: str
    tiny: bool = False


class Report:
    """What a part has measured, line by line in a file that outlives it.

    Args:
        path: the file.
        ends: when the part is ended, on the clock that all processes share.
    """

    def __init__(self, path: Path, ends: float) -> None:
        self._path = path
        self._ends = ends

    def __call__(self, text: str, **values: Any) -> None:
        """Print a line and keep its values as a row; numbers that JSON lacks become None."""
        print(f"  {text}", flush=True)
        self.keep("row", {name: _json_value(value) for name, value in values.items()})

    def keep(self, kind: str, value: Any) -> None:
        """Write one line of the file."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, value], allow_nan=False) + "\n")

    @property
    def seconds_left(self) -> float:
        """Until the limit."""
        return self._ends - time.monotonic()

    @contextmanager
    def attempt(self, what: str, **values: Any) -> Iterator[None]:
        """Report an exception inside the context as a row, and go on after it."""
        try:
            yield
        except Exception as error:
            # a traceback of many frames is kept short, the message is not
            lines = [line.rstrip() for line in traceback.format_exception(error, limit=-4)]
            self(f"{what}: FAILED: {type(error).__name__}: {str(error)[:300]}", **values, failed=what, error=lines)


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of the part.
        work: a function as "module:name", which the child process imports and calls.
        weight: its fraction of the time, in proportion to the other parts.
        argument: passed to `work`, such as the name of a shape.
    """

    name: str
    work: str
    weight: float
    argument: str | None = None


def run_parts(
    parts: Sequence[Part], settings: Settings, seconds: float, done: Callable[[dict[str, Row]], None]
) -> dict[str, Row]:
    """Run parts one after another.

    Args:
        parts: in their order.
        settings: for all of them.
        seconds: for all together; what a part leaves is divided among those after it.
        done: called with all results after each part.

    Returns:
        For each part its seconds, limit, status, rows, memory, error and warnings.
    """
    results: dict[str, Row] = {}
    ends = time.monotonic() + seconds
    for position, part in enumerate(parts):
        fraction = part.weight / sum(later.weight for later in parts[position:])
        limit = max(0.0, fraction * (ends - time.monotonic()))
        print(f"{part.name} (at most {limit:.0f} s)", flush=True)
        results[part.name] = run_part(part, settings, limit)
        _print_end(results[part.name])
        done(results)
    return results


def run_part(part: Part, settings: Settings, limit: float) -> Row:
    """Run a part in a process of its own and end it at its limit; see :func:`run_parts`."""
    # A process that was forked cannot use a GPU that its parent has touched. Without a GPU a server that has imported
    # PyTorch once saves seconds a part.
    context: Any = multiprocessing.get_context("forkserver" if settings.device == "cpu" else "spawn")
    if settings.device == "cpu":
        context.set_forkserver_preload(["torch"])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_work, args=(part, settings, Path(folder), started + limit))
        process.start()
        try:
            process.join(max(0.0, started + limit - time.monotonic()))
            overran = process.is_alive()
        finally:
            _end(process)
        kept = _read(Path(folder) / "rows")
        stderr = (Path(folder) / "stderr").read_text(errors="replace") if (Path(folder) / "stderr").exists() else ""
    lines = stderr.splitlines()
    error: list[str] | None = next((value for kind, value in kept if kind == "error"), None)
    status = "out of time" if overran else "done" if process.exitcode == 0 else "failed"
    if error is None and status != "done":
        ended = [] if overran else [f"the process ended with code {process.exitcode}"]
        error = [*lines[-_LAST_LINES:], *ended]
    return {
        "status": status,
        "seconds": time.monotonic() - started,
        "limit_seconds": limit,
        "rows": [value for kind, value in kept if kind == "row"],
        "memory": next((value for kind, value in kept if kind == "memory"), None),
        "error": error,
        "warnings": list(dict.fromkeys(line for line in lines if "Warning: " in line))[:_LAST_LINES],
    }


def _work(part: Part, settings: Settings, folder: Path, ends: float) -> None:
    """The child: everything that it starts is in its own session, and stderr goes to a file."""
    os.setsid()
    # what a part starts is started as elsewhere, not as the part was
    multiprocessing.set_start_method(None, force=True)
    stderr = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stderr, 2)
    faulthandler.enable()
    # a process that hangs cannot tell where
    report = Report(folder / "rows", ends)
    faulthandler.dump_traceback_later(max(0.1, report.seconds_left - _NOTICE_SECONDS))
    # files that a benchmark keeps for its next run are of no use after this one
    os.environ["ULFINE_FAST_HOME"] = str(folder / "home")
    try:
        work = pkgutil.resolve_name(part.work)
        work(settings, report, *([] if part.argument is None else [part.argument]))
    except BaseException as error:
        report.keep("error", traceback.format_exception(error)[-1:][0].splitlines()[-_LAST_LINES:])
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        report.keep("memory", _memory())


def _memory() -> Row:
    """Most bytes that this process took: of main memory, its largest child process counted apart, and of the GPU."""
    peaks = {
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # Linux counts in KiB
        "peak_bytes_of_a_child": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "peak_gpu_bytes": None,
    }
    torch = sys.modules.get("torch")
    # after an error the device may be lost
    with suppress(RuntimeError):
        if torch is not None and torch.cuda.is_initialized():
            peaks["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()
    return peaks


def _end(process: BaseProcess) -> None:
    """End a child and all that it has started, which are its session."""
    if process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _read(path: Path) -> list[tuple[str, Any]]:
    """The whole lines of a report."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [tuple(json.loads(line)) for line in lines]


def _print_end(result: Row) -> None:
    memory = result["memory"] or {}
    gpu = memory.get("peak_gpu_bytes")
    text = f"  {result['status']} after {result['seconds']:.1f} s"
    text += f", {memory['peak_bytes'] / 1e9:.1f} GB of memory" if memory else ""
    print(text + (f", {gpu / 1e9:.1f} GB of the GPU's" if gpu else ""))
    for line in result["error"] or []:
        print(f"    {line}")
    for line in result["warnings"]:
        print(f"    {line}")
    sys.stdout.flush()


def _json_value(value: Any) -> Any:
    """NaN and infinity are no JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
