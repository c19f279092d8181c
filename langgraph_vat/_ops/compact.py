"""
Pack what a flush is about to write, where the storage is ``compact``.

All of it happens under the row locks of the threads, against rows read there.

1. A value builds on an earlier one of its channel that is stored, or comes with
   this very flush; never on itself or a later one, so there are no circles.
2. A version that is stored already is left as it is: an entry may be flushed
   twice, and others may build on it by now. Where a caller reused a version for
   another value, what builds on the old one is made whole first.
3. A pending write builds on the value of its channel that came with it, which is
   often the same.
4. What cannot be opened here, because another process has the thread's key, is
   stored as it is.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from langgraph.checkpoint.serde.types import TASKS

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.packing import LEAST, is_patch, line_position, pack
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Row, Session
from langgraph_vat._ops.shared import NO_SERDE, Known, Shared, known_in
from langgraph_vat._ops.values import Unpacker, blob_place, write_place
from langgraph_vat._records import Blob, Entry, Fence, PutEntry, Write, WritesEntry
from langgraph_vat._seal.codec import Codec
from langgraph_vat.errors import SealError

Pairs = Sequence[tuple[str, Entry]]
BlobKey = tuple[str, str, str, str]
"""Thread, namespace, channel, version."""
LineKey = tuple[str, str, str]
Value = tuple[str, bytes]
"""A value as it was serialized: type tag and bytes."""
WriteKey = tuple[bytes, str, int]
"""Entry, task, idx: several entries may bring the same write, of which one is kept."""


@dataclass(frozen=True, slots=True)
class Packed:
    """How a value is stored: its position in a line of versions, and those it builds on."""

    type: str
    data: bytes
    step: int | None = None
    bases: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, bytes, int | None, str]:
        """Type, value, position and bases, as the insert takes them."""
        return self.type, self.data, self.step, json.dumps(self.bases)


@dataclass(slots=True)
class Packing:
    """What differs from how the entries have it; and what must not be written again."""

    blobs: dict[BlobKey, Packed] = field(default_factory=dict)
    writes: dict[WriteKey, Packed] = field(default_factory=dict)
    present: set[BlobKey] = field(default_factory=set)


@dataclass(slots=True)
class _Line:
    """The versions that lead to the newest of a channel, and the values that are at hand."""

    step: int = 0
    versions: list[str] = field(default_factory=list)
    values: dict[str, bytes] = field(default_factory=dict)


async def pack_entries(
    shared: Shared,
    session: Session,
    pairs: Pairs,
    fences: Mapping[str, Fence],
    *,
    is_compact: bool,
) -> Packing:
    """
    Pack the values of entries that are about to be written.

    Where the storage is not compact, see only that nothing builds on what is replaced.
    """
    packing, lines = Packing(), dict[LineKey, _Line]()
    codecs = await _codecs(shared, session, pairs, fences)
    new = _new_values(pairs, codecs)
    stored = await _Stored.read(session, codecs, list(new))
    packing.present = {key for key in stored.present if stored.value(key) == new[key]}
    for key in stored.present - packing.present:
        await make_whole(session, codecs[key[0]], key)
        lines[key[:3]] = _Line()  # nothing more builds on what was there
    for key, value in new.items():
        if is_compact and key not in packing.present:
            line = lines.setdefault(key[:3], stored.line(key[:3]))
            packing.blobs[key] = _pack_blob(stored, codecs[key[0]], key, line, value)
    for thread_id, entry in pairs:
        if is_compact and isinstance(entry, WritesEntry) and thread_id in codecs:
            for write in entry.writes:
                line = lines.get((thread_id, entry.checkpoint_ns, write.channel), _Line())
                if packed := _pack_write(codecs[thread_id], entry, write, line):
                    packing.writes[entry.uid, write.task_id, write.idx] = packed
    return packing


async def pack_stored(
    session: Session,
    codec: Codec,
    thread_id: str,
    values: dict[BlobKey, Value],
    bases: Collection[BlobKey],
) -> dict[BlobKey, Packed]:
    """
    Pack values that a thread has, open; they come in the order of their versions.

    Those in `bases` stay whole: something builds on them, and on nothing else.
    """
    stored = await _Stored.read(session, {thread_id: codec}, list(values), is_stored=True)
    lines: dict[LineKey, _Line] = {}
    packed = {}
    for key, value in values.items():
        line = lines.setdefault(key[:3], stored.line(key[:3]))
        if key in bases:
            line.versions = []
        packed[key] = _pack_blob(stored, codec, key, line, value)
    return packed


async def _codecs(
    shared: Shared, session: Session, pairs: Pairs, fences: Mapping[str, Fence]
) -> dict[str, Codec]:
    """Return how to open each thread's values, for those whose key is here."""
    found = {}
    for thread_id in {thread_id for thread_id, _ in pairs}:
        known: Known | None = Known(fences[thread_id], None)
        if shared.keyring is not None:
            known = shared.known(thread_id)
            if known is not None:
                known = await known_in(shared, session, thread_id, fences[thread_id])
        if known is not None:
            found[thread_id] = known.codec(NO_SERDE, thread_id)
    return found


