"""
The hot path: put, put_writes, and reading the newest checkpoint.

Each is one script, and so one round trip, as long as the thread is hot. The
script changes journal and head together, or nothing; every other answer is a
reason to take a longer way and try again:

=========  ==================================================================
`whole`    the entry does not extend the head (a fork, a gap): make sure of its
           parent, and send all values
`base`     the head holds other large values than this process knows: send them
           whole
`open`     Redis does not know the thread, or its head: fill from Postgres
`closing`  the thread's history is being changed: wait
`stale`    Redis knows the thread by another fence: fill, too; or refuse a late write
=========  ==================================================================

A step is acknowledged when it is in Redis and among this process's own
copies; in Postgres as well when a flush is due, and at once when
`flush_every` is 1.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._hot import scripts
from langgraph_vat._hot.entries import (
    DAMAGES,
    Head,
    mark_pairs,
    needs_pairs,
    pack_core,
    packed,
    put_pairs,
    sparse,
    sum_pair,
    writes_pairs,
)
from langgraph_vat._io.protocols import Arg, Backend, Hot, HotTierError
from langgraph_vat._ops.address import tenant_of
from langgraph_vat._ops.flush import commit, flush
from langgraph_vat._ops.patches import to_send
from langgraph_vat._ops.shared import Known, Shared, now, open_tokens, tokens
from langgraph_vat._ops.threads import fill, find, read_latest, settle
from langgraph_vat._ops.tiers import degrade, hot_to_read, hot_to_write, is_still
from langgraph_vat._ops.values import encode_put, encode_writes
from langgraph_vat._records import Blob, Core, Entry, Fence, PutEntry, Snapshot, WritesEntry
from langgraph_vat._seal.codec import Codec, is_sealed
from langgraph_vat.errors import (
    ConflictError,
    QuarantinedError,
    ThreadDeletedError,
    UnavailableError,
)

logger = logging.getLogger("langgraph_vat")

# Longer ways taken before giving up. Each answer above is rare; in a row they
# mean that others change this very thread all the time.
_ROUNDS = 12
# Between two looks for a parent that another process has still to store.
_PARENT_PAUSE_S = 0.1
_PARENT_S = 2.0
# Lua hands no more than 8,000 values to a command.
_MOST_FIELDS = 4_000
_MOST_OPENED = 2
_ROOM_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """The arguments of one put."""

    thread_id: str
    checkpoint_ns: str
    parent_id: str
    checkpoint: Checkpoint
    metadata: CheckpointMetadata
    new_versions: ChannelVersions


@dataclass(frozen=True, slots=True, kw_only=True)
class PutWrites:
    """The arguments of one put_writes."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    run_id: str
    writes: Sequence[tuple[str, Any]]
    task_id: str
    task_path: str


async def put(shared: Shared, backend: Backend, serde: SerializerProtocol, new: Put) -> None:
    """
    Store one checkpoint and make it the newest of its namespace, if its id is the greatest.

    Storing the same checkpoint again gives the same rows.

    Raises:
        ThreadDeletedError: The parent belongs to a thread that was deleted.
        ConflictError: The parent is not the newest any more, and that matters.
        UnavailableError: Neither tier can take it, or the backlog is full.
    """
    await _refuse_quarantined(shared, backend, new.thread_id)
    _warn_of_clock(shared, new)
    await _make_room(shared, backend, new.thread_id)
    known = await _known_to_put(shared, backend, new)
    await open_tokens(shared, backend)
    metadata = cast("Mapping[str, Any]", new.metadata)
    mode, opened, is_patched = "delta", 0, True
    for _ in range(_ROUNDS):
        codec = known.codec(serde, new.thread_id)
        entry = encode_put(
            codec,
            known.fence,
            checkpoint_ns=new.checkpoint_ns,
            parent_id=new.parent_id,
            checkpoint=new.checkpoint,
            metadata=new.metadata,
            new_versions=new.new_versions,
            is_whole=mode != "delta",
            shown_keys=shared.settings.thread_metadata,
            tokens=tokens(shared, tenant_of(new.thread_id), metadata),
        )
        call = _put_call(codec, entry, mode, is_patched=is_patched)
        answer, detail = await _send(shared, backend, new.thread_id, entry, call)
        if answer == b"ok":
            return await _acknowledge(shared, backend, new.thread_id, entry, detail)
        if answer == b"conflict":
            raise _conflict(new)
        is_patched = False
        if answer == b"whole":
            await _require_parent(shared, backend, new)
            mode = "whole"
        elif answer in (b"open", b"stale"):
            opened += 1
            # Others keep changing the thread: leave its head to a reader.
            is_enough = opened > _MOST_OPENED and shared.settings.on_conflict == "fork"
            mode = "headless" if is_enough else mode
            known = await _open(shared, backend, serde, new, known)
    raise _busy(new.thread_id)


