"""
History is Postgres's: flush what waits, then ask.

Nothing here merges the tiers. A checkpoint named by its id is read from the
head only where it is the head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from langgraph.checkpoint.base import CheckpointTuple, DeltaChannelHistory, writes_sort_key
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg.sql import SQL

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.blind import page_by_tokens
from langgraph_vat._durable.rows import to_snapshot
from langgraph_vat._hot import scripts
from langgraph_vat._io.protocols import Backend, HotTierError, Row
from langgraph_vat._ops.address import tenant_of
from langgraph_vat._ops.flush import flush, overdue
from langgraph_vat._ops.hot import read_head
from langgraph_vat._ops.shared import Known, Shared, open_tokens, tokens
from langgraph_vat._ops.threads import find, find_all, is_torn
from langgraph_vat._ops.tiers import degrade, hot_to_read
from langgraph_vat._ops.values import READABLE_METADATA, Unpacker, to_tuple, without_values
from langgraph_vat._plain import is_plain
from langgraph_vat._records import Blob, Snapshot, Write
from langgraph_vat._seal.blind_index import BLIND
from langgraph_vat._seal.codec import Codec, SealedCodec, is_sealed
from langgraph_vat.errors import SealError

_PAGE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """
    What a list asks for. Every condition may be absent.

    `prefix` is what the stored thread ids must begin with if the view is
    scoped, and must not begin with if it is not.
    """

    thread_id: str | None
    checkpoint_ns: str | None
    checkpoint_id: str | None
    before_id: str | None
    filter: Mapping[str, Any]
    prefix: str
    is_scoped: bool
    has_values: bool


Cursor = tuple[str, str, str]


async def flush_waiting(shared: Shared, backend: Backend, thread_id: str | None) -> None:
    """Flush one thread, or every dirty one, if anything waits there."""
    hot = await hot_to_read(shared, backend)
    if thread_id is None:
        await flush(shared, backend, await overdue(shared, backend, own_s=0, any_s=0))
        return
    waits = bool(shared.copies.of(thread_id))
    if hot is not None and not waits:
        try:
            waits = await hot.script(scripts.LENGTH, [shared.keys.journal(thread_id)], []) > 0
        except HotTierError:
            await degrade(shared, backend)
    if waits:
        await flush(shared, backend, [thread_id])


async def get_one(
    shared: Shared, backend: Backend, thread_id: str, checkpoint_ns: str, checkpoint_id: str
) -> tuple[Snapshot, Known] | None:
    """Return the checkpoint with this id."""
    hot = await hot_to_read(shared, backend)
    answer = b""
    if hot is not None:
        try:
            answer, head = await read_head(
                shared, backend, hot, thread_id, checkpoint_ns, checkpoint_id
            )
            if answer == b"ok" and head is not None:
                shared.counters.hits += 1
                return head
        except HotTierError:
            await degrade(shared, backend)
    if answer != b"clean" or shared.copies.of(thread_id):
        await flush_waiting(shared, backend, thread_id)
    params = {"thread": thread_id, "namespace": checkpoint_ns, "checkpoint": checkpoint_id}
    rows = await backend.durable.fetch(sql.SELECT_ONE, params)
    known = await _known(shared, backend, thread_id) if rows else None
    if known is None:
        return None
    snapshot = await _untorn(backend, known, to_snapshot(rows[0]))
    return (snapshot, known) if snapshot else None


async def page(
    shared: Shared,
    backend: Backend,
    serde: SerializerProtocol,
    listing: Listing,
    cursor: Cursor | None,
    most: int | None,
) -> tuple[list[tuple[str, CheckpointTuple]], Cursor | None]:
    """
    Return one page of a list, newest first across threads and namespaces.

    Returns:
        Pairs of stored thread id and checkpoint; and where the next page begins,
        None after the last.
    """
    if cursor is None:
        await flush_waiting(shared, backend, listing.thread_id)
    size = _PAGE if most is None else max(1, min(most, _PAGE))
    rows = await _page_rows(shared, backend, listing, cursor, size)
    if listing.thread_id is None:
        threads = await find_all(shared, backend, {row[0] for row in rows})
    else:
        known = await _known(shared, backend, listing.thread_id)
        threads = {listing.thread_id: known} if known else {}
    found = []
    for row in rows:
        snapshot = to_snapshot(row)
        known = threads.get(snapshot.thread_id)
        if known is None:
            continue  # deleted meanwhile, or shredded
        thread_id = snapshot.thread_id
        untorn = await _untorn(backend, known, snapshot)
        if untorn is None:
            continue
        snapshot = untorn if listing.has_values else without_values(untorn)
        result = to_tuple(snapshot, known.codec(serde, thread_id), thread_id)
        if all(result.metadata.get(key) == value for key, value in listing.filter.items()):
            found.append((thread_id, result))
    if len(rows) < size:
        return found, None
    thread_id, namespace, checkpoint_id = rows[-1][:3]
    return found, (checkpoint_id, thread_id, namespace)


async def _untorn(backend: Backend, known: Known, snapshot: Snapshot) -> Snapshot | None:
    """Return a checkpoint as it is now, if its thread was sealed since; None if it is gone."""
    if not is_torn(known, snapshot):
        return snapshot
    params = {
        "thread": snapshot.thread_id,
        "namespace": snapshot.checkpoint_ns,
        "checkpoint": snapshot.checkpoint_id,
    }
    rows = await backend.durable.fetch(sql.SELECT_ONE, params)
    return to_snapshot(rows[0]) if rows else None


async def _page_rows(
    shared: Shared, backend: Backend, listing: Listing, cursor: Cursor | None, size: int
) -> list[Row]:
    """Return the rows of one page; more than match, where SQL cannot tell."""
    params = _page_params(shared, listing, cursor, size)
    tenant = tenant_of(listing.prefix) if listing.is_scoped else ""
    await open_tokens(shared, backend)
    asked = [field for field in shared.filterable if field in listing.filter]
    wanted = {k: v for k, v in tokens(shared, tenant, listing.filter, asked).items() if v}
    if wanted:
        fields = list(wanted)
        selected = SQL(sql.SNAPSHOT if listing.has_values else sql.LIGHT_SNAPSHOT)
        visible = orjson.loads(params.pop("filter"))
        for number in range(len(fields) + 1):
            some = {field: wanted[field] for field in fields[:number]}
            given = visible | ({BLIND: some} if some else {})
            params[f"filter_{number}"] = orjson.dumps(given).decode()
        return await backend.durable.fetch(page_by_tokens(selected, fields), params, plan_anew=True)
    statement = sql.SELECT_PAGE if listing.has_values else sql.SELECT_LIGHT_PAGE
    return await backend.durable.fetch(statement, params, plan_anew=True)


def _page_params(
    shared: Shared, listing: Listing, cursor: Cursor | None, size: int
) -> dict[str, Any]:
    after_id, after_thread, after_namespace = cursor or (None, None, None)
    # Every row is checked again once it is open; here is only what SQL can see.
    visible = {
        key: value
        for key, value in listing.filter.items()
        if is_plain(value)
        and is_plain(key)
        and (shared.keyring is None or key in READABLE_METADATA)
    }
    return {
        "thread": listing.thread_id,
        "namespace": listing.checkpoint_ns,
        "checkpoint": listing.checkpoint_id,
        "before": listing.before_id,
        "after_id": after_id,
        "after_thread": after_thread,
        "after_namespace": after_namespace,
        "filter": orjson.dumps({k: v for k, v in visible.items() if v is not None}).decode(),
        "exact": orjson.dumps({k: v for k, v in visible.items() if not _is_scalar(v)}).decode(),
        "prefix": listing.prefix,
        "scoped": listing.is_scoped,
        "limit": size,
    }


def _is_scalar(value: Any) -> bool:
    """Whether what contains a value is equal to it."""
    return value is not None and not isinstance(value, dict | list | tuple)


async def delta_history(
    shared: Shared,
    backend: Backend,
    serde: SerializerProtocol,
    thread_id: str,
    checkpoint_ns: str,
    checkpoint_id: str,
    channels: Sequence[str],
) -> Mapping[str, DeltaChannelHistory]:
    """Return each channel's writes since its nearest stored value, and that value as seed."""
    await flush_waiting(shared, backend, thread_id)
    params = {
        "thread": thread_id,
        "namespace": checkpoint_ns,
        "checkpoint": checkpoint_id,
        "channels": list(channels),
    }
    rows = await backend.durable.fetch(sql.SELECT_DELTA_HISTORY, params)
    known = await _known(shared, backend, thread_id)
    if known is not None and known.is_sealed and not all(is_sealed(row[7] or "") for row in rows):
        # It was sealed in between.
        rows = await backend.durable.fetch(sql.SELECT_DELTA_HISTORY, params)
    codec = known.codec(serde, thread_id) if known else None
    return {
        channel: _history(codec, checkpoint_ns, channel, [r for r in rows if r[3] == channel])
        for channel in channels
    }


