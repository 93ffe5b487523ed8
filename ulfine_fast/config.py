"""Every option of stage 2, once: type, default, range, help. Options of a single method lie beside the method.

The command line, the spaces of sweeps, the parameters of the estimators and the tables of the documentation are made
from these declarations.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean, one_of
from ulfine_fast.cache.io.toml import parse_toml, toml_bytes
from ulfine_fast.methods import registry

# first line of a file that a sweep wrote, see `ulfine_fast.search.leaderboard.write_best`
_OF_A_SWEEP = re.compile(rb"# trial \d+ of a sweep by ulfine-fast ")
# methods that a message names; more of them are counted
_MOST_NAMED = 6

UNNAMED_METHOD = "ulfine"
"""The method of saved settings that name none: it was the default of version 0.1, whose sweeps left it out."""

SHAPES = ("consistent", "uniform", "reversed", "middle", "head-tail", "shuffled", "natural")
"""How the unlabelled images are distributed over the classes, see docs/method.md."""


def option(
    default: Any,
    text: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    structural: bool = False,
    search: Mapping[str, Any] | list[Any] | None = None,
    was: tuple[str, ...] = (),
    off: Any = None,
    tokens: str | None = None,
    panel: str = "Method",
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: its value where none is given.
        text: help, one phrase.
        low: smallest legal number.
        high: largest legal number.
        choices: all legal texts.
        structural: all trials of one trial batch must agree in it.
        search: what a sweep tries by default, as in a space file; None leaves the option at its value.
        was: names that it had in earlier versions.
        off: value that switched the method off where it was an option of another one, see `Registration.replaces`.
        tokens: the value with which a trial trains on tokens of the encoder's last block instead of features.
        panel: heading under which help shows it.
    """
    return field(
        default=default,
        metadata={
            "help": text,
            "low": low,
            "high": high,
            "choices": choices,
            "structural": structural,
            "search": search,
            "was": was,
            "off": off,
            "tokens": tokens,
            "panel": panel,
        },
    )


class _ByMethod(type):
    """Makes `FitConfig(method=..., ...)` an instance of the config class of that method."""

    def __call__(cls, **values: Any) -> Any:
        values = renamed(values)
        target = config_class(values.get("method", FitConfig.method))
        legal = {spec.name for spec in dataclasses.fields(target)}
        if any(name not in legal for name in values):
            values = _moved(values)
            target = config_class(values["method"])
        return type.__call__(target, **values)


