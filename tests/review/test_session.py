"""Labels are saved immediately and none is lost; fits from the page read them."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from tests.cli.program import run
from tests.review.conftest import BAD
from ulfine_fast import Run
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.data.corrections import read_corrections
from ulfine_fast.review.groups import TABS
from ulfine_fast.review.proposals import propose
from ulfine_fast.review.session import Change, Conflict, Session


def put(session, row, label, expected=None):
    session.put([Change(int(row), label, expected)])


def hidden_rows(session):
    """Images without a label in the folder of unlabelled ones."""
    return [int(row) for row in session.split.unlabeled if session.cache.ids[row].startswith("unlabeled")]


def test_a_label_is_in_the_file_when_put_returns(session):
    item = session.page("proposed", 0, 0)["items"][0]
    put(session, item["row"], BAD)
    assert read_corrections(session.labels) == {item["id"]: BAD}
    assert session.page("proposed", 0, 0)["items"][0]["correction"] == BAD
    put(session, item["row"], None, BAD)
    assert read_corrections(session.labels) == {}


def test_a_copy_with_another_label_is_shown(session):
    pages = [session.page("wrong", number, 0) for number in range(len(session.state()["tabs"]["wrong"]))]
    copies = next(page for page in pages if "two labels" in page["name"])
    pairs = [{item["id"], item["duplicate"]["id"]} for item in copies["items"]]
    assert {"train/cat/000.png", 'train/dog/"&<b>.png'} in pairs


def test_a_stale_page_overwrites_nothing(session):
    put(session, 0, "cat")
    with pytest.raises(Conflict) as caught:
        session.put([Change(1, "dog", None), Change(0, "dog", None)])
    assert caught.value.labels == {0: "cat"}
    # none of the labels of a refused request is saved
    assert list(read_corrections(session.labels).values()) == ["cat"]


def test_a_label_of_another_program_is_read(session):
    name = session.cache.ids[0]
    session.labels.write_text(f"id,label\n{name},dog\n")
    assert session.corrections() == {name: "dog"}
    session.labels.write_text(f"id,label\n{name},cat\n")
    assert session.corrections() == {name: "cat"}


def test_pages_of_every_tab(session):
    state = session.state()
    for tab in TABS:
        for number, group in enumerate(state["tabs"][tab]):
            page = session.page(tab, number, 0)
            assert (page["name"], page["images"]) == (group["name"], group["images"])
            assert len(page["items"]) == min(group["images"], 30)
        beyond = session.page(tab, 10**6, 0)
        assert (beyond["items"], beyond["pages"]) == ([], 1)


def test_the_label_of_an_unlabelled_image_is_not_shown(session):
    """The cache knows the class of some of them, which the page is to ask for."""
    rows = {int(row) for row in session.split.unlabeled}
    for tab in TABS:
        for number in range(len(session.state()["tabs"][tab])):
            for item in session.page(tab, number, 0)["items"]:
                assert (item["label"] < 0) == (item["row"] in rows)


def test_answers_change_what_is_measured(session):
    before = session.state()
    rows = hidden_rows(session)
    session.put([Change(row, "dog", None) for row in rows])
    session.wait()
    after = session.state()
    assert after["version"] > before["version"]
    assert not after["busy"]
    counts = [{one["name"]: one["labels"] for one in state["classes"]} for state in (before, after)]
    assert counts[1]["dog"] == counts[0]["dog"] + len(rows)
    assert after["balanced_accuracy"]["labels"] == before["balanced_accuracy"]["labels"] + len(rows)
    assert after["changed"]["labels"] == before["balanced_accuracy"]["labels"]
    assert [point["labels"] for point in after["history"]] == [sum(one.values()) for one in counts]
    # what has an answer is asked about no more
    asked = {
        item["row"] for tab in TABS for i in range(len(after["tabs"][tab])) for item in session.page(tab, i, 0)["items"]
    }
    assert not asked & set(rows)


def test_a_page_is_turned_in_the_view_in_which_it_was_opened(session):
    opened = session.page("cluster", 0, 0)
    session.put([Change(item["row"], "dog", None) for item in opened["items"]])
    session.wait()
    same = session.page("cluster", 0, 0, opened["version"])
    assert [item["row"] for item in same["items"]] == [item["row"] for item in opened["items"]]
    assert {item["correction"] for item in same["items"]} == {"dog"}
    assert session.page("cluster", 0, 0, -5)["version"] == session.state()["version"]


def test_a_proposal_says_what_it_expected_and_what_came(session):
    state = session.state()
    assert state["outcome"] is None
    proposed = session.page("proposed", 0, 0)["items"]
    assert len(proposed) == state["proposal"]["images"]
    expected = state["proposal"]
    first, *others = proposed
    put(session, first["row"], "")
    session.wait()
    # it stays until all of its images have an answer
    assert session.state()["proposal"] == expected
    session.put([Change(item["row"], "cat", None) for item in others])
    session.wait()
    came = session.state()["outcome"]
    assert (came["expected"], came["expected_classes"]) == (expected["gain"], expected["classes"])
    assert (came["classes"], came["none"]) == ([{"name": "cat", "images": len(others)}], 1)
    assert came["labels"] == len(others)
    assert came["gained"]["low"] <= came["gained"]["value"] <= came["gained"]["high"]


def test_other_images_are_proposed_when_asked_for(reviewed, tmp_path, monkeypatch):
    from ulfine_fast.review import session as module

    monkeypatch.setattr(module, "propose", partial(propose, count=2))
    session = Session(reviewed, tmp_path / "labels.csv", tmp_path / "fitted", device="cpu")
    shown = [{item["row"] for item in session.page("proposed", 0, 0)["items"]}]
    for _ in range(len(session.split.unlabeled) // 2):
        session.propose_others()
        session.wait()
        shown.append({item["row"] for item in session.page("proposed", 0, 0)["items"]})
    assert not shown[0] & shown[1]
    # all of them have been shown, and come again
    assert set().union(*shown) == set(session.split.unlabeled.tolist())
    assert all(shown)


def test_the_only_label_of_a_class_is_unknown_and_its_loss_is_reported(session):
    """All labels of a class but one are taken away, then the last."""
    class_index = session.cache.class_names.index(BAD)
    rows = [
        int(row) for row in [*session.split.labeled, *session.split.val] if session.cache.labels[row] == class_index
    ]
    session.put([Change(row, "", None) for row in rows[1:]])
    session.wait()
    state = session.state()
    assert state["classes"][class_index]["accuracy"] is None
    assert state["unknown"] == [BAD]
    put(session, rows[0], "")
    session.wait()
    assert "without a labelled image" in session.state()["failure"]
    put(session, rows[0], None, "")
    session.wait()
    assert session.state()["failure"] == ""


def test_concurrent_writers_lose_nothing(session, reviewed, tmp_path):
    """Two servers, as two programs are, and four pages each."""
    other = Session(reviewed, session.labels, tmp_path / "other", device="cpu")
    rows = range(16)

    def write(writer):
        for row in rows[writer::8]:
            put((session, other)[writer % 2], row, "dog")

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read_corrections(session.labels)) == sorted(session.cache.ids[row] for row in rows)


@pytest.mark.parametrize(("row", "label", "words"), [(-1, "cat", "row"), (10**6, "cat", "row"), (0, "bird", "bird")])
def test_an_unknown_row_or_class_is_refused(session, row, label, words):
    with pytest.raises(InputError, match=words):
        put(session, row, label)
    assert not session.labels.exists()


def test_a_file_that_cannot_be_written_is_reported(session):
    session.labels.mkdir()
    with pytest.raises(InputError, match=r"labels\.csv"):
        put(session, 0, "cat")


def test_a_fit_reads_the_labels_and_so_does_the_command(session, reviewed, tmp_path):
    hidden = hidden_rows(session)[0]
    put(session, hidden, "dog")
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
    assert after["fits"] == before["fits"]
    assert after["tabs"] == before["tabs"]


def test_a_run_without_a_cache_is_refused(clusters, quick, tmp_path):
    from ulfine_fast import fit

    fit(clusters, quick(method="zero_shot"), progress=False).save(tmp_path / "run")
    done = run("review", tmp_path / "run")
    assert done.exit_code == 2
    assert "arrays in memory" in done.output
