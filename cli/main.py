"""The command `ulfine-fast`: one file per command; this one turns errors into one sentence and an exit code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ulfine_fast._version import __version__
from ulfine_fast.cache.errors import InputError
from ulfine_fast.cli.demo import demo
from ulfine_fast.cli.eval import evaluate
from ulfine_fast.cli.extract import extract
from ulfine_fast.cli.fit import fit
from ulfine_fast.cli.inspect import inspect
from ulfine_fast.cli.predict import predict
from ulfine_fast.cli.report import report
from ulfine_fast.cli.sweep import sweep

app = typer.Typer(
    name="ulfine-fast",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """End with exit code 2 and one sentence on bad input, 130 on Ctrl-C; never with a traceback for either."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            print(str(stop) or "interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ulfine-fast {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long-tailed semi-supervised classification on cached CLIP features: extract once, fit in seconds."""


_COMMANDS: dict[str, Callable[..., Any]] = {
    "extract": extract,
    "inspect": inspect,
    "fit": fit,
    "sweep": sweep,
    "eval": evaluate,
    "predict": predict,
    "report": report,
    "demo": demo,
}
for name, command in _COMMANDS.items():
    app.command(name)(guarded(command))


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
