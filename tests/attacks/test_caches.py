"""Every file of a cache is damaged in many ways: it is refused in one sentence, or what it holds is unchanged.

A few hundred damages by default, as many as `--mutations N` says otherwise.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cache.caches import write_named_cache
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline.merge import merge
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import app

V0_1 = Path(__file__).parents[1] / "fixtures/v0_1/cache"
DEFAULT = 300  # damages of each cache
HANG_SECONDS = 60
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 10**12, 2**63, 10**30, 1.5, -0.0, 1e308, "", "x", "\0", "\x1b[31m", [], [[]], {}),
    *(["x"], {"x": 1}, "0" * 64, [0] * 1000),
]
RAW_VALUES = [b"1" + b"0" * 400, b"1e400", b"NaN", b"-Infinity", b'"\\ud800"', b"[" * 100_000, b'{"a":' * 100_000]


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    """A cache of version 1, and one of version 3 with another of the same shape but other features and classes."""
    root = tmp_path_factory.mktemp("caches")
    shutil.copytree(V0_1, root / "v1")
    write_named_cache(root / "v3", ["cat", "dog"], skipped=1)
    write_named_cache(root / "other", ["cat", "ant"], skipped=1)
    return {name: root / name for name in ("v1", "v3", "other")}


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Ends the process with a traceback where something hangs, be it in C."""
    yield
    faulthandler.cancel_dump_traceback_later()


# -- damages: each takes the file, a random generator and the same file of another cache


