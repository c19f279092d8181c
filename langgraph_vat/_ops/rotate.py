"""
Wrap the data keys anew, under the key that is the keyring's primary one now.

Nothing that they sealed is touched: of a thread, or of a root of the store, it
is one small row. It may be stopped at any moment and run again: what is
wrapped by the primary key is passed over.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, LiteralString

from langgraph_vat._durable import checkpoints, items
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Durable, Row, Session
from langgraph_vat._records import Rotated
from langgraph_vat._seal.associated_data import associated_data
from langgraph_vat.errors import SealError
from langgraph_vat.keyring import Keyring, KeyWrapper

logger = logging.getLogger("langgraph_vat")

_PAGE = 256
# Whoever is far away takes his time, and while he does nobody flushes these threads.
_FEW = 8


async def rotate_threads(durable: Durable, keyring: KeyWrapper, prefix: str) -> Rotated:
    """
    Wrap the data keys of threads anew whose stored ids begin with `prefix`.

    Of all threads, the key of the blind indexes, too.
    """

    def bound(thread_id: str, generation: str) -> bytes:
        return associated_data("data key", "checkpoint", thread_id, generation)

    statements = checkpoints.SELECT_DATA_KEYS, checkpoints.REPLACE_DATA_KEYS
    done = await _rotate(durable, keyring, {"prefix": prefix}, statements, bound)
    if prefix:
        return done
    statements = checkpoints.LOCK_INDEX_KEY, checkpoints.REPLACE_INDEX_KEY
    return _sum(done, await _rotate(durable, keyring, {}, statements, _index_key("checkpoint")))


async def rotate_roots(durable: Durable, keyring: KeyWrapper, only: str = "") -> Rotated:
    """
    Wrap the data keys of the store's roots anew; of `only` one, or "" for all.

    Of all roots, the key of the blind indexes, too.
    """

    def bound(root: str) -> bytes:
        return associated_data("data key", "store", root)

    statements = items.SELECT_KEYS, items.REPLACE_KEYS
    done = await _rotate(durable, keyring, {"only": only}, statements, bound)
    if only:
        return done
    statements = items.LOCK_INDEX_KEY, items.REPLACE_KEYS
    return _sum(done, await _rotate(durable, keyring, {}, statements, _index_key("store")))


def _index_key(kind: str) -> Callable[..., bytes]:
    """Return what gives the place of the key of the blind indexes, which has no other owner."""
    return lambda _: associated_data("index key", kind)


def _sum(one: Rotated, other: Rotated) -> Rotated:
    return Rotated(one.rotated + other.rotated, one.left + other.left)


async def _rotate(
    durable: Durable,
    keyring: KeyWrapper,
    params: dict[str, Any],
    statements: tuple[LiteralString, LiteralString],
    bound: Callable[..., bytes],
) -> Rotated:
    select, replace = statements
    most = _PAGE if isinstance(keyring, Keyring) else _FEW
    after, size, done = "", most, Rotated(0, 0)
    while size == most:

        async def body(session: Session, after: str = after) -> tuple[list[Row], Rotated]:
            # Locked in their order, so that nobody waits for each other.
            rows = await session.fetch(select, {**params, "after": after, "limit": most})
            work = partial(_wrapped_anew, keyring, rows, bound)
            new, left = work() if isinstance(keyring, Keyring) else await session.run(work)
            if new:
                await session.execute(replace, columns(new, "owners", "data_keys"))
            return rows, Rotated(len(new), left)

        rows, found = await durable.transact(body)
        done = _sum(done, found)
        size, after = len(rows), rows[-1][0] if rows else after
    if done.left:
        logger.warning(
            "%d data keys were wrapped by a key that the keyring does not have, or were changed;"
            " they were left as they are",
            done.left,
        )
    return done


def _wrapped_anew(
    keyring: KeyWrapper, rows: list[Row], bound: Callable[..., bytes]
) -> tuple[list[tuple[str, bytes]], int]:
    new, left = [], 0
    for *owner, wrapped in rows:
        if keyring.is_current(wrapped):
            continue
        try:
            secret = keyring.unwrap(wrapped, associated_data=bound(*owner))
        except SealError:
            left += 1
        else:
            new.append((owner[0], keyring.wrap(secret, associated_data=bound(*owner))))
    return new, left
