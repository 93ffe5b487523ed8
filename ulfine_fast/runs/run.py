"""A fitted run: its head, its metrics and its predictions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.config import FitConfig, per_trial_options
from ulfine_fast.core.heads import Tensors, apply_adapter
from ulfine_fast.core.types import Trials
from ulfine_fast.methods.registry import method_of
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.runs.calibration import Calibration, class_sets, reject
from ulfine_fast.runs.files import RunFiles, load_run, write_run

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

_ENCODER = ("name", "pretrained", "sha256", "image_size")


@dataclass(frozen=True)
class SecondEncoder:
    """What a run of two encoders records of the second one.

    Attributes:
        encoder: as `Run.encoder`; None for plain arrays.
        cache_path: the folder of the cache of its features, None for a cache in memory.
    """

    encoder: dict[str, Any] | None
    cache_path: Path | None


@dataclass(frozen=True)
class Head:
    """From inputs to logits: the one definition that predict, eval, adapt, export and realign use.

    It is batched as the methods are, with a trials axis of 1.

    Attributes:
        trials: the run's settings, as its method reads them.
        tensors: the run's tensors by name (1, ...). Those of a realigned run may hold "realigned.weight" (1, K, D),
            which replaces the method's head, and "realigned.bias" (1, K), which is added to the logits.
    """

    trials: Trials
    tensors: Tensors

    @classmethod
    def of(cls, config: FitConfig, tensors: Tensors) -> Head:
        """The head of a run with this config and these tensors (1, ...)."""
        start = tensors["prototypes"] if "prototypes" in tensors else tensors["linear"]
        values = {
            name: torch.tensor([float(getattr(config, name))], dtype=start.dtype) for name in per_trial_options(config)
        }
        trials = Trials(config, values, torch.tensor([config.seed]), start, torch.zeros(start.shape[:2]))
        return cls(trials, tensors)

    def rows(self, inputs: Tensor) -> Tensor:
        """Inputs as :meth:`logits` takes them.

        Args:
            inputs: features (n, D) of any length, or tokens (n, S, W) where the run reads tokens.

        Returns:
            Unit features (n, D), or tokens side by side (n, S W).
        """
        return inputs.flatten(1) if self.trials.config.reads_tokens else normalize(inputs)

    def features(self, rows: Tensor) -> Tensor:
        """Rows after the run's adapter: unit features (n, D); those of :meth:`rows` where there is no adapter."""
        return self._adapted(rows)[0]

    def logits(self, rows: Tensor) -> Tensor:
        """Uncalibrated logits (n, K) of what :meth:`rows` returns."""
        if "realigned.weight" in self.tensors:
            logits = self._adapted(rows) @ self.tensors["realigned.weight"].transpose(1, 2)  # (1, n, K)
        else:
            logits = method_of(self.trials.config).logits(self.trials, self.tensors, rows.unsqueeze(0))
        if "realigned.bias" in self.tensors:
            logits = logits + self.tensors["realigned.bias"].unsqueeze(1)
        return logits[0]

    def scores(self, rows: Tensor) -> Tensor:
        """How much images look like one of a known class (n,): the log-sum-exp of logits, of what :meth:`rows` returns.

        The energy score of Liu et al., arXiv 2010.03759, at temperature 1.
        """
        if "realigned.weight" in self.tensors:
            return torch.logsumexp(self.logits(rows), dim=-1)
        known = method_of(self.trials.config).known_logits(self.trials, self.tensors, rows.unsqueeze(0))
        if "realigned.bias" in self.tensors:
            known = known + self.tensors["realigned.bias"].unsqueeze(1)
        return torch.logsumexp(known[0], dim=-1)

    def _adapted(self, rows: Tensor) -> Tensor:
        return apply_adapter(self.tensors, rows.unsqueeze(0), self.trials.values["adapter_scale"])  # (1, n, D)


