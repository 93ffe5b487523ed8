from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ulfine_fast.cache.sources.image import MAX_ASPECT, UnreadableImage, image_suffixes, load_image, to_rgb


def png(image: Image.Image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    return data.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def pixels(image: Image.Image) -> list:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def test_rgb_comes_back_as_it_was(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(load_image(tmp_path / "a.png")) == values.tolist()
    assert pixels(load_image((tmp_path / "a.png").read_bytes())) == values.tolist()


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 100, [100, 100, 100]),
        ("LA", (100, 0), [255, 255, 255]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (0, 0, 0, 51), [204, 204, 204]),
    ],
)
def test_modes_of_png(mode: str, color, expected: list[int]):
    assert pixels(load_image(png(Image.new(mode, (1, 1), color)))) == [[expected]]


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "YCbCr", "HSV"])
def test_modes_that_only_pil_makes(mode: str):
    # PIL has no direct way to some modes, and would reduce RGB to its web palette on the way to PA.
    through = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}.get(mode, "RGB")
    source = Image.new("RGB", (2, 2), (90, 90, 90)).convert(through).convert(mode)
    assert np.abs(np.asarray(to_rgb(source)).astype(int) - 90).max() <= 1


def test_palette_with_a_transparent_color_is_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixels(load_image(png(image, transparency=0))) == [[[255, 255, 255], [40, 50, 60]]]
    assert pixels(load_image(png(image))) == [[[10, 20, 30], [40, 50, 60]]]


def test_rgb_with_a_transparent_color_is_laid_on_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert pixels(load_image(png(image, transparency=(1, 2, 3)))) == [[[255, 255, 255], [9, 9, 9]]]


def test_16_bit_is_scaled_not_cut_off():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert pixels(load_image(png(Image.fromarray(values)))) == [[[v, v, v] for v in (0, 1, 128, 255)]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([-100, 0, 100], [0, 128, 255]),
        ([0, 1_000_000, 2_000_000], [0, 128, 255]),
    ],
)
def test_32_bit_integers(values: list[int], expected: list[int]):
    result = to_rgb(Image.fromarray(np.array([values], dtype=np.int32)))
    assert pixels(result) == [[[v, v, v] for v in expected]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.2, 1.0], [0, 51, 255]),
        ([0.0, 51.0, 255.0], [0, 51, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ([-3.0, -3.0, -3.0], None),
    ],
)
def test_floats(values: list[float], expected: list[int] | None, tmp_path: Path):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tiff")
    result = np.asarray(load_image(tmp_path / "a.tiff"))[0, :, 0].tolist()
    assert result == expected if expected is not None else len(set(result)) == 1


def test_cmyk(tmp_path: Path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = np.asarray(load_image(tmp_path / "a.jpg")).reshape(-1, 3).mean(0)
    assert red > 240
    assert max(green, blue) < 15


def test_exif_orientation_turns_the_image_upright(tmp_path: Path):
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 0, 0)


def test_damaged_exif_does_not_lose_the_image():
    data = png(Image.new("RGB", (3, 3), "blue"), exif=b"Exif\0\0II*\0\xff\xff\xff\x7fnonsense")
    assert load_image(data).size == (3, 3)


@pytest.mark.parametrize("form", ["gif", "webp", "png", "tiff"])
def test_animations_give_their_first_frame(form: str, tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{form}", save_all=True, append_images=frames[1:])
    red, _, blue = load_image(tmp_path / f"a.{form}").getpixel((1, 1))
    assert red > 200
    assert blue < 50


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_truncated_images_are_unreadable(form: str):
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, form)
    with pytest.raises(UnreadableImage) as caught:
        load_image(data.getvalue()[: len(data.getvalue()) // 2])
    assert "\n" not in caught.value.reason
    assert caught.value.reason


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "webp", "tiff"])
def test_flipped_bytes_never_raise_anything_else(form: str):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data, form)
    generator = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data.getvalue())
        for place in generator.integers(0, len(broken), 4):
            broken[place] ^= 0xFF
        try:
            outcome = load_image(bytes(broken)).mode
        except UnreadableImage as error:
            outcome = error.reason
        assert outcome
        assert "\n" not in outcome


@pytest.mark.parametrize("data", [b"", b"x", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_image(data: bytes):
    with pytest.raises(UnreadableImage):
        load_image(data)


def test_zero_byte_file_says_so_without_its_path(tmp_path: Path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UnreadableImage) as caught:
        load_image(tmp_path / "a.jpg")
    assert str(caught.value) == "not an image that PIL knows"


def test_reasons_of_the_file_system(tmp_path: Path):
    with pytest.raises(UnreadableImage, match="no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match="file name too long"):
        load_image(tmp_path / ("x" * 5000))
    with pytest.raises(UnreadableImage, match="is a directory"):
        load_image(tmp_path)


@pytest.mark.parametrize("size", [(9460, 9460), (20000, 20000), (65000, 65000)])
def test_decompression_bombs_are_refused_by_their_header(size: tuple[int, int]):
    with pytest.raises(UnreadableImage, match=r"more than 89,478,485"):
        load_image(png_header(*size))


def test_strips_that_would_explode_when_resized():
    assert load_image(png(Image.new("L", (MAX_ASPECT, 1)))).size == (MAX_ASPECT, 1)
    with pytest.raises(UnreadableImage, match="thinner than 1 : 200"):
        load_image(png(Image.new("L", (1, MAX_ASPECT + 1))))


def test_suffixes():
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"} <= image_suffixes()
    # Text, sound, and what PIL opens only by starting another program.
    assert not {".txt", ".ogg", ".svg", ".pdf", ".eps", ".h5", ".csv", ".mpg", ""} & image_suffixes()
