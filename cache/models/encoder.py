"""A frozen image-text model of open_clip with its own preprocessing: turns images and texts into unit vectors."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.nn import functional
from torchvision.transforms import Compose

from ulfine_fast.cache.io.device import float32_products, pick_device
from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.io.hub import load_from_hub
from ulfine_fast.cache.io.names import did_you_mean, one_of
from ulfine_fast.cache.models import image_model, lite0_minilm
from ulfine_fast.cache.models.tokens import TokenHooks
from ulfine_fast.cache.pipeline.resample import Resampling

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_PRETRAINED",
    "EncodedViews",
    "Encoder",
    "ModelSpec",
    "cache_home",
    "load_encoder",
]

DEFAULT_MODEL = "ViT-B-16"
DEFAULT_PRETRAINED = "openai"
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of mixed precision by name; the first two are float32, on a GPU exactly or with inputs rounded to TF32."""
_TEXT_BATCH = 128
_SCHEMES = ("local-dir:", "hf-hub:")
_MODELS_FIX = "take a name such as ViT-B-16 of open_clip.list_models(), hf-hub:OWNER/NAME, or local-dir:FOLDER"
_OFFLINE_FIX = f"use --model {lite0_minilm.NAME}, which needs no network, or --pretrained FILE"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What identifies a frozen model.

    Attributes:
        name: an open_clip name, `local-dir:/absolute/path`, `hf-hub:owner/name`, `timm:name`, or `lite0-minilm`.
        pretrained: tag or absolute path of a checkpoint; None where the name alone identifies the weights.
        sha256: over the names, types and bytes of all tensors, so independent of the file's form.
        image_size: side of the square input, in pixels.
        dim: D, length of a feature.
        logit_scale: the factor the model was trained with on cosine similarities (CLIP: about 100).
    """

    name: str
    pretrained: str | None
    sha256: str
    image_size: int
    dim: int
    logit_scale: float


class EncodedViews(NamedTuple):
    """A model's output for N images.

    Attributes:
        features: float32 (N, D), rows of length 1.
        tokens: float32 (N, S, W), not normalised; None where the model was loaded without.
    """

    features: torch.Tensor
    tokens: torch.Tensor | None


class Encoder:
    """A frozen model on a device; made by `load_encoder`.

    Attributes:
        spec: what identifies the model.
        model: the open_clip module, in evaluation mode.
        device: where it runs.
        transform: PIL image -> (3, H, W) float tensor, the model's own evaluation preprocessing.
        resize: PIL image -> PIL image of the model's size, the part of `transform` before the normalisation.
        resampling: the same as `resize` for many images on a device; None where it has no such form.
        exact: whether images go through `resize`, not through `resampling`.
        mean: of the normalisation per channel, for pixel values 0..1.
        std: likewise.
        precision: as given to `load_encoder`.
        dtype: autocast type, None for float32; the vision tower's matrices and filters are then stored in it.
        features: as given to `load_encoder`.
        compiled: whether `torch.compile` has made kernels for the vision tower.
        token_kinds: names of the S tokens kept beside each feature, see `cache.models.tokens.TokenHooks`; often none.
        token_width: W, their length; 0 for none.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        pretrained: str | None,
        *,
        device: torch.device,
        precision: str = "fp32",
        handle: str | None = None,
        features: str = "projected",
        exact: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """Takes a module made by open_clip, which knows its preprocessing.

        Args:
            model: the module.
            name: see `ModelSpec`.
            pretrained: see `ModelSpec`.
            device: see the class.
            precision: see `load_encoder`.
            handle: open_clip's name of the model; `name` by default.
            features: see `load_encoder`.
            exact: see `load_encoder`.
            compiled: see `load_encoder`.

        Raises:
            InputError: a precision that the device does not have, or a model with another kind of input, preprocessing
                or tokens.
        """
        if precision == "tf32" and device.type != "cuda":
            raise InputError(f"precision tf32 is one of CUDA devices, this one is {device.type}; use fp32")
        self.device = device
        self.precision = precision
        self.dtype = dtype = PRECISIONS[precision]
        self.features = features
        self.compiled = compiled
        self._handle = handle or name

        # Preprocessing
        settings = open_clip.get_model_preprocess_cfg(model)
        self.mean: tuple[float, ...] = tuple(float(value) for value in settings["mean"])
        self.std: tuple[float, ...] = tuple(float(value) for value in settings["std"])
        # made once: an upload for each batch would wait for the work before it
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.mean, self.std))
        self.transform: Callable[[Image.Image], torch.Tensor] = image_transform_v2(
            PreprocessCfg(**settings), is_train=False
        )
        self.resize: Callable[[Image.Image], Image.Image] = _before_normalisation(name, self.transform)
        self.resampling: Resampling | None = _resampling(settings)
        if exact is False and self.resampling is None:
            raise InputError(
                f"the images of {name} are padded to a square, which is done exactly or not at all; use --exact"
            )
        self.exact: bool = self.resampling is None if exact is None else exact
        sides = {settings["size"]} if isinstance(settings["size"], int) else set(settings["size"])
        if len(sides) != 1:
            raise InputError(
                f"{name} takes images of {settings['size']} pixels; only models with a square input are supported"
            )
        side = int(sides.pop())

        # Weights; the digest before the model moves, so that nothing is copied back from a GPU
        digest = weights_sha256(model)
        self.model: Any = model.eval().requires_grad_(False).to(device)
        # Convolutions on the CPU prefer the channels last (Lite0: 144 images/s against 92); a ViT does not care. A ViT
        # has one convolution, its patch embedding.
        convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in self.model.visual.modules())
        self._layout = torch.channels_last if convolutions > 4 else torch.contiguous_format
        self.model.visual.to(memory_format=self._layout)

        # Sizes, from a run of the model: configurations name them in too many ways
        self._hooks = TokenHooks(name, self.model.visual, features)
        with torch.inference_mode():
            dim = int(model.encode_image(torch.zeros(1, 3, side, side, device=device)).shape[-1])
        tokens = self._hooks.take()
        self.token_kinds: tuple[str, ...] = self._hooks.kinds
        self.token_width: int = 0 if tokens is None else tokens.shape[-1]
        # The model stores the logarithm; some models store it as a vector of one.
        scale = float(model.logit_scale.detach().float().exp().max())
        self.spec: ModelSpec = ModelSpec(name, pretrained, digest, side, dim, scale)

        # The last layers, before rounding changes the weights
        self._head = self._read_head()
        if dtype is not None:
            _round_weights(self.model.visual, dtype)
        # Last, so that names and digest are those of the model itself.
        if compiled:
            self.model.visual.compile()

    @property
    def reads_texts(self) -> bool:
        """Whether the model has a text tower; a model of timm has none."""
        return not isinstance(self.model, image_model.ImageModel)

    @property
    def preprocessing(self) -> str:
        """The evaluation preprocessing as text, the same in every process."""
        # Functions in a Compose print their addresses, which would make two equal manifests differ.
        return re.sub(r" at 0x[0-9a-f]+", "", str(self.transform))

    @torch.inference_mode()
    def encode_images(self, batch: torch.Tensor) -> torch.Tensor:
        """Features of images.

        Args:
            batch: (B, 3, H, W) float32, already preprocessed.

        Returns:
            (B, D) float32 on the CPU, each row of length 1.
        """
        return self.encode_views(batch).features

    @torch.inference_mode()
    def encode_views(self, pixels: torch.Tensor) -> EncodedViews:
        """Features and tokens of images or of views of them.

        Args:
            pixels: (N, 3, H, W) float32, already preprocessed.

        Returns:
            Features (N, D) and tokens (N, S, W) on the CPU.
        """
        batch = pixels.to(self.device, non_blocking=True).contiguous(memory_format=self._layout)
        rows = self._encode(batch).cpu()
        features, tokens = rows[:, : self.spec.dim], rows[:, self.spec.dim :]
        return EncodedViews(features, tokens.unflatten(1, (-1, self.token_width)) if self.token_kinds else None)

    @torch.inference_mode()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of images of the model's size; nothing waits for a GPU to finish.

        Args:
            pixels: uint8 (B, H, W, 3), as `resize` makes them.

        Returns:
            (B, D + S W) float32 on the device: features of length 1, equal to those of `transform`'s tensors, each
            followed by the image's tokens, if any.
        """
        return self._encode(self.normalise(pixels.to(self.device, non_blocking=True)))

    @property
    def columns(self) -> int:
        """D + S W, numbers in the row of an image."""
        return self.spec.dim + len(self.token_kinds) * self.token_width

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """The last part of `transform` for a batch: uint8 (B, H, W, 3) to float32 (B, 3, H, W), on the device."""
        # Bytes in the order of an image are channels last already; the operations are in torchvision's order.
        images = pixels.permute(0, 3, 1, 2).to(torch.float32).contiguous(memory_format=self._layout)
        return images.div_(255.0).sub_(self._mean).div_(self._std)

    def _encode(self, batch: torch.Tensor) -> torch.Tensor:
        """Preprocessed images (B, 3, H, W) on the device to rows (B, D + S W) there, see `encode_pixels`."""
        mixed = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)
        with mixed, float32_products(self.device, tf32=self.precision == "tf32"):
            features = self.model.encode_image(batch)  # (B, D)
        unit = functional.normalize(features.float(), dim=-1)
        tokens = self._hooks.take()
        return unit if tokens is None else torch.cat([unit, tokens.flatten(1)], dim=1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Features of texts, always in float32 since they are few and every image is compared with them.

        Returns:
            (n, D) float32 on the CPU, each row of length 1.
        """
        if not texts:
            return torch.empty(0, self.spec.dim)
        if not self.reads_texts:
            raise InputError(f"{self.spec.name} encodes images alone; name a model with a text tower, such as ViT-B-16")
        parts = self.tokenize(texts).split(_TEXT_BATCH)
        with float32_products(self.device, tf32=False):
            features = torch.cat([self.model.encode_text(part.to(self.device)) for part in parts])  # (n, D)
        return functional.normalize(features.float(), dim=-1).cpu()

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """What the text tower reads: (n, L) token numbers, truncated to the L tokens of its context."""
        return self._tokenizer(list(texts))

    def vision_head(self) -> dict[str, np.ndarray]:
        """The last layers of an open_clip ViT for the class token, or of a timm trunk whose output is kept.

        Returns:
            `ln_post_weight` (W,), `ln_post_bias` (W,), `ln_post_eps` (1,) and `projection` (W, D), float32; of a trunk
            the projection alone, where it is one matrix; empty for others.
        """
        return self._head

    def _read_head(self) -> dict[str, np.ndarray]:
        visual = self.model.visual
        if self.token_kinds == ("trunk",):
            linear = getattr(visual.head, "proj", None)
            if not isinstance(linear, torch.nn.Linear) or len(list(visual.head.parameters())) != 1:
                return {}
            return {"projection": linear.weight.detach().T.float().cpu().numpy().copy()}
        norm, projection = getattr(visual, "ln_post", None), getattr(visual, "proj", None)
        if not isinstance(norm, torch.nn.LayerNorm) or not isinstance(projection, torch.nn.Parameter):
            return {}
        weights = {"ln_post_weight": norm.weight, "ln_post_bias": norm.bias, "projection": projection}
        head = {name: value.detach().float().cpu().numpy() for name, value in weights.items()}
        head["ln_post_eps"] = np.asarray([norm.eps], dtype=np.float32)
        return head

    @cached_property
    def _tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        # On first use only: encoding images should not need the tokenizer's files.
        try:
            return load_from_hub(
                lambda: open_clip.get_tokenizer(self._handle), f"the tokenizer files of {self._handle}", _OFFLINE_FIX
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"the tokenizer of {self._handle} cannot be loaded ({one_line(error)}); {_OFFLINE_FIX}"
            ) from error