@dataclass(frozen=True, kw_only=True)
class FitConfig(metaclass=_ByMethod):
    """One trial: its data split, method, optimiser and heads, and the options of its method.

    The attributes below are shared by all methods; the instance has those of its method too:
    `FitConfig(method="ulfine", mu=0.1).mu`. Structural options (see :func:`structural_key`) are the same for all trials
    of one trial batch; everything else may differ from trial to trial. docs/method.md names the source of each formula.

    Raises:
        InputError: a value outside its range or not among its choices, or an option that the method does not read.
    """

    method: str = option("ulfine_plus", "what to fit; `ulfine-fast methods` lists all", structural=True, panel="Fit")
    seed: int = option(0, "seed of weights and mini-batches", low=0, high=2**31 - 1, panel="Fit")

    # -- split (docs/method.md, section "Protocol")
    split_seed: int | None = option(
        None, "seed of split and class order; default: the seed", low=0, high=2**31 - 1, panel="Split"
    )
    n1: int | None = option(None, "labelled images of the largest class; default: all", low=1, panel="Split")
    m1: int | None = option(None, "unlabelled images of the largest class; default: all", low=0, panel="Split")
    gamma_l: float = option(100.0, "labelled imbalance, largest class over smallest, with n1", low=1.0, panel="Split")
    gamma_u: float = option(100.0, "unlabelled imbalance, with n1", low=1.0, panel="Split")
    shape: str = option("consistent", "class prior of unlabelled images, with n1", choices=SHAPES, panel="Split")
    labeled_in_unlabeled: bool = option(False, "labelled images are also unlabelled ones", panel="Split switches")
    permute_classes: bool = option(True, "order of classes from the split seed, with n1", panel="Split switches")
    labeled_fraction: float = option(
        1.0, "fraction of each class's labels kept, without n1", low=0.0, high=1.0, panel="Split"
    )
    val_fraction: float = option(
        0.1, "fraction of labelled images held out for validation", low=0.0, high=0.5, panel="Split"
    )
    test_fraction: float | None = option(
        None,
        "fraction held out for testing, without a test split; default: none, labels are cross-validated; 0.2 with n1",
        low=0.01,
        high=0.9,
        panel="Split",
    )
    cv_folds: int = option(
        10, "folds of the cross-validation of labels; 0: no estimate", low=0, high=100, structural=True, panel="Split"
    )
    cv_repeats: int = option(
        2, "repeats of the cross-validation with other folds", low=1, high=100, structural=True, panel="Split"
    )
    label_noise: float = option(0.0, "fraction of labelled images with a wrong label", low=0.0, high=1.0, panel="Split")

    # -- optimiser
    steps: int = option(500, "mini-batch steps", low=1, structural=True, panel="Optimiser")
    batch_labeled: int = option(32, "labelled images in a mini-batch", low=1, structural=True, panel="Optimiser")
    batch_unlabeled: int = option(64, "unlabelled images in a mini-batch", low=1, structural=True, panel="Optimiser")
    lr: float = option(
        0.01,
        "peak learning rate of SGD; cosine schedule",
        low=0.0,
        search={"low": 0.003, "high": 0.3, "log": True},
        panel="Optimiser",
    )
    momentum: float = option(0.9, "momentum of SGD", low=0.0, high=0.999, panel="Optimiser")
    weight_decay: float = option(
        5e-4,
        "weight decay of SGD",
        low=0.0,
        search={"low": 1e-5, "high": 1e-2, "log": True},
        panel="Optimiser",
    )
    warmup: float = option(
        0.5,
        "fraction of steps over which the unlabelled loss rises",
        low=0.0,
        high=1.0,
        search={"low": 0.0, "high": 1.0},
        panel="Optimiser",
    )
    precision: str = option(
        "float32",
        "precision of a training step; bf16 rounds the inputs of matrix products to bfloat16 and sums in float32, amp "
        "computes the logits under autocast",
        choices=("float32", "bf16", "amp"),
        structural=True,
        panel="Optimiser",
    )
    eval_every: int = option(50, "steps between two validations", low=1, structural=True, panel="Optimiser")
    select: str = option("last", "heads of which validation are kept", choices=("last", "best"), panel="Optimiser")
    patience: int = option(0, "validations without progress before a trial stops; 0: never", low=0, panel="Optimiser")
    crop_epochs: int = option(0, "epochs of a schedule of crops, small to whole; 0: none", low=0, panel="Optimiser")

    # -- heads
    scale: float = option(25.0, "cosine scale sigma of all heads (LIFT uses 25)", low=0.01, panel="Heads")
    adapter: str = option(
        "residual",
        "adapter before the heads",
        choices=("residual", "none", "adaptformer"),
        structural=True,
        tokens="adaptformer",
        panel="Heads",
    )
    rank: int = option(16, "width of the adapter's bottleneck", low=1, panel="Heads")
    adapter_scale: float = option(
        0.1,
        "factor s of the adapter's output",
        low=0.0,
        search={"low": 0.03, "high": 0.5, "log": True},
        panel="Heads",
    )
    feature_noise: float = option(
        0.0,
        "length of noise on training features; replaces strong views",
        low=0.0,
        search=[0.0, 0.25, 0.5, 1.0],
        panel="Heads",
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check(spec, getattr(self, spec.name))
        if self.cv_folds == 1:
            raise InputError("cv_folds must be 0, for no estimate, or at least 2, got 1")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option of the method."""

    @property
    def data_seed(self) -> int:
        """The seed of the split: `split_seed`, or `seed` where none is given."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def reads_tokens(self) -> bool:
        """Whether the trial trains on the last block's tokens instead of features."""
        return bool(self.reads_tokens_for)

    @property
    def reads_tokens_for(self) -> str:
        """The option by which the trial trains on tokens, for messages, such as "adapter adaptformer"; else empty."""
        for spec in dataclasses.fields(self):
            value = spec.metadata["tokens"]
            if value is not None and getattr(self, spec.name) == value:
                return f"{spec.name} {value}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values."""
        return dataclasses.asdict(self)

    def with_method(self, method: str, **changes: Any) -> FitConfig:
        """A config of another method with the same options, as far as that method reads them, but for `changes`."""
        return FitConfig(**{**readable(method, self.to_dict()), **changes, "method": method})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, saved: bool = False) -> FitConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            values: options by name.
            saved: whether they come from a run or sweep, which in version 0.1 recorded the options of all methods:
                options that other methods read are left out, and a missing method is :data:`UNNAMED_METHOD`.

        Raises:
            InputError: a name that is no option, or an option that the method does not read.
        """
        if not saved:
            return FitConfig(**values)
        with warnings.catch_warnings():
            # a file keeps the names of the version that wrote it, and the reader cannot change them
            warnings.simplefilter("ignore", FutureWarning)
            values = renamed({"method": UNNAMED_METHOD, **values})
            method = values["method"]
            values = renamed({**values, "method": _successor(method, values) or method})
            read = readable(values["method"], values)
            for name in values.keys() - read.keys():
                if not registry.readers(name):
                    raise _unknown(name, values["method"])
            return FitConfig(**read)

    def __reduce__(self) -> tuple[Any, ...]:
        # the class of a method's configs is made at run time, so pickle cannot import it by name
        return _restored, (self.to_dict(),)


def read_options(path: Path) -> dict[str, Any]:
    """The options in a flat TOML file: one of `fit --config`, or best.toml of a sweep.

    Raises:
        InputError: no such file, or not TOML.
    """
    data = toml_bytes(path)
    content = parse_toml(data, str(path))
    # sweeps of this version name the method, those of version 0.1 did where the space did
    return {"method": UNNAMED_METHOD, **content} if _OF_A_SWEEP.match(data) else content


def _restored(values: dict[str, Any]) -> FitConfig:
    return FitConfig(**values)


_CLASSES: dict[tuple[Any, ...], type[FitConfig]] = {}


def config_class(method: str) -> type[FitConfig]:
    """The class of a method's configs: the shared options and the method's own.

    Raises:
        InputError: an unknown method, one whose option has the name of a shared one, or a default of no shared option.
    """
    registration = registry.find(method)
    options, defaults = registration.options, registration.defaults
    key = (options, *sorted(defaults.items()))
    if key not in _CLASSES:
        shared = {spec.name: spec for spec in dataclasses.fields(FitConfig)}
        own = []
        for spec in dataclasses.fields(options):
            if spec.name in shared:
                raise InputError(f"option {spec.name} of method {method} is a shared option; give it another name")
            own.append((spec.name, spec.type, field(default=spec.default, metadata=spec.metadata)))
        for name, default in defaults.items():
            if name not in shared:
                raise InputError(f"method {method} has a default of {name!r}, which is no shared option; remove it")
            own.append((name, shared[name].type, field(default=default, metadata=shared[name].metadata)))
        _CLASSES[key] = dataclasses.make_dataclass("FitConfig", own, bases=(FitConfig,), frozen=True, kw_only=True)
    return _CLASSES[key]


def options_of(method: str) -> dict[str, dataclasses.Field[Any]]:
    """All options that a method reads by name, the shared ones first."""
    return {spec.name: spec for spec in dataclasses.fields(config_class(method))}


def shared_options() -> dict[str, dataclasses.Field[Any]]:
    """The options that every method reads, by name."""
    return {spec.name: spec for spec in dataclasses.fields(FitConfig)}


def own_options(method: str) -> dict[str, dataclasses.Field[Any]]:
    """The options that lie beside a method, by name."""
    return {spec.name: spec for spec in dataclasses.fields(registry.find(method).options)}


def all_options() -> dict[str, dataclasses.Field[Any]]:
    """The options of all methods by name; of several with one name, the first method's. Imports all methods."""
    own = [own_options(method) for method in registry.names()]
    return {name: spec for options in [*reversed(own), shared_options()] for name, spec in options.items()}


