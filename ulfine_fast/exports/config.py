"""config.json of an export folder: what the model file is, written and read in this module alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.digests import BLANK, file_digest, is_sealed, sealed
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import read_regular_file, write_atomically
from ulfine_fast.cache.io.json_files import MAX_BYTES, check_schema, parse_json
from ulfine_fast.runs.calibration import SCORE, Calibration
from ulfine_fast.runs.files import as_unicode
from ulfine_fast.runs.schemas import Encoder as EncoderRecord

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.exports.student import Student
    from ulfine_fast.runs.run import Run

# version 2 has a digest of config.json in itself; version 3 is of a student, which earlier programs do not open
FORMAT, VERSIONS, STUDENT_VERSION = "ulfine-fast-model", (1, 2), 3
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
# the rate of false rejection, and the coverage of sets, whose thresholds a graph has in its metadata
REJECT, COVERAGE = 0.05, 0.9
_FIX = "export the run again"


class _Input(msgspec.Struct):
    """What the model takes: the first axis of its shape is "n", the number of images."""

    name: Literal["features", "pictures"]
    shape: Annotated[list[int | str], msgspec.Meta(min_length=2)]
    dtype: Literal["float32", "uint8"]


class _Images(msgspec.Struct):
    """How image files become images of the model's size."""

    open_clip: dict[str, Any]
    resampling: dict[str, Any] | None


class _Calibration(msgspec.Struct):
    """What rejection and sets are calibrated on: images by position, without their ids."""

    score: Literal["energy"]
    labels: list[Annotated[int, msgspec.Meta(ge=0)]]
    probabilities: list[float]
    scores: list[float]


class _Student(msgspec.Struct):
    """The network of a student."""

    timm: str
    image_size: Annotated[int, msgspec.Meta(ge=1)]


class _Config(msgspec.Struct):
    """config.json, as far as it is read."""

    to: Literal["safetensors", "onnx", "torchscript", "torch.export"]
    file: str
    sha256: str
    input: _Input
    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]
    method: str
    temperature: Annotated[float, msgspec.Meta(gt=0)]
    encoder: EncoderRecord | None
    config: dict[str, Any]
    pictures: _Images | None = None
    calibration: _Calibration | None = None
    student: _Student | None = None


def export_config(run: Run, to: str, encoder: Encoder | None) -> dict[str, Any]:
    """The content of config.json, but for two digests: that of the model file, "sha256", and its own, "digest".

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
        "version": VERSIONS[-1],
        "to": to,
        "file": FORMATS[to],
        "input": inputs,
        "output": {"name": "probabilities", "shape": ["n", len(run.class_names)], "dtype": "float32"},
        "class_names": [as_unicode(name) for name in run.class_names],
        "method": run.config.method,
        "temperature": float(run.metrics.get("temperature", 1.0)),
        "encoder": run.encoder,
        "config": run.config.to_dict(),
        "created_by": f"ulfine-fast {__version__}",
    }
    if run.calibration is not None:
        config["calibration"] = calibration_section(run.calibration)
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


def student_config(run: Run, student: Student, calibration: Calibration, about: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json of a student, but for the two digests.

    Args:
        run: its teacher, or the first one of several seeds.
        student: the trained network.
        calibration: of the student's own outputs.
        about: JSON values on its training and its results.
    """
    side = student.image_size
    config = export_config(run, "safetensors", None)
    return {
        **config,
        "version": STUDENT_VERSION,
        "input": {"name": IMAGES, "shape": ["n", side, side, 3], "dtype": "uint8"},
        "temperature": 1.0,
        "calibration": calibration_section(calibration),
        IMAGES: student.preprocessing,
        "student": {
            "timm": student.name,
            "image_size": side,
            "parameters": student.parameter_count,
            **about,
        },
    }


def calibration_section(calibration: Calibration) -> dict[str, Any]:
    """What rejection and sets are calibrated on, without the ids of images."""
    return {
        "score": SCORE,
        "labels": calibration.labels.tolist(),
        "probabilities": calibration.probabilities.tolist(),
        "scores": calibration.scores.tolist(),
    }


