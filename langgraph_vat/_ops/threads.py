"""
A thread's fence: read it, open the thread in Redis under it, give it a new one.

1. A thread's first put in a generation commits its fence, and with it its
   data key, to Postgres before anything is acknowledged.
2. Redis learns a fence, and a head, only by a fill: draw a ticket, read
   Postgres, set both unless the ticket is void. Every script that changes the
   thread voids it, so a slow fill never overwrites something newer.
3. What changes history (delete, prune, delete runs) closes the thread in
   Redis, does its work under the row lock with a new fence, and opens it
   again. Whoever finds a thread closed for too long abandons the change: it
   raises the fence, so that the change cannot be half in force, and reopens.
"""

import secrets
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import orjson
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.rows import to_blob, to_snapshot
from langgraph_vat._hot import scripts
from langgraph_vat._hot.entries import empty_head, head_pairs, sparse, write_pairs
from langgraph_vat._io.protocols import Arg, Backend, Hot, HotTierError, Session
from langgraph_vat._ops.flush import flush
from langgraph_vat._ops.keys import wrap_key
from langgraph_vat._ops.patches import marked
from langgraph_vat._ops.shared import SHREDDED, Known, Shared, key_place, recount, unwrapped
from langgraph_vat._ops.tiers import degrade, holds_epoch, hot_to_write
from langgraph_vat._ops.values import (
    Unpacker,
    encode_blob,
    refuse_plaintext,
    unpacked,
    unpacked_write,
    with_sends,
)
from langgraph_vat._records import Blob, Core, Fence, Snapshot, Write
from langgraph_vat._seal.codec import Codec, is_sealed
from langgraph_vat._seal.data_key import DataKey, OtherKeyError
from langgraph_vat.errors import UnavailableError

# A live process changes a thread's history within this time, in seconds.
_CLOSED_PAUSE_S = 0.05
_CLOSED_ROUNDS = 20
# Fills that lose against writers before the caller does without the head.
_FILL_ROUNDS = 4


async def find(shared: Shared, backend: Backend, thread_id: str, *, create: bool) -> Known | None:
    """
    Return the fence and data key that Postgres has for a thread, and remember them.

    With `create`, a thread that has none gets one, committed before this
    returns. Without it, only a thread with rows from another saver does.

    Raises:
        SealError: The thread is sealed and this saver is not, or the reverse.
        UnavailableError: Postgres, or whoever wraps keys, does not answer.
    """
    found = await _find_row(shared, backend, thread_id, create=create)
    if found is None:
        shared.threads.forget(thread_id)
        return None
    fence, wrapped = found
    data_key = await unwrapped(shared, backend, thread_id, fence.generation, wrapped)
    known = Known(fence, data_key)
    shared.threads.set(thread_id, known)
    return known


async def find_all(
    shared: Shared, backend: Backend, thread_ids: Collection[str]
) -> dict[str, Known]:
    """
    Return what `find` does, of many threads; not of those that were deleted or shredded.

    Sealed ones are looked up each time: this process does not hear of a key that is
    destroyed. Whoever reads rows first, and then this, can open them.
    """
    found = {}
    if shared.keyring is None:
        found = {one: known for one in thread_ids if (known := shared.threads.get(one))}
    missing = sorted(set(thread_ids) - found.keys())
    rows = await backend.durable.fetch(sql.FIND_THREADS, {"threads": missing}) if missing else []
    for thread_id, *fence, wrapped in rows:
        missing.remove(thread_id)
        if wrapped != SHREDDED:
            data_key = await unwrapped(shared, backend, thread_id, fence[0], wrapped)
            known = Known(Fence(*fence), data_key)
            shared.threads.set(thread_id, known)
            found[thread_id] = known
    for thread_id in missing:
        if stranger := await find(shared, backend, thread_id, create=False):
            found[thread_id] = stranger
    return found


