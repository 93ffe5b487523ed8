"""Labels are saved at once and none is lost; fits from the page take them."""

from __future__ import annotations

import threading

import pytest

from tests.cli.test_bad_input import run
from tests.review.conftest import BAD
from ulfine_fast import Run
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.corrections import read_corrections
from ulfine_fast.review.session import Conflict, Session


def test_a_label_is_in_the_file_when_put_returns(session):
    one = session.told()["items"][0]
    session.put(one["row"], BAD, None)
    assert read_corrections(session.labels) == {one["id"]: BAD}
    assert session.told()["items"][0]["now"] == BAD
    session.put(one["row"], None, BAD)
    assert read_corrections(session.labels) == {}


def test_the_copy_under_another_label_is_asked_about(session):
    first = next(one for one in session.told()["items"] if one["kind"] == "twins")
    assert {first["id"], first["twin"]["id"]} == {"train/cat/000.png", 'train/dog/"&<b>.png'}


def test_a_stale_page_overwrites_nothing(session):
    session.put(0, "cat", None)
    with pytest.raises(Conflict) as caught:
        session.put(0, "dog", None)
    assert caught.value.label == "cat"
    assert list(read_corrections(session.labels).values()) == ["cat"]


def test_many_writers_at_once_lose_nothing(session, reviewed, tmp_path):
    """Two servers, as two programs are, and four pages each."""
    other = Session(reviewed, session.labels, tmp_path / "other", device="cpu")
    rows = range(16)

    def write(place):
        for row in rows[place::8]:
            (session, other)[place % 2].put(row, "dog", None)

    threads = [threading.Thread(target=write, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_corrections(session.labels)) == sorted(session.cache.ids[row] for row in rows)


@pytest.mark.parametrize(("row", "label", "words"), [(-1, "cat", "row"), (10**6, "cat", "row"), (0, "bird", "bird")])
def test_what_is_no_label_is_refused(session, row, label, words):
    with pytest.raises(InputError, match=words):
        session.put(row, label, None)
    assert not session.labels.exists()


def test_a_file_that_cannot_be_written_is_said(session):
    session.labels.mkdir()
    with pytest.raises(InputError, match=r"labels\.csv"):
        session.put(0, "cat", None)


def test_a_fit_takes_the_labels_and_so_does_the_command(session, reviewed, tmp_path):
    hidden = next(row for row in session.split.unlabeled if session.cache.ids[row].startswith("unlabeled"))
    session.put(int(hidden), "dog", None)
    assert session.fit()
    session.wait()
    told = session.told()
    assert told["failure"] == ""
    assert [one["labeled"] for one in told["figures"]] == [len(session.split.labeled), len(session.split.labeled) + 1]
    saved = Run.load(session.out)
    assert session.cache.ids[hidden] in saved.split["labeled"]
    options = ["--method", "linear_probe", "--steps", 20, "--eval-every", 10]
    done = run(
        "fit", saved.cache_path, *options, "--labels", session.labels, "--split", reviewed, "--out", tmp_path / "again"
    )
    assert done.exit_code == 0, done.output
    again = Run.load(tmp_path / "again")
    assert again.split == saved.split
    assert (again.tensors["linear"] == saved.tensors["linear"]).all()


def test_a_fit_that_cannot_be_saved_leaves_what_was(session):
    session.out.write_text("a file")
    before = session.told()
    assert session.fit()
    session.wait()
    after = session.told()
    assert "fitted" in after["failure"]
    assert after["items"] == before["items"]


def test_a_run_without_a_cache_is_refused(clusters, quick, tmp_path):
    from ulfine_fast import fit

    fit(clusters, quick(method="zero_shot"), progress=False).save(tmp_path / "run")
    done = run("review", tmp_path / "run")
    assert done.exit_code == 2
    assert "arrays in memory" in done.output