def _truncate(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _flip(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _zero(path: Path, rng: random.Random, other: Path) -> None:
    data, length = path.read_bytes(), rng.choice((1, 4, 8, 16, 64, 512))
    start = rng.randrange(len(data)) // 8 * 8
    path.write_bytes((data[:start] + bytes(length) + data[start + length :])[: len(data)])


def _insert(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    start = rng.randrange(len(data) + 1)
    path.write_bytes(data[:start] + rng.randbytes(rng.choice((1, 8, 100))) + data[start:])


def _grow(path: Path, rng: random.Random, other: Path) -> None:
    os.truncate(path, 1 << rng.choice((20, 36, 43)))  # a file with a hole, which takes no room


def _delete(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def _swap(path: Path, rng: random.Random, other: Path) -> None:
    shutil.copyfile(other, path)


def _swap_shard(path: Path, rng: random.Random, other: Path) -> None:
    """The shard with its record, or the record alone where `path` is no shard."""
    for suffix in (".h5", ".json"):
        if other.with_suffix(suffix).exists():
            shutil.copyfile(other.with_suffix(suffix), path.with_suffix(suffix))


def _pipe(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()
    path.symlink_to(rng.choice([other, path, Path("/dev/zero"), path.with_name("nowhere")]))


DAMAGES = [_truncate, _flip, _flip, _zero, _zero, _insert, _grow, _delete, _swap, _swap_shard, _pipe, _folder, _link]


def _change_json(path: Path, rng: random.Random, other: Path) -> None:
    """One value anywhere gets another value, or goes, or comes twice."""
    content = json.loads(path.read_text(encoding="utf-8"))
    positions: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            positions.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(content)
    node, key = rng.choice(positions)
    marker = "the value that is replaced"
    change = rng.randrange(5)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node, list):
        rng.shuffle(node)
    elif change == 2 and isinstance(node[key], list):
        node[key] = node[key][::-1]
    elif change == 3:
        node[key] = marker
    else:
        node[key] = rng.choice(VALUES)
    data = json.dumps(content).encode()
    if change == 3:
        data = data.replace(json.dumps(marker).encode(), rng.choice(RAW_VALUES))
    path.write_bytes(data)


# -- what must hold


def _content(folder: Path) -> dict[str, Any]:
    """All that a user gets of a cache."""
    cache = FeatureCache.open(folder)
    manifest = cache.manifest.to_dict() if cache.manifest is not None else {}
    arrays = [cache.plain, cache.labels, cache.splits, cache.view_rows, cache.text_features, cache.prototypes]
    arrays += [array for kind in ("weak", "strong") for array in (cache.views(kind), cache.view_areas(kind))]
    arrays += [cache.head[name] for name in sorted(cache.head)]
    summary = cache.summary()
    return {
        "arrays": [(array.dtype.str, array.shape, array.tobytes()) for array in arrays if array is not None],
        "ids": cache.ids,
        "class_names": cache.class_names,
        "logit_scale": cache.logit_scale,
        "skipped": summary["skipped"],
        "counts": summary["counts"],
        "problems": summary["problems"],
        "manifest": {name: value for name, value in manifest.items() if name != "digest"},
    }


def _content_or_refusal(folder: Path) -> dict[str, Any] | str:
    try:
        return _content(folder)
    except InputError as error:
        return str(error)


def _clear(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_symlink():
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _copy(folder: Path, target: Path) -> Iterator[Path]:
    shutil.copytree(folder, target)
    yield target
    _clear(target)


def _is_sentence(text: str) -> bool:
    return bool(text) and "\n" not in text.strip() and "Traceback" not in text


# Without digests these of version 1 cannot be checked: they change what is said of the features, not the features.
UNCHECKED_V1 = ("manifest", "skipped")


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_a_damaged_cache_is_refused_or_unchanged(caches, name, tmp_path, request):
    count = request.config.getoption("--mutations", default=0) or DEFAULT
    folder, other = caches[name], caches["other" if name == "v3" else "v3"]
    wanted = _content(folder)
    assert wanted["problems"] == []
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    rng = random.Random(f"{name} {count}")
    outcomes: Counter[str] = Counter()
    for number in range(count):
        file = rng.choice(files)
        damage: Callable[[Path, random.Random, Path], None] = rng.choice(
            [*DAMAGES, *([_change_json] * 10 if file.suffix == ".json" else [])]
        )
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        with _copy(folder, tmp_path / "cache") as copy:
            source = other / file if (other / file).exists() else other / "manifest.json"
            damage(copy / file, rng, source)
            what = f"mutation {number}: {damage.__name__} of {file}"
            found = _content_or_refusal(copy)
            if isinstance(found, str) or found["problems"]:
                sentences = [found] if isinstance(found, str) else found["problems"]
                assert all(_is_sentence(sentence) for sentence in sentences), what
                outcomes["refused"] += 1
                continue
            unchecked = UNCHECKED_V1 if name == "v1" else ()
            for part, value in wanted.items():
                assert part in unchecked or found[part] == value, f"{what}: another {part} was accepted"
            outcomes["unchanged"] += 1
    print(f"{name}: {dict(outcomes)}")  # shown with -rP
    assert outcomes["refused"] > count / 3
    assert sum(outcomes.values()) == count


def test_commands_refuse_a_damaged_cache_in_one_sentence(caches, tmp_path):
    rng = random.Random(0)
    runner = CliRunner()
    damages = [_truncate, _delete, _pipe, _folder, _swap, _flip, _change_json]
    commands = [
        ["inspect", "CACHE"],
        ["fit", "CACHE", "-o", "RUN", "--steps", "1"],
        ["cache", "merge", "CACHE", "OTHER", "-o", "ALL"],
        ["cache", "export", "CACHE", "-o", "FILES"],
    ]
    for file in ("manifest.json", "text.h5", "shards/00001.json", "shards/00001.h5"):
        for damage in damages if file.endswith("json") else damages[:-1]:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            with _copy(caches["v3"], tmp_path / "CACHE") as copy:
                damage(copy / file, rng, caches["other"] / file)
                for command in commands:
                    names = {"CACHE": copy, "OTHER": caches["other"]}
                    words = [str(names.get(word, tmp_path / word if word.isupper() else word)) for word in command]
                    done = runner.invoke(app, words)
                    what = f"{damage.__name__} of {file}: {command}: {done.output}"
                    assert done.exit_code == 2, what
                    assert "Traceback" not in done.output, what
                    assert not (tmp_path / "RUN").exists(), what


# -- what ties the files together, one by one


def _reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file and gives it the digest that fits, as a program would that means it."""
    from ulfine_fast.cache.digests import content_digest

    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps({**content, "digest": content_digest(content)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["class_names"].reverse(),
        lambda manifest: manifest.update(prompts=["a picture of a {}."]),
        lambda manifest: manifest.update(mean=[0.4, 0.5, 0.5]),
        lambda manifest: manifest["model"].update(logit_scale=50.0),
        lambda manifest: manifest["model"].update(sha256="cd" * 32),
        lambda manifest: manifest["source"].update(rows=manifest["source"]["rows"] - 4),
        lambda manifest: manifest["source"].update(fingerprint="x"),
        lambda manifest: manifest.update(preprocessing="Compose()"),
    ],
)
def test_another_manifest_is_refused_though_its_own_digest_fits(caches, tmp_path, change):
    with _copy(caches["v3"], tmp_path / "cache") as copy:
        _reseal(copy / "manifest.json", change)
        with pytest.raises(InputError, match=r"text\.h5 cannot be used"):
            FeatureCache.open(copy)
        with pytest.raises(InputError, match=r"text\.h5 cannot be used"):
            merge([copy, caches["other"]], tmp_path / "all")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["shards/00001.h5", "shards/00001.json"], "shard 00001 was made for another cache"),
        (["shards/00001.h5"], "shard 00001 is damaged"),
        (["shards/00001.json"], "shard 00001 was made for another cache"),
        (["text.h5"], r"text\.h5 cannot be used: it was made for another cache"),
        (["manifest.json"], r"text\.h5 cannot be used: it was made for another cache"),
    ],
)
def test_files_of_another_cache_are_refused(caches, tmp_path, files, message):
    """Of one with the same shape, but other classes and features."""
    with _copy(caches["v3"], tmp_path / "cache") as copy:
        for file in files:
            shutil.copyfile(caches["other"] / file, copy / file)
        with pytest.raises(InputError, match=message):
            FeatureCache.open(copy).plain  # noqa: B018 - the property reads the shards
        with pytest.raises(InputError, match=message):
            merge([copy, caches["other"]], tmp_path / "all")
        done = CliRunner().invoke(app, ["inspect", str(copy)])
        assert done.exit_code == 2


def test_class_names_of_an_old_cache_are_compared_with_its_texts(caches, tmp_path):
    with _copy(caches["v1"], tmp_path / "cache") as copy:
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["class_names"].reverse()
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=r"text\.h5 cannot be used: it holds .* where manifest\.json has"):
            FeatureCache.open(copy)


# -- kills


def test_a_cache_killed_at_any_write_goes_on_as_if_it_had_not_been(tmp_path, request):
    """Extract, overwrite, append, merge and import; at every write with `--mutations`, else at a few."""
    every = bool(request.config.getoption("--mutations"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.attacks.cache_kills", str(tmp_path), "1" if every else "8"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)  # shown with -rP
    assert [one["wrong"] for one in result.values()] == [[]] * 5
    assert min(one["kills"] for one in result.values()) >= (40 if every else 2)
