"""Kills a small sweep at every write, lets it go on, and compares what comes out.

Run in a process of its own, which forks one for every sweep: `python -m tests.attacks.sweep_kills FOLDER STEP OFFSET`
kills at writes OFFSET, OFFSET + STEP, ... and prints as JSON how many writes there are, how many kills, and which
sweeps did not go on as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tests.conftest import make_clusters
from tests.search.conftest import SPACE
from ulfine_fast import Run, sweep

# the second batch learns from the first; some trials are pruned on the way
OPTIONS: dict[str, Any] = {
    "trials": 8,
    "batch": 4,
    "sampler": "cmaes",
    "pruning": "halving",
    "refit": 1,
    "refit_seeds": 2,
    "progress": False,
}
_RENAMES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class Writes:
    """Counts the writes of this process below a folder, in files and in databases, and dies before one of them."""

    def __init__(self, folder: Path, fatal: int | None = None) -> None:
        self.count = 0
        self._folder, self._fatal = str(folder), fatal
        sys.addaudithook(self._audited)
        event.listen(Engine, "before_cursor_execute", self._executed)
        event.listen(Engine, "commit", lambda _connection: self._write())

    def _write(self) -> None:
        if self.count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _audited(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            written = bool(flags & (os.O_WRONLY | os.O_RDWR)) and str(path).startswith(self._folder)
        else:
            written = name in _RENAMES and str(arguments[0]).startswith(self._folder)
        if written:
            self._write()

    def _executed(self, _connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if not statement.lstrip().upper().startswith(("SELECT", "PRAGMA")):
            self._write()


def outcome(folder: Path) -> dict[str, Any]:
    """Run the sweep, or what is left of it; all that it says and leaves, but for times."""
    result = sweep(make_clusters(noise=3.0), {**SPACE, "steps": 9, "eval_every": 3}, out=folder, **OPTIONS)
    rows = pq.read_table(folder / "results.parquet").drop(["seconds"]).to_pylist()
    runs = [Run.load(folder / "best-1" / f"seed-{seed}") for seed in (1, 2)]
    return {
        "trials": [(trial.params, trial.state.name, trial.values) for trial in result.study.trials],
        "leaderboard": [trial.to_dict() for trial in result.leaderboard],
        "best": [{**refit, "test": {**refit["test"], "seconds": None}} for refit in result.best],
        "test_reads": json.loads((folder / "sweep.json").read_text())["test_reads"],
        "rows": rows,
        "files": {name: (folder / name).read_text() for name in ("leaderboard.csv", "importance.json", "best-1.toml")},
        "runs": [(run.test_probabilities.tolist(), run.config.to_dict()) for run in runs],
        "left over": sorted(path.name for path in folder.rglob("*") if path.suffix in (".tmp", ".checkpoint")),
    }


def forked(work: Callable[[], Any], answer: Path) -> Any:
    """What `work` returns in a process of its own; None where it was killed, a traceback where it failed."""
    answer.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            answer.write_text(json.dumps(work()))
        except BaseException:
            answer.write_text(json.dumps(traceback.format_exc()))
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return None if os.WIFSIGNALED(status) else json.loads(answer.read_text())


def main(root: Path, step: int, offset: int) -> dict[str, Any]:
    """Kill at every `step`-th write from `offset` on."""
    # a forked process has one thread, and sums of the same number of parts are the same
    torch.set_num_threads(1)
    answer, folder = root / "answer.json", root / "sweep"

    def counted() -> list[Any]:
        writes = Writes(folder)
        return [outcome(folder), writes.count]

    def killed(fatal: int) -> None:
        Writes(folder, fatal)
        outcome(folder)

    whole, count = forked(counted, answer)
    wrong, kills = [], 0
    for fatal in range(offset, count, step):
        shutil.rmtree(folder)
        if forked(lambda fatal=fatal: killed(fatal), answer) is not None:
            wrong.append([fatal, "was not killed"])
            continue
        kills += 1
        resumed = forked(lambda: outcome(folder), answer)
        if resumed != whole:
            different = resumed if isinstance(resumed, str) else [k for k in whole if resumed[k] != whole[k]]
            wrong.append([fatal, different])
    return {"writes": count, "kills": kills, "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
