"""Extraction with random weights: the model alone, each stage alone, end to end from JPEG files, and its features.

Weights are random, since how fast a model is does not depend on them. Images are crops of two photographs, 500 pixels
wide, each with a plain, a weak and a strong view.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg
from torch.utils.data import DataLoader, Dataset

from benchmarks.gpu.parts import Report, Settings
from benchmarks.images import image_source, large_jpeg, repeated
from benchmarks.speed.floor import seconds_of
from benchmarks.speed.stages import write_rate
from ulfine_fast.cache.models.encoder import PRECISIONS, Encoder
from ulfine_fast.cache.pipeline.encode import default_workers, encoded
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import Batch, ImageReader
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import ListedSource, Row

RECIPE = ViewRecipe(weak=1, strong=1)
_VIEWS = 3
_TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
_TOKENIZER = "ViT-B-32"  # all models have its tokens


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        distinct: images that are made.
        most: images of an extraction.
        batch: views in a call of the model, and images in a batch of an extraction.
        seconds: about how long one measurement takes.
        compared: images whose features are compared.
    """

    distinct: int
    most: int
    batch: int
    seconds: float
    compared: int


_FULL = Sizes(distinct=512, most=16_384, batch=256, seconds=1.5, compared=16)
_SMALL = Sizes(distinct=12, most=24, batch=8, seconds=0.0, compared=6)


def run_extraction(settings: Settings, report: Report, name: str) -> None:
    """Measure one architecture of open_clip."""
    device = torch.device(settings.device)
    sizes = _SMALL if settings.tiny else _FULL
    config = _TINY if settings.tiny else open_clip.get_model_config(name)
    net = random_model(config)

    # the model alone
    encoders: dict[str, Encoder] = {}
    rates: dict[str, float] = {}
    for precision in PRECISIONS:
        if precision == "tf32" and device.type != "cuda":
            continue
        with report.attempt(f"{name} {precision}", model=name, precision=precision):
            encoders[precision] = new_encoder(net, device, precision)
            rates[precision] = _report_model(report, name, precision, "eager", encoders[precision], sizes)

    # stages and the whole, at the precision that is meant for a GPU
    folder = large_jpeg(sizes.distinct)
    with report.attempt(f"{name} stages", model=name):
        encoder = encoders["bf16"]
        stages = stage_rates(image_source(str(folder), sizes.distinct), encoder, sizes)
        stages["model"] = rates["bf16"] / _VIEWS
        slowest = min(stages, key=lambda stage: stages[stage])
        report(
            f"{name} bf16, three views, each stage alone: "
            + ", ".join(f"{stage} {rate:,.0f}" for stage, rate in stages.items())
            + f" images/s; the slowest is {slowest}",
            model=name,
            stage="each alone",
            stages=stages,
            slowest=slowest,
        )
        count = min(sizes.most, max(2 * sizes.distinct, int(3 * sizes.seconds * stages[slowest])))
        for batch in dict.fromkeys((32, sizes.batch)):
            with report.attempt(f"{name} end to end, batch {batch}", model=name, batch=batch):
                rate = end_to_end(repeated(folder, count), encoder, batch)
                report(
                    f"{name} bf16, three views, end to end, batch {batch}: {rate:,.0f} images/s, "
                    f"{rate / stages[slowest]:.2f} of the slowest stage",
                    model=name,
                    stage="end to end",
                    batch=batch,
                    images=count,
                    images_per_second=rate,
                    of_slowest=rate / stages[slowest],
                )

    # features
    source = image_source(str(folder), sizes.compared)
    reference = features_of(source, new_encoder(net, torch.device("cpu"), "fp32"))
    for precision, encoder in encoders.items():
        with report.attempt(f"{name} {precision} features", model=name, precision=precision):
            values = agreement(features_of(source, encoder), reference)
            report(
                f"{name} {precision} against the processor's fp32: cosine at least {values['cosine_least']:.6f}, "
                f"mean {values['cosine_mean']:.6f}; around the mean feature at least {values['centred_least']:.4f}",
                model=name,
                precision=precision,
                stage="features",
                **values,
            )

    # kernels of torch.compile, which takes longest to begin
    if not settings.tiny:
        with report.attempt(f"{name} bf16 compiled", model=name, precision="bf16"):
            _report_model(report, name, "bf16", "compiled", new_encoder(net, device, "bf16", compiled=True), sizes)


def _report_model(report: Report, name: str, precision: str, way: str, encoder: Encoder, sizes: Sizes) -> float:
    """Images per second of the model alone."""
    rate = model_rate(encoder, sizes)
    report(
        f"{name} {precision} {way}: {rate:,.0f} images/s",
        model=name,
        precision=precision,
        way=way,
        stage="model alone",
        images_per_second=rate,
    )
    return rate


