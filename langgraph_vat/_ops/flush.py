"""
Move what was acknowledged into Postgres.

1. Lock the threads' rows; then read their journals, never before: so a flush
   and a change of history are always in order.
2. Write the journal and this process's own copies, less what an older fence
   says must stay away. All of it in one transaction.
3. Only after the commit: trim those very entries, and drop those very copies.

A flush may die anywhere and be done again: every statement gives the same
rows the second time. An entry whose base is missing is held back, with those
that build on it; it stays in the journal.
"""

import itertools
import logging
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.rows import columns
from langgraph_vat._hot import scripts
from langgraph_vat._hot.entries import parse_entry
from langgraph_vat._io.protocols import Arg, Backend, Hot, HotTierError, Row, Session
from langgraph_vat._ops.compact import Packed, Packing, pack_entries
from langgraph_vat._ops.patches import made_whole
from langgraph_vat._ops.plain import is_in_the_clear, sealed_entry
from langgraph_vat._ops.shared import Shared, known_in, now
from langgraph_vat._ops.tiers import degrade, holds_epoch, hot_to_write
from langgraph_vat._records import Entry, Fence, PutEntry
from langgraph_vat.errors import (
    QuarantinedError,
    RefusedError,
    SchemaError,
    UnavailableError,
    VatError,
)

logger = logging.getLogger("langgraph_vat")
T = TypeVar("T")

# Threads of one transaction: enough to share a commit, few enough to be quick.
_MOST_THREADS = 64
# Seconds for which a step waits for what it builds on, should that be in another
# process's hands: that one may be slow, or frozen.
_BASELESS_S = 60.0
_FORGOTTEN_S = 10 * _BASELESS_S
# Later than any history number: then nothing waits for a parent.
_ANY = 2**63


@dataclass(slots=True)
class _Batch:
    """One thread's share of a flush."""

    thread_id: str
    journal: list[tuple[bytes, Entry]]
    copies: list[Entry]
    unread: int = 0
    """Entries at the journal's end that only a process with the thread's key can read."""
    held: set[bytes] = field(default_factory=set)
    own: set[bytes] = field(default_factory=set)
    """Entries that this process took itself, and has from its own memory."""

    @property
    def entries(self) -> list[Entry]:
        """The journal in its order, then the copies that Redis no longer has."""
        present = {entry.uid for _, entry in self.journal}
        return [e for _, e in self.journal] + [e for e in self.copies if e.uid not in present]

    @property
    def only_copies(self) -> list[Entry]:
        """What Postgres got past Redis."""
        present = {entry.uid for _, entry in self.journal}
        return [e for e in self.copies if e.uid not in present and e.uid not in self.held]


async def flush(
    shared: Shared, backend: Backend, thread_ids: Iterable[str], *, wait: bool = True
) -> None:
    """
    Flush threads; when this returns, what they had acknowledged before is in Postgres.

    Without `wait`, threads that another transaction holds are left to it.

    Raises:
        UnavailableError: Postgres does not answer, or steps wait for others
            that only another process has; nothing was lost.
        QuarantinedError: Postgres refuses the data of a thread for good.
        SchemaError: It refuses a thread, or all, for want of a table or a right.
    """
    todo, waiting = sorted(thread_ids), 0
    problem: VatError | None = None
    for start in range(0, len(todo), _MOST_THREADS):
        some = todo[start : start + _MOST_THREADS]
        try:
            waiting += await _flush_some(shared, backend, some, wait=wait)
        except (RefusedError, SchemaError):
            for thread_id in some:
                found = await _flush_alone(shared, backend, thread_id, wait=wait)
                # A single thread's trouble is told to whoever waits for that thread.
                if found is not None and (len(todo) == 1 or isinstance(found, SchemaError)):
                    problem = found
    if problem is not None:
        raise problem
    if wait and waiting:
        raise UnavailableError(
            f"steps ({waiting}) wait for others that another process has still to store, for"
            f" {_BASELESS_S:.0f} s at most. Nothing was lost yet; repeat it in some seconds."
        )


