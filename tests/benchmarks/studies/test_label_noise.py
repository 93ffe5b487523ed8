from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.studies import label_noise
from tests.benchmarks.program import run_command
from tests.benchmarks.studies.test_storage import fine
from ulfine_fast.cache.io.errors import InputError


def run(*words):
    return run_command(label_noise.label_noise, *words, "--seeds", "0", "--n1", "20", "--m1", "20", "--steps", "5")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(label_noise, "open_features", lambda data: fine())
    out = tmp_path / "rows.json"
    done = run("--noise", "0,60", "--json", str(out), "--metric", "few")
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * (len(label_noise.LABELED) + len(label_noise.PSEUDO_LABELED))
    assert {row["noise"] for row in rows} == {0.0, 0.6}
    assert "|fixmatch, preference" in done.output
    # texts are as they are whatever the labels say
    zero = [row["balanced_accuracy"] for row in rows if row["contender"] == "zero-shot"]
    assert zero[0] == zero[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--noise", "0,120"), "percentages of --noise are numbers from 0 to 100"),
        (("--noise", "some"), "percentages of --noise are numbers from 0 to 100"),
        (("--metric", "ece"), "'few', 'worst_class'"),
        (("--trusted", "30"), "takes 60 images of each class"),
    ],
)
def test_refusals(monkeypatch, words, message):
    monkeypatch.setattr(label_noise, "open_features", lambda data: fine())
    done = run(*words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_differences_are_paired_by_seed():
    rows = [
        {"contender": name, "against": "a", "noise": 0.2, "seed": seed, "few": value}
        for name, values in (("a", (0.1, 0.5)), ("b", (0.2, 0.6)))
        for seed, value in enumerate(values)
    ]
    assert label_noise.table(rows, "few") == [["a", "30.0", ""], ["b", "40.0", "+10.0 ±0.0"]]


def test_trusted_images_give_the_texts_and_leave_the_cache():
    cache = fine()
    other = label_noise.with_trusted(cache, 5)
    assert len(other) == len(cache) - 4 * 10
    own = np.flatnonzero(cache.labels == 2)[:5]
    mean = cache.plain[own].mean(0)
    np.testing.assert_allclose(other.text_features[2, 0], mean / np.linalg.norm(mean), atol=1e-6)
    row_of = {name: row for row, name in enumerate(cache.ids)}
    kept = [row_of[name] for name in other.ids]
    assert not set(kept) & set(own.tolist())
    np.testing.assert_array_equal(other.plain, cache.plain[kept])
    seen = {row: n for n, row in enumerate(cache.view_rows)}
    wanted = [seen[kept[row]] for row in other.view_rows]
    np.testing.assert_array_equal(other.views("strong"), cache.views("strong")[wanted])


def test_the_scale_is_the_likeliest():
    other = label_noise.with_trusted(fine(), 10)
    rows = np.concatenate([np.flatnonzero(fine().labels == k)[10:20] for k in range(4)])
    cosines, right = fine().plain[rows] @ other.prototypes.T, fine().labels[rows]

    def likelihood(scale):
        logits = scale * cosines
        return (logits[np.arange(len(rows)), right] - np.log(np.exp(logits).sum(1))).mean()

    likeliest = likelihood(other.logit_scale)
    assert likeliest >= max(likelihood(factor * other.logit_scale) for factor in (0.9, 1.1))


def test_a_class_too_small_for_trust():
    with pytest.raises(InputError, match="--trusted 30 takes 60 images of each class"):
        label_noise.with_trusted(fine(), 30)
