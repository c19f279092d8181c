"""
What a filter means, twice: as a Python predicate and as SQL. Both agree.

A filter maps fields of the value to what they must be: a value for equality, a
dictionary of operators (``{"$gte": 3}``) that must all hold, or a dictionary of
inner fields. A field may be a path, ``"user.address.city"`` or ``"parts.0"``, unless
the object has a field of that very name. What is not there counts as null, but for
``$exists``. ``$and``, ``$or`` and ``$not`` stand where a field or an operator may.

Comparisons go by JSON type: numbers compare with numbers, strings with strings by
code point. Between different types no order holds, and nothing is equal; `True` is not
1. A string that is an ISO 8601 date or time compares with others that are, as the moment
it names (without a zone that of UTC): ``2026-01-01T12:00+02:00`` is before
``2026-01-01T11:00Z``.
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
from psycopg import sql

from langgraph_vat._plain import is_plain, is_text
from langgraph_vat.errors import InvalidInputError

_LOGICAL = ("$and", "$or", "$not")
_ORDERS: dict[str, tuple[Callable[[Any, Any], bool], sql.SQL]] = {
    "$gt": (lambda a, b: a > b, sql.SQL(">")),
    "$gte": (lambda a, b: a >= b, sql.SQL(">=")),
    "$lt": (lambda a, b: a < b, sql.SQL("<")),
    "$lte": (lambda a, b: a <= b, sql.SQL("<=")),
}
OPERATORS = ("$eq", "$ne", *_ORDERS, "$in", "$nin", "$exists", "$contains", *_LOGICAL)

_MISSING = object()
_DEEPEST = 64
_MOST_DIGITS = 9
# Alternatives of $in that are looked up one by one in an index.
_MOST_LOOKUPS = 16

# For Python and Postgres alike: those dates alone that exist, so that a cast cannot fail.
_YEAR = "[1-9][0-9]{3}"
_LEAP = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DAY = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP}-02-29)"
)
_ZONE = "(?:Z|[+-](?:0[0-9]|1[0-4]):[0-5][0-9])"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.][0-9]{1,6})?)?"
_ISO = f"^{_DAY}(?:[T ]{_TIME}{_ZONE}?)?$"
_IS_DATE = re.compile(_ISO.removesuffix("$") + r"\Z").match


def check_filter(condition: Any, depth: int = 0) -> None:
    """
    Refuse a filter that could not be answered.

    Raises:
        InvalidInputError: It has an operator that does not exist, compares with
            something that has no order, or is nested too deeply.
    """
    if depth > _DEEPEST:
        raise InvalidInputError(
            f"a filter may be nested {_DEEPEST} levels deep; nothing was searched"
        )
    if isinstance(condition, Mapping):
        names = [*condition]
        if not all(isinstance(name, str) for name in names):
            raise InvalidInputError("a filter's keys must be strings; nothing was searched")
        fields = [name for name in names if not name.startswith("$")]
        for name in names:
            if name in fields:
                check_filter(condition[name], depth + 1)
            else:
                _check_operator(name, condition[name], depth, is_alone=not fields)
    elif isinstance(condition, list | tuple):
        for inner in condition:
            check_filter(inner, depth + 1)


def _check_operator(operator: str, given: Any, depth: int, *, is_alone: bool) -> None:
    if operator not in OPERATORS:
        known = ", ".join(OPERATORS)
        raise InvalidInputError(
            f"there is no filter operator {operator!r}; nothing was searched. Use {known}"
        )
    if operator not in _LOGICAL and not is_alone:
        raise InvalidInputError(
            f"{operator} stands beside the name of a field; nothing was searched. Put it below the"
            " field that it is about"
        )
    fault = _fault(operator, given)
    if fault:
        raise InvalidInputError(f"{operator} {fault}; nothing was searched")
    if operator in _LOGICAL:
        check_filter(given, depth + 1)


def _fault(operator: str, given: Any) -> str:
    """Return what is wrong with an operator's argument; nothing if it is well."""
    what = type(given).__name__
    if operator in _ORDERS and _kind(given) not in ("number", "string"):
        return f"compares numbers or strings, not {what}"
    if operator in ("$in", "$nin") and not isinstance(given, list | tuple):
        return f"needs a list of values, not {what}"
    if operator in ("$and", "$or") and not (isinstance(given, list | tuple) and given):
        return f"needs a list of filters, not {what if given else 'an empty one'}"
    if operator == "$exists" and not isinstance(given, bool):
        return f"needs True or False, not {what}"
    return ""


# --- as a predicate ---------------------------------------------------------------


