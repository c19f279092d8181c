"""
The same for a store: a data key for each first label of its namespaces.

A process uses a root's key for a minute before it asks again, and asks at once
when it meets an item that it cannot open. So a day after a key was replaced
nobody seals with it.
"""

import time
from contextlib import suppress
from typing import Any

import orjson

from langgraph_vat._durable import items as sql
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat._ops.items import Items, RootKey, key_place, open_tokens, tokens
from langgraph_vat._ops.keys import unwrap_key, wrap_key
from langgraph_vat._ops.reseal import is_due
from langgraph_vat._ops.shared import SHREDDED
from langgraph_vat._records import Resealed
from langgraph_vat._seal.blind_index import BLIND
from langgraph_vat._seal.codec import Codec
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import InvalidInputError, SealError
from langgraph_vat.serde import codec_for

_PAGE = 256
# Rows of one transaction.
_MOST_ROWS = 64


async def reseal_roots(
    items: Items, backend: Backend, max_age_s: float, only: str = ""
) -> Resealed:
    """Reseal the roots whose data key is so old; `only` one, or "" for all."""
    await open_tokens(items, backend)
    after, done, size = "", Resealed(0, 0, 0, 0), _PAGE
    while size == _PAGE:
        params = {"after": after, "limit": _PAGE, "only": only}
        rows = await backend.durable.fetch(sql.SEALED_ROOTS, params)
        for (after,) in rows:
            one = await _reseal_one(items, backend, after, max_age_s)
            done = Resealed(*map(sum, zip(done, one, strict=True)))
        size = len(rows)
    return done


async def _reseal_one(items: Items, backend: Backend, root: str, max_age_s: float) -> Resealed:
    async def begin(session: Session) -> tuple[DataKey, bool] | None:
        data_key = await _locked(items, session, root)
        if data_key is None:
            return None
        assert items.keyring is not None
        is_old = data_key.made_at <= time.time() - max_age_s
        if is_old:
            data_key = data_key.renewed(items.keyring.cipher)
            await _set_key(items, session, root, data_key)
        return data_key, is_old

    try:
        begun = await backend.durable.transact(begin)
    except SealError:
        return Resealed(0, 0, 0, 1)
    if begun is None or not begun[0].has_older:
        return Resealed(0, 0, 0, 0)
    values, left = await _seal_pages(items, backend, root)
    is_dropped = is_due(begun[0]) and await _drop(items, backend, root)
    return Resealed(int(begun[1]), values, int(not is_dropped), left)


async def _locked(items: Items, session: Session, root: str) -> DataKey | None:
    """Return the data key of a root, and lock it; None if it was destroyed."""
    assert items.keyring is not None
    rows = await session.fetch(sql.LOCK_KEY, {"root": root})
    bound = key_place(root)
    if not rows:
        return None
    return await unwrap_key(session, items.keyring, items.opened, rows[0][0], bound)


async def _set_key(items: Items, session: Session, root: str, data_key: DataKey) -> None:
    assert items.keyring is not None
    wrapped = await wrap_key(session, items.keyring, data_key, key_place(root))
    await session.execute(sql.SET_KEY, {"root": root, "data_key": wrapped})


async def _seal_pages(items: Items, backend: Backend, root: str) -> tuple[int, int]:
    values, skipped, size = 0, 0, _MOST_ROWS
    while size == _MOST_ROWS:

        async def body(session: Session, skipped: int = skipped) -> tuple[int, int]:
            return await _seal_page(items, session, root, skipped)

        size, stored = await backend.durable.transact(body)
        values, skipped = values + stored, skipped + size - stored
    return values, skipped


async def _seal_page(items: Items, session: Session, root: str, skipped: int) -> tuple[int, int]:
    data_key = await _locked(items, session, root)
    if data_key is None:
        return 0, 0
    codec = codec_for(items.serde, data_key, "item", root)
    params = {"root": root, "header": data_key.header, "limit": _MOST_ROWS, "left": skipped}
    rows = await session.fetch(sql.SEALED_ITEMS, params)
    new: list[tuple[Any, ...]] = []
    for prefix, key, type_, exact in rows:
        try:
            opened = codec.open(type_, exact, prefix, key)
        except SealError:
            continue
        new.append((prefix, key, *codec.seal(*opened, prefix, key)))
    if new:
        await session.execute(sql.RESEAL_ITEMS, columns(new, "prefixes", "keys", "types", "exacts"))
        await _add_tokens(items, session, root, codec, new)
    return len(rows), len(new)


async def _add_tokens(
    items: Items, session: Session, root: str, codec: Codec, rows: list[tuple[Any, ...]]
) -> None:
    """Give items their tokens; what cannot be read here is found without."""
    new = []
    for prefix, key, type_, exact in rows if items.index_key is not None else ():
        with suppress(Exception):  # a serializer may raise anything
            found = tokens(items, root, codec.load(type_, exact, prefix, key))[BLIND]
            new.append((prefix, key, orjson.dumps(found).decode()))
    if new:
        await session.execute(sql.ADD_TOKENS, columns(new, "prefixes", "keys", "tokens"))


async def _drop(items: Items, backend: Backend, root: str) -> bool:
    """Drop the keys that were replaced, unless an item needs them; say if they are dropped."""

    async def body(session: Session) -> bool:
        data_key = await _locked(items, session, root)
        if data_key is None:
            return True
        params = {"root": root, "header": data_key.header, "limit": 1, "left": 0}
        if await session.fetch(sql.SEALED_ITEMS, params):
            return False
        await _set_key(items, session, root, data_key.alone())
        return True

    return await backend.durable.transact(body)


async def shred_root(items: Items, backend: Backend, root: str) -> None:
    """
    Destroy the data key of a root.

    Raises:
        InvalidInputError: It has none.
    """

    async def body(session: Session) -> bool:
        await session.execute(sql.GUARD_ROOT_ALONE, {"root": root})  # what is being put is first
        if not root or not await session.fetch(sql.SET_KEY, {"root": root, "data_key": SHREDDED}):
            return False
        await session.execute(sql.FORGET_TOKENS, {"root": root})
        return True

    if not await backend.durable.transact(body):
        raise InvalidInputError(
            f"no sealed item was ever put under {root!r}, or it was shredded; nothing was changed"
        )
    items.data_keys[root] = RootKey(SHREDDED, None)
