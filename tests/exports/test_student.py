"""Students: distilled from a run by the command, opened again, pushed and refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.cache.samples import write_tiny_model
from tests.cli.program import refused
from tests.cli.program import run as command
from ulfine_fast import InputError, Run, distill, load
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.distillation import train
from ulfine_fast.exports.student import Student

SMALL = ["--student", "test_efficientnet", "--image-size", 32, "--device", "cpu", "--workers", 0]


def write_colours(root, counts, seed=0):
    """Images of two classes that a network can tell apart: warm or cold colours, with noise."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            warm = name.endswith("warm") or (name == "unlabeled" and number % 2)
            colour = random.uniform(60, 120, 3) + np.array([70, 20, 0] if warm else [0, 20, 70])
            pixels = np.clip(colour + 25 * random.standard_normal((24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, and a run of them through a tiny encoder that tells the classes apart."""
    folder = tmp_path_factory.mktemp("world")
    counts = {f"{part}/{name}": n for part, n in (("train", 20), ("test", 15)) for name in ("cold", "warm")}
    images = write_colours(folder / "images", counts | {"unlabeled": 60})
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    for arguments in (
        ["extract", images, "--out", folder / "cache", "--model", model, "--workers", 0],
        ["fit", folder / "cache", "--out", folder / "run", "--method", "linear_probe", "--steps", 200],
    ):
        done = command(*arguments)
        assert done.exit_code == 0, done.output
    assert Run.load(folder / "run").metrics["accuracy"] > 0.8
    return folder


@pytest.fixture(scope="module")
def student(world):
    """A student of it, and what the command printed."""
    options = ["--epochs", 8, "--batch-size", 16, "--onnx", "--json"]
    done = command("distill", world / "run", world / "images", *SMALL, *options, "--out", world / "student")
    assert done.exit_code == 0, done.output
    return world / "student", json.loads(done.stdout)


def test_a_student_learns_what_its_teacher_knows(world, student):
    folder, about = student
    run = Run.load(world / "run")
    assert about["agreement"] > 0.8
    assert about["metrics"]["balanced_accuracy"] > 0.8
    assert (about["held_out"], about["held_out_labels"], about["held_out_from"]) == (30, 30, "the run's test split")
    assert about["images"] == len(run.split["labeled"]) + len(run.split["unlabeled"])
    assert about["labels"] == len(run.split["labeled"])
    assert about["teacher_metrics"]["accuracy"] == pytest.approx(run.metrics["accuracy"])
    assert not {path.name for path in folder.iterdir()} & {".checkpoint", "config.json.tmp"}
    card = (folder / "README.md").read_text()
    assert f"agrees with its teacher on {about['agreement']:.1%} of the 30 held-out images" in card
    assert f"| balanced accuracy | {about['metrics']['balanced_accuracy']:.3f} |" in card


def test_it_loads_and_predicts_as_it_was_tested(world, student, tmp_path):
    folder, about = student
    model, run = load(folder), Run.load(world / "run")
    assert model.takes_images
    predictions = model.predict_images(world / "images/test", device="cpu")
    classes = [model.class_names[k] for k in predictions.probabilities.argmax(axis=1)]
    right = [name.startswith(f"{kind}/") for name, kind in zip(predictions.ids, classes, strict=True)]
    assert np.mean(right) == pytest.approx(about["metrics"]["accuracy"])
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1, atol=1e-5)

    # the command takes it as it takes a run
    table = tmp_path / "predictions.csv"
    done = command("predict", folder, world / "images/test", "--out", table, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["images"] == 30
    assert f"{predictions.ids[0]},{classes[0]}," in table.read_text()
    assert "leave out --five-crops" in refused("predict", folder, world / "images/test", "--five-crops", "-o", table)

    # images that were held out for validation calibrate it
    held_out = [name for name in run.split["val"] if name]
    assert len(model.config["calibration"]["labels"]) == len(held_out) > 0
    sets = model.predict_images(world / "images/test", device="cpu", coverage=0.6)
    assert sets.sets.sets.shape == (30, 2)


def test_the_graph_is_the_network(world, student):
    folder, _ = student
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    probabilities, scores = session.run(None, {"pictures": images})
    np.testing.assert_allclose(probabilities, load(folder).predict_proba(images), atol=1e-4)
    np.testing.assert_allclose(scores, load(folder).scores(images), atol=1e-3)


def test_a_stopped_training_ends_as_one_that_was_not(world, student, tmp_path, monkeypatch):
    """Stopped after the third epoch of eight, in the middle of the fourth."""
    options = {"student": "test_efficientnet", "image_size": 32, "epochs": 8, "batch_size": 16, "device": "cpu"}
    run, cache = Run.load(world / "run"), FeatureCache.open(world / "cache")
    rates, whole = [], train.learning_rate

    def stopped(done):
        rates.append(done)
        if done > 3.4 / 8:
            raise KeyboardInterrupt
        return whole(done)

    monkeypatch.setattr(train, "learning_rate", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill(run, world / "images", tmp_path / "out", cache=cache, workers=2, **options)
    assert [path.name for path in (tmp_path / "out/.checkpoint").iterdir()] == ["student.safetensors"]
    with pytest.raises(InputError, match="in training with epochs 8, not 9"):
        distill(run, world / "images", tmp_path / "out", cache=cache, **{**options, "epochs": 9})

    first = len(rates)
    monkeypatch.setattr(train, "learning_rate", lambda done: rates.append(done) or whole(done))
    distill(run, world / "images", tmp_path / "out", cache=cache, workers=0, **options)
    assert min(rates[first:]) == pytest.approx(3 / 8)
    again, once = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", student[0]))
    for name, tensor in once.items():
        torch.testing.assert_close(again[name], tensor, msg=name)


def test_a_run_without_held_out_images_tests_on_a_tenth(world, tmp_path):
    run = Run.load(world / "run")
    everything = {role: [] for role in run.split}
    labeled = [*run.split["labeled"], *run.split["val"], *run.split["test"]]
    run.split.update(everything | {"labeled": labeled, "unlabeled": run.split["unlabeled"]})
    run.test_ids, run.test_labels, run.calibration = [], np.zeros(0, np.int64), None
    made = distill(
        run,
        world / "images",
        tmp_path / "out",
        student="test_vit",
        image_size=32,
        epochs=1,
        device="cpu",
        cache=FeatureCache.open(world / "cache"),
    )
    assert made.about["held_out"] == pytest.approx(13, abs=1)
    assert made.about["held_out_labels"] == pytest.approx(7, abs=1)
    assert made.about["images"] + made.about["held_out"] == 130
    assert load(tmp_path / "out").config["calibration"]["labels"] == []
    assert "held none out" in (tmp_path / "out/README.md").read_text()


def test_images_are_encoded_where_the_cache_is_gone(world, tmp_path):
    run = Run.load(world / "run")
    by_cache, by_encoder = (
        distill(run, world / "images", tmp_path / name, student="test_vit", image_size=32, epochs=1, label_weight=0,
                device="cpu", cache=cache)
        for name, cache in (("a", FeatureCache.open(world / "cache")), ("b", None))
    )  # fmt: skip
    assert (by_cache.about["labels"], by_encoder.about["labels"]) == (0, 0)
    for name in ("accuracy", "ece"):
        # the cache holds float16
        own, taken = (made.about["teacher_metrics"][name] for made in (by_encoder, by_cache))
        assert own == pytest.approx(taken, abs=1e-3)
    assert by_encoder.about["held_out"] == by_cache.about["held_out"] == 30


def test_weights_of_the_same_network_start_a_student(student, tmp_path):
    trained = Student("test_efficientnet", 2, 32)
    network = {name.removeprefix("network."): t for name, t in load_file(student[0] / "model.safetensors").items()}
    save_file({name: t for name, t in network.items() if name not in ("mean", "std")}, tmp_path / "weights.safetensors")
    started = Student("test_efficientnet", 5, 32, weights=tmp_path / "weights.safetensors")
    assert torch.equal(started.network.conv_stem.weight, network["conv_stem.weight"])
    assert not torch.equal(started.network.conv_stem.weight, trained.network.conv_stem.weight)
    assert started.network.classifier.weight.shape[0] == 5
    with pytest.raises(InputError, match="has the weights of another network"):
        Student("test_resnet", 2, 32, weights=tmp_path / "weights.safetensors")


def test_what_cannot_be_is_refused_before_any_training(world, student, tmp_path, monkeypatch):
    run, images, out = world / "run", world / "images", tmp_path / "out"
    near = refused("distill", run, images, "--student", "mobilenetv3_smal_050", "--out", out)
    assert "unknown student 'mobilenetv3_smal_050'" in near
    assert "mobilenetv3_small_050" in near
    assert "unknown student 'hf-hub:owner/name'" in refused(
        "distill", run, images, "--student", "hf-hub:owner/name", "--out", out
    )
    shutil.copytree(images / "train", tmp_path / "other")
    missing = refused("distill", run, tmp_path / "other", *SMALL, "--out", out)
    assert "images are not there, such as train/" in missing or "images are not there, such as " in missing
    assert "exists and is not an empty folder" in refused("distill", run, images, *SMALL, "--out", student[0])
    for option, value, words in (
        ("--epochs", 0, "epochs must be at least 1, got 0"),
        ("--batch-size", 1, "batch_size must be at least 2, got 1"),
        ("--label-weight", 2, "label_weight must be 0 to 1, got 2"),
        ("--lr", 0, "lr must be above 0, got 0"),
    ):
        assert words in refused("distill", run, images, *SMALL, option, value, "--out", out)
    # no hub can be reached
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no model hub could be reached (HF_HUB_OFFLINE is set)" in refused(
        "distill", run, images, *SMALL, "--pretrained", "--out", out
    )
    assert not out.exists()


def test_a_changed_student_is_refused(student, tmp_path):
    folder = shutil.copytree(student[0], tmp_path / "changed")
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="is not the file"):
        load(folder)
