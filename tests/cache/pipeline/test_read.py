"""Images read exactly, reduced first, or left whole for a device: the same rows, views and nearly the same pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cache.samples import write_images
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline import encode as encoding
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import ImageReader
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.sources.image import load_image, no_finer_than

HERE = torch.device("cpu")
RECIPE = ViewRecipe(weak=1, strong=2, seed=3)


def smooth(path, size: tuple[int, int], orientation: int = 1) -> None:
    """An image without sharp edges, whose halves look like itself."""
    across, down = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 2, size[1]))
    waves = np.stack([np.sin(across), np.cos(down), np.sin(across + down)], axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((127 + 120 * waves).astype(np.uint8)).save(path, quality=98, exif=exif)


@pytest.fixture
def large(tmp_path, tiny_encoder):
    """JPEG and PNG images far larger than the model's 16 pixels, one of them lying on its side."""
    root = tmp_path / "large"
    smooth(root / "train/cat/a.jpg", (301, 270))
    smooth(root / "train/cat/b.png", (555, 400))
    smooth(root / "train/dog/c.jpg", (640, 299), orientation=6)
    smooth(root / "train/dog/d.png", (40, 36))
    return open_source(root)


def readers(source, encoder) -> tuple[ImageReader, ImageReader, ImageReader]:
    """Exact, reduced and for a device."""
    exact = ImageReader(source, encoder.resize, RECIPE, encoder.spec.image_size)
    reduced = replace(exact, resampling=encoder.resampling)
    return exact, reduced, replace(reduced, on_device=True)


def test_an_encoder_reads_exactly_when_asked(large, tiny_model, tiny_encoder):
    assert not tiny_encoder.exact
    assert ImageReader.for_encoder(large, tiny_encoder, RECIPE).resampling == tiny_encoder.resampling
    exact = load_encoder(tiny_model, device="cpu", exact=True)
    assert ImageReader.for_encoder(large, exact, RECIPE).resampling is None


def test_large_images_look_the_same_however_they_are_read(large, tiny_encoder):
    exact, reduced, later = readers(large, tiny_encoder)
    wanted = exact.read(large.rows)
    for reader in (reduced, later):
        batch = reader.read(large.rows)
        pixels = reader.pixels_on(HERE, batch).unflatten(0, (4, 4)).numpy()
        assert batch.kept == wanted.kept
        assert np.array_equal(batch.scale, wanted.scale)
        assert np.array_equal(batch.flip, wanted.flip)
        difference = np.abs(pixels.astype(int) - wanted.pixels)[:, :2]  # plain and weak: no operation makes edges
        assert difference.max() <= 6
        assert difference.mean() < 0.7


def test_small_images_are_read_exactly_on_a_processor(images, tiny_encoder):
    source = open_source(images)
    exact, reduced, later = readers(source, tiny_encoder)
    rows = [row for row in source.rows if row.split == "train"]
    assert np.array_equal(exact.read(rows).pixels, reduced.read(rows).pixels)
    made = later.pixels_on(HERE, later.read(rows)).unflatten(0, (len(rows), 4)).numpy()
    assert np.abs(made.astype(int) - exact.read(rows).pixels)[:, 0].mean() < 0.5


def test_whole_images_have_a_largest_size(large, tiny_encoder):
    batch = readers(large, tiny_encoder)[2].read(large.rows)
    short = batch.sampling.sizes.min(axis=1)
    assert batch.pixels.shape == (3 * batch.sampling.sizes.prod(axis=1).sum(),)
    assert (short < 4 * 16).all()
    assert (short >= 32).all()


def test_strong_views_on_a_device_are_the_drawn_ones(large, tiny_encoder):
    """Operations come in the drawn order; those on whole bytes are the same on images and on tensors."""
    exact, _, later = readers(large, tiny_encoder)
    exact, later = (replace(one, recipe=ViewRecipe(weak=0, strong=12, seed=1)) for one in (exact, later))
    rows = [row for row in large.rows if row.id.endswith("d.png")]
    batch = later.read(rows)
    wanted, pixels = exact.read(rows).pixels[0], later.pixels_on(HERE, batch).numpy()
    kinds = [{name for name, _ in one.operations} for one in batch.drawn]
    same = [i for i, names in enumerate(kinds) if names <= {"Identity", "Posterize", "Solarize", "Brightness"}]
    assert len(same) > 1
    for view in same:
        assert np.quantile(np.abs(pixels[view].astype(int) - wanted[view]), 0.95) <= 8, kinds[view]


