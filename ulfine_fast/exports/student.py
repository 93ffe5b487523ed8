"""A student: a small timm network that takes images and was distilled from a run; how it is made and opened again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.hub import load_from_hub
from ulfine_fast.cache.io.names import near_names
from ulfine_fast.cache.pipeline.resample import Resampling


class Student(nn.Module):
    """A timm network with its normalisation in front: images in, probabilities and scores out.

    Args:
        name: timm's, such as "mobilenetv3_small_050", with or without a tag.
        classes: K.
        image_size: H and W, in pixels; None for the size that the network was designed for.
        pretrained: whether to download timm's weights of ImageNet, but for the classifier.
        weights: a safetensors file with such weights instead; None for none.

    Attributes:
        name: as above.
        image_size: H and W, in pixels.
        preprocessing: how image files become images of that size, as config.json has it.

    Raises:
        InputError: an unknown name, a size that the network does not take, weights that cannot be downloaded or are
            those of another network.
    """

    def __init__(
        self,
        name: str,
        classes: int,
        image_size: int | None = None,
        *,
        pretrained: bool = False,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        refuse_unknown_student(name, pretrained)
        designed = timm.get_pretrained_cfg(name)
        self.name = name
        self.image_size: int = image_size or (224 if designed is None else designed.input_size[-1])
        if self.image_size < 1:
            raise InputError(f"image_size must be at least 1, got {self.image_size}")
        # transformers have positions for one size
        sized = {"img_size": self.image_size} if designed is not None and designed.fixed_input_size else {}
        self.network: Any = _created(name, pretrained, num_classes=classes, **sized)
        if weights is not None:
            _load_weights(self.network, weights)

        normalisation = resolve_model_data_config(self.network)
        settings = {
            "size": self.image_size,
            "mode": "RGB",
            "mean": list(normalisation["mean"]),
            "std": list(normalisation["std"]),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        }
        self.preprocessing: dict[str, Any] = {
            "open_clip": settings,
            "resampling": asdict(Resampling(self.image_size)),
        }
        self.register_buffer("mean", torch.tensor(normalisation["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(normalisation["std"]).view(3, 1, 1))
        self._refuse_other_output(classes)

    def logits(self, images: Tensor) -> Tensor:
        """Images uint8 (n, H, W, 3) of the student's size to logits (n, K)."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        logits: Tensor = self.network((pixels - self.get_buffer("mean")) / self.get_buffer("std"))
        return logits

    # the argument is named as the input in config.json
    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (n, H, W, 3) to probabilities (n, K) and scores (n,), the energy of `Run.scores`."""
        logits = self.logits(pictures)
        return torch.softmax(logits, dim=-1), torch.logsumexp(logits, dim=-1)

    @property
    def parameter_count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def _refuse_other_output(self, classes: int) -> None:
        """Refuse a network that does not make (n, K) of images of this size."""
        self.eval()
        try:
            with torch.no_grad():
                shape = tuple(self.logits(torch.zeros(2, self.image_size, self.image_size, 3, dtype=torch.uint8)).shape)
        # each network has errors of its own for a size that its layers cannot halve often enough
        except Exception as error:
            raise InputError(
                f"{self.name} does not take images of {self.image_size} pixels ({one_line(error)}); choose another "
                "--image-size"
            ) from error
        if shape != (2, classes):
            raise InputError(f"{self.name} is no classifier: its output has the shape {shape}; choose another student")


def refuse_unknown_student(name: str, pretrained: bool = False) -> None:
    """Refuse a name that timm does not know, or, to download weights, one that it has none of.

    Raises:
        InputError: names the nearest names.
    """
    if not timm.is_model(name):
        near = near_names(name, timm.list_models(), most=3)
        hint = f"did you mean {', '.join(near)}?" if near else "such as mobilenetv3_small_050"
        raise InputError(f"unknown student {name!r}; name a model of timm, {hint}")
    if pretrained and not timm.models.is_model_pretrained(name):
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise InputError(f"timm has no weights of {name}; {'name one of ' + ', '.join(tags) if tags else 'train it'}")


def opened_student(section: dict[str, Any], classes: int, file: Path) -> Student:
    """The student of an export folder.

    Args:
        section: "student" of its config.json.
        classes: K.
        file: its weights, as safetensors.

    Raises:
        InputError: a name that this version of timm does not know.
        Exception: weights that do not fit; safetensors and torch have errors of their own for it.
    """
    student = Student(section["timm"], classes, section["image_size"])
    student.load_state_dict(load_file(file))
    return student.eval()


def outputs_on(student: Student, device: torch.device) -> Callable[[NDArray[Any], str], NDArray[np.float32]]:
    """A function from images uint8 (n, H, W, 3) and the name of an output to its values, computed on the device."""
    student.to(device)

    def outputs(images: NDArray[Any], name: str) -> NDArray[np.float32]:
        with torch.inference_mode():
            probabilities, scores = student(torch.from_numpy(images).to(device))
        return np.asarray((probabilities if name == "probabilities" else scores).float().cpu().numpy())

    return outputs


def _created(name: str, pretrained: bool, **settings: Any) -> Any:
    if pretrained:
        fix = "give a file with --weights, or leave --pretrained out"
        return load_from_hub(
            lambda: timm.create_model(name, pretrained=True, **settings), f"the weights of {name}", fix
        )
    try:
        return timm.create_model(name, **settings)
    except Exception as error:
        raise InputError(f"timm cannot make {name} ({one_line(error)}); choose another student") from error


def _load_weights(network: Any, file: Path) -> None:
    """Weights of the same network for other classes: all but the classifier's."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({one_line(error)})") from error
    own = network.state_dict()
    names = network.default_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(heads or "\0")}
    wanted = {name: tensor for name, tensor in own.items() if not name.startswith(heads or "\0")}
    other = sorted(
        name
        for name in {*kept, *wanted}
        if name not in kept or name not in wanted or kept[name].shape != own[name].shape
    )
    if other:
        raise InputError(f"{file} has the weights of another network: {other[0]} is missing, new or of another shape")
    network.load_state_dict(kept, strict=False)