def _history(
    codec: Codec | None, checkpoint_ns: str, channel: str, rows: Sequence[Row]
) -> DeltaChannelHistory:
    """Build one channel's history from its rows, which come nearest ancestor first."""
    steps: dict[int, list[tuple[str, Write]]] = {}
    entry: DeltaChannelHistory = {"writes": []}
    if codec is None:
        return entry
    blobs = [Blob(channel, row[2], row[7], row[8], row[10]) for row in rows if row[0] == "base"]
    unpacker = Unpacker(codec, checkpoint_ns, blobs)
    for kind, depth, owner, _, path, task_id, idx, type_, data, inline, base in rows:
        if kind == "base":
            continue
        if kind == "write":
            write = Write(task_id, idx, path, channel, type_, data, base)
            steps.setdefault(depth, []).append((owner, write))
        elif kind == "blob":
            entry["seed"] = unpacker.load_blob(Blob(channel, owner, type_, data, base))
        elif isinstance(codec, SealedCodec):
            raise SealError(
                f"a value of channel {channel!r} must be sealed and is not; it was not used"
            )
        else:
            entry.setdefault("seed", inline)
    for depth in sorted(steps, reverse=True):
        ordered = sorted(
            steps[depth], key=lambda s: writes_sort_key(s[1].task_path, s[1].task_id, s[1].idx)
        )
        entry["writes"] += [
            (write.task_id, channel, unpacker.load_write(owner, write)) for owner, write in ordered
        ]
    return entry


async def _known(shared: Shared, backend: Backend, thread_id: str) -> Known | None:
    """Return a thread's fence and key; of a sealed one as they are now, not as they were."""
    known = shared.threads.get(thread_id) if shared.keyring is None else None
    return known or await find(shared, backend, thread_id, create=False)