async def commit(shared: Shared, backend: Backend, thread_id: str, entry: Entry) -> bytes:
    """
    Store one entry in Postgres without Redis, after this process's own copies.

    Returns:
        ``ok``; or ``stale`` where the thread has another fence, ``whole``
        where its parent or a value that it relies on is missing, ``conflict``
        where another step follows its parent and forks are refused, ``hot``
        where Redis is trusted again: nothing of it was stored.
    """

    async def body(session: Session) -> bytes | _Batch:
        if backend.hot is not None and not await holds_epoch(shared, session):
            return b"hot"
        locked = await _lock(shared, session, [thread_id], wait=True)
        if locked.fences.get(thread_id) != entry.fence:
            return b"stale"
        if isinstance(entry, PutEntry) and await _is_fork(shared, session, thread_id, entry):
            return b"conflict"
        own = [*shared.copies.of(thread_id), entry]
        batch = _Batch(thread_id, [], own, own={one.uid for one in own})
        await _write(shared, session, locked, [batch])
        return batch

    done = await backend.durable.transact(body)
    if isinstance(done, bytes):
        return done
    _drop(shared, done)
    return b"whole" if entry.uid in done.held else b"ok"


async def _is_fork(shared: Shared, session: Session, thread_id: str, entry: PutEntry) -> bool:
    """Whether forks are refused, and this step does not follow the newest one."""
    if shared.settings.on_conflict == "fork":
        return False
    params = {"thread": thread_id, "namespace": entry.checkpoint_ns}
    stored = [row[0] for row in await session.fetch(sql.SELECT_NEWEST_ID, params)]
    own = [
        copy.checkpoint_id
        for copy in shared.copies.of(thread_id)
        if isinstance(copy, PutEntry) and copy.checkpoint_ns == entry.checkpoint_ns
    ]
    newest = max(stored + own, default=entry.parent_id)
    return newest not in (entry.parent_id, entry.checkpoint_id)


async def overdue(
    shared: Shared, backend: Backend, *, own_s: float, any_s: float, most: int = -1
) -> list[str]:
    """
    Return threads whose journal has this age, in seconds: our own, and anybody's.

    Of anybody's at most `most` of each bucket, the oldest; all of them for -1.
    """
    threads = set(shared.copies.older_than(own_s))
    if backend.hot is not None and not shared.is_degraded:
        try:
            threads.update(await _dirty(shared, backend.hot, any_s, most))
        except HotTierError:
            await degrade(shared, backend)
    return sorted(threads)


async def _dirty(shared: Shared, hot: Hot, age_s: float, most: int) -> list[str]:
    redis_ms = await hot.script(scripts.CLOCK, [shared.keys.identity], [])
    latest = redis_ms - int(age_s * 1000)
    found = await hot.read_each(
        "ZRANGEBYSCORE", shared.keys.buckets, "-inf", latest, "LIMIT", 0, most
    )
    threads = []
    for raw in itertools.chain.from_iterable(found):
        with suppress(UnicodeDecodeError):  # no thread's name
            threads.append(raw.decode())
    return threads


async def _flush_alone(
    shared: Shared, backend: Backend, thread_id: str, *, wait: bool
) -> VatError | None:
    """Flush a thread; return why it cannot be."""
    try:
        await _flush_some(shared, backend, [thread_id], wait=wait)
    except SchemaError as error:
        return error
    except RefusedError as error:
        return _quarantine(shared, thread_id, error)
    return None


def _quarantine(shared: Shared, thread_id: str, cause: RefusedError) -> QuarantinedError:
    if thread_id not in shared.quarantine:
        logger.error("thread %r: %s", thread_id, cause)
    shared.quarantine[thread_id] = cause
    error = QuarantinedError(
        f"Postgres refuses steps of thread {thread_id!r} that were acknowledged. They stay in the"
        f" journal and other threads go on. {cause}"
    )
    error.__cause__ = cause
    return error