def readable(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that a method reads."""
    options = options_of(method)
    return {name: value for name, value in values.items() if name in options}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with old names of options replaced by the new ones, with a warning for each."""
    known = options_of(str(values.get("method", FitConfig.method)))
    if all(name in known for name in values):
        return dict(values)
    old = {was: name for name, spec in known.items() for was in spec.metadata["was"]}
    for name in [name for name in values if name in old and name not in known]:
        message = f"the option {name} is now called {old[name]}; the old name will be refused in the next release"
        warnings.warn(message, FutureWarning, stacklevel=3)
    return {name if name in known else old.get(name, name): value for name, value in values.items()}


def structural_key(config: FitConfig) -> tuple[Any, ...]:
    """The values that trials must share to be trained in one trial batch."""
    return tuple(getattr(config, spec.name) for spec in dataclasses.fields(config) if spec.metadata["structural"])


_SPLIT_OPTIONS = (
    "n1",
    "m1",
    "gamma_l",
    "gamma_u",
    "shape",
    "labeled_in_unlabeled",
    "permute_classes",
    "labeled_fraction",
    "val_fraction",
    "test_fraction",
)


def split_key(config: FitConfig) -> tuple[Any, ...]:
    """The values that decide which images a trial trains on: configs that agree in them have one split."""
    return (config.data_seed, *(getattr(config, name) for name in _SPLIT_OPTIONS))


def per_trial_options(config: FitConfig) -> list[str]:
    """Names of the numeric options that may differ from trial to trial inside one trial batch."""
    types = ("float", "bool", "int")
    return [spec.name for spec in dataclasses.fields(config) if not spec.metadata["structural"] and spec.type in types]


def _moved(values: dict[str, Any]) -> dict[str, Any]:
    """The values for the method that an option of version 0.1 has become, with a warning.

    Raises:
        InputError: an option that the method does not read.
    """
    method, is_named = values.get("method", FitConfig.method), "method" in values
    unread = [name for name in values if name not in options_of(method)]
    target = _successor(method, values) or method
    # the successor may have renamed options too
    values = renamed({**values, "method": target})
    legal = options_of(target)
    for name, value in values.items():
        if name not in legal and not _was_off(method, name, value):
            raise _unknown(name, target, is_named=is_named)
    if target == method:
        message = f"method {method} does not read {_listed(unread)} any more; leave it out"
    else:
        message = f"method {method} with {_listed(unread)} is now the method {target}"
    warnings.warn(message, FutureWarning, stacklevel=3)
    return readable(target, values)


def _successor(method: str, values: Mapping[str, Any]) -> str | None:
    """The method that an option among the values turned `method` into in version 0.1, if any."""
    options = options_of(method)
    for name in values:
        for other in () if name in options else registry.readers(name):
            spec = own_options(other).get(name)
            off = None if spec is None else spec.metadata["off"]
            if registry.find(other).replaces == method and off is not None and values[name] != off:
                return other
    return None


def _was_off(method: str, name: str, value: Any) -> bool:
    """Whether an option of version 0.1 has the value by which it did nothing to `method`."""
    others = [other for other in registry.readers(name) if registry.find(other).replaces == method]
    return bool(others) and value == own_options(others[0])[name].metadata["off"]


def _unknown(name: str, method: str, *, is_named: bool = True) -> InputError:
    """Why a method does not take an option; of a default method, also which method to name."""
    readers = registry.readers(name)
    if readers:
        verb = "reads" if len(readers) == 1 else "read"
        other = UNNAMED_METHOD if UNNAMED_METHOD in readers else readers[0]
        fix = "leave it out" if is_named else f"name a method that reads it, such as --method {other}"
        if len(readers) > _MOST_NAMED:
            readers = [*readers[: _MOST_NAMED - 1], f"{len(readers) - _MOST_NAMED + 1} others"]
        return InputError(f"method {method} does not read {name}, which {_listed(readers)} {verb}; {fix}")
    hint = did_you_mean(name, all_options(), f"`ulfine-fast fit --method {method} --help` lists the options")
    return InputError(f"unknown option {name!r}{hint}")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def check(spec: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value of the wrong type, outside its range, or not among its choices.

    Raises:
        InputError: names the option, the value and what is legal.
    """
    name = spec.name
    if value is None:
        if str(spec.type).endswith("| None"):
            return
        raise InputError(f"{name} must be given, got None")
    choices = spec.metadata["choices"]
    if choices:
        if value not in choices:
            raise one_of(name, value, choices)
        return
    kind = str(spec.type).split(" ")[0]
    if kind == "str":
        if not isinstance(value, str):
            raise InputError(f"{name} must be a text, got {value!r}")
        return
    if kind == "bool":
        if not isinstance(value, bool):
            raise InputError(f"{name} must be true or false, got {value!r}")
        return
    numbers = (int,) if kind == "int" else (int, float)
    # whole numbers are first compared: those of hundreds of digits have no float
    whole = isinstance(value, int) and abs(value) < 2**63
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers)
        or not (whole or (isinstance(value, float) and math.isfinite(value)))
    ):
        raise InputError(f"{name} must be {'a whole' if kind == 'int' else 'a finite'} number, got {value!r}")
    low, high = spec.metadata["low"], spec.metadata["high"]
    if value < low:
        raise InputError(f"{name} must be at least {low:g}, got {value}")
    if value > high:
        raise InputError(f"{name} must be at most {high:g}, got {value}")
