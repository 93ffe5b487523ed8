"""Texts for the text tower: prompt templates, class names, and the files a user may give for both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import read_regular_file
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.io.tables import SUFFIXES, label_key, read_table, whole_number

# The plain prompt of the literature, and the seven that CLIP's authors found best for ImageNet by forward selection
# (openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb).
DEFAULT_PROMPTS: tuple[str, ...] = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

_MAX_BYTES = 256 << 20  # of a file of names or prompts

TABLE_FIX = "say what is what with a table of the columns folder (the label as it is written) and name"


def readable(class_name: str) -> str:
    """A folder's name as words: "ankle_boot" becomes "ankle boot"; hyphens and slashes stay."""
    return " ".join(class_name.replace("_", " ").split())


def fill_prompts(class_names: Sequence[str], prompts: Sequence[str]) -> list[list[str]]:
    """Every class in every prompt: K lists of P texts. Only `{}` is replaced, other braces stay as they are."""
    # Not str.format: a prompt with other braces must neither fail nor reach into objects.
    return [[prompt.replace("{}", readable(name)) for prompt in prompts] for name in class_names]


def read_prompts(file: Path) -> list[str]:
    """Prompts from a UTF-8 text file, one a line with `{}` where the class goes; empty lines and `#` lines are skipped.

    Raises:
        InputError: the file cannot be read, holds no prompt, or a line lacks `{}`.
    """
    lines = [(number, line) for number, line in _numbered_lines(file, "prompts") if not line.startswith("#")]
    for number, line in lines:
        if "{}" not in line:
            raise InputError(f"{file}, line {number}: {line!r} has no {{}} where the class name goes")
    if not lines:
        raise InputError(f"{file} holds no prompt; write one a line, such as: a photo of a {{}}.")
    return [line for _, line in lines]


@dataclass(frozen=True)
class ClassNames:
    """What a file of class names means for a source.

    Attributes:
        names: (K,) names for the text tower, in class order.
        indices: class index of each class of the source, in the source's order.
        note: one line that says how the file was understood; None where nothing was guessed.
    """

    names: list[str]
    indices: list[int]
    note: str | None = None


def match_class_names(file: Path, classes: Sequence[str], *, ordered: bool = False) -> ClassNames:
    """The names to use in texts for `classes`, from a file in one of two forms.

    A table (`.csv`, `.tsv` or `.parquet`) with the columns `folder` and `name` gives the name of each class by what the
    source calls it; classes that are not in it, or have an empty name there, keep theirs. Any other file is UTF-8 text
    with one name a line. Where it holds every class, it orders the classes. Where the classes are whole numbers below
    the number of lines, they are indices into it. Otherwise it renames the classes in their order, and must have as
    many lines. Names are compared in Unicode's form NFC and without blanks around them.

    Args:
        file: the file.
        classes: what the source calls its classes, in class order.
        ordered: whether the order of the classes is the source's own, so that numbers are names and no indices.

    Raises:
        InputError: the file cannot be read, has another number of names, names an unknown class, has one name twice, or
            can be understood in two ways.
    """
    keys = [label_key(name) for name in classes]
    if file.suffix.lower() in SUFFIXES:
        by_folder = _names_by_folder(file)
        unknown = sorted(set(by_folder) - set(keys))
        if unknown:
            hint = did_you_mean(unknown[0], classes)
            raise InputError(
                f"{file} names {unknown[0]!r}, which is not a class of the source: {_first(classes)}{hint}"
            )
        renamed = [by_folder.get(key) or key for key in keys]
        for name, times in Counter(renamed).most_common(1):
            if times > 1:
                raise InputError(f"{file} gives the name {name!r} to {times} classes; texts must differ")
        return ClassNames(renamed, list(range(len(classes))))

    # By name, where the file holds every class; by number, where the classes count its lines
    names = read_class_names_alone(file)
    index = {name: number for number, name in enumerate(names)}
    by_name = [index[key] for key in keys] if all(key in index for key in keys) else None
    numbers = [whole_number(key) for key in keys]
    by_number = [number for number in numbers if number is not None and 0 <= number < len(names)]
    if ordered or len(by_number) < len(keys):
        by_number = []
    if by_name is not None:
        if by_number and by_number != by_name:
            class_ = next(key for key, one, two in zip(keys, by_name, by_number, strict=True) if one != two)
            raise InputError(_two_meanings(str(file), class_, names))
        return ClassNames(names, by_name)
    if by_number:
        pairs = [f"{key} is {names[number]}" for key, number in zip(keys, by_number, strict=True)]
        return ClassNames(names, by_number, f"labels are taken as line numbers of {file}, from 0: {_first(pairs)}")

    # Renamed in their order
    if len(names) != len(classes):
        missing = next((key for key in keys if key not in index), None)
        if missing is not None and any(key in index for key in keys):
            raise InputError(f"the label {missing!r} is no class of {file}, which has {len(names)} names; add it there")
        raise InputError(f"{file} has {len(names)} names, the source has {len(classes)} classes: {_first(classes)}")
    for number, key in enumerate(keys):
        if index.get(key, number) != number:
            raise InputError(
                f"{file} holds the class {key!r} at another place than the source but not all its classes, so that it "
                f"neither orders nor renames them ({_first(classes)}); {TABLE_FIX}"
            )
    pairs = [f"{key} is {name}" for key, name in zip(keys, names, strict=True) if key != name]
    return ClassNames(names, list(range(len(names))), f"{file} renames the classes in their order: {_first(pairs)}")


