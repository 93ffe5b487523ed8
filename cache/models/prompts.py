"""Texts for the text tower: prompt templates, class names, and the files a user may give for both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.tables import SUFFIXES, read_table

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


def read_class_names(file: Path, classes: Sequence[str]) -> list[str]:
    """The names to use in texts for `classes`, from a file in one of two forms.

    A table (`.csv`, `.tsv` or `.parquet`) with the columns `folder` and `name` gives the name of each class by what the
    source calls it; classes that are not in it, or have an empty name there, keep theirs. Any other file is UTF-8 text
    with one name a line, in the order of the classes.

    Args:
        file: the file.
        classes: what the source calls its classes, in class order.

    Returns:
        K names in class order.

    Raises:
        InputError: the file cannot be read, has another number of names, names an unknown class, or one name twice.
    """
    if file.suffix.lower() in SUFFIXES:
        table = read_table(file, ["folder", "name"], fill=True)
        by_folder = dict(zip(table.texts("folder"), table.texts("name"), strict=True))
        unknown = sorted(set(by_folder) - set(classes))
        if unknown:
            raise InputError(f"{file} names {unknown[0]!r}, which is not a class of the source: {_first(classes)}")
        names = [by_folder.get(name) or name for name in classes]
    else:
        names = [line for _, line in _numbered_lines(file, "class names")]
        if len(names) != len(classes):
            raise InputError(f"{file} has {len(names)} names, the source has {len(classes)} classes: {_first(classes)}")
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise InputError(f"{file} gives the name {name!r} to {times} classes; texts must differ")
    return names


def read_class_names_alone(file: Path) -> list[str]:
    """Class names, one a line, that are the list of classes themselves.

    Raises:
        InputError: the file cannot be read, holds no name, or one name twice.
    """
    names = [line for _, line in _numbered_lines(file, "class names")]
    if not names:
        raise InputError(f"{file} is empty; write one class name a line")
    for name, times in Counter(names).most_common(1):
        if times > 1:
            raise InputError(f"{file} holds the name {name!r} twice; every class needs another name")
    return names


def count_names(file: Path) -> int:
    """How many names a file with one name a line holds; raises InputError if it cannot be read."""
    return len(_numbered_lines(file, "class names"))


def _numbered_lines(file: Path, content: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, each with its number and without the blanks around it.

    Args:
        file: UTF-8, with or without a byte order mark.
        content: what the file holds, for messages.
    """
    try:
        # "-sig" drops the byte order mark that some editors write.
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"the {content} file {file} cannot be read: {reason}") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
