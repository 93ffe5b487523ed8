"""An export folder, opened again; nothing in it is run as code or unpickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.exports.config import IMAGES, calibration_of, check_model_file, is_export, outputs_of, read_config
from ulfine_fast.exports.hub import SCHEME, pull
from ulfine_fast.runs.calibration import class_sets, reject
from ulfine_fast.runs.run import Run, refuse_incomplete_encoder

if TYPE_CHECKING:
    from ulfine_fast.exports.student import Student
    from ulfine_fast.runs.predict import Predictions

_READ_HERE = ("safetensors", "onnx")


class Loaded:
    """A classifier from an export folder.

    Attributes:
        folder: the export folder.
        config: the content of its config.json.
        class_names: (K,).
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.class_names: list[str] = list(config["class_names"])
        # from inputs and the name of an output to its values, where a graph or a network computes them
        self._outputs_of: Callable[[NDArray[Any], str], NDArray[np.float32]] | None = None
        self._student: Student | None = None
        if config["encoder"] is not None:
            refuse_incomplete_encoder(config["encoder"], folder)
        file = folder / config["file"]
        tensors = {}
        if config["to"] == "onnx":
            self._outputs_of = _onnx_outputs(file, config)
        elif "student" in config:
            # imports timm, which other models do without
            from ulfine_fast.exports.student import opened_student, outputs_on

            self._student = opened_student(config["student"], len(self.class_names), file)
            self._outputs_of = outputs_on(self._student, torch.device("cpu"))
        else:
            from safetensors.torch import load_file

            tensors = load_file(file)
        # as far as predictions need it; an ONNX file and a student hold their tensors themselves
        self._run = Run(
            config=FitConfig.from_dict(config["config"], saved=True),
            class_names=self.class_names,
            tensors=tensors,
            metrics={"temperature": config["temperature"]},
            encoder=config["encoder"],
            calibration=calibration_of(config),
        )
        if self._outputs_of is None:
            self._run.refuse_other_tensors(file)
            if [*self._run.input_shape] != config["input"]["shape"][1:]:
                raise ValueError(f"input.shape is {config['input']['shape']}, the tensors take {self._run.input_shape}")

    @property
    def takes_images(self) -> bool:
        """Whether inputs are images of the model's size: of a student, or with the encoder inside."""
        return bool(self.config["input"]["name"] == IMAGES)

    def predict_proba(self, inputs: ArrayLike) -> NDArray[np.float32]:
        """Calibrated probabilities (n, K).

        Args:
            inputs: features (n, D); or, where the model `takes_images`, uint8 (n, H, W, 3) of its size.

        Raises:
            InputError: another shape.
        """
        array = self._checked(inputs)
        return self._run.predict_proba(array) if self._outputs_of is None else self._outputs(array, "probabilities")

    def scores(self, inputs: ArrayLike) -> NDArray[np.float32]:
        """How much each image looks like one of a known class (n,), of what `predict_proba` takes.

        Raises:
            InputError: another shape, or an ONNX file of a version that wrote none.
        """
        array = self._checked(inputs)
        if self._outputs_of is None:
            return self._run.scores(array).astype(np.float32)
        self._run.calibrated()
        return self._outputs(array, "scores")

    def reject(self, inputs: ArrayLike, rate: float = 0.05) -> NDArray[np.bool_]:
        """Which images are none of the classes (n,), see `Run.reject`."""
        return reject(self._run.calibrated(), self.scores(inputs), rate).rejected

    def predict_sets(self, inputs: ArrayLike, coverage: float = 0.9) -> NDArray[np.bool_]:
        """The classes of each image that cannot be excluded (n, K), see `Run.predict_sets`."""
        return class_sets(self._run.calibrated(), self.predict_proba(inputs), coverage).sets

    def _checked(self, inputs: ArrayLike) -> NDArray[Any]:
        name, shape, dtype = (self.config["input"][key] for key in ("name", "shape", "dtype"))
        array = np.asarray(inputs)
        if self.takes_images and array.dtype != np.uint8:
            raise InputError(f"images must be uint8, 0 to 255, got {array.dtype}")
        if array.ndim != len(shape) or list(array.shape[1:]) != shape[1:]:
            raise InputError(f"{name} must have shape ({', '.join(map(str, shape))}), got {array.shape}")
        return np.ascontiguousarray(array, dtype=dtype)

    def _outputs(self, array: NDArray[Any], output: str) -> NDArray[np.float32]:
        """One output of the graph or network, for checked inputs."""
        if not len(array) or self._outputs_of is None:
            return np.zeros((0, len(self.class_names)) if output == "probabilities" else 0, np.float32)
        return self._outputs_of(array, output)

    def predict(self, inputs: ArrayLike) -> NDArray[np.int64]:
        """Class indices (n,) of what `predict_proba` takes."""
        return self.predict_proba(inputs).argmax(axis=1).astype(np.int64)

    def predict_images(
        self,
        images: str | Path | Any,
        *,
        device: str = "auto",
        batch_size: int = 32,
        rate: float | None = None,
        coverage: float | None = None,
    ) -> Predictions:
        """Classes of image files, by the open_clip model that the features came from.

        Args:
            images: as for :func:`ulfine_fast.runs.predict.predict_images`.
            device: where to encode, or to run a student; a graph with the encoder inside runs on the CPU.
            batch_size: images taken together, at least 1.
            rate: fraction of the known classes' images that may be rejected as none of them; None rejects none.
            coverage: fraction of images whose set of classes holds their own; None makes no sets.

        Raises:
            InputError: no images there, the model cannot be loaded, or nothing to calibrate rate or coverage on.
            CacheMismatch: other weights under the model's name.
        """
        # both import open_clip, which features do without
        from ulfine_fast.runs.predict import Scorer, predict_images, recorded_encoder

        scorer = Scorer(self.predict_proba, self.scores, self.class_names, self._run.calibrated)
        if self.takes_images and isinstance(images, FeatureCache):
            raise InputError("this model takes images, and a cache holds features; name the folder of images instead")
        if self.takes_images:
            from ulfine_fast.exports.images import predict_without_encoder

            if self._student is not None:
                from ulfine_fast.exports.student import outputs_on

                self._outputs_of = outputs_on(self._student, pick_device(device))
            return predict_without_encoder(self, scorer, images, batch_size, rate, coverage)
        encoder = recorded_encoder(self.config["encoder"], self.config["input"]["shape"][1:], device)
        return predict_images(
            self._run,
            images,
            batch_size=batch_size,
            encoder=encoder,
            scorer=scorer,
            rate=rate,
            coverage=coverage,
        )


