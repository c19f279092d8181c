"""Rows of the checkpoint tables as records, and back."""

from collections.abc import Sequence
from typing import Any

from langgraph_vat._records import Blob, Snapshot, Write


def to_snapshot(row: Sequence[Any]) -> Snapshot:
    """Return the record of a row that one of the snapshot statements selected."""
    thread_id, ns, checkpoint_id, parent_id, stored, metadata, exact_type, exact, *parts = row
    blobs, writes, sends, bases = parts
    checkpoint = dict(stored)
    inline = checkpoint.pop("channel_values", None) or {}
    found = tuple(to_blob(*blob) for blob in blobs)
    named = {blob.channel for blob in found}
    return Snapshot(
        thread_id=thread_id,
        checkpoint_ns=ns,
        checkpoint_id=checkpoint_id,
        parent_id=parent_id,
        checkpoint=checkpoint,
        metadata=metadata,
        exact_type=exact_type,
        exact=exact,
        # Where a blob exists, the inline entry is only PostgresSaver's marker for it.
        inline={channel: value for channel, value in inline.items() if channel not in named},
        blobs=found,
        writes=tuple(_to_write(*write) for write in writes),
        sends=tuple(_to_write(*write) for write in sends),
        bases=tuple(to_blob(*blob) for blob in bases),
    )


def _to_write(
    task: bytes, idx: bytes, path: bytes, channel: bytes, type_: bytes, data: bytes, *base: bytes
) -> Write:
    parts = (part.decode() for part in base)
    return Write(
        task.decode(), int(idx), path.decode(), channel.decode(), type_.decode(), data, *parts
    )


def to_blob(channel: bytes, version: bytes, type_: bytes, data: bytes | None, base: bytes) -> Blob:
    """Return the record of a value that a statement selected as an array."""
    return Blob(channel.decode(), version.decode(), type_.decode(), data, base.decode())


def columns(rows: Sequence[Sequence[Any]], *names: str) -> dict[str, list[Any]]:
    """Turn rows into one array a column, the form `unnest` takes."""
    if not rows:
        return {name: [] for name in names}
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
