"""Labels as sources write them: what counts as unknown, which classes they name, and their indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.tables import cell_text, whole_number
from ulfine_fast.cache.models.prompts import read_class_names_alone
from ulfine_fast.cache.sources.rows import UNKNOWN

# Columns of labels in parquet files and Hugging Face data sets, the surest first.
LABEL_COLUMNS = ("label", "class", "cls", "fine_label")
# More classes than any prompt list has; larger numbers count something else, such as the images.
_MAX_CLASSES = 1_000_000


class Labels:
    """Class indices of labels as they are written in samples.

    Args:
        names: (K,) class names in order; without any, every label is unknown.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._count = len(names)
        self._indices = {name: index for index, name in enumerate(names)}

    def index(self, value: Any, where: str) -> int:
        """The class index of a name or a number; -1 for no value, an empty text, and -1.

        Args:
            value: a text, a number, bytes of UTF-8, None or NaN.
            where: the sample's position, for messages.

        Raises:
            InputError: no such class.
        """
        text = cell_text(value).strip()
        if not text or not self._count:
            return UNKNOWN
        if text in self._indices:
            return self._indices[text]
        number = whole_number(text)
        if number is None or not UNKNOWN <= number < self._count:
            raise InputError(f"{where}: the label {text!r} is no class; there are {self._count} in the list of names")
        return number


def class_names_from(labels: Iterable[Any], where: str) -> list[str]:
    """Class names from the labels that occur: texts in their order, or all numbers up to the largest.

    Args:
        labels: as in `Labels.index`.
        where: the source, for messages.

    Raises:
        InputError: every label is unknown, or numbers too large for classes.
    """
    texts = {text for label in labels if (text := cell_text(label).strip()) and whole_number(text) != UNKNOWN}
    numbers = [number for text in texts if (number := whole_number(text)) is not None]
    if len(numbers) < len(texts):
        return sorted(texts)
    if max(numbers, default=UNKNOWN) < 0:
        raise InputError(f"{where} has no label in any row; give class names with --class-names FILE")
    if max(numbers) >= _MAX_CLASSES:
        raise InputError(f"{where} has the label {max(numbers)}, too large for a class; give names with --class-names")
    return [str(number) for number in range(max(numbers) + 1)]


def read_needed_class_names(class_names_file: Path | None, source: str) -> list[str]:
    """Class names from the user's file, one a line, in the order of the class indices.

    Args:
        class_names_file: the file.
        source: what has no class names of its own, for messages.

    Raises:
        InputError: there is no file, and a stream cannot be searched for its classes.
    """
    if class_names_file is None:
        raise InputError(f"{source} does not say its classes; give them with --class-names FILE, one name a line")
    return read_class_names_alone(class_names_file)