async def _find_row(
    shared: Shared, backend: Backend, thread_id: str, *, create: bool
) -> tuple[Fence, bytes | None] | None:
    found = await backend.durable.fetch(sql.FIND_THREAD, {"thread": thread_id})
    generation, history, wrapped, is_foreign = found[0]
    if generation is None:
        if not create and not is_foreign:
            return None
        generation, history, wrapped = await _add(
            shared, backend, thread_id, is_sealed=not is_foreign
        )
    return Fence(generation, history), wrapped


async def _add(
    shared: Shared, backend: Backend, thread_id: str, *, is_sealed: bool
) -> tuple[str, int, bytes | None]:
    """Commit a fence, and a data key with it if the thread is to be sealed."""
    generation = str(uuid.uuid4())
    wrapped = None
    if is_sealed and shared.keyring is not None:
        bound = key_place(thread_id, generation)
        data_key = DataKey.generate(shared.keyring.cipher)
        wrapped = await wrap_key(backend, shared.keyring, data_key, bound)
    params = {"thread": thread_id, "generation": generation, "data_key": wrapped}
    added = (await backend.durable.fetch(sql.ADD_THREAD, params))[0]
    if not is_sealed:
        await recount_alone(shared, backend, thread_id)
    return added[0], added[1], added[2]


async def recount_alone(shared: Shared, backend: Backend, thread_id: str) -> None:
    """Bring up to date what is told of a thread, in a transaction that changes nothing else."""

    async def body(session: Session) -> None:
        await session.fetch(sql.LOCK_THREADS, {"threads": [thread_id]})  # then count
        await recount(shared, session, thread_id)

    await backend.durable.transact(body)


async def fill(
    shared: Shared,
    backend: Backend,
    hot: Hot,
    serde: SerializerProtocol,
    thread_id: str,
    checkpoint_ns: str,
    *,
    create: bool,
) -> tuple[Known | None, Snapshot | None]:
    """
    Read the newest checkpoint of a namespace from Postgres, and keep it hot if nothing is changing.

    Returns:
        The thread's fence, None where there is no such thread; and its newest
        checkpoint, None where the namespace has none.
    """
    keys = shared.keys
    meta, journal = keys.meta(thread_id), keys.journal(thread_id)
    known, snapshot = None, None
    # The head will count in the epoch that begins here or not at all: what was
    # read before another one began may be overtaken.
    epoch = shared.epoch
    for _ in range(_FILL_ROUNDS):
        ticket = await _flushed_ticket(shared, backend, hot, thread_id)
        known = await find(shared, backend, thread_id, create=create)
        if known is None:
            return None, None
        snapshot = await _select_latest(backend, thread_id, checkpoint_ns)
        if ticket is None or (snapshot and known.is_sealed != is_sealed(snapshot.exact_type)):
            continue  # or it was sealed since the key was read
        codec = known.codec(serde, thread_id)
        try:
            place = (known.fence.generation, thread_id, checkpoint_ns)
            pairs, held = await _content(shared, backend, codec, *place, snapshot)
        except OtherKeyError:
            continue  # sealed anew since the key was read
        args: list[Arg] = [
            ticket,
            known.fence.text,
            epoch,
            shared.settings.head_ttl_s,
            *pairs,
        ]
        head = keys.head(thread_id, checkpoint_ns)
        reply = await hot.script(scripts.FILL, [meta, head, journal], args)
        if reply[0] == b"ok":
            shared.bases.learn(thread_id, checkpoint_ns, held)
            return known, snapshot
    if shared.keyring is not None:
        return await read_latest(shared, backend, thread_id, checkpoint_ns, create=create)
    return known, snapshot


async def read_latest(
    shared: Shared, backend: Backend, thread_id: str, checkpoint_ns: str, *, create: bool
) -> tuple[Known | None, Snapshot | None]:
    """Return what `fill` does, and keep nothing hot."""
    snapshot = await _select_latest(backend, thread_id, checkpoint_ns)
    # After the rows: it opens what was sealed anew meanwhile, too.
    known = await find(shared, backend, thread_id, create=create)
    if known is not None and snapshot is not None and is_torn(known, snapshot):
        snapshot = await _select_latest(backend, thread_id, checkpoint_ns)
    return known, snapshot


