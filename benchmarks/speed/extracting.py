"""One contender of `benchmarks.speed.extract` on one folder of images, in its own process; prints a JSON object.

python -m benchmarks.speed.extracting script lite0-minilm fp32 IMAGES
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

Row = dict[str, Any]
_WARM = 4  # batches of the model before the clock starts: buffers and kernels are chosen at the first


def script(model: str, precision: str, images: Path) -> Row:
    """What one writes by hand: open_clip, torchvision's ImageFolder, a DataLoader on all cores, an array in the end.

    With autocast it runs in `no_grad`: in `inference_mode` no weight is cached, and a ViT's attention takes a path
    many times slower.
    """
    import open_clip

    from ulfine_fast.cache.models.encoder import PRECISIONS

    net, _, preprocess = open_clip.create_model_and_transforms(_open_clip_name(model))
    net.eval()
    loader = DataLoader(ImageFolder(str(images), preprocess), batch_size=64, num_workers=os.cpu_count() or 1)
    features = []
    dtype = PRECISIONS[precision]
    mixed = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
    with torch.no_grad() if dtype else torch.inference_mode(), mixed, tempfile.TemporaryDirectory() as folder:
        _warm(lambda batch: net.encode_image(batch), 64, net.visual.image_size)
        started = time.perf_counter()
        for batch, _ in loader:
            features.append(functional.normalize(net.encode_image(batch), dim=-1))
        np.save(Path(folder) / "features.npy", torch.cat(features).float().numpy())
        seconds = time.perf_counter() - started
    return {"images": sum(map(len, features)), "seconds": seconds, "readers": loader.num_workers}


def ulfine_fast(model: str, precision: str, images: Path) -> Row:
    """ulfine-fast with the plain view alone, as in the script; text and manifest are not counted."""
    from ulfine_fast.cache.models.encoder import load_encoder
    from ulfine_fast.cache.pipeline.extract import extract
    from ulfine_fast.cache.pipeline.views import ViewRecipe
    from ulfine_fast.cache.sources import open_source

    encoder = load_encoder(model, device="cpu", precision=precision)
    _warm(encoder.encode_images, 16, encoder.spec.image_size)
    with tempfile.TemporaryDirectory() as folder:
        views = ViewRecipe(weak=0, strong=0)
        done = extract(open_source(images), encoder, Path(folder) / "cache", views=views, progress=False)
    return {"images": done.encoded, "seconds": done.seconds, "readers": 0}


def _open_clip_name(model: str) -> str:
    """open_clip's name of one of our models."""
    from ulfine_fast.cache.models import lite0_minilm

    return f"local-dir:{lite0_minilm.ensure_built()}" if model == lite0_minilm.NAME else model


def _warm(encode: Callable[[torch.Tensor], Any], batch: int, size: Any) -> None:
    side = size if isinstance(size, int) else size[0]
    for _ in range(_WARM):
        encode(torch.zeros(batch, 3, side, side))


def peak_bytes(readers: int) -> int:
    """Largest memory of this process, and of its largest reader once for each."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * (own + readers * reader)  # Linux counts in KiB


def main(contender: str, model: str, precision: str, images: str) -> None:
    """Runs one contender."""
    contenders = {"script": script, "ulfine_fast": ulfine_fast}
    row = contenders[contender](model, precision, Path(images))
    print(json.dumps({**row, "peak_rss_bytes": peak_bytes(row.pop("readers"))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
