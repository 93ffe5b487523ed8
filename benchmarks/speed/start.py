"""From the shell to a fitted run: `ulfine-fast fit` of a linear probe beside `import torch`, each in a new process.

    python -m benchmarks.speed.start --rounds 5

Both are run in turn, and each counts with its fastest round, since a busy machine only adds to it. The demo's cache is
small, so most of the time is that of starting.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.data import demo
from benchmarks.options import JsonOption
from benchmarks.results import Row, print_table, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cli.main import guarded

_MAIN = "from ulfine_fast.cli.main import main; main()"


def measure(cache: Path, rounds: int) -> list[Row]:
    """Seconds of both, and of the fit over the import.

    Args:
        cache: folder of a cache.
        rounds: runs of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import torch": ["-c", "import torch"],
            "fit": ["-c", _MAIN, "fit", str(cache), "--method", "linear_probe", "--out", str(Path(folder) / "run")],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                seconds[name].append(_seconds([sys.executable, *command]))
    least = {name: min(of_rounds) for name, of_rounds in seconds.items()}
    return [
        {"contender": name, "seconds": value, "rounds": seconds[name], "ratio": value / least["import torch"]}
        for name, value in least.items()
    ]


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command[3:5])} failed: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - started


def demo_cache() -> Path:
    """The folder of the demo's cache, extracted where it is missing."""
    path = demo().path
    assert path is not None
    return Path(path)


def start(
    rounds: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 5,
    cache: Annotated[Path | None, typer.Option(help="Another cache than the demo's.")] = None,
    as_json: JsonOption = None,
) -> None:
    """Time a fit from the shell beside the import of PyTorch."""
    rows = measure(demo_cache() if cache is None else cache, rounds)
    write_rows(as_json, rows)
    lines = [[row["contender"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}"] for row in rows]
    print_table(["process", "seconds", "over import torch"], lines)


if __name__ == "__main__":
    typer.run(guarded(start))