def is_torn(known: Known, snapshot: Snapshot) -> bool:
    """Whether a checkpoint may have been read before its thread was sealed: read it again."""
    return known.is_sealed and not is_sealed(snapshot.exact_type)


async def _flushed_ticket(
    shared: Shared, backend: Backend, hot: Hot, thread_id: str
) -> bytes | None:
    """Flush what waits, and draw a fill ticket; None if more came meanwhile."""
    if shared.copies.of(thread_id):
        await flush(shared, backend, [thread_id])
    ticket = await _ticket(shared, backend, hot, thread_id)
    if ticket is None:
        await flush(shared, backend, [thread_id])
    return ticket


async def _ticket(shared: Shared, backend: Backend, hot: Hot, thread_id: str) -> bytes | None:
    """Draw a fill ticket; None while the thread is dirty."""
    pair = [shared.keys.meta(thread_id), shared.keys.journal(thread_id)]
    args: list[Arg] = [secrets.token_hex(8), shared.settings.head_ttl_s]
    reply = await hot.script(scripts.TICKET, pair, args)
    if reply[0] == b"closing":
        await settle(shared, backend, hot, thread_id, reply[1])
        return None
    return reply[1] if reply[0] == b"ok" else None


async def _select_latest(backend: Backend, thread_id: str, checkpoint_ns: str) -> Snapshot | None:
    """Return the newest checkpoint of a namespace that Postgres has."""
    params = {"thread": thread_id, "namespace": checkpoint_ns}
    rows = await backend.durable.fetch(sql.SELECT_LATEST, params)
    return to_snapshot(rows[0]) if rows else None


async def _content(
    shared: Shared,
    backend: Backend,
    codec: Codec,
    generation: str,
    thread_id: str,
    checkpoint_ns: str,
    snapshot: Snapshot | None,
) -> tuple[list[bytes], dict[str, Blob]]:
    """Return the pairs of a head, and the values that it holds; no values if that is too much."""
    pairs, held = _pairs(codec, generation, checkpoint_ns, snapshot)
    pairs += await _early_writes(backend, codec, generation, thread_id, checkpoint_ns, snapshot)
    if sum(map(len, pairs)) > shared.settings.max_head_bytes:
        return [*sparse(pairs), b"z", b"1"], {}
    return pairs, held


async def _early_writes(
    backend: Backend,
    codec: Codec,
    generation: str,
    thread_id: str,
    checkpoint_ns: str,
    snapshot: Snapshot | None,
) -> list[bytes]:
    """Return the writes that wait for a checkpoint to come, which adopts them from the head."""
    newest = snapshot.checkpoint_id if snapshot else ""
    params = {"thread": thread_id, "namespace": checkpoint_ns, "checkpoint": newest}
    pairs: list[bytes] = []
    for checkpoint_id, *columns, bases in await backend.durable.fetch(
        sql.SELECT_EARLY_WRITES, params
    ):
        unpacker = Unpacker(codec, checkpoint_ns, [to_blob(*base) for base in bases])
        write = unpacked_write(unpacker, codec, checkpoint_ns, checkpoint_id, Write(*columns))
        pairs += write_pairs(generation, checkpoint_id, [write])
    return pairs


def _pairs(
    codec: Codec, generation: str, checkpoint_ns: str, snapshot: Snapshot | None
) -> tuple[list[bytes], dict[str, Blob]]:
    """Return the head that shows what Postgres has, and the values that it holds."""
    if snapshot is None:
        return empty_head(generation, checkpoint_ns), {}
    refuse_plaintext(snapshot, codec)
    snapshot = _complete(unpacked(with_sends(snapshot, codec), codec), codec)
    blobs = tuple(map(marked, snapshot.blobs))
    core = Core(
        orjson.dumps(snapshot.checkpoint),
        orjson.dumps(snapshot.metadata),
        snapshot.exact_type,
        snapshot.exact,
    )
    held = {blob.channel: blob for blob in blobs}
    return head_pairs(generation, replace(snapshot, blobs=blobs), core), held


