"""
Seal what is stored anew, under new data keys; or destroy a data key.

1. The thread's new data key is committed with a new fence, so whoever takes a
   step learns it. The old one stays behind it and opens what it sealed.
2. Rows are sealed anew, some at a time, under the thread's lock. Who looks up
   the key after the rows can open both.
3. The old one is dropped when no row needs it, and no sooner than a day later: a
   step that a process still held when the key changed comes late.

It may be stopped at any moment and run again. Values that do not open are left
alone, and counted.
"""

import logging
import time
from contextlib import suppress
from math import inf
from typing import Any

import orjson
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Backend, Row, Session
from langgraph_vat._ops.address import tenant_of
from langgraph_vat._ops.keys import wrap_key
from langgraph_vat._ops.rows import EXACTS, KINDS, Kind, exact_place, store
from langgraph_vat._ops.shared import (
    NO_SERDE,
    SHREDDED,
    Shared,
    key_place,
    known_in,
    open_tokens,
    tokens,
)
from langgraph_vat._ops.threads import change_history, find
from langgraph_vat._records import Fence, Resealed
from langgraph_vat._seal.codec import Codec
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import ConfigurationError, InvalidInputError, SealError
from langgraph_vat.keyring import KeyWrapper

logger = logging.getLogger("langgraph_vat")

_PAGE = 256
# Rows of one transaction: while it runs, a step of that thread waits to be flushed.
_MOST_ROWS = 64
# For how long a key that was replaced still opens what comes late, in seconds.
KEPT_S = 86_400


async def seal_rows(
    session: Session,
    thread_id: str,
    source: Codec,
    target: Codec,
    data_key: DataKey,
) -> None:
    """
    Seal all rows of a thread anew that `data_key` did not.

    Raises:
        SealError: One of them does not open.
    """
    for kind in KINDS:
        params = {"thread": thread_id, "header": data_key.header, "limit": None, "left": 0}
        rows = await session.fetch(kind.select, params)
        await store(session, thread_id, kind, [_again(kind, source, target, row) for row in rows])


def _again(kind: Kind, source: Codec, target: Codec, row: Row) -> tuple[Any, ...]:
    """Return a row's key and its value under another seal."""
    *where, type_, data = row
    place = kind.place(*where)
    return kind.new(row, target.seal(*source.open(type_, data, *place), *place))


def check_age(keyring: KeyWrapper | None, max_age_s: Any) -> None:
    """
    Refuse what nothing can be resealed by.

    Raises:
        ConfigurationError: There is no keyring.
        InvalidInputError: `max_age_s` is no time.
    """
    if keyring is None:
        raise ConfigurationError("there is no keyring to seal with; pass keyring=")
    is_number = isinstance(max_age_s, int | float) and not isinstance(max_age_s, bool)
    if not is_number or not 0 <= max_age_s < inf:
        raise InvalidInputError("max_age_s must be a number of seconds; nothing was sealed anew")


def is_due(data_key: DataKey) -> bool:
    """Whether what a data key replaced may be dropped, as far as time goes."""
    return data_key.has_older and data_key.made_at <= time.time() - KEPT_S


async def reseal(
    shared: Shared, backend: Backend, serde: SerializerProtocol, *, prefix: str, max_age_s: float
) -> Resealed:
    """
    Reseal the threads whose stored ids begin with `prefix`, and whose data key is so old.

    Metadata gets the tokens that it should have; `serde` made it.
    """
    await open_tokens(shared, backend)
    after, done, size = "", Resealed(0, 0, 0, 0), _PAGE
    while size == _PAGE:
        params = {"after": after, "prefix": prefix, "limit": _PAGE}
        rows = await backend.durable.fetch(sql.SEALED_THREADS, params)
        for (after,) in rows:
            one = await _reseal_one(shared, backend, serde, after, max_age_s)
            done = Resealed(*map(sum, zip(done, one, strict=True)))
        size = len(rows)
    if done.left:
        logger.warning("%d sealed values, or threads, do not open and were left", done.left)
    return done


async def _reseal_one(
    shared: Shared, backend: Backend, serde: SerializerProtocol, thread_id: str, max_age_s: float
) -> Resealed:
    try:
        known = await find(shared, backend, thread_id, create=False)
    except SealError:
        return Resealed(0, 0, 0, 1)
    if known is None or known.data_key is None:
        return Resealed(0, 0, 0, 0)  # deleted meanwhile
    is_old = known.data_key.made_at <= time.time() - max_age_s
    if not is_old and not known.data_key.has_older:
        return Resealed(0, 0, 0, 0)
    if is_old:
        await _renew(shared, backend, thread_id, known.data_key.header)
    values, left = await _seal_pages(shared, backend, serde, thread_id)
    is_dropped = not is_old and is_due(known.data_key) and await _drop(shared, backend, thread_id)
    return Resealed(int(is_old), values, int(not is_dropped), left)


async def _renew(shared: Shared, backend: Backend, thread_id: str, header: bytes) -> None:
    """Give a thread a new data key, unless it has another than that already."""

    async def body(session: Session, fence: Fence) -> None:
        assert shared.keyring is not None
        present = await known_in(shared, session, thread_id, fence)
        if present and present.data_key and present.data_key.header == header:
            await _set_key(
                shared, session, thread_id, fence, present.data_key.renewed(shared.keyring.cipher)
            )

    await change_history(shared, backend, thread_id, body)