def random_model(config: dict[str, Any]) -> Any:
    """A model of open_clip with random weights and CLIP's preprocessing, on the processor."""
    torch.manual_seed(0)
    net = open_clip.CLIP(**copy.deepcopy(config))
    size = config["vision_cfg"]["image_size"]
    open_clip.set_model_preprocess_cfg(net, dataclasses.asdict(PreprocessCfg(size=size)))
    return net


def new_encoder(net: Any, device: torch.device, precision: str, *, compiled: bool = False) -> Encoder:
    """An encoder with a copy of the model."""
    return Encoder(
        copy.deepcopy(net),
        "random",
        None,
        device=device,
        precision=precision,
        handle=_TOKENIZER,
        compiled=compiled,
    )


def model_rate(encoder: Encoder, sizes: Sizes) -> float:
    """Images per second of the model with its pixels on the device already."""
    side = encoder.spec.image_size
    pixels = torch.randint(256, (sizes.batch, side, side, 3), dtype=torch.uint8).to(encoder.device)
    return _rate(lambda: encoder.encode_pixels(pixels), sizes.batch, encoder.device, sizes.seconds)


def stage_rates(source: ListedSource, encoder: Encoder, sizes: Sizes) -> dict[str, float]:
    """Images per second of reading, of resampling on the device, and of writing, with all views, each alone."""
    # images travel whole and views are made where the model runs, on a processor too
    reader = dataclasses.replace(
        ImageReader.for_encoder(source, encoder, RECIPE), resampling=encoder.resampling, on_device=True
    )
    batches = batches_of(source.rows, 32)
    # a first round starts the readers and brings the files into memory
    repeats = 1 if not sizes.seconds else 4
    read = list(_loader(reader, batches))
    started = time.perf_counter()
    for _ in _loader(reader, batches * repeats):
        pass
    read_rate = repeats * len(source.rows) / (time.perf_counter() - started)
    batch = read[0]
    resample = _rate(lambda: reader.pixels_on(encoder.device, batch), len(batch.kept), encoder.device, sizes.seconds)
    return {"read": read_rate, "resample": resample, "write": write_rate(encoder.spec.dim, 2048, drawn=1)}


class _Batches(Dataset[Batch]):
    """Batches as a reader process makes them, pixels in shared memory."""

    def __init__(self, reader: ImageReader, batches: Sequence[list[Row]]) -> None:
        self.reader = reader
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        batch = self.reader.read(self.batches[number])
        pixels: Any = torch.from_numpy(batch.pixels)
        return batch._replace(pixels=pixels)


def _loader(reader: ImageReader, batches: Sequence[list[Row]]) -> DataLoader[Batch]:
    """Reader processes, as many as an extraction beside a GPU has."""
    workers = default_workers(torch.device("cuda"))
    return DataLoader(_Batches(reader, batches), batch_size=None, collate_fn=_unchanged, num_workers=workers)


def _unchanged(batch: Any) -> Any:
    return batch


def end_to_end(folder: Path, encoder: Encoder, batch: int) -> float:
    """Images per second of a whole extraction, from files to shards."""
    source = image_source(str(folder), 10**9)
    with tempfile.TemporaryDirectory() as out:
        done = extract(source, encoder, Path(out) / "cache", views=RECIPE, batch_size=batch, progress=False)
    return done.images_per_second


def features_of(source: ListedSource, encoder: Encoder) -> NDArray[np.float32]:
    """Features of all views (n V, D) by the pipeline of an extraction."""
    reader = ImageReader.for_encoder(source, encoder, RECIPE)
    parts = [batch.features for batch in encoded(reader, encoder, batches_of(source.rows, 8), workers=0)]
    return np.concatenate(parts).reshape(-1, encoder.spec.dim)


def agreement(features: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
    """Cosines of rows with the reference's; also around its mean, since random weights make features alike."""
    mean = reference.mean(0)
    plain, centred = _cosines(features, reference), _cosines(features - mean, reference - mean)
    return {
        "cosine_least": float(plain.min()),
        "cosine_mean": float(plain.mean()),
        "centred_least": float(centred.min()),
        "centred_mean": float(centred.mean()),
    }


def _cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    one, other = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines: NDArray[np.float64] = (one * other).sum(1) / np.maximum(lengths, 1e-30)
    return cosines


def _rate(work: Callable[[], object], count: int, device: torch.device, seconds: float) -> float:
    """Items per second of a call that does so many, after some calls that are not counted."""
    for _ in range(3):
        work()
    once = seconds_of(work, device)
    repeats = max(2, round(seconds / once))

    def all_calls() -> None:
        for _ in range(repeats):
            work()

    return count * repeats / seconds_of(all_calls, device)