def _complete(snapshot: Snapshot, codec: Codec) -> Snapshot:
    """Give every channel of a checkpoint a blob: its value, or that it is empty."""
    present = {blob.channel for blob in snapshot.blobs}
    others = tuple(
        encode_blob(codec, snapshot.checkpoint_ns, channel, str(version), snapshot.inline)
        for channel, version in snapshot.checkpoint["channel_versions"].items()
        if channel not in present
    )
    return replace(snapshot, blobs=snapshot.blobs + others)


async def settle(
    shared: Shared, backend: Backend, hot: Hot, thread_id: str, closing: bytes
) -> None:
    """
    Wait until a closed thread is open again; abandon the change if its process seems dead.

    Abandoning raises the fence first. If that process lives after all, its
    transaction finds another fence than it closed, and starts over.
    """
    names = shared.keys
    keys = [names.meta(thread_id), names.head(thread_id, ""), names.journal(thread_id)]
    for _ in range(_CLOSED_ROUNDS):
        await backend.sleep(_CLOSED_PAUSE_S)
        reply = await hot.script(scripts.GET, keys, [shared.epoch, "", shared.state.hot_runs])
        if reply[0] != b"closing" or reply[1] != closing:
            return
    text = closing.removeprefix(b"closing:")
    with suppress(ValueError):  # damaged: it says of no change that it is under way
        fence = Fence.parse(text.decode())
        params = {"thread": thread_id, "generation": fence.generation, "history": fence.history}
        await backend.durable.fetch(sql.RAISE_HISTORY, params)
    await _reopen(shared, hot, thread_id, text, is_deleted=False)


async def reopen_abandoned(shared: Shared, backend: Backend, thread_ids: Sequence[str]) -> None:
    """Open those of some threads that a process closed, and then died or lost Redis."""
    hot = await hot_to_write(shared, backend)
    if hot is None or not thread_ids:
        return
    try:
        metas = [shared.keys.meta(thread_id) for thread_id in thread_ids]
        fences = await hot.read_each("HGET", metas, "f")
        for thread_id, fence in zip(thread_ids, fences, strict=True):
            if fence and fence.startswith(b"closing:"):
                await settle(shared, backend, hot, thread_id, fence)
    except HotTierError:
        await degrade(shared, backend)


async def change_history(
    shared: Shared,
    backend: Backend,
    thread_id: str,
    body: Callable[[Session, Fence], Awaitable[None]],
    *,
    is_deletion: bool = False,
    is_flushed: bool | None = None,
    needs_hot: bool = False,
) -> bool:
    """
    Run `body` under the thread's lock, with no step and no cached read in between.

    `body` changes rows of the thread; the new fence, or no fence for a
    deletion, is committed with them. Before a deletion nothing is flushed,
    unless `is_flushed` says so. With `needs_hot` all must be flushed that waits in Redis.

    Returns:
        Whether there was such a thread.

    Raises:
        UnavailableError: Redis is needed, and does not answer; or Postgres does not.
    """

    async def alone(session: Session, _: Collection[str]) -> Collection[str]:
        await body(session, fence)
        return [thread_id]

    while True:
        found = await _find_row(shared, backend, thread_id, create=False)
        if found is None:
            return False
        fence = found[0]
        if await change_histories(
            shared,
            backend,
            {thread_id: fence},
            alone,
            is_deletion=is_deletion,
            is_flushed=not is_deletion if is_flushed is None else is_flushed,
            needs_hot=needs_hot,
        ):
            return True


