"""Reading table rows for drawing. A report read back from JSON holds null where it held NaN: both are gaps here."""

import html
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

Row = Mapping[str, Any]
Value = TypeVar("Value", bound=Hashable)


def finite(value: float | int | None) -> float | None:
    """The number, or None where there is none to draw."""
    return None if value is None or not math.isfinite(value) else float(value)


def drawn(rows: Iterable[Row], *columns: str) -> list[Row]:
    """The rows that have a number in each of these columns."""
    return [row for row in rows if all(finite(row[column]) is not None for column in columns)]


def select(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows whose columns have the given values."""
    return [row for row in rows if all(row[column] == value for column, value in values.items())]


def distinct(values: Iterable[Value]) -> list[Value]:
    """Each value once, in order of first appearance."""
    return list(dict.fromkeys(values))


def shown(value: object, longest: int = 60) -> str:
    """Text as a label: shortened, and with the markup that plotly would act on made visible."""
    text = " ".join(str(value).split()) if str(value).strip() else repr(str(value))
    return html.escape(text if len(text) <= longest else f"{text[: longest - 1]}…", quote=False)


def token(value: object) -> str:
    """A token as a label, with the white space that is part of it."""
    text = str(value).replace("▁", " ").replace("Ġ", " ").replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return shown(text or "(empty)", longest=18)


def two_digits(value: float | int | None) -> str:
    """A number as labels in figures print it."""
    number = finite(value)
    return "n/a" if number is None else f"{number:.2f}".replace("-", "−")  # noqa: RUF001  (a minus, not a hyphen)


def spread(values: Iterable[float], gap: float, low: float, high: float) -> list[float]:
    """Where labels go so that neighbours are `gap` apart within [low, high], each near its value."""
    wanted = list(values)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    floor = low
    for index in order:
        placed[index] = floor = max(wanted[index], floor)
        floor += gap
    ceiling = high
    for index in reversed(order):
        placed[index] = ceiling = min(placed[index], ceiling)
        ceiling -= gap
    return placed
