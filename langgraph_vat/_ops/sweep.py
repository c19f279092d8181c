"""
Let go of what has been kept for long enough.

A sweep walks over the threads once, and takes those that their policy says have
expired by the same way as a caller who deletes or prunes one: closed in Redis,
flushed, under their locks; those that go altogether a few at a time. There the
policy is asked again, so a thread that somebody uses just now is left alone. Any
number of processes may sweep, and die while they do: a thread is swept whole or
not at all.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple

import orjson

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat._ops.history import flush_waiting
from langgraph_vat._ops.retention import keep
from langgraph_vat._ops.shared import Shared, recount
from langgraph_vat._ops.threads import change_histories, change_history
from langgraph_vat._ops.tiers import change_row
from langgraph_vat._records import Fence, Swept
from langgraph_vat.errors import QuarantinedError
from langgraph_vat.settings import Retention

logger = logging.getLogger("langgraph_vat")

_PAGE = 256
# Threads, and about how many checkpoints, of one transaction: whoever needs one of them waits.
_MOST_THREADS = 16
_MOST_STEPS = 200


class _LeftAloneError(Exception):
    """The thread is not due any more, or was only looked at: its transaction is rolled back."""


class _Due(NamedTuple):
    """What a policy says of a thread, which was at this fence."""

    thread_id: str
    is_expired: bool
    strategy: str
    keep_last: int | None
    steps: int
    bytes: int
    generation: str
    history: int

    @property
    def is_deletion(self) -> bool:
        return self.is_expired and self.strategy == "delete"


async def sweep(
    shared: Shared, backend: Backend, policy: Retention | None, *, prefix: str, is_dry: bool
) -> Swept:
    """
    Delete or prune the threads that have expired; return how much went.

    Args:
        shared: The memory of this process.
        backend: Both tiers.
        policy: That of threads without their own; None to keep those for ever.
        prefix: What the stored thread ids begin with.
        is_dry: Whether to find out only what would go.
    """
    await count_reads(shared, backend)
    params: dict[str, Any] = {"policy": to_json(policy), "prefix": prefix, "limit": _PAGE}
    after, size, swept = "", _PAGE, Swept(0, 0, 0)
    while size == _PAGE:
        rows = await backend.durable.fetch(sql.SELECT_DUE, {**params, "after": after})
        page = [_Due(*row) for row in rows]
        for some in _batches([due for due in page if due.is_deletion and not is_dry]):
            swept = _sum(swept, await _delete(shared, backend, some, params))
        for due in [due for due in page if is_dry or not due.is_deletion]:
            one_by_one = _look if is_dry else _prune
            swept = _sum(swept, await one_by_one(shared, backend, due, params))
        after, size = rows[-1][0] if rows else after, len(rows)
    return swept


def _sum(swept: Swept, more: Swept) -> Swept:
    return Swept(*map(sum, zip(swept, more, strict=True)))


def _batches(page: Sequence[_Due]) -> Iterator[list[_Due]]:
    """Divide threads so that no transaction deletes many checkpoints, or has many closed."""
    batch: list[_Due] = []
    for due in page:
        is_full = len(batch) == _MOST_THREADS or sum(o.steps for o in batch) >= _MOST_STEPS
        if is_full:
            yield batch
            batch = []
        batch.append(due)
    if batch:
        yield batch


async def _delete(
    shared: Shared, backend: Backend, batch: Sequence[_Due], params: dict[str, Any]
) -> Swept:
    """Delete threads that are due under their locks, too; return what went."""
    gone: dict[str, Swept] = {}

    async def body(session: Session, threads: Collection[str]) -> Collection[str]:
        # What one of them cannot store yet is newer than its rows.
        stored = [one for one in threads if one not in shared.quarantine]
        rows = await session.fetch(sql.ARE_DUE, {**params, "threads": stored})
        still = [due for due in map(_Due._make, rows) if due.is_deletion]
        gone.clear()
        gone.update({due.thread_id: Swept(1, due.steps, due.bytes) for due in still})
        await session.execute(sql.DELETE_ROWS, {"threads": list(gone)})
        return list(gone)

    fences = {due.thread_id: Fence(due.generation, due.history) for due in batch}
    try:
        done = await change_histories(
            shared, backend, fences, body, is_deletion=True, is_flushed=True
        )
    except QuarantinedError:  # of a single one; told where it was found
        others = [due for due in batch if due.thread_id not in shared.quarantine]
        return await _delete(shared, backend, others, params) if others else Swept(0, 0, 0)
    for thread_id in fences.keys() - set(done):
        await _note_others(shared, backend, thread_id)
    swept = Swept(0, 0, 0)
    for thread_id in done:
        swept = _sum(swept, gone[thread_id])
    return swept


async def _note_others(shared: Shared, backend: Backend, thread_id: str) -> None:
    """Count a thread as used just now, if it has steps of savers that do not tell."""

    async def body(session: Session) -> None:
        if await session.fetch(sql.TOUCH_STRANGER, {"thread": thread_id}):
            await recount(shared, session, thread_id)

    await backend.durable.transact(body)


async def _prune(shared: Shared, backend: Backend, due: _Due, params: dict[str, Any]) -> Swept:
    """Prune a thread if it is due under its lock, too; return what went."""
    gone = Swept(0, 0, 0)

    async def body(session: Session, _: Fence) -> None:
        nonlocal gone
        gone = await _pruned(shared, session, due, params)

    try:
        await change_history(shared, backend, due.thread_id, body)
    except _LeftAloneError:
        await _note_others(shared, backend, due.thread_id)
        return Swept(0, 0, 0)
    except QuarantinedError:  # told where it was found
        return Swept(0, 0, 0)
    return gone


async def _look(shared: Shared, backend: Backend, due: _Due, params: dict[str, Any]) -> Swept:
    """Return what would go, if it did not stay."""
    gone = Swept(0, 0, 0)

    async def body(session: Session) -> None:
        nonlocal gone
        await session.fetch(sql.LOCK_THREADS, {"threads": [due.thread_id]})
        gone = await _pruned(shared, session, due, params)
        raise _LeftAloneError

    with suppress(QuarantinedError, _LeftAloneError):
        await flush_waiting(shared, backend, due.thread_id)
        await backend.durable.transact(body)
    return gone


async def _pruned(shared: Shared, session: Session, due: _Due, params: dict[str, Any]) -> Swept:
    """Prune a thread that is locked; of one that is to be deleted, tell what it has."""
    only = {**params, "thread": due.thread_id, "threads": [due.thread_id]}
    rows = await session.fetch(sql.ARE_DUE, only)
    if not rows or _Due(*rows[0])[:4] != due[:4]:
        raise _LeftAloneError
    if due.is_deletion:
        return Swept(1, *rows[0][4:6])
    await recount(shared, session, due.thread_id)
    before = (await session.fetch(sql.SELECT_SIZE, only))[0]
    most = 1 if due.is_expired else due.keep_last or 1
    await keep(shared, session, due.thread_id, most)
    await session.execute(sql.NOTE_KEPT, {**only, "most": most})
    after = (await session.fetch(sql.SELECT_SIZE, only))[0]
    return Swept(1, before[0] - after[0], before[1] - after[1])


async def count_reads(shared: Shared, backend: Backend) -> None:
    """Have what this process read count as used, where the policy says so."""
    read, shared.read = shared.read, set()
    if read:
        await backend.durable.fetch(sql.TOUCH_THREADS, {"threads": sorted(read)})


async def sweep_in_turn(shared: Shared, backend: Backend) -> None:
    """Sweep, unless some process has done so within the interval."""
    policy = shared.settings.retention
    await count_reads(shared, backend)
    if policy is None or policy.sweep_interval_minutes is None:
        return
    params = {"seconds": policy.sweep_interval_minutes * 60}
    if await change_row(backend, sql.CLAIM_SWEEP, params):
        swept = await sweep(shared, backend, policy, prefix="", is_dry=False)
        logger.info(
            "swept %d threads: %d checkpoints, %d bytes",
            swept.threads,
            swept.checkpoints,
            swept.bytes,
        )


def to_json(policy: Retention | None) -> str | None:
    """Return a policy as the statements read it."""
    if policy is None:
        return None
    return orjson.dumps({one.name: getattr(policy, one.name) for one in fields(policy)}).decode()
