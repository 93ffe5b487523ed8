from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.writer import METHODS, PageTables, RunSpec, edit_json, metrics_of, stripes, write_run, write_study
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.report import build_report

T_975 = {2: 12.706205, 3: 4.302653, 5: 2.776445}  # by number of seeds


def page(runs: Path, **options: object) -> str:
    return build_report([runs], runs.parent / "page.html", **options).read_text(encoding="utf-8")  # type: ignore[arg-type]


def metric(run: Path, key: str) -> float:
    return float(json.loads((run / "metrics.json").read_text())[key])


def row_of(tables: PageTables, name: str) -> dict[str, str]:
    """A row of the headline table by method."""
    head, *rows = tables.tables[0]
    return next(dict(zip(head, row, strict=True)) for row in rows if row[0].startswith(name))


def by_hand(values: list[float], scale: float = 100.0) -> str:
    """Mean and interval as the table prints them."""
    half = T_975[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{scale * float(np.mean(values)):.1f} ± {scale * half:.1f}"


@pytest.mark.parametrize("method", ["ulfine", "linear_probe"])
@pytest.mark.parametrize(
    ("title", "key"),
    [("overall", "accuracy"), ("balanced", "balanced_accuracy"), ("few", "few"), ("worst class", "worst_class"),
     ("pseudo-label precision", "pseudo_label_precision")],
)  # fmt: skip
def test_the_table_holds_mean_and_interval(study: Path, method: str, title: str, key: str) -> None:
    cells = row_of(PageTables(page(study)), method.replace("_", " "))
    values = [metric(study / method / f"seed-{seed}", key) for seed in range(5)]
    assert cells[title].removeprefix("★best ") == by_hand(values)
    assert cells["seeds"] == "5"


def test_seconds_are_not_percent_and_raw_ece_is_beside(study: Path) -> None:
    cells = row_of(PageTables(page(study)), "ulfine")
    runs = [study / "ulfine" / f"seed-{seed}" for seed in range(5)]
    assert cells["seconds"] == by_hand([metric(run, "seconds") for run in runs], scale=1.0)
    raw = 100 * np.mean([metric(run, "ece") for run in runs])
    assert cells["ECE"].endswith(f"· raw {raw:.1f}")
    assert by_hand([metric(run, "ece_temperature_scaled") for run in runs]) in cells["ECE"]


def test_the_best_of_a_column_is_marked_in_words(tmp_path: Path) -> None:
    values = {"zero_shot": (0.50, 0.02), "linear_probe": (0.70, 0.09), "ulfine": (0.70, 0.05)}
    for method, (accuracy, ece) in values.items():
        run = write_run(tmp_path / "runs" / method, RunSpec(method=method, rows=40))
        edit_json(run / "metrics.json", accuracy=accuracy, ece_temperature_scaled=ece, worst_class=0.3)
    tables = PageTables(page(tmp_path / "runs"))
    assert [row_of(tables, name)["overall"] for name in ("zero shot", "linear probe", "ulfine")] == [
        "50.0", "★best 70.0", "★best 70.0",
    ]  # fmt: skip
    assert row_of(tables, "zero shot")["ECE"].startswith("★best 2.0")
    assert row_of(tables, "ulfine")["worst class"] == "30.0", "a mark on all would say nothing"
    assert "best" not in row_of(tables, "ulfine")["seconds"]


def test_zero_shot_has_dashes_for_pseudo_labels(study: Path) -> None:
    text = page(study)
    cells = row_of(PageTables(text), "zero shot")
    assert (cells["pseudo-label precision"], cells["confidence on false"]) == ("–", "–")
    assert "Without pseudo-labels: zero shot." in text


def test_a_method_without_steps_is_measured_at_the_end(study: Path) -> None:
    for seed in range(5):
        file = study / "zero_shot" / f"seed-{seed}" / "metrics.json"
        edit_json(file, pseudo_label_rate=0.9, pseudo_label_precision=0.5 + seed / 100)
    text = page(study)
    assert "Measured at the end only, without optimisation steps: zero shot." in text
    assert "Without pseudo-labels" not in text
    assert row_of(PageTables(text), "zero shot")["pseudo-label precision"] == by_hand([0.5 + s / 100 for s in range(5)])


def test_only_zero_shot(tmp_path: Path) -> None:
    run = write_run(tmp_path / "zero", RunSpec(method="zero_shot"))
    (run / "history.csv").unlink()
    text = page(run)
    assert "None of these methods assigns pseudo-labels: zero shot." in text
    assert "pseudo-label precision" not in PageTables(text).tables[0][0]


def test_sections_follow_the_best_by_validation_not_by_test(study: Path) -> None:
    for seed in range(5):
        edit_json(study / "linear_probe" / f"seed-{seed}" / "metrics.json", val={"balanced_accuracy": 0.97})
    text = page(study)
    assert "By validation balanced accuracy the best setting is <b>linear probe</b>" in text
    assert text.count("Shown for <b>linear probe</b>") == 2, "calibration and confusion; no images here"
    assert "not chosen by test metrics" in text
    assert "on 20 validation rows per run" in text


def test_the_page_names_settings_that_validation_cannot_distinguish_from_the_best(study: Path) -> None:
    for seed in range(5):
        for method, score in {"linear_probe": 0.90, "ulfine": 0.88 + 0.02 * (seed % 2), "lightweight": 0.5}.items():
            edit_json(study / method / f"seed-{seed}" / "metrics.json", val={"balanced_accuracy": score})
        edit_json(study / "zero_shot" / f"seed-{seed}" / "metrics.json", val={"balanced_accuracy": 0.2})
    text = page(study)
    # 0.02, 0, 0.02, 0, 0.02: mean 0.012, half width 2.776 * 0.01095 / sqrt(5) = 0.0136
    assert "validation cannot distinguish it from ulfine." in text


def test_clear_winners_have_no_rivals(study: Path) -> None:
    for seed in range(5):
        edit_json(study / "ulfine" / f"seed-{seed}" / "metrics.json", val={"balanced_accuracy": 0.99})
    assert "cannot distinguish it from" not in page(study)


def test_the_note_on_the_test_split(study: Path) -> None:
    assert "The test split is read once per run, at the end of its fit, and never for selection" in page(study)


def test_paired_differences(study: Path) -> None:
    tables = PageTables(page(study)).tables
    paired = next(table for table in tables if table[0][0] == "minus")
    row = next(row for row in paired if row[0] == "zero shot")
    values = [
        metric(study / "ulfine" / f"seed-{s}", "few") - metric(study / "zero_shot" / f"seed-{s}", "few")
        for s in range(5)
    ]
    assert row[-1] == f"+{by_hand(values)}"
    assert row[1] == "5"


def test_a_single_run_has_no_intervals_and_no_choice(single: Path) -> None:
    text = page(single)
    cells = row_of(PageTables(text), "ulfine")
    assert cells["overall"] == f"{100 * metric(single, 'accuracy'):.1f}"
    assert "±" not in cells["balanced"]
    assert "Shown for" not in text
    assert "best" not in cells["overall"]
    assert "On the test split <b>ulfine</b> reaches" in text


def class_rows(text: str) -> list[list[str]]:
    return next(table[1:] for table in PageTables(text).tables if table[0][:2] == ["class", "labelled"])


def test_classes_of_a_single_run_are_named_and_ordered_by_count(single: Path) -> None:
    text = page(single)
    metrics = json.loads((single / "metrics.json").read_text())
    names = json.loads((single / "config.json").read_text())["class_names"]
    order = sorted(range(10), key=lambda k: (-metrics["class_counts"][k], k))
    assert class_rows(text) == [
        [names[k], str(metrics["class_counts"][k]), f"{100 * metrics['per_class_accuracy'][k]:.1f}"] for k in order
    ]
    assert "each position is one class" in text


def test_permuted_classes_are_averaged_by_rank(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    counts = {0: [100, 10, 1], 1: [1, 100, 10]}
    accuracy = {0: [0.9, 0.6, 0.2], 1: [0.4, 0.7, 0.5]}
    for seed in (0, 1):
        run = write_run(root / f"seed-{seed}", RunSpec(seed=seed, classes=3, rows=30))
        edit_json(run / "metrics.json", class_counts=counts[seed], per_class_accuracy=accuracy[seed])
    text = page(root)
    assert "a rank is a different class in every seed" in text
    chart = ET.fromstring(re.search(r'<div class="wide">(<svg.*?</svg>)</div>', text, re.S).group(1))
    tips = [node.find("title").text for node in chart.iter("circle")]
    # rank 1: 0.9 and 0.7; rank 2: 0.6 and 0.5; rank 3: 0.2 and 0.4
    assert tips == ["ulfine: 80.0", "ulfine: 55.0", "ulfine: 30.0"]
    assert class_rows(text) == [
        ["class 000", "1–100", "65.0"],
        ["class 001", "10–100", "65.0"],
        ["class 002", "1–10", "35.0"],
    ]


def test_the_confusion_matrix_holds_row_percentages(single: Path) -> None:
    tables = PageTables(page(single)).tables
    matrix = next(table for table in tables if table[0][0].startswith("true"))
    metrics = json.loads((single / "metrics.json").read_text())
    names = json.loads((single / "config.json").read_text())["class_names"]
    for i, row in enumerate(matrix[1:]):
        assert row[i + 1] == f"{100 * metrics['per_class_accuracy'][names.index(row[0])]:.1f}"
        assert sum(float(cell or 0) for cell in row[1:]) == pytest.approx(100, abs=0.5)


def test_the_bins_of_the_page_sum_to_the_test_rows(study: Path) -> None:
    text = page(study)
    bins = [table for table in PageTables(text).tables if table[0][0] == "confidence bin"]
    assert [sum(int(row[1].replace(",", "")) for row in table[1:]) for table in bins] == [2500, 2500]
    assert "2,500 test rows" in text


def test_no_second_diagram_without_scaling(single: Path) -> None:
    edit_json(single / "metrics.json", temperature=1.0)
    bins = [table for table in PageTables(page(single)).tables if table[0][0] == "confidence bin"]
    assert len(bins) == 1


def test_150_classes_show_confused_pairs(tmp_path: Path) -> None:
    write_study(tmp_path / "runs", ("zero_shot", "ulfine"), seeds=2, classes=150, rows=900)
    text = page(tmp_path / "runs")
    pairs = next(table for table in PageTables(text).tables if table[0][0] == "true class")
    assert len(pairs) == 31
    percents = [float(row[2]) for row in pairs[1:]]
    assert percents == sorted(percents, reverse=True)
    assert "the mean of 5 neighbouring ranks" in text
    assert len(class_rows(text)) == 150
    assert 'class="matrix"' not in text


@pytest.mark.parametrize("permute", [True, False])
def test_two_classes(tmp_path: Path, permute: bool) -> None:
    write_study(tmp_path / "runs", ("zero_shot", "ulfine"), seeds=3, classes=2, rows=60, permute=permute)
    text = page(tmp_path / "runs", images=stripes)
    cells = row_of(PageTables(text), "ulfine")
    assert "few" not in cells, "two classes have no third third"
    assert cells["medium"].startswith("★best ")
    assert "few third" not in text
    assert "3 seeds, 2 classes" in text


def test_twenty_runs_stay_below_a_megabyte(study: Path) -> None:
    text = page(study, images=stripes)
    assert len(text.encode()) < 1_000_000
    assert text.count("<img ") == 60


def test_a_sweep_says_which_settings_are_charted(tmp_path: Path) -> None:
    for i in range(8):
        write_run(tmp_path / "runs" / str(i), RunSpec(rows=60, config={"mu": i / 10}))
    text = page(tmp_path / "runs")
    assert "2 more settings are in the table above but not in the charts" in text
    assert "ulfine in 8 settings, 1 seed, 10 classes" in text
    differing = next(table for table in PageTables(text).tables if table[0][0] == "field")
    assert differing[1] == ["mu", *(str(i / 10) for i in range(8))]


def test_repeated_runs_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, RunSpec(rows=60))
    text = page(tmp_path / "runs")
    assert "Left out, since the same setting and seed is there already" in text
    assert row_of(PageTables(text), "ulfine")["seeds"] == "1"


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "</style><script>",
    "a\u202eb",
    "\x1b[31m",
    "&amp;",
    "x" * 300,
)


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    spec = RunSpec(
        classes=8,
        names=HOSTILE,
        rows=80,
        ids="<script>{}</script>\"'>".format,
        config={"shape": "<script>", "<b>": "<i>"},
    )
    run = write_run(tmp_path / "<u>runs", spec)
    edit_json(run / "split.json", rule="<script>rule")
    edit_json(run / "config.json", encoder={"<name>": "<script>"}, created_by="<script>", cache="<script>")
    text = page(run, images=stripes, title="<script>title")
    met = PageTables(text).elements
    kinds = {name for name, _ in met}
    assert not kinds & {"i", "u", "iframe", "object", "link", "form"}
    assert text.count("<script") == text.count("</script") == 1, "the page's own"
    assert not [name for _, attributes in met for name in attributes if name.startswith("on")]
    assert all(str(attributes["src"]).startswith("data:image/") for name, attributes in met if name == "img")
    assert "{{ 7 * 7 }}" in text
    assert text.count("<style>") == text.count("</style>") == 1
    assert "\u202e" in text, "kept, isolated by bdi"


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunSpec(classes=2, names=("cat", "\ud800"), rows=80))
    with pytest.raises(InputError, match=r"config\.json cannot be read \(.*surrogate pair"):
        page(run)


