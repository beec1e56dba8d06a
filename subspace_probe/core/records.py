"""Rows of prompt files, each remembering where it came from, so that an error can name the line."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

from subspace_probe.core.errors import DataError, StoreError
from subspace_probe.core.prompts import Message, Prompt


@final
@dataclass(frozen=True)
class Record:
    """One row of a file: its values and its place, as `names.jsonl:12`.

    Attributes:
        problem: why the row could not be read; a reader goes on, so that all malformed rows are reported together.
    """

    place: str
    values: Mapping[str, object]
    problem: str = ""


@final
@dataclass(frozen=True)
class Columns:
    """Which column means what, for files that use other names.

    Args:
        positive: the value of the label column that means 1; every other value is 0. Default: the column holds 0 and 1.
    """

    prompt: str = "prompt"
    label: str = "label"
    pair: str = "pair"
    group: str = "group"
    positive: str | None = None

    def label_of(self, record: Record) -> int:
        """The label of a row, 0 or 1.

        Raises:
            DataError: no label, or another value.
        """
        if self.label not in record.values:
            raise DataError(f"no column {self.label!r}; found {', '.join(map(repr, record.values))}")
        value = record.values[self.label]
        if self.positive is not None:
            return int(str(value) == self.positive)
        if isinstance(value, bool) or value in (0, 1):
            return int(cast("int", value))
        if isinstance(value, str) and value.strip() in ("0", "1"):
            return int(value)
        raise DataError(f"{self.label} is {value!r}; it must be 0 (negative) or 1 (positive)")


def prompt_of(record: Record, columns: Columns) -> Prompt:
    """The prompt of a row.

    Raises:
        DataError: no prompt, an empty one, or malformed messages.
    """
    values = record.values
    extras: dict[str, Any] = {name: str(values[name]) for name in ("instruction", "answer", "foil") if values.get(name)}
    if messages := values.get("messages"):
        return Prompt(messages=_messages(messages), **extras)
    if columns.prompt in values:
        return Prompt(text=_text(values[columns.prompt], columns.prompt), **extras)
    if "text" in values:
        return Prompt(text=_text(values["text"], "text"), raw=True, **extras)
    raise DataError(f"no column {columns.prompt!r} or 'messages'; found {', '.join(map(repr, values)) or 'nothing'}")


def read_jsonl(path: Path) -> Iterator[Record]:
    """The rows of a JSON-lines file; empty lines and lines that are no JSON object carry their problem.

    Raises:
        StoreError: the file cannot be read.
        DataError: the file is empty.
    """
    # not splitlines(): JSON may hold U+2028 and its like inside a text
    for number, line in enumerate(_read(path).removesuffix("\n").split("\n"), start=1):
        yield record_of(line, f"{path.name}:{number}")


def record_of(line: str, place: str) -> Record:
    """One line of a JSON-lines file as a row; one that is empty or no JSON object carries its problem."""
    if not line.strip():
        return Record(place, {}, "the line is empty. Remove it, or put one JSON object there.")
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return Record(place, {}, f"not JSON ({error.msg} at column {error.colno}): {line[:60]!r}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return Record(place, {}, f"JSON that cannot be read ({error}): {line[:60]!r}")
    if isinstance(value, dict):
        return Record(place, cast("dict[str, object]", value))
    return Record(place, {}, f"a JSON object was expected, found {type(value).__name__}: {line[:60]!r}")


def read_csv(path: Path) -> Iterator[Record]:
    """The rows of a CSV file with a header (tabs in a `.tsv`); rows with a wrong number of cells carry their problem.

    Raises:
        StoreError: the file cannot be read.
        DataError: the file is empty, has no header or a repeated column, or cannot be split into cells.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_read(path)), delimiter=delimiter, strict=True)
    place = f"{path.name}:1"
    try:
        header = next(reader, None)
        if not header:
            raise DataError(f"{place}: a header line with column names was expected, found nothing.")
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{place}: the header has {', '.join(map(repr, repeated))} twice. Rename one of them.")
        # a cell may span lines, so a row is named by its first
        place = f"{path.name}:{reader.line_num + 1}"
        for cells in reader:
            yield _cells(place, header, cells)
            place = f"{path.name}:{reader.line_num + 1}"
    except csv.Error as error:
        raise DataError(f"{place}: not CSV ({error}). Look for an unclosed quotation mark.") from None


def _cells(place: str, header: list[str], cells: list[str]) -> Record:
    if not cells:
        return Record(place, {}, "the line is empty. Remove it.")
    if len(cells) != len(header):
        return Record(place, {}, f"{len(cells)} cells, but the header has {len(header)}: {', '.join(header)}")
    return Record(place, dict(zip(header, cells, strict=True)))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise StoreError(f"No file {str(path)!r}. Give the path of a .jsonl or .csv file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"Cannot read {str(path)!r}: {error}. It must be a UTF-8 text file.") from None
    if not text.strip():
        raise DataError(f"{path.name}: the file is empty. Put one prompt with its label on every line.")
    return text


def _text(value: object, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{column} is {value!r}; it must be a text that is not empty")
    return value


def _messages(value: object) -> tuple[Message, ...]:
    if isinstance(value, str):  # a CSV cell, or a column stored as JSON text
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError("messages is not JSON; it must be a list of {role, content}") from None
    turns = cast("list[object]", value) if isinstance(value, list) else []
    dicts = [cast("dict[str, object]", turn) for turn in turns if isinstance(turn, dict)]
    good = [Message(role=str(d["role"]), content=str(d["content"])) for d in dicts if {"role", "content"} <= d.keys()]
    if not turns or len(good) != len(turns):
        raise DataError("messages must be a list of {role, content} objects")
    return tuple(good)
