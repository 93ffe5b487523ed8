"""What a machine offers to this program: libraries, devices, kernels, disk, and the extras that are installed."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ulfine_fast.cache.io.errors import InputError

DISTRIBUTION = "ulfine-fast"
EXTRAS = {
    "offline": "the small encoder lite0-minilm and the demo, without a model hub",
    "review": "labelling images on a local page: `review`",
    "export": "ONNX models: `export --to onnx`",
    "lance": "Lance data sets: `cache export --to lance`, `cache import`",
    "datasets": "data sets of Hugging Face: `extract hf:NAME`",
    "heif": "images in HEIC and HEIF",
    "s3": "caches in an S3 bucket: `s3://bucket/cache`",
    "ray": "several machines: `extract --ray`, `sweep --ray`",
    "umap": "a UMAP map in reports: `report --map umap`",
    "tensorboard": "`log --to tensorboard`",
    "wandb": "`log --to wandb`",
    "mlflow": "`log --to mlflow`",
    "dashboard": "Optuna's pages about a sweep",
}
"""What each extra is for; those for developing this program are left out."""


def packages() -> tuple[dict[str, str], list[str], dict[str, list[str]]]:
    """The libraries that this program requires, and those of its extras.

    Returns:
        Version by name of the required libraries that are here; a sentence for each that is missing or too old; and by
        extra the names of its libraries that are missing or too old.
    """
    versions: dict[str, str] = {}
    problems: list[str] = []
    extras: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    try:
        listed = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return {}, [f"{DISTRIBUTION} is not installed; pip install {DISTRIBUTION}"], extras
    for requirement in listed:
        problem = _problem(requirement)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            if problem is None:
                versions[requirement.name] = metadata.version(requirement.name)
            else:
                problems.append(problem)
            continue
        for extra, missing in extras.items():
            if requirement.marker.evaluate({"extra": extra}) and problem is not None:
                missing.append(requirement.name)
    return versions, problems, extras


def device_summary() -> dict[str, Any]:
    """The device of `--device auto`, GPUs with memory in GB, and why kernels are not used, None where they are."""
    import torch

    from ulfine_fast.cache.io.device import pick_device
    from ulfine_fast.ops.kernels import why_not

    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)} for gpu in names]
    summary: dict[str, Any] = {"gpus": gpus, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    try:
        device = pick_device("auto")
    except InputError as error:
        return {**summary, "device": None, "kernels": None, "problem": str(error)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {**summary, "device": str(device), "kernels": why_not(device)}


def free_gigabytes(folder: Path) -> float:
    """Free space where a folder is, or will be made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return round(shutil.disk_usage(existing).free / 1e9, 1)


def system() -> str:
    """Python's version and the operating system's, in words."""
    return f"Python {platform.python_version()} on {platform.platform(terse=True)}"


def _problem(requirement: Requirement) -> str | None:
    """Why a library does not do; None where it does."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed; pip install '{requirement.name}{requirement.specifier}'"
    if not requirement.specifier.contains(version, prereleases=True):
        return (
            f"{requirement.name} {version} does not fit {requirement.specifier}; "
            f"pip install '{requirement.name}{requirement.specifier}'"
        )
    return None