def test_many_untrusted_classes(tmp_path: Path) -> None:
    names = tuple(f"<script>{k}" for k in range(40))
    text = page(write_run(tmp_path / "run", RunSpec(classes=40, names=names, rows=200)))
    assert text.count("<script") == 1, "the page's own"
    assert "&lt;script&gt;7" in text


def test_the_page_needs_nothing_from_elsewhere(study: Path) -> None:
    text = page(study, images=stripes)
    met = PageTables(text).elements
    policy = next(a["content"] for name, a in met if a.get("http-equiv") == "Content-Security-Policy")
    [script] = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    assert not {name for name, _ in met} & {"link", "iframe", "object", "embed", "audio", "video"}
    assert not re.search(r"https?:|@import|url\(", text)
    assert all(str(a["href"]).startswith("#") for name, a in met if name == "a")


def test_headings_links_and_images_are_accessible(study: Path) -> None:
    text = page(study, images=stripes)
    tables = PageTables(text)
    levels = [level for level, _ in tables.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [a["id"] for _, a in tables.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for name, a in tables.elements if name == "a"} <= set(ids)
    assert {a["aria-labelledby"] for _, a in tables.elements if "aria-labelledby" in a} <= set(ids)
    assert all(a.get("alt") for name, a in tables.elements if name == "img")
    regions = [a for _, a in tables.elements if a.get("class") == "scroll"]
    assert all(a.get("tabindex") == "0" and a.get("role") == "region" for a in regions)
    drawings = [a for name, a in tables.elements if name == "svg"]
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for a in drawings)


