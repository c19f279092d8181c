"""
SQL of blind indexes: rows that have a token, and rows that have none of its field.

A row may have been written before a field was declared, or by a process that did not
know of it. It may match all the same, and is found by an index of such rows, which is
empty where all have tokens. The indexes are about speed alone.
"""

import hashlib
from collections.abc import Collection, Sequence

from psycopg import sql

from langgraph_vat._durable import checkpoints
from langgraph_vat._seal.blind_index import BLIND


def lacks(column: sql.SQL, field: str) -> sql.Composed:
    """Return the condition that a row has no token of a field. Literal, as the index has it."""
    return sql.SQL("{} -> {} -> {} IS NULL").format(column, sql.Literal(BLIND), sql.Literal(field))


def page_by_tokens(selected: sql.SQL, fields: Sequence[str]) -> sql.Composed:
    """
    Return the statement of a page of checkpoints that are filtered by tokens.

    Each part is a page of its own, in their order, so that each is found by its index: those
    that have all the tokens, and, of each field, those that have the tokens of the fields
    before it and none of this one. Parameter ``filter_N`` is what the metadata must contain
    that has tokens of N fields.
    """
    parts = [_part(len(fields), None)]
    parts += [_part(number, field) for number, field in enumerate(fields)]
    every = sql.SQL(" UNION ALL ").join(parts)
    return sql.SQL("").join([selected, sql.SQL("FROM ("), every, sql.SQL(") AS c"), _ORDERED])


_ORDERED = sql.SQL(checkpoints.PAGE_ORDER)


def _part(number: int, field: str | None) -> sql.Composed:
    absent = sql.SQL("true") if field is None else lacks(sql.SQL("c.metadata"), field)
    return sql.SQL("").join(
        [
            sql.SQL("(SELECT c.* FROM checkpoints c"),
            sql.SQL(checkpoints.PAGE_CONDITION),
            sql.SQL("AND {} AND {}").format(absent, _contains(f"filter_{number}")),
            _ORDERED,
            sql.SQL(")"),
        ]
    )


def _contains(name: str) -> sql.Composed:
    given = sql.Placeholder(name)
    return sql.SQL("({}::jsonb = '{{}}' OR c.metadata @> {}::jsonb)").format(given, given)


def checkpoint_indexes(fields: Collection[str]) -> list[tuple[str, sql.Composed]]:
    """Return the indexes of checkpoints without tokens, each after its name."""
    columns = sql.SQL("checkpoints (checkpoint_id, thread_id, checkpoint_ns)")
    return [_index("vat_checkpoints_lacks", columns, sql.SQL("metadata"), one) for one in fields]


def item_indexes(fields: Collection[str]) -> list[tuple[str, sql.Composed]]:
    """Return the indexes of items: of their tokens, and of those without; each after its name."""
    columns = sql.SQL("store (prefix, key)")
    found = [_index("vat_store_lacks", columns, sql.SQL("value"), field) for field in fields]
    return [(_TOKENS_INDEX, sql.SQL(_CREATE_TOKENS_INDEX).format()), *found] if fields else []


_TOKENS_INDEX = "vat_store_blind"
_CREATE_TOKENS_INDEX = """
CREATE INDEX IF NOT EXISTS vat_store_blind ON store USING gin (value jsonb_path_ops)
WHERE vat_value IS NOT NULL"""


def _index(name: str, columns: sql.SQL, column: sql.SQL, field: str) -> tuple[str, sql.Composed]:
    # A field's name may be longer than an index's.
    name = f"{name}_{hashlib.sha256(field.encode()).hexdigest()[:16]}"
    statement = sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} WHERE {}").format(
        sql.Identifier(name), columns, lacks(column, field)
    )
    return name, statement


def item_condition(fields: Collection[str]) -> sql.Composed:
    """
    Return the condition on an item, ``s``, that it may match.

    Parameter ``blind_N`` is what the readable part contains that has the token of field N.
    """
    has = "(s.vat_value IS NOT NULL AND s.value @> {}::jsonb OR {})"
    return sql.SQL(" AND ").join(
        [
            sql.SQL(has).format(sql.Placeholder(f"blind_{number}"), lacks(sql.SQL("s.value"), one))
            for number, one in enumerate(fields)
        ]
    )