async def _flush_some(
    shared: Shared, backend: Backend, thread_ids: Sequence[str], *, wait: bool
) -> int:
    """Flush in one transaction; return how many entries had to stay."""
    born: set[str] = set()

    async def body(session: Session) -> list[_Batch] | None:
        if is_past and not await holds_epoch(shared, session):
            return None
        locked = await _lock(shared, session, thread_ids, wait=wait)
        fences, mine = locked.fences, locked.mine
        batches = [await _read(shared, session, hot, t, fences.get(t)) for t in mine]
        born.clear()
        # What was read since may be of the next life of one that exists now. Of the others
        # it is of a life that ended: a fence is there before the first step is taken.
        born.update(await _existing(session, [t for t in mine if t not in fences]))
        batches = [batch for batch in batches if batch.thread_id not in born]
        if any(batch.entries for batch in batches):
            await _write(shared, session, locked, batches)
            await _note_flushed(session, batches)
        return batches

    batches = None
    while batches is None:
        hot = await hot_to_write(shared, backend)
        is_past = hot is None and backend.hot is not None
        try:
            batches = await _noting(shared, backend.durable.transact(body))
        except HotTierError:
            await degrade(shared, backend)
    for batch in batches:
        shared.counters.flushes += bool(batch.entries)
        shared.counters.flushed_steps += sum(isinstance(e, PutEntry) for e in batch.entries)
        await _finish(shared, backend, hot, batch)
        shared.quarantine.pop(batch.thread_id, None)
    held = sum(len(batch.held) + batch.unread for batch in batches)
    return held + (
        await _flush_some(shared, backend, sorted(born), wait=True) if born and wait else 0
    )


async def _noting(shared: Shared, transaction: Awaitable[T]) -> T:
    try:
        done = await transaction
    except UnavailableError:
        note_durable(shared, is_away=True)
        raise
    note_durable(shared, is_away=False)
    return done


def note_durable(shared: Shared, *, is_away: bool) -> None:
    """Remember, and say when it changes, whether Postgres takes what is flushed."""
    if is_away and not shared.is_durable_away:
        logger.warning(
            "Postgres does not answer: with flush_every > 1 runs go on, their steps are kept in"
            " Redis and in this process, up to max_backlog; other calls raise. It is asked again"
            " and again."
        )
    elif shared.is_durable_away and not is_away:
        logger.warning("Postgres answers again: what was kept is flushed.")
    shared.is_durable_away = is_away


class _Locked(NamedTuple):
    """Threads under lock."""

    fences: dict[str, Fence]
    sealed: set[str]
    """Those that have a data key, also if it was destroyed."""
    mine: Sequence[str]
    """Those that are ours to flush."""


async def _lock(
    shared: Shared, session: Session, thread_ids: Sequence[str], *, wait: bool
) -> _Locked:
    """
    Lock what can be.

    Copies that other processes have stored go: to store them once more would
    undo what came since.
    """
    params = {"threads": list(thread_ids)}
    rows = await session.fetch(sql.LOCK_THREADS if wait else sql.TRY_LOCK_THREADS, params)
    fences = {row[0]: Fence(*row[1:3]) for row in rows}
    sealed = {row[0] for row in rows if row[4]}
    for thread_id, _, _, flushed, _ in rows:
        shared.copies.drop(thread_id, flushed)
    if wait or len(fences) == len(thread_ids):
        return _Locked(fences, sealed, thread_ids)
    # Of the others, those that exist are being flushed by someone. A deleted
    # one's journal is ours to discard.
    existing = await _existing(session, thread_ids)
    mine = [t for t in thread_ids if t in fences or t not in existing]
    return _Locked(fences, sealed, mine)


async def _existing(session: Session, thread_ids: Sequence[str]) -> set[str]:
    if not thread_ids:
        return set()
    rows = await session.fetch(sql.EXISTING_THREADS, {"threads": list(thread_ids)})
    return {row[0] for row in rows}


