"""`ulfine-fast` with the arguments of a command line, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from ulfine_fast.cli.main import app


def run(*arguments, **environment):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def refused(*arguments):
    """The sentence on stderr of a command that must end with 2."""
    done = run(*arguments)
    assert done.exit_code == 2, f"{done.exit_code}: {done.output} {done.exception!r}"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def usage_error(*arguments):
    """The words on stderr of a command with a bad option, without the frame that Typer draws around them."""
    done = run(*arguments)
    assert done.exit_code == 2, f"{done.exit_code}: {done.output} {done.exception!r}"
    return " ".join(done.stderr.replace("│", " ").split())
