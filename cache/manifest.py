"""What the features of a cache are; a request for other ones is refused with the differing field named."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ulfine_fast.cache.digests import content_digest, is_storable, refuse_other_digest
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.files import write_atomically
from ulfine_fast.cache.io.json_files import check_schema, read_json
from ulfine_fast.cache.shard import VIEWED_SPLITS, Layout

FORMAT = "ulfine-fast-cache"
# 3 adds digests, and new caches have it. 2 adds int8 features, tokens, sources read as streams and appended parts to 1;
# a cache of these two has the lowest that covers it.
VERSIONS = (1, 2, 3)
NAME = "manifest.json"
DTYPES = ("float16", "float32", "int8")
# Where the images are, what wrote the file and how much may be missing do not change what a feature is.
_NOT_IDENTITY = ("version", "digest", "libraries", "created_by", "max_skipped")
_NOT_IDENTITY_OF_SOURCE = ("path",)
_FIX = "extract again into another folder"

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**24)]
_Views = Annotated[int, msgspec.Meta(ge=0, le=2**16)]
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Texts = Annotated[list[str], msgspec.Meta(min_length=1)]


class _ModelFields(msgspec.Struct):
    name: str
    pretrained: str | None
    sha256: str
    image_size: _Size
    dim: _Size
    logit_scale: Annotated[float, msgspec.Meta(ge=0, le=1e30)]
    normalized: bool = True


class _ViewFields(msgspec.Struct):
    weak: _Views
    strong: _Views
    seed: _Int64
    weak_scale: tuple[float, float] = (0.0, 1.0)
    strong_ops: _Views = 0
    strong_magnitude: _Views = 0


class _AppendFields(msgspec.Struct):
    kind: str
    fingerprint: str
    rows: _Count
    first_shard: _Count
    classes: _Count
    path: str = ""
    name: str = ""


class _MergedFields(msgspec.Struct):
    path: str
    rows: _Count
    batch_size: _Count
    source: dict[str, Any]
    prefix: str = ""


class _SourceFields(msgspec.Struct):
    kind: str
    fingerprint: str
    rows: Annotated[int, msgspec.Meta(ge=1, le=2**48)] | None = None
    parts: Annotated[int, msgspec.Meta(ge=1, le=2**48)] | None = None
    path: str = ""
    name: str = ""
    appended: list[_AppendFields] = []
    caches: list[_MergedFields] = []


class _Fields(msgspec.Struct):
    """What manifest.json must hold, in the order in which a problem is named."""

    model: _ModelFields
    preprocessing: str
    mean: list[float]
    std: list[float]
    views: _ViewFields
    dtype: Literal["float16", "float32", "int8"]
    precision: str
    batch_size: _Count
    shard_size: _Count
    class_names: _Texts
    prompts: list[str]
    source: _SourceFields
    tokens: list[str] = []
    token_width: _Size = 0
    exact: bool = True
    compiled: bool = False
    max_skipped: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    libraries: dict[str, str] = {}
    created_by: str = ""


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
        prompts: (P,) texts with {} for the class; none where the model has no text tower.
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
        with_digests: whether the cache has version 3, in which digests tie its files together; not in the file itself.
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
    with_digests: bool = True

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
        """3 with digests, else the lowest version of the format that covers the cache."""
        if self.with_digests:
            return 3
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
        del values["with_digests"]
        values = {"format": FORMAT, "version": self.version, **values}
        return values | {"digest": content_digest(values)} if self.with_digests else values

    def identity_of(self, shard: int) -> str | None:
        """Hex digest of what the features of a shard are, which its record repeats; None where there are no digests.

        Rows and classes that were appended later do not count, so that finished shards stay as they are.
        """
        if not self.with_digests:
            return None
        first_shards = [part["first_shard"] for part in self.source.get("appended", [])]
        return self._identities[bisect_right(first_shards, shard)]

    @cached_property
    def _identities(self) -> list[str]:
        """The digest of the cache as it was made, then of that after each append."""
        appended = self.source.get("appended", [])
        return [content_digest(_identity(self._as_of(count))) for count in range(len(appended) + 1)]

    def _as_of(self, count: int) -> Manifest:
        """The manifest as it was after the first `count` appends."""
        appended = self.source.get("appended", [])
        later = appended[count:]
        if not later:
            return self
        source = {name: value for name, value in self.source.items() if name != "appended"}
        if count:
            source["appended"] = appended[:count]
        if self.parts:
            source["parts"] = later[0]["first_shard"]
        else:
            source["rows"] = self.source["rows"] - sum(part["rows"] for part in later)
        classes = len(self.class_names) - sum(part["classes"] for part in later)
        return replace(self, source=source, class_names=self.class_names[: max(classes, 0)])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Reads the content of the file; unknown fields are ignored.

        Raises:
            InputError: not a manifest, of another version, without a required field, or with a value that cannot be.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(f"this is no manifest of a feature cache (format must be {FORMAT!r})")
        version = values.get("version")
        if type(version) is not int or version not in VERSIONS:
            known = f"{', '.join(map(str, VERSIONS[:-1]))} and {VERSIONS[-1]}"
            raise InputError(f"the cache has format version {version!r}, this program reads {known}")
        if version == 3:
            refuse_other_digest(values, "the manifest", _FIX)
        # A later program may add fields to this version; this one does not need them.
        names = [field.name for field in fields(cls) if field.name in values and field.name != "with_digests"]
        check_schema(values, _Fields, name="the manifest", fix=_FIX)
        manifest = cls(**{name: values[name] for name in names}, with_digests=version == 3)
        manifest._check_together()
        return manifest

    def write(self, folder: Path) -> None:
        """Writes FOLDER/manifest.json atomically.

        Raises:
            InputError: the file system refused, or a value that a reader would refuse.
        """
        self.check()
        write_atomically(folder / NAME, (json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads FOLDER/manifest.json.

        Raises:
            InputError: no such folder or file, or not a manifest.
        """
        path = folder / NAME
        missing = f"{folder} is not a feature cache: it has no {NAME}; make one with extract"
        values: Any = read_json(path, object, fix=_FIX, missing=missing)
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

    def check(self) -> None:
        """Refuses values that a reader would refuse; call it before anything is written.

        Raises:
            InputError: names the first such value.
        """
        check_schema(asdict(self), _Fields, name="a cache with these settings", fix="choose another value")
        self._check_together()

    def _check_together(self) -> None:
        """Refuses fields that do not go together, and texts that HDF5 cannot hold."""
        if self.source.get("rows") is None and self.source.get("parts") is None:
            raise InputError("the manifest is incomplete (source.rows is missing)")
        if (self.token_width > 0) != (len(self.tokens) > 0):
            raise InputError("tokens must be a list of names, and token_width the length of a token")
        for name, texts in (("class name", self.class_names), ("prompt", self.prompts)):
            bad = next((text for text in texts if not is_storable(text)), None)
            if bad is not None:
                raise InputError(f"the {name} {bad!r} is not valid Unicode text and cannot be stored; rename it")
        appended = self.source.get("appended", [])
        rows, classes = (sum(part[name] for part in appended) for name in ("rows", "classes"))
        counted = self.source.get("rows")
        if (counted is not None and not self.parts and rows > counted) or classes >= len(self.class_names):
            raise InputError("source.appended has more rows or classes than the cache")


def is_cache(folder: Path) -> bool:
    """Whether the folder holds a manifest of this format, of any version: only then may anything be deleted."""
    try:
        return bool(read_json(folder / NAME, dict[str, Any], fix=_FIX).get("format") == FORMAT)
    except InputError:
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
