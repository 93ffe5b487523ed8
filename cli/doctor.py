"""`ulfine-fast doctor`: what this machine offers, and what is missing for what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ulfine_fast.cache.io.terminal import printable

_LISTED = 10  # caches and runs that are printed; --json has all


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine offers and what it lacks: versions, GPU, kernels, extras, disk, caches, the model hub.

    Exit code 0 where everything that is required is there, else 1.
    """
    from ulfine_fast._version import __version__
    from ulfine_fast.cache.io.home import cache_home
    from ulfine_fast.cache.io.hub import why_no_hub
    from ulfine_fast.cli.content import find_folders
    from ulfine_fast.core.machine import EXTRAS, device_summary, free_gigabytes, packages, system

    versions, problems, missing = packages()
    folders = [Path.cwd(), cache_home()]
    summary: dict[str, Any] = {
        "version": __version__,
        "system": system(),
        "packages": versions,
        "problems": problems,
        "extras": {name: {"for": EXTRAS[name], "missing": names} for name, names in missing.items()},
        "disk": {str(folder): free_gigabytes(folder) for folder in folders},
        "content": {str(path): kind for folder in folders for path, kind in find_folders(folder)},
    }
    # without these libraries there is no device to ask, and no hub
    if not any(name in problem for problem in problems for name in ("torch ", "huggingface_hub ")):
        summary |= device_summary()
        summary["hub"] = why_no_hub()
        summary["problems"] += [summary["problem"]] if "problem" in summary else []
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary)
    if problems:
        raise typer.Exit(1)


def _print(summary: dict[str, Any]) -> None:
    lines = [f"ulfine-fast {summary['version']}, {summary['system']}"]
    lines.append(", ".join(f"{name} {version}" for name, version in summary["packages"].items()))
    if "device" in summary:
        gpus = [f"{gpu['name']}, {gpu['memory_gb']:g} GB" for gpu in summary["gpus"]]
        lines.append(f"device: {summary['device']} ({'; '.join(gpus) or 'no GPU'}; {summary['cores']} cores)")
        lines.append(f"kernels: {summary['kernels'] or 'used'}")
        lines.append(f"model hub: {summary['hub'] or 'answers'}")
    lines += [f"disk: {gigabytes:g} GB free for {folder}" for folder, gigabytes in summary["disk"].items()]

    # extras, caches and runs
    for name, extra in summary["extras"].items():
        state = f'missing, pip install "ulfine-fast[{name}]"' if extra["missing"] else "installed"
        lines.append(f"extra {name}: {state}; for {extra['for']}")
    content = list(summary["content"].items())
    lines += [f"{kind}: {path}" for path, kind in content[:_LISTED]]
    if len(content) > _LISTED:
        lines.append(f"... and {len(content) - _LISTED} more; --json lists them")
    if not content:
        lines.append(
            "no cache, run or sweep in the current folder; make a cache with: ulfine-fast extract IMAGES --out cache"
        )

    lines += [f"problem: {problem}" for problem in summary["problems"]]
    lines.append("everything required is there" if not summary["problems"] else "something required is missing")
    for line in lines:
        typer.echo(printable(line))
