"""Checks before training: trials that the cache or the split does not allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split
from ulfine_fast.methods import registry
from ulfine_fast.methods.registry import method_of

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


def check_tokens(cache: FeatureCache, configs: Sequence[FitConfig]) -> None:
    """Refuse trials on tokens of the encoder's last block where something is missing for them.

    Raises:
        InputError: a cache without the tokens, a method that takes none, or noise on them.
    """
    for config in configs:
        if not config.reads_tokens:
            continue
        if config.adapter == "adaptformer" and cache.trainable_tokens != ["pre", "post"]:
            raise InputError(
                "adapter adaptformer trains on the tokens of the encoder's last block, which this cache does not hold; "
                "extract again with --features last-block, or take adapter residual"
            )
        method = method_of(config)
        # one without training steps may read tokens, and trains no adapter on them
        if not method.takes_tokens or (config.adapter == "adaptformer" and not method.trains):
            candidates = {name: registry.find(name).method for name in registry.names()}
            others = [name for name, other in candidates.items() if other.takes_tokens and other.trains]
            raise InputError(f"method {config.method} takes no adapter adaptformer; use one of {', '.join(others)}")
        if config.feature_noise > 0:
            raise InputError(
                f"feature_noise is for features, and {config.reads_tokens_for} trains on tokens; set it to 0"
            )


def check_second(cache: FeatureCache, configs: Sequence[FitConfig]) -> None:
    """Refuse features of a second encoder for methods that read one space.

    Raises:
        InputError: names the methods that read both.
    """
    for config in configs:
        if cache.second is not None and not method_of(config).takes_second:
            others = [name for name in registry.names() if registry.find(name).method.takes_second]
            raise InputError(
                f"method {config.method} reads the features of one encoder; fit it without the second cache, or use "
                f"{', '.join(others)}"
            )


def check_crops(cache: FeatureCache, configs: Sequence[FitConfig]) -> None:
    """Refuse a schedule of crops where there are none, or where their areas are not recorded.

    Raises:
        InputError: says how to extract such crops.
    """
    epochs = max((config.crop_epochs for config in configs), default=0)
    if not epochs or cache.view_areas("weak").any():
        return
    views = cache.views("weak").shape[1]
    lacking = "does not say how much of an image its views show" if views else "holds no weak views"
    raise InputError(
        f"crop_epochs is {epochs} and this cache {lacking}; extract the images again with --weak 4 --smallest-crop "
        "0.08, or set crop_epochs to 0"
    )


def check_labels(config: FitConfig, split: Split) -> None:
    """Refuse a method that learns from labelled images where there are none.

    Raises:
        InputError: names the method.
    """
    if method_of(config).uses_labels and not len(split.labeled):
        raise InputError(
            f"method {config.method} learns from labelled images and this split has none; label some, or use one of "
            f"{', '.join(name for name in registry.names() if not registry.find(name).method.uses_labels)}"
        )


def check_held_out(cache: FeatureCache, split: Split) -> None:
    """Refuse to train on images that are for validation or testing in this cache, which have no views.

    Raises:
        InputError: names the first such image, or one of a labelled role whose label the cache does not know.
    """
    trained = np.concatenate([split.labeled, split.unlabeled])
    held_out = trained[np.isin(cache.splits[trained], ("val", "test"))]
    if len(held_out):
        name, role = cache.ids[held_out[0]], cache.splits[held_out[0]]
        raise InputError(f"the split trains on {name!r}, a {role} image of this cache; use the cache it was made on")
    for role, rows in (("labelled", split.labeled), ("val", split.val), ("test", split.test)):
        unknown = rows[cache.labels[rows] < 0]
        if len(unknown):
            name = cache.ids[unknown[0]]
            raise InputError(f"the split takes {name!r} as {role}, and this cache knows no label for it")
