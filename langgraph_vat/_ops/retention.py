"""
What takes history away, or makes more of it: delete, prune, delete runs, copy.

All but the copy's source go through `change_history`, so no delayed flush,
cache fill or dead process's journal brings anything back: an entry carries
the fence it was written under, and Postgres knows the present one.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat._ops.history import flush_waiting
from langgraph_vat._ops.plain import Sealer, seal_thread
from langgraph_vat._ops.reseal import seal_rows
from langgraph_vat._ops.shared import Known, Shared, known_in, open_tokens, recount
from langgraph_vat._ops.threads import change_history, find
from langgraph_vat._records import Fence
from langgraph_vat.errors import InvalidInputError


async def delete_thread(shared: Shared, backend: Backend, thread_id: str) -> None:
    """Delete a thread, its fence and its data key, in both tiers."""

    async def body(session: Session, _: Fence) -> None:
        await session.execute(sql.DELETE_ROWS, {"threads": [thread_id]})

    await change_history(shared, backend, thread_id, body, is_deletion=True)


async def delete_tenant(shared: Shared, backend: Backend, tenant: str) -> int:
    """Delete the threads of a tenant that there are; return how many."""
    deleted = 0
    while rows := await backend.durable.fetch(sql.SELECT_TENANT, {"tenant": tenant}):
        for (thread_id,) in rows:
            await delete_thread(shared, backend, thread_id)
        deleted += len(rows)
    return deleted


async def retain(shared: Shared, backend: Backend, thread_id: str, policy: str | None) -> None:
    """Set a thread's own policy."""
    params = {"thread": thread_id, "retention": policy}
    known = await find(shared, backend, thread_id, create=False)
    if known is None or not await backend.durable.fetch(sql.SET_RETENTION, params):
        raise InvalidInputError(f"there is no thread {thread_id!r} to keep; nothing was written")


async def keep_latest(shared: Shared, backend: Backend, thread_id: str) -> None:
    """Keep the newest checkpoint of each namespace, with its writes and values."""

    async def body(session: Session, _: Fence) -> None:
        await keep(shared, session, thread_id, 1)

    await change_history(shared, backend, thread_id, body)


async def keep(shared: Shared, session: Session, thread_id: str, most: int) -> None:
    """
    Keep so many of the newest checkpoints of each namespace.

    Ancestors stay where a DeltaChannel's value must still be rebuilt from
    their writes.
    """
    only: dict[str, Any] = {"thread": thread_id}
    heads = await session.fetch(sql.SELECT_HEADS, {**only, "most": most})
    for namespace, rows in groupby(heads, key=itemgetter(0)):
        newest = [(checkpoint_id, channels) for _, checkpoint_id, channels in rows]
        params = {**only, "namespace": namespace, "floor": newest[-1][0]}
        kept = {checkpoint_id for checkpoint_id, _ in newest}
        for checkpoint_id, channels in newest:
            if channels:
                chain = {**params, "checkpoint": checkpoint_id, "channels": channels}
                kept |= {row[0] for row in await session.fetch(sql.SELECT_CHAIN, chain)}
        for statement in (sql.PRUNE_WRITES, sql.PRUNE_CHECKPOINTS, sql.RAISE_FLOOR):
            await session.execute(statement, {**params, "kept": sorted(kept)})
    for statement in sql.COLLECT:
        await session.execute(statement, only)
    await recount(shared, session, thread_id)


async def delete_for_runs(
    shared: Shared, backend: Backend, run_ids: Sequence[str], *, prefix: str, is_scoped: bool
) -> None:
    """
    Delete the checkpoints and writes of runs.

    The run ids are noted first: a flush that comes late leaves them out.
    """
    await flush_waiting(shared, backend, None)
    params = {"runs": list(run_ids), "prefix": prefix, "scoped": is_scoped}

    async def note(session: Session) -> None:
        await session.execute(sql.NOTE_DELETED_RUNS, params)

    async def body(thread_id: str, session: Session, _: Fence) -> None:
        for statement in (*sql.DELETE_RUNS, *sql.COLLECT):
            await session.execute(statement, {**params, "thread": thread_id})
        await recount(shared, session, thread_id)

    threads = [row[0] for row in await backend.durable.fetch(sql.THREADS_OF_RUNS, params)]
    await backend.durable.transact(note)
    for thread_id in threads:
        await change_history(shared, backend, thread_id, partial(body, thread_id))


