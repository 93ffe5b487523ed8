"""What the features of a cache are; a request for other ones is refused with the differing field named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.files import write_atomically
from ulfine_fast.cache.shard import VIEWED_SPLITS, Layout

FORMAT = "ulfine-fast-cache"
# 2 adds int8 features, tokens, sources read as streams and appended parts; a cache has the lowest that covers it.
VERSIONS = (1, 2)
NAME = "manifest.json"
DTYPES = ("float16", "float32", "int8")
# Where the images are, what wrote the file and how much may be missing do not change what a feature is.
_NOT_IDENTITY = ("version", "libraries", "created_by", "max_skipped")
_NOT_IDENTITY_OF_SOURCE = ("path",)
_REQUIRED = {
    "model": ("name", "pretrained", "sha256", "image_size", "dim", "logit_scale"),
    "views": ("weak", "strong", "seed"),
    "source": ("kind", "fingerprint"),
}


@dataclass(frozen=True)
class Manifest:
    """CACHE/manifest.json, written before anything else.

    Attributes:
        model: name, pretrained, sha256 (of the weights), image_size (pixels), dim, logit_scale, normalized.
        preprocessing: the evaluation transform as text.
        mean: its normalisation by channel, for pixel values 0..1.
        std: likewise.
        views: weak, strong (number of views of each kind), seed, and the recipe's ranges.
        dtype: of the stored features, one of `DTYPES`.
        precision: that the model ran in.
        batch_size: images encoded together.
        shard_size: source rows that a shard covers at most.
        class_names: (K,) texts.
        prompts: (P,) texts with {} for the class.
        source: kind, path or name, rows, fingerprint (over ids, labels, splits and file sizes); of a stream the number
            of parts instead of that of rows.
        tokens: names of the S tokens stored beside each feature, see `ulfine_fast.cache.models.tokens.TokenHooks`.
        token_width: W, their length; 0 where there are none.
        exact: whether the model's own preprocessing resized and cropped every image at full size; else large images
            were reduced before, or a GPU resized them, which turns a feature by a degree or so.
        compiled: whether the model ran as `torch.compile` made it.
        max_skipped: fraction of images that may be unreadable, 0..1.
        libraries: versions of what computed the features.
        created_by: this tool and its version.
    """

    model: dict[str, Any]
    preprocessing: str
    mean: list[float]
    std: list[float]
    views: dict[str, Any]
    dtype: str
    precision: str
    batch_size: int
    shard_size: int
    class_names: list[str]
    prompts: list[str]
    source: dict[str, Any]
    tokens: list[str] = field(default_factory=list)
    token_width: int = 0
    exact: bool = True
    compiled: bool = False
    max_skipped: float = 0.01
    libraries: dict[str, str] = field(default_factory=dict)
    created_by: str = ""

    @property
    def dim(self) -> int:
        """D, length of a feature."""
        return int(self.model["dim"])

    @property
    def rows(self) -> int | None:
        """Rows of the source, those of unreadable images included; None for a stream."""
        return None if self.parts else int(self.source["rows"])

    @property
    def parts(self) -> int:
        """Parts of a stream, one shard each; 0 where rows are counted."""
        return int(self.source.get("parts", 0))

    @property
    def version(self) -> int:
        """The lowest version of the format that covers the cache."""
        return 2 if self.parts or self.tokens or self.dtype == "int8" or "appended" in self.source else 1

    def layout(self, split: str) -> Layout:
        """The layout of the shards of a split."""
        has_views = split in VIEWED_SPLITS
        return Layout(
            dim=self.dim,
            dtype=self.dtype,
            weak=int(self.views["weak"]) if has_views else 0,
            strong=int(self.views["strong"]) if has_views else 0,
            tokens=len(self.tokens),
            token_width=self.token_width,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of the file, in JSON's types."""
        # Through JSON, so that a new manifest equals the same one read from a file (tuples become lists).
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"format": FORMAT, "version": self.version, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Reads the content of the file; unknown fields are ignored.

        Raises:
            InputError: not a manifest, of another version, without a required field, or with a value that cannot be.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(f"this is no manifest of a feature cache (format must be {FORMAT!r})")
        if values.get("version") not in VERSIONS:
            versions = " and ".join(map(str, VERSIONS))
            raise InputError(f"the cache has format version {values.get('version')!r}, this program reads {versions}")
        # A later program may add fields to this version; this one does not need them.
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        try:
            manifest = cls(**known)
        except TypeError as error:
            raise InputError(f"the manifest is incomplete ({str(error).partition('__init__() ')[2]})") from error
        manifest._check()
        return manifest

    def write(self, folder: Path) -> None:
        """Writes FOLDER/manifest.json atomically.

        Raises:
            InputError: the file system refused.
        """
        write_atomically(folder / NAME, (json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads FOLDER/manifest.json.

        Raises:
            InputError: no such folder or file, or not a manifest.
        """
        path = folder / NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{folder} is not a feature cache: it has no {NAME}; make one with extract") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); extract again into another folder") from error
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def refuse_mismatch(self, requested: Manifest) -> None:
        """Compares the features of this cache with a request.

        Raises:
            CacheMismatch: names the first field that differs, dotted, with both values.
        """
        _compare("", _identity(self), _identity(requested))

    def _check(self) -> None:
        """Refuses values that cannot be: the file may have been edited by hand, and nothing checks it later."""
        for section, keys in _REQUIRED.items():
            values = getattr(self, section)
            missing = [key for key in keys if not isinstance(values, dict) or key not in values]
            if missing:
                raise InputError(f"the manifest is incomplete ({section}.{missing[0]} is missing)")
        size = self.source.get("rows", self.source.get("parts"))
        numbers = [self.model.get("dim"), size, self.views.get("weak"), self.views.get("strong")]
        if not all(isinstance(value, int) and value >= 0 for value in numbers) or self.dtype not in DTYPES:
            raise InputError("model.dim, source.rows, views.weak, views.strong or dtype has a value that cannot be")
        kinds, width = self.tokens, self.token_width
        if not isinstance(kinds, list) or not isinstance(width, int) or (width > 0) != (len(kinds) > 0):
            raise InputError("tokens must be a list of names, and token_width the length of a token")
        for texts in (self.class_names, self.prompts):
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise InputError("class_names and prompts must be lists of texts, with at least one each")


def is_cache(folder: Path) -> bool:
    """Whether the folder holds a manifest of this format, of any version: only then may anything be deleted."""
    try:
        return bool(json.loads((folder / NAME).read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _identity(manifest: Manifest) -> dict[str, Any]:
    """The fields that determine the features, in the order of the class."""
    values = {name: value for name, value in manifest.to_dict().items() if name not in _NOT_IDENTITY}
    values["source"] = {k: v for k, v in values["source"].items() if k not in _NOT_IDENTITY_OF_SOURCE}
    return values


def _compare(name: str, cached: Any, requested: Any) -> None:
    """Descends to the first value that differs: a list of 1000 class names would make no readable sentence."""
    if isinstance(cached, dict) and isinstance(requested, dict):
        for key in [*requested, *(key for key in cached if key not in requested)]:
            _compare(f"{name}.{key}".lstrip("."), cached.get(key), requested.get(key))
    elif isinstance(cached, list) and isinstance(requested, list):
        # Two lists of other lengths differ nearly everywhere, so their lengths are clearer than the first entry.
        if len(cached) != len(requested):
            raise CacheMismatch(f"{name}.length", len(cached), len(requested))
        for index, pair in enumerate(zip(cached, requested, strict=True)):
            _compare(f"{name}.{index}", *pair)
    elif cached != requested:
        raise CacheMismatch(name, cached, requested)
