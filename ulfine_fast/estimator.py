"""Every method as a scikit-learn classifier over arrays of features, with -1 for rows whose class is not known."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    check_random_state,
    column_or_1d,
    validate_data,
)

from ulfine_fast.cache.arrays import refuse_masked, split_missing
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig, own_options, shared_options
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.fit import fit
from ulfine_fast.methods import registry
from ulfine_fast.runs.calibration import class_sets
from ulfine_fast.runs.calibration import reject as judge
from ulfine_fast.runs.run import Run

UNLABELED = -1
# Options that say which images are labelled, or how a run is watched: the arrays say the first, and no one watches.
_NOT_HERE = {
    *("method", "seed", "split_seed", "n1", "m1", "gamma_l", "gamma_u", "shape", "labeled_in_unlabeled"),
    *("permute_classes", "labeled_fraction", "val_fraction", "test_fraction", "eval_every", "select", "patience"),
    "label_noise",
}
_ESTIMATOR_OPTIONS: dict[str, Any] = {"text_features": None, "val_fraction": 0.0, "device": "auto", "random_state": 0}
# Rows that represent fractional weights, as a multiple of the rows there are.
_FINENESS = 16


def _defaults(method: str | None) -> dict[str, Any]:
    """Parameters and their defaults, made from the options, so that none is written down twice.

    Args:
        method: of a class for one method alone, which then is no parameter; None for all methods: what depends on the
            method, its own options among it, then is None unless it is set.
    """
    shared = {name: spec.default for name, spec in shared_options().items() if name not in _NOT_HERE}
    if method is not None:
        own = {name: spec.default for name, spec in own_options(method).items() if _is_value(spec)}
        return {**_ESTIMATOR_OPTIONS, **shared, **registry.find(method).defaults, **own}
    names = {name for each in registry.names() for name, spec in own_options(each).items() if _is_value(spec)}
    differing = {name for each in registry.names() for name in registry.find(each).defaults}
    unset = dict.fromkeys(sorted(names | differing))
    return {"method": FitConfig.method, **_ESTIMATOR_OPTIONS, **shared, **unset}


def _is_value(spec: dataclasses.Field[Any]) -> bool:
    """Whether an option is more than the path of a file, which says nothing about arrays."""
    return spec.type != "str | None"


def _initializer(method: str | None) -> Any:
    """An `__init__` with a parameter for each option, by which scikit-learn knows them."""

    def __init__(self: FeatureClassifier, **options: Any) -> None:
        # asked now: methods may have been registered since this module was imported
        defaults = _defaults(method)
        unknown = sorted(set(options) - set(defaults))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no parameter {unknown[0]!r}")
        for name, default in defaults.items():
            setattr(self, name, options.get(name, default))

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name, default in _defaults(method).items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return __init__


class FeatureClassifier(ClassifierMixin, BaseEstimator):
    """Any method of this package over features in memory, as a scikit-learn classifier.

    Rows are features of images (n, D), of any length: methods read their direction alone. What a cache holds more is
    optional: texts of the classes, and views of the rows (see `fit`).

    Args:
        method: as `FitConfig.method`.
        text_features: (K, D), or (K, P, D) with P prompts, in the order of `classes_`; a class whose row is NaN, or
            None for all, takes the mean of its labelled rows instead.
        val_fraction: fraction of the labelled rows set aside to fit the temperature of probabilities, 0 to 0.5; with
            0 the temperature is 1.
        device: "auto", "cpu", "cuda" or "cuda:N".
        random_state: seed of everything random; None draws one, which makes each fit another.
        **options: every other option by the name that it has in `FitConfig`, such as `steps`. An option of another
            method than the chosen one is refused by `fit`.

    Attributes:
        classes_: (K,), sorted.
        n_features_in_: D.
        run_: the fitted `Run`.
    """

    _method: str | None = None
    classes_: NDArray[Any]
    n_features_in_: int
    run_: Run

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            method: str = FitConfig.method,
            text_features: ArrayLike | None = None,
            val_fraction: float = 0.0,
            device: str = "auto",
            random_state: int | np.random.RandomState | None = 0,
            **options: Any,
        ) -> None: ...
    else:
        __init__ = _initializer(None)

    @classmethod
    def _get_param_names(cls) -> list[str]:
        # scikit-learn reads the signature, which does not know of methods registered later
        return sorted(_defaults(cls._method))

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        weak: ArrayLike | None = None,
        strong: ArrayLike | None = None,
    ) -> FeatureClassifier:
        """Trains on labelled and unlabelled rows.

        Their order does not matter: rows are sorted first, so that a row with a weight of two is the same as two rows.

        Args:
            X: features (n, D).
            y: (n,) classes of any type; -1, "-1" and what is missing (None, NaN, `pandas.NA`, null, masked) mark rows
                without one. Where y is all -1 and one other number, as in two-class problems of old, both are classes.
            sample_weight: (n,) at least 0; 0 leaves a row out. Weights that are not whole are approximated.
            weak: features of weakly augmented views (n, V, D); by default the rows themselves.
            strong: of strongly augmented views (n, V, D), likewise.

        Raises:
            InputError: a setting out of range, fewer than two classes, shapes that do not fit.
        """
        if y is None:
            raise InputError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        refuse_masked("X", X)
        rows: NDArray[np.float64] = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        weights = _check_sample_weight(sample_weight, rows, dtype=np.float64, ensure_non_negative=True)
        names, known = self._labels(y, weights)
        self.classes_, codes = np.unique(names, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y must hold at least two classes, got 1 class: {self.classes_.tolist()}")
        classes = np.full(len(rows), UNLABELED, dtype=np.int64)
        classes[known] = codes
        order = _sorted_rows(rows, classes, _multiplicity(weights))
        config = self._config()
        cache = self._cache(rows, classes, weak, strong)
        split = _split(order, classes, len(self.classes_), self.val_fraction, config.seed)
        self.run_ = fit(cache, config, split=split, device=self.device, progress=False)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Logits (n, K); of two classes the second's lead over the first (n,)."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities (n, K), in the order of `classes_`."""
        logits = self._logits(X) / self.run_.metrics.get("temperature", 1.0)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def predict(self, X: ArrayLike, *, reject: float | None = None) -> NDArray[Any]:
        """Classes (n,).

        Args:
            X: features (n, D).
            reject: fraction of the known classes' rows that may be rejected as none of the classes, such as 0.05; these
                are -1, or "-1" among texts, as rows without a class are in `fit`. None rejects none.

        Raises:
            InputError: a fraction outside 0..1, or no labels that were held out: see `predict_sets`.
        """
        rows = self._rows(X)
        logits = self.run_.logits(rows, exact=True)
        predicted: NDArray[Any] = self.classes_[logits.argmax(axis=1)]
        if reject is None:
            return predicted
        if np.isin(str(UNLABELED), self.classes_.astype(str)):
            raise InputError(
                f"a class is called {UNLABELED}, which marks rejected rows; rename it, or leave out reject"
            )
        rejected = judge(self.run_.calibrated(), self.run_.scores(rows, exact=True), reject).rejected
        texts = isinstance(self.classes_[0], str)
        # of 64 bits, so that NumPy takes a type that holds both
        return np.where(rejected, str(UNLABELED) if texts else np.int64(UNLABELED), predicted)

    def predict_sets(self, X: ArrayLike, coverage: float = 0.9) -> NDArray[np.bool_]:
        """The classes of each row that cannot be excluded (n, K), in the order of `classes_`.

        They are calibrated class by class on labelled rows that were held out: those of `val_fraction`, and those of
        the folds of a method with folds, such as ulfine_plus.

        Args:
            X: features (n, D).
            coverage: fraction of rows whose set holds their class, above 0 and below 1.

        Raises:
            InputError: another coverage, or no labels that were held out.
        """
        probabilities = self.predict_proba(X)
        return class_sets(self.run_.calibrated(), probabilities, coverage).sets

    def _rows(self, X: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self, "run_")
        refuse_masked("X", X)
        rows: NDArray[np.float64] = validate_data(self, X, dtype=np.float64, reset=False)
        return rows

    def _logits(self, X: ArrayLike) -> NDArray[np.float64]:
        rows = self._rows(X)
        return self.run_.logits(rows, exact=True).astype(np.float64)

    def _labels(self, y: ArrayLike, weights: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The known classes of rows that count, and which rows these are."""
        values, missing = split_missing(y)
        labels: NDArray[Any] = column_or_1d(values, warn=True, dtype=None)
        if len(labels) != len(weights):
            raise InputError(f"X has {len(weights)} rows and y {len(labels)}; they must be as many")
        known = np.flatnonzero(_is_known(labels, missing.reshape(-1)) & (weights > 0))
        if labels.dtype.kind == "f":
            check_classification_targets(labels[known])
        return labels[known], known

    def _config(self) -> FitConfig:
        """The options as the engine takes them."""
        method = self._method or self.method
        values = {name: _plain(getattr(self, name)) for name in _defaults(self._method)}
        # None is what depends on the method unless it is set
        options = {
            name: value
            for name, value in values.items()
            if name not in {"method", *_ESTIMATOR_OPTIONS} and value is not None
        }
        seed = self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = check_random_state(seed).randint(2**31 - 1)
        config = FitConfig(method=method, seed=int(seed), **options)
        # nothing is held out for validations before the last step
        return dataclasses.replace(config, eval_every=config.steps)

    def _cache(self, features: NDArray[np.float64], classes: NDArray[np.int64], weak: Any, strong: Any) -> FeatureCache:
        # rows without views of their own are their own views
        views = [features[:, None] if rows is None else np.asarray(rows) for rows in (weak, strong)]
        return FeatureCache.from_arrays(
            features.astype(np.float32),
            classes,
            class_names=[str(name) for name in self.classes_],
            text_features=_texts(self.text_features, features, classes, len(self.classes_)),
            weak=views[0].astype(np.float32),
            strong=views[1].astype(np.float32),
        )


def classifier_of(method: str) -> type[FeatureClassifier]:
    """A classifier class for one method, with its options as parameters.

    Raises:
        InputError: an unknown method.
    """
    name = f"{registry.find(method).method.__name__}Classifier"
    doc = f"{registry.find(method).summary} See `FeatureClassifier`."
    return type(name, (FeatureClassifier,), {"_method": method, "__init__": _initializer(method), "__doc__": doc})


class ULFineClassifier(FeatureClassifier):
    """ULFine (arXiv 2505.05062): prototypes fitted to the images, two fused heads; see `FeatureClassifier`."""

    _method = "ulfine"
    if not TYPE_CHECKING:
        __init__ = _initializer(_method)


class ULFinePlusClassifier(FeatureClassifier):
    """A labelled-only probe and clusters anchored by it, weighed on held-out labels; see `FeatureClassifier`."""

    _method = "ulfine_plus"
    if not TYPE_CHECKING:
        __init__ = _initializer(_method)


class LinearProbeClassifier(FeatureClassifier):
    """Logistic regression on the labelled rows alone; see `FeatureClassifier`."""

    _method = "linear_probe"
    if not TYPE_CHECKING:
        __init__ = _initializer(_method)


class FixMatchClassifier(FeatureClassifier):
    """FixMatch (arXiv 2001.07685) over features; see `FeatureClassifier`."""

    _method = "fixmatch"
    if not TYPE_CHECKING:
        __init__ = _initializer(_method)


def _is_known(y: NDArray[Any], missing: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of (n,) are classes; of them, `missing` have no value."""
    if y.dtype.kind in "OUS":
        # Whatever a missing value is, it may be unable to say what it is equal to.
        return np.array([not (gone or str(v) == str(UNLABELED)) for v, gone in zip(y, missing, strict=True)], np.bool_)
    present = ~missing
    known = (y != UNLABELED) & present
    # two classes may be called -1 and 1; with but one class beside it, -1 could mean nothing else
    return present if len(np.unique(y[known])) == 1 else known


def _multiplicity(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """How often each row counts: its weight where all are whole, else in proportion, at least once unless it is 0."""
    if (weights == np.round(weights)).all():
        return weights.astype(np.int64)
    fractions = np.round(weights / weights.sum() * (_FINENESS * len(weights)))
    return np.where(weights > 0, np.maximum(fractions, 1), 0).astype(np.int64)


def _sorted_rows(
    features: NDArray[np.float64], classes: NDArray[np.int64], times: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Row numbers in an order that depends on what the rows hold alone, each as often as it counts."""
    content = np.ascontiguousarray(np.column_stack([classes, features + 0.0]))  # + 0.0: -0.0 is 0.0
    order = np.argsort(content.view(f"V{content.shape[1] * content.itemsize}")[:, 0], kind="stable")
    return np.repeat(order, times[order])


def _split(rows: NDArray[np.int64], classes: NDArray[np.int64], count: int, val_fraction: float, seed: int) -> Split:
    """What trains with its label, without, and what the temperature is fitted on."""
    if not 0 <= val_fraction <= 0.5:
        raise InputError(f"val_fraction must be between 0 and 0.5, got {val_fraction}")
    labeled, unlabeled = rows[classes[rows] >= 0], rows[classes[rows] < 0]
    held: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    random = np.random.default_rng([seed, 0x5E7])
    for k in range(count):
        own = np.array(list(dict.fromkeys(labeled[classes[labeled] == k].tolist())))
        held.append(random.permutation(own)[: int(val_fraction * len(own))])
    val = np.concatenate(held)
    kept = labeled[~np.isin(labeled, val)]
    order = np.argsort(-np.bincount(classes[kept], minlength=count), kind="stable")
    return Split(kept, unlabeled, val, np.empty(0, np.int64), order)


def _texts(
    text_features: ArrayLike | None, features: NDArray[np.float64], classes: NDArray[np.int64], count: int
) -> NDArray[np.float32] | None:
    """Text features (K, P, D) with means of labelled rows for classes that have none; None where all lack them."""
    if text_features is None:
        return None
    texts = np.array(text_features, dtype=np.float32)
    texts = texts[:, None] if texts.ndim == 2 else texts
    if texts.ndim != 3 or (texts.shape[0], texts.shape[2]) != (count, features.shape[1]):
        raise InputError(
            f"text_features must be ({count}, {features.shape[1]}) or ({count}, P, {features.shape[1]}) for the "
            f"classes and features of this fit, got {np.shape(text_features)}"
        )
    lengths = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    for k in np.flatnonzero(np.isnan(texts).any(axis=(1, 2))):
        texts[k] = (features / lengths)[classes == k].mean(axis=0)
    return texts


def _plain(value: Any) -> Any:
    """Numbers as searches hand them over, such as numpy's, as Python's own."""
    return value.item() if isinstance(value, np.generic) else value
