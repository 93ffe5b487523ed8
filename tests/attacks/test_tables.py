"""Files that a user hands in, damaged in many ways: refused in one sentence, or read as another reader reads them.

Tables of images, labels, corrections and bags, lists of names, archives, features of other programs, and settings. They
have no digests: another cell is another table. A few hundred damages by default, as many as `--mutations N` says
otherwise.
"""

from __future__ import annotations

import csv
import faulthandler
import io
import json
import random
import shutil
import tarfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.attacks import damages
from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, InputError
from ulfine_fast.cache.interop.import_features import import_features, open_features
from ulfine_fast.cache.io.tables import read_table
from ulfine_fast.cache.models.prompts import read_label_names, read_prompts
from ulfine_fast.cache.pipeline.plan import is_listed
from ulfine_fast.cache.sources import UnreadableImage, open_source
from ulfine_fast.data.corrections import corrected, read_corrections
from ulfine_fast.related.label_proportions.files import bag_split, read_bags
from ulfine_fast.related.multilabel.labels import labels_by_row, read_label_table
from ulfine_fast.report.images import read_attributes
from ulfine_fast.search.space import read_space

DEFAULT = 400
HANG_SECONDS = 120
CACHE = make_clusters(train=10, test=4)


# -- the files, each written in two versions, the second of which a damage may put in the place of the first


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """As .parquet, .tsv or .csv."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_all(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    names, ids = [f"klass {rng.randrange(100):02d} {k}" for k in range(3)], CACHE.ids
    train = [name for name, split in zip(ids, CACHE.splits, strict=True) if split not in ("val", "test")]
    for suffix in ("csv", "tsv", "parquet"):
        chosen = rng.sample(ids, 12)
        labels = [rng.choice(CACHE.class_names) for _ in chosen]
        write_table(folder / f"corrections.{suffix}", {"id": chosen, "label": labels})
        write_table(folder / f"groups.{suffix}", {"id": chosen, "group": ["é" if k % 2 else "b" for k in range(12)]})
        shown = {name: [rng.choice("01") for _ in chosen] for name in names}
        write_table(folder / f"labels.{suffix}", {"id": chosen, **shown})
        paths = [f"p{k}.jpg" for k in range(9)]
        columns = {"path": paths, "label": [names[k % 3] for k in range(9)], "split": ["train", "train", "test"] * 3}
        write_table(folder / f"images.{suffix}", columns)
        bags = rng.sample(train, 12)
        write_table(folder / f"bags.{suffix}", {"id": bags, "bag": [f"b{k % 3}" for k in range(12)]})
        write_table(
            folder / f"shares.{suffix}",
            {"bag": ["b0", "b1", "b2"], **{name: [0.25] * 3 for name in CACHE.class_names}},
        )
        write_table(folder / f"names.{suffix}", {"folder": ["0", "1", "2"], "name": names})
    for k in range(9):
        (folder / f"p{k}.jpg").write_bytes(jpeg(20 * k))
    (folder / "names.txt").write_text("\n".join(names))
    (folder / "prompts.txt").write_text("a photo of a {}.\n# none\nart of {}\n")
    (folder / "space.toml").write_text(
        'method = "linear_probe"\nsteps = [9, 20]\nlr = { low = 0.003, high = 0.3, log = true }\n'
    )

    # archives
    with tarfile.open(folder / "train.tar", "w") as archive:
        for k in range(9):
            for end, data in (("cls", str(k % 3).encode()), ("jpg", jpeg(20 * k)), ("json", b'{"label": 1, "x": NaN}')):
                if end != "json" or k % 2:
                    info = tarfile.TarInfo(f"{k:04d}.{end}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    hugging_face = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    cells = [{"bytes": jpeg(20 * k), "path": f"{k}.jpg"} for k in range(9)]
    table = pa.table({"image": cells, "label": [k % 3 for k in range(9)]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(hugging_face)}), folder / "train.parquet")

    # features of other programs
    numbers = np.random.default_rng(seed)
    features = numbers.normal(size=(9, 4)).astype(np.float32)
    arrays = {
        "features": features,
        "labels": np.arange(9) % 3,
        "ids": np.array([f"{k}.jpg" for k in range(9)]),
        "splits": np.array(["train", "train", "test"] * 3),
        "class_names": np.array(names),
        "text_features": numbers.normal(size=(3, 4)).astype(np.float32),
    }
    np.savez(folder / "features.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    for name, array in arrays.items():
        np.save(folder / f"npy.{name}.npy", array)
    write_table(folder / "metadata.parquet", {"id": arrays["ids"].tolist(), "label": [names[k % 3] for k in range(9)]})


# -- how they are read, as the commands do


def read_source(folder: Path, name: str) -> Any:
    names = None if name.startswith("images") else folder / "names.txt"
    source = open_source(folder / name, class_names_file=names)
    parts = [source.rows] if is_listed(source) else [source.open(part) for part in source.plan(4)]
    pixels = []
    for row in (row for rows in parts for row in rows):
        try:
            pixels.append([row.id, row.label, row.split, source.read(row).getpixel((0, 0))])
        except UnreadableImage as error:
            pixels.append([row.id, row.label, row.split, error.reason])
    return [source.class_names, pixels]


def read_features(folder: Path, name: str) -> Any:
    features = open_features(folder / name)
    out = folder / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_features(features, out, text_features=np.eye(3, 4, dtype=np.float32), progress=False)
    cache = FeatureCache.open(out)
    return [cache.ids, cache.class_names, cache.labels.tolist(), cache.plain.tolist(), cache.splits.tolist()]


def read_arrays(folder: Path, name: str) -> Any:
    """A folder of arrays."""
    arrays = folder / "arrays"
    shutil.rmtree(arrays, ignore_errors=True)
    arrays.mkdir()
    for file in folder.glob("npy.*.npy"):
        (arrays / file.name.removeprefix("npy.")).symlink_to(file)
    return read_features(folder, "arrays")


def read_clip_retrieval(folder: Path, name: str) -> Any:
    retrieval = folder / "retrieval"
    shutil.rmtree(retrieval, ignore_errors=True)
    for below, file, target in (
        ("img_emb", "img_emb_0.npy", "npy.features.npy"),
        ("metadata", "metadata_0.parquet", "metadata.parquet"),
    ):
        (retrieval / below).mkdir(parents=True)
        (retrieval / below / file).symlink_to(folder / target)
    return read_features(folder, "retrieval")


def read_both_bags(folder: Path, name: str) -> Any:
    suffix = Path(name).suffix
    bags = read_bags(folder / f"bags{suffix}", folder / f"shares{suffix}", CACHE)
    bag_split(CACHE, bags)
    return bags.to_list(CACHE.ids)


def read_labels(folder: Path, name: str) -> Any:
    table = read_label_table(folder / name)
    values, rows = labels_by_row(table, CACHE)
    return [table.class_names, values.tolist(), rows.tolist()]


def read_corrected(folder: Path, name: str) -> Any:
    return corrected(CACHE, read_corrections(folder / name)).labels.tolist()


READERS: dict[str, Callable[[Path, str], Any]] = {
    "corrections": read_corrected,
    "groups": lambda folder, name: read_attributes(folder / name),
    "labels": read_labels,
    "images": read_source,
    "train": read_source,
    "bags": read_both_bags,
    "shares": read_both_bags,
    "names": lambda folder, name: list(map(str, read_label_names(folder / name))),
    "prompts": lambda folder, name: read_prompts(folder / name),
    "space": lambda folder, name: str(read_space(folder / name)),
    "features": read_features,
    "packed": read_features,
    "npy": read_arrays,
    "metadata": read_clip_retrieval,
}
NEEDED = {"images": ["path"], "bags": ["id", "bag"], "shares": ["bag"], "names": ["folder", "name"]}


def read(folder: Path, name: str) -> Any:
    return READERS[name.split(".")[0]](folder, name)


def refuse_other_cells(path: Path) -> None:
    """Fails where the cells of a table are not those that another reader finds."""
    table = read_table(path, NEEDED.get(path.stem, ["id"]), others="keep")
    if path.suffix == ".parquet":
        wanted = [[str(value) for value in row.values()] for row in pq.read_table(path).to_pylist()]
        cells = [[str(value) for value in row] for row in zip(*table.columns, strict=True)]
    else:
        text = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")
        rows = list(csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ","))
        # a cell that is empty may be left out at the end of a line
        lines = [row for row in rows if any(cell.strip() for cell in row)]
        wanted = [row[: len(table.names)] for row in lines[1:]]
        cells = [list(row) for row in zip(*table.columns, strict=True)]
    assert cells == wanted


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Ends the process with a traceback where something hangs, be it in C."""
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tables")
    for seed, name in enumerate(("first", "second")):
        (root / name).mkdir()
        write_all(root / name, seed)
    return root / "first", root / "second"