def load_encoder(
    model: str = DEFAULT_MODEL,
    pretrained: str | None = None,
    *,
    device: str = "auto",
    precision: str = "fp32",
    features: str = "projected",
    exact: bool | None = None,
    compiled: bool = False,
) -> Encoder:
    """Loads a model and its weights; a hub is asked only for names whose weights are not on this machine yet.

    Args:
        model: an open_clip name, `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, `timm:NAME` for images alone, or
            `lite0-minilm` (built on first use).
        pretrained: open_clip's tag, or a checkpoint file (read with `weights_only`); only for names of open_clip and
            timm, and "openai" for the default model.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
        precision: "fp32", exact on every device; "tf32", the same on a GPU with inputs of products rounded to 10 bits;
            "bf16" or "fp16" for mixed precision.
        features: "projected"; "pre-projection" to keep also the input of the projection, "last-block" the class token
            before and after the last block's MLP.
        exact: whether the model's own preprocessing resizes and crops every image at full size; else large images are
            reduced while they are read, and a GPU resizes many together. None is False where the model's preprocessing
            allows it.
        compiled: whether to let `torch.compile` make kernels for the vision tower: a minute at first, less time for
            each image. It changes the last bits.

    Raises:
        InputError: unknown model, tag, device or precision; weights that do not fit, or that no hub can be asked for; a
            model without the tokens asked for.
    """
    if precision not in PRECISIONS:
        raise one_of("precision", precision, PRECISIONS)
    target = pick_device(device)
    name, pretrained, handle = _resolve(model, pretrained)
    return Encoder(
        _create(handle, pretrained),
        name,
        pretrained,
        device=target,
        precision=precision,
        handle=handle,
        features=features,
        exact=exact,
        compiled=compiled,
    )