async def _read(
    shared: Shared, session: Session, hot: Hot | None, thread_id: str, fence: Fence | None
) -> _Batch:
    own = {entry.uid: entry for entry in shared.copies.of(thread_id)}
    if hot is None:
        return _Batch(thread_id, [], list(own.values()), own=set(own))
    # What this process has need not travel again.
    raw = await hot.script(scripts.JOURNAL, [shared.keys.journal(thread_id)], list(own))
    journal = [
        (entry_id, own[fields[1]] if len(fields) == 2 else parse_entry(fields))  # noqa: PLR2004
        for entry_id, fields in raw
    ]
    # A flush that just ended has dropped what it took out of the journal.
    left = [entry for entry in shared.copies.of(thread_id) if entry.uid in own]
    entries = [entry for _, entry in journal]
    whole = await made_whole(shared, session, thread_id, fence, entries, left)
    ids = (entry_id for entry_id, _ in journal)
    pairs = list(zip(ids, whole, strict=False))
    return _Batch(thread_id, pairs, left, len(entries) - len(whole), own=set(own))


async def _write(shared: Shared, session: Session, locked: _Locked, batches: list[_Batch]) -> None:
    fences, wanted = locked.fences, {}
    for batch in batches:
        fence = fences.get(batch.thread_id)
        same = [entry for entry in batch.entries if _same_life(entry, fence)]
        if fence is not None and batch.thread_id in locked.sealed:
            same = await _admitted(shared, session, batch, fence, same)
        wanted[batch.thread_id] = same
    checks = await _check(session, fences, wanted)
    for batch in batches:
        fence = fences.get(batch.thread_id)
        kept = [e for e in wanted[batch.thread_id] if not _is_history(e, fence, checks, batch)]
        wanted[batch.thread_id] = _satisfied(shared, batch, kept, checks, fence)
    pairs = [(thread_id, entry) for thread_id, some in wanted.items() for entry in some]
    if pairs:
        is_compact = shared.settings.storage == "compact"
        packing = await pack_entries(shared, session, pairs, fences, is_compact=is_compact)
        await _insert(session, pairs, packing, shared.settings.thread_metadata)


async def _admitted(
    shared: Shared, session: Session, batch: _Batch, fence: Fence, entries: list[Entry]
) -> list[Entry]:
    """
    Return the entries of a sealed thread, with nothing of them in the clear.

    What this process took itself before the thread was sealed is sealed here. Else
    nobody's is: it was stored before the thread got its key, or was put there since.
    """
    is_clear = {entry.uid for entry in entries if is_in_the_clear(entry)}
    if not is_clear:
        return entries
    if strange := is_clear - batch.own:
        logger.error(
            "entries (%d) in the journal of thread %r are in the clear, and it is sealed: they were"
            " dropped. Redis went back to before it was sealed, or somebody else writes to it.",
            len(strange),
            batch.thread_id,
        )
    kept = [entry for entry in entries if entry.uid not in strange]
    if is_clear <= strange:
        return kept
    known = await known_in(shared, session, batch.thread_id, fence)
    if known is None or not known.is_sealed:
        raise RefusedError(
            f"thread {batch.thread_id!r} was sealed since this process took its steps, and they"
            " cannot be sealed here. Restart it with keyring= and accept_plaintext=."
        )
    return [
        sealed_entry(shared, batch.thread_id, known, entry) if entry.uid in is_clear else entry
        for entry in kept
    ]


async def _note_flushed(session: Session, batches: list[_Batch]) -> None:
    """Tell other processes which of their steps are stored."""
    rows = []
    for batch in batches:
        settled = batch.held | {entry.uid for entry in batch.copies}
        rows += [(batch.thread_id, e.uid) for _, e in batch.journal if e.uid not in settled]
    if rows:
        await session.execute(sql.NOTE_FLUSHED, columns(rows, "threads", "uids"))


# Rows to insert, by their primary keys.
_Values = dict[tuple[Any, ...], tuple[Any, ...]]


@dataclass(slots=True)
class _Checks:
    """What Postgres said about a batch under the lock."""

    missing: set[tuple[str, str, str, str]]
    orphans: set[tuple[str, str, str]]
    floors: dict[tuple[str, str], str]
    runs: set[str]


