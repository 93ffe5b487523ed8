"""Databases that are damaged, hostile, full or oddly named: one sentence, and the sweep goes on afterwards."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.search.conftest import SPACE, recorded
from ulfine_fast import InputError, sweep
from ulfine_fast.search import storage
from ulfine_fast.search.space import read_space

OPTIONS = {"trials": 4, "batch": 2, "sampler": "random", "refit": 1, "refit_seeds": 2}
CHOICES = {**SPACE, "tau": [0.5, 1.0]}
DEEP = "[" * 100_000
TABLES = ["studies", "study_directions", "trials", "trial_params", "trial_values", "trial_user_attributes"]
ENDLESS = """CREATE VIEW studies AS WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers)
SELECT n AS study_id, 'sweep' AS study_name FROM numbers"""


@pytest.fixture(scope="module")
def finished(clusters, tmp_path_factory):
    return sweep(clusters, CHOICES, out=tmp_path_factory.mktemp("finished") / "sweep", **OPTIONS)


@pytest.fixture
def again(finished, search, tmp_path):
    """Run the sweep again on a copy of its folder, which a function has damaged."""

    def run(damage):
        folder = tmp_path / "copy"
        shutil.copytree(finished.out, folder)
        damage(folder)
        return search(CHOICES, out=folder, **OPTIONS)

    return run


def replaced(name, make):
    """Damage: a file of the folder is removed, and `make` puts something else there."""

    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def executed(*statements):
    """Damage: statements that are run in the database."""

    def damage(folder):
        connection = sqlite3.connect(folder / "sweep.db")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()

    return damage


REFUSED = {
    **{f"without {table}": (executed(f"DROP TABLE {table}"), f"lacks the table {table}") for table in TABLES},
    "empty studies": (executed("DELETE FROM studies"), "counts 4 trials|cannot be read"),
    "empty trials": (executed("DELETE FROM trials"), "counts 4 trials, the study 'sweep' has 0"),
    "no database": (replaced("sweep.db", lambda path: path.write_text("text " * 999)), "file is not a database"),
    "an empty file": (replaced("sweep.db", Path.touch), "counts 4 trials"),
    "no file": (replaced("sweep.db", lambda path: None), "counts 4 trials"),
    "a pipe": (replaced("sweep.db", os.mkfifo), "not a regular file"),
    "a folder": (replaced("sweep.db", os.mkdir), "not a regular file|Is a directory"),
    "a view": (executed("ALTER TABLE studies RENAME TO other", ENDLESS), "has a view 'studies'"),
    "a trigger": (
        executed("CREATE TRIGGER t AFTER UPDATE ON trials BEGIN UPDATE trial_values SET value = 1; END"),
        "has a trigger 't'",
    ),
    "a param": (executed("UPDATE trial_params SET param_value = 0.01 WHERE param_name = 'lr'"), "were proposed"),
    "a param outside": (executed("UPDATE trial_params SET param_value = 9 WHERE param_name = 'tau'"), "cannot be read"),
    "a value": (executed("UPDATE trial_values SET value = 0.99"), r"its values are \[0.99\], by its results"),
    "no value": (executed("UPDATE trial_values SET value = NULL"), "cannot be read"),
    "a text as value": (executed("UPDATE trial_values SET value = 'x'"), "was changed"),
    "a state": (executed("UPDATE trials SET state = 'FAIL' WHERE number = 1"), "its state is fail"),
    "no such state": (executed("UPDATE trials SET state = 'NOPE'"), "cannot be read"),
    "a number": (executed("UPDATE trials SET number = 7 WHERE number = 1"), "lacks a trial"),
    "swapped": (executed("UPDATE trials SET number = 1 - number WHERE number < 2"), "results for seed 0 are not those"),
    "a time": (executed("UPDATE trials SET datetime_start = 'x'"), "cannot be read"),
    "a distribution": (executed(f"UPDATE trial_params SET distribution_json = '{DEEP}'"), "RecursionError"),
    "deep records": (executed(f"UPDATE trial_user_attributes SET value_json = '{DEEP}'"), "RecursionError"),
    "a number as record": (executed("UPDATE trial_user_attributes SET value_json = '3'"), "Expected object, got int"),
    "digits": (executed(f"UPDATE trial_user_attributes SET value_json = '{'9' * 5000}'"), "cannot be read"),
    "half a character": (
        executed("""UPDATE trial_user_attributes SET value_json = '{"owner": "\\ud800"}' WHERE key = 'share'"""),
        "matching regex",
    ),
    "no identity": (executed("UPDATE study_user_attributes SET value_json = '[]'"), "was not made by sweep"),
    "a direction": (executed("UPDATE study_directions SET direction = 'MINIMIZE'"), "made with directions"),
    "a version": (executed("UPDATE alembic_version SET version_num = 'v9'"), "cannot open the storage"),
    "another owner": (lambda folder: (folder / ".owner").write_text("0123456789ab"), "its file .owner names"),
    "a path as owner": (lambda folder: (folder / ".owner").write_text("../../x"), "does not hold the id of a sweep"),
    "a pipe as owner": (replaced(".owner", os.mkfifo), "not a regular file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_study_is_refused_in_one_sentence(again, name):
    damage, words = REFUSED[name]
    with pytest.raises(InputError, match=words) as caught:
        again(damage)
    assert "\n" not in str(caught.value)


UNCHANGED = {
    "a hole behind it": lambda folder: os.truncate(folder / "sweep.db", 1 << 40),
    "no version": executed("DROP TABLE alembic_version"),
    "a trial that is to be trained again": executed("UPDATE trials SET state = 'RUNNING' WHERE number = 1"),
    "no names of metrics": executed("DELETE FROM study_system_attributes"),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_does_not_matter_changes_nothing(again, finished, name):
    result = again(UNCHANGED[name])
    assert recorded(result) == recorded(finished)
    assert [trial.to_dict() for trial in result.leaderboard] == [trial.to_dict() for trial in finished.leaderboard]


# -- a full disk


@pytest.fixture
def no_waiting(monkeypatch):
    """Optuna tries five times to write a trial, and waits in between."""
    monkeypatch.setattr("optuna.storages._rdb.storage.time.sleep", lambda seconds: None)


@pytest.mark.parametrize("pages", [28, 29, 30])
def test_a_full_database_is_one_sentence_and_the_sweep_goes_on(search, tmp_path, monkeypatch, no_waiting, pages):
    def nearly_full(connection, _record):
        connection.execute(f"PRAGMA max_page_count = {pages}")

    space = {**SPACE, "eval_every": 3}
    options = {**OPTIONS, "trials": 16, "batch": 8, "pruning": "halving"}
    monkeypatch.setattr(storage, "_set_up_sqlite", nearly_full)
    with pytest.raises(InputError, match=r"failed \(database or disk is full\); make room .* what is finished stays"):
        search(space, **options)
    monkeypatch.undo()
    assert recorded(search(space, **options)) == recorded(search(space, **{**options, "out": tmp_path / "whole"}))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize(
    "name",
    ["leaderboard.csv", "results.parquet", "importance.json", "best.toml", "best-1.toml", "sweep.json", ".owner"],
)
def test_a_full_disk_is_one_sentence_and_the_sweep_goes_on(search, tmp_path, clusters, finished, name):
    folder = tmp_path / "full"
    folder.mkdir()
    # what is written there goes nowhere
    (folder / f"{name}.tmp").symlink_to("/dev/full")
    if name != ".owner":
        (folder / ".owner").write_text("0123456789ab")
    with pytest.raises(InputError, match=r"cannot write .*No space left on device.*what is finished stays"):
        search(CHOICES, out=folder, **OPTIONS)
    assert recorded(search(CHOICES, out=folder, **OPTIONS)) == recorded(finished)


def test_a_database_that_cannot_be_made(search, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("optuna.storages.RDBStorage", full)
    with pytest.raises(InputError, match=r"cannot open the storage sqlite:.*database or disk is full.*make room"):
        search()


def test_a_process_that_died_at_the_start_left_nothing_in_the_way(search, tmp_path, monkeypatch):
    # while it wrote its id
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/.owner.tmp").write_text("0123")
    # and between creating the study and saying what it is
    monkeypatch.setattr("optuna.Study.set_user_attr", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        search(trials=2)
    monkeypatch.undo()
    assert search(trials=2).counts == {"complete": 2}


# -- names of folders


@pytest.mark.parametrize("name", ["a{b}", "{SCHEMA_VERSION}", "a%20b", "a#b", "ä b", "a@b:c", "what?"])
def test_a_folder_may_have_any_name(search, tmp_path, name):
    before = recorded(search(trials=2, out=tmp_path / name))
    assert (tmp_path / name / "sweep.db").exists()
    assert recorded(search(trials=3, out=tmp_path / name))[:2] == before


# -- spaces


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = " + DEEP, "nested too deep"),
        ("lr = " + "{a = " * 50_000, "nested too deep"),
        ("lr" + ".a" * 100_000 + " = 1", "dotted name of more than 32 parts"),
        ("[" + "a." * 100_000 + "a]", "dotted name of more than 32 parts"),
        ("# " + "x" * (1 << 20), "more than 1048576 bytes"),
        ("lr = 1" + "0" * 400, "lr must be a finite number"),
        ("lr = " + "1" * 5000, "is not TOML"),
        ("warmup = {low = 0.0, high = 1.0, step = 1e-300}", "give a larger step"),
        ("warmup = {low = 0.0, high = 1.0, points = 1" + "0" * 400 + "}", "at most 1e.09 points"),
        ('method = "\\ud800"', "is not TOML"),
        ("lr = 2020-01-01", "lr must be a finite number"),
    ],
    ids=lambda text: text[:20],
)
def test_spaces_that_are_no_spaces(tmp_path, text, words):
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_space(tmp_path / "space.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trials": 10**12}, "trials must be at most 1000000"),
        ({"batch": 10**12, "sampler": "cmaes"}, "batch must be at most 1000000"),
        ({"seeds": 10**9}, "seeds must be at most 10000"),
        ({"refit_seeds": 10**9}, "refit-seeds must be at most 10000"),
        ({"sampler": "grid", "space": {**SPACE, "lr": {"low": 0.0, "high": 1.0, "points": 10**9}}}, "has 5e.09 points"),
    ],
)
def test_counts_that_no_memory_holds(search, options, words):
    with pytest.raises(InputError, match=words):
        search(**options)


def test_a_study_is_read_once_and_checked_again_where_it_changed(search):
    result = search(trials=2)
    executed("UPDATE trial_values SET value = 0.5")(result.out)
    with pytest.raises(InputError, match="was changed after it was recorded"):
        search(trials=3)