def weights_sha256(model: Any) -> str:
    """Hex digest over name, type, shape and bytes of every tensor of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # Viewed as bytes, because numpy lacks types such as bfloat16; flat, because a scalar has no axis to view.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _resolve(model: str, pretrained: str | None) -> tuple[str, str | None, str]:
    """Name and tag for the record, and open_clip's name; paths become absolute, so that a run works from any folder."""
    if pretrained is not None and (model == lite0_minilm.NAME or model.startswith(_SCHEMES)):
        raise InputError(f"{model} brings its own weights, so leave out --pretrained {pretrained}")
    if model.startswith(image_model.SCHEME):
        name, weights = image_model.resolve(model, pretrained)
        return name, weights, name
    if model == lite0_minilm.NAME:
        return model, None, f"local-dir:{lite0_minilm.ensure_built()}"
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:")).expanduser().absolute()
        if not (folder / "open_clip_config.json").is_file():
            raise InputError(f"no open_clip model in {folder}: open_clip_config.json is missing")
        return f"local-dir:{folder}", None, f"local-dir:{folder}"
    if model.startswith("hf-hub:"):
        return model, None, model
    known = open_clip.list_models()
    if model not in known:
        if image_model.is_known(model):
            raise InputError(f"unknown model {model!r}; for images alone name {image_model.SCHEME}{model}")
        hint = did_you_mean(model, [*known, lite0_minilm.NAME], _MODELS_FIX, most=3)
        raise InputError(f"unknown model {model!r}{hint}")

    # A tag, or a checkpoint file
    tags = open_clip.list_pretrained_tags_by_model(model)
    # Only the default model has a default tag: elsewhere the choice matters too much to be made silently.
    if pretrained is None and model == DEFAULT_MODEL:
        return model, DEFAULT_PRETRAINED, model
    if pretrained is None:
        raise InputError(f"{model} needs --pretrained: {', '.join(tags) or 'no tag is known, so a checkpoint file'}")
    if open_clip.get_pretrained_cfg(model, pretrained):
        return model, pretrained, model
    checkpoint = Path(pretrained).expanduser()
    if os.path.isfile(checkpoint):
        return model, str(checkpoint.absolute()), model
    hint = did_you_mean(pretrained, tags, f"the tags are {', '.join(tags) or 'none'}", most=3)
    raise InputError(f"{pretrained!r} is neither a file nor a tag of {model}{hint}")