async def _check(
    session: Session, fences: dict[str, Fence], wanted: dict[str, list[Entry]]
) -> _Checks:
    needs = {
        (thread_id, entry.checkpoint_ns, channel, version)
        for thread_id, entries in wanted.items()
        for entry in entries
        if isinstance(entry, PutEntry)
        for channel, version in entry.needs
    }
    children = {
        (thread_id, entry.checkpoint_ns, entry.parent_id)
        for thread_id, entries in wanted.items()
        for entry in entries
        if isinstance(entry, PutEntry) and entry.parent_id
    }
    runs = {entry.run_id for entries in wanted.values() for entry in entries if entry.run_id}
    checks = _Checks(set(), set(), {}, set())
    if not needs and not children and not runs and not any(f.history for f in fences.values()):
        return checks  # nothing was ever pruned here: no floors
    names = ("need_threads", "need_namespaces", "need_channels", "need_versions")
    params = {
        **columns(sorted(needs), *names),
        **columns(sorted(children), "child_threads", "child_namespaces", "parents"),
        "threads": list(wanted),
        "runs": sorted(runs),
    }
    for kind, first, second, third, fourth in await session.fetch(sql.CHECK_ENTRIES, params):
        if kind == "missing":
            checks.missing.add((first, second, third, fourth))
        elif kind == "orphan":
            checks.orphans.add((first, second, third))
        elif kind == "floor":
            checks.floors[first, second] = third
        else:
            checks.runs.add(first)
    return checks


def _same_life(entry: Entry, fence: Fence | None) -> bool:
    return fence is not None and entry.fence.generation == fence.generation


def _is_history(entry: Entry, fence: Fence | None, checks: _Checks, batch: _Batch) -> bool:
    """Whether an entry from before a prune or a deletion of runs must stay away."""
    if entry.run_id in checks.runs:
        return True
    floor = checks.floors.get((batch.thread_id, entry.checkpoint_ns))
    is_older = fence is not None and entry.fence.history < fence.history
    return is_older and floor is not None and entry.checkpoint_id < floor


def _satisfied(
    shared: Shared, batch: _Batch, entries: list[Entry], checks: _Checks, fence: Fence | None
) -> list[Entry]:
    """
    Return the entries whose base Postgres has, or gets with them; hold the others back.

    Their order says nothing: after Redis lost its memory what came first is
    only among the copies, behind what the journal has since. The base may
    then be among another process's copies, which stores them as soon as it
    can. A base that does not come was lost by two failures at once: values
    that build on it go with it, and a parent is no longer named. Nor is one
    that is gone since the history was changed: it need not be waited for.
    """
    puts = [entry for entry in entries if isinstance(entry, PutEntry)]
    history = fence.history if fence is not None else 0
    waiting = _baseless(batch.thread_id, puts, checks, history)
    is_new = any(entry.uid not in shared.baseless for entry in waiting)
    is_late = _is_late(shared, waiting)
    out: set[bytes] = set()
    while baseless := _baseless(batch.thread_id, puts, checks, _ANY if is_late else history):
        out |= {entry.uid for entry in baseless}
        puts = [entry for entry in puts if entry.uid not in out]
    if not is_late:
        batch.held = out
    if out and (is_late or is_new):
        _say_baseless(batch.thread_id, len(out), is_late=is_late)
    here = {(entry.checkpoint_ns, entry.checkpoint_id) for entry in puts}
    kept: list[Entry] = []
    for entry in entries:
        if entry.uid in out:
            continue
        if isinstance(entry, PutEntry) and _is_orphan(batch.thread_id, entry, checks, here):
            kept.append(replace(entry, parent_id=""))
        else:
            kept.append(entry)
    for entry in entries if is_late else kept:
        shared.baseless.pop(entry.uid, None)
    return kept


