"""Options of multi-label trials: type, default, range and help. The command line is made from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.config import check, option

METHODS = ("comic", "asymmetric", "bce")


@dataclass(frozen=True, slots=True)
class MultiLabelConfig:
    """One multi-label trial.

    Structural fields are the same for all trials that are trained together. Values are those of COMIC's released code
    where it has them (arXiv 2304.10539); the formulas are in `comic` and `losses` of this package.

    Raises:
        InputError: a value outside its range or not among its choices.
    """

    method: str = option("comic", "what to fit", choices=METHODS, structural=True)
    seed: int = option(0, "seed of initial weights and mini-batches", low=0, high=2**31 - 1)
    split_seed: int | None = option(None, "seed of what is held out; default: the seed", low=0, high=2**31 - 1)
    test_fraction: float = option(
        0.2, "fraction held out for testing where the cache has no test split", low=0.01, high=0.9
    )
    unknown: str = option(
        "negative", "what an unknown label counts as until it is restored", choices=("negative", "ignore")
    )
    start: str = option(
        "auto", "class vectors to start from; auto: texts where the cache has all", choices=("auto", "text", "random")
    )

    steps: int = option(600, "mini-batch steps", low=1, structural=True)
    batch: int = option(64, "images in a mini-batch", low=1, structural=True)
    lr: float = option(0.1, "peak learning rate of SGD; cosine schedule to zero", low=0.0)
    momentum: float = option(0.9, "momentum of SGD", low=0.0, high=0.999)
    weight_decay: float = option(5e-4, "weight decay of SGD", low=0.0)
    scale: float = option(16.0, "factor rho on normalised scores", low=0.1)
    bias: float = option(-3.0, "logit of every class before training", low=-20.0, high=20.0)

    gamma_positive: float = option(0.0, "asymmetric, comic: focusing power of present labels", low=0.0)
    gamma_negative: float = option(3.0, "asymmetric, comic: focusing power of absent labels", low=0.0)
    clip: float = option(
        0.05, "asymmetric, comic: probability up to which an absent label costs nothing", low=0.0, high=0.9
    )

    tail_positive: float = option(0.0, "comic: weight of a class's rarity in the power of present labels", low=0.0)
    tail_negative: float = option(1.0, "comic: weight of a class's rarity in the power of absent labels", low=0.0)
    rarity_power: float = option(
        1 / 3, "comic: power of 1 - log(n_k / max n), a class's rarity; 0: all classes alike", low=0.0
    )
    correction: float = option(0.2, "comic: weight of the loss on corrected labels; 0: none", low=0.0)
    threshold: float = option(0.7, "comic: probability above which an unknown label is restored", low=0.0, high=1.0)
    mean_momentum: float = option(
        0.9, "comic: decay of the running class means that a restored label must exceed too", low=0.0, high=0.9999
    )
    correct_after: float = option(
        0.1, "comic: fraction of the steps before the first label is restored", low=0.0, high=1.0
    )
    margin: float = option(
        1.0, "comic: margin subtracted from the logits of present labels in the loss on corrected ones", low=0.0
    )
    balance: bool = option(True, "comic: a head, a tail and a balanced classifier instead of one", structural=True)
    balance_weight: float = option(
        1.0, "comic: weight lambda_b of what the balanced classifier learns from the other two", low=0.0
    )
    balance_power: float = option(2.0, "comic: power alpha of the losses that weigh head against tail", low=0.0)
    shift: float = option(
        1.0,
        "comic: how much of the mean feature's part of a score the head classifier subtracts and the tail one adds",
        low=0.0,
    )
    feature_momentum: float = option(0.9, "comic: momentum mu of the mean feature", low=0.0, high=0.9999)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check(spec, getattr(self, spec.name))

    @property
    def data_seed(self) -> int:
        """The seed of the split: `split_seed`, or `seed` where that is None."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def heads(self) -> int:
        """How many classifiers are trained side by side; the first predicts."""
        return 3 if self.method == "comic" and self.balance else 1

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MultiLabelConfig:
        """The inverse of `dataclasses.asdict`.

        Raises:
            InputError: a name that is no field.
        """
        names = [spec.name for spec in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            hint = did_you_mean(unknown[0], names, f"the settings are {', '.join(names)}")
            raise InputError(f"unknown setting {unknown[0]!r}{hint}")
        return cls(**values)


def structural_key(config: MultiLabelConfig) -> tuple[Any, ...]:
    """The values that trials must agree in to be trained together."""
    return tuple(getattr(config, spec.name) for spec in dataclasses.fields(config) if spec.metadata["structural"])


def per_trial_fields() -> list[str]:
    """Names of the real-valued fields, which may differ between trials that are trained together."""
    return [spec.name for spec in dataclasses.fields(MultiLabelConfig) if spec.type == "float"]