def _create(handle: str, pretrained: str | None) -> Any:
    """The open_clip module with its weights; every failure becomes one sentence."""
    images_only = handle.startswith(image_model.SCHEME)
    tag = open_clip.get_pretrained_cfg(handle, pretrained) if pretrained and not images_only else {}

    def create() -> Any:
        if images_only:
            return image_model.create(handle, pretrained)
        # open_clip only warns when a tag was trained with QuickGELU and the architecture says GELU (ViT-B-16 with
        # openai): the features would be off, so the tag decides.
        return open_clip.create_model(
            handle,
            pretrained,
            require_pretrained=True,
            force_quick_gelu=bool(tag.get("quick_gelu")),
        )

    if handle.startswith("local-dir:") or (pretrained and not tag):
        try:
            return create()
        # The loaders below open_clip raise their own types: pickle's, safetensors'.
        except Exception as error:
            source = pretrained or handle.removeprefix("local-dir:")
            raise InputError(f"the weights in {source} do not load: {one_line(error)}") from error
    weights = f"{handle} ({pretrained})" if pretrained else handle
    return load_from_hub(create, f"the weights of {weights}", _OFFLINE_FIX)


def _before_normalisation(name: str, transform: Any) -> Callable[[Image.Image], Image.Image]:
    """The steps of open_clip's preprocessing before an image becomes numbers: resize, crop, RGB."""
    steps = list(getattr(transform, "transforms", []))
    last = [type(step).__name__ for step in steps[-2:]]
    if last not in (["MaybeToTensor", "Normalize"], ["ToTensor", "Normalize"]):
        raise InputError(f"{name} preprocesses in a way unknown here, it ends in {last}; use another model")
    return Compose(steps[:-2])


def _resampling(settings: dict[str, Any]) -> Resampling | None:
    """open_clip's resizing in a form for a device; None for what has no such form, such as padding to a square."""
    mode = settings.get("resize_mode", "shortest")
    if mode not in ("squash", "shortest"):
        return None
    side = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    filter_name = "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic"
    return Resampling(side, mode == "squash", filter_name)


def _round_weights(visual: torch.nn.Module, dtype: torch.dtype) -> None:
    """Stores the weights of a tower in autocast's type, which would otherwise convert them again for every batch.

    Autocast caches only weights that are being trained. On a CPU a ViT's attention is then also many times slower.
    """
    for module in visual.modules():
        all_weights = isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))
        for name, weight in module.named_parameters(recurse=False):
            # Attention calls no layer for these two.
            if all_weights or name in ("in_proj_weight", "in_proj_bias"):
                weight.data = weight.data.to(dtype)
