"""Rows of prompt files, each remembering where it came from, so that an error can name the line."""

import csv
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
    """One row of a file: its values and its place, as `names.jsonl:12`."""

    place: str
    values: Mapping[str, object]


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
    extras = {name: str(values[name]) for name in ("instruction", "answer", "foil") if values.get(name)}
    if messages := values.get("messages"):
        return Prompt(messages=_messages(messages), **extras)
    if columns.prompt in values:
        return Prompt(text=_text(values[columns.prompt], columns.prompt), **extras)
    if "text" in values:
        return Prompt(text=_text(values["text"], "text"), raw=True, **extras)
    raise DataError(f"no column {columns.prompt!r} or 'messages'; found {', '.join(map(repr, values)) or 'nothing'}")


def read_jsonl(path: Path) -> Iterator[Record]:
    """The rows of a JSON-lines file.

    Raises:
        StoreError: the file cannot be read.
        DataError: an empty line, a line that is not JSON, or one that is not an object.
    """
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path.name}:{number}"
        if not line.strip():
            raise DataError(f"{place}: the line is empty. Remove it, or put one JSON object there.")
        try:
            value: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON ({error.msg} at column {error.colno}): {line[:60]!r}") from None
        if not isinstance(value, dict):
            raise DataError(f"{place}: a JSON object was expected, found {type(value).__name__}: {line[:60]!r}")
        yield Record(place, cast("dict[str, object]", value))


def read_csv(path: Path) -> Iterator[Record]:
    """The rows of a CSV file with a header.

    Raises:
        StoreError: the file cannot be read.
        DataError: a row with more or fewer cells than the header.
    """
    reader = csv.reader(_lines(path))
    header = next(reader, None)
    if not header:
        raise DataError(f"{path.name}:1: a header line with column names was expected, found nothing.")
    for cells in reader:
        place = f"{path.name}:{reader.line_num}"
        if len(cells) != len(header):
            raise DataError(f"{place}: {len(cells)} cells, but the header has {len(header)}: {', '.join(header)}")
        yield Record(place, dict(zip(header, cells, strict=True)))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise StoreError(f"No file {str(path)!r}. Give the path of a .jsonl or .csv file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"Cannot read {str(path)!r}: {error}. It must be a UTF-8 text file.") from None
    lines = text.splitlines(keepends=True)
    if not lines:
        raise DataError(f"{path.name}: the file is empty.")
    return lines


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
    turns = cast("list[Any]", value) if isinstance(value, list) else []
    good = [turn for turn in turns if isinstance(turn, dict) and {"role", "content"} <= turn.keys()]
    if not turns or len(good) != len(turns):
        raise DataError("messages must be a list of {role, content} objects")
    return tuple(Message(role=str(turn["role"]), content=str(turn["content"])) for turn in good)
