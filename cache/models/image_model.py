"""Images-only encoders by their timm name, in the form of an open_clip model without a text tower."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean

SCHEME = "timm:"
_LOGIT_SCALE = 100.0  # no text was learned with the images; what features without texts have everywhere here


class ImageModel(nn.Module):
    """A timm model without its classifier: pooled features of images, and no texts.

    Attributes:
        visual: the timm model; its `preprocess_cfg` says how images are read, in open_clip's terms.
        logit_scale: logarithm of the factor on cosine similarities.
    """

    def __init__(self, visual: Any, preprocess: dict[str, Any]) -> None:
        """Takes a model that timm made without a classifier."""
        super().__init__()
        visual.preprocess_cfg = preprocess
        self.visual = visual
        # no weight of the model, so it does not count for its digest
        self.register_buffer("logit_scale", torch.tensor(math.log(_LOGIT_SCALE)), persistent=False)

    def encode_image(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of images (B, 3, H, W)."""
        features: Tensor = self.visual(images)
        return features


def resolve(model: str, pretrained: str | None) -> tuple[str, str | None]:
    """The name and the absolute path of the weights, as a cache records them.

    Args:
        model: `timm:NAME`, or `timm:NAME@SIDE` for another side of the square input than the model's own.
        pretrained: file of weights; None for those that timm loads from a hub.

    Raises:
        InputError: no such model, side or file.
    """
    name, _ = _parts(model)
    if not is_known(name):
        raise InputError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models(), most=3)}")
    if pretrained is None:
        return model, None
    file = Path(pretrained).expanduser()
    if not os.path.isfile(file):
        raise InputError(f"no file of weights at {pretrained}; leave out --pretrained for those of the hub")
    return model, str(file.absolute())


def is_known(name: str) -> bool:
    """Whether timm has a model of that name."""
    return bool(timm.is_model(name))


def create(model: str, pretrained: str | None) -> ImageModel:
    """Makes the model and loads its weights; what the loaders raise is the caller's.

    Args:
        model: as `resolve` returns it.
        pretrained: likewise; a file is read without unpickling anything.
    """
    name, side = _parts(model)
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    # a transformer has as many positions as its input; a convolution takes any
    size = {"img_size": side} if side and known is not None and known.fixed_input_size else {}
    overlay = {} if pretrained is None else {"pretrained_cfg_overlay": {"file": pretrained}}
    # with its classifier, as timm leaves weights random that it does not find where there is to be none
    trunk = timm.create_model(name, pretrained=True, **overlay, **size)
    trunk.reset_classifier(0)
    data = timm.data.resolve_model_data_config(trunk)
    preprocess = {
        "size": side or data["input_size"][-2:],
        "mean": data["mean"],
        "std": data["std"],
        "interpolation": data["interpolation"] if data["interpolation"] == "bilinear" else "bicubic",
    }
    return ImageModel(trunk, preprocess)


def _parts(model: str) -> tuple[str, int | None]:
    """The name in timm and the side of the input, None for the model's own."""
    name, at, side = model.removeprefix(SCHEME).partition("@")
    if not at:
        return name, None
    if not side.isdecimal() or int(side) < 1:
        raise InputError(f"the side of {model} must be a number of pixels, as in {SCHEME}{name}@224")
    return name, int(side)