def matches(value: Any, condition: Any) -> bool:
    """Whether a value meets a condition that `check_filter` let pass."""
    if isinstance(condition, Mapping):
        if _has_fields(condition) and not isinstance(value, Mapping):
            return False
        return all(
            _OPERATIONS[name](value, given)
            if name.startswith("$")
            else matches(_inner(value, name), given)
            for name, given in condition.items()
        )
    if isinstance(condition, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(condition)
            and all(map(matches, value, condition))
        )
    return _equal(value, condition)


def _has_fields(condition: Mapping[str, Any]) -> bool:
    """Whether a condition is about an object: about its fields, or about there being one."""
    return not condition or not all(name.startswith("$") for name in condition)


def _inner(value: Mapping[str, Any], name: str) -> Any:
    if name in value or "." not in name:
        return value.get(name, _MISSING)
    found: Any = value
    for part in name.split("."):
        if isinstance(found, Mapping):
            found = found.get(part, _MISSING)
        elif isinstance(found, list | tuple) and _is_index(part):
            found = found[int(part)] if int(part) < len(found) else _MISSING
        else:
            return _MISSING
    return found


def _is_index(part: str) -> bool:
    # No array has more, and neither Postgres nor `int` reads digits without end.
    return part.isascii() and part.isdecimal() and len(part) <= _MOST_DIGITS


def _ordered(operator: str) -> Callable[[Any, Any], bool]:
    compare = _ORDERS[operator][0]

    def holds(value: Any, given: Any) -> bool:
        if _kind(value) != _kind(given):
            return False
        if isinstance(given, str) and _IS_DATE(given):
            return bool(_IS_DATE(value)) and compare(_moment(value), _moment(given))
        return compare(value, given)

    return holds


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _contains(value: Any, given: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_equal(one, given) for one in value)
    return isinstance(value, str) and isinstance(given, str) and given in value


def _equal(value: Any, other: Any) -> bool:
    value = None if value is _MISSING else value
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


_OPERATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": _equal,
    "$ne": lambda value, given: not _equal(value, given),
    **{name: _ordered(name) for name in _ORDERS},
    "$in": lambda value, given: any(_equal(value, one) for one in given),
    "$nin": lambda value, given: not any(_equal(value, one) for one in given),
    "$exists": lambda value, given: (value is not _MISSING) is given,
    "$contains": _contains,
    "$and": lambda value, given: all(matches(value, one) for one in given),
    "$or": lambda value, given: any(matches(value, one) for one in given),
    "$not": lambda value, given: not matches(value, given),
}


# --- as SQL -----------------------------------------------------------------------


def to_sql(condition: Mapping[str, Any]) -> tuple[sql.Composable, dict[str, Any]] | None:
    """
    Return the predicate on ``s.value`` and its parameters. It is never null.

    None if Postgres cannot hold what is compared: then only `matches` can tell.
    """
    if not _is_expressible(condition):
        return None
    built = _Predicate()
    return built.compare(_Field(sql.SQL("s.value"), ()), condition), built.params


def _is_expressible(condition: Any) -> bool:
    if isinstance(condition, Mapping):
        return all(is_text(key) and _is_expressible(value) for key, value in condition.items())
    if isinstance(condition, list | tuple):
        return all(map(_is_expressible, condition))
    return is_plain(condition)


class _Field:
    """
    An expression of a part of the value, null if it is not there.

    `path` leads to it through objects alone; None if it may be reached in several ways.
    """

    def __init__(self, expression: sql.Composable, path: tuple[str, ...] | None) -> None:
        self.expression = expression
        self.path = path


