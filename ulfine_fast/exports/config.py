"""config.json of an export folder: what the model file is, written and read in this module alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.runs.run import Run

FORMAT, VERSION = "ulfine-fast-model", 1
CONFIG = "config.json"
CARD = "README.md"
# the model file of each format
FORMATS = {
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "torchscript": "model.ts",
    "torch.export": "model.pt2",
}
OPSET = 18
# what the format calls images: the name of their input, and the key of their preprocessing
IMAGES = "pictures"


def export_config(run: Run, to: str, encoder: Encoder | None) -> dict[str, Any]:
    """The content of config.json, but for the model file's digest "sha256".

    Args:
        run: the exported run.
        to: a key of `FORMATS`.
        encoder: the encoder inside the graph, if any.
    """
    if encoder is None:
        inputs = {"name": "features", "shape": ["n", *run.input_shape], "dtype": "float32"}
    else:
        side = None if run.encoder is None else run.encoder["image_size"]
        inputs = {"name": IMAGES, "shape": ["n", side, side, 3], "dtype": "uint8"}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "to": to,
        "file": FORMATS[to],
        "input": inputs,
        "output": {"name": "probabilities", "shape": ["n", len(run.class_names)], "dtype": "float32"},
        "class_names": run.class_names,
        "method": run.config.method,
        "temperature": float(run.metrics.get("temperature", 1.0)),
        "encoder": run.encoder,
        "config": run.config.to_dict(),
        "created_by": f"ulfine-fast {__version__}",
    }
    if to == "onnx":
        config["opset"] = OPSET
    if encoder is not None:
        import open_clip

        # how image files become images of the model's size, for a reader without the model
        reduced = None if encoder.exact or encoder.resampling is None else asdict(encoder.resampling)
        config[IMAGES] = {
            "open_clip": open_clip.get_model_preprocess_cfg(encoder.model),
            "resampling": reduced,
        }
    return config


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write an export folder's config.json."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of an export folder's config.json.

    Raises:
        InputError: there is none, or another program wrote it.
    """
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = config["format"] == FORMAT and config["version"] == VERSION and config["to"] in FORMATS
        config["class_names"], config["input"]["shape"], config["encoder"], config["config"]
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {CONFIG}; name a folder that `ulfine-fast export` wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}); export the run again") from error
    if not known or config.get("file") != FORMATS[config["to"]]:
        raise InputError(
            f"{path} says {config['format']!r} version {config['version']!r}, which this program does not read"
        )
    return config
