"""`ulfine-fast --config FILE COMMAND`: options from a TOML file; `--print-config`: what a command would run with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ulfine_fast.cli.options import MethodCommand, method_option_names, written_name


def defaults_from(path: Path, commands: Any) -> dict[str, Any]:
    """Reads a file of options: a table for each command, `[fit]` with `lr = 0.1`; `[cache.merge]` for one inside.

    Args:
        path: the file.
        commands: the program's group of commands, as Typer holds it.

    Returns:
        Values as click takes them for its own defaults: command -> parameter -> value.

    Raises:
        InputError: no such file, not TOML, no such command or option.
    """
    from ulfine_fast.cache.io.toml import read_toml

    return _checked(read_toml(path), commands, path, "")


def printed(context: Any) -> str:
    """The options that a command was called with, as TOML that `--config` takes; the context is Typer's."""
    names = []
    inner: Any = context
    while inner is not None and inner.parent is not None:
        names.append(str(inner.info_name))
        inner = inner.parent
    known = _options(context.command, context)
    values = {name: context.params[parameter] for name, parameter in known.items()}
    rows = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    return "\n".join([f"[{'.'.join(reversed(names))}]", *rows])


def _checked(content: dict[str, Any], group: Any, path: Path, where: str) -> dict[str, Any]:
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.io.names import did_you_mean

    checked: dict[str, Any] = {}
    for name, values in content.items():
        command = group.commands.get(name)
        if command is None or not isinstance(values, dict):
            known = ", ".join(f"[{where}{one}]" for one in group.commands)
            hint = "" if command is not None else did_you_mean(name, group.commands)
            raise InputError(f"{path} says {where}{name}, and options stand under their command: {known}{hint}")
        if hasattr(command, "commands"):
            checked[name] = _checked(values, command, path, f"{name}.")
        else:
            checked[name] = {_option(one, command, path): value for one, value in values.items()}
    return checked


def _option(name: str, command: Any, path: Path) -> str:
    """The parameter that a name in the file means; dashes are underscores."""
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.io.names import did_you_mean

    own = _options(command)
    wanted = name.replace("-", "_")
    if wanted not in own and isinstance(command, MethodCommand) and wanted in method_option_names():
        # which method reads it is known when the command line is
        return wanted
    if wanted not in own:
        hint = did_you_mean(wanted, own, f"`ulfine-fast {command.name} --help` lists them")
        raise InputError(f"{path} sets {name}, which {command.name} has no option for{hint}")
    return own[wanted]


def _options(command: Any, context: Any = None) -> dict[str, str]:
    """A command's options as people write them, with underscores, and the parameters that they are."""
    params = command.params if context is None else command.get_params(context)
    options = [one for one in params if one.param_type_name == "option" and one.name != "help"]
    return {written_name(one): str(one.name) for one in options}


def _toml(value: Any) -> str:
    """A value in TOML, whose texts and lists are JSON's."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (bool, int, float, str)):
        return json.dumps(value)
    return json.dumps(str(value))
