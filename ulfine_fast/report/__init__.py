"""Run folders in, one self-contained HTML page out.

`page` (the sections put together, the file written), `groups` (runs by method and setting), one module a section:
`results`, `classes`, `calibration`, `one_byte`, `confusion`, `feature_map`, `gallery` (with `images`), `sweeps`,
`sweep_links`, `settings`; `plugins` (sections of other packages), `leakage` (warnings), `charts` on `svg`, `formats`.
May import `runs` and what `runs` may import; `cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ulfine_fast.report.choices import Projection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

__all__ = ["Projection", "build_report"]


def build_report(
    runs: Sequence[Path],
    out: Path,
    *,
    images: Callable[[str], Image] | None = None,
    title: str | None = None,
    leakage: Sequence[str] = (),
    attributes: Mapping[str, str] | None = None,
    projection: Projection = "none",
    one_byte: bool = False,
) -> Path:
    """Write one HTML page about the runs at or below the given folders.

    The page needs no network, no other file and no script (its script only sorts tables). It depends on nothing but
    the run folders, the images, the cache and where it is: writing it twice gives the same bytes. Runs of a sweep's
    refit and the sweep link to each other, also to a page called report.html in the other's folder.

    Args:
        runs: run folders, or folders above them (`OUT/seed-0`, `OUT`, or deeper), of sweeps too; all with the same
            classes.
        out: path of the page; its folder is created if missing, an existing page is replaced.
        images: returns the image of a row id for the gallery; may raise OSError, ValueError or KeyError for an image
            that is missing. None leaves the gallery out.
        title: heading of the page; None writes one from the number of methods, seeds and classes.
        leakage: warnings above the results, see `ulfine_fast.report.leakage.find_leakage`.
        attributes: image id -> an attribute other than the class, for accuracy gaps between groups of images.
        projection: "pca" or "umap" for a map of the test images' features, if the cache is available; "none".
        one_byte: whether to show what `extract --dtype int8` would cost, if the cache is available.

    Returns:
        The path written.

    Raises:
        InputError: there is no run, a file is missing, truncated or of another version, the runs have different
            classes, or `out` cannot be written.
    """
    from pathlib import Path

    # loaded on use: the sections need numpy, pyarrow and jinja2, and importing the package must stay quick
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
        map_run=mapper(projection),
        rounding_cost=rounder() if one_byte else None,
        page=Path(out),
    )
    return write_page(page, out)
