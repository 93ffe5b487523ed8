"""A world of small coloured images and a tower of one convolution."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.studies.backbone import World

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])


def tower(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # fmt: off
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        ).requires_grad_(False).eval()
        # fmt: on


def plain(image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - 0.5) / 0.25


def make_world(train=40, test=10, size=12, noise=50, seed=0):
    """Three classes, each a colour under noise, `train` and `test` images of each."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.repeat(np.arange(3), train), np.repeat(np.arange(3), test)])
    clean = np.broadcast_to(COLOURS[labels][:, None, None], (len(labels), size, size, 3))
    pixels = np.clip(clean + random.normal(0, noise, clean.shape), 0, 255).astype(np.uint8)
    text = random.normal(size=(3, 1, 5)).astype(np.float32)
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    return World(
        image=lambda row: Image.fromarray(pixels[row]),
        ids=[f"{row:04d}" for row in range(len(labels))],
        labels=labels.astype(np.int64),
        splits=np.array(["train"] * (3 * train) + ["test"] * (3 * test)),
        class_names=["red", "green", "blue"],
        text=text,
        prototypes=text[:, 0],
        tower=tower(),
        plain=plain,
        mean=MEAN,
        std=STD,
        size=size,
    )
