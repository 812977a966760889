"""Numbers that callers give: taken as plain Python numbers, or refused by name."""

import operator
from typing import Any


def whole(name: str, value: Any) -> int:
    """An integer of any type as an int; raises TypeError for anything else, booleans among it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def integers(name: str, values: Any) -> tuple[int, ...]:
    """Integers as a tuple (which can be hashed); raises TypeError for anything else."""
    try:
        return tuple(whole(name, value) for value in values)
    except TypeError:
        raise TypeError(f"{name} must be a tuple of integers, got {values!r}") from None


def real(name: str, value: Any) -> float:
    """A number of any type as a float; raises TypeError for what is none, such as a text."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
