"""
Store what is there in the other form: compact, or as PostgresSaver reads it.

What a value says does not change, so heads, fences and journals go on as they
are. A transaction takes some rows of a thread under its lock. It may be
stopped after any of them and run again: what has the wanted form is passed
over. Values that cannot be opened are left alone, and counted.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, LiteralString

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.packing import LEAST, pack
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Backend, Row, Session
from langgraph_vat._ops.compact import BlobKey, pack_stored
from langgraph_vat._ops.history import flush_waiting
from langgraph_vat._ops.shared import NO_SERDE, Shared, known_in
from langgraph_vat._ops.threads import find, recount_alone
from langgraph_vat._ops.values import Unpacker, blob_place, write_place
from langgraph_vat._records import Blob, Fence, Rewritten, Write
from langgraph_vat._seal.codec import Codec
from langgraph_vat.errors import SealError

logger = logging.getLogger("langgraph_vat")

# Rows of one transaction: while it runs, a step of that thread waits to be flushed.
_MOST_ROWS = 32


@dataclass(frozen=True, slots=True)
class _Task:
    """A thread to rewrite, and into which form."""

    thread_id: str
    codec: Codec
    is_compact: bool


async def rewrite(shared: Shared, backend: Backend, *, prefix: str, is_compact: bool) -> Rewritten:
    """Rewrite all threads whose stored ids begin with `prefix`; return what was done."""
    done, after = Rewritten(0, 0, 0), ""
    params = {"prefix": prefix}
    while rows := await backend.durable.fetch(sql.NEXT_THREAD, {**params, "after": after}):
        after = rows[0][0]
        try:
            known = await find(shared, backend, after, create=False)
        except SealError:
            done = done._replace(left=done.left + 1)
            continue
        if known is not None:
            await flush_waiting(shared, backend, after)
            one = await _thread(shared, backend, after, known.fence, is_compact=is_compact)
            done = Rewritten(*map(sum, zip(done, one, strict=True)))
    return done


async def _thread(
    shared: Shared, backend: Backend, thread_id: str, fence: Fence, *, is_compact: bool
) -> Rewritten:
    values = left = 0
    for page, places in ((_blobs, 3), (_writes, 4)):
        after: Sequence[Any] = ("", "", "", -1)[:places]
        is_more = True
        while is_more:

            async def body(
                session: Session, after: Sequence[Any] = after, page: Any = page
            ) -> tuple[list[Row], int]:
                rows = await session.fetch(sql.LOCK_THREADS, {"threads": [thread_id]})
                if not rows or rows[0][1] != fence.generation:
                    return [], 0
                # Its key may be another one by now.
                known = await known_in(shared, session, thread_id, Fence(*rows[0][1:3]))
                if known is None:
                    return [], 0
                task = _Task(thread_id, known.codec(NO_SERDE, thread_id), is_compact)
                found: tuple[list[Row], int] = await page(session, task, after)
                return found

            rows, rewritten = await backend.durable.transact(body)
            values, left = values + rewritten, left + len(rows) - rewritten
            is_more = len(rows) == _MOST_ROWS
            after = rows[-1][:places] if rows else after
    await recount_alone(shared, backend, thread_id)
    if left:
        logger.warning("%d values of thread %r cannot be opened", left, thread_id)
    return Rewritten(1, values, left)


async def _blobs(session: Session, task: _Task, after: Sequence[Any]) -> tuple[list[Row], int]:
    """Rewrite values of channels; return the rows looked at, and how many were rewritten."""
    names = ("namespace", "channel", "version")
    statement = sql.SELECT_LOOSE_BLOBS if task.is_compact else sql.SELECT_PACKED_BLOBS
    rows = await _page(session, task, statement, dict(zip(names, after, strict=True)))
    if not rows:
        return rows, 0
    if task.is_compact:
        values: dict[BlobKey, tuple[str, bytes]] = {}
        for ns, channel, version, type_, data, *_ in rows:
            key = task.thread_id, ns, channel, version
            with suppress(SealError):
                values[key] = task.codec.open(type_, data, *blob_place(*key[1:]))
        bases = {(task.thread_id, *row[:3]) for row in rows if row[-1]}
        packed = await pack_stored(session, task.codec, task.thread_id, values, bases)
        new = [(*key, *value.columns) for key, value in packed.items()]
    else:
        new = [
            (task.thread_id, *key, *value, None, "[]")
            for key, value in (await _whole(session, task, rows)).items()
        ]
    names_ = ("threads", "namespaces", "channels", "versions", "types", "blobs", "steps", "bases")
    if new:
        await session.execute(sql.INSERT_BLOBS, columns(new, *names_))
    return rows, len(new)


async def _whole(
    session: Session, task: _Task, rows: Sequence[Row]
) -> dict[tuple[str, str, str], tuple[str, bytes]]:
    """Return values without anything that they build on, sealed again."""
    needed = {
        (task.thread_id, ns, channel, base)
        for ns, channel, _, _, _, bases, _ in rows
        for base in bases or ()
    }
    unpackers = await _unpackers(session, task, {row[0] for row in rows}, needed)
    found = {}
    for ns, channel, version, type_, data, builds_on, _ in rows:
        blob = Blob(channel, version, type_, data, (builds_on or [""])[-1])
        place = blob_place(ns, channel, version)
        with suppress(SealError):
            found[ns, channel, version] = task.codec.seal(*unpackers[ns].blob(blob), *place)
    return found


async def _writes(session: Session, task: _Task, after: Sequence[Any]) -> tuple[list[Row], int]:
    """Likewise of pending writes."""
    names = ("namespace", "checkpoint", "task", "idx")
    statement = sql.SELECT_LOOSE_WRITES if task.is_compact else sql.SELECT_PACKED_WRITES
    rows = await _page(session, task, statement, dict(zip(names, after, strict=True)))
    needed = {(task.thread_id, row[0], row[4], base) for row in rows for base in row[7] or ()}
    unpackers = await _unpackers(session, task, {row[0] for row in rows}, needed)
    new = []
    for ns, checkpoint_id, task_id, idx, channel, type_, data, builds_on in rows:
        write = Write(task_id, idx, "", channel, type_, data, (builds_on or [""])[-1])
        try:
            value = unpackers[ns].write(checkpoint_id, write)
        except SealError:
            continue
        if task.is_compact:
            value = pack(*value)
        place = write_place(ns, checkpoint_id, write)
        new.append((ns, checkpoint_id, task_id, idx, *task.codec.seal(*value, *place)))
    names_ = ("namespaces", "ids", "tasks", "idxs", "types", "blobs")
    if new:
        params = {**columns(new, *names_), "thread": task.thread_id}
        await session.execute(sql.REWRITE_WRITES, params)
    return rows, len(new)


async def _page(
    session: Session, task: _Task, statement: LiteralString, after: dict[str, Any]
) -> list[Row]:
    params = {"thread": task.thread_id, "least": LEAST, "limit": _MOST_ROWS, **after}
    return await session.fetch(statement, params)


async def _unpackers(
    session: Session, task: _Task, namespaces: set[str], needed: set[BlobKey]
) -> dict[str, Unpacker]:
    """Return what opens the values of each namespace, with all that they build on."""
    bases: dict[str, list[Blob]] = {ns: [] for ns in namespaces}
    if needed:
        names = ("threads", "namespaces", "channels", "versions")
        rows = await session.fetch(sql.SELECT_BLOBS, columns(sorted(needed), *names))
        for _, ns, *columns_ in rows:
            bases[ns].append(Blob(*columns_))
    return {ns: Unpacker(task.codec, ns, blobs) for ns, blobs in bases.items()}
