import json

import pytest

from benchmarks.comparison.parts import code_of, fingerprint_of, read_part, write_part
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError

REQUEST = {"method": "ulfine", "seeds": [0, 1], "config": {"lr": 0.1, "mu": 0.01}}
ROWS = [{"seed": 0, "accuracy": 0.5}, {"seed": 1, "accuracy": None}]


@pytest.fixture
def part(tmp_path):
    path = tmp_path / "parts" / "one.json"
    write_part(path, REQUEST, ROWS)
    return path


def test_a_part_is_read_back(part):
    assert read_part(part, REQUEST) == ROWS
    assert [path.name for path in part.parent.iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    "other",
    [
        {**REQUEST, "seeds": [0, 2]},
        {**REQUEST, "config": {"lr": 0.2, "mu": 0.01}},
        {**REQUEST, "config": {"lr": 0.1}},
        {**REQUEST, "more": 1},
    ],
)
def test_a_part_of_another_request_does_not_count(part, other):
    assert read_part(part, other) is None


def test_an_option_that_came_later_does_not_matter(part):
    assert read_part(part, {**REQUEST, "config": {**REQUEST["config"], "new": 3}}) == ROWS


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": []}', '{"request": {}, "rows": []}'])
def test_what_is_no_part_does_not_count(tmp_path, content):
    (tmp_path / "one.json").write_text(content)
    assert read_part(tmp_path / "one.json", REQUEST) is None
    assert read_part(tmp_path / "none.json", REQUEST) is None


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_part(tmp_path / "file" / "one.json", REQUEST, ROWS)
    assert json.loads(json.dumps(ROWS)) == ROWS


def test_a_fingerprint_follows_features_and_labels(clusters):
    assert fingerprint_of(clusters) == fingerprint_of(make_clusters())
    assert fingerprint_of(make_clusters(seed=1)) != fingerprint_of(clusters)
    other = make_clusters()
    other.labels[0] = 3
    assert fingerprint_of(other) != fingerprint_of(clusters)


def test_code_has_a_name_of_its_own_for_each_method():
    codes = {method: code_of(method, tuned=False) for method in ("ulfine", "linear_probe", "sklearn_self_training")}
    assert len(set(codes.values())) == 3
    assert code_of("oracle", tuned=False) == codes["linear_probe"]
    assert code_of("ulfine", tuned=True) != codes["ulfine"]


def test_code_follows_the_files_a_method_uses_and_no_others(tmp_path, monkeypatch):
    import benchmarks.comparison.parts

    real, changed = benchmarks.comparison.parts._file, set()

    def edited(module):
        if module not in changed:
            return real(module)
        path = tmp_path / "edited.py"
        path.write_text(real(module).read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
        return path

    monkeypatch.setattr(benchmarks.comparison.parts, "_file", edited)
    before = {method: code_of(method, tuned=False) for method in ("ulfine", "linear_probe")}
    changed = {"ulfine_fast.methods.ulfine"}
    assert code_of("linear_probe", tuned=False) == before["linear_probe"]
    assert code_of("ulfine", tuned=False) != before["ulfine"]
    # at any depth: the probe uses the loss, which lives in another module
    changed = {"ulfine_fast.ops.losses"}
    assert code_of("linear_probe", tuned=False) != before["linear_probe"]
    changed = {"ulfine_fast.config"}
    assert code_of("linear_probe", tuned=False) == before["linear_probe"]
