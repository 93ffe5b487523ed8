"""All of this project that a GPU decides, in one call.

    python -m benchmarks.gpu --minutes 8 --json gpu.json

It needs a checkout, PyTorch with Triton, torchvision, timm, h5py, pyarrow and scikit-learn, and as wheels rich, typer,
msgspec and blake3, for the encoders also open_clip_torch with ftfy, wcwidth and regex. It names at its start what is
missing. There need be no network; it installs nothing and leaves nothing behind. Without pytest the suite's own tests
are left out.

Each part runs in a process of its own and has its part of the minutes, so one that fails, hangs or takes all memory
costs its own results alone. Results are printed as they come, and the file is written anew after each part.
`--tiny --device cpu` tries the script on a processor.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu.parts import Part, Settings, run_parts
from benchmarks.gpu.summary import aims, failures, machine, memory_rows, print_summary
from benchmarks.results import Row, write_json
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cli.main import guarded

# in the order in which results are wanted; weights are about the seconds that each takes on an H100
PARTS = (
    Part("tests", "benchmarks.gpu.cuda_tests:run_tests", 50),
    Part("checks", "benchmarks.gpu.checks:run_checks", 45),
    Part("trials S1", "benchmarks.gpu.trials:run_trials", 75, "S1"),
    Part("trials S2", "benchmarks.gpu.trials:run_trials", 45, "S2"),
    Part("trials S3", "benchmarks.gpu.trials:run_trials", 60, "S3"),
    Part("sweep", "benchmarks.gpu.fits:run_sweep", 35),
    Part("ulfine_plus", "benchmarks.gpu.fits:run_ulfine_plus", 80),
    Part("extraction ViT-B-16", "benchmarks.gpu.extraction:run_extraction", 60, "ViT-B-16"),
    Part("extraction ViT-B-32", "benchmarks.gpu.extraction:run_extraction", 40, "ViT-B-32"),
    Part("extraction ViT-L-14", "benchmarks.gpu.extraction:run_extraction", 60, "ViT-L-14"),
)
# a part for each of the modules is enough to try the script
TINY = ("tests", "checks", "trials S1", "sweep", "ulfine_plus", "extraction ViT-B-32")

# what the parts import beside PyTorch, by module, and the wheels that bring it
PACKAGES = {
    "h5py": "h5py",
    "torchvision": "torchvision",
    "timm": "timm",
    "sklearn": "scikit-learn",
    "blake3": "blake3",
    "msgspec": "msgspec",
    "open_clip": "open_clip_torch ftfy wcwidth regex",
    "triton": "triton",
}


def run(parts: tuple[Part, ...], settings: Settings, minutes: float, path: Path | None) -> Row:
    """Run parts, and write and return their results.

    Args:
        parts: in their order.
        settings: for all of them.
        minutes: for all together.
        path: where the results are written after each part.
    """
    results: Row = {
        "machine": machine(),
        "settings": {"device": settings.device, "tiny": settings.tiny, "minutes": minutes},
        "missing": [wheels for module, wheels in PACKAGES.items() if importlib.util.find_spec(module) is None],
        "parts": {},
        "memory": [],
        "failures": [],
        "aims": [],
    }
    for card in results["machine"]["cards"]:
        print(", ".join(card.values()))
    versions = results["machine"]["versions"]
    print(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    print(f"Python {results['machine']['python']}, {results['machine']['cores']} cores, {results['machine']['date']}")
    for wheels in results["missing"]:
        print(f"not installed here, so some parts fail: {wheels}")

    def done(part_results: dict[str, Row]) -> None:
        results["parts"] = part_results
        results["memory"] = memory_rows(part_results)
        results["failures"] = failures(part_results)
        results["aims"] = aims(part_results)
        if path is not None:
            write_json(path, results)

    done(run_parts(parts, settings, 60 * minutes, done))
    print_summary(results["parts"])
    return results


def main(
    minutes: Annotated[float, typer.Option(help="Time for all parts together.", min=0.1)] = 8.0,
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu to try the script.")] = "cuda",
    parts: Annotated[str, typer.Option(help="Comma-separated names of the parts; all by default.")] = "",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny sizes, to try the script.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
) -> None:
    """Test and measure everything on a GPU, in so many minutes."""
    known = {part.name: part for part in PARTS}
    names = [name.strip() for name in parts.split(",") if name.strip()] or (TINY if tiny else known)
    for name in names:
        if name not in known:
            raise InputError(f"parts are {', '.join(known)}, got {name!r}")
    if device == "cpu" and not tiny:
        raise InputError("a processor would take hours for the sizes of a GPU; add --tiny to try the script")
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError("no GPU is available here; --tiny --device cpu tries the script without one")
    run(tuple(known[name] for name in names), Settings(device, tiny), minutes, as_json)


if __name__ == "__main__":
    typer.run(guarded(main))
