"""
What of a step travels to Redis: of a large value that grew, what is new.

Redis would write a large value twice for each step, and log both. So the head
keeps one version whole, under a mark, and the newest as one patch of it. The
journal has the patch, too: whoever flushes it finds the base in front of it in
the journal, or in Postgres. The process that took the step keeps it whole.
"""

import os
from contextlib import suppress
from dataclasses import replace

from langgraph_vat._durable.packing import patch
from langgraph_vat._ops.shared import Shared
from langgraph_vat._ops.values import blob_place
from langgraph_vat._records import Blob, PutEntry
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