class _Predicate:
    """Builds SQL; what a caller gave goes into parameters."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}

    def compare(self, field: _Field, condition: Any) -> sql.Composable:
        if isinstance(condition, Mapping):
            clauses = [_is(field, "object")] if _has_fields(condition) and field.path != () else []
            for name, given in condition.items():
                if name.startswith("$"):
                    clauses.append(self._operate(field, name, given))
                else:
                    clauses.append(self.compare(self._inner(field, name), given))
            return _joined("AND", clauses)
        if isinstance(condition, list | tuple):
            length = sql.SQL("jsonb_array_length({}) = {}").format(field.expression, len(condition))
            clauses = [self.compare(self._element(field, i), c) for i, c in enumerate(condition)]
            return _guarded(field, "array", _joined("AND", [length, *clauses]))
        return self._equal(field, condition)

    def _inner(self, field: _Field, name: str) -> _Field:
        own = sql.SQL("({} -> {}::text)").format(field.expression, self._param(name))
        if "." not in name:
            return _Field(own, None if field.path is None else (*field.path, name))
        walked = field.expression
        for part in name.split("."):
            step = sql.SQL("#> ARRAY[{}::text]" if _is_index(part) else "-> {}::text")
            walked = sql.SQL("({} {})").format(walked, step.format(self._param(part)))
        return _Field(sql.SQL("coalesce({}, {})").format(own, walked), None)

    def _element(self, field: _Field, index: int) -> _Field:
        return _Field(sql.SQL("({} -> {}::int)").format(field.expression, index), None)

    def _operate(self, field: _Field, operator: str, given: Any) -> sql.Composable:
        if operator in _ORDERS:
            return self._order(field, _ORDERS[operator][1], given)
        if operator in ("$ne", "$nin", "$not"):
            opposite = {"$ne": self._equal, "$nin": self._in, "$not": self.compare}[operator]
            return sql.SQL("NOT {}").format(opposite(field, given))
        if operator in ("$and", "$or"):
            return _joined(operator[1:].upper(), [self.compare(field, one) for one in given])
        if operator == "$exists":
            there = sql.SQL("IS NOT NULL" if given else "IS NULL")
            return sql.SQL("({} {})").format(field.expression, there)
        return {"$eq": self._equal, "$in": self._in, "$contains": self._contain}[operator](
            field, given
        )

    def _equal(self, field: _Field, given: Any) -> sql.Composable:
        return self._in(field, [given])

    def _in(self, field: _Field, given: Any) -> sql.Composable:
        among = sql.SQL("coalesce({}, 'null') = ANY ({}::text[]::jsonb[])").format(
            field.expression, self._param([_json(one) for one in given])
        )
        if field.path is None or None in given or not 0 < len(given) <= _MOST_LOOKUPS:
            return sql.SQL("({})").format(among)
        # Implied by it, and there may be an index for that.
        lookups = [self._lookup(field.path, one) for one in given]
        return _joined("AND", [_joined("OR", lookups), among])

    def _lookup(self, path: tuple[str, ...], given: Any) -> sql.Composable:
        for name in reversed(path):
            given = {name: given}
        return sql.SQL("s.value @> {}::jsonb").format(self._param(_json(given)))

    def _order(self, field: _Field, sign: sql.SQL, given: Any) -> sql.Composable:
        text = sql.SQL("({} #>> '{{}}')").format(field.expression)
        if _kind(given) == "number":
            test = sql.SQL("({})::numeric {} {}::numeric").format(
                field.expression, sign, self._param(_json(given))
            )
            return _guarded(field, "number", test)
        if not _IS_DATE(given):
            test = sql.SQL('{} COLLATE "C" {} {}::text').format(text, sign, self._param(given))
            return _guarded(field, "string", test)
        moment = sql.SQL(
            "({0} || CASE WHEN {0} ~ {1} THEN '' WHEN length({0}) = 10 THEN 'T00:00Z' ELSE 'Z' END"
            ")::timestamptz"
        ).format(text, sql.Literal(f"{_ZONE}$"))
        test = sql.SQL("CASE WHEN {} ~ {} THEN {} {} {}::timestamptz ELSE false END").format(
            text, sql.Literal(_ISO), moment, sign, self._param(_moment(given))
        )
        return _guarded(field, "string", test)

    def _contain(self, field: _Field, given: Any) -> sql.Composable:
        if _kind(given) in ("object", "array"):
            held = sql.SQL(
                "EXISTS (SELECT FROM jsonb_array_elements({}) AS e (v) WHERE e.v = {}::jsonb)"
            ).format(field.expression, self._param(_json(given)))
        else:
            held = sql.SQL("{} @> {}::jsonb").format(field.expression, self._param(_json([given])))
        in_array = _guarded(field, "array", held)
        if not isinstance(given, str):
            return in_array
        held = sql.SQL("strpos({} #>> '{{}}', {}::text) > 0").format(
            field.expression, self._param(given)
        )
        return _joined("OR", [in_array, _guarded(field, "string", held)])

    def _param(self, value: Any) -> sql.Placeholder:
        name = f"f{len(self.params)}"
        self.params[name] = value
        return sql.Placeholder(name)


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _is(field: _Field, kind: str) -> sql.Composable:
    return sql.SQL("coalesce(jsonb_typeof({}), '') = {}").format(
        field.expression, sql.Literal(kind)
    )


def _guarded(field: _Field, kind: str, test: sql.Composable) -> sql.Composable:
    """Test only values of a kind. CASE, because AND does not promise an order."""
    return sql.SQL("(CASE WHEN {} THEN {} ELSE false END)").format(_is(field, kind), test)


def _joined(word: str, clauses: list[Any]) -> sql.Composable:
    if not clauses:
        return sql.SQL("true")
    return sql.SQL("({})").format(sql.SQL(f" {word} ").join(clauses))
