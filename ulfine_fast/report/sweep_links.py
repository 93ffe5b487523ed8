"""Links between a sweep and the runs of its refits: relative ones, which work where the folders move together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.report.groups import Group
from ulfine_fast.search.saved import LEADERBOARD, SUMMARY, Refit, is_of_another_program, read_sweep

PAGE = "report.html"
"""The name of a page that is looked for in the folders of sweeps and runs."""


@dataclass(frozen=True, slots=True)
class SweepLink:
    """What a page says of runs that a sweep refit.

    Attributes:
        label: of the runs.
        rank: of their trial, from 1.
        trial: its number.
        sweep: the sweep's folder, in words.
        address: of the sweep: its section on this page, its own page, or else its leaderboard; "" for no link.
    """

    label: str
    rank: int
    trial: int
    sweep: str
    address: str


@dataclass(frozen=True, slots=True)
class RefitLink:
    """What a sweep's section says of a trial that was refit.

    Attributes:
        rank: from 1.
        trial: its number.
        address: of its runs: their own page, or else their folder; "" for no link.
        settings: address of the file of its options; "" for no link.
        is_here: whether its runs are on this page.
    """

    rank: int
    trial: int
    address: str
    settings: str
    is_here: bool


def links_to_sweeps(groups: Sequence[Group], shown: Sequence[Path], page: Path | None) -> list[SweepLink]:
    """For each group of runs in the folder of a sweep's refit, the sweep.

    Args:
        groups: on the page.
        shown: folders of the sweeps that have a section on the page, in its order.
        page: where the page will be; None for one without links to files.
    """
    links = []
    for group in groups:
        run = group.runs[0].path
        # runs of several seeds are a folder deeper
        for folder in dict.fromkeys([run.resolve(), *run.resolve().parents][:2]):
            refit = _refit_at(folder)
            if refit is None:
                continue
            sections = [number for number, path in enumerate(shown, 1) if path.resolve() == folder.parent]
            own = _page_in(folder.parent, page) or folder.parent / LEADERBOARD
            address = f"#h-sweep-{sections[0]}" if sections else _relative(own, page)
            links.append(SweepLink(group.label, refit["rank"], refit["trial"], folder.parent.name, address))
            break
    return links


def links_to_refits(
    folder: Path, refits: Sequence[Refit], groups: Sequence[Group], page: Path | None
) -> list[RefitLink]:
    """For each refit of a sweep, its runs and its options.

    Args:
        folder: of the sweep.
        refits: of its sweep.json.
        groups: on the page.
        page: as for :func:`links_to_sweeps`.
    """
    here = {run.path.resolve() for group in groups for run in group.runs}
    links = []
    for refit in refits:
        runs = (folder / refit["runs"]).resolve()
        own = _page_in(runs, page) or runs
        links.append(
            RefitLink(
                rank=refit["rank"],
                trial=refit["trial"],
                address=_relative(own, page) if runs.is_dir() else "",
                settings=_relative(folder / refit["settings"], page),
                is_here=any(runs in (run, run.parent) for run in here),
            )
        )
    return links


def _refit_at(folder: Path) -> Refit | None:
    """What the sweep above a folder says of it; None where it is of no sweep, or of a damaged one."""
    above = folder.parent
    if not (above / SUMMARY).is_file():
        return None
    try:
        summary = None if is_of_another_program(above) else read_sweep(above).summary
    except (OSError, InputError):
        return None
    return next((refit for refit in ([] if summary is None else summary.best) if refit["runs"] == folder.name), None)


def _page_in(folder: Path, page: Path | None) -> Path | None:
    """Another page in a folder."""
    other = folder / PAGE
    return other if other.is_file() and (page is None or other.resolve() != page.resolve()) else None


def _relative(target: Path, page: Path | None) -> str:
    """The address of a file or folder for a page elsewhere; "" where there is no way from one to the other."""
    if page is None:
        return ""
    try:
        path = os.path.relpath(target.resolve(), page.resolve().parent)
    # two drives of Windows
    except ValueError:
        return ""
    return quote(Path(path).as_posix(), errors="surrogateescape") + ("/" if target.is_dir() else "")
