"""Labels as sources write them: what counts as unknown, which classes they name, and their indices."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.io.tables import cell_text, find_column, label_key, whole_number
from ulfine_fast.cache.models.prompts import (
    TABLE_FIX,
    ClassNames,
    match_class_names,
    read_label_names,
    refuse_two_meanings,
)
from ulfine_fast.cache.sources.rows import UNKNOWN

# Columns of labels in parquet files and Hugging Face data sets, the surest first.
LABEL_COLUMNS = ("label", "class", "cls", "fine_label")
# Columns of images, where there are several.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "tif", "tiff")
# More classes than any prompt list has; larger numbers count something else, such as the images.
_MAX_CLASSES = 1_000_000
# What programs write where there is no value.
_MISSING = {"nan", "na", "n/a", "<na>", "none", "null", "nat", "unknown", "?"}


class Labels:
    """Class indices of labels as they are written in samples.

    Args:
        names: (K,) class names in order; without any, every label is unknown.
        written: class index by label, where it is known how labels are written; a label is then nothing else.
        order: class index of each index that the source writes, where its order is another; by default the same.
    """

    def __init__(
        self, names: Sequence[str], *, written: Mapping[str, int] | None = None, order: Sequence[int] | None = None
    ) -> None:
        self._names = [label_key(name) for name in names]
        self._written = written
        self._order = range(len(names)) if order is None else order
        self._indices = {name: index for index, name in enumerate(self._names)}
        # What texts of numbers were so far, each with the first of them.
        self._meanings: dict[str, str] = {}

    def index(self, value: Any, where: str) -> int:
        """The class index of a name or a number; -1 for no value, an empty text, and -1.

        A number is an index. A text is a name, or an index that is written as text.

        Args:
            value: a text, a number, bytes of UTF-8, None or NaN.
            where: the sample's position, for messages.

        Raises:
            InputError: no such class, or a text that is the name of one class and the index of another.
        """
        text = label_key(cell_text(value))
        number = whole_number(text)
        if not text or not self._names or number == UNKNOWN:
            return UNKNOWN
        if self._written is not None:
            index = self._written.get(text, self._written.get(str(number)))
            if index is not None:
                return index
        elif text in self._indices and not isinstance(value, numbers.Number):
            refuse_two_meanings(where, text, self._names)
            if number is not None and number != self._indices[text]:
                self._refuse_mixture(where, "name", text)
            return self._indices[text]
        elif number is not None and 0 <= number < len(self._order):
            if not isinstance(value, numbers.Number):
                self._refuse_mixture(where, "index", text)
            return self._order[number]
        count = len(self._names)
        raise InputError(
            f"{where}: the label {text!r} is no class; there are {count} in the list of names"
            f"{did_you_mean(text, self._names)}"
        )

    def _refuse_mixture(self, where: str, meaning: str, text: str) -> None:
        """Refuses texts of numbers of which some can be names alone, and others indices alone."""
        self._meanings.setdefault(meaning, text)
        if len(self._meanings) > 1:
            raise InputError(
                f"{where}: of the labels {self._meanings['name']!r} is a class name, and {self._meanings['index']!r} "
                f"is an index; {TABLE_FIX}"
            )


def class_names_from(labels: Iterable[Any], where: str, *, occurring: bool = False) -> list[str]:
    """Class names from the labels that occur: texts in their order, or all numbers up to the largest.

    Args:
        labels: as in `Labels.index`.
        where: the source, for messages.
        occurring: whether to leave out numbers that do not occur.

    Raises:
        InputError: every label is unknown, or numbers too large for classes.
    """
    texts = {text for label in labels if (text := label_key(cell_text(label))) and whole_number(text) != UNKNOWN}
    indices = {number for text in texts if (number := whole_number(text)) is not None}
    if any(whole_number(text) is None for text in texts):
        return sorted(texts)
    if max(indices, default=UNKNOWN) < 0:
        raise InputError(f"{where} has no label in any row; give class names with --class-names FILE")
    if max(indices) >= _MAX_CLASSES:
        raise InputError(f"{where} has the label {max(indices)}, too large for a class; give names with --class-names")
    return [str(number) for number in (sorted(indices) if occurring else range(max(indices) + 1))]


def choose_column(source: str, columns: Sequence[str], preferred: Sequence[str], content: str, notes: list[str]) -> str:
    """One of several columns: the first that is preferred, else the first; adds a note where there was a choice.

    Args:
        source: file or data set, for messages.
        columns: that may be meant, at least one.
        preferred: names, the surest first.
        content: what the columns hold, for the note.
        notes: of the source.
    """
    chosen = next((name for name in preferred if name in columns), columns[0])
    if len(columns) > 1:
        others = ", ".join(name for name in columns if name != chosen)
        notes.append(f"the {content} of {source} are taken from the column {chosen}, not from {others}")
    return chosen


def find_label_column(source: str, columns: Sequence[str], notes: list[str]) -> str | None:
    """The column of labels; adds a note where there are several, and raises InputError where one only looks so."""
    present = [name for name in LABEL_COLUMNS if name in columns]
    return (
        choose_column(source, present, (), "labels", notes) if present else find_column(source, columns, LABEL_COLUMNS)
    )


def needed_labels(class_names_file: Path | None, source: str) -> tuple[list[str], Labels]:
    """Class names and labels from the user's file, in the order of the class indices.

    Args:
        class_names_file: the file; see `read_label_names`.
        source: what has no class names of its own, for messages.

    Raises:
        InputError: there is no file, and a stream cannot be searched for its classes.
    """
    if class_names_file is None:
        raise InputError(f"{source} does not say its classes; give them with --class-names FILE, one name a line")
    names, written = read_label_names(class_names_file)
    return names, Labels(names, written=written)


def labels_of_column(
    where: str, declared: Sequence[str], occurring: Callable[[], Iterable[Any]], class_names_file: Path | None
) -> tuple[list[str], Labels, list[str]]:
    """Class names of a column of labels, those of the user's file instead; its labels; notes.

    Args:
        where: the source, for messages.
        declared: class names in the order of the column's indices; empty where the source does not say them.
        occurring: returns the labels that occur, as in `Labels.index`; called where none are declared.
        class_names_file: the user's file; see `match_class_names`.

    Raises:
        InputError: see `class_names_from` and `match_class_names`.
    """
    if declared:
        classes, _ = name_classes(declared, class_names_file, ordered=True)
        labels = Labels(classes.names, order=classes.indices)
        notes = []
    else:
        names = class_names_from(occurring(), where, occurring=class_names_file is not None)
        classes, written = name_classes(names, class_names_file)
        labels = Labels(classes.names, written=written)
        notes = suspicious_labels(names)
    return classes.names, labels, notes + ([classes.note] if classes.note else [])


def name_classes(
    labels: Sequence[str], class_names_file: Path | None, *, ordered: bool = False
) -> tuple[ClassNames, dict[str, int]]:
    """Class names of a source that knows all its labels, and the class index of each label.

    Args:
        labels: that occur, in class order.
        class_names_file: the user's file; see `match_class_names`.
        ordered: whether the order is the source's own.
    """
    keys = [label_key(label) for label in labels]
    if class_names_file is None:
        matched = ClassNames(keys, list(range(len(keys))))
    else:
        matched = match_class_names(class_names_file, keys, ordered=ordered)
    return matched, dict(zip(keys, matched.indices, strict=True))


def suspicious_labels(labels: Iterable[str]) -> list[str]:
    """A note where a class is called like a missing value; see `Source.notes`."""
    return [
        f"the label {label!r} is taken as a class; leave the cell empty where it means that the class is not known"
        for label in sorted({label for label in labels if label.lower() in _MISSING})
    ]
