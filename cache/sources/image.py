"""Any image that PIL reads, as RGB: upright, transparency on white, deep grey scaled to 8 bits."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ulfine_fast.cache.io.files import refuse_irregular_file

# PIL's own limit against decompression bombs. PIL only warns between one and two times it; here it is refused.
MAX_PIXELS = 89_478_485
# A strip this thin, resized by its short side, would take hundreds of megabytes before it is cropped.
MAX_ASPECT = 200
# PIL opens these without being able to decode them, or by starting another program.
_NOT_DECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_WHITE = (255, 255, 255, 255)


@dataclass
class Decoding:
    """How images are decoded, and the last one that was.

    Attributes:
        short_side: pixels that an image's shorter side keeps at least.
        image: the image loaded last; None before the first.
        whole: (width, height) of that image upright, with all its pixels.
    """

    short_side: int
    image: Image.Image | None = None
    whole: tuple[int, int] = (0, 0)


# Set by the reader around a call of a source, which needs no argument for it.
_decoding: ContextVar[Decoding | None] = ContextVar("decoding", default=None)


class UnreadableImage(Exception):
    """An image that is skipped.

    Attributes:
        reason: one line for the list of skipped images.
    """

    def __init__(self, reason: str) -> None:
        self.reason = " ".join(reason.split())
        super().__init__(self.reason)


@contextlib.contextmanager
def no_finer_than(short_side: int) -> Iterator[Decoding]:
    """Within this context a JPEG image may be reduced to a half, quarter or eighth while it is decoded.

    That takes a fraction of the time for a large one. The short side keeps at least `short_side` pixels.
    """
    decoding = Decoding(short_side)
    token = _decoding.set(decoding)
    try:
        yield decoding
    finally:
        _decoding.reset(token)


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case file suffixes, with the dot, that count as images."""
    _register_plugins()
    formats = Image.registered_extensions().items()
    # An MPO file is opened by the JPEG format, whose first image it is.
    return frozenset(
        suffix for suffix, name in formats if (name in Image.OPEN or name == "MPO") and name not in _NOT_DECODABLE
    )


@cache
def _register_plugins() -> None:
    """Lets PIL read HEIC where the package for it is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def load_image(source: Path | str | bytes) -> Image.Image:
    """Reads one image.

    Args:
        source: a path, or the bytes of the file.

    Returns:
        an RGB image in memory, turned upright by its EXIF orientation; of an animation, the first frame.

    Raises:
        UnreadableImage: not an image, damaged, unreadable, over `MAX_PIXELS`, or thinner than 1 : `MAX_ASPECT`.
    """
    _register_plugins()
    try:
        if not isinstance(source, bytes):
            refuse_irregular_file(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            _refuse_unreasonable(image)
            whole = image.size
            decoding = _decoding.get()
            if decoding is not None:
                # For other formats than JPEG this does nothing.
                image.draft(None, (decoding.short_side, decoding.short_side))
            image.load()
            decoded = image.size
            # Damaged EXIF data is no reason to lose a good image.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image)
            if decoding is not None:
                decoding.image = rgb
                decoding.whole = whole if image.size == decoded else whole[::-1]
            return rgb
    except UnreadableImage:
        raise
    # PIL's decoders raise almost anything on damaged data: OSError, SyntaxError, ValueError, struct.error, zlib.error.
    except Exception as error:
        raise UnreadableImage(_reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, from any mode.

    16-bit pixels are scaled from their full range; 32-bit integers and floats from the smallest usual range that holds
    them (0..255 or 0..65535; 0..1 or 0..255), else from their own. Transparent pixels become white.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        # A copy, because the caller closes the file the image came from.
        return image.copy()
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(np.asarray(image).astype(np.float64) / 257.0)
    if image.mode in ("I", "F"):
        return _grey_to_rgb(_to_byte_range(np.asarray(image).astype(np.float64), image.mode))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # PIL cannot convert La to RGBA directly.
        layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer).convert("RGB")
    return image.convert("RGB")


def _to_byte_range(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of unknown depth, scaled to 0..255 from the smallest usual range that holds them."""
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    for top in (1.0, 255.0) if mode == "F" else (255.0, 65535.0):
        if low >= 0 and high <= top:
            return values * (255.0 / top)
    return (values - low) / ((high - low) or 1.0) * 255.0


def _grey_to_rgb(values: np.ndarray) -> Image.Image:
    grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)  # (H, W)
    return Image.fromarray(grey).convert("RGB")


def _refuse_unreasonable(image: Image.Image) -> None:
    """Looks at the header only, before any pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(f"{width} x {height} pixels, thinner than 1 : {MAX_ASPECT}")


def _reason(error: Exception) -> str:
    """One line without the path or the object's address, so that it is the same in every run."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that PIL knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"damaged: {error or type(error).__name__}"
