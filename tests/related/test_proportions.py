"""Bags from files: what they say, what is refused, and a fit of them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.test_bad_input import refused, run
from tests.conftest import make_clusters
from ulfine_fast import FeatureCache, FitConfig, Run, fit
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.label_proportions.bags import draw_bags
from ulfine_fast.related.label_proportions.files import bag_split, read_bags

CLASSES = ["cat", "dog", "a hen"]
BAGS = "id,bag\n0.png,x\n2.png,x\n3.png,y\n"
LONG = "bag,class,share\nx,cat,0.5\nx,a hen,0.5\ny,dog,1\n"


@pytest.fixture
def cache():
    """Rows 0 to 3 labelled, 4 5 unlabelled, 6 val, 7 8 test."""
    random = np.random.default_rng(0)
    splits = ["train"] * 4 + ["unlabeled"] * 2 + ["val"] + ["test"] * 2
    labels, ids = [0, 1, 2, 1, -1, -1, 1, 0, 2], [f"{row}.png" for row in range(9)]
    return FeatureCache.from_arrays(random.normal(size=(9, 4)), labels, class_names=CLASSES, splits=splits, ids=ids)


@pytest.fixture
def read(tmp_path, cache):
    def parse(bags=BAGS, proportions=LONG):
        (tmp_path / "bags.csv").write_text(bags)
        (tmp_path / "proportions.csv").write_text(proportions)
        return read_bags(tmp_path / "bags.csv", tmp_path / "proportions.csv", cache)

    return parse


@pytest.mark.parametrize(
    "proportions", [LONG, "bag,a hen,cat,dog\ny,0,0,1\nx,.5,.5,0\n", "bag,a hen,dog,cat\nx,0.5,0,0.5\ny,0,1,0\n"]
)
def test_both_forms_of_the_table_say_the_same(read, proportions):
    bags = read(proportions=proportions)
    assert bags.names == ("x", "y")
    assert [rows.tolist() for rows in bags.members] == [[0, 2], [3]]
    assert bags.proportions.tolist() == [[0.5, 0, 0.5], [0, 1, 0]]


@pytest.mark.parametrize(
    ("bags", "proportions"),
    [
        (
            "\ufeffid , bag\n0.png, x \n2.png,x\n3.png,y\n\n  \n",
            "bag , class,share \nx,cat,0.5\nx, a hen,.5\ny,dog,1.0\n\n",
        ),
        (BAGS.replace("\n", "\r\n"), LONG.replace("\n", "\r\n") + "\r\n"),
        (BAGS.replace("x", "é"), LONG.replace("x", "e\u0301")),
        (BAGS, " bag ,cat ,dog,a hen\nx,.5,,.5\n".replace(",,", ",0,") + "y,0,1,0\n,,,\n"),
    ],
)
def test_blanks_line_ends_and_forms_of_unicode_change_nothing(read, bags, proportions):
    found = read(bags, proportions)
    assert [rows.tolist() for rows in found.members] == [[0, 2], [3]]
    assert found.proportions.tolist() == [[0.5, 0, 0.5], [0, 1, 0]]


@pytest.mark.parametrize("column", ["bags", "Bag", "shares", "Class"])
def test_a_column_that_only_looks_like_a_known_one_is_named(read, column):
    bags, proportions = BAGS, LONG
    if column.lower().startswith("bag"):
        bags = bags.replace("id,bag", f"id,{column}")
    else:
        proportions = proportions.replace("class,share", f"{column},share" if column == "Class" else f"class,{column}")
    with pytest.raises(InputError, match=f"{column}"):
        read(bags, proportions)


@pytest.mark.parametrize("form", ["tsv", "parquet"])
def test_classes_and_bags_that_are_numbers(tmp_path, form):
    """1.0 is 1, as pandas writes whole numbers where one is missing."""
    names = [str(k) for k in range(11)]
    cache = FeatureCache.from_arrays(np.eye(11), list(range(11)), class_names=names)
    bags = {"id": ["0", "10", "3"], "bag": [1.0, 1.0, 2.0]}
    shares = {"bag": [1.0, 1.0, 2.0], "class": [10.0, 2.0, 3.0], "share": [0.75, 0.25, 1.0]}
    for name, columns in (("bags", bags), ("shares", shares)):
        if form == "parquet":
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        else:
            pd.DataFrame(columns).to_csv(tmp_path / f"{name}.tsv", sep="\t", index=False)
    found = read_bags(tmp_path / f"bags.{form}", tmp_path / f"shares.{form}", cache)
    assert [rows.tolist() for rows in found.members] == [[0, 10], [3]]
    assert (found.proportions[0, 10], found.proportions[0, 2], found.proportions[1, 3]) == (0.75, 0.25, 1)


def test_rounded_proportions_are_made_to_sum_to_one(read):
    bags = read(proportions="bag,class,share\ny,dog,1\nx,cat,0.333\nx,dog,0.333\nx,a hen,0.333\n")
    np.testing.assert_allclose(bags.proportions[0], [1 / 3] * 3)


@pytest.mark.parametrize(
    ("bags", "proportions", "words"),
    [
        ("id,label\n0.png,x\n", LONG, "must have the columns id and bag, got id, label"),
        ("id,bag\n", LONG, "bags.csv has no line"),
        ("", LONG, "bags.csv must have the columns id and bag, got none"),
        ("id,bag\n0.png\n", LONG, "line 2 of .*bags.csv has 1 cells instead of 2"),
        ("id,bag\n0.png,\n", LONG, "names no bag for '0.png'"),
        (
            "id,bag\nno.png,x\n",
            LONG,
            r"bags.csv names 'no.png', which this cache lacks \(its ids look like '0.png'\); remove its line",
        ),
        ("id,bag\n7.png,x\n", LONG, "holds '7.png', a test image of this cache"),
        ("id,bag\n6.png,x\n", LONG, "holds '6.png', a val image of this cache"),
        (BAGS + "0.png,y\n", LONG, "puts '0.png' into bag 'x' and again into 'y'; keep one line"),
        (BAGS + "1.png,z\n", LONG, "has no proportions of bag 'z'; add them, or take the bag out"),
        (BAGS, LONG + "z,cat,1\n", "bag 'z' of .* has no image in .*bags.csv; add its images or remove it"),
        (BAGS, LONG + "y,cow,0\n", "names class 'cow', which is none of cat, dog, a hen"),
        (BAGS, "bag,cat,dog,cow\nx,1,0,0\ny,0,1,0\n", "names class 'cow', which is none of"),
        (BAGS, LONG + "y,dog,1\n", "two proportions of class 'dog' in bag 'y'; keep one"),
        (BAGS, "bag,cat,dog\nx,1,0\nx,1,0\n", "two lines for bag 'x'; keep one"),
        (BAGS, LONG + "y,cat,0.25\n", "the proportions of bag 'y' in .* sum to 1.25; give proportions that sum to 1"),
        (
            BAGS,
            LONG.replace("dog,1", "dog,100"),
            "gives bag 'y' the proportion '100' of class 'dog'; give a number from 0 to 1",
        ),
        (BAGS, LONG.replace("dog,1", "dog,much"), "the proportion 'much'"),
        (BAGS, LONG.replace("dog,1", "dog,nan"), "the proportion 'nan'"),
        (BAGS, LONG.replace("dog,1", "dog,-0.5"), "the proportion '-0.5'"),
        (BAGS, "id,class\n0,cat\n", "must have the columns bag, class and share, or bag and one for each class"),
        (BAGS, "bag\nx\n", "must have the columns bag, class and share"),
    ],
)
def test_a_mistake_is_one_sentence(read, bags, proportions, words):
    with pytest.raises(InputError, match=words) as result:
        read(bags, proportions)
    assert "\n" not in str(result.value)


def test_a_missing_file_is_named(tmp_path, cache):
    with pytest.raises(InputError, match=r"no such table: .*none.csv; name a .* file with the columns id and bag"):
        read_bags(tmp_path / "none.csv", tmp_path / "none.csv", cache)


def test_bags_train_and_other_labelled_images_judge(read, cache):
    split = bag_split(cache, read())
    roles = [getattr(split, role).tolist() for role in ("labeled", "unlabeled", "val", "test")]
    assert roles == [[], [0, 2, 3], [6], [7, 8]]
    bare = FeatureCache.from_arrays(cache.plain[:6], cache.labels[:6], class_names=CLASSES, ids=cache.ids[:6])
    assert bag_split(bare, read()).test.tolist() == [1]
    unjudged = cache.with_labels(np.where(cache.splits == "val", -1, cache.labels))
    assert bag_split(unjudged, read()).val.tolist() == [1]
    with pytest.raises(InputError, match="no labelled image is left outside the bags to test on"):
        bag_split(bare, read("id,bag\n0.png,x\n1.png,x\n2.png,x\n3.png,y\n"))


def test_a_cache_without_any_label_but_the_tests_learns(quick):
    whole = make_clusters(classes=6, text_noise=1.5, noise=0.7)
    train = np.flatnonzero(whole.splits == "train")
    bags = draw_bags(train, whole.labels[train], 8, 6, seed=0)
    cache = whole.with_labels(np.where(whole.splits == "train", -1, whole.labels))
    split = bag_split(cache, bags)
    zero, run = (
        fit(cache, quick(method=method, lr=0.1, steps=60, batch_labeled=64), split=split)
        for method in ("zero_shot", "proportions")
    )
    assert run.metrics["balanced_accuracy"] > zero.metrics["balanced_accuracy"] + 0.05
    with pytest.raises(InputError, match="method ulfine learns from labelled images and this split has none"):
        fit(cache, quick(method="ulfine"), split=split)
    with pytest.raises(InputError, match="bag_size is 5 and the split has bags of its own; set bag_size to 0"):
        fit(cache, FitConfig(method="proportions", bag_size=5), split=split)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("llp")
    source = write_images(root / "images", {"train/cat": 8, "train/dog": 8, "test/cat": 2, "test/dog": 2})
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    done = run("extract", source, "--out", root / "cache", "--model", model, "--workers", 0)
    assert done.exit_code == 0, done.output
    ids = FeatureCache.open(root / "cache").ids
    train = [name for name in ids if name.startswith("train")]
    (root / "bags.csv").write_text("id,bag\n" + "".join(f"{name},{i % 3}\n" for i, name in enumerate(train)))
    (root / "proportions.csv").write_text("bag,cat,dog\n" + "".join(f"{bag},0.5,0.5\n" for bag in range(3)))
    return root


def test_the_command_fits_the_bags_of_two_files(folder, tmp_path):
    files = ["--bags", folder / "bags.csv", "--proportions", folder / "proportions.csv"]
    fit_it = ["fit", folder / "cache", "--method", "proportions", "--steps", 6, "--eval-every", 2]
    done = run(*fit_it, *files, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    result = Run.load(tmp_path / "run")
    assert (len(result.split["unlabeled"]), result.split["labeled"]) == (16, [])
    assert [len(bag["ids"]) for bag in result.split["bags"]] == [6, 5, 5]
    # the run's own split brings its bags
    again = run(*fit_it, "--split", tmp_path / "run", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert Run.load(tmp_path / "again").metrics["balanced_accuracy"] == result.metrics["balanced_accuracy"]
    judged = run("eval", tmp_path / "run")
    assert judged.exit_code == 0, judged.output
    message = refused("realign", tmp_path / "run", "--out", tmp_path / "r")
    assert "the proportions run was fitted without labelled images" in message


def test_options_that_do_not_go_together_are_refused(folder, tmp_path):
    command = ["fit", folder / "cache", "--out", tmp_path / "run"]
    files = ["--bags", folder / "bags.csv", "--proportions", folder / "proportions.csv"]
    assert "method ulfine does not read bags, which proportions reads" in refused(*command, *files)
    command += ["--method", "proportions"]
    assert "bags says nothing without proportions; give both" in refused(*command, *files[:2])
    assert "proportions says nothing without bags; give both" in refused(*command, *files[2:])
    assert "has none; give --bags and --proportions" in refused(*command)
    done = run(*command, *files, "--steps", 6, "--eval-every", 2)
    assert done.exit_code == 0, done.output
    again = [*command[:3], tmp_path / "again", *command[4:], *files, "--split", tmp_path / "run"]
    assert "a split is given and so are options of method proportions that name one" in refused(*again)