def calibration_of(config: dict[str, Any]) -> Calibration | None:
    """What rejection and sets are calibrated on, without ids; None in folders of versions that wrote none.

    Raises:
        ValueError: columns of other lengths, or a class that does not exist.
    """
    if config.get("calibration") is None:
        return None
    columns = config["calibration"]
    labels = np.array(columns["labels"], np.int64)
    probabilities, scores = (np.array(columns[name], np.float32) for name in ("probabilities", "scores"))
    if not len(labels) == len(probabilities) == len(scores) or (labels >= len(config["class_names"])).any():
        raise ValueError("calibration has columns of other lengths, or a class that does not exist")
    return Calibration([""] * len(labels), labels, np.zeros(len(labels), np.bool_), probabilities, scores)


def outputs_of(config: dict[str, Any]) -> list[str]:
    """Names of the outputs of an ONNX graph: scores are among them where rejection is calibrated."""
    return ["probabilities"] if config.get("calibration") is None else ["probabilities", "scores"]


class UsualThresholds(NamedTuple):
    """Thresholds for programs without this package, at `REJECT` and `COVERAGE`.

    Attributes:
        score: images of lower scores are none of the classes; -inf where too few labels are held out to reject any.
        probability: classes of lower probability are excluded (K,); 0 for those that never are.
    """

    score: float
    probability: list[float]


def usual_thresholds(calibration: Calibration | None, classes: int) -> UsualThresholds | None:
    """Thresholds of K classes; None where nothing is calibrated."""
    if calibration is None or not len(calibration):
        return None
    sets = calibration.set_thresholds(classes, COVERAGE).threshold
    return UsualThresholds(calibration.rejection_threshold(REJECT), np.maximum(sets, 0.0).tolist())


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write an export folder's config.json, whose model file is there."""
    digests = {"sha256": file_digest(folder / config["file"]), "digest": BLANK}
    text = json.dumps({**config, **digests}, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG, sealed(text.encode()))


def is_export(folder: Path) -> bool:
    """Whether a folder has a config.json of this format, of any version; a damaged one is of none."""
    try:
        data = read_regular_file(folder / CONFIG, MAX_BYTES)
        return bool(parse_json(data, dict[str, Any], name=CONFIG, fix=_FIX).get("format") == FORMAT)
    except (OSError, InputError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """The content of an export folder's config.json.

    Raises:
        InputError: there is none, another program wrote it, or it has changed since.
    """
    path = folder / CONFIG
    try:
        data = read_regular_file(path, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} has no {CONFIG}; name a folder that `ulfine-fast export` wrote") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {_FIX}") from error
    config = parse_json(data, dict[str, Any], name=str(path), fix=_FIX)
    written_as, version = config.get("format"), config.get("version")
    if written_as != FORMAT or version not in (*VERSIONS, STUDENT_VERSION) or isinstance(version, bool):
        raise InputError(f"{path} says {written_as!r} version {version!r}, which this program does not read")
    # a file of version 1 has no digest: one with a digest had another version once
    if ("digest" in config) if version == 1 else not is_sealed(data):
        raise InputError(f"{path} has changed since it was written; {_FIX}")
    known = check_schema(config, _Config, name=str(path), fix=_FIX)
    takes_images = known.input.name == IMAGES
    if (known.student is not None) != (version == STUDENT_VERSION) or (known.student and known.to != "safetensors"):
        raise InputError(f"{path} is of version {version}, and its model is not; {_FIX}")
    if known.file != FORMATS[known.to] or takes_images != (known.pictures is not None):
        raise InputError(f"{path} names the file {known.file!r} and the input {known.input.name!r}; {_FIX}")
    return config


def check_model_file(folder: Path, config: dict[str, Any]) -> Path:
    """The model file, which must be the one that was exported.

    Raises:
        InputError: it is missing, or has changed since.
    """
    path = folder / config["file"]
    try:
        digest = file_digest(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {_FIX}") from error
    if digest != config["sha256"]:
        raise InputError(f"{path} is not the file that {CONFIG} names; {_FIX}")
    return path
