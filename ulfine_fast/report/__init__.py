"""Run folders in, one self-contained HTML page out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

__all__ = ["build_report"]


def build_report(
    runs: Sequence[Path],
    out: Path,
    *,
    images: Callable[[str], Image] | None = None,
    title: str | None = None,
    leakage: Sequence[str] = (),
    attributes: Mapping[str, str] | None = None,
    projection: str = "none",
    one_byte: bool = False,
) -> Path:
    """Write one HTML page about the runs found at or below the given folders.

    The page needs no network and no other file, and stands without its script, which sorts tables. It is a function of
    the run folders' files (and the images and the cache), so writing it twice gives the same bytes.

    Args:
        runs: run folders, or folders above them (`OUT/seed-0`, `OUT`, or deeper), those of sweeps too; all with the
            same classes.
        out: the page's path; its folder is made when missing, an existing page is replaced.
        images: gives the image of a row id for the gallery; it may raise OSError, ValueError or KeyError for an
            image that is gone. None leaves the gallery out and says how to get it.
        leakage: warnings that stand above the figures, see `ulfine_fast.report.leakage.find_leakage`.
        attributes: image id -> another attribute than the class, for gaps between groups of images.
        projection: "pca" or "umap" for a map of the test images' features, where the cache is at hand; "none".
        one_byte: whether to say what `extract --dtype int8` would cost, where the cache is at hand.
        title: the page's heading; None writes one from the number of methods, seeds and classes.

    Returns:
        The path written.

    Raises:
        InputError: no run there, a file missing or cut or of another version, runs of other classes, or `out`
            cannot be written.
    """
    # The page's parts need numpy, pyarrow, jinja2: loaded on use, so that importing the package stays quick.
    from ulfine_fast.report.feature_map import mapper
    from ulfine_fast.report.one_byte import rounder
    from ulfine_fast.report.page import render_page, write_page
    from ulfine_fast.report.sweeps import find_sweeps
    from ulfine_fast.runs.files import load_runs

    page = render_page(
        load_runs(runs),
        images=images,
        title=title,
        leakage=leakage,
        attributes=attributes,
        sweeps=find_sweeps(runs),
        mapped=mapper(projection),
        rounded=rounder() if one_byte else None,
    )
    return write_page(page, out)