async def change_histories(
    shared: Shared,
    backend: Backend,
    fences: Mapping[str, Fence],
    body: Callable[[Session, Collection[str]], Awaitable[Collection[str]]],
    *,
    is_deletion: bool,
    is_flushed: bool,
    needs_hot: bool = False,
) -> Collection[str]:
    """
    Change those of some threads that are still at these fences, in one transaction.

    `body` is given them, and returns those whose rows it changed.

    Returns:
        The threads that were changed.
    """
    hot, waiting = await _close(shared, backend, fences)
    is_past = hot is None and backend.hot is not None
    if is_past and needs_hot:
        raise UnavailableError(
            "Redis does not answer, or did not a moment ago, and may hold steps; nothing was"
            " changed. Repeat it when Redis is back."
        )
    done: Collection[str] = ()
    try:
        dirty = [one for one in fences if one in waiting or shared.copies.of(one)]
        if is_flushed and dirty:
            await flush(shared, backend, dirty)
        done = await _under_lock(
            shared, backend, fences, body, is_deletion=is_deletion, is_past=is_past
        )
    finally:
        for thread_id, fence in fences.items():
            is_deleted = is_deletion and thread_id in done
            # Before it is open again: a late write must not find it unknown, and begin it anew.
            if is_deleted:
                _forget_deleted(shared, thread_id, fence)
            else:
                shared.threads.forget(thread_id)
            if hot is not None:
                text = fence.text
                is_ours = await _reopen(shared, hot, thread_id, text, is_deleted=is_deleted)
                if thread_id in done and not is_ours:
                    # Redis forgot that it was closed: it may have been filled meanwhile.
                    await degrade(shared, backend)
    return done


def _forget_deleted(shared: Shared, thread_id: str, fence: Fence) -> None:
    dead = [e for e in shared.copies.of(thread_id) if e.fence.generation == fence.generation]
    shared.copies.drop(thread_id, [entry.uid for entry in dead])
    shared.quarantine.pop(thread_id, None)
    shared.bases.forget(thread_id)
    shared.threads.set(thread_id, None)


async def _close(
    shared: Shared, backend: Backend, fences: Mapping[str, Fence]
) -> tuple[Hot | None, set[str]]:
    """Close threads in Redis, if there is one to be heeded; return those with a journal there."""
    hot = await hot_to_write(shared, backend)
    if hot is None:
        return None, set()
    keys, waiting = shared.keys, set()
    try:
        for thread_id, fence in fences.items():
            three = [keys.meta(thread_id), keys.journal(thread_id), keys.dirty(thread_id)]
            reply = await hot.script(scripts.CLOSE, three, [fence.text, thread_id])
            if reply[1]:
                waiting.add(thread_id)
    except HotTierError:
        await degrade(shared, backend)
        return None, set()
    return hot, waiting


async def _under_lock(
    shared: Shared,
    backend: Backend,
    fences: Mapping[str, Fence],
    body: Callable[[Session, Collection[str]], Awaitable[Collection[str]]],
    *,
    is_deletion: bool,
    is_past: bool,
) -> Collection[str]:
    async def transaction(session: Session) -> Collection[str]:
        if is_past and not await holds_epoch(shared, session):
            return ()
        rows = await session.fetch(sql.LOCK_THREADS, {"threads": list(fences)})
        same = [row[0] for row in rows if Fence(*row[1:3]) == fences[row[0]]]
        done = await body(session, same) if same else ()
        params = {"threads": list(done)}
        await session.execute(sql.FORGET_THREADS if is_deletion else sql.BUMP_HISTORIES, params)
        return done

    return await backend.durable.transact(transaction)


async def _reopen(
    shared: Shared, hot: Hot, thread_id: str, fence: str | bytes, *, is_deleted: bool
) -> bool:
    """Open a thread; return whether it was still closed under this fence."""
    keys = shared.keys
    three = [keys.meta(thread_id), keys.journal(thread_id), keys.dirty(thread_id)]
    # Should Redis not answer, the next caller finds the thread closed and opens it.
    with suppress(HotTierError):
        reply = await hot.script(scripts.REOPEN, three, [fence, thread_id, int(is_deleted)])
        return bool(reply[0] == b"ok")
    return True
