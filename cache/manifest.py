"""What the features of a cache are; a request that says otherwise is refused with the differing field named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.files import write_atomically
from ulfine_fast.cache.shard import VIEWED_SPLITS, Layout

FORMAT = "ulfine-fast-cache"
# 2 adds int8 features, tokens, sources read as streams and appended parts; a cache says the lowest that covers it.
VERSIONS = (1, 2)
NAME = "manifest.json"
DTYPES = ("float16", "float32", "int8")
# Where the images lie, what wrote the file and how much may be missing do not change what a feature is.
_NOT_IDENTITY = ("version", "libraries", "created_by", "max_skipped")
_NOT_IDENTITY_OF_SOURCE = ("path",)
_NEEDED = {
    "model": ("name", "pretrained", "sha256", "image_size", "dim", "logit_scale"),
    "views": ("weak", "strong", "seed"),
    "source": ("kind", "fingerprint"),
}


@dataclass(frozen=True)
class Manifest:
    """CACHE/manifest.json, written before anything else.

    Attributes:
        model: name, pretrained, sha256 (of the weights), image_size (pixels), dim, logit_scale, normalized.
        preprocessing: the evaluation transform as text. mean, std: its normalisation by channel, for values 0..1.
        views: weak, strong (views of each kind), seed, and the recipe's ranges.
        dtype: of the stored features. precision: that the model ran in.
        batch_size: images encoded together. shard_size: source rows a shard covers at most.
        class_names: (K,). prompts: (P,) with {} for the class.
        source: kind, path or name, rows, fingerprint (over ids, labels, splits and file sizes); of a stream the number
            of parts instead of that of rows.
        tokens: names of the S tokens stored beside each feature, see `ulfine_fast.cache.models.tokens.Taps`.
        token_width: W, their length; 0 where there are none.
        exact: whether all images were resized and cropped by the model's own preprocessing as they were; else large
            ones were reduced before, or a GPU did it, which turns a feature by a degree or so.
        compiled: whether the model ran as `torch.compile` made it.
        max_skipped: share of images that may be unreadable, 0..1.
        libraries: versions of what computed the features. created_by: this tool and its version.
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
        """The lowest version of the format that covers what the cache holds."""
        return 2 if self.parts or self.tokens or self.dtype == "int8" or "appended" in self.source else 1

    def layout(self, split: str) -> Layout:
        """What the shards of `split` look like."""
        viewed = split in VIEWED_SPLITS
        weak, strong = (int(self.views[kind]) if viewed else 0 for kind in ("weak", "strong"))
        return Layout(self.dim, self.dtype, weak, strong, len(self.tokens), self.token_width)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file, in JSON's types."""
        # Through JSON, so that a manifest just made equals the same one read back (tuples become lists).
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"format": FORMAT, "version": self.version, **plain}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Reads the content of the file; unknown fields are left aside.

        Raises:
            InputError: not a manifest, of another version, or without a needed field.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(f"this is no manifest of a feature cache (format must be {FORMAT!r})")
        if values.get("version") not in VERSIONS:
            known_ones = " and ".join(map(str, VERSIONS))
            raise InputError(f"the cache has format version {values.get('version')!r}, this program reads {known_ones}")
        # A later program may say more of a cache of this version; what this one needs is all here.
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        try:
            manifest = cls(**known)
        except TypeError as error:
            raise InputError(f"the manifest is incomplete ({str(error).partition('__init__() ')[2]})") from error
        manifest._refuse_nonsense()
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

    def refuse_mismatch(self, wanted: Manifest) -> None:
        """Compares what the features are with a request.

        Raises:
            CacheMismatch: names the first field that differs, dotted, with both values.
        """
        _compare("", _identity(self), _identity(wanted))

    def _refuse_nonsense(self) -> None:
        # The file may have been edited by hand; everything later trusts what passes here.
        for section, keys in _NEEDED.items():
            values = getattr(self, section)
            missing = [key for key in keys if not isinstance(values, dict) or key not in values]
            if missing:
                raise InputError(f"the manifest is incomplete ({section}.{missing[0]} is missing)")
        count = self.source.get("rows", self.source.get("parts"))
        whole = [self.model.get("dim"), count, self.views.get("weak"), self.views.get("strong")]
        if not all(isinstance(value, int) and value >= 0 for value in whole) or self.dtype not in DTYPES:
            raise InputError("model.dim, source.rows, views.weak, views.strong or dtype has a value that cannot be")
        kinds, width = self.tokens, self.token_width
        if not isinstance(kinds, list) or not isinstance(width, int) or (width > 0) != (len(kinds) > 0):
            raise InputError("tokens must be a list of names, and token_width the length of a token")
        for names in (self.class_names, self.prompts):
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise InputError("class_names and prompts must be lists of texts, with at least one each")


def is_cache(folder: Path) -> bool:
    """Whether the folder holds a manifest of this format, of whatever version: only then may anything be deleted."""
    try:
        return bool(json.loads((folder / NAME).read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _identity(manifest: Manifest) -> dict[str, Any]:
    """The fields that say what a feature is, in the order of the class."""
    values = {name: value for name, value in manifest.to_dict().items() if name not in _NOT_IDENTITY}
    values["source"] = {k: v for k, v in values["source"].items() if k not in _NOT_IDENTITY_OF_SOURCE}
    return values


def _compare(name: str, found: Any, wanted: Any) -> None:
    """Walks both down to the first leaf that differs: a list of 1000 class names would make no readable sentence."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            _compare(f"{name}.{key}".lstrip("."), found.get(key), wanted.get(key))
    elif isinstance(found, list) and isinstance(wanted, list):
        # Two lists of other lengths differ nearly everywhere, so their lengths say more than the first entry.
        if len(found) != len(wanted):
            raise CacheMismatch(f"{name}.length", len(found), len(wanted))
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            _compare(f"{name}.{index}", *pair)
    elif found != wanted:
        raise CacheMismatch(name, found, wanted)
