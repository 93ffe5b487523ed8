"""The command `ulfine-fast`: its commands come from a list, and an error becomes one sentence and an exit code."""

from __future__ import annotations

import copy
import functools
import io
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.terminal import printable
from ulfine_fast.cli.commands import COMMANDS, Command, Group
from ulfine_fast.cli.config_file import defaults_from, printed
from ulfine_fast.cli.guess import examples_in_words, unknown_command, with_near_choice, wrong_argument

_PRINT = "ulfine_fast.print_config"


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """End with one sentence and no traceback: exit code 2 on bad input, 130 on Ctrl-C, 143 on SIGTERM.

    SIGTERM ends the command as Ctrl-C does: what is finished stays, and child processes end first.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        received = int(signal.SIGINT)

        def interrupt(number: int, _frame: object) -> None:
            nonlocal received
            received = number
            raise KeyboardInterrupt

        # only the main thread may set a handler; in other threads, such as a notebook's, SIGTERM ends the process
        handles = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, interrupt) if handles else None
        try:
            return command(*args, **options)
        except (InputError, OSError) as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            print(str(stop) or "interrupted", file=sys.stderr)
            raise typer.Exit(128 + received) from None
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    return run


def _command_class(name: str, entry: Command, command: Callable[..., Any]) -> type[TyperCommand]:
    """The command's own class, with `--print-config`, and refusals that say what was meant."""
    own: Any = getattr(command, "command_class", TyperCommand)

    class ListedCommand(own):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            try:
                rest: list[str] = super().parse_args(ctx, args)
            except typer.BadParameter as error:
                meant = wrong_argument(name, entry, _arguments(ctx, self.params))
                if meant is not None:
                    _refuse(meant)
                error.message = with_near_choice(error.message)
                raise
            return rest

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
            return guarded(self._run)(ctx)

        def _run(self, ctx: Any) -> Any:
            try:
                return super().invoke(ctx)
            except (InputError, OSError) as error:
                meant = wrong_argument(name, entry, _arguments(ctx, self.params))
                raise error if meant is None else InputError(meant) from error

    return ListedCommand


def _arguments(ctx: Any, params: list[Any]) -> list[str]:
    """The arguments of a call that were read, without its options."""
    values = [ctx.params.get(param.name) for param in params if param.param_type_name == "argument"]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values if value is not None]
    return [str(value) for inner in lists for value in inner]


def _refuse(error: object) -> NoReturn:
    print(f"error: {printable(error)}", file=sys.stderr)
    raise typer.Exit(2)


class _LazyCommands(Mapping[str, Any]):
    """Commands by name, each imported when it is looked up."""

    def __init__(self, listed: Mapping[str, Command | Group], group: str) -> None:
        self._listed = listed
        self._group = group

    def __getitem__(self, name: str) -> Any:
        entry = self._listed[name]
        if isinstance(entry, Group):
            return _LazyGroup(name=name, listed=entry.commands, group=name, help=entry.help, no_args_is_help=True)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        function = pkgutil.resolve_name(entry.function)
        full_name = f"{self._group} {name}".strip()
        single.command(name, cls=_command_class(full_name, entry, function), epilog=examples_in_words(entry.examples))(
            function
        )
        return get_command(single)

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)


class _LazyGroup(TyperGroup):
    """A group of listed commands; its help shows their lines of the list and imports none of them."""

    def __init__(self, *, listed: Mapping[str, Command | Group] = COMMANDS, group: str = "", **settings: Any) -> None:
        super().__init__(**settings)
        self.listed = listed
        self.commands: Any = _LazyCommands(listed, group)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.listed)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names; a word that is none is refused with what was likely meant."""
        if args and args[0] not in self.listed and not ctx.resilient_parsing:
            _refuse(unknown_command(args, self.listed))
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        overview = copy.copy(self)
        overview.commands = {name: TyperCommand(name, help=entry.help) for name, entry in self.listed.items()}
        super(_LazyGroup, overview).format_help(ctx, formatter)


app = typer.Typer(
    name="ulfine-fast",
    cls=_LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "ULFINE_FAST"},
)


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
            print(f"error: {printable(error)}", file=sys.stderr)
            raise typer.Exit(2) from None


def open_closed_streams() -> None:
    """Connect stdin, stdout and stderr to nothing where the caller closed them, as `2>&-` does.

    Python has no stream there, which the first print would trip over, and the next file that is opened would get the
    number of stderr, so that messages of a library would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def main() -> None:
    """Run the command line."""
    open_closed_streams()
    # A name that the terminal's encoding lacks is no reason to end with a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
