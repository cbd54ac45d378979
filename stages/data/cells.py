"""Cells of a row: columns by name or path, and their exact text.

A number becomes the shortest decimal that its own column type reads back as the same value, without an exponent and without
trailing zeros: 132.04 in a float32 column is `132.04`, not float64's `132.0399932861328`. Numbers that are not exact are
refused: NaN, infinities, and floats beyond which a column type no longer holds every whole number.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, NamedTuple

from stages.tables import DataError

DOUBLE: Final = 53
"""Bits of float64's significand."""
_ABSENT: Final = object()
_INDEX: Final = re.compile(r"-?[0-9]{1,9}")
_LONGEST: Final = 4000
"""Digits of a whole number; Python itself refuses 4,300, which take long."""
_SHOWN: Final = 40


class Row(NamedTuple):
    """One row of a file, unchanged."""

    where: str
    """`file: line 3`, for messages."""
    values: dict[str, Any]
    """By column; floats as `Decimal`."""


class Unreadable(NamedTuple):
    """In the place of a value that cannot be had exactly: an error where its cell is read, and only there."""

    reason: str


def cell(row: Row, column: str) -> Any:
    """Return the value in a column, or at a path into a nested one (`prompt.0.content`); None where there is none.

    A column whose name has a dot wins over a path that reads the same; a list is entered by number, from its end by a negative
    one.
    """
    found = _at(row.values, column.split("."))
    return None if found is _ABSENT else found


def has_cell(row: Row, column: str) -> bool:
    """Return whether the row has the column, or the place that a path names, if only with a null."""
    return _at(row.values, column.split(".")) is not _ABSENT


def _at(value: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return value
    if isinstance(value, Mapping):
        for count in range(len(parts), 0, -1):  # the longest name first: `a.b` before the `b` in `a`
            name = ".".join(parts[:count])
            if name in value and (found := _at(value[name], parts[count:])) is not _ABSENT:
                return found
    elif isinstance(value, list) and _INDEX.fullmatch(parts[0]):
        place = int(parts[0])
        if -len(value) <= place < len(value):
            return _at(value[place], parts[1:])
    return _ABSENT


def missing_column(rows: Sequence[Row], column: str) -> str | None:
    """Return why `column` cannot be read in any of `rows`, with what is there in its place; None: some row has it."""
    if any(has_cell(row, column) for row in rows):
        return None
    parts, places = column.split("."), [row.values for row in rows]
    reached: list[str] = []
    while len(parts) > 1:
        inner: list[Any] = [found for place in places if (found := _at(place, parts[:1])) is not _ABSENT]
        if not any(isinstance(value, Mapping | list) for value in inner):
            break
        reached.append(parts.pop(0))
        places = inner
    names = sorted({name for place in places for name in _names_in(place)})
    near = difflib.get_close_matches(parts[0], names, n=1, cutoff=0.5)
    start = f"{'.'.join(reached)}." if reached else ""
    hint = f"; did you mean {'.'.join([start + near[0], *parts[1:]])!r}?" if near else ""
    return f"no column {column!r}; found {f'in {start[:-1]} ' if reached else 'columns '}{names}{hint}"


def _names_in(place: Any) -> Iterator[str]:
    if isinstance(place, Mapping):
        yield from map(str, place)
    elif isinstance(place, list):
        yield from map(str, range(len(place)))


def text_of(row: Row, column: str) -> str | None:
    """Return the text of one cell; a number becomes its exact decimal, absent and blank cells None.

    Raises:
        DataError: by row and column: a value of another type, NaN, an infinity, a number that is not exact.
    """
    value = cell(row, column)
    if value is None:
        return None
    where = f"{row.where}: column {column!r}"
    if isinstance(value, Unreadable):
        raise DataError(f"{where}: {value.reason}")
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise DataError(f"{where}: expected text or a number, found {_kind(value)}")
    text = value if isinstance(value, str) else _digits(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half of a surrogate pair, which is not text") from None
    return text if text.strip() else None


def required_text(row: Row, column: str, *, kind: str = "no value") -> str:
    """Return the text of a cell that must have one.

    Raises:
        DataError: it is absent or blank; `kind` says what that means.
    """
    text = text_of(row, column)
    if text is None:
        raise DataError(f"{row.where}: {kind}: column {column!r} is empty")
    return text


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object with {sorted(map(str, value))}; name a path into it"
    return f"list of {len(value)}; name a path into it" if isinstance(value, list) else type(value).__name__


def _digits(value: int | Decimal) -> str:
    """Return a number without exponent, zeros at the end of a fraction, or the sign of a zero."""
    text = format(value, "f") if isinstance(value, Decimal) else str(value)
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


# ------------------------------------------------------------------------------------------------ exact numbers


def decimal_of(shortest: str, *, bits: int = DOUBLE) -> Decimal | Unreadable:
    """Return a binary float, given as the shortest decimal that reads back as it.

    Args:
        bits: of its type's significand; from 2^bits on the type lacks whole numbers, so that the one meant is unknown.
    """
    value = Decimal(shortest)
    if not value.is_finite():
        return Unreadable(f"expected a finite number, found {shortest}")
    if abs(value) >= 2**bits:
        return Unreadable(
            f"{shortest} in a float column that holds whole numbers exactly up to 2^{bits} only; store it as an integer, a "
            "decimal or text"
        )
    return value


def json_decimal(text: str) -> Decimal | Unreadable:
    """Read a number as JSON writes it, with a fraction or an exponent."""
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    nonzero = any(digit in "123456789" for digit in text.lower().partition("e")[0])
    if math.isinf(float(text)) or (nonzero and float(text) == 0):
        return Unreadable(f"{shown} is beyond the range of 64-bit floats; give it as text")
    return Decimal(text) if nonzero else Decimal(0)


def json_integer(text: str) -> int | Unreadable:
    """Read a whole number as JSON writes it."""
    if len(text) > _LONGEST:
        return Unreadable(f"a number of {len(text):,} digits, expected at most {_LONGEST:,}; give it as text")
    return int(text)


def json_constant(text: str) -> Unreadable:
    """Read NaN, Infinity and -Infinity, which JSON does not have and many writers write."""
    return Unreadable(f"expected a finite number, found {text}")
