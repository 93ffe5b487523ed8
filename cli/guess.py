"""What a person meant who left out the command, misspelt it, or named a cache where a run belongs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cli.commands import COMMANDS, Command, Group, Takes
from ulfine_fast.cli.content import IN_WORDS, Content, content_of, read_object

PROGRAM = "ulfine-fast"
_MOST_ARGUMENTS = 8  # that are looked at

# what other programs call a command
_OTHER_WORDS = {
    **dict.fromkeys(("train", "learn", "run"), "fit"),
    **dict.fromkeys(("classify", "infer", "inference", "label"), "predict"),
    **dict.fromkeys(("evaluate", "test", "score", "validate"), "eval"),
    **dict.fromkeys(("encode", "embed", "features"), "extract"),
    **dict.fromkeys(("tune", "search", "optimize", "hpo"), "sweep"),
    **dict.fromkeys(("info", "show", "check", "verify"), "inspect"),
    **dict.fromkeys(("annotate", "grid"), "review"),
    **dict.fromkeys(("duplicates", "neighbours", "dedup"), "neighbors"),
    **dict.fromkeys(("upload", "publish"), "push"),
    **dict.fromkeys(("env", "info-env", "diagnose", "status"), "doctor"),
}
_NOT_A_CHOICE = re.compile(r"'([^']*)' is not one of (.*)", re.DOTALL)
# what may be where an argument takes something
_FITS: dict[Takes, tuple[Content, ...]] = {
    "cache": ("cache",),
    "run": ("run",),
    "runs": ("run", "runs", "sweep"),
    "classifier": ("run", "runs", "sweep", "export"),
    "sweep": ("sweep",),
    "export": ("export",),
    "images": ("images", "image", "table"),
    "inputs": ("images", "image", "table", "cache"),
    "table": ("table",),
}
_WANTED: dict[Takes, str] = {
    "cache": "a cache",
    "run": "a run",
    "runs": "a run",
    "classifier": "a run or an exported classifier",
    "sweep": "the folder of a sweep",
    "export": "an exported classifier",
    "images": "images",
    "inputs": "images or a cache",
    "table": "a table",
}


def unknown_command(words: Sequence[str], listed: Mapping[str, Command | Group]) -> str:
    """Why the first of the words is no command, and what was likely meant.

    Args:
        words: of the command line, after the program's name or after that of the group.
        listed: the commands there.
    """
    name, others = words[0], words[1:]
    kind = content_of(Path(name))
    command = next((word for word in others if word in COMMANDS), None)
    if command is not None and not name.startswith("-") and (kind not in ("nothing", "unknown") or "/" in name):
        moved = [command, name, *(word for word in others if word != command)]
        return f"the command comes first; did you mean `{PROGRAM} {shlex.join(moved)}`?"
    if kind in IN_WORDS:
        return f"{name} is {IN_WORDS[kind]}, not a command; {next_command(kind, Path(name))}"
    inner = [
        f"{group} {name}" for group, entry in COMMANDS.items() if isinstance(entry, Group) and name in entry.commands
    ]
    meant = inner or [_OTHER_WORDS[name]] if inner or name in _OTHER_WORDS else []
    if meant and meant[0] not in listed:
        return f"no such command: {name}; did you mean `{PROGRAM} {meant[0]}`?"
    if meant:
        return f"no such command: {name}; did you mean {meant[0]}?"
    if kind == "unknown" or "/" in name:
        where = "there is no such file or folder" if kind == "nothing" else "it is no cache, run or image"
        return f"{name} is not a command, and {where}; `{PROGRAM} --help` lists the commands"
    return f"no such command: {name}{did_you_mean(name, listed, f'`{PROGRAM} --help` lists them')}"


def wrong_argument(name: str, command: Command, arguments: Sequence[str]) -> str | None:
    """Why arguments of a command cannot be what it takes, and what was likely meant; None where they may be.

    Args:
        name: of the command, with that of its group.
        command: its entry in the list.
        arguments: as they are on the command line, without options.
    """
    if not command.takes or "text" in command.takes[:1]:
        return None
    few = arguments[:_MOST_ARGUMENTS]
    takes = [command.takes[min(position, len(command.takes) - 1)] for position in range(len(few))]
    kinds = [content_of(Path(argument)) for argument in few]

    def fits(kind: Content, wanted: Takes) -> bool:
        return wanted == "text" or kind in _FITS[wanted] or kind in ("nothing", "unknown")

    wrong = [position for position in range(len(few)) if not fits(kinds[position], takes[position])]
    if not wrong:
        return None
    line = [PROGRAM, *name.split()]
    if len(few) == 2 and all(kinds[1 - i] in _FITS.get(takes[i], ()) for i in range(2)):
        return f"the arguments of {name} are in another order; did you mean `{shlex.join([*line, few[1], few[0]])}`?"
    path, kind, wanted = Path(few[wrong[0]]), kinds[wrong[0]], takes[wrong[0]]
    advice = next_command(kind, path)
    # the cache that a run was fitted on, and the best run of a sweep
    other = _instead(kind, path, wanted)
    if other is not None:
        meant = [*few[: wrong[0]], other, *few[wrong[0] + 1 :]]
        advice = f"did you mean `{shlex.join([*line, *meant])}`?"
    elif kind == "cache" and name == "export":
        advice = f"to write its features as arrays: {PROGRAM} cache export {shlex.quote(few[0])} --out arrays"
    return f"{path} is {IN_WORDS[kind]}, and {name} takes {_WANTED[wanted]}; {advice}"


def with_near_choice(message: str) -> str:
    """A refusal by the parser of a value that is none of the choices, with the choice that was likely meant."""
    refused = _NOT_A_CHOICE.search(message)
    if refused is None:
        return message
    hint = did_you_mean(refused[1], re.findall(r"'([^']*)'", refused[2]))
    return f"{message.removeprefix('Value error, ').rstrip('.')}{hint}" if hint else message


def examples_in_words(examples: Sequence[str]) -> str | None:
    """The end of a command's help."""
    # Typer keeps an empty line as the end of a line
    return "\n\n".join(["Examples:", *(f"{PROGRAM} {example}" for example in examples)]) if examples else None


