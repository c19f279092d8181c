"""
Copy everything from any saver or store to any other, over LangGraph's public API.

A copy may be stopped at any time and begun again: what the target has already,
and equal, is not written a second time. Every thread that was written, and every
item, is read back from the target and compared by digest. Nothing is ever deleted,
and the source is only read.

Copy while nothing writes to the source's threads; a copy that is repeated
takes over what came since.

The public API tells neither when an item was created, nor its TTL or what of
it was indexed, nor the path of a task: items get new times and the target's
TTL and index, and the order of a checkpoint's writes stands in for the path.
"""

import hashlib
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    CheckpointTuple,
)
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.store.base import BaseStore, GetOp, Item, ListNamespacesOp, Op, PutOp, SearchOp

from langgraph_vat._io.driver import drive
from langgraph_vat.errors import InvalidInputError, MigrationError
from langgraph_vat.saver import HybridSaver

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
        MigrationError: The target does not take a checkpoint or does not give it
            back equal, or the source changed meanwhile.
    """
    pair = _BlockingSaver(source), _BlockingSaver(target)
    return drive(_copy_checkpoints(*pair, thread_ids, report))


async def acopy_checkpoints(
    source: BaseCheckpointSaver[Any],
    target: BaseCheckpointSaver[Any],
    *,
    thread_ids: Iterable[str] | None = None,
    report: Report = _unseen,
) -> Progress:
    """Like `copy_checkpoints`, by the savers' asyncio methods."""
    pair = _AsyncioSaver(source), _AsyncioSaver(target)
    return await _copy_checkpoints(*pair, thread_ids, report)


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

    async def flush(self) -> None: ...


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

    async def flush(self) -> None:
        if isinstance(self.saver, HybridSaver):
            self.saver.flush()


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

    async def flush(self) -> None:
        if isinstance(self.saver, HybridSaver):
            await self.saver.aflush()


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


# Namespace and id of a checkpoint.
_Key = tuple[str, str]


@dataclass(slots=True)
class _One:
    """What is remembered of a checkpoint."""

    versions: ChannelVersions
    parent: _Key | None
    digest: bytes


_Thread = dict[_Key, _One]


async def _copy_checkpoints(
    source: _Saver, target: _Saver, thread_ids: Iterable[str] | None, report: Report
) -> Progress:
    progress = Progress()
    counts: dict[str, int] = {}
    if isinstance(thread_ids, str):
        raise InvalidInputError("thread_ids must be a list of ids, not one id; nothing was copied")
    if thread_ids is not None:
        counts = dict.fromkeys(thread_ids, 1)
    else:
        async for one in source.every(None):
            thread_id = one.config["configurable"]["thread_id"]
            counts[thread_id] = counts.get(thread_id, 0) + 1
        progress.total = sum(counts.values())
    for thread_id, least in counts.items():
        thread = await _read_thread(source, thread_id)
        if len(thread) < least:
            raise MigrationError(
                f"the source shows {len(thread)} checkpoints of thread {thread_id!r} instead of at"
                f" least {least}: it was deleted meanwhile, never was, or list() of one thread"
                " leaves out namespaces. What was copied before stays."
            )
        await _copy_thread(source, target, thread_id, thread, progress, report)
    return _end(progress, report)


def _end(progress: Progress, report: Report) -> Progress:
    progress.total, progress.is_done = max(progress.total, progress.done), True
    report(progress)
    return progress


async def _read_thread(saver: _Saver, thread_id: str) -> _Thread:
    """Read a thread; a parent that is not there is none."""
    thread: _Thread = {}
    async for one in saver.every({"configurable": {"thread_id": thread_id}}):
        parent = _key(one.parent_config) if one.parent_config is not None else None
        versions = dict(one.checkpoint["channel_versions"])
        thread[_key(one.config)] = _One(versions, parent, _digest(_content(one)))
    for found in thread.values():
        if found.parent not in thread:
            found.parent = None
    return thread


async def _copy_thread(
    source: _Saver,
    target: _Saver,
    thread_id: str,
    thread: _Thread,
    progress: Progress,
    report: Report,
) -> None:
    """Copy one thread, parents first; then read all of it from the target again."""
    present = await _read_thread(target, thread_id)
    before = progress.copied
    for key in _parents_first(thread):
        if not _is_same(thread[key], present.get(key)):
            await _copy_one(source, target, thread_id, key, thread)
            progress.copied += 1
        progress.done += 1
        report(progress)
    if progress.copied > before:
        await target.flush()  # what a cache says proves nothing
        await _verify(source, target, thread_id, thread)


def _parents_first(thread: _Thread) -> list[_Key]:
    """Order checkpoints by id, but no child before its parent: clocks differ."""
    ordered: dict[_Key, None] = {}
    for key in sorted(thread):
        line: list[_Key] = []
        above: _Key | None = key
        while above is not None and above not in ordered and above not in line:
            line.append(above)
            above = thread[above].parent
        ordered.update(dict.fromkeys(reversed(line)))
    return list(ordered)