async def put_writes(
    shared: Shared, backend: Backend, serde: SerializerProtocol, new: PutWrites
) -> None:
    """
    Store pending writes of a checkpoint, which may itself still be on its way.

    Of several writes with one task and index the first stays; of special
    channels (errors, interrupts, …) the last does, as in InMemorySaver. An
    interrupt or error is in Postgres when this returns.

    Raises:
        ThreadDeletedError: The thread was deleted since this process last used it.
        UnavailableError: Neither tier can take it, or the backlog is full.
    """
    await _refuse_quarantined(shared, backend, new.thread_id)
    await _make_room(shared, backend, new.thread_id)
    known = await _known_to_write(shared, backend, new)
    for _ in range(_ROUNDS):
        entry = encode_writes(
            known.codec(serde, new.thread_id),
            known.fence,
            epoch=shared.state.epoch,
            checkpoint_ns=new.checkpoint_ns,
            checkpoint_id=new.checkpoint_id,
            run_id=new.run_id,
            writes=new.writes,
            task_id=new.task_id,
            task_path=new.task_path,
        )
        answer, detail = await _send(shared, backend, new.thread_id, entry, _writes_call(entry))
        if answer == b"ok":
            return await _acknowledge(shared, backend, new.thread_id, entry, detail)
        if answer in (b"open", b"stale"):
            known = await _open(shared, backend, serde, new, known)
    raise _busy(new.thread_id)


async def get_latest(
    shared: Shared, backend: Backend, serde: SerializerProtocol, thread_id: str, checkpoint_ns: str
) -> tuple[Snapshot, Known] | None:
    """
    Return the checkpoint with the greatest id that anybody was acknowledged.

    Raises:
        UnavailableError: The head is not in Redis and Postgres does not
            answer. Never None, and never an older checkpoint, instead.
    """
    for _ in range(_ROUNDS):
        hot = await hot_to_read(shared, backend)
        if hot is None:
            return await _read_durable(shared, backend, thread_id, checkpoint_ns)
        try:
            answer, head = await read_head(shared, backend, hot, thread_id, checkpoint_ns, "")
            if answer == b"ok":
                shared.counters.hits += 1
                return head
            if answer == b"open":
                shared.counters.misses += 1
                known, snapshot = await fill(
                    shared, backend, hot, serde, thread_id, checkpoint_ns, create=False
                )
                return (snapshot, known) if known and snapshot else None
        except HotTierError:
            await degrade(shared, backend)
    raise _busy(thread_id)


async def read_head(
    shared: Shared,
    backend: Backend,
    hot: Hot,
    thread_id: str,
    checkpoint_ns: str,
    checkpoint_id: str,
) -> tuple[bytes, tuple[Snapshot, Known] | None]:
    """
    Look at a head: the newest checkpoint, or the one with an id if it is the newest.

    Returns:
        ``ok`` with the checkpoint, or with None where it is known that the
        namespace has none; ``open`` where Redis cannot tell, ``past`` and ``clean``
        where it is not the newest: something waits in the journal, or nothing does;
        ``ended`` where it must be asked again.
    """
    names = shared.keys
    keys = [names.meta(thread_id), names.head(thread_id, checkpoint_ns), names.journal(thread_id)]
    epoch = shared.epoch
    args: list[Arg] = [epoch, checkpoint_id, shared.state.hot_runs]
    answer, *details = await hot.script(scripts.GET, keys, args)
    is_told = answer in (b"ok", b"clean", b"replaced")
    if is_told and not await is_still(shared, backend, epoch, answer):
        return b"ended", None
    if answer == b"closing":
        await settle(shared, backend, hot, thread_id, details[0])
    if answer != b"ok":
        return answer, None
    shown = _shown(thread_id, checkpoint_ns, *details)
    if shown is None:
        return b"open", None
    fence, held, newest, snapshot = shown
    known = await _known_by_fence(shared, backend, thread_id, fence, snapshot)
    if known is None:
        return b"open", None  # deleted meanwhile, or Redis remembers what is over
    if _is_behind(shared, thread_id, checkpoint_ns, newest):
        await flush(shared, backend, [thread_id])
        return b"open", None
    if held:
        shared.bases.learn(thread_id, checkpoint_ns, held)
    return answer, (snapshot, known) if snapshot else None