def next_command(kind: Content, path: Path) -> str:
    """What is usually done next with such a thing."""
    named = shlex.quote(str(path))
    advice: dict[Content, str] = {
        "cache": f"to train on it: {PROGRAM} fit {named}",
        "run": f"to see it: {PROGRAM} report {named}; to classify images: {PROGRAM} predict {named} IMAGES",
        "runs": f"to compare them: {PROGRAM} report {named}; to classify images: {PROGRAM} predict {named} IMAGES",
        "sweep": f"to see it: {PROGRAM} report {named}",
        "export": f"to classify images: {PROGRAM} predict {named} IMAGES; to send it to a model hub: "
        f"{PROGRAM} push {named} OWNER/NAME",
        "images": f"to make a cache of them: {PROGRAM} extract {named} --out cache",
        "image": f"to classify it: {PROGRAM} predict RUN {named}",
        "table": f"if it lists images: {PROGRAM} extract {named} --out cache",
    }
    return advice[kind]


def _instead(kind: Content, path: Path, wanted: Takes) -> str | None:
    """Something beside the path, or named in it, that is what the argument takes; None where there is nothing."""
    candidates: list[Path] = []
    if kind in ("run", "runs") and wanted == "cache":
        runs = [path, *sorted(path.glob("seed-*"))]
        candidates = [
            Path(named) for run in runs if isinstance(named := read_object(run / "config.json").get("cache"), str)
        ]
    if kind == "runs" and wanted == "run":
        candidates = sorted(path.glob("seed-*"))
    if kind == "sweep" and wanted in ("run", "runs", "classifier"):
        candidates = [path / "best-1", *sorted((path / "best-1").glob("seed-*"))]
    if kind == "run" and wanted == "sweep":
        candidates = [*path.parents][:2]
    return next((_short(one) for one in candidates if content_of(one) in _FITS[wanted]), None)


def _short(path: Path) -> str:
    """The path from the current folder where it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
