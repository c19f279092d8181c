"""
Between LangGraph's objects and our records.

Every channel value, write and exact copy of metadata goes through the codec
together with the place it belongs to; a sealed value opens nowhere else. What
Postgres must filter or join on stays JSON, but only where JSON gives back
exactly what was put in. The rest is kept exact beside it.
"""

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import orjson
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    writes_sort_key,
)
from langgraph.checkpoint.serde.types import TASKS

from langgraph_vat._durable.packing import damaged, is_packed, is_patch, unpack
from langgraph_vat._plain import is_plain
from langgraph_vat._records import Blob, Core, Fence, PutEntry, Snapshot, Write, WritesEntry
from langgraph_vat._seal.blind_index import BLIND, Tokens
from langgraph_vat._seal.codec import Codec, SealedCodec
from langgraph_vat.errors import InvalidInputError, SealError, TypeNotAllowedError, VatError

# What a sealed checkpoint still shows: LangGraph's own bookkeeping, without
# which nothing could be listed, joined or pruned in SQL.
READABLE_METADATA = frozenset(
    {"source", "step", "parents", "run_id", "counters_since_delta_snapshot"}
)
_CHECKPOINT_KEYS = frozenset(
    {"v", "id", "ts", "channel_versions", "versions_seen", "updated_channels"}
)


def encode_core(
    checkpoint: Mapping[str, Any],
    metadata: Mapping[str, Any],
    codec: Codec,
    place: Sequence[str],
    shown_keys: Collection[str],
    tokens: Tokens | None = None,
) -> Core:
    """
    Split a checkpoint and its metadata into what stays readable and what is kept exact.

    Of sealed metadata LangGraph's bookkeeping stays readable, and `shown_keys`; its `tokens`
    stand beside them.
    """
    is_sealed = isinstance(codec, SealedCodec)
    shown = {
        key: value
        for key, value in metadata.items()
        if (not is_sealed or key in READABLE_METADATA or key in shown_keys)
        and _is_plain(key, value)
    }
    if is_sealed and tokens:
        shown[BLIND] = tokens
    hidden = {
        key: value
        for key, value in checkpoint.items()
        if key != "channel_values"
        and (not _is_plain(key, value) or (is_sealed and key not in _CHECKPOINT_KEYS))
    }
    rest = {k: v for k, v in checkpoint.items() if k != "channel_values" and k not in hidden}
    exact_type, exact = "", b""
    if is_sealed or hidden or len(shown) < len(metadata):
        exact_type, exact = _dump_exact(codec, dict(metadata), hidden, place)
    checkpoint_json = _to_json("a field of the checkpoint beside its channels", rest)
    return Core(checkpoint_json, _to_json("the metadata", shown), exact_type, exact)


def _is_plain(key: Any, value: Any) -> bool:
    """Whether JSON gives a field back equal; of what contains itself, it cannot."""
    try:
        return isinstance(key, str) and is_plain(key) and is_plain(value)
    except RecursionError:
        return False