async def copy_thread(
    shared: Shared,
    backend: Backend,
    serde: SerializerProtocol,
    source_id: str,
    target_id: str,
    checkpoint_id: str | None,
) -> None:
    """
    Copy a thread with its whole history, or one checkpoint's, to an id that has none.

    Raises:
        InvalidInputError: There is no such source, or the target has checkpoints.
    """
    if source_id == target_id:
        raise InvalidInputError("a thread cannot be copied onto itself; choose another target id")
    source = await find(shared, backend, source_id, create=False)
    if source is None:
        raise _nothing_to_copy(source_id)
    await flush_waiting(shared, backend, source_id)
    target = await find(shared, backend, target_id, create=True)
    assert target is not None
    await open_tokens(shared, backend)

    async def body(session: Session, fence: Fence) -> None:
        # The source's lock after the target's may deadlock with the opposite copy;
        # Postgres then ends one of the two, and its second attempt succeeds.
        locked = await session.fetch(sql.LOCK_THREADS, {"threads": [source_id]})
        if not locked:
            raise _nothing_to_copy(source_id)  # it was deleted just now
        if (await session.fetch(sql.HAS_ROWS, {"thread": target_id}))[0][0]:
            msg = (
                f"thread {target_id!r} already has checkpoints; nothing was copied. Delete it first"
            )
            raise InvalidInputError(msg)
        # Their keys may be others since they were found.
        present = await known_in(shared, session, source_id, Fence(*locked[0][1:3])) or source
        new = await known_in(shared, session, target_id, fence) or target
        _refuse_mixed((source_id, present), (target_id, new))
        for statement in sql.COPY_ROWS:
            await session.execute(statement, {"thread": source_id, "target": target_id})
        if checkpoint_id is not None:
            await _keep_ancestors(session, source_id, target_id, checkpoint_id)
        await _seal_copy(shared, session, serde, (source_id, present), (target_id, new))
        await recount(shared, session, target_id)

    await change_history(shared, backend, target_id, body)


def _nothing_to_copy(thread_id: str) -> InvalidInputError:
    return InvalidInputError(f"there is no thread {thread_id!r} to copy; nothing was written")


def _refuse_mixed(source: tuple[str, Known], target: tuple[str, Known]) -> None:
    if source[1].is_sealed and not target[1].is_sealed:
        raise InvalidInputError(
            f"thread {source[0]!r} is sealed and {target[0]!r} is not; nothing was copied."
            " Delete it first"
        )


async def _seal_copy(
    shared: Shared,
    session: Session,
    serde: SerializerProtocol,
    source: tuple[str, Known],
    target: tuple[str, Known],
) -> None:
    """Seal rows that were copied as the target's."""
    (source_id, known), (target_id, new) = source, target
    if new.data_key is None:
        return
    codec = new.codec(serde, target_id)
    if known.is_sealed:
        await seal_rows(session, target_id, known.codec(serde, source_id), codec, new.data_key)
    else:
        await seal_thread(session, target_id, Sealer(shared, target_id, serde, codec))


async def _keep_ancestors(
    session: Session, source_id: str, target_id: str, checkpoint_id: str
) -> None:
    params = {"thread": target_id, "namespace": "", "checkpoint": checkpoint_id}
    if not await session.fetch(sql.SELECT_ONE, params):
        raise InvalidInputError(
            f"thread {source_id!r} has no checkpoint {checkpoint_id!r}; nothing was copied"
        )
    for statement in (*sql.KEEP_ANCESTORS, *sql.COLLECT):
        await session.execute(statement, params)
