"""
What of a step travels to Redis: of a large value that grew, what is new.

Redis would write a large value twice for each step, and log both. So the head
keeps one version whole, under a mark, and the newest as one patch of it. The
journal has the patch, too: whoever flushes it finds the base in front of it in
the journal, or in Postgres. The process that took the step keeps it whole.
"""

import os
from dataclasses import replace

from langgraph_vat._durable.packing import patch
from langgraph_vat._hot.bases import Base
from langgraph_vat._ops.shared import Shared
from langgraph_vat._ops.values import blob_place
from langgraph_vat._records import Blob, PutEntry
from langgraph_vat._seal.codec import Codec

# Bytes from which on a value is worth it.
_LEAST = 16 * 2**10
_MARK_BYTES = 8


def patched(
    shared: Shared, codec: Codec, thread_id: str, entry: PutEntry, *, is_patched: bool
) -> tuple[PutEntry, dict[str, Base | None]]:
    """Return an entry as it is sent, and which of its channels a head then holds whole."""
    blobs: list[Blob] = []
    whole: dict[str, Base | None] = {}
    for blob in entry.blobs:
        if blob.data is None or len(blob.data) < _LEAST:
            whole[blob.channel] = None
            blobs.append(blob)
            continue
        place = blob_place(entry.checkpoint_ns, blob.channel, blob.version)
        type_, data = codec.open(blob.type, blob.data, *place)
        base = shared.bases.get(thread_id, entry.checkpoint_ns, blob.channel)
        made = None
        if is_patched and base is not None and base.version != blob.version:
            made = patch(type_, data, base.data)
        if made is None or base is None:
            base = whole[blob.channel] = Base(os.urandom(_MARK_BYTES), blob.version, data)
            blobs.append(blob._replace(mark=base.mark))
        else:
            sealed = codec.seal(*made, *place)
            blobs.append(Blob(blob.channel, blob.version, *sealed, base.version, base.mark))
    return replace(entry, blobs=tuple(blobs)), whole
