"""
Copy everything from any saver or store to any other, over LangGraph's public API.

A copy may be stopped at any time and begun again: what the target has already,
and equal, is not written a second time. Everything that was written is read
back from the target and compared by digest. Nothing is ever deleted, and the
source is only read.

Copy while nothing writes to the source's threads; a copy that is repeated
takes over what came since.

The public API tells neither when an item was created, nor its TTL or what of
it was indexed, nor the path of a task: items get new times and the target's
TTL and index, and the order of a checkpoint's writes stands in for the path.
"""

import hashlib
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    CheckpointTuple,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.store.base import BaseStore, GetOp, Item, ListNamespacesOp, Op, PutOp, SearchOp

from langgraph_vat._io.driver import drive
from langgraph_vat.errors import MigrationError

# Items, or namespaces, that are read at once.
_PAGE = 200


@dataclass(slots=True)
class Progress:
    """How far a copy is, in checkpoints or in items."""

    total: int = 0
    """How many the source has; 0 where that is not known before the end."""
    done: int = 0
    """How many were compared."""
    copied: int = 0
    """How many of them the target did not have, or had otherwise."""
    is_done: bool = False
    """Whether this is the last report."""


Report = Callable[[Progress], None]


def bar(progress: Progress) -> None:
    """Draw a line of progress on stderr, over the line before."""
    share = progress.done / max(progress.total, progress.done, 1)
    filled = "#" * int(30 * share)
    total = f" of {progress.total}" if progress.total else ""
    end = "\n" if progress.is_done else ""
    line = f"\r[{filled:<30}] {progress.done}{total} looked at, {progress.copied} copied"
    sys.stderr.write(line + end)
    sys.stderr.flush()


def _unseen(_: Progress) -> None:
    pass


def copy_checkpoints(
    source: BaseCheckpointSaver[Any],
    target: BaseCheckpointSaver[Any],
    *,
    thread_ids: Iterable[str] | None = None,
    report: Report = _unseen,
) -> Progress:
    """
    Copy threads with their whole history: checkpoints, values, metadata and pending writes.

    Args:
        source: Where from; it is only read.
        target: Where to.
        thread_ids: The threads to copy; all of them for None, for which the
            source's list is read once more.
        report: Called after every checkpoint, such as `bar`.

    Returns:
        How many checkpoints there were, and how many had to be copied.

    Raises:
        MigrationError: The target does not give back what was put, or the
            source changed meanwhile.
    """
    pair = _BlockingSaver(source), _BlockingSaver(target)
    return drive(_copy_checkpoints(*pair, source.serde, thread_ids, report))


async def acopy_checkpoints(
    source: BaseCheckpointSaver[Any],
    target: BaseCheckpointSaver[Any],
    *,
    thread_ids: Iterable[str] | None = None,
    report: Report = _unseen,
) -> Progress:
    """Like `copy_checkpoints`, by the savers' asyncio methods."""
    pair = _AsyncioSaver(source), _AsyncioSaver(target)
    return await _copy_checkpoints(*pair, source.serde, thread_ids, report)


def copy_items(source: BaseStore, target: BaseStore, *, report: Report = _unseen) -> Progress:
    """
    Copy all items of all namespaces.

    Raises:
        MigrationError: The target does not give back what was put.
    """
    return drive(_copy_items(_BlockingStore(source), _BlockingStore(target), report))


async def acopy_items(
    source: BaseStore, target: BaseStore, *, report: Report = _unseen
) -> Progress:
    """Like `copy_items`, by the stores' asyncio methods."""
    return await _copy_items(_AsyncioStore(source), _AsyncioStore(target), report)


# --- both colours of the public API ------------------------------------------


class _Saver(Protocol):
    def every(self, config: RunnableConfig | None) -> AsyncIterator[CheckpointTuple]: ...

    async def get(self, config: RunnableConfig) -> CheckpointTuple | None: ...

    async def put(
        self, parent: RunnableConfig, found: CheckpointTuple, versions: ChannelVersions
    ) -> None: ...

    async def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, path: str
    ) -> None: ...


@dataclass(frozen=True)
class _BlockingSaver:
    saver: BaseCheckpointSaver[Any]

    async def every(self, config: RunnableConfig | None) -> AsyncIterator[CheckpointTuple]:
        for found in self.saver.list(config):
            yield found

    async def get(self, config: RunnableConfig) -> CheckpointTuple | None:
        return self.saver.get_tuple(config)

    async def put(
        self, parent: RunnableConfig, found: CheckpointTuple, versions: ChannelVersions
    ) -> None:
        self.saver.put(parent, found.checkpoint, found.metadata, versions)

    async def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, path: str
    ) -> None:
        self.saver.put_writes(config, writes, task_id, path)