def _new_values(pairs: Pairs, codecs: dict[str, Codec]) -> dict[BlobKey, Value]:
    """Return the new values, open; of a version that comes twice the last one."""
    found: dict[BlobKey, Value] = {}
    for thread_id, entry in pairs:
        if not isinstance(entry, PutEntry) or thread_id not in codecs:
            continue
        for blob in entry.blobs:
            if blob.data is None or blob.channel in entry.kept:
                continue
            key = (thread_id, entry.checkpoint_ns, blob.channel, blob.version)
            with suppress(SealError):
                found[key] = codecs[thread_id].open(blob.type, blob.data, *blob_place(*key[1:]))
    return found


def _pack_blob(stored: "_Stored", codec: Codec, key: BlobKey, line: _Line, value: Value) -> Packed:
    """Pack one value, and put it at the end of its line."""
    position, bases = line_position(line.step, line.versions)
    base = None
    if bases:
        base = line.values.get(bases[-1]) or stored.base((*key[:3], bases[-1]))
    type_, data = pack(*value, base)
    if not is_patch(type_):
        position, bases = 0, []
    line.step, line.versions = position, [*bases, key[3]]
    line.values[key[3]] = value[1]
    return Packed(*codec.seal(type_, data, *blob_place(*key[1:])), position, tuple(bases))


def _pack_write(codec: Codec, entry: WritesEntry, write: Write, line: _Line) -> Packed | None:
    """Pack a pending write, on the newest value of its channel that came with it, if one did."""
    if len(write.data) < LEAST or write.channel == TASKS:
        return None  # what is sent stays as PostgresSaver knows it
    place = write_place(entry.checkpoint_ns, entry.checkpoint_id, write)
    try:
        value = codec.open(write.type, write.data, *place)
    except SealError:
        return None
    base = line.values.get(line.versions[-1]) if line.versions else None
    type_, data = pack(*value, base)
    bases = tuple(line.versions) if is_patch(type_) else ()
    return Packed(*codec.seal(type_, data, *place), bases=bases)


