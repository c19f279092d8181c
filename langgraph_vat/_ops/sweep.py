"""
Let go of what has been kept for long enough.

A sweep walks over the threads once, and takes each that its policy says has
expired by the same way as a caller who deletes or prunes it: closed in Redis,
flushed, under its lock. There the policy is asked again, so a thread that
somebody uses just now is left alone. Any number of processes may sweep, and
die while they do: a thread is swept whole or not at all.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import orjson

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._io.protocols import Backend, Session
from langgraph_vat._ops.history import flush_waiting
from langgraph_vat._ops.retention import delete_rows, keep
from langgraph_vat._ops.shared import Shared, recount
from langgraph_vat._ops.threads import change_history
from langgraph_vat._ops.tiers import change_row
from langgraph_vat._records import Fence, Swept
from langgraph_vat.settings import Retention

logger = logging.getLogger("langgraph_vat")

_PAGE = 256


class _LeftAloneError(Exception):
    """The thread is not due any more, or was only looked at: its transaction is rolled back."""


@dataclass(frozen=True, slots=True)
class _Due:
    """What a policy says of a thread."""

    thread_id: str
    is_expired: bool
    strategy: str
    keep_last: int | None

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
        for due in [_Due(*row[:4]) for row in rows]:
            after = due.thread_id
            try:
                gone = await _sweep_one(shared, backend, due, params, is_dry=is_dry)
            except _LeftAloneError:
                await _note_others(shared, backend, due.thread_id)
            else:
                swept = Swept(*map(sum, zip(swept, gone, strict=True)))
        size = len(rows)
    return swept


async def _note_others(shared: Shared, backend: Backend, thread_id: str) -> None:
    """Count a thread as used just now, if it has steps of savers that do not tell."""

    async def body(session: Session) -> None:
        if await session.fetch(sql.TOUCH_STRANGER, {"thread": thread_id}):
            await recount(shared, session, thread_id)

    await backend.durable.transact(body)


async def _sweep_one(
    shared: Shared, backend: Backend, due: _Due, params: dict[str, Any], *, is_dry: bool
) -> Swept:
    """Sweep a thread if it is due under its lock, too; return what went."""
    only, gone = {**params, "thread": due.thread_id}, Swept(0, 0, 0)

    async def body(session: Session, _: Fence | None) -> None:
        nonlocal gone
        rows = await session.fetch(sql.IS_DUE, only)
        if not rows or _Due(*rows[0][:4]) != due:
            raise _LeftAloneError
        if due.is_deletion:
            gone = Swept(1, *rows[0][4:])
            await delete_rows(session, due.thread_id)
            return
        await recount(shared, session, due.thread_id)
        before = (await session.fetch(sql.SELECT_SIZE, only))[0]
        most = 1 if due.is_expired else due.keep_last or 1
        await keep(shared, session, due.thread_id, most)
        await session.execute(sql.NOTE_KEPT, {**only, "most": most})
        after = (await session.fetch(sql.SELECT_SIZE, only))[0]
        gone = Swept(1, before[0] - after[0], before[1] - after[1])

    async def look(session: Session) -> None:
        await session.fetch(sql.LOCK_THREADS, {"threads": [due.thread_id]})
        await body(session, None)
        raise _LeftAloneError

    if is_dry:
        await flush_waiting(shared, backend, due.thread_id)
        with suppress(_LeftAloneError):
            await backend.durable.transact(look)
        return gone
    done = await change_history(
        shared, backend, due.thread_id, body, is_deletion=due.is_deletion, is_flushed=True
    )
    return gone if done else Swept(0, 0, 0)


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
