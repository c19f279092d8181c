"""
What is in the clear, sealed: a step, or the rows of a thread.

A value keeps the bytes that the serializer made of it. Of a checkpoint there
stays readable what does of one that was sealed from the first. Of what cannot
be sealed an error says where it stands, never what is in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import orjson
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_vat._durable import checkpoints as sql
from langgraph_vat._durable.packing import PATCH, ZSTD, unpack
from langgraph_vat._durable.rows import columns
from langgraph_vat._io.protocols import Row, Session
from langgraph_vat._ops.address import tenant_of
from langgraph_vat._ops.compact import make_whole
from langgraph_vat._ops.rows import BLOBS, EXACTS, WRITES, Kind, store
from langgraph_vat._ops.shared import NO_SERDE, Known, Shared, tokens
from langgraph_vat._ops.values import blob_place, encode_core, write_place
from langgraph_vat._records import Blob, Core, Entry, PutEntry, Write
from langgraph_vat._seal.codec import Codec, is_sealed
from langgraph_vat._seal.legacy import LegacySerializer
from langgraph_vat.errors import SealError, UnreadableError, VatError
from langgraph_vat.serde import codec_for

# Rows that are in memory at once.
_MOST_ROWS = 64


def is_in_the_clear(entry: Entry) -> bool:
    """Whether anything of a step is."""
    if isinstance(entry, PutEntry):
        types = [blob.type for blob in entry.blobs if blob.data is not None]
        types.append(entry.core.exact_type)
    else:
        types = [write.type for write in entry.writes]
    return not all(map(is_sealed, types))


def seal_value(
    serde: SerializerProtocol, source: Codec, target: Codec, type_: str, data: bytes, *place: str
) -> tuple[str, bytes]:
    """
    Return a value that `source` has, sealed by `target` for the same place.

    Raises:
        SealError: It is sealed already; or it is encrypted, and stays so.
    """
    type_, data = source.open(type_, data, *place)
    if LegacySerializer.is_encrypted(type_.removesuffix(PATCH).removesuffix(ZSTD)):
        if not isinstance(serde, LegacySerializer):
            raise SealError(
                "LangGraph's EncryptedSerializer wrote some of it, and sealed as they are these"
                " values could not be read. Pass serde=LegacySerializer(), with that key."
            )
        type_, data = serde.decrypted(*unpack(type_, data))
    return target.seal(type_, data, *place)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say of which row an error is; damaged ones, and serializers, may raise anything."""
    try:
        yield
    except VatError as error:
        error.add_note(f"This is of {what}.")
        raise
    except Exception as error:  # noqa: BLE001 - see above
        found = UnreadableError(
            f"{what} cannot be sealed ({type(error).__name__}): it is damaged. It was not changed."
            " Restore it from a backup, or delete it."
        )
        raise found from None  # what was raised may quote it


def told(error: Exception) -> str:
    """Return what an error says, and where."""
    return " ".join([str(error), *getattr(error, "__notes__", ())])


class Sealer:
    """
    Seals what a thread has in the clear.

    Args:
        shared: The memory of this process.
        thread_id: The thread.
        serde: What its values were serialized by.
        target: Seals them.
    """

    def __init__(
        self, shared: Shared, thread_id: str, serde: SerializerProtocol, target: Codec
    ) -> None:
        self._shared = shared
        self._tenant = tenant_of(thread_id)
        self._serde = serde
        self._source = codec_for(serde, None)
        self._target = target

    def value(self, type_: str, data: bytes, *place: str) -> tuple[str, bytes]:
        """
        Return a value sealed for its place.

        Raises:
            SealError: It is sealed already; or it is encrypted, and stays so.
        """
        return seal_value(self._serde, self._source, self._target, type_, data, *place)

    def new(self, value: Any, *place: str) -> tuple[str, bytes]:
        """Return a value sealed that was not serialized yet."""
        return self._target.dump(value, *place)

    def core(
        self,
        checkpoint: Mapping[str, Any],
        metadata: Mapping[str, Any],
        exact: tuple[str, bytes],
        *place: str,
    ) -> Core:
        """Return a checkpoint and its metadata as they are stored sealed."""
        hidden: Mapping[str, Any] = {}
        if exact[0]:
            metadata, hidden = self._source.load(*exact, "metadata", *place)
        return encode_core(
            {**checkpoint, **hidden},
            metadata,
            self._target,
            place,
            self._shared.settings.thread_metadata,
            tokens(self._shared, self._tenant, metadata),
        )


