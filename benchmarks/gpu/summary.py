"""What the results come to: memory and failures of all parts, and the aims beside what was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from benchmarks.results import Row, print_table

_LIBRARIES = ("torch", "triton", "torchvision", "open_clip_torch", "timm", "numpy", "h5py", "scikit-learn", "pytest")
_IMAGENET_IMAGES = 1_280_000


def machine() -> Row:
    """Card and driver as nvidia-smi names them, versions, processor and date; the GPU is not touched."""
    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cards": _cards(),
        "python": platform.python_version(),
        "versions": versions,
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cards() -> list[Row]:
    """Name, driver and memory of each card; none where nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return []
    if done.returncode:
        return []
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in done.stdout.splitlines()]


def rows_of(results: Mapping[str, Row], **values: Any) -> Iterator[Row]:
    """Rows of all parts that have these values."""
    for result in results.values():
        for row in result["rows"]:
            if all(row.get(name) == value for name, value in values.items()):
                yield row


def memory_rows(results: Mapping[str, Row]) -> list[Row]:
    """The most memory of each part, and of each row that was measured with its own, the largest first."""
    rows = [
        {"what": name, "gpu_bytes": memory["peak_gpu_bytes"], "bytes": memory["peak_bytes"]}
        for name, result in results.items()
        if (memory := result["memory"])
    ]
    for row in rows_of(results):
        if row.get("peak_bytes"):
            what = f"{row['shape']} T {row['trials']} {row['contender']}"
            rows.append({"what": what, "gpu_bytes": row["peak_bytes"], "bytes": None})
        if row.get("megabytes"):
            rows.append(
                {"what": f"ulfine_plus {row['images']:,}", "gpu_bytes": row["megabytes"] * 2**20, "bytes": None}
            )
    return sorted(rows, key=lambda row: -(row["gpu_bytes"] or 0))


def failures(results: Mapping[str, Row]) -> list[str]:
    """All that went wrong, a line each: parts, measurements, checks, tests and what was left out."""
    lines = []
    for name, result in results.items():
        if result["status"] != "done":
            lines.append(f"{name}: {result['status']}: {(result['error'] or [''])[-1]}")
        for row in result["rows"]:
            if row.get("failed"):
                lines.append(f"{name}: {row['failed']}: {row['error'][-1]}")
            elif row.get("passed") is False:
                lines.append(f"{name}: check failed: {row['check']} {row.get('shape', '')} {row.get('error', '')}")
            elif row.get("outcome") == "failed":
                lines.append(f"{name}: {row['test']}: {(row['message'] or '').splitlines()[-1:]}")
            elif row.get("left_out"):
                lines.append(f"{name}: left out: {row['left_out']}")
    return lines


def aims(results: Mapping[str, Row]) -> list[Row]:
    """Each aim with what was measured, None where it was not, and whether it is reached."""
    s1 = {row["contender"]: row for row in rows_of(results, shape="S1", trials=256) if "contender" in row}
    fused, eager = (s1.get(name, {}).get("trial_steps_per_second") for name in ("fused", "eager"))
    sweep = next((row for row in rows_of(results, trials=256) if "microseconds_per_trial_step" in row), {})
    model = {"model": "ViT-B-16"}
    alone = [row["images_per_second"] for row in rows_of(results, stage="model alone", precision="bf16", **model)]
    whole = max(rows_of(results, stage="end to end", **model), key=lambda row: row["images_per_second"], default={})
    plus = next((row for row in rows_of(results, images=_IMAGENET_IMAGES) if "seconds" in row), {})
    tests = next((row for row in rows_of(results) if "failed" in row and "tests" in row), None)
    least = "at least"
    most = "at most"
    wanted = [
        ("S1, T 256: fused over eager", least, 500, fused / eager if fused and eager else None),
        ("S1, T 256: us a trial-step", most, 4.5, 1e6 / fused if fused else None),
        ("256 trials x 1,000 steps with metrics: us a trial-step", most, 6, sweep.get("microseconds_per_trial_step")),
        ("ViT-B-16 alone in bf16: images/s", least, 10_000, max(alone, default=None)),
        ("ViT-B-16 end to end, three views: images/s", least, 4_000, whole.get("images_per_second")),
        ("ViT-B-16 end to end: of its slowest stage", least, 0.9, whole.get("of_slowest")),
        ("ulfine_plus on 1.28 M images: s", most, 60, plus.get("seconds")),
        (
            "ulfine_plus on 1.28 M images: GB",
            most,
            40,
            plus["megabytes"] * 2**20 / 1e9 if plus.get("megabytes") else None,
        ),
        (
            "tests that need a GPU: failed or skipped",
            most,
            0,
            None if tests is None else tests["failed"] + tests["skipped"],
        ),
    ]
    return [
        {
            "aim": name,
            "wanted": f"{bound} {value:,g}",
            "measured": measured,
            "reached": None if measured is None else measured >= value if bound == least else measured <= value,
        }
        for name, bound, value, measured in wanted
    ]


def print_summary(results: Mapping[str, Row]) -> None:
    """Memory, failures and aims."""
    print("\nmemory")
    lines = [[row["what"], _gigabytes(row["gpu_bytes"]), _gigabytes(row["bytes"])] for row in memory_rows(results)]
    print_table(["part or measurement", "GB of the GPU's", "GB of main memory"], lines)
    print("\nwhat failed or was left out")
    for line in failures(results) or ["nothing"]:
        print(f"  {line}")
    print("\naims")
    answers = {None: "not measured", True: "yes", False: "no"}
    print_table(
        ["aim", "wanted", "measured", "reached"],
        [[row["aim"], row["wanted"], _number(row["measured"]), answers[row["reached"]]] for row in aims(results)],
        texts=2,
    )


def _gigabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
