"""The data sets of the benchmarks, each extracted once into the cache home."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from ulfine_fast.cache.encoder import load_encoder
from ulfine_fast.cache.extract import extract
from ulfine_fast.cache.home import cache_home
from ulfine_fast.cache.prompts import DEFAULT_PROMPTS
from ulfine_fast.cache.sources import Row, Source, open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.views import ViewRecipe

VIEWS = ViewRecipe(weak=2, strong=4, seed=0)


class FirstOfEachClass:
    """A source cut to the first pictures of every class, in the source's own order; see :class:`Source`."""

    def __init__(self, source: Source, limits: dict[str, int]) -> None:
        """Keep `limits[split]` pictures a class; a split without a limit is kept whole."""
        self._source, self.kind, self.class_names = source, source.kind, source.class_names
        taken: Counter[tuple[str, int]] = Counter()
        self.rows: list[Row] = []
        for row in source.rows:
            taken[row.split, row.label] += 1
            if taken[row.split, row.label] <= limits.get(row.split, len(source.rows)):
                self.rows.append(row)

    def read(self, row: Row) -> Image.Image:
        """The picture of `row`."""
        return self._source.read(row)

    def describe(self) -> dict[str, Any]:
        """The whole source's description: ids are the same."""
        return self._source.describe()


def extracted(name: str, source: Source, model: str = "lite0-minilm") -> FeatureCache:
    """The cache of a source under `cache_home()/benchmarks/NAME`, extracted on the first call or resumed."""
    folder = cache_home() / "benchmarks" / name
    extract(source, load_encoder(model), folder, views=VIEWS, prompts=DEFAULT_PROMPTS)
    return FeatureCache.open(folder)


def fashion_mnist() -> FeatureCache:
    """Fashion-MNIST, 1,500 training and 500 test pictures a class, plain, two weak and four strong views."""
    source = FirstOfEachClass(open_source("fashion_mnist"), {"train": 1500, "test": 500})
    return extracted("fashion-mnist", source)


def tux_paint(folder: Path = Path("/usr/share/tuxpaint/stamps")) -> FeatureCache:
    """Tux Paint's stamps by folder: 17 classes, a natural long tail."""
    return extracted("tux-paint", open_source(folder))