@dataclass(frozen=True)
class HeldOut:
    """Labelled images, as fits without them predict them in cross-validation; means over its repeats.

    Attributes:
        ids: image ids (L,), of images that were held out.
        labels: their class indices (L,).
        probabilities: calibrated (L, K).
        correct: fraction of the repeats in which the most likely class is the label (L,).
    """

    ids: list[str]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    correct: NDArray[np.float64]


@dataclass
class Run:
    """What :func:`ulfine_fast.fit` returns.

    Attributes:
        config: the trial's settings.
        class_names: (K,).
        tensors: the trained tensors by name, without a trials axis, e.g. "linear" (K, D).
        metrics: metrics on the test split, under "val" on validation, and under "cross_validation" what that estimates
            where there is no test split; fractions in [0, 1].
        split: image ids by role, see :mod:`ulfine_fast.data.splits`.
        history: one dictionary per evaluation.
        test_ids: image ids of the test split (E,).
        test_labels: their class indices (E,).
        test_probabilities: their calibrated probabilities (E, K).
        encoder: name, weights and preprocessing of the model the features came from, None for plain arrays.
        cache_path: the cache's folder, None for a cache in memory.
        status: "done"; "stopped" early, without progress; "pruned" by a sweep; or "failed", its numbers no longer
            finite, without tensors. For all but "done", `metrics` has the step: "stopped_at" and so on.
        relabeled: digest of the labels that replaced the cache's own, None where none did.
        second: the second encoder, whose features are behind those of the first; None for a run of one.
        held_out: the images of cross-validation, None where there was none.
        calibration: labelled images that it did not learn from, on which :meth:`reject` and :meth:`predict_sets` are
            calibrated; None for runs of versions that kept none.
    """

    config: FitConfig
    class_names: list[str]
    tensors: dict[str, Tensor]
    metrics: dict[str, Any]
    split: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    test_ids: list[str] = field(default_factory=list)
    test_labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    test_probabilities: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    encoder: dict[str, Any] | None = None
    cache_path: Path | None = None
    status: str = "done"
    relabeled: str | None = None
    second: SecondEncoder | None = None
    held_out: HeldOut | None = None
    calibration: Calibration | None = None

    def head(self, dtype: torch.dtype = torch.float32) -> Head:
        """The run's head, computing in `dtype`.

        Raises:
            InputError: the run failed.
        """
        self.refuse_failed()
        batched = {name: tensor.unsqueeze(0) for name, tensor in self.tensors.items()}
        typed = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batched.items()}
        return Head.of(self.config, typed)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image's input to :meth:`logits`: (D,), or (S, W) for tokens; (1, S W + E) with two encoders."""
        if "second_center" in self.tensors:
            width = self.tensors["second_center"].shape[-1]
            if "backbone.projection" in self.tensors:
                return 1, 2 * self.tensors["backbone.projection"].shape[0] + width
            if "projection" in self.tensors:
                return 1, self.tensors["projection"].shape[0] + width
            return (self.tensors["center"].shape[-1] + width,)
        if "backbone.projection" in self.tensors:
            return 2, self.tensors["backbone.projection"].shape[0]
        if "projection" in self.tensors:
            return 1, self.tensors["projection"].shape[0]
        width = next(t.shape[-1] for name, t in self.tensors.items() if name in ("linear", "prototypes"))
        return (1, width) if self.config.reads_tokens else (width,)

    def logits(self, features: ArrayLike | Tensor, *, exact: bool = False) -> NDArray[np.floating[Any]]:
        """Uncalibrated logits.

        Args:
            features: image features of the run's encoder (n, D), of any length; for a run with the adapter adaptformer
                or the feature pre-projection, tokens from its cache (n, S, W). For a run of two encoders those of both
                side by side, as the cache that :func:`ulfine_fast.cache.two_encoders.beside` makes holds them.
            exact: whether to compute in float64, so that a row's logits do not depend on the rows beside it.

        Returns:
            Logits (n, K), float32 or float64.

        Raises:
            InputError: features of another shape, or not finite; or the run failed.
        """
        head, inputs = self._inputs(features, exact)
        with torch.no_grad():
            return np.asarray(head.logits(head.rows(inputs)).to(inputs.dtype).numpy())

    def scores(self, features: ArrayLike | Tensor, *, exact: bool = False) -> NDArray[np.floating[Any]]:
        """How much images look like one of a known class (n,), see :meth:`Head.scores`; arguments as of `logits`."""
        head, inputs = self._inputs(features, exact)
        with torch.no_grad():
            return np.asarray(head.scores(head.rows(inputs)).to(inputs.dtype).numpy())

    def _inputs(self, features: ArrayLike | Tensor, exact: bool) -> tuple[Head, Tensor]:
        """The head, and the features checked, both in float64 where `exact`."""
        head = self.head(torch.float64 if exact else torch.float32)
        # checked in float32 in both cases: a number too large for it counts as not finite
        inputs = _tensor(features, torch.float32)
        if tuple(inputs.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, ("n", *self.input_shape)))
            both = ", those of both encoders side by side" if self.second is not None else ""
            raise InputError(f"features must have shape ({expected}){both}, got {tuple(inputs.shape)}")
        if not bool(torch.isfinite(inputs).all()):
            raise InputError("features must be finite, got NaN or infinity; extract these images again")
        return head, _tensor(features, torch.float64) if exact else inputs

    def predict_proba(self, features: ArrayLike | Tensor) -> NDArray[np.float32]:
        """Class probabilities (n, K) of features (n, D), at the temperature fitted on validation."""
        return metrics.softmax(self.logits(features) / self.metrics.get("temperature", 1.0)).astype(np.float32)

    def predict(self, features: ArrayLike | Tensor) -> NDArray[np.int64]:
        """Class indices (n,) of features (n, D)."""
        return self.logits(features).argmax(axis=1).astype(np.int64)

    def reject(self, features: ArrayLike | Tensor, rate: float = 0.05) -> NDArray[np.bool_]:
        """Which images of features (n, D) are none of the classes (n,).

        Args:
            features: as for :meth:`logits`.
            rate: fraction of the known classes' images that may be rejected, above 0 and below 1.

        Raises:
            InputError: another rate, or a run without held-out labels.
        """
        return reject(self.calibrated(), self.scores(features), rate).rejected

    def predict_sets(self, features: ArrayLike | Tensor, coverage: float = 0.9) -> NDArray[np.bool_]:
        """The classes of each image of features (n, D) that cannot be excluded (n, K), class by class.

        Args:
            features: as for :meth:`logits`.
            coverage: fraction of images whose set holds their class, above 0 and below 1.

        Raises:
            InputError: another coverage, or a run without held-out labels.
        """
        return class_sets(self.calibrated(), self.predict_proba(features), coverage).sets

    def calibrated(self) -> Calibration:
        """What rejection and sets are calibrated on.

        Raises:
            InputError: the run was saved by a version that kept none.
        """
        if self.calibration is None:
            raise InputError(
                "this run was saved without scores of held-out labels, on which rejection and sets are calibrated; fit "
                "it again"
            )
        return self.calibration

    def save(self, folder: str | Path) -> Path:
        """Write the run folder; replaces an earlier run there.

        Raises:
            InputError: the folder holds something else, another process writes there, or it cannot be written; or the
                run failed.
        """
        self.refuse_failed()
        write_run(self, Path(folder))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            InputError: no run there, of another version, or damaged.
        """
        folder = Path(folder)
        if not (folder / "config.json").exists():
            inner = sorted(folder.glob("*/config.json"))
            if inner:
                raise InputError(f"{folder} holds {len(inner)} runs; name one, such as {inner[0].parent}")
            raise InputError(f"{folder} is no run: it has no config.json; name a folder that `ulfine-fast fit` wrote")
        files = load_run(folder)
        if files.encoder:
            refuse_incomplete_encoder(files.encoder, folder)
        predictions = files.test_predictions()
        run = cls(
            config=FitConfig.from_dict(files.config, saved=True),
            class_names=files.class_names,
            tensors=files.heads(),
            metrics=files.metrics,
            split=files.split(),
            history=files.history_rows(),
            test_ids=predictions.ids,
            test_labels=predictions.labels,
            test_probabilities=predictions.probabilities,
            encoder=files.encoder or None,
            cache_path=None if files.cache is None else Path(files.cache),
            status=files.status,
            relabeled=files.relabeled,
            second=_second(files, folder),
            held_out=_held_out(files),
            calibration=files.calibration(),
        )
        run.refuse_other_tensors(folder / "heads.safetensors")
        return run

    def refuse_other_tensors(self, file: Path) -> None:
        """Refuse tensors, read from a file, that are not those of the run's method and classes.

        Raises:
            InputError: the logits of one row cannot be computed, or are those of another number of classes.
        """
        try:
            with torch.no_grad():
                head = self.head()
                classes = head.logits(head.rows(torch.zeros(1, *self.input_shape))).shape[-1]
        # a tensor that is missing, of another shape or of another type, wherever the method uses it
        except Exception as error:
            reason = one_line(error)
            raise InputError(f"{file} does not fit the settings beside it ({reason}); fit the run again") from error
        if classes != len(self.class_names):
            raise InputError(f"{file} is of {classes} classes, not {len(self.class_names)}; fit the run again")

    @property
    def failure(self) -> str | None:
        """Where a failed run diverged, in a sentence; None for others."""
        if self.status != "failed":
            return None
        return (
            f"seed {self.config.seed} of {self.config.method} diverged: its loss or weights were not finite at "
            f"step {self.metrics['failed_at']}; lower lr (now {self.config.lr:g})"
        )

    def refuse_failed(self) -> None:
        """Refuse to go on with a failed run.

        Raises:
            InputError: the run failed.
        """
        if self.failure is not None:
            raise InputError(self.failure)


def _held_out(files: RunFiles) -> HeldOut | None:
    """The images of cross-validation in a run folder, None where there are none."""
    if not files.is_cross_validated:
        return None
    rows = files.predictions()
    if not rows.ids or rows.correct is None:
        return None
    return HeldOut(rows.ids, rows.labels, rows.probabilities, rows.correct)


def refuse_incomplete_encoder(encoder: dict[str, Any], folder: Path) -> None:
    """Refuse a record, read from config.json in `folder`, that predictions and model cards cannot be made of.

    Raises:
        InputError: names what is missing.
    """
    for name in _ENCODER:
        # a model is not always one of several trainings
        if name not in encoder or (encoder[name] is None and name != "pretrained"):
            raise InputError(f"config.json in {folder} does not say the encoder's {name}; fit the run again")


def describe_encoder(cache: FeatureCache) -> dict[str, Any] | None:
    """A run's record of the model its features came from; None for a cache in memory."""
    if cache.manifest is None:
        return None
    manifest = cache.manifest.to_dict()
    return {**manifest["model"], **{name: manifest[name] for name in ("preprocessing", "exact", "mean", "std")}}


def describe_second(cache: FeatureCache) -> SecondEncoder | None:
    """A run's record of its second encoder; None for a cache of one."""
    if cache.second is None:
        return None
    path = cache.second.path
    return SecondEncoder(describe_encoder(cache.second), None if path is None else path.resolve())


def _second(files: RunFiles, folder: Path) -> SecondEncoder | None:
    if files.second is None:
        return None
    encoder, path = files.second.get("encoder") or None, files.second.get("cache")
    if encoder is not None:
        refuse_incomplete_encoder(encoder, folder)
    return SecondEncoder(encoder, None if path is None else Path(path))


def _tensor(values: ArrayLike | Tensor, dtype: torch.dtype) -> Tensor:
    """Any array as a tensor on the CPU; torch takes no NumPy array of negative strides or of another byte order."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", dtype)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64 if dtype is torch.float64 else np.float32))
