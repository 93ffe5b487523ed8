from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ulfine_fast.report import gallery
from ulfine_fast.runs.files import Predictions


def rows(labels: list[int], predicted: list[int], confidence: list[float], ids: list[str] | None = None) -> Predictions:
    n = len(labels)
    names = ids or [f"r{i}" for i in range(n)]
    return Predictions(names, np.array(labels), np.array(predicted), np.array(confidence), np.ones((n, 2)))


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_most_confident_wrong_leaves_out_right_and_unknown() -> None:
    table = rows([0, 0, 1, -1, 1], [1, 0, 0, 1, 0], [0.6, 0.99, 0.9, 0.95, 0.7])
    assert gallery.most_confident_wrong(table, 2).tolist() == [2, 4]


def test_least_confident_may_be_right_or_unknown() -> None:
    table = rows([0, 0, -1], [1, 0, 1], [0.6, 0.4, 0.5])
    assert gallery.least_confident(table, 2).tolist() == [1, 2]


def test_ties_are_broken_by_id() -> None:
    table = rows([0, 0], [1, 1], [0.5, 0.5], ["b", "a"])
    assert gallery.least_confident(table, 2).tolist() == [1, 0]


def test_a_class_is_spread_from_most_to_least_confident() -> None:
    confidence = [i / 10 for i in range(9)]
    table = rows([1] * 9, [1] * 9, confidence)
    assert [table.confidence[i] for i in gallery.rows_of_class(table, 1, 3)] == [0.8, 0.4, 0.0]
    assert len(gallery.rows_of_class(table, 1, 20)) == 9
    assert len(gallery.rows_of_class(table, 0, 3)) == 0


def test_a_large_image_becomes_a_small_jpeg() -> None:
    uri, tiny = gallery.thumbnail(Image.new("RGB", (1200, 600), "red"))
    assert uri.startswith("data:image/jpeg;base64,")
    assert not tiny
    assert opened(uri).size == (144, 72)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16"])
def test_a_tiny_image_keeps_its_pixels(mode: str) -> None:
    uri, tiny = gallery.thumbnail(Image.new(mode, (28, 28)))
    assert uri.startswith("data:image/png;base64,")
    assert tiny
    assert opened(uri).size == (28, 28)


def test_metadata_does_not_follow_into_the_page() -> None:
    image = Image.new("RGB", (300, 300))
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, comment=b"secret location")
    uri, _ = gallery.thumbnail(Image.open(buffer))
    data = base64.b64decode(uri.split(",", 1)[1])
    assert b"secret" in buffer.getvalue()
    assert b"secret" not in data
    assert not opened(uri).getexif()


def test_an_image_that_is_missing_leaves_its_caption() -> None:
    def read(row_id: str) -> Image.Image:
        raise {"r0": KeyError("r0"), "r1": OSError("gone"), "r2": ValueError("bad")}[row_id]

    shots = gallery.load_shots(rows([0, 1, 0], [0, 1, 1], [0.5, 0.6, 0.7]), np.arange(3), read)
    assert [shot.image for shot in shots] == [None, None, None]
    assert (shots[2].id, shots[2].true, shots[2].predicted, shots[2].confidence) == ("r2", 0, 1, 0.7)


def test_an_unexpected_error_is_not_hidden() -> None:
    def read(row_id: str) -> Image.Image:
        raise TypeError(row_id)

    with pytest.raises(TypeError):
        gallery.load_shots(rows([0], [0], [0.5]), np.arange(1), read)


def test_an_image_file_is_read_into_the_page(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "r0.png")

    def read(row_id: str) -> Image.Image:
        return Image.open(tmp_path / f"{row_id}.png")

    shots = gallery.load_shots(rows([0], [0], [0.5]), np.arange(1), read)
    assert shots[0].image is not None
    assert opened(shots[0].image).getpixel((3, 3)) == (0, 0, 255)