@dataclass(frozen=True)
class _AsyncioSaver:
    saver: BaseCheckpointSaver[Any]

    def every(self, config: RunnableConfig | None) -> AsyncIterator[CheckpointTuple]:
        return self.saver.alist(config)

    async def get(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await self.saver.aget_tuple(config)

    async def put(
        self, parent: RunnableConfig, found: CheckpointTuple, versions: ChannelVersions
    ) -> None:
        await self.saver.aput(parent, found.checkpoint, found.metadata, versions)

    async def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, path: str
    ) -> None:
        await self.saver.aput_writes(config, writes, task_id, path)


class _Store(Protocol):
    async def batch(self, ops: Sequence[Op]) -> list[Any]: ...


@dataclass(frozen=True)
class _BlockingStore:
    store: BaseStore

    async def batch(self, ops: Sequence[Op]) -> list[Any]:
        return self.store.batch(ops)


@dataclass(frozen=True)
class _AsyncioStore:
    store: BaseStore

    async def batch(self, ops: Sequence[Op]) -> list[Any]:
        return await self.store.abatch(ops)


# --- checkpoints -------------------------------------------------------------


async def _copy_checkpoints(
    source: _Saver,
    target: _Saver,
    serde: SerializerProtocol,
    thread_ids: Iterable[str] | None,
    report: Report,
) -> Progress:
    progress = Progress()
    if thread_ids is None:
        found: dict[str, None] = {}
        async for one in source.every(None):
            found[one.config["configurable"]["thread_id"]] = None
            progress.total += 1
        thread_ids = found
    for thread_id in thread_ids:
        await _copy_thread(source, target, serde, thread_id, progress, report)
    return _done(progress, report)


# Namespace and id of a checkpoint, and what its channels' versions were.
_Key = tuple[str, str]
_Versions = dict[_Key, dict[str, Any]]


async def _copy_thread(
    source: _Saver,
    target: _Saver,
    serde: SerializerProtocol,
    thread_id: str,
    progress: Progress,
    report: Report,
) -> None:
    """Copy one thread, parents first; in memory are the versions of all its checkpoints."""
    versions: _Versions = {}
    parents: dict[_Key, _Key] = {}
    async for one in source.every({"configurable": {"thread_id": thread_id}}):
        key = _key(one.config)
        versions[key] = dict(one.checkpoint["channel_versions"])
        if one.parent_config is not None:
            parents[key] = _key(one.parent_config)
    for key in _parents_first(versions, parents):
        parent = parents.get(key)
        if parent not in versions:
            parent = None  # it was deleted
        progress.copied += await _copy_one(source, target, serde, thread_id, key, parent, versions)
        progress.done += 1
        report(progress)


def _parents_first(versions: _Versions, parents: dict[_Key, _Key]) -> list[_Key]:
    """Order checkpoints by id, but no child before its parent: clocks differ."""
    ordered: dict[_Key, None] = {}
    for key in sorted(versions):
        line, above = [], key
        while above in versions and above not in ordered and above not in line:
            line.append(above)
            above = parents.get(above, above)
        ordered.update(dict.fromkeys(reversed(line)))
    return list(ordered)


async def _copy_one(
    source: _Saver,
    target: _Saver,
    serde: SerializerProtocol,
    thread_id: str,
    key: _Key,
    parent: _Key | None,
    versions: _Versions,
) -> bool:
    """Copy a checkpoint unless the target has it; return whether it had to be copied."""
    config = _config(thread_id, *key)
    found = await source.get(config)
    if found is None:
        raise MigrationError(_gone(thread_id, key))
    wanted = _digest(_content(found, parent), serde)
    if await _has(target, config, wanted, serde):
        return False
    before = versions[parent] if parent is not None else {}
    new = {c: v for c, v in versions[key].items() if before.get(c) != v}
    await target.put(_config(thread_id, key[0], parent[1] if parent else ""), found, new)
    tasks: dict[str, list[tuple[str, Any]]] = {}
    for task_id, channel, value in found.pending_writes or []:
        tasks.setdefault(task_id, []).append((channel, value))
    for position, (task_id, writes) in enumerate(tasks.items()):
        await target.put_writes(config, writes, task_id, f"{position:06d}")
    if not (
        await _has(target, config, wanted, serde)
        or await _are_equal(source, target, config, parent)  # sets in an object have no order
    ):
        raise MigrationError(
            f"checkpoint {key[1]} of thread {thread_id!r} does not come back from the target as"
            " the source has it. What was copied before it stays; the source was not changed."
            " Look whether both know the same types (serde=), and copy into an empty thread."
        )
    return True


async def _has(
    target: _Saver, config: RunnableConfig, wanted: bytes, serde: SerializerProtocol
) -> bool:
    found = await target.get(config)
    return found is not None and _digest(_content(found, _parent(found)), serde) == wanted


