"""Command-line options made from declared options, so that no hyper-parameter is written down twice.

A command that fits methods has the shared options of :class:`ulfine_fast.FitConfig`, and those of the method that the
call names: `fit --method ulfine --help` shows them, and `--mu` with another method is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "int | None": int | None,
    "float | None": float | None,
    "str | None": str | None,
}
# keys of what a command's context keeps: parameters of the methods, and their values
_METHODS = "ulfine_fast.methods"
_VALUES = "ulfine_fast.method_options"


def with_options_of(config: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command whose last parameter is `**options` one option per field of a dataclass."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        return _with_parameters(command, [_parameter(spec) for spec in dataclasses.fields(config)])

    return decorate


def with_method_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same with the shared options of FitConfig; register the command with :class:`MethodCommand`."""
    from ulfine_fast.config import FitConfig

    command = with_options_of(FitConfig)(command)
    setattr(command, "command_class", MethodCommand)  # noqa: B010
    return command


def command_options(context: typer.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """The shared options of a call and those of its methods; old names only where they were given."""
    own = {name: value for name, value in context.meta[_VALUES].items() if value is not None}
    return {**options, **own}


def explicit_options(context: typer.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call that were given, on the line, in the environment or in a file; others are defaults."""
    return {
        name: value for name, value in command_options(context, options).items() if _source(context, name) != "DEFAULT"
    }


def options_with_file(context: typer.Context, options: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """The options with those of a flat TOML file instead of defaults; the command line wins.

    Raises:
        InputError: no such file, not TOML, or an option that the method does not read.
    """
    options = command_options(context, options)
    if path is None:
        return options
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.config import FitConfig, read_options

    content = read_options(path)
    direct = {name: value for name, value in options.items() if is_named(context, name)}
    method = {"method": direct["method"]} if "method" in direct else {}
    try:
        config = print_warnings(lambda: FitConfig.from_dict({**content, **method}))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return {**options, **config.to_dict(), **direct}


def is_named(context: typer.Context, name: str) -> bool:
    """Whether a call names the option, on the line or in the environment."""
    return _source(context, name) in ("COMMANDLINE", "ENVIRONMENT")


def with_old_name(name: str, value: Any, old_name: str, old_value: Any) -> Any:
    """The value of an option that had another name in version 0.1, with a warning where the old name was used."""
    if old_value is None:
        return value
    print(f"warning: the option {old_name} is now called {name}; the old name will be refused later", file=sys.stderr)
    return old_value if value is None else value


def print_warnings(build: Callable[[], Any]) -> Any:
    """What `build` returns, its warnings printed as one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        result = build()
    for message in dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, FutureWarning)):
        print(f"warning: {message}", file=sys.stderr)
    return result


class MethodCommand(TyperCommand):
    """A command whose options depend on the methods that the call names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Add the options of the methods, and refuse those of others by name."""
        from ulfine_fast.cache.io.errors import InputError
        from ulfine_fast.config import FitConfig

        try:
            named = _named_methods(ctx, args, self.name)
            methods = named or [FitConfig.method]
            # the default method's options work, and help shows them when the method is named; help of no method
            # need not import one
            ctx.meta[_METHODS] = []
            if named or not {"-h", "--help"} & set(args):
                ctx.meta[_METHODS] = _method_params(methods, self._shared(), hidden=not named)
                self._refuse_unread(ctx, args, named)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own parameters, and the options of the methods before `--help`."""
        params: list[Any] = super().get_params(ctx)
        return [*params[:-1], *ctx.meta.get(_METHODS, ()), *params[-1:]]

    def invoke(self, ctx: Any) -> Any:
        """Run the command; the methods' options reach it through :func:`command_options`."""
        methods = {str(param.name) for param in ctx.meta[_METHODS]}
        ctx.meta[_VALUES] = {name: ctx.params.pop(name) for name in methods}
        return super().invoke(ctx)

    def _shared(self) -> set[str]:
        return {str(param.name) for param in self.params}

    def _refuse_unread(self, ctx: Any, args: list[str], named: list[str]) -> None:
        """Refuse options, of the line or of a file, that exist for other methods only."""
        from ulfine_fast.config import FitConfig

        params = self.get_params(ctx)
        flags = {flag for param in params for flag in (*param.opts, *param.secondary_opts)}
        words = [arg.partition("=")[0] for arg in _before_separator(args) if arg.startswith("--")]
        names = [word[2:].removeprefix("no-").replace("-", "_") for word in words if word not in flags]
        known = {str(param.name) for param in params}
        aliases = {written_name(param) for param in params}
        names += [name for name in ctx.default_map or {} if name not in known | aliases]
        for name in names:
            successor = _successor(named[0] if named else FitConfig.method, name)
            if successor is not None:
                ctx.meta[_METHODS] += [
                    param
                    for param in _method_params([successor], self._shared(), hidden=True, unset=True)
                    if param.name not in {own.name for own in ctx.meta[_METHODS]}
                ]
            elif _readers(name):
                # says who reads it, and which method to name where the call names none
                FitConfig.from_dict({name: None, **({"method": named[0]} if named else {})})