def test_every_element_is_closed(study: Path) -> None:
    """Our own markup is well formed, so a stray tag cannot hide in it."""
    text = page(study, images=stripes).replace("<!DOCTYPE html>\n", "")
    closed = re.sub(r"<(meta|img)\b([^>]*)>", r"<\1\2/>", text)
    assert ET.fromstring(closed).tag == "html"


def test_the_same_runs_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    first = build_report([study], tmp_path / "a.html", images=stripes).read_bytes()
    assert build_report([study], tmp_path / "deeper" / "b.html", images=stripes).read_bytes() == first
    assert not list(tmp_path.glob("*.tmp"))


def test_images_show_names_confidence_and_id(single: Path) -> None:
    asked: list[str] = []

    def read(row_id: str) -> Image.Image:
        asked.append(row_id)
        if row_id.endswith("7.png"):
            raise OSError("gone")
        return stripes(row_id)

    text = page(single, images=read)
    wrong = text.split("Most confident wrong")[1].split("Least confident")[0]
    assert wrong.count("✗") == 12
    assert wrong.count("✓") == 0
    sure = [float(value) for value in re.findall(r'class="sure">([\d.]+)%', wrong)]
    assert sure == sorted(sure, reverse=True)
    assert set(asked) >= set(re.findall(r'class="id" title="([^"]+)"', wrong))
    gone = sum(row_id.endswith("7.png") for row_id in asked)
    assert text.count("image cannot be read") == gone
    if gone:
        assert f"{gone} images could not be read." in text