async def _are_equal(
    source: _Saver, target: _Saver, config: RunnableConfig, parent: _Key | None
) -> bool:
    # The one that was put is not asked: a target may have changed it.
    wanted, found = await source.get(config), await target.get(config)
    if wanted is None or found is None:
        return False
    return _content(wanted, parent) == _content(found, _parent(found))


def _gone(thread_id: str, key: _Key) -> str:
    return (
        f"checkpoint {key[1]} of thread {thread_id!r} was deleted from the source while it was"
        " copied. What was copied stays; copy again once nothing changes the source."
    )


def _key(config: RunnableConfig) -> _Key:
    found = config["configurable"]
    return found.get("checkpoint_ns", ""), found["checkpoint_id"]


def _parent(found: CheckpointTuple) -> _Key | None:
    return _key(found.parent_config) if found.parent_config is not None else None


def _config(thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> RunnableConfig:
    where = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns}
    return {"configurable": where | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


# --- items -------------------------------------------------------------------


async def _copy_items(source: _Store, target: _Store, report: Report) -> Progress:
    progress = Progress()
    serde = JsonPlusSerializer()
    async for namespace in _namespaces(source):
        for item in await _items(source, namespace):
            progress.copied += await _copy_item(target, item, serde)
            progress.done += 1
            report(progress)
    return _done(progress, report)


def _done(progress: Progress, report: Report) -> Progress:
    progress.total, progress.is_done = progress.done, True
    report(progress)
    return progress


async def _namespaces(source: _Store) -> AsyncIterator[tuple[str, ...]]:
    offset = 0
    while True:
        (found,) = await source.batch([ListNamespacesOp(limit=_PAGE, offset=offset)])
        for namespace in found:
            yield namespace
        if len(found) < _PAGE:
            return
        offset += _PAGE


async def _items(source: _Store, namespace: tuple[str, ...]) -> list[Item]:
    """
    Return the items of this very namespace.

    Pages of equal times may come in another order each; an item that was seen
    twice then means that another was not seen, and they are read in larger ones.
    """
    size = _PAGE
    while True:
        seen: dict[tuple[tuple[str, ...], str], Item] = {}
        count = 0
        while True:
            op = SearchOp(namespace, limit=size, offset=count, refresh_ttl=False)
            (found,) = await source.batch([op])
            seen |= {(item.namespace, item.key): item for item in found}
            count += len(found)
            if len(found) < size:
                break
        if len(seen) == count:
            return [item for item in seen.values() if item.namespace == namespace]
        size *= 8


async def _copy_item(target: _Store, item: Item, serde: SerializerProtocol) -> bool:
    wanted = _digest(item.value, serde)
    if await _has_item(target, item, wanted, serde):
        return False
    await target.batch([PutOp(item.namespace, item.key, item.value)])
    if not await _has_item(target, item, wanted, serde):
        raise MigrationError(
            f"item {item.key!r} of namespace {item.namespace!r} does not come back from the target"
            " as the source has it. What was copied before it stays; the source was not changed."
        )
    return True


async def _has_item(target: _Store, item: Item, wanted: bytes, serde: SerializerProtocol) -> bool:
    (found,) = await target.batch([GetOp(item.namespace, item.key, refresh_ttl=False)])
    return found is not None and _digest(found.value, serde) == wanted


# --- comparison --------------------------------------------------------------


def _content(found: CheckpointTuple, parent: _Key | None) -> list[Any]:
    """Return all of a checkpoint that must be the same, in one order for every saver."""
    # Of one task the order is kept, but for special channels, which savers put anywhere.
    writes = sorted(found.pending_writes or [], key=lambda w: (w[0], WRITES_IDX_MAP.get(w[1], 0)))
    return [found.checkpoint, found.metadata, parent, [tuple(write) for write in writes]]


def _digest(value: Any, serde: SerializerProtocol) -> bytes:
    """
    Return a SHA-256 of a value.

    The order of a dict's keys is nothing, which JSONB changes, nor that of a set.
    """
    if type(value) is dict:
        pairs = (_digest(key, serde) + _digest(part, serde) for key, part in value.items())
        return hashlib.sha256(b"dict" + b"".join(sorted(pairs))).digest()
    if type(value) in (list, tuple):
        parts = (_digest(part, serde) for part in value)
        return hashlib.sha256(type(value).__name__.encode() + b"".join(parts)).digest()
    if isinstance(value, set | frozenset):
        members = sorted(_digest(part, serde) for part in value)
        return hashlib.sha256(type(value).__name__.encode() + b"".join(members)).digest()
    type_, data = serde.dumps_typed(value)
    return hashlib.sha256(type_.encode() + b":" + data).digest()
