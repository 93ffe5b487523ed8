"""Runs as files for other programs: ONNX, safetensors, TorchScript, torch.export; with a model card."""

from __future__ import annotations

from ulfine_fast.exports.hub import pull, push
from ulfine_fast.exports.load import Loaded, load
from ulfine_fast.exports.write import FORMATS, export

__all__ = ["FORMATS", "Loaded", "export", "load", "pull", "push"]