def read_label_names(file: Path) -> tuple[list[str], dict[str, int] | None]:
    """Class names, and how labels are written, of a source that cannot be searched for its classes.

    A table with the columns `folder` and `name` says how the labels of a class are written, and its name; its lines are
    the classes in their order. Any other file is text with one name a line.

    Returns:
        (K,) names in class order; class index by written label, None where the file does not say it.

    Raises:
        InputError: see `read_class_names_alone`.
    """
    if file.suffix.lower() not in SUFFIXES:
        return read_class_names_alone(file), None
    by_folder = _names_by_folder(file)
    names = [name or written for written, name in by_folder.items()]
    _refuse_bad_names(file, names)
    return names, {written: index for index, written in enumerate(by_folder)}


def refuse_two_meanings(source: str, text: str, names: Sequence[str]) -> None:
    """Refuses a label that is the name of one class and the index of another.

    Args:
        source: where the label is, for messages.
        text: the label.
        names: (K,) class names in order.

    Raises:
        InputError: it is; says how to tell.
    """
    number = whole_number(text)
    if text in names and number is not None and 0 <= number < len(names) and names[number] != text:
        raise InputError(_two_meanings(source, text, names))


def _two_meanings(source: str, text: str, names: Sequence[str]) -> str:
    number = whole_number(text)
    assert number is not None
    return (
        f"{source}: the label {text!r} is the name of class {list(names).index(text)} and the index of class {number}, "
        f"which is {names[number]!r}; {TABLE_FIX}"
    )


def _names_by_folder(file: Path) -> dict[str, str]:
    """Names by what a source calls its classes, from a table; refuses a class that is there twice."""
    table = read_table(file, ["folder", "name"], fill=True)
    folders = [label_key(text) for text in table.texts("folder")]
    for folder, times in Counter(folders).most_common(1):
        if times > 1:
            raise InputError(f"{file} names the class {folder!r} {times} times; keep one line")
    return dict(zip(folders, map(label_key, table.texts("name")), strict=True))


def read_class_names_alone(file: Path) -> list[str]:
    """Class names, one a line, that are the list of classes themselves.

    Raises:
        InputError: the file cannot be read, holds no name, or one name twice.
    """
    names = [label_key(line) for _, line in _numbered_lines(file, "class names")]
    _refuse_bad_names(file, names)
    return names


def _refuse_bad_names(file: Path, names: Sequence[str]) -> None:
    if not names:
        raise InputError(f"{file} is empty; write one class name a line")
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise InputError(f"{file} holds the name {name!r} twice; every class needs another name")


def _numbered_lines(file: Path, content: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, each with its number and without the blanks around it.

    Args:
        file: UTF-8, with or without a byte order mark.
        content: what the file holds, for messages.
    """
    try:
        # "-sig" drops the byte order mark that some editors write.
        text = read_regular_file(file, _MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"the {content} file {file} cannot be read: {reason}") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _first(names: Sequence[str], most: int = 5) -> str:
    clipped = [name if len(name) <= 80 else f"{name[:77]}..." for name in names[:most]]
    return ", ".join(clipped) + (", ..." if len(names) > most else "")