def test_a_damaged_file_of_a_user_is_refused_or_read_as_it_is(folders, tmp_path, request):
    count = request.config.getoption("--mutations") or DEFAULT
    first, second = folders
    files = sorted(path.name for path in first.iterdir() if path.name.split(".")[0] in READERS)
    wanted = {name: json.dumps(read(first, name), sort_keys=True) for name in files}
    rng = random.Random(f"tables {count}")
    outcomes: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    folder = tmp_path / "files"
    for number in range(count):
        name = rng.choice(files)
        own = {".csv": [damages.change_csv], ".tsv": [damages.change_csv]}.get(Path(name).suffix, [])
        damage = rng.choice([*damages.DAMAGES, damages.grow, *own * 10])
        what = f"mutation {number}: {damage.__name__} of {name}"
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        # another folder each time, since open files are kept by their names
        shutil.rmtree(folder, ignore_errors=True)
        folder = tmp_path / f"files-{number}"
        folder.mkdir()
        for file in first.iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        damage(folder / name, rng, second / name)
        kind = Path(name).suffix
        try:
            found = json.dumps(read(folder, name), sort_keys=True)
            if name.split(".")[0] in ("corrections", "groups", "images", "bags"):
                refuse_other_cells(folder / name)
        except InputError as error:
            if not damages.is_sentence(str(error)):
                failures.append(f"{what}: no sentence: {error}")
            outcomes[kind, "refused"] += 1
            continue
        except Exception:
            failures.append(f"{what}: {traceback.format_exc()}")
            continue
        outcomes[kind, "unchanged" if found == wanted[name] else "another content"] += 1
    print(dict(sorted(outcomes.items())))  # shown with -rP
    assert not failures, "\n".join(failures[:20])
    assert sum(outcomes.values()) == count
