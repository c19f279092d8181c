"""
The large values that heads hold whole, as far as this process has met them.

A head keeps such a value under a random mark. Whoever knows what stands under
the mark may send the next version as a patch of it. What is forgotten here is
sent whole again, and nothing else comes of it.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping

from langgraph_vat._io.forks import renew_after_fork
from langgraph_vat._records import Blob

# Bytes of all values together.
_MOST = 64 * 2**20


class Bases:
    """Values as heads hold them, sealed ones too, of the threads that were used last."""

    def __init__(self) -> None:
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Know none."""
        self._lock = threading.Lock()
        self._threads: OrderedDict[str, dict[tuple[str, str], Blob]] = OrderedDict()
        self._size = 0

    def get(self, thread_id: str, checkpoint_ns: str, channel: str) -> Blob | None:
        """Return what the head holds of a channel, as far as is known."""
        with self._lock:
            return self._threads.get(thread_id, {}).get((checkpoint_ns, channel))

    def learn(self, thread_id: str, checkpoint_ns: str, held: Mapping[str, Blob]) -> None:
        """Remember what a head holds of some channels; one without a mark is not worth it."""
        with self._lock:
            known = self._threads.pop(thread_id, {})
            for channel, blob in held.items():
                old = known.pop((checkpoint_ns, channel), None)
                self._size -= _size(old)
                if blob.mark:
                    known[checkpoint_ns, channel] = blob
                    self._size += _size(blob)
            if known:
                self._threads[thread_id] = known
            while self._size > _MOST:
                self._drop(next(iter(self._threads)))

    def forget(self, thread_id: str) -> None:
        """Remember nothing of a thread."""
        with self._lock:
            self._drop(thread_id)

    def _drop(self, thread_id: str) -> None:
        dropped = self._threads.pop(thread_id, {})
        self._size -= sum(map(_size, dropped.values()))


def _size(blob: Blob | None) -> int:
    return len(blob.data or b"") if blob is not None else 0
