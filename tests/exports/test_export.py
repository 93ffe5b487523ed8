from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import run as command
from ulfine_fast import InputError, Run, fit, load
from ulfine_fast.exports import FORMATS, export
from ulfine_fast.exports.card import escaped
from ulfine_fast.runs.predict import encoder_of_run, predict_images


@pytest.fixture(scope="module")
def fitted(clusters):
    from ulfine_fast import FitConfig

    runs = {}

    def run_of(method):
        if method not in runs:
            config = FitConfig(method=method, n1=40, gamma_l=4, gamma_u=4, steps=10, eval_every=10, val_fraction=0.3)
            runs[method] = fit(clusters, config, progress=False)
        return runs[method]

    return run_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run from images of its own, through the commands."""
    folder = tmp_path_factory.mktemp("world")
    images = write_images(folder / "images", {"train/cat": 8, "train/dog": 6, "test/cat": 2, "test/dog": 2})
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    for arguments in (
        ["extract", images, "--out", folder / "cache", "--model", model, "--workers", 0],
        ["fit", folder / "cache", "--out", folder / "run", "--steps", 5, "--eval-every", 5],
    ):
        done = command(*arguments)
        assert done.exit_code == 0, done.output
    return images / "test", folder / "run"


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "lightweight", "ulfine", "ulfine_plus", "knn"])
def test_safetensors_give_the_runs_own_numbers(fitted, clusters, tmp_path, method):
    run = fitted(method)
    again = load(export(run, tmp_path / "out"))
    np.testing.assert_allclose(again.predict_proba(clusters.plain), run.predict_proba(clusters.plain), atol=1e-6)
    np.testing.assert_array_equal(again.predict(clusters.plain), run.predict(clusters.plain))


@pytest.mark.parametrize("method", ["ulfine", "zero_shot", "lightweight", "lift_head", "ulfine_plus"])
def test_onnx_agrees_for_batches_of_any_size(fitted, clusters, tmp_path, method):
    run = fitted(method)
    again = load(export(run, tmp_path / "out", to="onnx"))
    for rows in (clusters.plain[:0], clusters.plain[:1], clusters.plain):
        np.testing.assert_allclose(again.predict_proba(rows), run.predict_proba(rows), atol=1e-4)
    properties = onnxruntime.InferenceSession(tmp_path / "out/model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(properties["class_names"]) == run.class_names
    assert json.loads((tmp_path / "out/config.json").read_text())["opset"] == 18


@pytest.mark.parametrize("to", ["safetensors", "onnx"])
def test_an_export_rejects_and_excludes_as_the_run_does(fitted, clusters, tmp_path, to):
    run = fitted("ulfine_plus")
    folder = export(run, tmp_path / "out", to=to)
    again = load(folder)
    np.testing.assert_allclose(again.scores(clusters.plain), run.scores(clusters.plain), atol=1e-3)
    for rate, coverage in ((0.1, 0.9), (0.3, 0.6)):
        # a score or probability at its threshold may fall on either side
        assert (again.reject(clusters.plain, rate) != run.reject(clusters.plain, rate)).sum() <= 1
        assert (again.predict_sets(clusters.plain, coverage) != run.predict_sets(clusters.plain, coverage)).sum() <= 1
    assert 0 < run.reject(clusters.plain, 0.3).sum() < len(clusters)
    assert again.reject(clusters.plain[:0]).shape == (0,)
    card = (folder / "README.md").read_text()
    assert f"Calibrated on {len(run.calibration)} held-out labels" in card
    # image ids stay here
    assert run.calibration.ids[0] not in (folder / "config.json").read_text()
    with pytest.raises(InputError, match="must be above 0 and below 1"):
        again.reject(clusters.plain, 2)


def test_a_graph_has_its_thresholds_for_other_programs(fitted, clusters, tmp_path):
    run = fitted("linear_probe")
    session = onnxruntime.InferenceSession(export(run, tmp_path / "out", to="onnx") / "model.onnx")
    properties = session.get_modelmeta().custom_metadata_map
    features = np.asarray(clusters.plain, np.float32)
    probabilities, scores = session.run(None, {"features": features})
    sets = probabilities >= np.array(json.loads(properties["sets_0.9"]), np.float32)
    assert (sets != run.predict_sets(features, 0.9)).sum() <= 1
    assert ((scores < json.loads(properties["reject_0.05"])) != run.reject(features, 0.05)).sum() <= 1
    # with too few labels for the rate, the metadata say so
    few = replace(
        run,
        calibration=replace(
            run.calibration,
            **{
                name: getattr(run.calibration, name)[:10]
                for name in ("ids", "labels", "in_fold", "probabilities", "scores")
            },
        ),
    )
    folder = export(few, tmp_path / "few", to="onnx")
    few_properties = onnxruntime.InferenceSession(folder / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(few_properties["reject_0.05"]) is None
    assert "too few to reject images at a rate of 0.05" in (folder / "README.md").read_text()


@pytest.mark.parametrize("to", ["safetensors", "onnx"])
def test_an_export_of_a_run_saved_before_says_to_fit_again(fitted, clusters, tmp_path, to):
    again = load(export(replace(fitted("linear_probe"), calibration=None), tmp_path / "out", to=to))
    np.testing.assert_allclose(
        again.predict_proba(clusters.plain), fitted("linear_probe").predict_proba(clusters.plain), atol=1e-4
    )
    for call in (again.reject, again.predict_sets):
        with pytest.raises(InputError, match="fit it again"):
            call(clusters.plain)
    assert "neither rejection nor sets of classes are calibrated" in (tmp_path / "out/README.md").read_text()


def test_torchs_own_formats_agree_and_are_not_opened_here(fitted, clusters, tmp_path):
    run, rows = fitted("ulfine"), clusters.plain[:7].astype(np.float32)
    traced = export(run, tmp_path / "ts", to="torchscript")
    exported = export(run, tmp_path / "pt2", to="torch.export")
    models = torch.jit.load(traced / "model.ts"), torch.export.load(exported / "model.pt2").module()
    for model in models:
        np.testing.assert_allclose(model(torch.from_numpy(rows)).detach(), run.predict_proba(rows), atol=1e-5)
    for folder in (traced, exported):
        with pytest.raises(InputError, match="use that if you trust it"):
            load(folder)


@pytest.mark.parametrize("method", ["knn", "label_propagation"])
def test_methods_that_look_through_images_have_no_graph(fitted, tmp_path, method):
    for to in ("onnx", "torchscript", "torch.export"):
        with pytest.raises(InputError, match="export it to safetensors"):
            export(fitted(method), tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_the_encoder_inside_takes_image_files(world, tmp_path):
    images, folder = world
    run = Run.load(folder)
    expected = predict_images(run, images, device="cpu")
    inside = load(export(run, tmp_path / "inside", to="onnx", encoder=encoder_of_run(run, "cpu")))
    beside = load(export(run, tmp_path / "beside"))
    features_alone = load(export(run, tmp_path / "features", to="onnx"))
    for model, tolerance in ((inside, 1e-4), (beside, 1e-6), (features_alone, 1e-4)):
        predictions = model.predict_images(images, device="cpu")
        assert predictions.ids == expected.ids
        np.testing.assert_allclose(predictions.probabilities, expected.probabilities, atol=tolerance)
        judged = model.predict_images(images, device="cpu", rate=0.3, coverage=0.6)
        own = predict_images(run, images, device="cpu", rate=0.3, coverage=0.6)
        np.testing.assert_allclose(judged.scores, own.scores, atol=1e-3)
        assert judged.summary()["sets"]["held_out"] == len(run.calibration)
        assert (judged.sets.sets != own.sets.sets).sum() <= 1
    # new images in a table have no labels
    table = tmp_path / "images.csv"
    table.write_text("path\n" + "".join(f"{images / name}\n" for name in expected.ids))
    for model in (inside, beside):
        predictions = model.predict_images(table, device="cpu")
        assert [Path(name).relative_to(images).as_posix() for name in predictions.ids] == expected.ids
        np.testing.assert_allclose(predictions.probabilities, expected.probabilities, atol=1e-4)
    side = run.encoder["image_size"]
    with pytest.raises(InputError, match="must be uint8"):
        inside.predict_proba(np.zeros((1, side, side, 3), np.float32))


def test_the_command(world, tmp_path):
    done = command("export", world[1], tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["file"] == FORMATS["safetensors"]
    again = command("export", world[1], tmp_path / "out")
    assert again.exit_code == 2
    assert "name a new" in again.output or "choose a new" in again.output


@pytest.mark.parametrize("to", ["safetensors", "onnx"])
def test_any_array_of_the_same_numbers_has_the_same_probabilities(fitted, clusters, tmp_path, to):
    model = load(export(fitted("linear_probe"), tmp_path / "out", to=to))
    features = np.array(clusters.plain[:5], dtype=np.float32)
    expected = model.predict_proba(features)
    for same in (features[::-1].copy()[::-1], np.asfortranarray(features), features.astype(">f8"), features.tolist()):
        np.testing.assert_array_equal(model.predict_proba(same), expected)


def test_a_changed_file_and_another_shape_are_refused(fitted, tmp_path):
    folder = export(fitted("ulfine"), tmp_path / "out")
    with pytest.raises(InputError, match=r"must have shape \(n, 16\), got \(2, 3\)"):
        load(folder).predict_proba(np.zeros((2, 3)))
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="is not the file"):
        load(folder)


def test_the_card_shows_names_as_they_are(fitted, tmp_path):
    run = fitted("ulfine")
    names, run.class_names = run.class_names, ["<script>|\n---\n# x", *run.class_names[1:]]
    try:
        card = (export(run, tmp_path / "out") / "README.md").read_text()
    finally:
        run.class_names = names
    assert "<script>" not in card.replace("\\<", "")
    assert escaped("a|b\n# c") == "a\\|b \\# c"
    assert card.startswith("---\nlibrary_name: ulfine-fast\n")
    assert card.count("\n---\n") == 1


HTML = "<img src=x onerror=alert(1)>|<b>`\n</td>&#60;\x1b[31m"


def test_nothing_of_a_run_is_markup_in_the_card(fitted, tmp_path):
    run = fitted("ulfine")
    encoder = {"name": HTML, "pretrained": HTML, "sha256": HTML, "image_size": HTML, "preprocessing": HTML}
    counts = {"class_counts": [HTML] * 4, "accuracy": HTML, "per_class_accuracy": [HTML] * 4}
    hostile = replace(run, class_names=[HTML] * 4, encoder=encoder, metrics={**run.metrics, **counts})
    card = (export(hostile, tmp_path / "out") / "README.md").read_text()
    text = card.split("---\n", 2)[2].replace("```", "")
    assert "<" not in text
    assert "\x1b" not in text
    # in the tables nothing of it adds a cell or a line
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {re.sub(r"\\\|", "", row).count("|") for row in rows} == {3, 5}
    assert len([row for row in rows if "img" in row]) == 4


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "docs/examples/export.py"))
    assert "onnx: at most" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["model.safetensors", "model.onnx"])
def test_files_of_other_programs_end_in_a_sentence(tmp_path, file):
    import hashlib
    import json

    (tmp_path / file).write_bytes(b"something else")
    config = {
        "format": "ulfine-fast-model",
        "version": 1,
        "to": file.partition(".")[2],
        "file": file,
        "sha256": hashlib.sha256(b"something else").hexdigest(),
        "input": {"name": "features", "shape": ["n", 4], "dtype": "float32"},
        "class_names": ["a", "b"],
        "method": "ulfine",
        "temperature": 1.0,
        "encoder": None,
        "config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="damaged or of another program"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "config": ["no", "settings"]}))
    with pytest.raises(InputError, match=r"config\.json cannot be read \(Expected object, got array at config\)"):
        load(tmp_path)
