"""An export folder, opened again; nothing in it is run as code or unpickled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.exports.hub import SCHEME, pull
from ulfine_fast.exports.write import CONFIG, FORMAT, FORMATS

if TYPE_CHECKING:
    from ulfine_fast.runs.predict import Predictions
    from ulfine_fast.runs.run import Run

_READ_HERE = ("safetensors", "onnx")


class Loaded:
    """A classifier from an export folder.

    Attributes:
        class_names: (K,). told: the content of its config.json.
    """

    def __init__(self, folder: Path, told: dict[str, Any]) -> None:
        self.folder, self.told, self.class_names = folder, told, list(told["class_names"])
        self._run = _run_of(folder, told)
        self._session = _session(folder / told["file"]) if told["to"] == "onnx" else None

    @property
    def takes_images(self) -> bool:
        """Whether the encoder is inside, so that inputs are images of its size."""
        return bool(self.told["input"]["name"] == "pictures")

    def predict_proba(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Calibrated probabilities (n, K).

        Args:
            inputs: features (n, D); or, with the encoder inside, images uint8 (n, H, W, 3) of its size.

        Raises:
            InputError: another shape.
        """
        wanted = self.told["input"]
        given = np.asarray(inputs)
        if self.takes_images and given.dtype != np.uint8:
            raise InputError(f"images must be uint8, 0 to 255, got {given.dtype}")
        given = given.astype(wanted["dtype"], copy=False)
        if given.ndim != len(wanted["shape"]) or list(given.shape[1:]) != wanted["shape"][1:]:
            shape = ", ".join(map(str, wanted["shape"]))
            raise InputError(f"{wanted['name']} must have shape ({shape}), got {given.shape}")
        if self._session is None:
            return self._run.predict_proba(given)
        if not len(given):
            return np.zeros((0, len(self.class_names)), np.float32)
        found: NDArray[np.float32] = self._session.run(["probabilities"], {wanted["name"]: given})[0]
        return found

    def predict(self, inputs: NDArray[Any]) -> NDArray[np.int64]:
        """Class indices (n,) of what `predict_proba` takes."""
        return self.predict_proba(inputs).argmax(axis=1).astype(np.int64)

    def predict_images(self, images: str | Path, *, device: str = "auto", batch_size: int = 32) -> Predictions:
        """Classes of image files, by the open_clip model that the features came from; see `predict_images`.

        Raises:
            InputError: no images there, or the model is not to be had.
            CacheMismatch: other weights under the model's name.
        """
        if self.takes_images:
            from ulfine_fast.exports.images import scored

            return scored(self, Path(images), batch_size)
        from ulfine_fast.runs.predict import predict_images

        return predict_images(self._run, Path(images), device=device, batch_size=batch_size, scorer=self.predict_proba)


def load(folder: str | Path) -> Loaded:
    """Opens a folder that `export` wrote, as ONNX or safetensors.

    Args:
        folder: where it is; "hf://owner/name", or "hf://owner/name@revision", for a repository of the Hugging Face Hub.

    Raises:
        InputError: no such folder or repository, of another version, of a format that torch itself loads, or changed
            since.
    """
    folder = pull(str(folder)) if str(folder).startswith(SCHEME) else Path(folder)
    told = read_config(folder)
    if told["to"] not in _READ_HERE:
        way = "torch.jit.load" if told["to"] == "torchscript" else "torch.export.load"
        raise InputError(f"{folder} is for {way}, which runs what is in the file: use that if you trust it")
    _refuse_changed(folder / told["file"], told.get("sha256"))
    try:
        return Loaded(folder, told)
    except InputError:
        raise
    # what others wrote may hold anything: settings of other types, tensors of other names, a graph of other operations
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{folder} is damaged or of another program ({reason}); export the run again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """What an export folder's config.json says.

    Raises:
        InputError: there is none, or another program wrote it.
    """
    path = folder / CONFIG
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        known = told["format"] == FORMAT and told["version"] == 1 and told["to"] in FORMATS
        told["class_names"], told["input"]["shape"], told["encoder"], told["config"]
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {CONFIG}; name a folder that `ulfine-fast export` wrote") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}); export the run again") from error
    if not known or told.get("file") != FORMATS[told["to"]]:
        raise InputError(
            f"{path} says {told['format']!r} version {told['version']!r}, which this program does not read"
        )
    found: dict[str, Any] = told
    return found


def _refuse_changed(path: Path, digest: str | None) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); export the run again") from error
    if found != digest:
        raise InputError(f"{path} is not the file that {CONFIG} names; export the run again")


def _run_of(folder: Path, told: dict[str, Any]) -> Run:
    """The run, as far as predicting goes; an ONNX file holds its heads itself."""
    from safetensors.torch import load_file

    from ulfine_fast.config import FitConfig
    from ulfine_fast.runs.run import Run

    tensors = load_file(folder / told["file"]) if told["to"] == "safetensors" else {}
    metrics = {"temperature": told["temperature"]}
    return Run(
        FitConfig.from_dict(told["config"], saved=True),
        list(told["class_names"]),
        tensors,
        metrics,
        encoder=told["encoder"],
    )


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError('an ONNX folder needs onnxruntime; pip install "ulfine-fast[export]"') from error
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
