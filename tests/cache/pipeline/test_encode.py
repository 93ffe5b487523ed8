"""Both ways to features: threads on a processor, and reader processes beside a device, tried here without a GPU."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline import encode as encoding
from ulfine_fast.cache.pipeline.encode import default_workers, encoded
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import ImageReader
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import open_source


@pytest.fixture
def source(images):
    return open_source(images)


@pytest.fixture
def reader(source, tiny_encoder):
    return ImageReader.for_encoder(source, tiny_encoder, ViewRecipe(weak=1, strong=2, seed=3))


class Elsewhere:
    """A real encoder on the CPU that says it is on a GPU, whose memory holds `most` images together."""

    def __init__(self, encoder, most=10**9):
        self._encoder, self.most, self.calls = encoder, most, []
        self.device = torch.device("cuda")

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode_pixels(self, pixels):
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.calls.append(len(pixels))
        return self._encoder.encode_pixels(pixels)


class Deadly:
    """A source at one of whose images the process that reads it is killed."""

    def __init__(self, source, at):
        self.source, self.at, self.parent = source, at, os.getpid()

    def read(self, row):
        if row.id == self.at:
            assert os.getpid() != self.parent
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(row)


def train(source):
    return batches_of([row for row in source.rows if row.split == "train"], 2)


def assert_same(one, two):
    assert [batch.kept for batch in one] == [batch.kept for batch in two]
    for left, right in zip(one, two, strict=True):
        for name in ("features", "scale", "flip"):
            assert np.array_equal(getattr(left, name), getattr(right, name)), name


def test_features_are_those_of_the_models_own_preprocessing(source, reader, tiny_encoder):
    batches = list(encoded(reader, tiny_encoder, train(source), workers=0))
    assert [len(batch.kept) for batch in batches] == [2, 2, 1]
    for batch in batches:
        pixels = torch.stack([tiny_encoder.transform(source.read(row)) for row in batch.kept])  # (B, 3, H, W)
        wanted = tiny_encoder.encode_images(pixels).numpy()
        assert np.allclose(batch.features[:, 0], wanted, atol=1e-6)
        assert batch.features.shape == (len(batch.kept), 4, 8)
        assert batch.scale.shape == batch.flip.shape == (len(batch.kept), 3)
        assert min(batch.seconds.values()) > 0


def test_bytes_are_normalised_as_the_model_does_it(tiny_encoder):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.asarray(tiny_encoder.resize(image)).copy())
    assert torch.equal(tiny_encoder.normalise(pixels[None])[0], tiny_encoder.transform(image))


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(source, reader, tiny_encoder, workers):
    alone = list(encoded(reader, tiny_encoder, train(source), workers=0))
    assert_same(alone, list(encoded(reader, tiny_encoder, train(source), workers=workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_reader_processes_change_nothing(source, reader, tiny_encoder, workers):
    alone = list(encoded(reader, tiny_encoder, train(source), workers=0))
    assert_same(alone, list(encoded(reader, Elsewhere(tiny_encoder), train(source), workers=workers)))


def test_the_copy_back_is_queued_before_the_next_batch_is_encoded(source, reader, tiny_encoder, monkeypatch):
    order = []

    class Copy(encoding._CopyToHost):
        def __init__(self, features):
            order.append("copy")
            super().__init__(features)

        def wait(self):
            order.append("wait")
            return super().wait()

    class Noted(Elsewhere):
        def encode_pixels(self, pixels):
            order.append("encode")
            return super().encode_pixels(pixels)

    monkeypatch.setattr(encoding, "_CopyToHost", Copy)
    list(encoded(reader, Noted(tiny_encoder), train(source), workers=0))
    assert order == ["encode", "copy", "encode", "copy", "wait", "encode", "copy", "wait", "wait"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_is_there_before_the_next_one_is_done(source, reader, tiny_encoder):
    ends = []

    class Slow(Elsewhere):
        """An encoder of about a second a batch."""

        def encode_pixels(self, pixels):
            torch.cuda._sleep(1_500_000_000)
            ends.append(torch.cuda.Event())
            features = super().encode_pixels(pixels).pin_memory().cuda(non_blocking=True)
            ends[-1].record()
            return features

    stream = encoded(reader, Slow(tiny_encoder), train(source), workers=0)
    next(stream)
    assert [end.query() for end in ends] == [True, False]
    stream.close()


def test_a_pipe_serves_where_shared_memory_is_small(source, reader, tiny_encoder, monkeypatch):
    alone = list(encoded(reader, tiny_encoder, train(source), workers=0))
    monkeypatch.setattr(encoding, "_fits_shared_memory", lambda *_: False)
    assert_same(alone, list(encoded(reader, Elsewhere(tiny_encoder), train(source), workers=1)))


def test_shared_memory_is_measured(reader, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=25_000))
    monkeypatch.setattr(os.path, "isdir", lambda _: True)
    # 4 views of 3 x 16 x 16 bytes are 3072 bytes an image, 3 batches a reader are under way
    assert encoding._fits_shared_memory(reader, 2, workers=1)
    assert not encoding._fits_shared_memory(reader, 3, workers=1)
    assert encoding._fits_shared_memory(reader, 3, workers=0)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_unreadable_images_are_left_out_and_a_batch_may_be_empty(images, tiny_encoder, where):
    for name in ("train/cat/000.png", "train/cat/001.png", "train/dog/001.png"):
        (images / name).write_bytes(b"no image")
    source = open_source(images)
    reader = ImageReader.for_encoder(source, tiny_encoder, ViewRecipe())
    encoder = tiny_encoder if where == "here" else Elsewhere(tiny_encoder)
    batches = list(encoded(reader, encoder, train(source), workers=0))
    assert [[row.id for row in batch.kept] for batch in batches] == [[], ["train/cat/002.png", "train/dog/000.png"], []]
    assert [len(batch.skipped) for batch in batches] == [2, 0, 1]
    assert all("not an image" in reason for batch in batches for _, reason in batch.skipped)


def test_where_memory_is_short_batches_are_halved_and_the_user_is_warned_once(source, reader, tiny_encoder):
    alone = list(encoded(reader, tiny_encoder, train(source), workers=0))
    small = Elsewhere(tiny_encoder, most=2)
    with pytest.warns(UserWarning, match="8 images together do not fit") as warned:
        batches = list(encoded(reader, small, train(source), workers=0))
    assert len(warned) == 1
    assert small.calls == [2] * 10
    for one, two in zip(alone, batches, strict=True):
        assert np.allclose(one.features, two.features, atol=1e-6)


def test_views_are_made_of_fewer_images_where_memory_is_short(source, tiny_encoder, monkeypatch):
    encoder = Elsewhere(tiny_encoder)
    reader = ImageReader.for_encoder(source, encoder, ViewRecipe(weak=1, strong=1))
    pixels_on, made = ImageReader.pixels_on, []

    def pixels_here(self, device, batch):
        if len(batch.sampling.sizes) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(len(batch.sampling.sizes))
        return pixels_on(self, torch.device("cpu"), batch)

    monkeypatch.setattr(ImageReader, "pixels_on", pixels_here)
    rows = batches_of([row for row in source.rows if row.split == "train"], 5)
    most = 5
    whole = list(encoded(reader, encoder, rows, workers=0))
    most, made = 1, []
    with pytest.warns(UserWarning, match="15 images together do not fit"):
        parts = list(encoded(reader, encoder, rows, workers=0))
    assert made == [1] * 5
    np.testing.assert_allclose(parts[0].features, whole[0].features, atol=1e-6)


def test_a_image_too_large_for_the_gpu_ends_in_one_sentence(source, reader, tiny_encoder):
    with (
        pytest.warns(UserWarning, match="do not fit"),
        pytest.raises(InputError, match="a single image is too large"),
    ):
        list(encoded(reader, Elsewhere(tiny_encoder, most=0), train(source), workers=0))


def test_a_killed_reader_ends_in_one_sentence(source, tiny_encoder):
    reader = ImageReader.for_encoder(Deadly(source, source.rows[3].id), tiny_encoder, ViewRecipe())
    with pytest.raises(InputError, match=r"a reader process ended .* fewer --workers"):
        list(encoded(reader, Elsewhere(tiny_encoder), train(source), workers=1))


def test_parts_are_encoded_with_the_encoders_device_as_the_current_one(source, tiny_encoder, monkeypatch, tmp_path):
    # a loader pins memory for the current device, and would open a context on the first GPU
    events = []

    @contextmanager
    def entered(device):
        events.append(device)
        yield
        events.append("left")

    def encoded_here(*args, **kwargs):
        events.append("encoded")
        return encoded(*args, **kwargs)

    monkeypatch.setattr(encoding, "current_device", entered)
    monkeypatch.setattr(encoding, "encoded", encoded_here)
    extract(source, tiny_encoder, tmp_path / "cache", progress=False)
    assert events == [tiny_encoder.device, "encoded", "left"]


def test_default_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    assert default_workers(torch.device("cuda")) == 16
    assert default_workers(torch.device("cpu")) == 24
    # two cores are left to the process that launches the GPU's work
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert default_workers(torch.device("cuda")) == 14
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert default_workers(torch.device("cuda")) == 1