def _named_methods(ctx: Any, args: list[str], command: str | None) -> list[str]:
    """The methods that a call names: on the line, in the environment, in its file, or in the file of all commands."""
    from ulfine_fast.config import read_options

    named: Any = _value_of(args, "--method") or os.environ.get(f"ULFINE_FAST_{str(command).upper()}_METHOD")
    for flag in ("--config", "--space"):
        path = _value_of(args, flag) or os.environ.get(f"ULFINE_FAST_{str(command).upper()}_{flag[2:].upper()}")
        if not named and path and Path(path).is_file():
            named = read_options(Path(path)).get("method")
    named = named or (ctx.default_map or {}).get("method") or []
    return [str(name) for name in named] if isinstance(named, list) else [str(named)]


def _method_params(methods: Iterable[str], taken: set[str], *, hidden: bool = False, unset: bool = False) -> list[Any]:
    """Options of methods as parameters of a command, old names hidden; one name is shown once."""
    from ulfine_fast.config import own_options

    parameters: dict[str, inspect.Parameter] = {}
    for method in methods:
        for name, spec in own_options(method).items():
            if name not in taken:
                panel = f"Options of {method}"
                parameters.setdefault(name, _parameter(spec, panel=panel, hidden=hidden, unset=unset))
            for old in spec.metadata["was"]:
                parameters.setdefault(old, _parameter(spec, name=old, hidden=True, unset=True))

    def command(**options: Any) -> None:
        pass

    app = typer.Typer(add_completion=False)
    app.command()(_with_parameters(command, parameters.values()))
    return [param for param in typer.main.get_command(app).params if param.name in parameters]


def method_option_names() -> set[str]:
    """Names of the options that lie beside some method, old ones included."""
    from ulfine_fast.config import own_options
    from ulfine_fast.methods import registry

    specs = [spec for method in registry.names() for spec in own_options(method).values()]
    return {name for spec in specs for name in (spec.name, *spec.metadata["was"])}


def _readers(name: str) -> list[str]:
    from ulfine_fast.methods import registry

    return registry.readers(name)


def _successor(method: str, name: str) -> str | None:
    """The method that an option turned `method` into in version 0.1, if any."""
    from ulfine_fast.methods import registry

    return next((other for other in _readers(name) if registry.find(other).replaces == method), None)


def _with_parameters(command: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> Callable[..., Any]:
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    both = [*own, *parameters]
    setattr(command, "__signature__", signature.replace(parameters=both))  # noqa: B010
    command.__annotations__ = {one.name: one.annotation for one in both}
    return command


def _parameter(
    spec: dataclasses.Field[Any],
    *,
    name: str | None = None,
    panel: str | None = None,
    hidden: bool = False,
    unset: bool = False,
) -> inspect.Parameter:
    """A keyword parameter with the field's type, default, help and legal values."""
    name = name or spec.name
    dashed = name.replace("_", "-")
    metadata = spec.metadata
    flag = f"--{dashed}/--no-{dashed}" if spec.type == "bool" else f"--{dashed}"
    default, choices = spec.default, metadata["choices"]
    if unset:
        # whether an old name was given must show
        default = None
    # of a tuple that is known when the program runs
    kind: Any = Literal.__getitem__(tuple(choices)) if choices else _TYPES[str(spec.type)]
    option = typer.Option(
        flag,
        help=f"{metadata['help'][:1].upper()}{metadata['help'][1:]}{_range(metadata)}.",
        rich_help_panel=panel or metadata["panel"],
        hidden=hidden,
        show_default=default is not None,
        show_envvar=False,
        metavar=None if spec.type == "bool" else _metavar(spec),
    )
    if unset:
        kind = kind | None
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def written_name(param: Any) -> str:
    """An option of a command as people write it, with underscores."""
    return max(param.opts, key=len).lstrip("-").replace("-", "_")


def _metavar(spec: dataclasses.Field[Any]) -> str:
    """The kind of value in a word."""
    return {"int": "INT", "float": "FLOAT"}.get(str(spec.type).split(" ")[0], "TEXT")


def _range(metadata: Mapping[str, Any]) -> str:
    """The legal values, in words."""
    low, high = metadata["low"], metadata["high"]
    if metadata["choices"]:
        return f": {', '.join(metadata['choices'])}"
    if math.isfinite(low) and math.isfinite(high) and high < 2**31 - 1:
        return f" ({low:g} to {high:g})"
    return f" (at least {low:g})" if math.isfinite(low) and low not in (0, 1) else ""


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def _value_of(args: list[str], flag: str) -> str | None:
    """The value of an option on a line that has not been parsed yet."""
    line = _before_separator(args)
    for position, arg in enumerate(line):
        if arg == flag and position + 1 < len(line):
            return line[position + 1]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
    return None


def _before_separator(args: list[str]) -> list[str]:
    return args[: args.index("--")] if "--" in args else args
