"""
Seal the roots of a store that are in the clear: as threads are, each by one transaction.

Whoever puts an item into such a root holds a lock until the commit, which the root is
sealed without: nobody puts one in the clear that is missed.
"""

import logging
from contextlib import suppress
from typing import Any

import orjson

from langgraph_vat._durable import items as sql
from langgraph_vat._durable import namespaces
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Backend, Row, Session
from langgraph_vat._ops.items import Items, key_place, open_tokens, tokens
from langgraph_vat._ops.keys import wrap_key
from langgraph_vat._ops.plain import naming, seal_value, told
from langgraph_vat._ops.seal_existing import REFUSALS, check_window
from langgraph_vat._ops.texts import forget_texts
from langgraph_vat._records import Sealed
from langgraph_vat._seal.codec import Codec
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.serde import codec_for

logger = logging.getLogger("langgraph_vat")

_PAGE = 256
# Items that are in memory at once.
_MOST_ROWS = 256


async def seal_roots(items: Items, backend: Backend, only: str = "") -> Sealed:
    """Seal the roots that have no data key; `only` one, or "" for all."""
    check_window(items.keyring, items.settings)
    await open_tokens(items, backend)
    first, end = namespaces.below(only)
    params: dict[str, Any] = {"bound": first, "end": end, "limit": _PAGE}
    done, tried, size = Sealed(0, 0, 0), set(), _PAGE
    while size == _PAGE:
        rows = await backend.durable.fetch(namespaces.ROOTS, params)
        for params["bound"], root, is_plain in rows:
            if is_plain and root not in tried:
                tried.add(root)
                one = await _seal_one(items, backend, root)
                done = Sealed(*map(sum, zip(done, one, strict=True)))
        size = len(rows)
    return done


async def _seal_one(items: Items, backend: Backend, root: str) -> Sealed:
    async def body(session: Session) -> Sealed:
        return await _seal(items, session, root)

    try:
        return await backend.durable.transact(body)
    except REFUSALS as error:
        logger.warning("namespaces that begin with %r could not be sealed: %s", root, told(error))
        return Sealed(0, 0, 1)


async def _seal(items: Items, session: Session, root: str) -> Sealed:
    check_window(items.keyring, items.settings)
    assert items.keyring is not None
    await session.execute(sql.GUARD_ROOT_ALONE, {"root": root})
    await session.execute(sql.SWEEP_ROOT, {"root": root})
    if not await session.fetch(sql.PLAIN_ROOTS, {"roots": [root]}):
        return Sealed(0, 0, 0)  # by somebody else, or nothing is left
    data_key = DataKey.generate(items.keyring.cipher)
    wrapped = await wrap_key(session, items.keyring, data_key, key_place(root))
    target = codec_for(items.serde, data_key, "item", root)
    values = 0
    for first, end in namespaces.ranges(root):
        params: dict[str, Any] = {"first": first, "end": end, "limit": _MOST_ROWS}
        params |= {"after_prefix": "", "after_key": ""}
        while rows := await session.fetch(sql.PLAIN_ITEMS, params, plan_anew=True):
            params["after_prefix"], params["after_key"] = rows[-1][:2]
            new = [_sealed(items, root, target, row) for row in rows]
            names = ("prefixes", "keys", "values", "types", "exacts")
            await session.execute(sql.SEAL_ITEMS, columns(new, *names))
            values += len(rows)
    await forget_texts(session, root)
    await session.fetch(sql.ADD_KEY, {"root": root, "data_key": wrapped})
    return Sealed(1, values, 0)


def _sealed(items: Items, root: str, target: Codec, row: Row) -> tuple[Any, ...]:
    prefix, key, value, type_, exact = row
    source = codec_for(items.serde, None)
    with naming(f"item {key!r} of namespace {prefix!r}"):
        if type_ is None:
            sealed = target.dump(value, prefix, key)
        else:
            sealed = seal_value(items.serde, source, target, type_, exact, prefix, key)
    shown: dict[str, Any] = {}
    with suppress(Exception):  # what cannot be read here is found without
        if items.index_key is not None and type_ is not None:
            value = source.load(type_, exact, prefix, key)
        shown = tokens(items, root, value)
    return prefix, key, orjson.dumps(shown).decode(), *sealed
