"""
What of a step travels to Redis: of a large value that grew, what is new.

Redis would write a large value twice for each step, and log both. So the head
keeps one version whole, under a mark, and the newest as one patch of it. The
journal has the patch, too: whoever flushes it finds the base in front of it in
the journal, or in Postgres, and makes it whole before anything else. The
process that took the step keeps it whole.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.packing import damaged, is_patch, patch, unpack
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Row, Session
from langgraph_vat._ops.shared import NO_SERDE, Shared, known_in
from langgraph_vat._ops.values import Unpacker, blob_place
from langgraph_vat._records import Blob, Entry, Fence, PutEntry
from langgraph_vat._seal.codec import Codec
from langgraph_vat.errors import SealError

# Bytes from which on a value is worth it.
_LEAST = 16 * 2**10
_MARK_BYTES = 8


def marked(blob: Blob) -> Blob:
    """Return a value as a head is to hold it: a large one under a new mark."""
    is_large = blob.data is not None and len(blob.data) >= _LEAST
    return blob._replace(mark=os.urandom(_MARK_BYTES)) if is_large else blob


def to_send(
    shared: Shared, codec: Codec, thread_id: str, entry: PutEntry, *, is_patched: bool
) -> PutEntry:
    """Return an entry with its large values marked, or as patches of what the head holds."""
    blobs = []
    for blob in entry.blobs:
        base = shared.bases.get(thread_id, entry.checkpoint_ns, blob.channel)
        patch_ = _patch(codec, entry.checkpoint_ns, blob, base) if is_patched and base else None
        blobs.append(patch_ or marked(blob))
    return replace(entry, blobs=tuple(blobs))


def _patch(codec: Codec, checkpoint_ns: str, blob: Blob, base: Blob) -> Blob | None:
    """Return a value as a patch of the base, if it is large and changed little."""
    if blob.data is None or len(blob.data) < _LEAST or base.version == blob.version:
        return None

    def opened(one: Blob) -> tuple[str, bytes]:
        place = blob_place(checkpoint_ns, one.channel, one.version)
        return codec.open(one.type, one.data or b"", *place)

    with suppress(SealError):  # the thread has another key by now
        made = patch(*opened(blob), opened(base)[1])
        if made is not None:
            sealed = codec.seal(*made, *blob_place(checkpoint_ns, blob.channel, blob.version))
            return Blob(blob.channel, blob.version, *sealed, base.version, base.mark)
    return None


async def made_whole(
    shared: Shared,
    session: Session,
    thread_id: str,
    fence: Fence | None,
    entries: list[Entry],
    copies: Sequence[Entry],
) -> list[Entry]:
    """
    Return the entries of a journal without patches.

    What builds on something that is not there, yet, needs what nobody has: it
    is held back. For whoever has not the thread's key, the journal ends before
    the first patch.

    Args:
        shared: The memory of this process.
        session: The transaction that holds the thread's lock.
        thread_id: The thread.
        fence: That of its present life, of which alone entries matter.
        entries: What the journal has, in its order.
        copies: What may be built on, too.
    """
    puts = [entry for entry in entries if isinstance(entry, PutEntry)]
    bases = {(e.checkpoint_ns, b.channel, b.base) for e in puts for b in e.blobs if b.base}
    if not bases or fence is None:
        return entries
    known = await known_in(shared, session, thread_id, fence)
    if known is None:
        first = next(at for at, entry in enumerate(entries) if _is_patched(entry))
        return entries[:first]
    codec = known.codec(NO_SERDE, thread_id)
    names = ("namespaces", "channels", "versions")
    params = {"thread": thread_id, **columns(sorted(bases), *names)}
    rows = await session.fetch(sql.SELECT_WITH_BASES, params)
    opener = _Opener(codec, bases, rows)
    for entry in copies:
        opener.whole(entry)
    return [
        opener.whole(entry) if entry.fence.generation == fence.generation else entry
        for entry in entries
    ]


def _is_patched(entry: Entry) -> bool:
    return isinstance(entry, PutEntry) and any(blob.base for blob in entry.blobs)


class _Opener:
    """Makes entries whole, one after another: each builds on what came before."""

    def __init__(self, codec: Codec, bases: set[tuple[str, str, str]], rows: Sequence[Row]) -> None:
        self._codec = codec
        self._bases = bases
        self._values: dict[tuple[str, str, str], bytes] = {}
        stored: dict[str, list[Blob]] = {}
        for ns, *blob in rows:
            stored.setdefault(ns, []).append(Blob(*blob))
        self._stored = {ns: Unpacker(codec, ns, blobs) for ns, blobs in stored.items()}

    def whole(self, entry: Entry) -> Entry:
        """Return an entry whose values are whole; or that needs what there is not."""
        if not isinstance(entry, PutEntry):
            return entry
        blobs, needs = [], entry.needs
        for blob in entry.blobs:
            one = self._whole(entry.checkpoint_ns, blob)
            needs = needs if one else (*needs, (blob.channel, ""))
            blobs.append(one or blob)
        return replace(entry, blobs=tuple(blobs), needs=needs)

    def _whole(self, ns: str, blob: Blob) -> Blob | None:
        """Return a whole value, and remember it if something builds on it; None if it cannot be."""
        key = ns, blob.channel, blob.version
        if blob.data is None or not (blob.base or key in self._bases):
            return blob
        place = blob_place(ns, blob.channel, blob.version)
        try:
            type_, data = self._codec.open(blob.type, blob.data, *place)
        except SealError:
            # It was changed: a whole one is stored as it is, and refused to its readers.
            return None if blob.base else blob
        if not blob.base:
            self._values[key] = data
            return blob
        with suppress(SealError):
            if not is_patch(type_):
                raise damaged()
            type_, data = unpack(type_, data, self._base(ns, blob.channel, blob.base))
            self._values[key] = data
            return Blob(blob.channel, blob.version, *self._codec.seal(type_, data, *place))
        return None

    def _base(self, ns: str, channel: str, version: str) -> bytes | None:
        value = self._values.get((ns, channel, version))
        if value is None and ns in self._stored:
            value = self._stored[ns].base(channel, version)
        return value
