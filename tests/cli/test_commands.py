"""The list of commands: its lines are those of the commands, and help imports none of them."""

from __future__ import annotations

import inspect
import os
import pkgutil
import shlex
import subprocess
import sys

import pytest
from typer.main import get_command

from tests.cli.program import run
from ulfine_fast.cli.commands import COMMANDS, Command, Group
from ulfine_fast.cli.main import app

LISTED = {name: entry for name, entry in COMMANDS.items() if isinstance(entry, Command)}
LISTED |= {
    f"{group} {name}": command
    for group, entry in COMMANDS.items()
    if isinstance(entry, Group)
    for name, command in entry.commands.items()
}


@pytest.mark.parametrize("name", LISTED)
def test_a_line_of_the_list_is_the_first_sentence_of_the_command(name):
    function = pkgutil.resolve_name(LISTED[name].function)
    assert inspect.getdoc(function).split("\n\n")[0].replace("\n", " ") == LISTED[name].help
    done = run(*name.split(), "--help")
    assert done.exit_code == 0, done.output
    assert f" {LISTED[name].help.split()[0]} " in done.stdout


def test_help_shows_every_command_with_its_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = run("--help").stdout
    for name, entry in COMMANDS.items():
        assert any(name in line and entry.help in line for line in shown.splitlines()), name
    shown = run("cache", "--help").stdout
    assert COMMANDS["cache"].help in shown
    for name, entry in COMMANDS["cache"].commands.items():
        assert any(name in line and entry.help in line for line in shown.splitlines()), name


def app_command(name):
    """The parsed command of this name."""
    command = get_command(app)
    for word in name.split():
        command = command.commands[word]
    return command


PROGRAM = """
import atexit, sys
atexit.register(lambda: print(*[name for name in sys.modules if name.startswith("ulfine_fast.")], file=sys.stderr))
from ulfine_fast.cli.main import app
app(standalone_mode=False)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["cache", "--help"], ["--version"], []])
def test_help_imports_no_command(arguments):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    imported = set(done.stderr.splitlines()[-1].split())
    assert "ulfine_fast.cli.main" in imported
    assert imported.isdisjoint(command.function.partition(":")[0] for command in LISTED.values())


EXAMPLES = [(name, example) for name, command in LISTED.items() for example in command.examples]


def test_every_command_has_examples_of_itself():
    assert {name for name, _ in EXAMPLES} == set(LISTED)
    assert all(example.split()[: len(name.split())] == name.split() for name, example in EXAMPLES)


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_an_example_parses_and_is_shown(name, example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = run("--print-config", *shlex.split(example))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"[{name.replace(' ', '.')}]")
    monkeypatch.setenv("COLUMNS", "200")
    assert f"ulfine-fast {example}" in run(*name.split(), "--help").stdout


@pytest.mark.parametrize("name", LISTED)
def test_the_list_says_what_each_argument_is(name):
    """As many as the command has; a hidden one has the option of another name."""
    command = app_command(name)
    arguments = [param for param in command.params if param.param_type_name == "argument" and not param.hidden]
    takes = [one for one in LISTED[name].takes if one != "text"]
    assert len(takes) <= len(arguments)
    assert len(LISTED[name].takes) >= len(arguments)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("fo", ["forecast"]), ("ex", ["extract", "export"]), ("cache m", ["merge"]), ("forecast --ov", ["--over"])],
)
def test_completion_knows_the_commands(typed, completed):
    program = "import sys; sys.argv = ['ulfine-fast']; from ulfine_fast.cli.main import main; main()"
    words = f"ulfine-fast {typed}"
    environment = {
        **os.environ,
        "_ULFINE_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == completed, done.stderr


def test_the_package_can_be_run_as_a_module():
    command = [sys.executable, "-m", "ulfine_fast", "methods", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert '"ulfine_plus"' in done.stdout
    wrong = subprocess.run([*command[:3], "fitt"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "error: no such command: fitt; did you mean fit?\n")
