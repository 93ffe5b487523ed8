"""A benchmark's command, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from click.testing import Result
from typer.testing import CliRunner

from ulfine_fast.cli.main import guarded


def run_command(command: Callable[..., Any], *arguments: object) -> Result:
    """Runs a command with the arguments of a command line."""
    app = typer.Typer()
    app.command()(guarded(command))
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
