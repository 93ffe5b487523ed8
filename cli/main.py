"""The command `ulfine-fast`: one file per command; this one turns errors into one sentence and an exit code."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cli import cache
from ulfine_fast.cli.config_file import defaults_from, printed
from ulfine_fast.cli.demo import demo
from ulfine_fast.cli.eval import evaluate
from ulfine_fast.cli.export import export
from ulfine_fast.cli.extract import extract
from ulfine_fast.cli.fit import fit
from ulfine_fast.cli.inspect import inspect
from ulfine_fast.cli.log import log
from ulfine_fast.cli.neighbors import neighbors
from ulfine_fast.cli.predict import predict
from ulfine_fast.cli.push import push
from ulfine_fast.cli.report import report
from ulfine_fast.cli.review import review
from ulfine_fast.cli.sweep import sweep
from ulfine_fast.related.head_realignment.command import realign
from ulfine_fast.related.multilabel.command import multilabel
from ulfine_fast.related.test_time_adaptation.command import adapt

_PRINT = "ulfine_fast.print_config"

app = typer.Typer(
    name="ulfine-fast",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "ULFINE_FAST"},
)


def _command_class(command: Callable[..., Any]) -> type[TyperCommand]:
    """The command's own class, made to print its options where that was asked for."""

    class Command(getattr(command, "command_class", TyperCommand)):  # type: ignore[misc]
        def get_params(self, ctx: Any) -> list[Any]:
            params: list[Any] = super().get_params(ctx)
            for param in params:
                # every option has a variable, which docs/commands.md says once
                param.show_envvar = False
            return params

        def invoke(self, ctx: Any) -> Any:
            if ctx.meta.get(_PRINT):
                print(printed(ctx))
                return None
            return super().invoke(ctx)

    return Command


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """End with one sentence and no traceback: exit code 2 on bad input, 130 on Ctrl-C, 143 when asked to terminate."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        ended = _Ended()
        try:
            with ended:
                return command(*args, **options)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            print(str(stop) or "interrupted", file=sys.stderr)
            raise typer.Exit(128 + ended.signal) from None

    return run


class _Ended:
    """Makes a request to terminate end a command as Ctrl-C does: what is finished stays, children go first.

    Attributes:
        signal: what ended the command: that of Ctrl-C unless another came.
    """

    def __init__(self) -> None:
        self.signal = int(signal.SIGINT)

    def __enter__(self) -> None:
        # only a main thread may set a handler; elsewhere, as in a notebook's, there is nobody to terminate it
        self._ours = threading.current_thread() is threading.main_thread()
        if self._ours:
            self._before = signal.signal(signal.SIGTERM, self._end)

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)

    def _end(self, number: int, _: object) -> None:
        self.signal = number
        raise KeyboardInterrupt


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ulfine-fast {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of options, a table for each command; the command line wins."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print what the command would run with, as such a file, and stop.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long-tailed semi-supervised classification on cached CLIP features: extract once, fit in seconds."""
    context.meta[_PRINT] = print_config
    if config is not None:
        try:
            context.default_map = defaults_from(config, context.command)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None


_COMMANDS: dict[str, Callable[..., Any]] = {
    "extract": extract,
    "inspect": inspect,
    "neighbors": neighbors,
    "fit": fit,
    "sweep": sweep,
    "eval": evaluate,
    "predict": predict,
    "realign": realign,
    "adapt": adapt,
    "multilabel": multilabel,
    "export": export,
    "push": push,
    "report": report,
    "log": log,
    "review": review,
    "demo": demo,
}
for name, command in _COMMANDS.items():
    app.command(name, cls=_command_class(command))(guarded(command))
_caches = typer.Typer(no_args_is_help=True, help=cache.HELP)
for name, command in cache.COMMANDS.items():
    _caches.command(name, cls=_command_class(command))(guarded(command))
app.add_typer(_caches, name="cache")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
