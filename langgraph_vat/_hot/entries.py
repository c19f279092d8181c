"""
How a journal entry and a head look in Redis.

Both are field/value pairs. An entry of the journal carries the pairs of the
head that it changes, so a script receives each value once and writes it
twice. Fields:

====================  =====================================================
``k``                 ``put`` or ``writes``
``u``                 entry's own random id
``f``                 fence; in a head ``@``, epoch, ``@``, id, ``@`` and the head's own key follow
``s`` ``i``           namespace, checkpoint id
``p`` ``r`` ``e``     parent checkpoint id, run id, epoch
``c``                 packed `Core`, summed with namespace, checkpoint id and parent
``q`` ``d``           packed `kept` and `needs`
``n:CHANNEL``         version of a channel
``b:CHANNEL``         its value, summed with the version: type, NUL, bytes; nothing if it is empty
``m:CHANNEL``         a random mark of that value; nothing of a small one
``a:CHANNEL``         packed: a patch's version, base, mark of the base, type, bytes; in a
                      head it counts if that is the version, and the mark of ``b:``
``w:LEN:ID:…``        a write with idx >= 0 (the first stays)
``x:LEN:ID:…``        a write with idx < 0 (the last stays)
``o``                 packed: the pairs of an entry that is big or has many
``l``                 the head holds values that Postgres has no blobs for
``z``                 the head is sparse: versions only, no values; reads go past it
``h``                 of a head: how many other fields it has; of an entry: their sum
====================  =====================================================

What is *summed* has a CRC-32 in front: of itself, its field's name, and the
thread's generation. It tells what was cut, emptied or mixed up; against who
means it, there is sealing.
"""

from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

import ormsgpack

from langgraph_vat._io.forks import made_once
from langgraph_vat._records import Blob, Core, Entry, Fence, PutEntry, Snapshot, Write, WritesEntry
from langgraph_vat.errors import RefusedError

Pairs = list[bytes]

# What reading something else than was written raises.
DAMAGES = (AttributeError, KeyError, TypeError, ValueError)
# Fields of a sparse head, beside the versions.
_SPARSE = frozenset((b"i", b"p", b"l"))
# What the names of a head's fields begin with.
_KINDS = frozenset((*_SPARSE, b"f", b"c", b"h", b"n:", b"b:", b"m:", b"a:", b"w:", b"x:"))
_SUM_BYTES = 4


def put_pairs(entry: PutEntry) -> tuple[Pairs, Pairs]:
    """Return the pairs that only the journal holds, and those of the head."""
    journal = [b"u", entry.uid, b"s", entry.checkpoint_ns.encode(), b"r", entry.run_id.encode()]
    journal += [b"q", ormsgpack.packb(sorted(entry.kept)), b"d", ormsgpack.packb(entry.needs)]
    return journal, list(_blob_pairs(entry.fence.generation, entry.blobs))


def writes_pairs(entry: WritesEntry) -> tuple[Pairs, Pairs]:
    """Return the pairs that only the journal holds, and those it shares with the head."""
    journal = [b"u", entry.uid, b"s", entry.checkpoint_ns.encode(), b"r", entry.run_id.encode()]
    journal += [b"e", b"%d" % entry.epoch]
    generation = entry.fence.generation
    return journal, list(write_pairs(generation, entry.checkpoint_id, entry.writes))


def sparse(pairs: Pairs) -> Pairs:
    """Return the pairs of a head that are left when it has no values."""
    kept = zip(pairs[::2], pairs[1::2], strict=True)
    return [part for pair in kept if pair[0] in _SPARSE or pair[0][:2] == b"n:" for part in pair]


def packed(pairs: Pairs) -> Pairs:
    """Return one pair that holds others, for the journal alone."""
    return [b"o", ormsgpack.packb(pairs)]


def sum_pair(entry: Entry, pairs: Pairs) -> Pairs:
    """Return the pair that an entry is checked by; `pairs` are those that a script gets whole."""
    first = [b"f", entry.fence.text.encode(), b"i", entry.checkpoint_id.encode()]
    if isinstance(entry, PutEntry):
        first = [b"k", b"put", *first, b"p", entry.parent_id.encode()]
    else:
        first = [b"k", b"writes", *first]
    return [b"h", _sum(ormsgpack.packb(first + pairs))]


def needs_pairs(entry: PutEntry) -> Pairs:
    """Return the head fields that a delta relies on."""
    return [
        part for channel, version in entry.needs for part in (_version(channel), version.encode())
    ]


def mark_pairs(entry: PutEntry) -> Pairs:
    """Return the head fields that its patches rely on."""
    return [
        part
        for blob in entry.blobs
        if blob.base
        for part in (b"m:" + blob.channel.encode(), blob.mark)
    ]