def test_tail_classes_are_those_with_the_fewest_labels(single: Path) -> None:
    text = page(single, images=stripes)
    counts = json.loads((single / "metrics.json").read_text())["class_counts"]
    labelled = [int(n) for n in re.findall(r"Tail class: .*? \((\d+) labelled\)", text)]
    assert labelled == sorted(counts)[:3]


def test_without_images_the_page_says_how_to_get_them(single: Path) -> None:
    text = page(single)
    assert "--images FOLDER" in text
    assert "<img" not in text


def test_rows_without_labels_have_no_accuracy(single: Path) -> None:
    metrics = json.loads((single / "metrics.json").read_text())
    for key in metrics_of(RunSpec(), np.arange(10), np.eye(10), np.arange(10)):
        if key in (
            "accuracy",
            "balanced_accuracy",
            "many",
            "medium",
            "few",
            "worst_class",
            "ece",
            "per_class_accuracy",
        ):
            metrics[key] = None
    (single / "metrics.json").write_text(json.dumps(metrics))
    assert "The test rows have no labels, so there is no accuracy to report." in page(single)


def test_settings_say_what_was_run(study: Path) -> None:
    text = page(study)
    assert "lite0-minilm" in text
    splits = next(table for table in PageTables(text).tables if table[0][0] == "setting")
    assert splits[1][1:2] == ["0–4"]
    assert splits[1][-1] == "500"
    assert "count of rank k = int(N1 * gamma ** (-k / (K - 1)))" in text
    assert str(study / "ulfine" / "seed-3") in text