async def _set_key(
    shared: Shared, session: Session, thread_id: str, fence: Fence, data_key: DataKey
) -> None:
    assert shared.keyring is not None
    bound = key_place(thread_id, fence.generation)
    wrapped = await wrap_key(session, shared.keyring, data_key, bound)
    await session.execute(sql.SET_DATA_KEY, {"thread": thread_id, "data_key": wrapped})


async def _seal_pages(
    shared: Shared, backend: Backend, serde: SerializerProtocol, thread_id: str
) -> tuple[int, int]:
    """Seal what another key sealed anew, a page at a time; return how much, and what is left."""
    values = left = 0
    for kind in KINDS:
        skipped, size = 0, _MOST_ROWS
        while size == _MOST_ROWS:

            async def body(session: Session, kind: Kind = kind, skipped: int = skipped) -> Any:
                return await _seal_page(shared, session, serde, thread_id, kind, skipped)

            size, stored = await backend.durable.transact(body)
            values, skipped = values + stored, skipped + size - stored
        left += skipped
    return values, left


async def _seal_page(
    shared: Shared,
    session: Session,
    serde: SerializerProtocol,
    thread_id: str,
    kind: Kind,
    skipped: int,
) -> tuple[int, int]:
    rows = await session.fetch(sql.LOCK_THREADS, {"threads": [thread_id]})
    known = await known_in(shared, session, thread_id, Fence(*rows[0][1:3])) if rows else None
    if known is None or known.data_key is None:
        return 0, 0  # deleted meanwhile, or shredded
    codec = known.codec(NO_SERDE, thread_id)
    header = known.data_key.header
    params = {"thread": thread_id, "header": header, "limit": _MOST_ROWS, "left": skipped}
    found = await session.fetch(kind.select, params)
    new = []
    for row in found:
        try:
            new.append(_again(kind, codec, codec, row))
        except SealError:
            continue
    await store(session, thread_id, kind, new)
    if kind is EXACTS and shared.index_key is not None:
        await _add_tokens(shared, session, thread_id, known.codec(serde, thread_id), new)
    return len(found), len(new)


async def _add_tokens(
    shared: Shared, session: Session, thread_id: str, codec: Codec, rows: list[tuple[Any, ...]]
) -> None:
    """Give metadata its tokens; what cannot be read here is found without."""
    new = []
    for ns, checkpoint_id, type_, exact in rows:
        with suppress(Exception):  # a serializer may raise anything
            metadata, _ = codec.load(type_, exact, *exact_place(ns, checkpoint_id))
            found = tokens(shared, tenant_of(thread_id), metadata)
            new.append((ns, checkpoint_id, orjson.dumps(found).decode()))
    if new:
        params = {"thread": thread_id, **columns(new, "namespaces", "ids", "tokens")}
        await session.execute(sql.ADD_TOKENS, params)


async def _drop(shared: Shared, backend: Backend, thread_id: str) -> bool:
    """Drop the keys that were replaced, unless a row needs them; say if they are dropped."""
    is_dropped = False

    async def body(session: Session, fence: Fence) -> None:
        nonlocal is_dropped
        known = await known_in(shared, session, thread_id, fence)
        if known is None or known.data_key is None or not is_due(known.data_key):
            return
        params = {"thread": thread_id, "header": known.data_key.header, "limit": 1, "left": 0}
        is_dropped = not any([await session.fetch(kind.select, params) for kind in KINDS])
        if is_dropped:
            await _set_key(shared, session, thread_id, fence, known.data_key.alone())

    await change_history(shared, backend, thread_id, body)
    return is_dropped


async def shred(shared: Shared, backend: Backend, thread_id: str) -> None:
    """
    Destroy a thread's data key.

    Raises:
        InvalidInputError: There is no such thread, or it is not sealed.
    """
    is_shredded = False

    async def body(session: Session, _: Fence) -> None:
        nonlocal is_shredded
        params = {"thread": thread_id, "data_key": SHREDDED}
        is_shredded = bool(await session.fetch(sql.SET_DATA_KEY, params))
        if is_shredded:
            await session.execute(sql.FORGET_TOKENS, {"thread": thread_id})

    if not await change_history(shared, backend, thread_id, body) or not is_shredded:
        raise InvalidInputError(
            f"there is no sealed thread {thread_id!r} to shred; nothing was changed. What is not"
            " sealed has no key to destroy: delete it."
        )


async def shred_all(shared: Shared, backend: Backend, prefix: str) -> int:
    """Shred the sealed threads whose stored ids begin with `prefix`; return how many."""
    shredded = 0
    params = {"after": "", "prefix": prefix, "limit": _PAGE}
    while rows := await backend.durable.fetch(sql.SEALED_THREADS, params):
        for (thread_id,) in rows:
            with suppress(InvalidInputError):  # deleted meanwhile
                await shred(shared, backend, thread_id)
                shredded += 1
        params["after"] = rows[-1][0]
    return shredded