async def seal_thread(session: Session, thread_id: str, sealer: Sealer) -> int:
    """
    Seal all rows of a thread that is locked, a page at a time; return how many.

    Raises:
        SealError: One of them is sealed already.
        InvalidInputError: The serializer refuses what one of them holds.
        UnreadableError: One of them is damaged, or of a class that is not there any more.
    """
    for key in await session.fetch(sql.ENCRYPTED_BASES, {"thread": thread_id}):
        # It gets other bytes, and is no base any more.
        await make_whole(session, codec_for(NO_SERDE, None), (thread_id, *key))
    values = 0
    for kind, seal in ((BLOBS, _seal_values), (WRITES, _seal_values), (EXACTS, _seal_checkpoints)):
        after: Sequence[Any] = ("", "", "", -(2**31))[: len(kind.names)]
        size = _MOST_ROWS
        while size == _MOST_ROWS:
            params = {f"after_{number}": one for number, one in enumerate(after)}
            params |= {"thread": thread_id, "limit": _MOST_ROWS}
            rows = await session.fetch(kind.select_all, params)
            await seal(session, thread_id, sealer, kind, rows)
            size, values = len(rows), values + len(rows)
            after = rows[-1][: len(kind.names)] if rows else after
    return values


async def _seal_values(
    session: Session, thread_id: str, sealer: Sealer, kind: Kind, rows: Sequence[Row]
) -> None:
    new = []
    for row in rows:
        *where, type_, data = row
        place = kind.place(*where)
        with naming(f"the {place[0]} at {place[1:]}"):
            new.append(kind.new(row, sealer.value(type_, data, *place)))
    await store(session, thread_id, kind, new)


async def _seal_checkpoints(
    session: Session, thread_id: str, sealer: Sealer, _: Kind, rows: Sequence[Row]
) -> None:
    new: list[tuple[Any, ...]] = []
    blobs: list[tuple[Any, ...]] = []
    for ns, checkpoint_id, stored, metadata, type_, exact in rows:
        with naming(f"checkpoint {checkpoint_id!r} of namespace {ns!r}"):
            checkpoint, inline = _divided(stored)
            versions = checkpoint["channel_versions"]
            for channel, value in inline.items():
                where = ns, channel, str(versions[channel])
                blobs.append((thread_id, *where, *sealer.new(value, *blob_place(*where))))
            core = sealer.core(checkpoint, metadata, (type_, exact), ns, checkpoint_id)
        readable = core.checkpoint.decode(), core.metadata.decode()
        new.append((ns, checkpoint_id, *readable, core.exact_type, core.exact))
    if blobs:  # where there is a value already, what the checkpoint has only marks it
        names = ("threads", "namespaces", "channels", "versions", "types", "blobs")
        await session.execute(sql.INSERT_MISSING_BLOBS, columns(blobs, *names))
    if new:
        names = ("namespaces", "ids", "checkpoints", "metadata", "types", "exacts")
        params = {"thread": thread_id, **columns(new, *names)}
        await session.execute(sql.SEAL_CHECKPOINTS, params)


def _divided(stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint without the values that PostgresSaver keeps inside, and those."""
    checkpoint = dict(stored)
    inline = checkpoint.pop("channel_values", None) or {}
    versions = checkpoint.get("channel_versions") or {}
    # A value without a version: as `with_sends` has it.
    newest = max(versions.values(), key=str, default="1")
    checkpoint["channel_versions"] = {**dict.fromkeys(inline, newest), **versions}
    return checkpoint, inline


def sealed_entry(shared: Shared, thread_id: str, known: Known, entry: Entry) -> Entry:
    """Return a step sealed that was taken in the clear, and is whole."""
    sealer = Sealer(shared, thread_id, shared.serde, known.codec(shared.serde, thread_id))
    ns, checkpoint_id = entry.checkpoint_ns, entry.checkpoint_id

    def sealed_write(write: Write) -> Write:
        place = write_place(ns, checkpoint_id, write)
        type_, data = sealer.value(write.type, write.data, *place)
        return write._replace(type=type_, data=data)

    def sealed_blob(blob: Blob) -> Blob:
        if blob.data is None:
            return blob
        place = blob_place(ns, blob.channel, blob.version)
        type_, data = sealer.value(blob.type, blob.data, *place)
        return blob._replace(type=type_, data=data)

    if not isinstance(entry, PutEntry):
        return replace(entry, writes=tuple(map(sealed_write, entry.writes)))
    core = sealer.core(
        orjson.loads(entry.core.checkpoint),
        orjson.loads(entry.core.metadata),
        (entry.core.exact_type, entry.core.exact),
        ns,
        checkpoint_id,
    )
    return replace(entry, blobs=tuple(map(sealed_blob, entry.blobs)), core=core)
