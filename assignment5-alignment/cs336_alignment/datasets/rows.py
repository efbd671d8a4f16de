"""Rows of a data file. Each knows its position, so that an error message can say where the mistake is."""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row of a file: its fields by name."""

    path: Path
    number: int
    """Its line number, or its position in a JSON list, counted from 1."""
    fields: Mapping[str, Any]
    counted_in: str = "line"

    @property
    def place(self) -> str:
        """Position of the row, for error messages."""
        return f"{self.path}, {self.counted_in} {self.number}"

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def text(self, name: str, may_be_empty: bool = False) -> str:
        """Return the string in a field.

        Raises:
            ValueError: the field is missing, is not a string, or is blank where it must not be.
        """
        value = self._present(name)
        if not isinstance(value, str):
            raise self.wrong(name, f"is {_shown(value)}, but must be a string")
        if not may_be_empty and not value.strip():
            raise self.wrong(name, "is empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(name, "holds half of a surrogate pair, which is not a character") from None
        return value

    def number_text(self, name: str) -> str:
        """Return the number in a field in its shortest form: `145.0` and `"145.0"` become `145`.

        Raises:
            ValueError: the field is missing or holds no finite number.
        """
        value = self._present(name)
        try:
            if isinstance(value, bool) or not math.isfinite(number := float(value)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise self.wrong(name, f"is {_shown(value)}, but must be a number") from None
        return str(int(number)) if number.is_integer() else repr(number)

    def wrong(self, name: str, problem: str) -> ValueError:
        """Make the error for a field with a problem."""
        return ValueError(f"{self.place}: field {name!r} {problem}")

    def _present(self, name: str) -> Any:
        if name not in self:
            raise self.wrong(name, f"is missing; the row has {', '.join(map(str, self.fields)) or 'none'}")
        return self.fields[name]


def read_json_rows(path: Path) -> list[Row]:
    """Read a file of JSON lines, or with one JSON list of objects, which may be gzipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, or has no rows.
    """
    lines = [(number, line) for number, line in _numbered_lines(path) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("["):
        unit = "row"
        values = list(enumerate(_parse("".join(line for _, line in lines), str(path)), start=1))
    else:
        unit = "line"
        values = [(number, _parse(line.rstrip(), f"{path}, line {number}")) for number, line in lines]
    for number, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{path}, {unit} {number}: {_shown(value)} is not a JSON object with named fields")
    return _some([Row(path, number, fields, unit) for number, fields in values], path)


def read_csv_rows(path: Path, header: list[str] | None = None) -> list[Row]:
    """Read a CSV file, which may be gzipped.

    Args:
        path: the file.
        header: names of the columns. Default: the first line of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, or has no rows.
    """
    reader = csv.reader((line for _, line in _numbered_lines(path)), strict=True)
    rows = []
    number = 1
    try:
        for cells in reader:
            if header is None:
                header = cells
            elif cells:
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path}, line {number}: {len(cells)} columns, "
                        f"but there must be {len(header)}: {', '.join(header)}"
                    )
                rows.append(Row(path, number, dict(zip(header, cells))))
            number = reader.line_num + 1  # a quoted cell may span lines
    except csv.Error as error:
        raise ValueError(f"{path}, line {number}: broken CSV ({error})") from None
    return _some(rows, path)


def first_line(path: Path) -> str:
    """Return the first line of a file; an empty string if the file is empty."""
    return next((line for _, line in _numbered_lines(path)), "")


def is_csv(path: Path) -> bool:
    """Whether a file is CSV, judged by its name. Otherwise it is JSON."""
    return path.name.removesuffix(".gz").endswith(".csv")


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: byte {error.object[error.start]:#04x} at column {error.start + 1} is not UTF-8; "
            "convert the file to UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error})") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: broken JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested thousands of levels deep; an integer of thousands of digits
        raise ValueError(f"{place}: broken JSON ({error})") from None


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise ValueError(f"{path} is empty: it has no rows")
    return rows


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