def head_pairs(generation: str, snapshot: Snapshot, core: Core) -> Pairs:
    """Return the pairs of the head that shows `snapshot`, the id first."""
    where = (generation, snapshot.checkpoint_ns, snapshot.checkpoint_id, snapshot.parent_id)
    pairs = [b"i", where[2].encode(), b"p", where[3].encode(), b"c", pack_core(core, *where)]
    pairs += _blob_pairs(generation, snapshot.blobs)
    pairs += write_pairs(generation, snapshot.checkpoint_id, snapshot.writes)
    if snapshot.inline:
        pairs += [b"l", b"1"]
    return pairs


def empty_head(generation: str, checkpoint_ns: str) -> Pairs:
    """Return the pairs of the head of a namespace that is known to hold no checkpoint."""
    place = _core_place(generation, checkpoint_ns, "", "")
    return [b"i", b"", b"p", b"", b"c", _summed(b"", *place)]


def pack_core(
    core: Core, generation: str, checkpoint_ns: str, checkpoint_id: str, parent_id: str
) -> bytes:
    """Pack a core into one value."""
    place = _core_place(generation, checkpoint_ns, checkpoint_id, parent_id)
    return _summed(ormsgpack.packb(tuple(core)), *place)


def _core_place(*where: str) -> list[bytes]:
    return [b"c", *(one.encode() for one in where)]


def parse_entry(fields: Sequence[bytes]) -> Entry:
    """
    Return the entry that a journal's field list holds.

    Raises:
        RefusedError: It is damaged.
    """
    try:
        return _parse_entry(fields)
    except DAMAGES:
        raise RefusedError(
            "an entry of the journal in Redis is damaged, and cannot be read. The process that took"
            " the step still has it, if it lives."
        ) from None


def _parse_entry(fields: Sequence[bytes]) -> Entry:
    found = _mapping(fields)
    others = [part for pair in found.items() if pair[0] != b"h" for part in pair]
    if found[b"h"] != _sum(ormsgpack.packb(others)):
        raise ValueError("damaged")
    if inner := found.get(b"o"):
        found |= _mapping(ormsgpack.unpackb(inner))
    where: dict[str, Any] = {
        "uid": found[b"u"],
        "fence": Fence.parse(found[b"f"].decode()),
        "checkpoint_ns": found[b"s"].decode(),
        "checkpoint_id": found[b"i"].decode(),
        "run_id": found[b"r"].decode(),
    }
    if found[b"k"] == b"writes":
        epoch = int(found[b"e"])
        writes = _parse_writes(where["fence"].generation, found)
        return WritesEntry(**where, epoch=epoch, writes=tuple(writes.values()))
    parent_id, generation = found[b"p"].decode(), where["fence"].generation
    return PutEntry(
        **where,
        parent_id=parent_id,
        core=_core(found, generation, where["checkpoint_ns"], where["checkpoint_id"], parent_id),
        blobs=_parse_blobs(generation, found),
        kept=frozenset(ormsgpack.unpackb(found[b"q"])),
        needs=tuple((channel, version) for channel, version in ormsgpack.unpackb(found[b"d"])),
    )


class Head:
    """A head as Redis returned it."""

    def __init__(self, generation: str, checkpoint_ns: str, fields: Sequence[bytes]) -> None:
        self._generation = generation
        self._fields = _mapping(fields)
        is_whole = int(self._fields[b"h"]) == len(self._fields) - 1
        if not is_whole or any(field[:2] not in _KINDS for field in self._fields):
            raise ValueError("damaged")
        self.checkpoint_id = self._fields[b"i"].decode()
        self.parent_id = self._fields[b"p"].decode()
        where = (generation, checkpoint_ns, self.checkpoint_id, self.parent_id)
        self.core = _core(self._fields, *where) if self.checkpoint_id else None
        if self.core is None:
            _checked(self._fields[b"c"], *_core_place(*where))

    @made_once
    def blobs(self) -> tuple[Blob, ...]:
        """The values of all channels, empty ones included."""
        return _parse_blobs(self._generation, self._fields)

    @made_once
    def bases(self) -> tuple[Blob, ...]:
        """The values that those of them build on that are patches."""
        return tuple(
            _parse_whole(self._generation, self._fields, blob.channel, blob.base)
            for blob in self.blobs
            if blob.base
        )

    @property
    def held(self) -> dict[str, Blob]:
        """The large values that it holds whole, and under a mark."""
        whole = {blob.channel: blob for blob in (*self.blobs, *self.bases) if not blob.base}
        return {
            channel: blob._replace(mark=mark)
            for channel, blob in whole.items()
            if (mark := self._fields.get(b"m:" + channel.encode()))
        }

    @property
    def writes(self) -> tuple[Write, ...]:
        """The pending writes of this checkpoint; early writes of a later one are left out."""
        mine, writes = _write_prefix(self.checkpoint_id), self._all_writes
        return tuple(write for field, write in writes.items() if field[1:].startswith(mine))

    @made_once
    def _all_writes(self) -> dict[bytes, Write]:
        return _parse_writes(self._generation, self._fields)


