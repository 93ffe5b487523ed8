"""Runs as files for other programs: safetensors, ONNX, TorchScript, torch.export; with a model card.

`config` (the export folder's config.json), `graphs` (a run as a torch module), `card`, `write` (`export`), `hub`
(`push`, `pull`), `load` and `images` (the folder opened again). May import `runs` and what it may import.
"""

from __future__ import annotations

from ulfine_fast.exports.config import FORMATS
from ulfine_fast.exports.hub import pull, push
from ulfine_fast.exports.load import Loaded, load
from ulfine_fast.exports.write import export

__all__ = ["FORMATS", "Loaded", "export", "load", "pull", "push"]