def _shown(
    thread_id: str, checkpoint_ns: str, fence: bytes, fields: Sequence[bytes]
) -> tuple[Fence, dict[str, Blob], str, Snapshot | None] | None:
    """
    Return what a head shows, if it is not damaged and its parts belong together.

    Returns:
        The fence, the large values that it holds, the newest checkpoint's id, and that.
    """
    try:
        known_by = Fence.parse(fence.decode())
        head = Head(known_by.generation, checkpoint_ns, fields)
        snapshot = _snapshot(thread_id, checkpoint_ns, head, head.core) if head.core else None
        held = head.held
    except DAMAGES:
        return None
    if head.core is not None and snapshot is None:
        return None
    return known_by, held, head.checkpoint_id, snapshot


def _is_behind(shared: Shared, thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> bool:
    """Whether this process itself has a newer step, that Redis lost."""
    return any(
        entry.checkpoint_id > checkpoint_id
        for entry in shared.copies.of(thread_id)
        if isinstance(entry, PutEntry) and entry.checkpoint_ns == checkpoint_ns
    )


def _snapshot(thread_id: str, checkpoint_ns: str, head: Head, core: Core) -> Snapshot | None:
    """Return what a head shows; None where its parts do not belong together."""
    checkpoint = orjson.loads(core.checkpoint)
    versions = {channel: str(v) for channel, v in checkpoint["channel_versions"].items()}
    shown = (blob for blob in head.blobs if versions.get(blob.channel) == blob.version)
    found = {blob.channel: blob for blob in shown}
    if len(found) < len(versions):
        return None
    return Snapshot(
        thread_id=thread_id,
        checkpoint_ns=checkpoint_ns,
        checkpoint_id=head.checkpoint_id,
        parent_id=head.parent_id,
        checkpoint=checkpoint,
        metadata=orjson.loads(core.metadata),
        exact_type=core.exact_type,
        exact=core.exact,
        inline={},
        blobs=tuple(found.values()),
        writes=head.writes,
        bases=head.bases,
    )


async def _known_by_fence(
    shared: Shared, backend: Backend, thread_id: str, fence: Fence, snapshot: Snapshot | None
) -> Known | None:
    known = shared.known(thread_id)
    # That it is plain must be asked for: a head from before it was sealed may be back.
    is_sure = known is not None and (known.data_key is not None or shared.keyring is None)
    if known is not None and is_sure and known.fence == fence:
        return known
    if shared.keyring is None and snapshot is not None and not is_sealed(snapshot.exact_type):
        known = Known(fence, None)
        shared.threads.set(thread_id, known)
        return known
    # It may be sealed, which is not for this saver; or its key may be another one now.
    known = await find(shared, backend, thread_id, create=False)
    return known if known is not None and known.fence == fence else None


async def _read_durable(
    shared: Shared, backend: Backend, thread_id: str, checkpoint_ns: str
) -> tuple[Snapshot, Known] | None:
    if shared.copies.of(thread_id):
        await flush(shared, backend, [thread_id])
    known, snapshot = await read_latest(shared, backend, thread_id, checkpoint_ns, create=False)
    return (snapshot, known) if known and snapshot else None


Call = Callable[[Shared, Hot, str], Awaitable[Any]]


def _put_call(codec: Codec, entry: PutEntry, mode: str, *, is_patched: bool) -> Call:
    async def call(shared: Shared, hot: Hot, thread_id: str) -> Any:
        sent = to_send(shared, codec, thread_id, entry, is_patched=is_patched)
        needs, marks = needs_pairs(sent), mark_pairs(sent)
        own, both = put_pairs(sent)
        where = (entry.checkpoint_ns, entry.checkpoint_id, entry.parent_id)
        core = pack_core(entry.core, entry.fence.generation, *where)
        is_big = _is_big(shared, core, *both)
        if is_big:
            own, both = own + packed(both), sparse(both)
        own += sum_pair(entry, [b"c", core, *own, *([] if is_big else both)])
        args: list[Arg] = [
            thread_id, entry.fence.text, shared.epoch, mode, shared.settings.head_ttl_s,
            entry.checkpoint_id, entry.parent_id, core, int(is_big),
            int(shared.settings.on_conflict == "raise"), len(needs), len(marks), len(own),
            *needs, *marks, *own, *both,
        ]  # fmt: skip
        reply = await hot.script(scripts.PUT, _keys(shared, thread_id, entry), args)
        if reply[0] == b"ok" and reply[3]:
            held = {blob.channel: blob for blob in sent.blobs if not blob.base}
            shared.bases.learn(thread_id, entry.checkpoint_ns, held)
        else:
            shared.bases.forget(thread_id)
        return reply

    return call


def _writes_call(entry: WritesEntry) -> Call:
    async def call(shared: Shared, hot: Hot, thread_id: str) -> Any:
        own, both = writes_pairs(entry)
        is_big = _is_big(shared, *both)
        if is_big:
            own, both = own + packed(both), []
        own += sum_pair(entry, own + both)
        args: list[Arg] = [
            thread_id, entry.fence.text, entry.epoch, shared.settings.head_ttl_s,
            entry.checkpoint_id, int(is_big), len(own), *own, *both,
        ]  # fmt: skip
        return await hot.script(scripts.PUT_WRITES, _keys(shared, thread_id, entry), args)

    return call


def _is_big(shared: Shared, *parts: bytes) -> bool:
    """Whether these are more than a head may have, or more than a script can handle one by one."""
    return len(parts) > _MOST_FIELDS or sum(map(len, parts)) > shared.settings.max_head_bytes


def _keys(shared: Shared, thread_id: str, entry: Entry) -> list[bytes]:
    keys = shared.keys
    head = keys.head(thread_id, entry.checkpoint_ns)
    return [keys.meta(thread_id), head, keys.journal(thread_id), keys.dirty(thread_id)]


async def _send(
    shared: Shared, backend: Backend, thread_id: str, entry: Entry, call: Call
) -> tuple[bytes, int | None]:
    """
    Give an entry to Redis, or past it to Postgres.

    Returns:
        The answer, and the thread's super-steps that wait in Redis; None
        where the entry is in Postgres already.
    """
    hot = await hot_to_write(shared, backend)
    if hot is None:
        return await commit(shared, backend, thread_id, entry), None
    try:
        answer, *details = await call(shared, hot, thread_id)
        if answer == b"ok":
            shared.copies.add(thread_id, entry)
            return answer, details[1]
        if answer == b"closing":
            await settle(shared, backend, hot, thread_id, details[0])
    except HotTierError:
        await degrade(shared, backend)
        answer = b"degraded"
    return answer, None


async def _acknowledge(
    shared: Shared, backend: Backend, thread_id: str, entry: Entry, steps: int | None
) -> None:
    """Flush if that is due. Without Postgres a bounded number of steps may go on waiting."""
    if steps is None:
        return
    every = shared.flush_every
    if isinstance(entry, PutEntry):
        is_due = steps >= every
    else:  # a step that is due is flushed by whoever took it
        is_due = any(write.channel in (ERROR, INTERRUPT) for write in entry.writes)
    if every > 1 and (shared.is_durable_away or not is_due):
        return
    try:
        await flush(shared, backend, [thread_id])
    except UnavailableError:
        if every == 1:
            raise


def _warn_of_clock(shared: Shared, new: Put) -> None:
    if new.checkpoint["id"] >= new.parent_id:
        return
    shared.counters.out_of_order += 1
    if shared.counters.out_of_order == 1:
        logger.warning(
            "a checkpoint of thread %r has a smaller id than its parent: this clock is behind the"
            " one that made the parent, which stays the thread's newest until this clock is past"
            " it. Both are kept. Have the machines' clocks synchronized; stats.out_of_order counts"
            " on.",
            new.thread_id,
        )


async def _make_room(shared: Shared, backend: Backend, thread_id: str) -> None:
    """Wait until another step may wait in Redis. None that waits already is dropped for it."""
    until = now() + shared.settings.timeout_s
    while full := _full(shared, thread_id):
        try:
            await flush(shared, backend, shared.copies.older_than(0))
        except UnavailableError as error:
            if now() >= until:
                msg = (
                    f"{full} wait in Redis until Postgres answers. This step was not taken; those"
                    " before it are kept. Repeat it once the server is reachable."
                )
                raise UnavailableError(msg) from error
            await backend.sleep(_ROOM_PAUSE_S)


def _full(shared: Shared, thread_id: str) -> str:
    """Return which limit of the backlog is reached; nothing if none is."""
    settings, copies = shared.settings, shared.copies
    if copies.size >= settings.max_backlog_bytes:
        return f"steps of {copies.size} bytes of this process (max_backlog_bytes)"
    if (steps := copies.steps(thread_id)) >= settings.max_backlog:
        return f"{steps} super-steps of thread {thread_id!r} (max_backlog)"
    return ""


async def _open(
    shared: Shared, backend: Backend, serde: SerializerProtocol, new: Put | PutWrites, known: Known
) -> Known:
    """Make a thread hot; return its fence, or refuse a late write to a deleted one."""
    hot = await hot_to_write(shared, backend)
    if hot is None:
        return await _renew(shared, backend, new, known)
    try:
        thread_id, namespace = new.thread_id, new.checkpoint_ns
        present, _ = await fill(shared, backend, hot, serde, thread_id, namespace, create=False)
    except HotTierError:
        await degrade(shared, backend)
        return known
    if present is not None and present.fence.generation == known.fence.generation:
        return present
    return await _renew(shared, backend, new, known)


async def _renew(shared: Shared, backend: Backend, new: Put | PutWrites, known: Known) -> Known:
    """Return the thread's present fence; refuse a write that belongs to an earlier generation."""
    is_first = isinstance(new, Put) and not new.parent_id
    present = await find(shared, backend, new.thread_id, create=is_first)
    if present is not None:
        if is_first or present.fence.generation == known.fence.generation:
            return present
        if isinstance(new, Put) and await _has_parent(shared, backend, new):
            return present
    raise _deleted(shared, new.thread_id)


async def _known_to_put(shared: Shared, backend: Backend, new: Put) -> Known:
    known = shared.known(new.thread_id)
    if known is not None:
        return known
    known = await find(shared, backend, new.thread_id, create=not new.parent_id)
    if known is None:
        raise _deleted(shared, new.thread_id)
    await _require_parent(shared, backend, new)
    return known


async def _known_to_write(shared: Shared, backend: Backend, new: PutWrites) -> Known:
    if shared.threads.is_gone(new.thread_id):
        raise _deleted(shared, new.thread_id)
    known = shared.known(new.thread_id)
    known = known or await find(shared, backend, new.thread_id, create=True)
    if known is None:
        raise _deleted(shared, new.thread_id)
    return known


async def _require_parent(shared: Shared, backend: Backend, new: Put) -> None:
    """
    Refuse a step whose parent is nowhere: it was deleted, or lost with two failures at once.

    After Redis lost its memory, the process that wrote the parent may still
    have to store it.
    """
    settings = shared.settings
    until = now() + min(settings.flush_after, _PARENT_S) + settings.epoch_ttl_s
    while new.parent_id and not await _has_parent(shared, backend, new):
        await hot_to_write(shared, backend)
        if now() > until and not shared.is_degraded:
            raise _deleted(shared, new.thread_id)
        await backend.sleep(_PARENT_PAUSE_S)


async def _has_parent(shared: Shared, backend: Backend, new: Put) -> bool:
    """Whether the parent is stored, or was pruned."""
    await flush(shared, backend, [new.thread_id])
    params = {
        "thread": new.thread_id,
        "namespace": new.checkpoint_ns,
        "checkpoint": new.parent_id,
    }
    return bool((await backend.durable.fetch(sql.HAS_CHECKPOINT, params))[0][0])


async def _refuse_quarantined(shared: Shared, backend: Backend, thread_id: str) -> None:
    """Refuse a step of a thread that is in quarantine, unless what it is in it for is over."""
    if thread_id not in shared.quarantine:
        return
    try:
        await flush(shared, backend, [thread_id])
    except QuarantinedError as error:
        msg = (
            f"earlier steps of thread {thread_id!r} cannot be stored in Postgres"
            f"; this one was not taken. {error.__cause__} Or delete the thread."
        )
        raise QuarantinedError(msg) from error.__cause__


def _deleted(shared: Shared, thread_id: str) -> ThreadDeletedError:
    # Remembered until the thread is read again, or begun anew: its writes come late, too.
    shared.threads.set(thread_id, None)
    return ThreadDeletedError(
        f"thread {thread_id!r} does not have the checkpoint that this step follows: it was deleted"
        " meanwhile. Nothing was stored and nothing came back. A step without a parent checkpoint"
        " starts the thread anew."
    )


def _conflict(new: Put) -> ConflictError:
    return ConflictError(
        f"thread {new.thread_id!r} went on from checkpoint {new.parent_id or 'none'} in another run"
        " meanwhile. This step was refused and nothing of it stored, for on_conflict is 'raise'."
        " Read the thread, and go on from its newest checkpoint."
    )


def _busy(thread_id: str) -> UnavailableError:
    return UnavailableError(
        f"thread {thread_id!r} was changed by others at every attempt. The step may be stored or"
        " not; repeating it is safe."
    )