async def _copy_one(
    source: _Saver, target: _Saver, thread_id: str, key: _Key, thread: _Thread
) -> None:
    config, parent = _config(thread_id, *key), thread[key].parent
    found = await source.get(config)
    if found is None:
        raise MigrationError(
            f"checkpoint {key[1]} of thread {thread_id!r} was deleted from the source while it was"
            " copied. What was copied stays; copy again once nothing changes the source."
        )
    known = thread[parent].versions if parent is not None else {}
    new = {c: v for c, v in thread[key].versions.items() if known.get(c) != v}
    tasks: dict[str, list[tuple[str, Any]]] = {}
    for task_id, channel, value in found.pending_writes or []:
        tasks.setdefault(task_id, []).append((channel, value))
    with _naming(f"checkpoint {key[1]} of thread {thread_id!r}"):
        await target.put(_config(thread_id, key[0], parent[1] if parent else ""), found, new)
        for position, (task_id, writes) in enumerate(tasks.items()):
            # Apart: what is special replaces what was, at its own index, and the rest has others.
            special = [write for write in writes if write[0] in WRITES_IDX_MAP]
            plain = [write for write in writes if write[0] not in WRITES_IDX_MAP]
            for some in filter(None, (plain, special)):
                await target.put_writes(config, some, task_id, f"{position:06d}")


async def _verify(source: _Saver, target: _Saver, thread_id: str, thread: _Thread) -> None:
    stored = await _read_thread(target, thread_id)
    for key, wanted in thread.items():
        if _is_same(wanted, stored.get(key)):
            continue
        # Sets within an object have no order. The one that was put is not asked, for the
        # target may have changed it.
        config = _config(thread_id, *key)
        pair = await source.get(config), await target.get(config)
        if key not in stored or stored[key].parent != wanted.parent or not _are_equal(*pair):
            raise MigrationError(
                f"checkpoint {key[1]} of thread {thread_id!r} does not come back from the target as"
                " the source has it. What was copied stays; the source was not changed. Perhaps the"
                " target does not know a type (serde=), had runs of it deleted, or has a thread of"
                " another history under this id; or the source has one version for two values, as"
                " savers that count versions may after a fork: no other saver can hold those."
            )


def _is_same(wanted: _One, found: _One | None) -> bool:
    return found is not None and found.digest == wanted.digest and found.parent == wanted.parent


def _are_equal(one: CheckpointTuple | None, other: CheckpointTuple | None) -> bool:
    if one is None or other is None:
        return False
    try:
        return bool(_content(one) == _content(other))
    except Exception:  # noqa: BLE001 - arrays, for example, are not simply equal
        return False


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say what the target refused."""
    try:
        yield
    except Exception as error:
        raise MigrationError(
            f"the target did not take {what} ({type(error).__name__}). What was copied before it"
            " stays; the source was not changed. Mend the cause, and copy again."
        ) from error


def _key(config: RunnableConfig) -> _Key:
    found = config["configurable"]
    return found.get("checkpoint_ns", ""), found["checkpoint_id"]


def _config(thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> RunnableConfig:
    where = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns}
    return {"configurable": where | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


# --- items -------------------------------------------------------------------


async def _copy_items(source: _Store, target: _Store, report: Report) -> Progress:
    progress = Progress()
    async for namespace in _namespaces(source):
        for item in await _items(source, namespace):
            progress.copied += await _copy_item(target, item)
            progress.done += 1
            report(progress)
    return _end(progress, report)


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


async def _copy_item(target: _Store, item: Item) -> bool:
    """Copy an item unless the target has it; return whether it had to be copied."""
    wanted = _digest(item.value)
    if await _has_item(target, item, wanted):
        return False
    with _naming(f"item {item.key!r} of namespace {item.namespace!r}"):
        await target.batch([PutOp(item.namespace, item.key, item.value)])
    if not await _has_item(target, item, wanted):
        raise MigrationError(
            f"item {item.key!r} of namespace {item.namespace!r} does not come back from the target"
            " as the source has it. What was copied before it stays; the source was not changed."
        )
    return True


async def _has_item(target: _Store, item: Item, wanted: bytes) -> bool:
    (found,) = await target.batch([GetOp(item.namespace, item.key, refresh_ttl=False)])
    return found is not None and _digest(found.value) == wanted


# --- comparison --------------------------------------------------------------


# Of our own: a source's may encrypt, and never give the same bytes twice.
_SERDE = JsonPlusSerializer(pickle_fallback=True)


def _content(found: CheckpointTuple) -> list[Any]:
    """Return all of a checkpoint that must be the same, in one order for every saver."""
    # Of one task the order is kept, but for special channels, which savers put anywhere.
    writes = sorted(found.pending_writes or [], key=lambda w: (w[0], WRITES_IDX_MAP.get(w[1], 0)))
    return [found.checkpoint, found.metadata, [tuple(write) for write in writes]]


def _digest(value: Any) -> bytes:
    """
    Return a SHA-256 of a value.

    The order of a dict's keys is nothing, which JSONB changes, nor that of a set.
    """
    if type(value) is dict:
        pairs = (_digest(key) + _digest(part) for key, part in value.items())
        return hashlib.sha256(b"dict" + b"".join(sorted(pairs))).digest()
    if type(value) in (list, tuple):
        parts = (_digest(part) for part in value)
        return hashlib.sha256(type(value).__name__.encode() + b"".join(parts)).digest()
    if isinstance(value, set | frozenset):
        members = sorted(_digest(part) for part in value)
        return hashlib.sha256(type(value).__name__.encode() + b"".join(members)).digest()
    type_, data = _SERDE.dumps_typed(value)
    return hashlib.sha256(type_.encode() + b":" + data).digest()