def _say_baseless(thread_id: str, count: int, *, is_late: bool) -> None:
    if is_late:
        logger.error(
            "thread %r lost steps (%d) that were acknowledged: what they build on is neither in"
            " Postgres nor with any process. Was Postgres restored from a backup, or did Redis and"
            " a process fail at once?",
            thread_id,
            count,
        )
    else:
        logger.warning(
            "steps (%d) of thread %r wait for others that only another process has",
            count,
            thread_id,
        )


def _is_late(shared: Shared, baseless: list[PutEntry]) -> bool:
    """Whether one of them has waited for its base for longer than a live process takes."""
    for uid, waiting in list(shared.baseless.items()):
        if now() - waiting > _FORGOTTEN_S:  # another process stored it, or its thread is gone
            shared.baseless.pop(uid, None)
    since = [shared.baseless.setdefault(entry.uid, now()) for entry in baseless]
    return bool(since) and now() - min(since) > _BASELESS_S


def _baseless(
    thread_id: str, puts: list[PutEntry], checks: _Checks, history: int
) -> list[PutEntry]:
    """Return what lacks values; or a parent, of what was taken in this history or a later one."""
    brought = {(e.checkpoint_ns, b.channel, b.version) for e in puts for b in e.blobs}
    here = {(entry.checkpoint_ns, entry.checkpoint_id) for entry in puts}
    return [
        entry
        for entry in puts
        if any(
            (thread_id, entry.checkpoint_ns, *need) in checks.missing
            and (entry.checkpoint_ns, *need) not in brought
            for need in entry.needs
        )
        or (entry.fence.history >= history and _is_orphan(thread_id, entry, checks, here))
    ]


def _is_orphan(
    thread_id: str, entry: PutEntry, checks: _Checks, here: set[tuple[str, str]]
) -> bool:
    ns, parent_id = entry.checkpoint_ns, entry.parent_id
    return (thread_id, ns, parent_id) in checks.orphans and (ns, parent_id) not in here


async def _insert(
    session: Session, pairs: list[tuple[str, Entry]], packing: Packing, shown: Sequence[str]
) -> None:
    """Insert entries; and with the checkpoints, last, what is told of their threads."""
    puts = [(t, e) for t, e in pairs if isinstance(e, PutEntry)]
    stored = await _insert_blobs(session, puts, packing)
    stored += await _insert_writes(session, pairs, packing)
    checkpoints = {
        (t, e.checkpoint_ns, e.checkpoint_id): (e.parent_id, *_core_columns(e)) for t, e in puts
    }
    names = (
        "threads",
        "namespaces",
        "ids",
        "parents",
        "checkpoints",
        "metadata",
        "types",
        "exacts",
    )
    rows = [(*key, *value) for key, value in checkpoints.items()]
    sizes = dict.fromkeys((thread_id for thread_id, _ in pairs), 0)
    for thread_id, *_, checkpoint, metadata, _, exact in rows:
        sizes[thread_id] += len(checkpoint) + len(metadata) + len(exact or b"")
    for thread_id, *values in stored:
        sizes[thread_id] += sum(len(value) for value in values if isinstance(value, bytes))
    params = {**columns(rows, *names), **columns(list(sizes.items()), "touched", "sizes")}
    await session.execute(sql.INSERT_CHECKPOINTS, {**params, "shown": list(shown)})


def _core_columns(entry: PutEntry) -> tuple[str, str, str, bytes | None]:
    core = entry.core
    exact = core.exact if core.exact_type else None
    return core.checkpoint.decode(), core.metadata.decode(), core.exact_type, exact


async def _insert_blobs(
    session: Session, puts: list[tuple[str, PutEntry]], packing: Packing
) -> list[Row]:
    """Insert values; return the rows that are new, if their versions are."""
    new: _Values = {}
    kept: _Values = {}
    for thread_id, entry in puts:
        for blob in entry.blobs:
            if blob.data is None:
                continue
            key = (thread_id, entry.checkpoint_ns, blob.channel, blob.version)
            if blob.channel in entry.kept:
                kept[key] = (blob.type, blob.data)
            elif key not in packing.present:
                new[key] = packing.blobs.get(key, Packed(blob.type, blob.data)).columns
    names = ("threads", "namespaces", "channels", "versions", "types", "blobs")
    rows: list[Row] = [(*key, *value) for key, value in new.items()]
    others: list[Row] = [(*key, *value) for key, value in kept.items()]
    if rows:
        await session.execute(sql.INSERT_BLOBS, columns(rows, *names, "steps", "bases"))
    if others:
        await session.execute(sql.INSERT_MISSING_BLOBS, columns(others, *names))
    return rows


