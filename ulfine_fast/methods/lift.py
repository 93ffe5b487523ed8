"""LIFT's recipe on cached features: lightweight supervised fine-tuning with logit adjustment (arXiv 2309.10019).

Kept: cosine classifier of scale 25, semantic-aware initialisation, logit adjustment with tau 1, SGD with momentum 0.9
and a half cosine. Not reproduced over a cache: AdaptFormer inside every block (one adapter behind the encoder replaces
it), fresh crops for each step (an image has the plain and the weak views that were extracted), five-crop predictions.
"""

from __future__ import annotations

import math
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.methods.base import LabeledOptions
from ulfine_fast.methods.lightweight import Lightweight
from ulfine_fast.methods.registry import register


@register("lift", options=LabeledOptions, source="LIFT, arXiv 2309.10019")
class Lift(Lightweight):
    """Adapter and linear head on CE(z + tau log pi, y), from the textual prototypes; labelled images alone."""

    uses_unlabeled = False


def lift_settings(labeled: int, classes: int, layers: int = 1) -> dict[str, Any]:
    """LIFT's published settings as options of FitConfig (arXiv 2309.10019, and its released code).

    Args:
        labeled: labelled images trained on; 10 epochs of mini-batches of 128 are counted in them.
        classes: K.
        layers: how many blocks share the adapters' parameters; the cache allows for one adapter.

    Returns:
        Settings: steps, batch size, learning rate 0.01, and rank 2^floor(log2(K / (2 layers))), at least 1.

    Raises:
        InputError: no labelled image, no class or no layer.
    """
    if min(labeled, classes, layers) < 1:
        raise InputError(f"labelled images, classes and layers must be at least 1, got {(labeled, classes, layers)}")
    # an epoch of the paper has a smaller last batch; the engine draws with replacement and has none
    size = 128
    rank = 2 ** max(0, math.floor(math.log2(classes / (2 * layers))))
    steps = 10 * math.ceil(labeled / size)
    return {
        "steps": steps,
        "batch_labeled": size,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "rank": rank,
        "scale": 25.0,
        "tau": 1.0,
        "feature_noise": 0.0,
    }
