"""
What a filter means, twice: as a Python predicate and as SQL. Both agree.

A filter maps fields of the value to what they must be. A dictionary with keys
that begin with ``$`` holds operators, all of which must hold; any other
dictionary is compared field by field, a list element by element, and
everything else for equality. A field that is not there counts as null.

Comparisons go by JSON type: numbers compare with numbers, strings with
strings (by code point, so ISO dates compare as dates). Between different
types no order holds, and nothing is equal. `True` is not 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from psycopg import sql

from langgraph_vat._plain import is_plain, is_text
from langgraph_vat.errors import InvalidInputError

OPERATORS = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte")

_ORDERS: dict[str, tuple[Callable[[Any, Any], bool], sql.SQL]] = {
    "$gt": (lambda a, b: a > b, sql.SQL(">")),
    "$gte": (lambda a, b: a >= b, sql.SQL(">=")),
    "$lt": (lambda a, b: a < b, sql.SQL("<")),
    "$lte": (lambda a, b: a <= b, sql.SQL("<=")),
}


def check_filter(condition: Any) -> None:
    """
    Refuse a filter that could not be answered.

    Raises:
        InvalidInputError: It has an operator that does not exist, or compares
            with something that has no order.
    """
    if isinstance(condition, Mapping):
        is_operators = _has_operators(condition)
        for key, value in condition.items():
            if not isinstance(key, str):
                raise InvalidInputError("a filter's keys must be strings; nothing was searched")
            if is_operators:
                _check_operator(key, value)
            else:
                check_filter(value)
    elif isinstance(condition, Sequence) and not isinstance(condition, str | bytes):
        for value in condition:
            check_filter(value)


def _check_operator(operator: str, value: Any) -> None:
    if operator not in OPERATORS:
        known = ", ".join(OPERATORS)
        raise InvalidInputError(
            f"there is no filter operator {operator!r}; nothing was searched. Use {known}"
        )
    if operator in _ORDERS and _kind(value) not in ("number", "string"):
        raise InvalidInputError(
            f"{operator} compares numbers or strings, not {type(value).__name__}; nothing was read"
        )


def matches(value: Any, condition: Any) -> bool:
    """Whether a value meets a condition that `check_filter` let pass."""
    if isinstance(condition, Mapping):
        if _has_operators(condition):
            return all(_operates(value, name, other) for name, other in condition.items())
        return isinstance(value, Mapping) and all(
            matches(value.get(key), other) for key, other in condition.items()
        )
    if isinstance(condition, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(condition)
            and all(map(matches, value, condition))
        )
    return _equal(value, condition)


def _operates(value: Any, operator: str, other: Any) -> bool:
    if operator == "$eq":
        return _equal(value, other)
    if operator == "$ne":
        return not _equal(value, other)
    kind = _kind(other)
    return _kind(value) == kind and _ORDERS[operator][0](value, other)


def _equal(value: Any, other: Any) -> bool:
    if _kind(value) != _kind(other):
        return False
    if isinstance(value, Mapping):
        return value.keys() == other.keys() and all(_equal(value[k], other[k]) for k in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(_equal, value, other))
    return bool(value == other)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    if isinstance(value, Mapping):
        return "object"
    return "array" if isinstance(value, list | tuple) else type(value).__name__


def _has_operators(condition: Mapping[Any, Any]) -> bool:
    return any(isinstance(key, str) and key.startswith("$") for key in condition)


def to_sql(condition: Mapping[str, Any]) -> tuple[sql.Composed, dict[str, Any]] | None:
    """
    Return the predicate on ``s.value`` and its parameters.

    None if Postgres cannot hold what is compared: then only `matches` can tell.
    """
    if not _is_expressible(condition):
        return None
    built = _Predicate()
    clauses = [built.compare(built.field(sql.SQL("s.value"), k), c) for k, c in condition.items()]
    return _all(clauses), built.params


def _is_expressible(condition: Any) -> bool:
    if isinstance(condition, Mapping):
        return all(is_text(key) and _is_expressible(value) for key, value in condition.items())
    if isinstance(condition, list | tuple):
        return all(map(_is_expressible, condition))
    return is_plain(condition)


class _Predicate:
    """Builds SQL; what a caller gave goes into parameters."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}

    def field(self, parent: sql.Composable, key: str | int) -> sql.Composed:
        kind = sql.SQL("text" if isinstance(key, str) else "int")
        return sql.SQL("({} -> {}::{})").format(parent, self._param(key), kind)

    def compare(self, field: sql.Composable, condition: Any) -> sql.Composable:
        if isinstance(condition, Mapping):
            if _has_operators(condition):
                return _all([self._operate(field, *pair) for pair in condition.items()])
            clauses = [self.compare(self.field(field, k), other) for k, other in condition.items()]
            return _all([_is(field, "object"), *clauses])
        if isinstance(condition, list | tuple):
            length = sql.SQL("jsonb_array_length({}) = {}").format(field, len(condition))
            clauses = [self.compare(self.field(field, i), c) for i, c in enumerate(condition)]
            return _guarded(field, "array", _all([length, *clauses]))
        return self._operate(field, "$eq", condition)

    def _operate(self, field: sql.Composable, operator: str, other: Any) -> sql.Composable:
        if operator in ("$eq", "$ne"):
            sign = sql.SQL("=" if operator == "$eq" else "<>")
            given = self._param(orjson.dumps(other).decode())
            return sql.SQL("coalesce({}, 'null') {} {}::jsonb").format(field, sign, given)
        sign = _ORDERS[operator][1]
        if _kind(other) == "number":
            given = self._param(orjson.dumps(other).decode())
            test = sql.SQL("({})::numeric {} {}::numeric").format(field, sign, given)
            return _guarded(field, "number", test)
        given = self._param(other)
        test = sql.SQL("({} #>> '{{}}') COLLATE \"C\" {} {}::text").format(field, sign, given)
        return _guarded(field, "string", test)

    def _param(self, value: Any) -> sql.Placeholder:
        name = f"f{len(self.params)}"
        self.params[name] = value
        return sql.Placeholder(name)


def _is(field: sql.Composable, kind: str) -> sql.Composed:
    return sql.SQL("coalesce(jsonb_typeof({}), '') = {}").format(field, sql.Literal(kind))


def _guarded(field: sql.Composable, kind: str, test: sql.Composable) -> sql.Composed:
    """Test only values of a kind. CASE, because AND does not promise an order."""
    return sql.SQL("CASE WHEN {} THEN {} ELSE false END").format(_is(field, kind), test)


def _all(clauses: list[Any]) -> sql.Composed:
    if not clauses:
        return sql.Composed([sql.SQL("true")])
    return sql.SQL("({})").format(sql.SQL(" AND ").join(clauses))
