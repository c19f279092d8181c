"""
What is done with all that is below a namespace: counted, deleted, shredded.

Items are deleted in steps, each a transaction of its own, in the order of the primary key: no
lock is held for long, and who is stopped and runs it again goes on. What others put meanwhile
goes as well where the steps have not come yet; where they have been, it stays.
"""

from contextlib import suppress
from typing import Any, cast

from langgraph.store.base import SearchOp

from langgraph_vat._durable import items as item_sql
from langgraph_vat._durable import namespaces as sql
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat._ops.address import Space
from langgraph_vat._ops.items import Items, open_tokens, placed, query_for
from langgraph_vat._ops.reseal_items import shred_root
from langgraph_vat._ops.search import Query
from langgraph_vat.errors import InvalidInputError

# Items that are in memory at once.
_PAGE = 256
# Items of one transaction.
_MOST_ROWS = 1_000


async def count(
    items: Items,
    backend: Backend,
    space: Space,
    namespace_prefix: tuple[str, ...],
    condition: dict[str, Any] | None,
) -> int:
    """Count the items that a search would find."""
    op = _below(space, namespace_prefix, condition)
    await open_tokens(items, backend)

    async def body(session: Session) -> int:
        query = query_for(items, session, op, None)
        if query.matching is not None:
            return await _count_opened(session, query)
        params = {**query.params, "is_sealed": items.keyring is not None}
        found: int = (await session.fetch(query.compose(sql.COUNT), params, plan_anew=True))[0][0]
        return found

    return await backend.durable.transact(body)


async def _count_opened(session: Session, query: Query) -> int:
    """Count the items that match when they are opened, a page at a time."""
    assert query.matching is not None
    found = 0
    for first, end in sql.ranges(query.params["prefix"]):
        params = {**query.params, "first": first, "end": end, "limit": _PAGE}
        params |= {"after_prefix": "", "after_key": ""}
        statement = query.compose(sql.PAGE, item_sql.ITEM)
        while rows := await session.fetch(statement, params, plan_anew=True):
            params["after_prefix"], params["after_key"] = rows[-1][:2]
            found += len(await query.matching(rows))
    return found


async def delete_below(backend: Backend, space: Space, namespace_prefix: tuple[str, ...]) -> int:
    """
    Delete a namespace and all below it; return how many items there were.

    Raises:
        InvalidInputError: It is empty.
    """
    op = _below(space, namespace_prefix)
    if not space.shown(op.namespace_prefix):
        raise InvalidInputError(
            "an empty namespace_prefix is that of all items; nothing was deleted. Name a"
            " namespace; of a tenant's view, delete_all() deletes everything"
        )
    return await _delete(backend, ".".join(op.namespace_prefix))


async def delete_tenant(backend: Backend, space: Space) -> int:
    """Delete the items of a tenant; return how many there were."""
    _refuse_unscoped(space)
    return await _delete(backend, space.root)


async def shred_tenant(items: Items, backend: Backend, space: Space) -> int:
    """Shred what a tenant has; return how many data keys were destroyed."""
    _refuse_unscoped(space)
    with suppress(InvalidInputError):  # nothing sealed is there
        await shred_root(items, backend, space.root)
        return 1
    return 0


def _refuse_unscoped(space: Space) -> None:
    if not space.root:
        raise InvalidInputError(
            "only a tenant's items can be deleted or shredded all at once: use scoped(tenant)."
            " Nothing was changed."
        )


async def _delete(backend: Backend, prefix: str) -> int:
    deleted = 0
    for first, end in sql.ranges(prefix):
        params: dict[str, Any] = {"first": first, "end": end, "limit": _MOST_ROWS}
        params |= {"after_prefix": "", "after_key": ""}
        while rows := await backend.durable.fetch(sql.DELETE_NEXT, params, plan_anew=True):
            living, params["after_prefix"], params["after_key"] = rows[0]
            deleted += living
    return deleted


def _below(
    space: Space, namespace_prefix: tuple[str, ...], condition: dict[str, Any] | None = None
) -> SearchOp:
    """Check what a search would be asked for, and return it as it is stored."""
    return cast("SearchOp", placed(space, SearchOp(namespace_prefix, condition)))