async def _insert_writes(
    session: Session, pairs: list[tuple[str, Entry]], packing: Packing
) -> list[Row]:
    """Insert pending writes; return their rows."""
    first: _Values = {}
    last: _Values = {}
    for thread_id, entry in pairs:
        if isinstance(entry, PutEntry):
            continue
        for write in entry.writes:
            key = (thread_id, entry.checkpoint_ns, entry.checkpoint_id, write.task_id, write.idx)
            packed = packing.writes.get(
                (entry.uid, write.task_id, write.idx), Packed(write.type, write.data)
            )
            type_, data, _, bases = packed.columns
            value = (write.task_path, write.channel, type_, data, bases)
            if write.idx >= 0:
                first.setdefault(key, value)
            elif key not in last or last[key][-1] <= entry.epoch:
                last[key] = (*value, entry.epoch)
    names = (
        "threads",
        "namespaces",
        "ids",
        "tasks",
        "idxs",
        "paths",
        "channels",
        "types",
        "blobs",
        "bases",
    )
    firsts: list[Row] = [(*key, *value) for key, value in first.items()]
    lasts: list[Row] = [(*key, *value) for key, value in last.items()]
    if firsts:
        await session.execute(sql.INSERT_FIRST_WRITES, columns(firsts, *names))
    if lasts:
        await session.execute(sql.INSERT_LAST_WRITES, columns(lasts, *names, "epochs"))
    return firsts + lasts


async def _finish(shared: Shared, backend: Backend, hot: Hot | None, batch: _Batch) -> None:
    """
    Let go of what Postgres has now: heads that it has overtaken, then copies, then the journal.

    In this order no flush beside this one finds an entry that was in the
    journal among the copies only, and takes it for one that Redis lost.
    """
    if hot is not None:
        await _void(shared, backend, hot, batch)
    _drop(shared, batch)
    if hot is not None:
        await _trim(shared, hot, batch)


async def _void(shared: Shared, backend: Backend, hot: Hot, batch: _Batch) -> None:
    """Have no head served that lacks what came past Redis; or end the epoch in which it is."""
    past = {entry.checkpoint_ns for entry in batch.only_copies}
    if not past:
        return
    heads = [shared.keys.head(batch.thread_id, ns) for ns in sorted(past)]
    try:
        await hot.script(scripts.VOID, [shared.keys.meta(batch.thread_id), *heads], [])
    except HotTierError:
        await degrade(shared, backend)


async def _trim(shared: Shared, hot: Hot, batch: _Batch) -> None:
    """Take out of the journal what Postgres has now; if that fails the next flush does it."""
    done = [(entry_id, e) for entry_id, e in batch.journal if e.uid not in batch.held]
    if batch.journal and not done:
        return  # an empty one that was evicted leaves its thread's name
    keys, thread_id = shared.keys, batch.thread_id
    steps = [entry_id for entry_id, entry in done if isinstance(entry, PutEntry)]
    others = [entry_id for entry_id, entry in done if not isinstance(entry, PutEntry)]
    three = [keys.meta(thread_id), keys.journal(thread_id), keys.dirty(thread_id)]
    args: list[Arg] = [thread_id, shared.settings.head_ttl_s, len(steps), *steps, *others]
    with suppress(HotTierError):
        await hot.script(scripts.TRIM, three, args)


def _drop(shared: Shared, batch: _Batch) -> None:
    uids = (e.uid for e in batch.copies if e.uid not in batch.held)
    shared.copies.drop(batch.thread_id, uids)