class _Stored:
    """What the channels of a flush have in Postgres, as far as it matters here."""

    def __init__(self, codecs: dict[str, Codec], rows: Sequence[Row], blobs: Sequence[Row]) -> None:
        self.present: set[BlobKey] = set()
        self._lines: dict[LineKey, _Line] = {}
        for kind, *key, step, bases in rows:
            thread_id, ns, channel, version = key
            if kind == "present":
                self.present.add((thread_id, ns, channel, version))
            else:
                self._lines[thread_id, ns, channel] = _Line(step, [*bases, version])
        bases_of: dict[tuple[str, str], list[Blob]] = {}
        self._blobs: dict[BlobKey, Blob] = {}
        for thread_id, ns, *columns_ in blobs:
            blob = Blob(*columns_)
            self._blobs[thread_id, ns, blob.channel, blob.version] = blob
            bases_of.setdefault((thread_id, ns), []).append(blob)
        self._unpackers = {
            (thread_id, ns): Unpacker(codecs[thread_id], ns, some)
            for (thread_id, ns), some in bases_of.items()
        }

    @classmethod
    async def read(
        cls,
        session: Session,
        codecs: dict[str, Codec],
        new: Sequence[BlobKey],
        *,
        is_stored: bool = False,
    ) -> "_Stored":
        """
        Read the lines that go on, and what the new values will build on.

        With `is_stored` they are not new, and their lines those that lead to them.
        """
        if not new:
            return cls(codecs, [], [])
        names = ("threads", "namespaces", "channels", "versions")
        params = {**columns(new, *names), "is_stored": is_stored}
        rows = await session.fetch(sql.SELECT_LINES, params)
        found = cls(codecs, rows, [])
        needed: set[BlobKey] = set()
        for kind, *key, _, bases in rows:
            if kind == "present":
                needed |= {(*key[:3], version) for version in (*bases, key[3])}
        counts = Counter(key[:3] for key in new if key not in found.present)
        for line_key, line in found._lines.items():
            needed |= {(*line_key, version) for version in _bases(line, counts[line_key])}
        if not needed:
            return found
        blobs = await session.fetch(sql.SELECT_BLOBS, columns(sorted(needed), *names))
        return cls(codecs, rows, blobs)

    def line(self, key: LineKey) -> _Line:
        """Return the line of a channel; an empty one where it has no value."""
        return self._lines.get(key) or _Line()

    def value(self, key: BlobKey) -> Value | None:
        """Return a stored value, open; None where it cannot be."""
        blob = self._blobs.get(key)
        if blob is None or blob.data is None:
            return None
        try:
            return self._unpackers[key[:2]].blob(blob)
        except SealError:
            return None

    def base(self, key: BlobKey) -> bytes | None:
        """Return the bytes of a stored value."""
        value = self.value(key)
        return value[1] if value is not None else None


def _bases(line: _Line, count: int) -> set[str]:
    """Return the stored versions that so many new ones will build on, with all that those need."""
    found: set[str] = set()
    stored, step, versions = set(line.versions), line.step, line.versions
    for number in range(count):
        step, bases = line_position(step, versions)
        if bases and bases[-1] in stored:
            found.update(bases)
        versions = [*bases, f"new {number}"]
    return found


async def make_whole(session: Session, codec: Codec, key: BlobKey) -> None:
    """Have nothing build on a version that is about to get another value."""
    thread_id, ns, channel, version = key
    params = {"thread": thread_id, "namespace": ns, "channel": channel, "version": version}
    rows = await session.fetch(sql.SELECT_BUILT_ON, params)
    unpacker = Unpacker(codec, ns, [Blob(channel, *row[4:]) for row in rows if row[0] != "write"])
    blobs, writes = [], []
    for kind, checkpoint_id, task_id, idx, version_, type_, data, base in rows:
        with suppress(SealError):  # what is damaged already is left as it is
            if kind == "blob":
                blob = Blob(channel, version_, type_, data, base)
                whole = codec.seal(*pack(*unpacker.blob(blob)), *blob_place(ns, channel, version_))
                blobs.append((version_, *whole))
            elif kind == "write":
                write = Write(task_id, idx, "", channel, type_, data, base)
                place = write_place(ns, checkpoint_id, write)
                whole = codec.seal(*pack(*unpacker.write(checkpoint_id, write)), *place)
                writes.append((checkpoint_id, task_id, idx, *whole))
    names = ("versions", "types", "blobs")
    await session.execute(sql.MAKE_BLOBS_WHOLE, {**params, **columns(blobs, *names)})
    names_ = ("ids", "tasks", "idxs", "types", "blobs")
    await session.execute(sql.MAKE_WRITES_WHOLE, {**params, **columns(writes, *names_)})
