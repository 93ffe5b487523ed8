"""Options from a TOML file and from the environment, and what a command would run with."""

from __future__ import annotations

import pytest
from typer.main import get_command

from tests.cli.program import run
from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.toml import read_toml
from ulfine_fast.cli.main import app


def printed(tmp_path, *arguments: str, **environment: str) -> dict:
    """The table of the command that was asked what it would run with."""
    done = run(*arguments, **environment)
    assert done.exit_code == 0, done.output
    (tmp_path / "printed.toml").write_text(done.stdout)
    return read_toml(tmp_path / "printed.toml")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "options.toml"
    path.write_text(
        "[fit]\nmethod = 'ulfine'\nlr = 0.5\nbatch-labeled = 8\npaf = false\njson = true\n"
        "[cache.merge]\nprefix = true\n"
    )
    return path


def test_a_file_stands_in_for_options_and_the_command_line_wins(tmp_path, file):
    options = printed(tmp_path, "--config", file, "--print-config", "fit", "cache", "--batch-labeled", "9")["fit"]
    assert (options["lr"], options["batch_labeled"], options["paf"], options["json"]) == (0.5, 9, False, True)
    assert options["eta"] == 0.5
    assert printed(tmp_path, "--config", file, "--print-config", "cache", "merge", "a", "--out", "b") == {
        "cache": {"merge": {"out": "b", "prefix": True, "json": False}}
    }


def test_what_is_printed_is_a_file_of_the_same_options(tmp_path):
    for command in ("extract", "fit", "sweep", "report", "predict", "neighbors"):
        arguments = [command, "some", "thing"][: 3 if command == "predict" else 2]
        more = ["--out", "o"] if command == "extract" else []
        first = run("--print-config", *arguments, *more)
        (tmp_path / "again.toml").write_text(first.stdout)
        again = run("--config", tmp_path / "again.toml", "--print-config", *arguments)
        assert first.stdout == again.stdout, command


def test_a_file_changes_what_is_done(tmp_path):
    """Nothing is run while options are printed; with the same file the command does run."""
    (tmp_path / "options.toml").write_text(f'[extract]\nout = "{tmp_path / "cache"}"\nbatch_size = 0\n')
    (tmp_path / "images/train/cat").mkdir(parents=True)
    assert run("--config", tmp_path / "options.toml", "--print-config", "extract", tmp_path / "x").exit_code == 0
    done = run("--config", tmp_path / "options.toml", "extract", tmp_path / "no-such-folder")
    assert (done.exit_code, "no-such-folder" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[fit]\nlrr = 1", "sets lrr, which fit has no option for; did you mean lr?"),
        ("[fit]\nzzzz = 1", "ulfine-fast fit --help"),
        ("[fitt]\nlr = 1", "options stand under their command"),
        ("lr = 1", "options stand under their command"),
        ("[fit", "is not TOML"),
        (
            "[cache]\nprefix = true",
            "options stand under their command: [cache.append], [cache.describe], [cache.merge]",
        ),
    ],
)
def test_a_wrong_file_ends_in_one_sentence(tmp_path, text, said):
    (tmp_path / "options.toml").write_text(text)
    done = run("--config", tmp_path / "options.toml", "fit", "cache")
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_file_ends_in_one_sentence(tmp_path):
    done = run("--config", tmp_path / "none.toml", "fit", "cache")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)


def test_every_option_has_a_variable(tmp_path, file):
    environment = {"ULFINE_FAST_FIT_LR": "0.25", "ULFINE_FAST_FIT_ETA": "0.125"}
    options = printed(tmp_path, "--config", file, "--print-config", "fit", "cache", "--eta", "0.75", **environment)[
        "fit"
    ]
    assert (options["lr"], options["eta"]) == (0.25, 0.75)


def test_the_device_of_auto(monkeypatch):
    monkeypatch.setenv("ULFINE_FAST_DEVICE", "cpu")
    assert pick_device("auto").type == "cpu"
    monkeypatch.setenv("ULFINE_FAST_DEVICE", "toaster")
    with pytest.raises(ValueError, match="'toaster' is not available"):
        pick_device("auto")


def test_every_command_prints_json():
    commands = get_command(app).commands
    inner = [one for group in ("cache",) for one in commands[group].commands.values()]
    for command in [*inner, *(one for name, one in commands.items() if name != "cache")]:
        options = {text for one in command.params for text in getattr(one, "opts", [])}
        assert "--json" in options, command.name