def test_rows_without_views_have_the_plain_one(images, tiny_encoder):
    source = open_source(images)
    rows = [row for row in source.rows if row.split == "test"]
    later = readers(source, tiny_encoder)[2]
    batch = later.read(rows)
    assert later.pixels_on(HERE, batch).shape == (len(rows), 16, 16, 3)
    assert batch.scale.shape == (len(rows), 0)


def test_unreadable_images_are_skipped_in_every_way(tmp_path, tiny_encoder):
    root = write_images(tmp_path / "images", {"train/cat": 2})
    (root / "train/cat/broken.png").write_bytes(b"no image")
    source = open_source(root)
    for reader in readers(source, tiny_encoder):
        batch = reader.read(source.rows)
        assert len(batch.kept) == 2
        assert [row.id for row, _ in batch.skipped] == ["train/cat/broken.png"]
        broken = [row for row, _ in batch.skipped]
        assert reader.read(broken).kept == []


def test_reader_processes_hand_whole_images_to_the_device(large, tiny_encoder):
    later = readers(large, tiny_encoder)[2]
    batches = batches_of(large.rows, 3)
    alone = [encoding._encode_on_core(later, tiny_encoder, rows) for rows in batches]
    apart = list(encoding._encode_on_device(later, tiny_encoder, batches, 2))
    for one, two in zip(alone, apart, strict=True):
        assert one.kept == two.kept
        assert np.allclose(one.features, two.features, atol=1e-5)


def test_a_jpeg_is_decoded_to_what_is_enough(tmp_path):
    smooth(tmp_path / "a.jpg", (641, 403), orientation=8)
    smooth(tmp_path / "a.png", (641, 403))
    with no_finer_than(100) as decoding:
        assert load_image(tmp_path / "a.jpg").size == (101, 161)
        assert decoding.whole == (403, 641)
        assert load_image(tmp_path / "a.png").size == (641, 403)
        assert decoding.whole == (641, 403)
    assert load_image(tmp_path / "a.jpg").size == (403, 641)


@dataclass
class CutOuts:
    """The right lower quarter of each of another source's images, found by counting pixels."""

    whole: object

    def read(self, row):
        image = self.whole.read(row)
        return image.crop((image.width - 150, image.height - 130, image.width, image.height))


@pytest.mark.parametrize("later", [False, True])
def test_a_source_may_make_images_of_others(large, tiny_encoder, tmp_path, later):
    rows = [row for row in large.rows if "d.png" not in row.id]
    for row in rows:
        kept = tmp_path / "cut" / row.id
        kept.parent.mkdir(parents=True, exist_ok=True)
        CutOuts(large).read(row).save(kept.with_suffix(".png"))
    files = open_source(tmp_path / "cut")
    one = replace(readers(CutOuts(large), tiny_encoder)[1], on_device=later)
    two = replace(one, source=files)
    made = [one.pixels_on(HERE, one.read([row])) for row in rows]
    # the views are drawn by a row's id, and a file of another suffix has another: the plain view is the same
    by_name = {row.id.rsplit(".")[0]: row for row in files.rows}
    for row, views in zip(rows, made, strict=True):
        saved = two.pixels_on(HERE, two.read([by_name[row.id.rsplit(".")[0]]]))
        assert torch.equal(views[0], saved[0])


def test_models_that_pad_are_read_exactly_or_not_at_all(tmp_path, monkeypatch, tiny_model):
    from ulfine_fast.cache.models import encoder as encoders

    monkeypatch.setattr(encoders, "_resampling", lambda settings: None)
    assert load_encoder(tiny_model, device="cpu").exact
    with pytest.raises(InputError, match="--exact"):
        load_encoder(tiny_model, device="cpu", exact=False)
