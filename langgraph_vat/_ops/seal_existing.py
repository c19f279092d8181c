"""
Seal the threads that are in the clear.

1. A thread is sealed whole, by one transaction, or not at all: its rows a page at a
   time, and with them its data key. Whoever reads sees it before or after, and never
   a row in the clear beside the key.
2. It is a change of history: closed in Redis, what waits there flushed, its heads
   dropped before the commit. So nothing of it in the clear is left in Redis, and who
   takes a step learns the key. Without Redis, where there is one, nothing is sealed.
3. A step that another process took before, and still has alone, is sealed when it
   flushes it.

It may be stopped at any moment and run again. A thread whose rows cannot all be sealed
is left as it is, and counted.
"""

import logging

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._hot import scripts
from langgraph_vat._io.protocols import Backend, Hot, HotTierError, Session
from langgraph_vat._ops.keys import wrap_key
from langgraph_vat._ops.plain import Sealer, seal_thread, told
from langgraph_vat._ops.shared import Known, Shared, key_place, open_tokens, recount
from langgraph_vat._ops.threads import change_history, find
from langgraph_vat._ops.tiers import degrade
from langgraph_vat._records import Fence, Sealed
from langgraph_vat._seal.data_key import DataKey
from langgraph_vat.errors import (
    ConfigurationError,
    InvalidInputError,
    RefusedError,
    SealError,
    UnavailableError,
    UnreadableError,
)
from langgraph_vat.keyring import KeyWrapper
from langgraph_vat.settings import Settings

logger = logging.getLogger("langgraph_vat")

# Of one thread or root, which is left; the others are sealed.
REFUSALS = (SealError, InvalidInputError, RefusedError, UnreadableError)
_PAGE = 256
# Heads of one script.
_MOST_HEADS = 500


def check_window(keyring: KeyWrapper | None, settings: Settings) -> None:
    """
    Refuse to seal what nobody said is to be believed.

    Raises:
        ConfigurationError: There is no keyring, or no time until when plaintext is accepted.
    """
    if keyring is None:
        raise ConfigurationError("there is no keyring to seal with; pass keyring=")
    if not settings.is_plaintext_accepted:
        raise ConfigurationError(
            "what is in the clear may be anybody's, and accept_plaintext has ended or was not set;"
            " nothing was sealed. Set it to a time in the future."
        )


async def seal_existing(
    shared: Shared, backend: Backend, serde: SerializerProtocol, *, prefix: str
) -> Sealed:
    """Seal the threads whose stored ids begin with `prefix`, and that have no data key."""
    await open_tokens(shared, backend)
    params = {"after": "", "prefix": prefix, "limit": _PAGE}
    while rows := await backend.durable.fetch(sql.NEXT_STRANGER, params):
        params["after"] = rows[0][0]
        await find(shared, backend, rows[0][0], create=False)  # which adds its fence
    after, size, done = "", _PAGE, Sealed(0, 0, 0)
    if not prefix:  # the pages begin behind it
        done = await _seal_one(shared, backend, serde, "")
    while size == _PAGE:
        rows = await backend.durable.fetch(sql.PLAIN_THREADS, {**params, "after": after})
        for (after,) in rows:
            one = await _seal_one(shared, backend, serde, after)
            done = Sealed(*map(sum, zip(done, one, strict=True)))
        size = len(rows)
    return done


async def _seal_one(
    shared: Shared, backend: Backend, serde: SerializerProtocol, thread_id: str
) -> Sealed:
    done = Sealed(0, 0, 0)

    async def body(session: Session, fence: Fence) -> None:
        nonlocal done
        done = await _seal(shared, session, backend, serde, thread_id, fence)

    try:
        await change_history(shared, backend, thread_id, body, needs_hot=True)
    except REFUSALS as error:
        logger.warning("thread %r could not be sealed: %s", thread_id, told(error))
        return Sealed(0, 0, 1)
    return done


async def _seal(
    shared: Shared,
    session: Session,
    backend: Backend,
    serde: SerializerProtocol,
    thread_id: str,
    fence: Fence,
) -> Sealed:
    check_window(shared.keyring, shared.settings)
    assert shared.keyring is not None
    rows = await session.fetch(sql.SELECT_DATA_KEY, {"thread": thread_id})
    if rows[0][0] is not None:
        return Sealed(0, 0, 0)  # by somebody else
    data_key = DataKey.generate(shared.keyring.cipher)
    bound = key_place(thread_id, fence.generation)
    wrapped = await wrap_key(session, shared.keyring, data_key, bound)
    if backend.hot is not None:
        await _drop_heads(shared, session, backend, backend.hot, thread_id)
    codec = Known(fence, data_key).codec(serde, thread_id)
    values = await seal_thread(session, thread_id, Sealer(shared, thread_id, serde, codec))
    await session.execute(sql.GIVE_DATA_KEY, {"thread": thread_id, "data_key": wrapped})
    await recount(shared, session, thread_id)
    return Sealed(1, values, 0)


async def _drop_heads(
    shared: Shared, session: Session, backend: Backend, hot: Hot, thread_id: str
) -> None:
    rows = await session.fetch(sql.SELECT_NAMESPACES, {"thread": thread_id})
    heads = [shared.keys.head(thread_id, ns) for (ns,) in rows]
    try:
        for start in range(0, len(heads), _MOST_HEADS):
            some = heads[start : start + _MOST_HEADS]
            await hot.script(scripts.VOID, [shared.keys.meta(thread_id), *some], [])
    except HotTierError:
        await degrade(shared, backend)
        raise UnavailableError(
            f"Redis does not answer, and may hold thread {thread_id!r} in the clear; it was not"
            " sealed. Repeat it when Redis is back."
        ) from None