@dataclass(frozen=True)
class Predictor:
    """A run, several seeds of one, or a model from an export folder, for image files.

    Attributes:
        seeds: runs whose probabilities are averaged.
        predict: as :func:`ulfine_fast.runs.predict.predict_images`, without its first argument.
    """

    seeds: int
    predict: Callable[..., Predictions]


def open_predictor(folder: Path) -> Predictor:
    """Opens a run folder, or one that `export` or `distill` wrote.

    Raises:
        InputError: neither, or damaged.
    """
    # imports open_clip, which predictions of features do without
    from ulfine_fast.runs.predict import mean_of_seeds, predict_images
    from ulfine_fast.runs.seeds import load_seeds

    if not is_export(folder):
        runs = load_seeds(folder)
        return Predictor(len(runs), partial(predict_images, runs[0], scorer=mean_of_seeds(runs)))
    model = load(folder)

    def predict(images: Any, *, five_crops: bool, **options: Any) -> Predictions:
        if five_crops:
            raise InputError(f"{folder} is an exported model, which takes whole images; leave out --five-crops")
        return model.predict_images(images, **options)

    return Predictor(1, predict)


def load(folder: str | Path) -> Loaded:
    """Opens a folder that `export` or `distill` wrote, as ONNX or safetensors.

    Args:
        folder: its path; "hf://owner/name", or "hf://owner/name@revision", for a repository of the Hugging Face Hub.

    Raises:
        InputError: no such folder or repository, of another version, of a format that torch itself loads, or changed
            since.
    """
    folder = pull(str(folder)) if str(folder).startswith(SCHEME) else Path(folder)
    config = read_config(folder)
    if config["to"] not in _READ_HERE:
        loader = "torch.jit.load" if config["to"] == "torchscript" else "torch.export.load"
        raise InputError(f"{folder} is for {loader}, which runs what is in the file: use that if you trust it")
    check_model_file(folder, config)
    try:
        return Loaded(folder, config)
    except InputError:
        raise
    # other programs may write anything: settings of other types, tensors of other names, a graph of other operations
    except Exception as error:
        reason = one_line(error)
        raise InputError(f"{folder} is damaged or of another program ({reason}); export the run again") from error


def _onnx_outputs(path: Path, config: dict[str, Any]) -> Callable[[NDArray[Any], str], NDArray[np.float32]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError('an ONNX folder needs onnxruntime; pip install "ulfine-fast[export]"') from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for kind, graph, recorded, expected in (
        ("input", session.get_inputs(), config["input"], [config["input"]["name"]]),
        ("output", session.get_outputs(), config["output"], outputs_of(config)),
    ):
        names, shape = [each.name for each in graph], list(graph[0].shape[1:])
        if names != expected or shape != recorded["shape"][1:]:
            raise ValueError(f"the graph has the {kind} {names} of shape {shape}")
    if config["output"]["shape"][1:] != [len(config["class_names"])]:
        raise ValueError(f"the graph has {config['output']['shape'][1:]} classes, not {len(config['class_names'])}")

    def outputs(array: NDArray[Any], output: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = session.run([output], {config["input"]["name"]: array})[0]
        return values

    return outputs