def _to_json(what: str, value: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise InvalidInputError(
            f"{what} is nested too deeply; nothing was written. Put less into it."
        ) from error


def _dump_exact(
    codec: Codec, metadata: Mapping[str, Any], hidden: Mapping[str, Any], place: Sequence[str]
) -> tuple[str, bytes]:
    """Dump both at once; say which of the two was refused."""
    try:
        return codec.dump([metadata, hidden], "metadata", *place)
    except TypeNotAllowedError as error:
        raise TypeNotAllowedError(f"metadata, or a field of the checkpoint: {error}") from None
    except InvalidInputError as error:
        cause = error.__cause__
    what = "the metadata"
    with suppress(InvalidInputError):
        codec.dump(metadata, "metadata", *place)
        what = "a field of the checkpoint beside its channels"
    raise InvalidInputError(
        f"{what} cannot be serialized ({type(cause).__name__}); nothing was written. Put only data"
        " into it, or pass a serde= that can."
    ) from cause


def encode_put(
    codec: Codec,
    fence: Fence,
    *,
    checkpoint_ns: str,
    parent_id: str,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions,
    is_whole: bool,
    shown_keys: Collection[str] = (),
    tokens: Tokens | None = None,
) -> PutEntry:
    """
    Encode one put: the new versions' values, or the values of all channels.

    A channel of `new_versions` without a value is empty at that version.
    """
    versions = {channel: str(v) for channel, v in checkpoint["channel_versions"].items()}
    versions |= {channel: str(v) for channel, v in new_versions.items()}
    values = checkpoint["channel_values"]
    brought = versions if is_whole else new_versions
    return PutEntry(
        uid=secrets.token_bytes(12),
        fence=fence,
        checkpoint_ns=checkpoint_ns,
        checkpoint_id=checkpoint["id"],
        parent_id=parent_id,
        run_id=str(metadata.get("run_id", "")),
        core=encode_core(
            checkpoint,
            cast("Any", metadata),
            codec,
            (checkpoint_ns, checkpoint["id"]),
            shown_keys,
            tokens,
        ),
        blobs=tuple(
            encode_blob(codec, checkpoint_ns, channel, versions[channel], values)
            for channel in brought
        ),
        kept=frozenset(versions.keys() - new_versions.keys()) if is_whole else frozenset(),
        needs=()
        if is_whole
        else tuple((c, v) for c, v in versions.items() if c not in new_versions and c in values),
    )


def encode_blob(
    codec: Codec, checkpoint_ns: str, channel: str, version: str, values: Mapping[str, Any]
) -> Blob:
    """Encode the value that `values` has for a channel, or that it has none."""
    if channel not in values:
        return Blob(channel, version, "", None)
    place = blob_place(checkpoint_ns, channel, version)
    with _naming(channel):
        return Blob(channel, version, *codec.dump(values[channel], *place))


def encode_writes(
    codec: Codec,
    fence: Fence,
    *,
    epoch: int,
    checkpoint_ns: str,
    checkpoint_id: str,
    run_id: str,
    writes: Sequence[tuple[str, Any]],
    task_id: str,
    task_path: str,
) -> WritesEntry:
    """Encode one put_writes. Within it, too, the last write of a special channel stays."""
    encoded: dict[int, Write] = {}
    for position, (channel, value) in enumerate(writes):
        idx = WRITES_IDX_MAP.get(channel, position)
        place = ("write", checkpoint_ns, checkpoint_id, task_id, str(idx), channel)
        with _naming(channel):
            encoded[idx] = Write(task_id, idx, task_path, channel, *codec.dump(value, *place))
    return WritesEntry(
        uid=secrets.token_bytes(12),
        fence=fence,
        epoch=epoch,
        checkpoint_ns=checkpoint_ns,
        checkpoint_id=checkpoint_id,
        run_id=run_id,
        writes=tuple(encoded.values()),
    )


@contextmanager
def _naming(channel: str) -> Iterator[None]:
    """Say which channel's value was refused."""
    try:
        yield
    except InvalidInputError as error:
        raise type(error)(f"channel {channel!r}: {error}") from error.__cause__


class Unpacker:
    """
    Opens values of one namespace, which may build on earlier ones of their channel.

    Args:
        codec: Opens what is sealed.
        checkpoint_ns: The namespace.
        bases: All that the values build on.
    """

    def __init__(self, codec: Codec, checkpoint_ns: str, bases: Iterable[Blob]) -> None:
        self._codec = codec
        self._ns = checkpoint_ns
        self._bases = {(blob.channel, blob.version): blob for blob in bases}
        self._opened: dict[tuple[str, str], bytes | None] = {}

    def blob(self, blob: Blob) -> tuple[str, bytes]:
        """Return the value of a channel that is not empty, as it was serialized."""
        return self._open(blob, is_base=False)

    def _open(self, blob: Blob, *, is_base: bool) -> tuple[str, bytes]:
        if blob.data is None:
            raise damaged()  # a base that is empty
        place = blob_place(self._ns, blob.channel, blob.version)
        type_, data = self._codec.open(blob.type, blob.data, *place)
        if blob.base and not is_patch(type_):
            raise damaged()
        base = self.base(blob.channel, blob.base)
        return unpack(type_, data, base, is_base=is_base)

    def write(self, checkpoint_id: str, write: Write) -> tuple[str, bytes]:
        """Return the value of a pending write, as it was serialized."""
        place = write_place(self._ns, checkpoint_id, write)
        type_, data = self._codec.open(write.type, write.data, *place)
        return unpack(type_, data, self.base(write.channel, write.base))

    def load_blob(self, blob: Blob) -> Any:
        """Return the value of a channel that is not empty."""
        return self._codec.parse(*self.blob(blob))

    def load_write(self, checkpoint_id: str, write: Write) -> Any:
        """Return the value of a pending write."""
        return self._codec.parse(*self.write(checkpoint_id, write))

    def base(self, channel: str, version: str) -> bytes | None:
        """Return the bytes of what values build on; None if it is not there."""
        key = channel, version
        if key not in self._opened:
            self._opened[key] = None  # what builds on itself finds nothing
            base = self._bases.get(key) if version else None
            if base is not None:
                self._opened[key] = self._open(base, is_base=True)[1]
        return self._opened[key]


def blob_place(checkpoint_ns: str, channel: str, version: str) -> tuple[str, ...]:
    """Return what a channel's value is bound to."""
    return "blob", checkpoint_ns, channel, version


def write_place(checkpoint_ns: str, checkpoint_id: str, write: Write) -> tuple[str, ...]:
    """Return what a pending write is bound to."""
    return (
        "write",
        checkpoint_ns,
        checkpoint_id,
        write.task_id,
        str(write.idx),
        write.channel,
    )


def unpacked(snapshot: Snapshot, codec: Codec) -> Snapshot:
    """Return a checkpoint as a head holds it: nothing in it builds on anything else."""
    unpacker = Unpacker(codec, snapshot.checkpoint_ns, snapshot.bases)
    return replace(
        snapshot,
        blobs=tuple(
            unpacked_blob(unpacker, codec, snapshot.checkpoint_ns, b) for b in snapshot.blobs
        ),
        writes=tuple(
            unpacked_write(unpacker, codec, snapshot.checkpoint_ns, snapshot.checkpoint_id, w)
            for w in snapshot.writes
        ),
        bases=(),
    )


def unpacked_blob(unpacker: Unpacker, codec: Codec, checkpoint_ns: str, blob: Blob) -> Blob:
    """Return a value sealed anew, if it was packed."""
    if blob.data is None or not is_packed(blob.type):
        return blob
    place = blob_place(checkpoint_ns, blob.channel, blob.version)
    type_, data = codec.seal(*unpacker.blob(blob), *place)
    return blob._replace(type=type_, data=data, base="")


def unpacked_write(
    unpacker: Unpacker, codec: Codec, checkpoint_ns: str, checkpoint_id: str, write: Write
) -> Write:
    """Likewise of a pending write."""
    if not is_packed(write.type):
        return write
    place = write_place(checkpoint_ns, checkpoint_id, write)
    type_, data = codec.seal(*unpacker.write(checkpoint_id, write), *place)
    return write._replace(type=type_, data=data, base="")


def without_values(snapshot: Snapshot) -> Snapshot:
    """Return a checkpoint without the values of channels, and without pending writes."""
    return replace(snapshot, inline={}, blobs=(), writes=(), sends=(), bases=())


def refuse_plaintext(snapshot: Snapshot, codec: Codec) -> None:
    """
    Refuse a sealed checkpoint whose readable part holds what we never leave there.

    Raises:
        SealError: It has a value, metadata or a field in the clear.
    """
    is_clean = (
        snapshot.exact_type
        and not snapshot.inline
        and snapshot.checkpoint.keys() <= _CHECKPOINT_KEYS
    )
    if isinstance(codec, SealedCodec) and not is_clean:
        raise SealError(
            f"checkpoint {snapshot.checkpoint_id} must be sealed and has parts in the clear. It was"
            " not used: whoever writes to the database may have put them there. Restore it."
        )


def load_exact(codec: Codec, snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the whole metadata, and what else the checkpoint carried."""
    if not snapshot.exact_type:
        return snapshot.metadata, {}
    place = ("metadata", snapshot.checkpoint_ns, snapshot.checkpoint_id)
    metadata, hidden = codec.load(snapshot.exact_type, snapshot.exact, *place)
    return metadata, hidden


def with_sends(snapshot: Snapshot, codec: Codec) -> Snapshot:
    """
    Return the checkpoint as version 4 would have it: what was sent is a channel's value.

    Before, it was left among the writes of the parent. PostgresSaver does the same.
    """
    if not snapshot.sends:
        return snapshot
    versions = dict(snapshot.checkpoint["channel_versions"])
    versions[TASKS] = max(versions.values(), default="1")
    ns, parent_id = snapshot.checkpoint_ns, snapshot.parent_id
    values = [Unpacker(codec, ns, ()).load_write(parent_id, write) for write in snapshot.sends]
    return replace(
        snapshot,
        checkpoint={**snapshot.checkpoint, "channel_versions": versions},
        inline={**snapshot.inline, TASKS: values},
        sends=(),
    )


def to_tuple(snapshot: Snapshot, codec: Codec, thread_id: str) -> CheckpointTuple:
    """
    Return what LangGraph reads, for the thread id by which the caller knows it.

    Raises:
        VatError: A value cannot be read; its notes say where it stands.
    """
    try:
        return _to_tuple(snapshot, codec, thread_id)
    except VatError as error:
        error.add_note(
            f"This is of checkpoint {snapshot.checkpoint_id!r} of thread {thread_id!r}, namespace"
            f" {snapshot.checkpoint_ns!r}."
        )
        raise


def _to_tuple(snapshot: Snapshot, codec: Codec, thread_id: str) -> CheckpointTuple:
    refuse_plaintext(snapshot, codec)
    snapshot = with_sends(snapshot, codec)
    ns, checkpoint_id = snapshot.checkpoint_ns, snapshot.checkpoint_id
    metadata, hidden = load_exact(codec, snapshot)
    values = dict(snapshot.inline)
    unpacker = Unpacker(codec, ns, snapshot.bases)
    for blob in snapshot.blobs:
        if blob.data is not None and blob.type != "empty":
            values[blob.channel] = unpacker.load_blob(blob)
    writes = sorted(snapshot.writes, key=lambda w: writes_sort_key(w.task_path, w.task_id, w.idx))
    checkpoint = {**snapshot.checkpoint, **hidden, "channel_values": values}
    return CheckpointTuple(
        config=address(thread_id, ns, checkpoint_id),
        checkpoint=cast("Checkpoint", checkpoint),
        metadata=cast("CheckpointMetadata", metadata),
        parent_config=address(thread_id, ns, snapshot.parent_id) if snapshot.parent_id else None,
        pending_writes=[
            (w.task_id, w.channel, unpacker.load_write(checkpoint_id, w)) for w in writes
        ],
    )


def next_version(current: str | int | None) -> str:
    """Return a version greater than `current`, unlike any other's that follows the same one."""
    number = 0 if current is None else int(str(current).split(".")[0])
    return f"{number + 1:032}.0.{secrets.randbelow(10**16):016}"


def address(thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> RunnableConfig:
    """Return the config that names one checkpoint."""
    return {
        "configurable": {
            "thread_id": thread_id,
            "checkpoint_ns": checkpoint_ns,
            "checkpoint_id": checkpoint_id,
        }
    }
