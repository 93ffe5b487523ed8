"""Labels are saved immediately and none is lost; fits from the page read them."""

from __future__ import annotations

import threading

import pytest

from tests.cli.program import run
from tests.review.conftest import BAD
from ulfine_fast import Run
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.corrections import read_corrections
from ulfine_fast.review.session import Conflict, Session


def test_a_label_is_in_the_file_when_put_returns(session):
    item = session.state()["items"][0]
    session.put(item["row"], BAD, None)
    assert read_corrections(session.labels) == {item["id"]: BAD}
    assert session.state()["items"][0]["correction"] == BAD
    session.put(item["row"], None, BAD)
    assert read_corrections(session.labels) == {}


def test_a_copy_with_another_label_is_shown(session):
    first = next(item for item in session.state()["items"] if item["kind"] == "duplicate")
    assert {first["id"], first["duplicate"]["id"]} == {"train/cat/000.png", 'train/dog/"&<b>.png'}


def test_a_stale_page_overwrites_nothing(session):
    session.put(0, "cat", None)
    with pytest.raises(Conflict) as caught:
        session.put(0, "dog", None)
    assert caught.value.label == "cat"
    assert list(read_corrections(session.labels).values()) == ["cat"]


def test_concurrent_writers_lose_nothing(session, reviewed, tmp_path):
    """Two servers, as two programs are, and four pages each."""
    other = Session(reviewed, session.labels, tmp_path / "other", device="cpu")
    rows = range(16)

    def write(writer):
        for row in rows[writer::8]:
            (session, other)[writer % 2].put(row, "dog", None)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_corrections(session.labels)) == sorted(session.cache.ids[row] for row in rows)


@pytest.mark.parametrize(("row", "label", "words"), [(-1, "cat", "row"), (10**6, "cat", "row"), (0, "bird", "bird")])
def test_an_unknown_row_or_class_is_refused(session, row, label, words):
    with pytest.raises(InputError, match=words):
        session.put(row, label, None)
    assert not session.labels.exists()


def test_a_file_that_cannot_be_written_is_reported(session):
    session.labels.mkdir()
    with pytest.raises(InputError, match=r"labels\.csv"):
        session.put(0, "cat", None)


def test_a_fit_reads_the_labels_and_so_does_the_command(session, reviewed, tmp_path):
    hidden = next(row for row in session.split.unlabeled if session.cache.ids[row].startswith("unlabeled"))
    session.put(int(hidden), "dog", None)
    assert session.fit()
    session.wait()
    state = session.state()
    assert state["failure"] == ""
    assert [fit["labeled"] for fit in state["fits"]] == [len(session.split.labeled), len(session.split.labeled) + 1]
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


def test_a_fit_that_cannot_be_saved_changes_nothing(session):
    session.out.write_text("a file")
    before = session.state()
    assert session.fit()
    session.wait()
    after = session.state()
    assert "fitted" in after["failure"]
    assert after["items"] == before["items"]


def test_a_run_without_a_cache_is_refused(clusters, quick, tmp_path):
    from ulfine_fast import fit

    fit(clusters, quick(method="zero_shot"), progress=False).save(tmp_path / "run")
    done = run("review", tmp_path / "run")
    assert done.exit_code == 2
    assert "arrays in memory" in done.output