def test_a_title_can_be_given(single: Path) -> None:
    assert PageTables(page(single, title="My run")).headings[0] == (1, "My run")
    assert PageTables(page(single)).headings[0] == (1, "ulfine, 1 seed, 10 classes")


def test_out_may_not_be_a_folder(single: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; give the file to write"):
        build_report([single], tmp_path)


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(single: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot write"):
        build_report([single], locked / "page.html")


def test_a_file_instead_of_a_folder(single: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        build_report([single], tmp_path / "file" / "page.html")


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_is_light() -> None:
    heavy = ("numpy", "torch", "jinja2", "pyarrow", "PIL")
    assert printed(f"import sys, ulfine_fast.report; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_building_does_not_load_torch(single: Path, tmp_path: Path) -> None:
    build = f"build_report([Path({str(single)!r})], Path({str(tmp_path / 'p.html')!r}))"
    code = f"import sys; from pathlib import Path; from ulfine_fast.report import build_report; {build}"
    assert printed(f"{code}; print('torch' in sys.modules)") == "False"


def test_the_methods_of_the_writer_are_those_on_the_page(study: Path) -> None:
    names = {row[0] for row in PageTables(page(study)).tables[0][1:]}
    assert names == {method.replace("_", " ") for method in METHODS}


def test_leakage_is_above_the_results(single: Path) -> None:
    text = page(single, leakage=["3 images of <b>test</b> were trained on"])
    position = text.index("Leakage: <bdi>3 images of &lt;b&gt;test&lt;/b&gt; were trained on</bdi>.")
    assert position < text.index('id="results"')
    assert "Leakage" not in page(single)
