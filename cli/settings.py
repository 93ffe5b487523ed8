"""The options of `fit`, made from FitConfig's fields, so that no hyper-parameter is written down twice."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ulfine_fast.config import FitConfig

_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "int | None": int | None}


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command whose last parameter is `**settings` one option per field of FitConfig."""
    return with_settings_of(FitConfig)(command)


def with_settings_of(config: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same for another dataclass of settings."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_parameter(spec) for spec in dataclasses.fields(config)]
        setattr(command, "__signature__", signature.replace(parameters=[*own, *made]))  # noqa: B010
        command.__annotations__ = {p.name: p.annotation for p in [*own, *made]}
        return command

    return give


def given_settings(context: typer.Context, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that stand on the command line; the others are defaults."""
    return {name: value for name, value in settings.items() if _given(context, name)}


def settings_with_file(context: typer.Context, settings: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """The settings with those of a TOML file in place of defaults; the command line wins.

    Raises:
        InputError: no such file, not TOML, or a name that is no setting.
    """
    if path is None:
        return settings
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.io.toml import read_toml

    found = read_toml(path)
    try:
        config = FitConfig.from_dict(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    named = {name: getattr(config, name) for name in found}
    return {**settings, **named, **given_settings(context, settings)}


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _parameter(spec: dataclasses.Field[Any]) -> inspect.Parameter:
    """A keyword parameter with the field's type, default and help."""
    dashed = spec.name.replace("_", "-")
    flag = f"--{dashed}/--no-{dashed}" if spec.type == "bool" else f"--{dashed}"
    option = typer.Option(flag, help=f"{spec.metadata['help']}{_legal(spec)}", rich_help_panel="Settings")
    kind: Any = _TYPES[str(spec.type)]
    annotation = Annotated[kind, option]
    return inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=spec.default, annotation=annotation)


def _legal(spec: dataclasses.Field[Any]) -> str:
    """The legal values, in words."""
    low, high = spec.metadata["low"], spec.metadata["high"]
    if spec.metadata["choices"]:
        return f" ({', '.join(spec.metadata['choices'])})"
    if math.isfinite(low) and math.isfinite(high) and high < 2**31 - 1:
        return f" ({low:g} to {high:g})"
    return f" (at least {low:g})" if math.isfinite(low) else ""
