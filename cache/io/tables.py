"""The one reader of tables that a user hands in: .csv, .tsv, .parquet and data frames."""

from __future__ import annotations

import csv
import difflib
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import opened_regular_file, read_regular_file

# Arrow takes a tenth of a second to import, and a .csv does not need it.
if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".tsv", ".parquet")
_WHOLE = re.compile(r"(-?\d+)(?:\.0*)?", re.ASCII)
# Names as close as "lable" and "label" look alike, of at least so many letters: most words are close to "id".
_CLOSE = 0.8
_SHORTEST = 4

_MAX_BYTES = 8 << 30  # of a text table, a hundred million lines

Others = Literal["ignore", "keep", "refuse"]


@dataclass(frozen=True)
class Table:
    """Rows of a table.

    Attributes:
        source: the file's path, for messages.
        names: column names in the order of the file, without blanks around them.
        columns: the cells of each column; texts from a .csv or .tsv, Python values from a .parquet.
        lines: where each row is: its line in the file, or its number from 1 where there are no lines.
        unit: what `lines` counts, "line" or "row".
    """

    source: str
    names: list[str]
    columns: list[list[Any]]
    lines: Sequence[int]
    unit: str

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lines)

    def where(self, row: int) -> str:
        """The position of a row, for messages: "line 7 of labels.csv"."""
        return f"{self.unit} {self.lines[row]} of {self.source}"

    def cells(self, name: str) -> list[Any]:
        """Cells of a column as they are in the file; all None where the table has no such column."""
        return self.columns[self.names.index(name)] if name in self.names else [None] * len(self)

    def texts(self, name: str, *, strip: bool = True) -> list[str]:
        """Cells of a column as texts; empty where there is no value or no such column.

        Args:
            name: of the column.
            strip: whether to remove blanks around each text. Ids keep theirs: a file name may begin with one.
        """
        texts = [cell_text(value) for value in self.cells(name)]
        return [text.strip() for text in texts] if strip else texts

    def labels(self, name: str) -> list[str]:
        """Cells of a column of labels as texts; an empty one and -1 mean unknown, which is "".

        Where all labels are whole numbers, 3.0 is 3: tables with missing numbers hold floats.
        """
        labels = ["" if whole_number(text) == -1 else label_key(text) for text in self.texts(name)]
        if all(whole_number(label) is not None for label in labels if label):
            return [label.partition(".")[0] for label in labels]
        return labels


def read_table(
    path: Path,
    needed: Sequence[str],
    optional: Sequence[str] = (),
    *,
    others: Others = "ignore",
    fill: bool = False,
    form: str | None = None,
) -> Table:
    """Reads a table: .parquet, .tsv with tabs, any other file with commas; texts are UTF-8.

    Blank lines are ignored, and so are a byte order mark and blanks around column names.

    Args:
        path: the file.
        needed: columns that must be there.
        optional: columns that may be there.
        others: what to do with further columns.
        fill: whether a line may leave out cells at its end, which are then empty.
        form: the columns in words, for messages; by default the needed and the optional ones.

    Raises:
        InputError: no such file, not a table, a needed column missing or a known one there twice, a column that looks
            like a known one that is not there, or a line with too many or too few cells; names the line.
    """
    form = form or _in_words(needed, optional)
    try:
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path, needed, optional, others, form)
        return _read_text(path, needed, optional, others, fill, form)
    except FileNotFoundError as error:
        raise InputError(f"no such table: {path}; name a {', '.join(SUFFIXES)} file with {form}") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error}); name a table with {form}") from error


