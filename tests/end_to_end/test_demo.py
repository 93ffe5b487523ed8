"""From images to classifier and page, by the commands that the README shows."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil

import pytest
from PIL import Image

from ulfine_fast.cache.io.digests import BLANK, sealed

METHODS = ["zero_shot", "linear_probe", "lightweight", "ulfine", "ulfine_plus"]


def commands_of(printed):
    """The commands that the demo says it ran, each as a list of arguments."""
    by_hand = printed.split("The same by hand:")[1]
    return [shlex.split(line)[1:] for line in by_hand.splitlines() if line.strip().startswith("ulfine-fast ")]


def test_the_demo_prints_a_table_and_the_reports_path(demo):
    folder, printed = demo
    for word in [*METHODS, "balanced", "few", "PL precision"]:
        assert word in printed
    assert str((folder / "report.html").resolve()) in printed
    assert (folder / "report.html").stat().st_size > 50_000


def test_trained_methods_know_more_than_zero_shot_and_zero_shot_more_than_chance(demo):
    folder, _ = demo
    accuracies = {
        method: json.loads((folder / "runs" / method / "summary.json").read_text())["metrics"]["balanced_accuracy"][
            "mean"
        ]
        for method in METHODS
    }
    assert accuracies["zero_shot"] > 0.15
    for method in METHODS[1:]:
        assert accuracies[method] > accuracies["zero_shot"] + 0.2, accuracies


def test_the_report_is_about_all_methods_and_shows_images(demo):
    folder, _ = demo
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") > 20
    assert not re.search(r"<(link|iframe)\b|<script[^>]*src", page)
    for method in METHODS:
        assert method.replace("_", " ") in page


def test_each_command_can_be_repeated_by_hand(demo, ulfine, tmp_path):
    folder, printed = demo
    extract, *fits, report = commands_of(printed)
    before = {path: path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file()}
    ulfine(*extract)
    assert {path: path.read_bytes() for path in before} == before
    probe = next(command for command in fits if "linear_probe" in command)
    metrics = folder / "runs" / "linear_probe" / "seed-0" / "metrics.json"
    first = json.loads(metrics.read_text())
    ulfine(*probe)
    again = json.loads(metrics.read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    page = (folder / "report.html").read_bytes()
    assert page
    ulfine(*report[:-1], tmp_path / "again.html")
    assert (tmp_path / "again.html").stat().st_size > 50_000


def test_inspect_counts_what_is_there(demo, ulfine):
    folder, _ = demo
    facts = json.loads(ulfine("inspect", folder / "cache", "--json").stdout)
    assert facts["images"] == 3000
    assert set(facts["counts"]["train"].values()) == {250}
    assert set(facts["counts"]["test"].values()) == {50}
    assert facts["problems"] == []
    assert facts["model"]["name"] == "lite0-minilm"
    assert "lite0-minilm" in ulfine("inspect", folder / "cache").stdout


def test_eval_gives_the_metrics_of_the_fit(demo, ulfine):
    folder, _ = demo
    run = folder / "runs" / "ulfine" / "seed-1"
    wanted = json.loads((run / "metrics.json").read_text())
    metrics = json.loads(ulfine("eval", run, "--json").stdout)
    for name in ("accuracy", "balanced_accuracy", "few", "ece_temperature_scaled"):
        assert metrics[name] == pytest.approx(wanted[name], abs=1e-6)
    other = json.loads(ulfine("eval", run, "--cache", folder / "cache", "--json").stdout)
    assert other["accuracy"] == pytest.approx(metrics["accuracy"])


def test_predict_on_new_images_is_mostly_right_and_survives_a_broken_one(demo, ulfine, tmp_path):
    folder, _ = demo
    run = folder / "runs" / "linear_probe" / "seed-0"
    new = tmp_path / "neue Bilder"
    for name in ("trouser", "bag", "ankle_boot"):
        for number, path in enumerate(sorted((folder / "images" / "test" / name).iterdir())[:10]):
            (new / name).mkdir(parents=True, exist_ok=True)
            Image.open(path).convert("RGB").resize((90, 90)).save(new / name / f"ü{number}.jpg", quality=95)
    (new / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    done = ulfine("predict", run, new, "--out", tmp_path / "out.csv")
    assert "skipped broken.png" in done.stderr
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert list(rows[0])[:5] == ["id", "class", "probability", "class_2", "probability_2"]
    assert list(rows[0])[-1] == "probability_5"
    right = sum(row["class"] == row["id"].split("/")[0] for row in rows)
    assert right >= 15
    for row in rows:
        assert float(row["probability"]) >= float(row["probability_2"])
    one = ulfine("predict", run, new / "bag" / "ü0.jpg", "--out", tmp_path / "one.parquet", "--json")
    assert json.loads(one.stdout)["images"] == 1


def test_a_split_file_of_one_run_serves_another(demo, ulfine, tmp_path):
    folder, _ = demo
    split_file = folder / "runs" / "ulfine" / "seed-1" / "split.json"
    ulfine("fit", folder / "cache", "--method", "zero_shot", "--split", split_file, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "split.json").read_text()) == json.loads(split_file.read_text())


def rewrite_config(run, **values):
    """Other values in the config.json of a run, sealed again."""
    config = {**json.loads((run / "config.json").read_text()), **values, "digest": BLANK}
    (run / "config.json").write_bytes(sealed(json.dumps(config).encode()))


def test_a_run_whose_cache_is_gone_still_predicts_and_says_so_in_eval(demo, ulfine, tmp_path):
    folder, _ = demo
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / "linear_probe" / "seed-0", run)
    rewrite_config(run, cache=str(tmp_path / "gone"))
    done = ulfine("eval", run, code=2)
    assert "is gone" in done.stderr
    ulfine("predict", run, folder / "images" / "test" / "bag", "--out", tmp_path / "out.csv")
    done = ulfine("report", run, "--out", tmp_path / "page.html")
    assert "no images in the page" in done.stderr


def test_heads_meet_only_the_encoder_they_were_fitted_with(demo, ulfine, tmp_path):
    folder, _ = demo
    run = tmp_path / "run"
    shutil.copytree(folder / "runs" / "linear_probe" / "seed-0", run)
    encoder = json.loads((run / "config.json").read_text())["encoder"]
    rewrite_config(run, encoder={**encoder, "sha256": "0" * 64})
    done = ulfine("predict", run, folder / "images" / "test" / "bag", "--out", tmp_path / "out.csv", code=2)
    assert "model.sha256" in done.stderr
    done = ulfine("eval", run, "--cache", folder / "cache", code=2)
    assert "model.sha256" in done.stderr


def test_a_cache_made_otherwise_is_refused_with_the_field(demo, ulfine):
    folder, _ = demo
    extract = ["extract", folder / "images", "--out", folder / "cache", "--model", "lite0-minilm"]
    done = ulfine(*extract, "--strong", 3, code=2)
    assert "views.strong = 1, the request says 3" in done.stderr
    assert ulfine(*extract, "--mode", "verify").returncode == 0