def _mapping(fields: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(fields[::2], fields[1::2], strict=True))


def _version(channel: str) -> bytes:
    return b"n:" + channel.encode()


def _blob_pairs(generation: str, blobs: Iterable[Blob]) -> Iterable[bytes]:
    life = generation.encode()
    for blob in blobs:
        channel = blob.channel.encode()
        yield from (b"n:" + channel, blob.version.encode())
        if blob.base:
            field = b"a:" + channel
            patch = ormsgpack.packb((blob.version, blob.base, blob.mark, blob.type, blob.data))
            yield from (field, _summed(patch, life, field))
        else:
            field = b"b:" + channel
            value = b"" if blob.data is None else blob.type.encode() + b"\0" + blob.data
            yield from (field, _summed(value, life, field, blob.version.encode()))
            yield from (b"m:" + channel, blob.mark)


def _parse_blobs(generation: str, found: dict[bytes, bytes]) -> tuple[Blob, ...]:
    return tuple(
        _parse_patch(generation, found, field[2:].decode(), version.decode())
        or _parse_whole(generation, found, field[2:].decode(), version.decode())
        for field, version in found.items()
        if field.startswith(b"n:")
    )


def _parse_patch(
    generation: str, found: dict[bytes, bytes], channel: str, version: str
) -> Blob | None:
    """Return the patch that leads to a version, if there is one."""
    field = b"a:" + channel.encode()
    if field not in found:
        return None
    patch = _checked(found[field], generation.encode(), field)
    leads_to, base, mark, type_, data = _typed(patch, (str, str, bytes, str, bytes))
    # What is stored whole later leaves an older patch where it is.
    counts = leads_to == version and found.get(b"m:" + channel.encode(), mark) == mark
    return Blob(channel, version, type_, data, base, mark) if counts else None


def _parse_whole(generation: str, found: dict[bytes, bytes], channel: str, version: str) -> Blob:
    field = b"b:" + channel.encode()
    value = _checked(found[field], generation.encode(), field, version.encode())
    type_, separator, data = value.partition(b"\0")
    return Blob(channel, version, type_.decode(), data if separator else None)


def _write_prefix(checkpoint_id: str) -> bytes:
    raw = checkpoint_id.encode()
    return b":%d:%s:" % (len(raw), raw)


def write_pairs(generation: str, checkpoint_id: str, writes: Iterable[Write]) -> Iterable[bytes]:
    """Return the pairs of a checkpoint's pending writes."""
    prefix, life = _write_prefix(checkpoint_id), generation.encode()
    for write in writes:
        kind = b"w" if write.idx >= 0 else b"x"
        field = kind + prefix + b"%d:" % write.idx + write.task_id.encode()
        yield field
        yield _summed(ormsgpack.packb(write[:6]), life, field)  # what Redis has is whole


def _parse_writes(generation: str, found: dict[bytes, bytes]) -> dict[bytes, Write]:
    life, kinds = generation.encode(), (str, int, str, str, str, bytes)
    return {
        field: Write(*_typed(_checked(value, life, field), kinds))
        for field, value in found.items()
        if field[:2] in (b"w:", b"x:")
    }


def _core(found: dict[bytes, bytes], *where: str) -> Core:
    packed = _checked(found[b"c"], *_core_place(*where))
    return Core(*_typed(packed, (bytes, bytes, str, bytes)))


def _sum(data: bytes, *place: bytes) -> bytes:
    return crc32(data, crc32(b"\0".join(place))).to_bytes(_SUM_BYTES)


def _summed(data: bytes, *place: bytes) -> bytes:
    """Return a value with the sum of itself and of where it belongs in front."""
    return _sum(data, *place) + data


def _checked(summed: bytes, *place: bytes) -> bytes:
    """Return what `_summed` summed; `ValueError` where it is something else by now."""
    data = summed[_SUM_BYTES:]
    if summed[:_SUM_BYTES] != _sum(data, *place):
        raise ValueError("damaged")
    return data


def _typed(packed: bytes, kinds: Sequence[type]) -> list[Any]:
    """Unpack values of certain types; `ValueError` where they are others."""
    found = ormsgpack.unpackb(packed)
    if not isinstance(found, list) or [type(one) for one in found] != list(kinds):
        raise ValueError("damaged")
    return found