def read_frame(frame: Any, needed: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """A data frame of pandas, Polars or anything else that Arrow can take.

    Raises:
        InputError: not a data frame, or see `read_table`.
    """
    import pyarrow as pa

    form = _in_words(needed, optional)
    try:
        table = pa.table(frame)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(f"expected a path or a data frame with {form}, got {type(frame)}") from error
    names = [name.strip() for name in table.column_names]
    kept = _select("the data frame", names, needed, optional, "ignore", form)
    return _from_arrow("the data frame", names, kept, table.select(kept))


def find_column(source: str, names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted columns that is there; None where there is none of them.

    Raises:
        InputError: there is none of them, but a column that looks like one; names it.
    """
    for name in wanted:
        if name in names:
            return name
    folded = {other.casefold(): other for other in names}
    for name in wanted:
        cutoff = _CLOSE if len(name) >= _SHORTEST else 1.0
        for close in difflib.get_close_matches(name, folded, n=1, cutoff=cutoff):
            other = folded[close]
            raise InputError(
                f"{source} has a column {other!r}, which looks like {name} but is not; rename it to {name}, or to "
                "something else if it is not meant"
            )
    return None


def cell_text(value: Any) -> str:
    """A cell as text: 3.0 is "3", since tables with missing numbers hold floats; None and NaN are ""."""
    # NaN is the one value that differs from itself.
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def whole_number(text: str) -> int | None:
    """The number that "3", "3.0" or "003" says; None for any other text."""
    match = _WHOLE.fullmatch(text.strip())
    return None if match is None else int(match[1])


def label_key(text: str) -> str:
    """A label or class name as it is compared and stored: in Unicode's form NFC, without blanks around it.

    Programs write "é" as one character (NFC) or as a letter and an accent (NFD, as file names of macOS).
    """
    return unicodedata.normalize("NFC", text).strip()


def label_text(text: str) -> str:
    """A single label as text: "3.0" is "3" and "-1", which means unknown, is ""; see `Table.labels` for a column."""
    number = whole_number(text)
    if number is None:
        return label_key(text)
    return "" if number == -1 else str(number)


def delimiter(path: Path) -> str:
    """What separates the cells of a text table: a tab in .tsv, else a comma."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _read_text(
    path: Path, needed: Sequence[str], optional: Sequence[str], others: Others, fill: bool, form: str
) -> Table:
    source, data = str(path), read_regular_file(path, _MAX_BYTES)
    try:
        # "-sig" drops the byte order mark that spreadsheet programs put before the first name.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {line} of {source} is not UTF-8 text; save the file as UTF-8") from error

    # The header
    lines = _numbered_lines(source, text, delimiter(path))
    _, header = next(lines, (0, []))
    names = [name.strip() for name in header]
    kept = _select(source, names, needed, optional, others, form)

    # The rows
    rows, numbers = [], []
    for number, row in lines:
        while len(row) > len(names) and not row[-1].strip():
            row.pop()
        if fill:
            row += [""] * (len(names) - len(row))
        if len(row) != len(names):
            raise InputError(
                f"line {number} of {source} has {len(row)} cells instead of {len(names)}; fix or remove it"
            )
        rows.append([row[column] for column in kept])
        numbers.append(number)
    columns = [list(cells) for cells in zip(*rows, strict=True)] or [[] for _ in kept]
    return Table(source, [names[column] for column in kept], columns, numbers, "line")


def _numbered_lines(source: str, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank, each with its number; a cell may span several, the last of which counts."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"line {reader.line_num} of {source} cannot be read: {error}; fix or remove it") from error


def _read_parquet(path: Path, needed: Sequence[str], optional: Sequence[str], others: Others, form: str) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with opened_regular_file(path) as opened, parquet.ParquetFile(opened) as file:
            stored = file.schema_arrow.names
            names = [name.strip() for name in stored]
            kept = _select(str(path), names, needed, optional, others, form)
            # Only the columns used: a table may hold embeddings or the images themselves beside them.
            content = file.read() if others == "keep" else file.read(columns=[stored[column] for column in kept])
    except InputError:
        raise
    # A ValueError is a name that is not UTF-8, in a damaged file.
    except (pa.ArrowException, OSError, ValueError) as error:
        # An error of the file system has a number; without one, Arrow itself could not read the content.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from error
    if others != "keep":
        content = content.select([stored[column] for column in kept])
    return _from_arrow(str(path), names, kept, content)


def _from_arrow(source: str, names: Sequence[str], kept: Sequence[int], content: pa.Table) -> Table:
    columns = []
    for column in content.columns:
        try:
            columns.append(column.to_pylist())
        # Text that is not UTF-8, in a damaged file, or a date that Python does not have.
        except (ValueError, OverflowError) as error:
            name = names[kept[len(columns)]]
            raise InputError(
                f"the column {name} of {source} cannot be read ({error}); write the table again"
            ) from error
    return Table(source, [names[column] for column in kept], columns, range(1, content.num_rows + 1), "row")


def _select(
    source: str, names: Sequence[str], needed: Sequence[str], optional: Sequence[str], others: Others, form: str
) -> list[int]:
    """Indices of the columns to keep; refuses names that do not fit."""
    known = [*needed, *optional]
    for name in known:
        if names.count(name) > 1:
            raise InputError(f"{source} has {names.count(name)} columns named {name}; keep one")
        find_column(source, names, [name])
    unknown = [name for name in names if name not in known]
    if any(name not in names for name in needed) or (others == "refuse" and unknown):
        raise InputError(f"{source} must have {form}, got {', '.join(names) or 'none'}")
    return [column for column, name in enumerate(names) if name in known or others == "keep"]


def _in_words(needed: Sequence[str], optional: Sequence[str]) -> str:
    """Such as "the columns id and label"."""
    words = f"the column{'s' * (len(needed) > 1)} {' and '.join(needed)}"
    return f"{words} (and {', '.join(optional)} where there are any)" if optional else words
