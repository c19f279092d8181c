"""What Postgres's text and jsonb give back as it was put in."""

import math
from typing import Any

# Beyond this a float may come back from JSON as an integer.
_EXACT_FLOAT = 2.0**53
_INT64 = range(-(2**63), 2**63)


def is_text(value: str) -> bool:
    """Whether Postgres can hold `value` as text: no NUL, no lone surrogate."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def is_plain(value: Any) -> bool:  # noqa: PLR0911 - one case a line
    """Whether Postgres's jsonb gives `value` back equal. A tuple counts as the list it becomes."""
    if value is None or value is True or value is False:
        return True
    kind = type(value)
    if kind is str:
        return is_text(value)
    if kind is int:
        return value in _INT64
    if kind is float:
        return math.isfinite(value) and abs(value) < _EXACT_FLOAT
    if kind is list or kind is tuple:
        return all(map(is_plain, value))
    if kind is dict:
        return all(type(k) is str and is_plain(k) and is_plain(v) for k, v in value.items())
    return False
